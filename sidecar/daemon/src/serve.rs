//! `pillion serve`: one supervisor per device, in the foreground or detached.
#![expect(unsafe_code, reason = "marks descriptors that the process inherited, by their numbers")]

use std::{
    env,
    ffi::OsString,
    fs::File,
    io::Write,
    os::fd::{BorrowedFd, RawFd},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::{fs::FlockOperation, io::FdFlags};

use crate::{
    config::Config,
    places::{Machine, Places, open_private},
    supervisor,
};

/// How long a detached sidecar may take until its socket is there.
const READY_MAX: Duration = Duration::from_secs(4);

/// Says to the process that `--detach` starts that it is that process.
pub const DETACHED: &str = "--detached";

/// Runs the supervisor here, or starts one in the background.
///
/// # Errors
/// What kept it from starting. That another one serves the device already is none.
pub fn serve(config: &Config, arguments: Vec<OsString>, detach: bool, detached: bool) -> Result<()> {
    let places = Places::choose(config, &Machine)?;
    places.prepare(config.admits_other_users())?;
    if detach {
        return start_detached(&places, arguments);
    }
    let mut lock = open_private(&places.lock(), false)?;
    if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        tracing::info!(lock = %places.lock().display(), "a sidecar serves this device already");
        return Ok(());
    }
    if detached {
        // A session of its own: it outlives the engine and the terminal that started it.
        rustix::process::setsid().context("cannot start a session")?;
    }
    write_pid(&mut lock)?;
    write_pid(&mut open_private(&places.supervisor_pid(), false)?)?;
    let plan = supervisor::Plan {
        program: env::current_exe().context("cannot find this executable")?,
        arguments,
        grace: config.grace(),
        drain: config.drain(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(supervisor::run(&plan));
    let _ = std::fs::remove_file(places.supervisor_pid());
    let _ = std::fs::remove_file(places.worker_pid());
    result
}

fn write_pid(file: &mut File) -> Result<()> {
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())?;
    Ok(())
}

/// What the engine's process left open for its own children (pipes of Python's multiprocessing, sockets) is not the
/// sidecar's: whoever waits for the other end to close would wait for as long as the sidecar lives.
fn keep_descriptors_from_children() {
    let names = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers = names.filter_map(|name| name.file_name().to_str()?.parse::<RawFd>().ok());
    for number in numbers.filter(|number| *number > 2) {
        // SAFETY: nothing is read, written or closed through it; of one that is closed meanwhile the call says so.
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        let _ = rustix::io::fcntl_setfd(descriptor, FdFlags::CLOEXEC);
    }
}

fn start_detached(places: &Places, arguments: Vec<OsString>) -> Result<()> {
    let log = open_private(&places.log(), true)?;
    let program = env::current_exe().context("cannot find this executable")?;
    keep_descriptors_from_children();
    let mut child = Command::new(&program)
        .arg("serve")
        .arg(DETACHED)
        .args(arguments)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let begun = Instant::now();
    while begun.elapsed() < READY_MAX {
        if std::os::unix::net::UnixStream::connect(&places.socket).is_ok() {
            return Ok(());
        }
        if let Some(status) = child.try_wait()? {
            if status.success() {
                // Another one has the lock; its socket will be there.
                return Ok(());
            }
            bail!("the sidecar ended at once ({status}): see {}", places.log().display());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    // It is on its way; whoever needs it connects when it is there.
    Ok(())
}
