//! Starting a sidecar where none is running.

use std::{
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// How long the launcher may take to detach the sidecar and return.
const LAUNCH_MAX: Duration = Duration::from_secs(5);
/// The least time between two launches.
const PAUSE: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct Launcher {
    command: Vec<String>,
    last: Option<Instant>,
}

impl Launcher {
    pub(crate) fn new(command: Vec<String>) -> Self {
        Self { command, last: None }
    }

    /// Starts the command if there is one and it was not started lately. Says what went wrong.
    pub(crate) fn launch(&mut self) -> Result<bool, String> {
        let Some((program, arguments)) = self.command.split_first() else { return Ok(false) };
        if self.last.is_some_and(|last| last.elapsed() < PAUSE) {
            return Ok(false);
        }
        self.last = Some(Instant::now());
        let mut child = Command::new(program)
            .args(arguments)
            // Engines preload allocators and OpenMP runtimes that are none of the sidecar's business.
            .env_remove("LD_PRELOAD")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("cannot start {program}: {error}"))?;
        let begun = Instant::now();
        while begun.elapsed() < LAUNCH_MAX {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(true),
                Ok(Some(status)) => {
                    return Err(format!("{program} ended with {status}: run it by hand to see why"));
                }
                Ok(None) => thread::sleep(Duration::from_millis(5)),
                Err(error) => return Err(format!("cannot wait for {program}: {error}")),
            }
        }
        let _ = child.kill();
        let _ = child.wait();
        Err(format!("{program} did not detach within {} s", LAUNCH_MAX.as_secs()))
    }
}
