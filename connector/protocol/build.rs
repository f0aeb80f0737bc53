//! Generates the Rust types of schema/pillion.fbs into OUT_DIR.

use std::{env, fs, path::Path};

fn main() {
    let schema = "schema/pillion.fbs";
    println!("cargo::rerun-if-changed={schema}");
    let declarations =
        planus_translation::translate_files(&[schema]).expect("schema/pillion.fbs should be valid");
    let code = planus_codegen::generate_rust(&declarations, false).expect("code for the schema");
    let out = env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    fs::write(Path::new(&out).join("wire.rs"), code).expect("OUT_DIR is writable");
}
