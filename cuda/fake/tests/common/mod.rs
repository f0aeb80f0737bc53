//! What the tests share: a process with a context, and children of it.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::{
    ffi::c_void,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    ptr::null_mut,
    time::{Duration, Instant},
};

use cudarc::driver::sys::{self, CUcontext, CUdeviceptr, CUevent, CUresult, CUstream};
use pillion_fake_cuda::testing::{self, Faults};

pub(crate) const OK: CUresult = CUresult::CUDA_SUCCESS;
pub(crate) const INVALID: CUresult = CUresult::CUDA_ERROR_INVALID_VALUE;
pub(crate) const ILLEGAL: CUresult = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;
pub(crate) const NOT_READY: CUresult = CUresult::CUDA_ERROR_NOT_READY;

/// Calls a driver function.
///
/// The arguments are the test's: what is wrong about them is what the test is about, and the fake's to refuse.
macro_rules! cu {
    ($function:ident($($argument:expr),* $(,)?)) => {
        // SAFETY: see above.
        unsafe { cudarc::driver::sys::$function($($argument),*) }
    };
}
pub(crate) use cu;

/// The fake, and device 0's context current on this thread.
pub(crate) fn start() -> Faults {
    let faults = testing::load();
    assert_eq!(cu!(cuInit(0)), OK);
    let mut context: CUcontext = null_mut();
    assert_eq!(cu!(cuDevicePrimaryCtxRetain(&mut context, 0)), OK);
    assert_eq!(cu!(cuCtxSetCurrent(context)), OK);
    faults
}

/// Ends the context, and with it all that the test has left.
pub(crate) fn end(faults: Faults) {
    faults.clear();
    assert_eq!(cu!(cuDevicePrimaryCtxRelease_v2(0)), OK);
    drop(faults);
}

pub(crate) fn allocate(bytes: usize) -> CUdeviceptr {
    let mut address = 0;
    assert_eq!(cu!(cuMemAlloc_v2(&mut address, bytes)), OK);
    address
}

pub(crate) fn stream() -> CUstream {
    let mut stream = null_mut();
    assert_eq!(cu!(cuStreamCreate(&mut stream, 1)), OK);
    stream
}

pub(crate) const TIMING: u32 = 0;
pub(crate) const PLAIN: u32 = 2;
pub(crate) const SHARED: u32 = 2 | 4;

pub(crate) fn event(flags: u32) -> CUevent {
    let mut event = null_mut();
    assert_eq!(cu!(cuEventCreate(&mut event, flags)), OK);
    event
}

/// Page-aligned host memory that nobody knows.
pub(crate) fn pages(bytes: usize) -> &'static mut [u8] {
    let layout = std::alloc::Layout::from_size_align(bytes, 4096).expect("a layout");
    // SAFETY: not empty; given back never, so it may be lent for ever.
    unsafe { std::slice::from_raw_parts_mut(std::alloc::alloc_zeroed(layout), bytes) }
}

/// The same, registered.
pub(crate) fn pinned(bytes: usize) -> &'static mut [u8] {
    let memory = pages(bytes);
    assert_eq!(cu!(cuMemHostRegister_v2(memory.as_mut_ptr().cast(), bytes, 0)), OK);
    memory
}

pub(crate) fn void<T>(memory: &mut [T]) -> *mut c_void {
    memory.as_mut_ptr().cast()
}

/// Looks at device memory.
pub(crate) fn look(address: CUdeviceptr, bytes: usize) -> Vec<u8> {
    // SAFETY: the fake's device memory is host memory.
    unsafe { std::slice::from_raw_parts(address as *const u8, bytes) }.to_vec()
}

/// Waits until something is true.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(10), "expected within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// For what should *not* happen.
pub(crate) fn soon() {
    std::thread::sleep(Duration::from_millis(60));
}

/// Whether this process is a child that a test has started, and what for.
pub(crate) fn role() -> Option<String> {
    std::env::var("FAKE_CUDA_TEST_ROLE").ok()
}

/// A child of a test: the same test in another process.
pub(crate) struct Other {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Other {
    pub(crate) fn start(test: &str, role: &str) -> Self {
        Self::with(test, role, |_| {})
    }

    pub(crate) fn with(test: &str, role: &str, change: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("own path"));
        command.args([test, "--exact", "--nocapture", "--test-threads=1"]);
        command.env("FAKE_CUDA_TEST_ROLE", role).stdin(Stdio::piped()).stdout(Stdio::piped());
        change(&mut command);
        let mut child = command.spawn().expect("a child");
        let (to, from) = (child.stdin.take().expect("stdin"), child.stdout.take().expect("stdout"));
        Self { child, to, from: BufReader::new(from) }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn tell(&mut self, text: &str) {
        writeln!(self.to, "{text}").expect("a child that listens");
    }

    /// The next thing that it says.
    pub(crate) fn hear(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.from.read_line(&mut line).expect("a line"), 0, "expected more from the child");
            // The test harness may have left something on the line before.
            if let Some((_, said)) = line.trim_end().split_once('@') {
                return said.to_owned();
            }
        }
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().expect("to kill the child");
        self.child.wait().expect("the child's end");
    }

    /// Waits for its end; true: all went well there.
    pub(crate) fn join(mut self) -> bool {
        drop(self.to);
        self.child.wait().expect("the child's end").success()
    }
}

/// A child says something to its test.
pub(crate) fn say(text: &str) {
    println!("@{text}");
}

/// A child hears something from its test.
pub(crate) fn listen() -> String {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("a line");
    line.trim_end().to_owned()
}

/// Handles as text, for telling.
pub(crate) fn hex(handle: &[std::ffi::c_char; 64]) -> String {
    handle.iter().map(|byte| format!("{:02x}", *byte as u8)).collect()
}

pub(crate) fn unhex(text: &str) -> [std::ffi::c_char; 64] {
    std::array::from_fn(|at| {
        u8::from_str_radix(&text[2 * at..2 * at + 2], 16).expect("hex") as std::ffi::c_char
    })
}

pub(crate) fn memory_handle(address: CUdeviceptr) -> sys::CUipcMemHandle {
    let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
    assert_eq!(cu!(cuIpcGetMemHandle(&mut handle, address)), OK);
    handle
}

pub(crate) fn event_handle(event: CUevent) -> sys::CUipcEventHandle {
    let mut handle = sys::CUipcEventHandle { reserved: [0; 64] };
    assert_eq!(cu!(cuIpcGetEventHandle(&mut handle, event)), OK);
    handle
}
