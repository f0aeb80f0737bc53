//! For tests: puts the fake in the place of the driver, and faults into it.
//!
//! ```text
//! let faults = pillion_fake_cuda::testing::load();   // first of all; other tests of this process wait
//! faults.set("copy delay 50");
//! … whatever loads libcuda.so …
//! assert_eq!(faults.count("pageable"), 0);
//! ```

use std::{
    ffi::{CStr, CString, c_char, c_void},
    fs, io,
    os::unix::{ffi::OsStrExt, fs::symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, OnceLock},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::faults::{VARIABLE, lock};

/// The library's file name.
const FILE: &str = "libpillion_fake_cuda.so";

struct Loaded {
    folder: PathBuf,
    library: usize,
}

static LOADED: OnceLock<Loaded> = OnceLock::new();
static TURN: Mutex<()> = Mutex::new(());
/// The folder that this process made, and the process.
static MADE: OnceLock<(PathBuf, u32)> = OnceLock::new();

/// The loaded fake, lent to one test at a time; faults end with it.
#[derive(Debug)]
pub struct Faults {
    folder: &'static Path,
    library: usize,
    _turn: MutexGuard<'static, ()>,
}

/// Loads the fake, the first time, and waits until no other test of this process has it.
///
/// The first call must come before anything loads `libcuda.so`, and before other threads use the environment:
/// it sets `PILLION_FAKE_CUDA` to a new folder, unless it is set (in a child process that has inherited it).
/// One test must not call it a second time while it still has the first result: it would wait for itself.
/// A test that forgets the result keeps it for ever: see [`alone`].
/// Faults and errors that an earlier test left are gone.
///
/// # Panics
/// Where the library cannot be found or loaded, or where another `libcuda.so` has been loaded before.
pub fn load() -> Faults {
    let turn = lock(&TURN);
    let Loaded { folder, library } = LOADED.get_or_init(open);
    let faults = Faults { folder, library: *library, _turn: turn };
    // A child process does not own its parent's faults.
    if MADE.get().is_some() {
        faults.clear();
    }
    faults.revive();
    faults
}

/// Makes `libcuda.so` and `libcuda.so.1` in `folder`, for the `LD_LIBRARY_PATH` of a child process (which
/// needs `PILLION_FAKE_CUDA` too; it inherits it from a process that has called [`load`]).
///
/// # Errors
/// Where the links cannot be made.
///
/// # Panics
/// Where the library cannot be found.
pub fn links(folder: impl AsRef<Path>) -> io::Result<()> {
    let library = library();
    ["libcuda.so", "libcuda.so.1"].iter().try_for_each(|name| {
        match symlink(&library, folder.as_ref().join(name)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            done => done,
        }
    })
}

/// Where cargo has put the library: next to the test, or one folder up.
///
/// # Panics
/// Where it is not there.
pub fn library() -> PathBuf {
    let test = std::env::current_exe().expect("expected to find this executable");
    let folders: Vec<&Path> = test.ancestors().skip(1).take(2).collect();
    let places = folders.iter().flat_map(|folder| [folder.join(FILE), folder.join("deps").join(FILE)]);
    places.into_iter().find(|place| place.is_file()).unwrap_or_else(|| {
        panic!("expected {FILE} near {}: make pillion-fake-cuda a dependency of the test", test.display())
    })
}

/// Marks the child that [`alone`] starts, and names the file by which that tells that it has come so far.
const ALONE: &str = "PILLION_FAKE_CUDA_ALONE";

/// For a test that leaves something hanging, or a context lost, behind: runs it in a process of its own.
///
/// True: this is that process, go on. False: it has run there and passed, return. `test` is the test's full
/// name. Such a test may forget what it cannot end; in the common process that would keep the [`Faults`], and
/// all other tests would wait for ever.
///
/// # Panics
/// Where the test fails there, or does not end within a minute.
pub fn alone(test: &str) -> bool {
    if let Some(sign) = std::env::var_os(ALONE) {
        fs::write(sign, "").expect("expected to write the file that the parent looks for");
        return true;
    }
    let sign = std::env::temp_dir().join(fresh_name());
    let mut command = Command::new(std::env::current_exe().expect("expected to find this executable"));
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]);
    let mut child =
        command.env(ALONE, &sign).env_remove(VARIABLE).spawn().expect("expected to start a child");
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("expected a child of ours") {
            break status;
        }
        if start.elapsed() > Duration::from_secs(60) {
            let _ = child.kill().and_then(|()| child.wait());
            panic!("expected {test} to end within a minute, in a process of its own");
        }
        thread::sleep(Duration::from_millis(5));
    };
    // A misspelt name runs no test, and that passes.
    assert!(fs::remove_file(sign).is_ok(), "expected {test} to be this test's full name");
    assert!(status.success(), "expected {test} to pass in a process of its own, got {status}");
    false
}

/// One number of a statistics text; 0 where it does not occur.
pub fn count(statistics: &str, name: &str) -> u64 {
    let after = statistics.split_once(&format!("\"{name}\": ")).map_or("", |(_, after)| after);
    after.split(|letter: char| !letter.is_ascii_digit()).next().unwrap_or_default().parse().unwrap_or(0)
}

impl Faults {
    /// What `PILLION_FAKE_CUDA` names.
    pub fn folder(&self) -> &Path {
        self.folder
    }

    /// Replaces the faults by these.
    ///
    /// # Panics
    /// Where the file cannot be written.
    pub fn set(&self, faults: &str) {
        // By rename: in place, somebody could read half of it.
        let new = self.folder.join(".faults");
        fs::write(&new, faults)
            .and_then(|()| fs::rename(new, self.folder.join("faults")))
            .expect("expected to write the faults");
    }

    /// No faults any more; what hangs goes on.
    pub fn clear(&self) {
        self.set("");
    }

    /// Forgets the errors that contexts have failed with. On a real device this takes a new process.
    pub fn revive(&self) {
        let revive = self.symbol(c"pillion_fake_cuda_revive");
        // SAFETY: that is the function's type in this same crate.
        let revive: unsafe extern "C" fn() = unsafe { std::mem::transmute(revive) };
        // SAFETY: has no conditions.
        unsafe { revive() };
    }

    /// Statistics of this process, as JSON.
    pub fn statistics(&self) -> String {
        let read = self.symbol(c"pillion_fake_cuda_stats");
        // SAFETY: that is the function's type in this same crate.
        let read: unsafe extern "C" fn(*mut c_char, usize) -> usize = unsafe { std::mem::transmute(read) };
        let mut buffer = vec![0_u8; 64 << 10];
        // SAFETY: the buffer is as long as it says.
        let length = unsafe { read(buffer.as_mut_ptr().cast(), buffer.len()) };
        buffer.truncate(length);
        String::from_utf8_lossy(&buffer).into_owned()
    }

    /// Statistics of another process that uses the same folder, at most 20 ms old; empty: it has none (yet).
    pub fn statistics_of(&self, pid: u32) -> String {
        fs::read_to_string(self.folder.join(format!("stats-{pid}.json"))).unwrap_or_default()
    }

    /// One number of this process' statistics: calls of a function, or one of `copies`, `bytes`, `pageable`,
    /// `live_allocations`, `live_imports`, `live_events`, `live_registrations`.
    pub fn count(&self, name: &str) -> u64 {
        count(&self.statistics(), name)
    }

    /// The address of an exported function.
    ///
    /// # Panics
    /// Where there is none of this name.
    pub fn symbol(&self, name: &CStr) -> *mut c_void {
        let library = std::ptr::with_exposed_provenance_mut(self.library);
        // SAFETY: the handle comes from dlopen and is never closed.
        let address = unsafe { libc::dlsym(library, name.as_ptr()) };
        assert!(!address.is_null(), "expected {name:?} among the exported functions");
        address
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        if MADE.get().is_some() {
            // Panicking here would hide why the test failed.
            let _ = fs::remove_file(self.folder.join("faults"));
        }
    }
}

fn open() -> Loaded {
    let folder = std::env::var_os(VARIABLE).map_or_else(make_folder, PathBuf::from);
    let path = library();
    let file = CString::new(path.as_os_str().as_bytes()).expect("expected a path without zeros");
    // SAFETY: loading it runs nothing of ours.
    let library = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    assert!(!library.is_null(), "expected to load {}", path.display());
    // SAFETY: as above.
    let driver = unsafe { libc::dlopen(c"libcuda.so".as_ptr(), libc::RTLD_NOW) };
    assert!(
        driver == library,
        "expected the fake to be the first libcuda.so that is loaded: call load earlier"
    );
    Loaded { folder, library: library.expose_provenance() }
}

fn fresh_name() -> String {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    format!("pillion-fake-cuda-{}-{time}", std::process::id())
}

fn make_folder() -> PathBuf {
    let folder = std::env::temp_dir().join(fresh_name());
    fs::create_dir(&folder).expect("expected to make a folder for faults");
    let _ = MADE.set((folder.clone(), std::process::id()));
    // SAFETY: the caller of `load` answers for other threads not using the environment.
    unsafe { std::env::set_var(VARIABLE, &folder) };
    // SAFETY: the function never unwinds; registered before the fake's own, so it runs after that.
    unsafe { libc::atexit(remove_folder) };
    folder
}

extern "C" fn remove_folder() {
    if let Some((folder, owner)) = MADE.get()
        && *owner == std::process::id()
    {
        // Somebody may be writing statistics: a few times, then a few small files stay where temporary
        // files are.
        let _ = (0..5).any(|_| fs::remove_dir_all(folder).is_ok());
    }
}
