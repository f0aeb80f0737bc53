//! A wall clock that is as far off as a file says: `LD_PRELOAD` this, and `PILLION_FAKECLOCK` names eight bytes, seconds
//! as a little-endian integer, which may change at any time. Monotonic clocks are left alone, as an administrator, NTP
//! or a virtual machine that was moved leaves them alone.

use std::{
    ptr,
    sync::atomic::{AtomicI64, AtomicPtr, Ordering},
};

use libc::{c_int, c_void, clockid_t, time_t, timespec, timeval};

static OFFSET: AtomicPtr<AtomicI64> = AtomicPtr::new(ptr::null_mut());

/// Seconds that the wall clock is off.
fn offset() -> i64 {
    let known = OFFSET.load(Ordering::Acquire);
    let place = if known.is_null() { map() } else { known };
    if place.is_null() {
        return 0;
    }
    // SAFETY: a page of the file, mapped until the process ends, which is only ever read.
    unsafe { (*place).load(Ordering::Relaxed) }
}

fn map() -> *mut AtomicI64 {
    // SAFETY: calls of the C library with valid arguments; two threads may map it twice, which costs a page.
    unsafe {
        let name = libc::getenv(c"PILLION_FAKECLOCK".as_ptr());
        if name.is_null() {
            return ptr::null_mut();
        }
        let file = libc::open(name, libc::O_RDONLY | libc::O_CLOEXEC);
        if file < 0 {
            return ptr::null_mut();
        }
        let page = libc::mmap(ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, file, 0);
        libc::close(file);
        if page == libc::MAP_FAILED {
            return ptr::null_mut();
        }
        OFFSET.store(page.cast(), Ordering::Release);
        page.cast()
    }
}

/// As the C library's.
///
/// # Safety
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: clockid_t, out: *mut timespec) -> c_int {
    // SAFETY: handed on as it came.
    let done = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, out) } as c_int;
    let wall = matches!(clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE | libc::CLOCK_TAI);
    if done == 0 && wall {
        // SAFETY: the kernel has just written there.
        unsafe { (*out).tv_sec += offset() };
    }
    done
}

/// As the C library's.
///
/// # Safety
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gettimeofday(out: *mut timeval, zone: *mut c_void) -> c_int {
    // SAFETY: handed on as it came.
    let done = unsafe { libc::syscall(libc::SYS_gettimeofday, out, zone) } as c_int;
    if done == 0 && !out.is_null() {
        // SAFETY: the kernel has just written there.
        unsafe { (*out).tv_sec += offset() };
    }
    done
}

/// As the C library's.
///
/// # Safety
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn time(out: *mut time_t) -> time_t {
    let mut now = timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is ours, `out` is null or the caller's.
    unsafe {
        clock_gettime(libc::CLOCK_REALTIME, &raw mut now);
        if !out.is_null() {
            *out = now.tv_sec;
        }
    }
    now.tv_sec
}
