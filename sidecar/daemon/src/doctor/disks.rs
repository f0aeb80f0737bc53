//! The SSD directories: what the running sidecar says of them, or whether one could use them.

use std::path::Path;

use super::Check;
use crate::config::{ByteSize, Config, SsdDirectory};
use crate::status::{SsdDirectoryStatus, StatusReport};

const NAME: &str = "ssd";

/// Nothing without a directory in the configuration.
pub(super) fn directories(config: &Config, running: Option<&StatusReport>) -> Vec<Check> {
    let known = running.map(|report| report.ssd.directories.as_slice()).unwrap_or_default();
    if !known.is_empty() {
        return known.iter().map(used).collect();
    }
    config.ssd.iter().map(|one| usable(one, free_bytes(&one.path))).collect()
}

fn used(it: &SsdDirectoryStatus) -> Check {
    if it.engine.is_empty() {
        return Check::ok(NAME, format!("{}: being recovered", it.path));
    }
    let found = format!("{}: {} blocks, {}", it.path, it.records, it.engine);
    if it.read_only || it.retired > 0 {
        let found = format!("{found}, {} segments retired after errors", it.retired);
        return Check::warn(
            NAME,
            found,
            "look at the disk: the sidecar's log and dmesg say what it returned",
        );
    }
    match &it.refused {
        Some(why) => Check::warn(
            NAME,
            format!("{found}: {why}"),
            "the same work is done more slowly: raise `ulimit -l` to the pool's size, or allow io_uring",
        ),
        None => Check::ok(NAME, found),
    }
}

/// The nearest folder that is there says how much its file system has left; with what the directory has already.
fn free_bytes(path: &Path) -> Option<u64> {
    let there = path.ancestors().find(|folder| folder.exists())?;
    let stat = rustix::fs::statvfs(there).ok()?;
    let files = std::fs::read_dir(path).into_iter().flatten().flatten();
    let ours: u64 = files.filter_map(|file| Some(file.metadata().ok()?.len())).sum();
    Some(stat.f_bavail * stat.f_frsize + ours)
}

fn usable(wanted: &SsdDirectory, free: Option<u64>) -> Check {
    let path = wanted.path.display();
    if wanted.path.parent().is_none_or(|folder| !folder.is_dir()) && !wanted.path.is_dir() {
        let advice = "mount the disk, or make the folder above: the sidecar does not start without it";
        return Check::fail(NAME, format!("{path}: the folder above it is not there"), advice);
    }
    let capacity = wanted.capacity;
    match free {
        Some(free) if free < capacity.0 => Check::warn(
            NAME,
            format!("{path}: capacity {capacity}, the file system has room for {}", mib(free)),
            "lower the capacity in ssd: a full disk is lived with, but other programs use it, too",
        ),
        _ => Check::ok(NAME, format!("{path}: capacity {capacity}")),
    }
}

fn mib(bytes: u64) -> ByteSize {
    ByteSize(bytes >> 20 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;
    use crate::status::SsdStatus;

    #[test]
    fn folders_that_are_there_missing_and_too_small() {
        let folder = tempfile::tempdir().unwrap();
        let check = |path: &str, free| {
            let path = folder.path().join(path);
            usable(&SsdDirectory { path, capacity: ByteSize(100 << 20) }, free).verdict
        };
        assert_eq!(check("ssd", Some(100 << 20)), Verdict::Ok);
        assert_eq!(check("ssd", Some((100 << 20) - 1)), Verdict::Warn);
        assert_eq!(check("not/there", Some(1 << 40)), Verdict::Fail);
        assert!(free_bytes(&folder.path().join("ssd")).is_some());
        assert!(directories(&Config::default(), None).is_empty());
    }

    #[test]
    fn a_running_sidecar_is_believed() {
        let checked = |it: SsdDirectoryStatus| {
            let ssd = SsdStatus { directories: vec![it], ..SsdStatus::default() };
            directories(&Config::default(), Some(&StatusReport { ssd, ..StatusReport::default() }))[0].verdict
        };
        let fine = || SsdDirectoryStatus { engine: "io_uring".to_owned(), ..SsdDirectoryStatus::default() };
        assert_eq!(checked(fine()), Verdict::Ok);
        assert_eq!(checked(SsdDirectoryStatus { retired: 1, ..fine() }), Verdict::Warn);
        assert_eq!(checked(SsdDirectoryStatus { read_only: true, ..fine() }), Verdict::Warn);
        assert_eq!(
            checked(SsdDirectoryStatus { refused: Some("EPERM".to_owned()), ..fine() }),
            Verdict::Warn
        );
    }
}
