//! Device memory of an engine, imported.

use std::{fmt, os::fd::OwnedFd, sync::Arc, time::Duration};

use pillion_cuda_driver::{
    BatchApi, Context, CudaError, Device, EVENT_HANDLE_BYTES, Event, HostRegistration, IPC_HANDLE_BYTES,
    Imported, read,
};
use pillion_layouts::BlockPlan;
use pillion_shm::pidfd::Process;

use crate::{CopyError, Crew, HostPool, Pulse, Watchdog};

/// Pinning: about 40 ms a GiB where pages are there. A terabyte, slowly, is still less than this.
const PIN_MAX: Duration = Duration::from_secs(600);

/// The device that this sidecar serves, with the pool pinned for it.
#[derive(Debug)]
pub struct Gpu {
    context: Arc<Context>,
    batch: BatchApi,
    crew: Arc<Crew>,
    watchdog: Watchdog,
    patience: Duration,
    call_patience: Duration,
    pin_part: u64,
    // Last but one: the pinning ends before the pool is unmapped.
    _pinned: HostRegistration,
    pool: Arc<HostPool>,
}

/// What makes a [`Gpu`].
#[derive(Debug)]
pub struct GpuParts {
    /// Which device.
    pub device: Device,
    /// Touched already: pinning is far quicker then.
    pub pool: Arc<HostPool>,
    /// Helps with checksums.
    pub crew: Arc<Crew>,
    /// Notices calls that hang.
    pub watchdog: Watchdog,
    /// Whether `cuMemcpyBatchAsync` may be used where the driver has it.
    pub batch: bool,
    /// How long a copy, or a call that only queues or asks, may take before the process is given up.
    pub patience: Duration,
    /// The same of imports and unmaps: these wait for locks that other processes hold while they start or die.
    pub call_patience: Duration,
    /// Bytes of the pool that are pinned by one call.
    pub pin_part: u64,
}

/// Where an engine's memory is to be found.
#[derive(Debug)]
pub enum DeviceHandle {
    /// Legacy IPC.
    Ipc([u8; IPC_HANDLE_BYTES]),
    /// A VMM allocation.
    Vmm(OwnedFd),
}

/// A range of an engine's allocation, and the events that it records.
#[derive(Debug)]
pub struct DeviceSource {
    /// Of the allocation.
    pub handle: DeviceHandle,
    /// Bytes of the allocation.
    pub allocation_bytes: u64,
    /// Where the KV memory begins in it.
    pub offset: u64,
    /// Bytes of the KV memory.
    pub bytes: u64,
    /// Handles of its pool of events.
    pub events: Vec<[u8; EVENT_HANDLE_BYTES]>,
    /// The engine's worker.
    pub process: Process,
}

impl Gpu {
    /// Retains the context and pins the pool. Takes seconds for a large pool; runs on a thread of its own.
    ///
    /// # Errors
    /// What the driver says.
    pub fn start(parts: GpuParts) -> Result<Self, CudaError> {
        let GpuParts { device, pool, crew, watchdog, batch, patience, call_patience, pin_part } = parts;
        let pulse = watchdog.pulse();
        let context = pulse.during("the start of the CUDA context", PIN_MAX, || Context::retain(device))?;
        context.enter()?;
        // Where the device cannot use host addresses of registered memory, batched copies by them fault later, and
        // for good.
        let batch = batch && context.device().takes_host_pointers;
        let batch = if batch { BatchApi::of_driver()? } else { BatchApi::Single };
        let pinned = pulse.during("the registration of the host pool with CUDA", PIN_MAX, || {
            // SAFETY: the registration is dropped before our share of the pool.
            unsafe { HostRegistration::new(&context, pool.address(), pool.bytes(), pin_part) }
        })?;
        Ok(Self { context, batch, crew, watchdog, patience, call_patience, pin_part, _pinned: pinned, pool })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        self.context.device()
    }

    /// How copies are given to the driver.
    pub fn batch(&self) -> BatchApi {
        self.batch
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(crate) fn crew(&self) -> &Arc<Crew> {
        &self.crew
    }

    pub(crate) fn pool(&self) -> &Arc<HostPool> {
        &self.pool
    }

    pub(crate) fn call_patience(&self) -> Duration {
        self.call_patience
    }

    /// Where in the pool the driver's registrations end: no copy reaches over.
    pub(crate) fn pin_part(&self) -> u64 {
        self.pin_part
    }

    pub(crate) fn patience(&self) -> Duration {
        self.patience
    }

    pub(crate) fn watchdog(&self) -> &Watchdog {
        &self.watchdog
    }

    /// Maps an engine's memory. May take long; runs on a thread of its own.
    ///
    /// # Errors
    /// What the driver says, or that the range does not fit the allocation.
    pub fn import(&self, source: DeviceSource) -> Result<DeviceMemory, CudaError> {
        let DeviceSource { handle, allocation_bytes, offset, bytes, events, process } = source;
        if offset.checked_add(bytes).is_none_or(|end| end > allocation_bytes) {
            return Err(CudaError::Unfit(format!(
                "expected KV memory inside its allocation of {allocation_bytes} bytes, came {offset} + {bytes}"
            )));
        }
        let pulse = self.watchdog.pulse();
        let opened = pulse.during("the import of an engine's memory", self.call_patience, || {
            self.context.enter()?;
            let imported = match &handle {
                DeviceHandle::Ipc(handle) => Imported::open_ipc(&self.context, handle, allocation_bytes),
                DeviceHandle::Vmm(fd) => Imported::open_vmm(&self.context, fd, allocation_bytes),
            }?;
            let events = events.iter().map(Event::open).collect::<Result<Vec<_>, _>>().map_err(|error| {
                CudaError::Unfit(format!(
                    "the engine's events cannot be opened: {error}; engine and sidecar need one /dev/shm (containers: \
                     share it, or the host's IPC namespace) and one user"
                ))
            })?;
            Ok((imported, events))
        });
        let (imported, events) = opened.inspect_err(|error| self.look_at_context(error))?;
        let (closing, patience) = (self.watchdog.pulse(), self.call_patience);
        let (imported, closed) = (Some(imported), None);
        Ok(DeviceMemory { events, imported, offset, bytes, process, closing, patience, closed })
    }

    /// After an error: a context that is lost answers every call with it, and no import will ever succeed.
    fn look_at_context(&self, error: &CudaError) {
        let pulse = self.watchdog.pulse();
        if let Err(lost) = pulse.during("the making of an event", self.call_patience, Event::local) {
            self.watchdog.fail(format!("the CUDA context is lost: {lost} (after: {error})"));
        }
    }
}

/// Said when memory is unmapped.
struct Closed(Box<dyn FnOnce() + Send + Sync>);

impl fmt::Debug for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Closed")
    }
}

/// An engine's KV memory on the device. Dropping it unmaps, under the watchdog's eye.
#[derive(Debug)]
pub struct DeviceMemory {
    events: Vec<Event>,
    imported: Option<Imported>,
    offset: u64,
    bytes: u64,
    process: Process,
    closing: Pulse,
    patience: Duration,
    closed: Option<Closed>,
}

impl DeviceMemory {
    /// Has this called when the memory is unmapped, on whatever thread that happens.
    pub fn when_closed(&mut self, say: impl FnOnce() + Send + Sync + 'static) {
        self.closed = Some(Closed(Box::new(say)));
    }

    /// How it is reached.
    pub fn way(&self) -> &'static str {
        self.imported.as_ref().map_or("closed", Imported::way)
    }

    /// Bytes that can be reached.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// One of the engine's events.
    pub(crate) fn event(&self, index: u32) -> Result<&Event, CopyError> {
        self.events.get(index as usize).ok_or_else(|| {
            let count = self.events.len();
            CopyError::Unreachable(format!("expected an event below {count}, got {index}"))
        })
    }

    /// Whether the engine's process is there.
    pub(crate) fn has_owner(&self) -> bool {
        !self.process.has_ended()
    }

    /// The device address of a range, if all of it is ours to touch.
    pub(crate) fn address(&self, offset: u64, length: u64) -> Result<u64, CopyError> {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.bytes);
        match &self.imported {
            Some(imported) if inside => Ok(imported.base() + self.offset + offset),
            _ => Err(CopyError::OutOfBounds { bytes: self.bytes, offset, length }),
        }
    }

    /// Reads a block and waits for it: for the canary, on the thread that imported.
    ///
    /// # Errors
    /// What the driver says.
    pub fn read_block(&self, plan: &BlockPlan, block: u64, record: &mut [u8]) -> Result<(), CopyError> {
        if !plan.contains(block) || record.len() as u64 != plan.record_bytes() {
            let length = record.len() as u64;
            let (blocks, record_bytes) = (plan.num_blocks(), plan.record_bytes());
            return Err(CopyError::Shape { blocks, record_bytes, block, length });
        }
        self.closing.during("the reading of an engine's block", self.patience, || {
            for segment in plan.segments(block) {
                let address = self.address(segment.engine, segment.len)?;
                let place = &mut record[segment.record as usize..(segment.record + segment.len) as usize];
                read(address, place).map_err(|error| CopyError::Unreachable(error.to_string()))?;
            }
            Ok(())
        })
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let (events, imported) = (std::mem::take(&mut self.events), self.imported.take());
        self.closing.during("the unmapping of an engine's memory", self.patience, || {
            drop(events);
            drop(imported);
        });
        if let Some(Closed(say)) = self.closed.take() {
            say();
        }
    }
}
