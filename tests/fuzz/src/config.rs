//! Configuration: the file, variables, flags.

use std::{collections::BTreeMap, fs::File, io::Write, os::fd::AsRawFd};

use pillion_daemon::config::{Config, KEYS, Sources};
use pillion_shm::Memfd;

use crate::cursor::Cursor;

/// A file that is in memory only, and the path that opens it.
fn file(text: &[u8]) -> (File, std::path::PathBuf) {
    let memory = Memfd::create("fuzz", 0).expect("memory");
    let mut file = File::from(memory.fd().try_clone_to_owned().expect("a descriptor"));
    file.write_all(text).expect("written");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    (file, path)
}

/// A configuration is refused with at least one reason, or it is the same when what `pillion config` shows of it is
/// read again; its limits can be had.
pub fn config(data: &[u8]) {
    let mut c = Cursor::new(data, 4096);
    let mut variables = BTreeMap::new();
    let mut flags = Vec::new();
    for _ in 0..c.below(4) {
        let key = c.pick(KEYS);
        let text = c.text(24);
        match c.flag() {
            true => drop(variables.insert(key.variable(), text)),
            false => flags.push((if c.rarely() { c.text(8) } else { key.name.to_owned() }, text)),
        }
    }
    let (_kept, path) = file(c.rest());
    let sources = Sources { file: Some(path), variables, flags, default_file: None };
    let loaded = match Config::load(&sources) {
        Ok(loaded) => loaded,
        Err(error) => return assert!(!error.0.is_empty() && !error.to_string().is_empty()),
    };
    let shown = loaded.to_toml();
    let (_kept, path) = file(shown.as_bytes());
    let again = Config::load(&Sources { file: Some(path), ..Sources::default() });
    let again = again.unwrap_or_else(|error| panic!("what is shown is refused: {error}\n{shown}"));
    assert_eq!(again.config, loaded.config, "{shown}");
    let config = loaded.config;
    let _ = (config.ssd_limits(1 << 30), config.lease(), config.idle_exit(), config.admits_other_users());
    let uid = c.number32();
    let _ = (config.uid_allowed(uid).is_ok(), config.tenant_allowed("default", uid).is_ok());
}
