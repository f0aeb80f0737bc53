//! One direction of one engine's device memory: a stream, and the thread that owns it.
//!
//! ```text
//! load:  wait for the engine's event ─► verify a chunk ─► queue its copies ─► … while it flies, verify the next
//! save:  wait for the engine's event ─► queue a chunk's copies ─► … while it flies, checksum the one before
//! ```
//!
//! A chunk is small enough that an urgent load waits a millisecond behind a save, and that a cancelled job
//! quiesces in two. Between chunks the job's cancel flag is looked at.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use pillion_cuda_driver::{BatchApi, CudaError, Direction, Event, Piece, Priority, Stream};
use pillion_layouts::{BlockPlan, Segment};

use crate::{CopyError, DeviceMemory, Gpu, Pulse};

/// Bytes of a chunk: 0.6 ms of a PCIe 5 link.
const CHUNK_BYTES: u64 = 32 << 20;
/// Chunks under way at a time.
const DEPTH: usize = 3;
/// How often a chunk under way is looked at. A wake-up costs some microseconds of processor time.
const LOOK_COPY: Duration = Duration::from_micros(20);
/// How often a load's event is looked at: a request waits for it.
const LOOK_LOAD: Duration = Duration::from_micros(5);
/// The same of a save's, which waits for a whole forward pass, and nobody for it.
const LOOK_SAVE: Duration = Duration::from_micros(50);

/// One block of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Item {
    /// The engine's block.
    pub block: u64,
    /// Offset of its record in the pool.
    pub offset: u64,
    /// What a load must find there.
    pub checksum: u64,
}

/// How one block ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Moved {
    /// Copied; the checksum of the bytes in the pool.
    Copied(u64),
    /// Not copied, or not to be used.
    Failed(CopyError),
    /// Not tried: the job was cancelled before.
    Skipped,
}

/// A record whose bytes are what was stored (I1): only such go to the device.
#[derive(Debug, Clone, Copy)]
struct Verified(Item);

impl Verified {
    fn check(item: Item, found: u64) -> Result<Self, CopyError> {
        if found == item.checksum {
            Ok(Self(item))
        } else {
            Err(CopyError::Corrupt { expected: item.checksum, found })
        }
    }
}

/// What became of waiting for an engine's event.
#[derive(Debug)]
enum Awaited {
    Reached,
    Cancelled,
    /// It will not be reached, or there is none.
    Never(CopyError),
    /// The driver cannot say.
    Unknown(CudaError),
}

/// A chunk under way.
#[derive(Debug)]
struct Flying {
    items: Range<usize>,
    done: Event,
}

/// See the module.
#[derive(Debug)]
pub struct Lane {
    // Dropped before the memory they work on.
    stream: Stream,
    spare: Vec<Event>,
    direction: Direction,
    batch: BatchApi,
    pulse: Pulse,
    plan: Arc<BlockPlan>,
    /// Block 0's segments, as long as they can be.
    segments: Arc<[Segment]>,
    chunk: usize,
    look: Duration,
    memory: Arc<DeviceMemory>,
    gpu: Arc<Gpu>,
}

impl Lane {
    /// A lane on the calling thread, which stays its only user.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(
        gpu: Arc<Gpu>,
        memory: Arc<DeviceMemory>,
        plan: Arc<BlockPlan>,
        direction: Direction,
    ) -> Result<Self, CudaError> {
        gpu.context().enter()?;
        let (priority, look) = match direction {
            Direction::In => (Priority::Urgent, LOOK_LOAD),
            Direction::Out => (Priority::Background, LOOK_SAVE),
        };
        let pulse = gpu.watchdog().pulse();
        let stream = pulse.during("the making of a stream", gpu.call_patience(), || Stream::new(priority))?;
        let segments: Arc<[Segment]> = plan.segments(0).collect();
        let chunk = (CHUNK_BYTES / plan.record_bytes().max(1)).max(1) as usize;
        let (spare, batch) = (Vec::new(), gpu.batch());
        Ok(Self { stream, spare, direction, batch, pulse, plan, segments, chunk, look, memory, gpu })
    }

    /// Ends it, under the watchdog's eye.
    pub fn close(self) {
        let Self { stream, spare, pulse, memory, gpu, .. } = self;
        pulse.during("the end of a stream", gpu.call_patience(), || {
            drop(spare);
            drop(stream);
        });
        // Unmaps, where the other direction has ended.
        drop(memory);
    }

    /// Moves a job's blocks, once the engine's event is reached. When this returns, nothing of the job
    /// touches memory any more.
    pub fn run(&mut self, items: &[Item], event: Option<u32>, cancelled: &AtomicBool) -> Vec<Moved> {
        let mut moved = vec![Moved::Skipped; items.len()];
        if let Some(index) = event {
            match self.await_event(index, cancelled) {
                Awaited::Reached => {}
                Awaited::Cancelled => return moved,
                Awaited::Never(error) => {
                    moved.fill(Moved::Failed(error));
                    return moved;
                }
                Awaited::Unknown(error) => {
                    // Of the event, or of a context that is lost: the stream knows.
                    let error = CopyError::Unreachable(error.to_string());
                    self.give_up(&error);
                    moved.fill(Moved::Failed(error));
                    return moved;
                }
            }
        }
        let mut flying: VecDeque<Flying> = VecDeque::new();
        let mut next = 0;
        loop {
            while flying.len() < DEPTH && next < items.len() && !cancelled.load(Ordering::Acquire) {
                let range = next..items.len().min(next + self.chunk);
                next = range.end;
                match self.start(items, range.clone(), &mut moved) {
                    Ok(Some(done)) => flying.push_back(Flying { items: range, done }),
                    Ok(None) => {}
                    Err(error) => {
                        self.give_up(&error);
                        fail(&mut moved[range.start..], &error);
                        next = items.len();
                    }
                }
            }
            let Some(Flying { items: range, done }) = flying.pop_front() else { break };
            match self.land(&done) {
                Ok(()) => self.finish(items, range, &mut moved),
                Err(error) => {
                    self.give_up(&error);
                    fail(&mut moved[range], &error);
                }
            }
            self.spare.push(done);
        }
        moved
    }

    /// Until the engine's event is reached, or will not be waited for.
    ///
    /// Here and not on the device: a stream that waits for an event of a process that dies waits for ever, with
    /// everything that is queued behind it, and only the end of this process would end that.
    fn await_event(&self, index: u32, cancelled: &AtomicBool) -> Awaited {
        let event = match self.memory.event(index) {
            Ok(event) => event,
            Err(error) => return Awaited::Never(error),
        };
        loop {
            let asked = || event.is_reached();
            match self.pulse.during("looking at an engine's event", self.gpu.patience(), asked) {
                Ok(true) => return Awaited::Reached,
                Ok(false) => {}
                Err(error) => return Awaited::Unknown(error),
            }
            if cancelled.load(Ordering::Acquire) {
                return Awaited::Cancelled;
            }
            if !self.memory.has_owner() {
                return Awaited::Never(CopyError::Unreachable("the engine's process has ended".into()));
            }
            thread::sleep(self.look);
        }
    }

    /// Queues a chunk. `None`: nothing of it may go.
    fn start(
        &mut self,
        items: &[Item],
        range: Range<usize>,
        moved: &mut [Moved],
    ) -> Result<Option<Event>, CopyError> {
        let mut pieces = Vec::with_capacity(range.len() * self.segments.len());
        match self.direction {
            Direction::Out => {
                for item in &items[range] {
                    self.pieces(item, &mut pieces)?;
                }
            }
            Direction::In => {
                for (index, verified) in self.verify(items, range) {
                    match verified {
                        Ok(Verified(item)) => {
                            // Becomes true when the chunk lands.
                            moved[index] = Moved::Copied(item.checksum);
                            self.pieces(&item, &mut pieces)?;
                        }
                        Err(error) => moved[index] = Moved::Failed(error),
                    }
                }
            }
        }
        if pieces.is_empty() {
            return Ok(None);
        }
        let queued = self.queue(&pieces);
        queued.map(Some).map_err(|error| CopyError::Unreachable(error.to_string()))
    }

    fn verify(&self, items: &[Item], range: Range<usize>) -> Vec<(usize, Result<Verified, CopyError>)> {
        let offsets = items[range.clone()].iter().map(|item| item.offset).collect();
        let (pool, bytes) = (self.gpu.pool(), self.plan.record_bytes());
        // SAFETY: the records are published, so that nobody writes them, and pinned by the job's lease.
        let sums = unsafe { self.gpu.crew().checksums(pool, bytes, offsets) };
        let outside =
            |item: &Item| CopyError::OutOfBounds { bytes: pool.bytes(), offset: item.offset, length: bytes };
        match sums {
            Some(sums) => {
                range.zip(sums).map(|(index, found)| (index, Verified::check(items[index], found))).collect()
            }
            None => range.map(|index| (index, Err(outside(&items[index])))).collect(),
        }
    }

    fn pieces(&self, item: &Item, pieces: &mut Vec<Piece>) -> Result<(), CopyError> {
        let Item { block, offset, .. } = *item;
        let record_bytes = self.plan.record_bytes();
        if !self.plan.contains(block) {
            let blocks = self.plan.num_blocks();
            return Err(CopyError::Shape { blocks, record_bytes, block, length: record_bytes });
        }
        let pool = self.gpu.pool();
        if offset.checked_add(record_bytes).is_none_or(|end| end > pool.bytes()) {
            return Err(CopyError::OutOfBounds { bytes: pool.bytes(), offset, length: record_bytes });
        }
        let shift = block * self.plan.engine_block_stride();
        for segment in self.segments.iter() {
            let device = self.memory.address(segment.engine + shift, segment.len)?;
            let (base, part) = (pool.address() as u64, self.gpu.pin_part());
            let (mut device, mut at, mut left) = (device, offset + segment.record, segment.len);
            while left > 0 {
                let bytes = left.min(part - at % part);
                pieces.push(Piece { device, host: base + at, bytes });
                (device, at, left) = (device + bytes, at + bytes, left - bytes);
            }
        }
        Ok(())
    }

    fn queue(&mut self, pieces: &[Piece]) -> Result<Event, CudaError> {
        let Self { pulse, stream, batch, direction, spare, gpu, .. } = self;
        pulse.during("the queueing of copies", gpu.patience(), || {
            // SAFETY: the device's ends were checked against the import, which this lane keeps; the host's
            // against the pool. The core gives a save's extents to this job alone and keeps a load's records
            // where they are; the engine holds the blocks (I3, I4).
            let first = unsafe { batch.copy(stream, *direction, pieces) };
            if let Err(error) = first {
                // Some may be on their way: nothing is queued twice before they have landed.
                stream.synchronize()?;
                if matches!(*batch, BatchApi::Single) {
                    return Err(error);
                }
                tracing::warn!("batched copies fail ({error}): copying one by one from now on");
                *batch = BatchApi::Single;
                // SAFETY: as above.
                unsafe { batch.copy(stream, *direction, pieces) }?;
            }
            let done = match spare.pop() {
                Some(event) => event,
                None => Event::local()?,
            };
            stream.record(&done)?;
            Ok(done)
        })
    }

    /// Until a chunk has landed: nothing but the device itself can hold it back.
    fn land(&mut self, done: &Event) -> Result<(), CopyError> {
        let begun = Instant::now();
        let patience = self.gpu.patience();
        while !self.pulse.during("looking at a copy", patience, || {
            done.is_reached().map_err(|error| CopyError::Unreachable(error.to_string()))
        })? {
            if begun.elapsed() > patience {
                self.gpu.watchdog().fail("a copy between device and host does not end".into());
                // The process ends now; until then this job must not.
                loop {
                    thread::park();
                }
            }
            thread::sleep(LOOK_COPY);
        }
        Ok(())
    }

    fn finish(&self, items: &[Item], range: Range<usize>, moved: &mut [Moved]) {
        if self.direction == Direction::In {
            return;
        }
        let offsets = items[range.clone()].iter().map(|item| item.offset).collect();
        let (pool, bytes) = (self.gpu.pool(), self.plan.record_bytes());
        // SAFETY: the copies into these extents have landed, and the core gave them to this job alone.
        let sums = unsafe { self.gpu.crew().checksums(pool, bytes, offsets) };
        for (index, sum) in range.zip(sums.unwrap_or_default()) {
            moved[index] = Moved::Copied(sum);
        }
    }

    /// After an error nothing may be on its way when the job is said to have quiesced. Where that cannot be
    /// had, the context is lost and the process with it.
    fn give_up(&self, error: &CopyError) {
        let stream = &self.stream;
        let ended =
            self.pulse.during("the end of failed copies", self.gpu.patience(), || stream.synchronize());
        if let Err(lost) = ended {
            let text = format!("the CUDA context is lost: {lost} (after: {error})");
            self.gpu.watchdog().fail(text);
            loop {
                thread::park();
            }
        }
    }
}

fn fail(moved: &mut [Moved], error: &CopyError) {
    for outcome in moved {
        if !matches!(outcome, Moved::Failed(_)) {
            *outcome = Moved::Failed(error.clone());
        }
    }
}
