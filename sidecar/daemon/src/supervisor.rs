//! `pillion serve`: a small process that keeps a worker running.
//!
//! The worker is crash-only: whatever goes wrong in it, it ends, and this starts it
//! again. The worker's standard output is its heartbeat; one that stays silent for
//! the grace period is killed (I3), because blocks of an engine may be waiting for
//! its end. Its standard input tells it when the supervisor is gone.

use std::{
    ffi::OsString,
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use tokio::{
    io::AsyncReadExt,
    process::{Child, ChildStdout, Command},
    signal::unix::{SignalKind, signal},
    time::sleep,
};

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// A worker that ran this long starts again without delay.
const HEALTHY: Duration = Duration::from_secs(10);
/// How finely silence is measured.
const STEP: Duration = Duration::from_millis(250);

/// What the supervisor must know.
#[derive(Debug)]
pub struct Plan {
    /// This executable.
    pub program: std::path::PathBuf,
    /// The configuration's arguments, as `serve` got them.
    pub arguments: Vec<OsString>,
    /// Silence after which a worker is killed.
    pub grace: Duration,
    /// How long a worker may take to drain.
    pub drain: Duration,
}

/// Runs workers until one ends in order or a signal comes.
///
/// # Errors
/// Where no worker can be started.
pub async fn run(plan: &Plan) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let mut restarts = 0u64;
    let mut backoff = BACKOFF_MIN;
    loop {
        let mut child = start(plan, restarts)?;
        let begun = Instant::now();
        let stdin = child.stdin.take();
        let heartbeat = child.stdout.take().context("the worker has no standard output")?;
        let status = tokio::select! {
            status = watch(&mut child, heartbeat, plan.grace) => status?,
            _ = terminate.recv() => return stop(child, plan).await,
            _ = interrupt.recv() => return stop(child, plan).await,
        };
        drop(stdin);
        if status.success() {
            tracing::info!("the worker ended in order");
            return Ok(());
        }
        restarts += 1;
        if begun.elapsed() > HEALTHY {
            backoff = BACKOFF_MIN;
        }
        tracing::error!(%status, restarts, "the worker ended; starting another in {} ms", backoff.as_millis());
        tokio::select! {
            () = sleep(backoff) => {}
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

fn start(plan: &Plan, restarts: u64) -> Result<Child> {
    Command::new(&plan.program)
        .arg("worker")
        .arg(format!("--restarts={restarts}"))
        .args(&plan.arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {}", plan.program.display()))
}

/// Until the worker ends, by itself or because it was silent too long.
async fn watch(child: &mut Child, mut heartbeat: ChildStdout, grace: Duration) -> Result<ExitStatus> {
    // Counted in our own steps, not in clock time: when the whole machine slept, nobody was silent.
    let steps_max = (grace.as_millis() / STEP.as_millis()).max(4);
    let mut silent = 0;
    let mut buffer = [0u8; 64];
    loop {
        tokio::select! {
            status = child.wait() => return status.context("cannot wait for the worker"),
            read = heartbeat.read(&mut buffer) => match read {
                Ok(count) if count > 0 => silent = 0,
                // The pipe is closed: the worker is ending.
                _ => return child.wait().await.context("cannot wait for the worker"),
            },
            () = sleep(STEP) => {
                silent += 1;
                if silent >= steps_max {
                    tracing::error!("the worker has been silent for {} s: killed", grace.as_secs());
                    child.start_kill().context("cannot kill the worker")?;
                    return child.wait().await.context("cannot wait for the worker");
                }
            }
        }
    }
}

async fn stop(mut child: Child, plan: &Plan) -> Result<()> {
    if let Some(pid) = child.id().and_then(|id| rustix::process::Pid::from_raw(id as i32)) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    // Its own bound is the drain; the rest is for a worker that hangs.
    match tokio::time::timeout(plan.drain + Duration::from_secs(2), child.wait()).await {
        Ok(status) => tracing::info!(status = %status.context("cannot wait for the worker")?, "stopped"),
        Err(_) => {
            tracing::error!("the worker did not drain in time: killed");
            child.kill().await.context("cannot kill the worker")?;
        }
    }
    Ok(())
}
