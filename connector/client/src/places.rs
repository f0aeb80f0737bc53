//! Where the sidecar listens when nobody says otherwise. The daemon's `places` module must agree;
//! a test of the daemon compares the two.

use std::{env, path::PathBuf};

/// `<runtime dir>/<device>.sock`, the runtime dir being the first of `$PILLION_RUNTIME_DIR`,
/// `$XDG_RUNTIME_DIR/pillion`, `/run/pillion` if it can be used, `/tmp/pillion-<uid>`.
pub fn default_socket(device: &str) -> PathBuf {
    runtime_dir().join(format!("{device}.sock"))
}

fn runtime_dir() -> PathBuf {
    let set = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    if let Some(dir) = set("PILLION_RUNTIME_DIR") {
        return dir;
    }
    if let Some(dir) = set("XDG_RUNTIME_DIR").filter(|dir| dir.is_dir()) {
        return dir.join("pillion");
    }
    let usable = |dir: &str| {
        rustix::fs::access(dir, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK).is_ok()
    };
    if usable("/run/pillion") || usable("/run") {
        return PathBuf::from("/run/pillion");
    }
    PathBuf::from(format!("/tmp/pillion-{}", rustix::process::geteuid().as_raw()))
}
