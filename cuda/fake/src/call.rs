//! What every exported function does first: count itself, meet its faults, find its context.

use std::panic::{AssertUnwindSafe, catch_unwind};

use cudarc::driver::sys::CUresult;

use crate::{
    context::{self, Context},
    errors::Outcome,
    faults, stats,
};

/// A function that works before `cuInit`.
pub(crate) fn always(name: &'static str, body: impl FnOnce() -> Outcome) -> CUresult {
    guarded(|| {
        stats::called(name);
        faults::meet(name)?;
        body()
    })
}

/// A function that needs `cuInit`, but no context.
pub(crate) fn initialized(name: &'static str, body: impl FnOnce() -> Outcome) -> CUresult {
    guarded(|| {
        context::check_initialized()?;
        stats::called(name);
        faults::meet(name)?;
        body()
    })
}

/// A function that needs a current context, and fails once that has failed.
pub(crate) fn current(name: &'static str, body: impl FnOnce(&'static Context) -> Outcome) -> CUresult {
    initialized(name, || {
        let context = context::current().ok_or(CUresult::CUDA_ERROR_INVALID_CONTEXT)?;
        context.check()?;
        body(context)
    })
}

/// Nothing may unwind into the caller, who is not Rust as far as we know.
fn guarded(body: impl FnOnce() -> Outcome) -> CUresult {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => CUresult::CUDA_SUCCESS,
        Ok(Err(code)) => code,
        Err(_) => CUresult::CUDA_ERROR_UNKNOWN,
    }
}

/// Stores a result where the caller wants it.
pub(crate) fn put<T>(to: *mut T, value: T) -> Outcome {
    if to.is_null() {
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    // SAFETY: not null, and by the driver's contract (which every exported function hands on to its
    // caller by being unsafe) a place for a `T`; unaligned, so that a byte buffer will do.
    unsafe { to.write_unaligned(value) };
    Ok(())
}

/// Stores a result that the caller may not want.
pub(crate) fn put_optional<T>(to: *mut T, value: T) {
    // Null is the only way in which it fails.
    let _ = put(to, value);
}

/// Reads what the caller points at.
pub(crate) fn get<T: Copy>(from: *const T) -> Outcome<T> {
    if from.is_null() {
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    // SAFETY: not null, and by the driver's contract a valid `T`.
    Ok(unsafe { from.read_unaligned() })
}

/// Reads an array that the caller points at.
pub(crate) fn array<T: Copy>(from: *const T, count: usize) -> Outcome<Vec<T>> {
    if from.is_null() {
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    // SAFETY: not null, and by the driver's contract `count` valid values.
    Ok((0..count).map(|index| unsafe { from.add(index).read_unaligned() }).collect())
}

/// Stores a text with its final zero, cut to the room there is.
pub(crate) fn put_text(to: *mut std::ffi::c_char, room: usize, text: &str) -> Outcome {
    if to.is_null() || room == 0 {
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    let length = text.len().min(room - 1);
    // SAFETY: by the driver's contract there are `room` bytes at `to`; `length` + 1 is at most that.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), to.cast(), length);
        to.add(length).write(0);
    }
    Ok(())
}
