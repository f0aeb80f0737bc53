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

use pillion_cuda_driver::{BatchApi, CudaError, Direction, Event, HostRegistration, Piece, Priority, Stream};
use pillion_layouts::BlockPlan;

use crate::{CopyError, DeviceMemory, Extent, ForeignPool, Gpu, HostPool, Pulse};

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
#[derive(Debug, Clone)]
pub struct Item {
    /// Whose record it is: index of the engine's group.
    pub group: u16,
    /// The engine's block.
    pub block: u64,
    /// The neighbour's pool that its record lies in; `None`: ours. Only loads have another's.
    pub foreign: Option<Arc<ForeignPool>>,
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

/// A record whose bytes are what was stored (I1): only such go to the device. Where they lie.
#[derive(Debug, Clone, Copy)]
struct Verified(Place);

/// Pinned memory that a record lies in.
#[derive(Debug, Clone, Copy)]
enum Place {
    Pool(Extent),
    Stage(Extent),
}

/// Pinned memory that neighbours' records go through: their owners may write the pools at any time, so what is
/// compared with the checksum must be what goes to the device.
#[derive(Debug)]
struct Stage {
    // Ends before the memory is unmapped.
    _pinned: HostRegistration,
    memory: Arc<HostPool>,
    /// For each chunk under way.
    part_bytes: u64,
    next: u64,
}

impl Verified {
    fn check(item: &Item, place: Place, found: u64) -> Result<Self, CopyError> {
        if found == item.checksum {
            Ok(Self(place))
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
    /// One per group of the engine.
    plans: Arc<[BlockPlan]>,
    look: Duration,
    /// Made with the first record of a neighbour.
    stage: Option<Stage>,
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
        plans: Arc<[BlockPlan]>,
        direction: Direction,
    ) -> Result<Self, CudaError> {
        gpu.context().enter()?;
        let (priority, look) = match direction {
            Direction::In => (Priority::Urgent, LOOK_LOAD),
            Direction::Out => (Priority::Background, LOOK_SAVE),
        };
        let pulse = gpu.watchdog().pulse();
        let stream = pulse.during("the making of a stream", gpu.call_patience(), || Stream::new(priority))?;
        let (spare, batch) = (Vec::new(), gpu.batch());
        Ok(Self { stream, spare, direction, batch, pulse, plans, look, stage: None, memory, gpu })
    }

    /// Ends it, under the watchdog's eye.
    pub fn close(self) {
        let Self { stream, spare, pulse, stage, memory, gpu, .. } = self;
        pulse.during("the end of a stream", gpu.call_patience(), || {
            drop(spare);
            drop(stream);
            drop(stage);
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
                let range = next..self.chunk_end(items, next);
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

    /// Where a chunk of items ends that begins with `first`: records of groups differ in size.
    fn chunk_end(&self, items: &[Item], first: usize) -> usize {
        let bytes = |item: &Item| self.plan(item).map_or(0, BlockPlan::record_bytes);
        let mut all = items.get(first).map_or(0, bytes);
        let more = items.iter().skip(first + 1).take_while(|item| {
            all = all.saturating_add(bytes(item));
            all <= CHUNK_BYTES
        });
        (first + 1 + more.count()).min(items.len())
    }

    fn plan(&self, item: &Item) -> Result<&BlockPlan, CopyError> {
        let (group, groups) = (item.group, self.plans.len());
        self.plans.get(usize::from(group)).ok_or(CopyError::Group { groups, group })
    }

    /// An item's plan and its record's place, if block and record are this engine's and ours.
    fn checked(&self, item: &Item) -> Result<(&BlockPlan, Extent), CopyError> {
        let Item { block, offset, .. } = *item;
        let plan = self.plan_of_block(item, block)?;
        let record_bytes = plan.record_bytes();
        let bytes = self.gpu.pool().bytes();
        if offset.checked_add(record_bytes).is_none_or(|end| end > bytes) {
            return Err(CopyError::OutOfBounds { bytes, offset, length: record_bytes });
        }
        Ok((plan, Extent { offset, bytes: record_bytes }))
    }

    fn plan_of_block(&self, item: &Item, block: u64) -> Result<&BlockPlan, CopyError> {
        let plan = self.plan(item)?;
        let record_bytes = plan.record_bytes();
        if !plan.contains(block) {
            let blocks = plan.num_blocks();
            return Err(CopyError::Shape { blocks, record_bytes, block, length: record_bytes });
        }
        Ok(plan)
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
        let runs = |item: &Item| self.plan(item).map_or(0, BlockPlan::runs);
        let mut pieces = Vec::with_capacity(items[range.clone()].iter().map(runs).sum());
        match self.direction {
            Direction::Out => {
                for item in &items[range] {
                    let (plan, extent) = self.checked(item)?;
                    if !plan.is_whole() {
                        return Err(CopyError::OnlyLoaded { group: item.group });
                    }
                    self.pieces(item, Place::Pool(extent), &mut pieces)?;
                }
            }
            Direction::In => {
                let mut verified = self.verify(items, range.clone());
                verified.extend(self.verify_staged(items, range));
                for (index, verified) in verified {
                    match verified {
                        Ok(Verified(place)) => {
                            // Becomes true when the chunk lands.
                            moved[index] = Moved::Copied(items[index].checksum);
                            self.pieces(&items[index], place, &mut pieces)?;
                        }
                        Err(error) => moved[index] = Moved::Failed(error),
                    }
                }
            }
        }
        if pieces.is_empty() {
            return Ok(None);
        }
        if let Some(stage) = &mut self.stage {
            // Only by chunks that fly: as many parts as these and one more are there.
            stage.next += 1;
        }
        let queued = self.queue(&pieces);
        queued.map(Some).map_err(|error| CopyError::Unreachable(error.to_string()))
    }

    fn verify(&self, items: &[Item], range: Range<usize>) -> Vec<(usize, Result<Verified, CopyError>)> {
        let mut out = Vec::with_capacity(range.len());
        let (mut known, mut extents) = (Vec::with_capacity(range.len()), Vec::with_capacity(range.len()));
        for index in range.filter(|index| items[*index].foreign.is_none()) {
            match self.checked(&items[index]) {
                Ok((_, extent)) => {
                    known.push(index);
                    extents.push(extent);
                }
                Err(error) => out.push((index, Err(error))),
            }
        }
        // SAFETY: the records are published, so that nobody writes them, and pinned by the job's lease.
        let sums = unsafe { self.gpu.crew().checksums(self.gpu.pool(), extents.clone()) };
        // Never none: the extents were checked.
        let places = known.into_iter().zip(extents).zip(sums.unwrap_or_default());
        for ((index, extent), found) in places {
            out.push((index, Verified::check(&items[index], Place::Pool(extent), found)));
        }
        out
    }

    /// The same for neighbours' records, which are copied first.
    fn verify_staged(
        &mut self,
        items: &[Item],
        range: Range<usize>,
    ) -> Vec<(usize, Result<Verified, CopyError>)> {
        let foreign = |index: &usize| Some((*index, items[*index].foreign.clone()?));
        let wanted: Vec<_> = range.filter_map(|index| foreign(&index)).collect();
        if wanted.is_empty() {
            return Vec::new();
        }
        if let Err(error) = self.make_stage() {
            let error = CopyError::Unreachable(error);
            return wanted.into_iter().map(|(index, _)| (index, Err(error.clone()))).collect();
        }
        let mut out = Vec::with_capacity(wanted.len());
        let (mut known, mut extents) = (Vec::new(), Vec::new());
        let Some((mut at, end)) = self.stage.as_ref().map(Stage::part) else { return out };
        for (index, pool) in wanted {
            let item = &items[index];
            let plan = match self.plan_of_block(item, item.block) {
                Ok(plan) => plan,
                Err(error) => {
                    out.push((index, Err(error)));
                    continue;
                }
            };
            let extent = Extent { offset: at, bytes: plan.record_bytes() };
            let (offset, length) = (item.offset, extent.bytes);
            // SAFETY: this part of the stage belongs to a chunk that has landed; nobody else has it.
            let place = self.stage.as_ref().and_then(|stage| unsafe { stage.memory.record_mut(at, length) });
            if place.filter(|_| at + length <= end).is_some_and(|place| pool.read(offset, place)) {
                at += length;
                known.push(index);
                extents.push(extent);
            } else {
                out.push((index, Err(CopyError::OutOfBounds { bytes: end, offset, length })));
            }
        }
        let Some(stage) = &self.stage else { return out };
        // SAFETY: written above, by this thread, and by nobody since.
        let sums = unsafe { self.gpu.crew().checksums(&stage.memory, extents.clone()) };
        let places = known.into_iter().zip(extents).zip(sums.unwrap_or_default());
        for ((index, extent), found) in places {
            out.push((index, Verified::check(&items[index], Place::Stage(extent), found)));
        }
        out
    }

    fn make_stage(&mut self) -> Result<(), String> {
        if self.stage.is_some() {
            return Ok(());
        }
        let largest = self.plans.iter().map(BlockPlan::record_bytes).max().unwrap_or(0);
        // One part more than chunks under way: the next is filled while these fly.
        let part_bytes = largest.max(CHUNK_BYTES).next_multiple_of(4096);
        let bytes = part_bytes * (DEPTH as u64 + 1);
        let memory = Arc::new(HostPool::create(bytes).map_err(|error| error.to_string())?);
        let gpu = &self.gpu;
        let pinned = self.pulse.during("the registration of a stage with CUDA", gpu.call_patience(), || {
            // SAFETY: the registration is dropped before the memory is unmapped.
            unsafe { HostRegistration::new(gpu.context(), memory.address(), bytes, bytes) }
        });
        let pinned = pinned.map_err(|error| error.to_string())?;
        self.stage = Some(Stage { _pinned: pinned, memory, part_bytes, next: 0 });
        Ok(())
    }

    fn pieces(&self, item: &Item, place: Place, pieces: &mut Vec<Piece>) -> Result<(), CopyError> {
        let plan = self.plan_of_block(item, item.block)?;
        let (extent, base, part) = match (place, &self.stage) {
            (Place::Stage(extent), Some(stage)) => (extent, stage.memory.address() as u64, u64::MAX),
            (Place::Pool(extent) | Place::Stage(extent), _) => {
                (extent, self.gpu.pool().address() as u64, self.gpu.pin_part())
            }
        };
        for segment in plan.segments(item.block) {
            let mut device = self.memory.address(segment.engine, segment.len)?;
            let (mut at, mut left) = (extent.offset + segment.record, segment.len);
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
        // Never fewer than items: the chunk was queued.
        let extents =
            items[range.clone()].iter().filter_map(|item| Some(self.checked(item).ok()?.1)).collect();
        // SAFETY: the copies into these extents have landed, and the core gave them to this job alone.
        let sums = unsafe { self.gpu.crew().checksums(self.gpu.pool(), extents) };
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

impl Stage {
    /// The part that the next chunk goes through.
    fn part(&self) -> (u64, u64) {
        let start = self.next % (DEPTH as u64 + 1) * self.part_bytes;
        (start, start + self.part_bytes)
    }
}

fn fail(moved: &mut [Moved], error: &CopyError) {
    for outcome in moved {
        if !matches!(outcome, Moved::Failed(_)) {
            *outcome = Moved::Failed(error.clone());
        }
    }
}
