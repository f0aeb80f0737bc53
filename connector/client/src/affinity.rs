//! Where our thread, and a sidecar that it starts, may run.
//!
//! Engines pin their worker's main thread to one core (vLLM on CPU does), and threads
//! and processes inherit that: the sidecar would share the one core that the engine
//! computes on. What the engine's parent process may use is what the user allowed.

use rustix::{
    process::getppid,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

/// Lets the calling thread run wherever it or the parent process may.
pub(crate) fn widen() {
    let (Some(parent), Ok(mut allowed)) = (getppid(), sched_getaffinity(None)) else { return };
    let Ok(theirs) = sched_getaffinity(Some(parent)) else { return };
    for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| theirs.is_set(*cpu)) {
        allowed.set(cpu);
    }
    // Where this is forbidden, everything works, only later.
    let _ = sched_setaffinity(None, &allowed);
}
