//! What the machine, or the container around us, lets us have.

use std::fs;
use std::path::{Path, PathBuf};

/// Memory that can be taken now without swapping: what the kernel says, or less
/// where a control group says so. `None` where neither can be read.
pub fn available_memory_bytes() -> Option<u64> {
    available_under(Path::new("/"))
}

fn available_under(root: &Path) -> Option<u64> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).ok();
    let free = meminfo.as_deref().and_then(meminfo_available);
    let group = cgroup_available(root);
    match (free, group) {
        (Some(free), Some(group)) => Some(free.min(group)),
        (free, group) => free.or(group),
    }
}

fn meminfo_available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// The tightest limit from our group up to the root; version 2, else version 1.
fn cgroup_available(root: &Path) -> Option<u64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let of = |controllers: &str| {
        groups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let names = fields.next()?;
            let found = if controllers.is_empty() {
                names.is_empty()
            } else {
                names.split(',').any(|name| name == controllers)
            };
            if found { fields.next() } else { None }
        })
    };
    let second = of("").and_then(|path| {
        let names = ["memory.max", "memory.current", "inactive_file "];
        tightest(&root.join("sys/fs/cgroup"), path, names)
    });
    let first = || {
        let names = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "];
        of("memory").and_then(|path| tightest(&root.join("sys/fs/cgroup/memory"), path, names))
    };
    second.or_else(first)
}

fn tightest(mount: &Path, path: &str, names: [&str; 3]) -> Option<u64> {
    let group = mount.join(path.trim_start_matches('/'));
    // In a container the path may be the host's and lead nowhere; the mount is then our group.
    let levels = group.ancestors().take_while(|level| level.starts_with(mount)).map(PathBuf::from);
    levels.filter_map(|level| room(&level, names)).min()
}

fn room(group: &Path, [limit, usage, reclaimable]: [&str; 3]) -> Option<u64> {
    let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    let limit = number(limit)?;
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cache = stat.lines().find_map(|line| line.strip_prefix(reclaimable)?.trim().parse::<u64>().ok());
    // Inactive page cache counts as used, yet the kernel gives it back when asked.
    let used = number(usage)?.saturating_sub(cache.unwrap_or(0));
    Some(limit.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n");

    #[test]
    fn the_kernel_says_it_where_no_group_limits() {
        assert_eq!(available_under(tree(&[MEMINFO]).path()), Some(8000 * 1024));
        let unlimited = [MEMINFO, ("proc/self/cgroup", "0::/a\n"), ("sys/fs/cgroup/a/memory.max", "max\n")];
        assert_eq!(available_under(tree(&unlimited).path()), Some(8000 * 1024));
        assert_eq!(available_under(tree(&[]).path()), None);
        assert!(available_memory_bytes().is_some_and(|bytes| bytes > 0));
    }

    #[test]
    fn the_tightest_group_wins_and_page_cache_is_free() {
        let files = [
            MEMINFO,
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/memory.max", "5000\n"),
            ("sys/fs/cgroup/a/memory.current", "4000\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 3000\ninactive_file 500\n"),
            ("sys/fs/cgroup/a/b/memory.max", "4000\n"),
            ("sys/fs/cgroup/a/b/memory.current", "1000\n"),
        ];
        assert_eq!(available_under(tree(&files).path()), Some(1500));
    }

    #[test]
    fn version_1_and_paths_of_the_host() {
        let files = [
            MEMINFO,
            ("proc/self/cgroup", "12:cpu,cpuacct:/x\n7:memory:/docker/abc\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "3000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "2000\n"),
        ];
        assert_eq!(available_under(tree(&files).path()), Some(1000));
    }
}
