//! What the kernel, its settings and its drivers let us do.

use std::fs;
use std::path::Path;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{PidfdFlags, Resource};

use super::Check;

/// Bit of CAP_SYS_PTRACE in the kernel's masks.
const CAP_SYS_PTRACE: u64 = 1 << 19;

/// Memfds with every seal that the attach socket asks for.
pub(super) fn shared_memory() -> Check {
    const NAME: &str = "shared memory";
    let tried = rustix::fs::memfd_create(c"pillion-doctor", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC)
        .and_then(|memfd| {
            rustix::fs::ftruncate(&memfd, 4096)?;
            let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
            rustix::fs::fcntl_add_seals(&memfd, seals)
        });
    match tried {
        Ok(()) => Check::ok(NAME, "memfds with seals"),
        Err(error) => {
            Check::fail(NAME, format!("no sealed memfds: {error}"), "use Linux 5.3 or newer, unrestricted")
        }
    }
}

/// Handles that tell when a process dies.
pub(super) fn pidfd() -> Check {
    const NAME: &str = "process handles";
    match rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()) {
        Ok(_) => Check::ok(NAME, "pidfds"),
        Err(error) => Check::fail(
            NAME,
            format!("no pidfds: {error}"),
            "use Linux 5.3 or newer, with pidfd_open permitted",
        ),
    }
}

/// Copying from processes that cannot share their memory.
pub(super) fn process_vm() -> Check {
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    judge_process_vm(scope.as_deref(), has_ptrace(&status))
}

fn has_ptrace(status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|m| m & CAP_SYS_PTRACE != 0)
}

fn judge_process_vm(scope: Option<&str>, capable: bool) -> Check {
    const NAME: &str = "process_vm";
    const NEED: &str = "only engines without memfd memory (vLLM 0.30 on CPU) need it; \
                        give the sidecar CAP_SYS_PTRACE, lower kernel.yama.ptrace_scope to 1, or use vLLM 0.31";
    match scope.map(str::trim) {
        None | Some("0") => Check::ok(NAME, "permitted between processes of one user"),
        Some("1") => Check::ok(NAME, "permitted: engines name their sidecar to Yama (ptrace_scope 1)"),
        Some("2") if capable => Check::ok(NAME, "permitted by CAP_SYS_PTRACE (ptrace_scope 2)"),
        Some("2") => Check::warn(NAME, "refused without CAP_SYS_PTRACE (ptrace_scope 2)", NEED),
        Some(other) => Check::warn(
            NAME,
            format!("refused to everyone (ptrace_scope {other})"),
            "only engines without memfd memory (vLLM 0.30 on CPU) need it; use vLLM 0.31 or newer",
        ),
    }
}

/// The limit on pinned memory, which matters with a GPU.
pub(super) fn locked_memory(has_gpu: bool) -> Check {
    judge_locked_memory(rustix::process::getrlimit(Resource::Memlock).current, has_gpu)
}

fn judge_locked_memory(limit: Option<u64>, has_gpu: bool) -> Check {
    const NAME: &str = "locked memory";
    match limit {
        None => Check::ok(NAME, "unlimited"),
        Some(bytes) if !has_gpu => {
            Check::ok(NAME, format!("limit {} MiB; not needed without a GPU", bytes >> 20))
        }
        Some(bytes) => Check::warn(
            NAME,
            format!("limit {} MiB", bytes >> 20),
            "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity): some transports pin the host pool",
        ),
    }
}

/// Whether there is a GPU, and what to say of it.
pub(super) struct Gpu {
    pub(super) present: bool,
    pub(super) check: Check,
}

/// NVIDIA's device node and library; neither is opened.
pub(super) fn gpu() -> Gpu {
    judge_gpu(Path::new("/dev/nvidiactl").exists(), has_libcuda())
}

fn judge_gpu(device: bool, library: bool) -> Gpu {
    const NAME: &str = "gpu";
    let check = match (device, library) {
        (true, true) => Check::ok(NAME, "NVIDIA driver and libcuda.so.1"),
        (false, false) => Check::ok(NAME, "no GPU: host device only (engines on CPU)"),
        (true, false) => Check::warn(
            NAME,
            "NVIDIA device without libcuda.so.1: host device only",
            "install the driver's user libraries; in a container use the NVIDIA runtime with the compute capability",
        ),
        (false, true) => Check::warn(
            NAME,
            "libcuda.so.1 without a device: host device only (engines on CPU)",
            "pass the GPU to this container, or ignore this on a machine without one",
        ),
    };
    Gpu { present: device && library, check }
}

fn has_libcuda() -> bool {
    const NAME: &str = "libcuda.so.1";
    let listed = fs::read("/etc/ld.so.cache")
        .is_ok_and(|cache| cache.windows(NAME.len()).any(|window| window == NAME.as_bytes()));
    let paths = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let usual =
        ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/local/nvidia/lib64"];
    listed || std::env::split_paths(&paths).chain(usual.map(Into::into)).any(|dir| dir.join(NAME).exists())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn this_kernel_has_what_the_sidecar_needs() {
        assert_eq!(shared_memory().verdict, Verdict::Ok);
        assert_eq!(pidfd().verdict, Verdict::Ok);
    }

    #[test]
    fn yama_in_all_its_moods() {
        for (scope, capable, verdict) in [
            (None, false, Verdict::Ok),
            (Some("0\n"), false, Verdict::Ok),
            (Some("1\n"), false, Verdict::Ok),
            (Some("2\n"), false, Verdict::Warn),
            (Some("2\n"), true, Verdict::Ok),
            (Some("3\n"), true, Verdict::Warn),
        ] {
            assert_eq!(judge_process_vm(scope, capable).verdict, verdict, "{scope:?} {capable}");
        }
        assert!(has_ptrace("Name: x\nCapEff:\t0000000000080000\n"));
        assert!(!has_ptrace("CapEff:\t0000000000040000\n"));
        assert!(!has_ptrace(""));
    }

    #[test]
    fn without_a_gpu_nothing_is_missing() {
        let gpu = judge_gpu(false, false);
        assert_eq!((gpu.present, gpu.check.verdict), (false, Verdict::Ok));
        assert!(gpu.check.found.contains("host device only"));
        assert_eq!(judge_gpu(true, false).check.verdict, Verdict::Warn);
        assert_eq!(judge_gpu(false, true).check.verdict, Verdict::Warn);
        assert!(judge_gpu(true, true).present);
        assert_eq!(judge_locked_memory(Some(8 << 20), false).verdict, Verdict::Ok);
        assert_eq!(judge_locked_memory(Some(8 << 20), true).verdict, Verdict::Warn);
        assert_eq!(judge_locked_memory(None, true).verdict, Verdict::Ok);
    }
}
