//! Streams: what is given to one is done in order.

use cudarc::driver::sys::{CUstream, CUstream_flags};

use crate::{CudaError, Event, error::cuda};

/// Which stream the device prefers, within our context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Requests wait for it.
    Urgent,
    /// Nobody does.
    Background,
}

/// A stream of our own.
#[derive(Debug)]
pub struct Stream(CUstream);

// SAFETY: the driver locks its streams; any thread with the context may use them.
unsafe impl Send for Stream {}

impl Stream {
    /// One that does not synchronise with the default stream.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(priority: Priority) -> Result<Self, CudaError> {
        let (mut least, mut greatest) = (0, 0);
        cuda!(cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest))?;
        let priority = match priority {
            Priority::Urgent => greatest,
            Priority::Background => least,
        };
        let mut stream: CUstream = std::ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        cuda!(cuStreamCreateWithPriority(&raw mut stream, flags, priority))?;
        Ok(Self(stream))
    }

    /// Records one of our events behind everything so far.
    ///
    /// # Errors
    /// What the driver says.
    pub fn record(&self, event: &Event) -> Result<(), CudaError> {
        cuda!(cuEventRecord(event.raw(), self.0))
    }

    /// Waits until everything is done. Hangs if the device does.
    ///
    /// # Errors
    /// What the driver says; an error of earlier work comes out here.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        cuda!(cuStreamSynchronize(self.0))
    }

    pub(crate) fn raw(&self) -> CUstream {
        self.0
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Work that is still queued is finished by the driver; our callers have waited for theirs.
        let _ = cuda!(cuStreamDestroy_v2(self.0));
    }
}
