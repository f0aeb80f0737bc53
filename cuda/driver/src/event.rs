//! Events that other processes can wait for.

use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUresult, CUstream};

use crate::{CudaError, error::check, error::cuda};

/// Bytes of an event's handle.
pub const EVENT_HANDLE_BYTES: usize = 64;

/// A stream that somebody else in this process made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForeignStream(u64);

impl ForeignStream {
    /// `raw` is its `CUstream`; 0 is the legacy default stream.
    ///
    /// # Safety
    /// The stream exists as long as this is used.
    pub unsafe fn from_raw(raw: u64) -> Self {
        Self(raw)
    }
}

/// A point in a stream.
///
/// Waiting for an event means its record that is the latest *at the call*. Whoever records one again while
/// another process may still ask for its first record has a race: events belong to one job at a time.
#[derive(Debug)]
pub struct Event(CUevent);

// SAFETY: the driver locks its events; any thread with the context may use them.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// One for this process.
    ///
    /// # Errors
    /// What the driver says.
    pub fn local() -> Result<Self, CudaError> {
        Self::create(CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)
    }

    /// One that other processes may open. Recording it is safe beside captured graphs: it is no part of them.
    ///
    /// # Errors
    /// What the driver says.
    pub fn interprocess() -> Result<Self, CudaError> {
        let flags =
            CUevent_flags::CU_EVENT_DISABLE_TIMING as u32 | CUevent_flags::CU_EVENT_INTERPROCESS as u32;
        Self::create(flags)
    }

    fn create(flags: u32) -> Result<Self, CudaError> {
        let mut event: CUevent = std::ptr::null_mut();
        // The driver writes the handle.
        cuda!(cuEventCreate(&raw mut event, flags))?;
        Ok(Self(event))
    }

    /// What another process opens it by. It must not outlive this event's process.
    ///
    /// # Errors
    /// What the driver says.
    pub fn handle(&self) -> Result<[u8; EVENT_HANDLE_BYTES], CudaError> {
        let mut handle = sys::CUipcEventHandle { reserved: [0; EVENT_HANDLE_BYTES] };
        cuda!(cuIpcGetEventHandle(&raw mut handle, self.0))?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }

    /// Opens another process's event. May wait for the driver.
    ///
    /// # Errors
    /// What the driver says.
    pub fn open(handle: &[u8; EVENT_HANDLE_BYTES]) -> Result<Self, CudaError> {
        let handle = sys::CUipcEventHandle { reserved: handle.map(|byte| byte as core::ffi::c_char) };
        let mut event: CUevent = std::ptr::null_mut();
        cuda!(cuIpcOpenEventHandle(&raw mut event, handle))?;
        Ok(Self(event))
    }

    /// Records it behind everything that a stream has been given.
    ///
    /// # Errors
    /// What the driver says.
    pub fn record(&self, stream: ForeignStream) -> Result<(), CudaError> {
        // Who made the stream's value vouched for it.
        cuda!(cuEventRecord(self.0, stream.0 as CUstream))
    }

    /// Whether everything before its latest record has been done. True if it was never recorded.
    ///
    /// # Errors
    /// What the driver says; an error of earlier work comes out here.
    pub fn is_reached(&self) -> Result<bool, CudaError> {
        // SAFETY: the event is ours and alive.
        match unsafe { sys::cuEventQuery(self.0) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => check("cuEventQuery", other).map(|()| true),
        }
    }

    pub(crate) fn raw(&self) -> CUevent {
        self.0
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // Nothing can be done where the driver refuses; what waits for it goes on waiting.
        let _ = cuda!(cuEventDestroy_v2(self.0));
    }
}
