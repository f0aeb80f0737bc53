//! A panic on any thread ends the process: a sidecar that has lost a thread must not serve on.

use std::{env, os::unix::process::ExitStatusExt, process::Command, thread, time::Duration};

const CHILD: &str = "PILLION_TEST_PANICS";

#[test]
fn a_panic_on_any_thread_ends_the_process() {
    if let Ok(kind) = env::var(CHILD) {
        return child(&kind);
    }
    for kind in ["thread", "task", "caught"] {
        let program = env::current_exe().unwrap();
        let done = Command::new(program)
            .args(["--exact", "a_panic_on_any_thread_ends_the_process", "--nocapture"])
            .env(CHILD, kind)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.signal(), Some(6), "{kind}: {said}");
        assert!(said.contains("lost its head"), "{kind}: it says why: {said}");
    }
}

/// Goes on for long, but for the panic.
fn child(kind: &str) {
    pillion_daemon::worker::abort_on_panic();
    match kind {
        "thread" => drop(thread::spawn(|| panic!("a thread lost its head"))),
        // As tokio does with tasks: it would go on without this one.
        _ => drop(std::panic::catch_unwind(|| panic!("{kind} lost its head"))),
    }
    thread::sleep(Duration::from_secs(20));
}
