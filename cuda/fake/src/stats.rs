//! Counts for tests: of this process through a function, of another one through a file.

use std::{
    collections::BTreeMap,
    ffi::c_char,
    fmt::Write as _,
    fs,
    sync::{
        Condvar, Mutex, Once,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread,
    time::Duration,
};

use crate::{
    call::put_text,
    faults::{folder, lock},
};

/// How often the file is written at most.
const PACE: Duration = Duration::from_millis(20);

static CALLS: Mutex<BTreeMap<&'static str, u64>> = Mutex::new(BTreeMap::new());
static COPIES: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);
static PAGEABLE: AtomicU64 = AtomicU64::new(0);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static IMPORTS: AtomicU64 = AtomicU64::new(0);
static EVENTS: AtomicU64 = AtomicU64::new(0);
static REGISTRATIONS: AtomicU64 = AtomicU64::new(0);

/// Something changed since the file was written.
static CHANGED: AtomicBool = AtomicBool::new(false);
static WAKE: (Mutex<()>, Condvar) = (Mutex::new(()), Condvar::new());

/// Counts one thing for as long as it exists.
#[derive(Debug)]
pub(crate) struct Live(&'static AtomicU64);

impl Live {
    fn of(count: &'static AtomicU64) -> Self {
        count.fetch_add(1, Relaxed);
        changed();
        Self(count)
    }

    pub(crate) fn allocation() -> Self {
        Self::of(&ALLOCATIONS)
    }

    pub(crate) fn import() -> Self {
        Self::of(&IMPORTS)
    }

    pub(crate) fn event() -> Self {
        Self::of(&EVENTS)
    }

    pub(crate) fn registration() -> Self {
        Self::of(&REGISTRATIONS)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
        changed();
    }
}

/// A function was called.
pub(crate) fn called(function: &'static str) {
    *lock(&CALLS).entry(function).or_default() += 1;
    changed();
}

/// A copy was made.
pub(crate) fn copied(bytes: u64, pageable: bool) {
    COPIES.fetch_add(1, Relaxed);
    BYTES.fetch_add(bytes, Relaxed);
    PAGEABLE.fetch_add(u64::from(pageable), Relaxed);
    changed();
}

fn changed() {
    if !CHANGED.swap(true, SeqCst) {
        // Under the lock, or the writer could miss it between looking and sleeping.
        let _guard = lock(&WAKE.0);
        WAKE.1.notify_one();
    }
}

/// All counts as one JSON object.
fn json() -> String {
    let mut text = String::from("{");
    for (function, calls) in lock(&CALLS).iter() {
        let _ = write!(text, "\"{function}\": {calls}, ");
    }
    let counts = [
        ("copies", &COPIES),
        ("bytes", &BYTES),
        ("pageable", &PAGEABLE),
        ("live_allocations", &ALLOCATIONS),
        ("live_imports", &IMPORTS),
        ("live_events", &EVENTS),
        ("live_registrations", &REGISTRATIONS),
    ];
    let counts: Vec<String> =
        counts.iter().map(|(name, count)| format!("\"{name}\": {}", count.load(Relaxed))).collect();
    text + &counts.join(", ") + "}"
}

/// Starts the thread that keeps `stats-<pid>.json` up to date. Called by `cuInit`.
pub(crate) fn keep_file() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let writer = || {
            loop {
                let mut guard = lock(&WAKE.0);
                while !CHANGED.swap(false, SeqCst) {
                    guard = WAKE.1.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner);
                }
                drop(guard);
                write_file();
                thread::sleep(PACE);
            }
        };
        if let Err(error) = thread::Builder::new().name("fake-cuda-stats".into()).spawn(writer) {
            eprintln!("pillion-fake-cuda: no statistics file: {error}");
        }
        // SAFETY: the function never unwinds and the library is never unloaded.
        unsafe { libc::atexit(at_exit) };
    });
}

extern "C" fn at_exit() {
    // Not in a child that was forked: it would write its parent's counts under its own name.
    if crate::context::check_initialized().is_ok() {
        write_file();
    }
}

/// By rename, so that a reader never sees half of it.
fn write_file() {
    let Some(folder) = folder() else { return };
    // The writer and the end of the process may meet here.
    static WRITING: Mutex<()> = Mutex::new(());
    let _guard = lock(&WRITING);
    let pid = std::process::id();
    let file = folder.join(format!("stats-{pid}.json"));
    let new = folder.join(format!(".stats-{pid}.json"));
    // The folder goes away under processes that outlive their test: no reason to complain.
    let _ = fs::write(&new, json()).and_then(|()| fs::rename(&new, &file));
}

/// Copies the counts into `buffer`, as JSON with a final zero. Returns the length of the whole text, so
/// that a caller whose buffer was too short can come again.
#[unsafe(no_mangle)]
unsafe extern "C" fn pillion_fake_cuda_stats(buffer: *mut c_char, size: usize) -> usize {
    let text = json();
    // A caller without a buffer asks for the length only.
    let _ = put_text(buffer, size, &text);
    text.len()
}
