//! Names the library as the driver's own is named, and keeps it loaded.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Whoever asks the loader for `libcuda.so` afterwards is given the fake that is already loaded.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    // Its threads run until the process ends: unloading it under them would crash.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    // Addresses handed out by cuGetProcAddress are the library's own, whatever else is loaded.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-Bsymbolic");
}
