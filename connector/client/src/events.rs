//! The worker's interprocess events: each belongs to one job, from its submission until it has quiesced.
//!
//! Recorded again earlier, an event would make the sidecar wait for the wrong record, or for none.

use pillion_cuda_driver::{CudaError, Event, ForeignStream};

/// Events, and which of them no job has.
#[derive(Debug, Default)]
pub(crate) struct Events {
    all: Vec<Event>,
    handles: Vec<u8>,
    free: Vec<u32>,
}

impl Events {
    /// Makes events until there are `count`. The context of the memory must be current.
    pub(crate) fn grow(&mut self, count: usize) -> Result<(), CudaError> {
        while self.all.len() < count {
            let event = Event::interprocess()?;
            self.handles.extend(event.handle()?);
            self.free.push(self.all.len() as u32);
            self.all.push(event);
        }
        Ok(())
    }

    /// All handles, one after the other.
    pub(crate) fn handles(&self) -> &[u8] {
        &self.handles
    }

    /// Records a free event on a stream, for one job; `Ok(None)` where all belong to jobs.
    pub(crate) fn record(&mut self, stream: ForeignStream) -> Result<Option<u32>, CudaError> {
        let Some(index) = self.free.pop() else { return Ok(None) };
        let recorded = self.all[index as usize].record(stream);
        if recorded.is_err() {
            self.free.push(index);
        }
        recorded.map(|()| Some(index))
    }

    /// The job that had it has quiesced.
    pub(crate) fn give_back(&mut self, event: Option<u32>) {
        self.free.extend(event);
    }
}
