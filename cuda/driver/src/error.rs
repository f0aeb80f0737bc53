//! What the driver says when it says no.

use std::ffi::CStr;

use cudarc::driver::sys::{self, CUresult};

/// Why something of CUDA could not be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no CUDA here.
    #[error("{0}")]
    Missing(String),
    /// A call failed.
    #[error("{call} failed with {name} ({code}): {text}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// `CUresult`.
        code: u32,
        /// Its name.
        name: String,
        /// The driver's words.
        text: String,
    },
    /// An argument that cannot be right.
    #[error("{0}")]
    Unfit(String),
}

impl CudaError {
    /// The driver's code, where it was the driver.
    pub fn code(&self) -> Option<u32> {
        match self {
            Self::Driver { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// Turns a result of the driver into ours.
pub(crate) fn check(call: &'static str, result: CUresult) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    type Describe = unsafe fn(CUresult, *mut *const core::ffi::c_char) -> CUresult;
    let describe = |ask: Describe| {
        let mut text = std::ptr::null();
        // SAFETY: the pointer is written by the driver, with a string that lives as long as the library.
        let known = unsafe { ask(result, &raw mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
        // SAFETY: a zero-terminated string of the driver, see above.
        if known { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() } else { "unknown".into() }
    };
    let (name, text) = (describe(sys::cuGetErrorName), describe(sys::cuGetErrorString));
    Err(CudaError::Driver { call, code: result as u32, name, text })
}

/// Calls a function of the driver: `cuda!(cuInit(0))`.
macro_rules! cuda {
    ($function:ident($($argument:expr),* $(,)?)) => {
        $crate::error::check(
            stringify!($function),
            // SAFETY: each use says in a comment of its own what makes the arguments right; the symbol was
            // found when the library was loaded.
            unsafe { cudarc::driver::sys::$function($($argument),*) },
        )
    };
}
pub(crate) use cuda;
