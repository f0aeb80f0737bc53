//! The copy threads: everything that may wait for memory happens here, behind a
//! bounded number of jobs (the core's limits), loads before saves.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use pillion_core::{BlockOutcome, CopyItem, Direction, JobId, SessionId};
use pillion_cuda::{BlockCopier, CopyError, ForeignPool, HostPool};
use tokio::sync::mpsc::UnboundedSender;

/// Bytes that a thread copies before it looks for others that wait, and blocks, at most.
const TURN_BYTES: u64 = 4 << 20;
/// See `TURN_BYTES`.
const TURN_ITEMS: u64 = 256;
/// Bytes that a thread keeps for neighbours' records.
const BUFFER_KEPT: usize = 64 << 20;

/// Neighbours' pools by their number.
pub type Pools = HashMap<u32, Arc<ForeignPool>>;

/// One job's copy.
#[derive(Debug)]
pub struct CopyTask {
    /// Whose memory.
    pub session: SessionId,
    /// For which job.
    pub job: JobId,
    /// Which way.
    pub direction: Direction,
    /// The blocks.
    pub items: Vec<CopyItem>,
    /// Neighbours' pools that some of them lie in, by number.
    pub pools: Pools,
    /// How to reach the memory. Keeps it mapped until the task is dropped.
    pub copier: BlockCopier,
    /// Set from outside: the rest is skipped.
    pub cancelled: Arc<AtomicBool>,
}

/// How it went. When this arrives, nothing of the task touches memory any more.
#[derive(Debug)]
pub struct CopyReport {
    /// Whose.
    pub session: SessionId,
    /// Which.
    pub job: JobId,
    /// Which way.
    pub direction: Direction,
    /// How the memory was reached.
    pub way: &'static str,
    /// One per item.
    pub blocks: Vec<BlockOutcome>,
    /// Time from the thread's start on it to the end.
    pub took: Duration,
}

#[derive(Debug, Default)]
struct Queues {
    loads: VecDeque<Arc<Running>>,
    saves: VecDeque<Arc<Running>>,
    /// Nobody is left to copy for.
    ended: bool,
}

#[derive(Debug)]
struct Shared {
    queues: Mutex<Queues>,
    work: Condvar,
    pool: Arc<HostPool>,
}

impl Shared {
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads.
#[derive(Debug)]
pub struct Copiers {
    shared: Arc<Shared>,
}

impl Copiers {
    /// Starts `threads` threads that copy between engines and `pool`.
    ///
    /// # Errors
    /// Where a thread cannot be started.
    pub fn start(
        threads: u64,
        pool: Arc<HostPool>,
        reports: &UnboundedSender<CopyReport>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { queues: Mutex::default(), work: Condvar::new(), pool });
        for index in 0..threads {
            let (shared, reports) = (Arc::clone(&shared), reports.clone());
            thread::Builder::new()
                .name(format!("pillion-copy-{index}"))
                .spawn(move || work(&shared, &reports))?;
        }
        Ok(Self { shared })
    }

    /// Queues a task.
    pub fn push(&self, task: CopyTask) {
        let running = Arc::new(Running::new(task));
        let mut queues = self.shared.queues();
        match running.direction {
            Direction::Load => queues.loads.push_back(running),
            Direction::Save => queues.saves.push_back(running),
        }
        drop(queues);
        // A long task has work for all of them.
        self.shared.work.notify_all();
    }

    /// Tasks that nobody has begun.
    pub fn waiting(&self) -> usize {
        let queues = self.shared.queues();
        let tasks = queues.loads.iter().chain(&queues.saves);
        tasks.filter(|task| task.next.load(Ordering::Relaxed) == 0).count()
    }
}

impl Drop for Copiers {
    /// The threads end when what is queued is copied; they are not waited for.
    fn drop(&mut self) {
        self.shared.queues().ended = true;
        self.shared.work.notify_all();
    }
}

/// A task whose blocks several threads copy, some at a time each: one thread's memcpy is half of what two cores do.
#[derive(Debug)]
struct Running {
    session: SessionId,
    job: JobId,
    direction: Direction,
    items: Vec<CopyItem>,
    pools: Pools,
    cancelled: Arc<AtomicBool>,
    way: &'static str,
    /// Items of one turn.
    step: usize,
    /// The first item that nobody has taken.
    next: AtomicUsize,
    progress: Mutex<Progress>,
}

#[derive(Debug)]
struct Progress {
    /// Keeps the engine's memory mapped until the last item has ended.
    copier: Option<BlockCopier>,
    outcomes: Vec<BlockOutcome>,
    left: usize,
    begun: Option<Instant>,
}

impl Running {
    fn new(task: CopyTask) -> Self {
        let CopyTask { session, job, direction, items, pools, copier, cancelled } = task;
        let longest = items.iter().filter_map(|item| copier.record_bytes(item.group).ok()).max();
        let step = (TURN_BYTES / longest.unwrap_or(TURN_BYTES).max(1)).clamp(1, TURN_ITEMS) as usize;
        let (way, left) = (copier.way(), items.len());
        let outcomes = vec![BlockOutcome::Skipped; left];
        let progress = Mutex::new(Progress { copier: Some(copier), outcomes, left, begun: None });
        let next = AtomicUsize::new(0);
        Self { session, job, direction, items, pools, cancelled, way, step, next, progress }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Some items that are nobody's yet, and whether they are the last. A task without any has one such turn, too.
    fn turn(&self) -> Option<(Range<usize>, bool)> {
        let from = self.next.fetch_add(self.step, Ordering::Relaxed);
        let to = (from + self.step).min(self.items.len());
        (from < to || from == 0).then_some((from..to, to == self.items.len()))
    }

    /// Copies some items. The report, if these were the last to end.
    fn run(&self, items: Range<usize>, pool: &HostPool, buffer: &mut Vec<u8>) -> Option<CopyReport> {
        let copier = {
            let mut progress = self.progress();
            progress.begun.get_or_insert_with(Instant::now);
            progress.copier.clone()?
        };
        let these = self.items[items.clone()].iter();
        let outcomes: Vec<BlockOutcome> = these.map(|item| copy(pool, self, &copier, item, buffer)).collect();
        // A record of a neighbour is copied through it; it is not kept for the rare giant.
        buffer.shrink_to(BUFFER_KEPT);
        drop(copier);
        let mut progress = self.progress();
        progress.left -= outcomes.len();
        progress.outcomes[items].copy_from_slice(&outcomes);
        if progress.left > 0 {
            return None;
        }
        // The mapping goes before the report: who hears it may count on that. Nobody else has one: theirs went
        // before their items were counted as ended.
        drop(progress.copier.take()?);
        let blocks = std::mem::take(&mut progress.outcomes);
        let took = progress.begun.map_or(Duration::ZERO, |begun| begun.elapsed());
        let Self { session, job, direction, way, .. } = *self;
        Some(CopyReport { session, job, direction, way, blocks, took })
    }
}

fn work(shared: &Shared, reports: &UnboundedSender<CopyReport>) {
    let mut buffer = Vec::new();
    loop {
        let mut queues = shared.queues();
        let (task, items) = loop {
            let Queues { loads, saves, ended } = &mut *queues;
            // Loads before saves.
            let queue = if loads.is_empty() { saves } else { loads };
            let Some(first) = queue.front().cloned() else {
                if *ended {
                    return;
                }
                queues = shared.work.wait(queues).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let turn = first.turn();
            if turn.as_ref().is_none_or(|(_, last)| *last) {
                queue.pop_front();
            }
            if let Some((items, _)) = turn {
                break (first, items);
            }
        };
        drop(queues);
        if let Some(report) = task.run(items, &shared.pool, &mut buffer)
            && reports.send(report).is_err()
        {
            return;
        }
    }
}

fn copy(
    host: &HostPool,
    task: &Running,
    copier: &BlockCopier,
    item: &CopyItem,
    buffer: &mut Vec<u8>,
) -> BlockOutcome {
    if task.cancelled.load(Ordering::Acquire) {
        return BlockOutcome::Skipped;
    }
    let bytes = match copier.record_bytes(item.group) {
        Ok(bytes) => bytes,
        Err(error) => {
            tracing::error!(job = ?task.job, "block not copied: {error}");
            return BlockOutcome::Unreachable;
        }
    };
    let result = match task.direction {
        Direction::Save => {
            // SAFETY: the core has given this extent to this job alone: its record is being written and
            // found by nobody until the job's report has been taken in.
            let record = unsafe { host.record_mut(item.offset, bytes) };
            record.map(|record| copier.save(item.group, item.block, record))
        }
        Direction::Load if item.pool != 0 => task.pools.get(&item.pool).map(|pool| {
            // Its owner may write there at any time: what is proved must be what is copied on.
            buffer.clear();
            buffer.resize(bytes as usize, 0);
            if !pool.read(item.offset, buffer) {
                let error = CopyError::OutOfBounds { bytes: 0, offset: item.offset, length: bytes };
                return Err(error);
            }
            let loaded = copier.load(item.group, item.block, buffer, item.checksum);
            loaded.map(|()| item.checksum)
        }),
        Direction::Load => {
            // SAFETY: the record is published, so that nobody writes it, and pinned by the job's lease, so
            // that its extent is not given away before the job's report has been taken in.
            let record = unsafe { host.record(item.offset, bytes) };
            record.map(|record| {
                let loaded = copier.load(item.group, item.block, record, item.checksum);
                loaded.map(|()| item.checksum)
            })
        }
    };
    match result {
        Some(Ok(checksum)) => BlockOutcome::Copied(checksum),
        Some(Err(error @ CopyError::Corrupt { .. })) if item.pool != 0 => not_as_lent(task.job, &error),
        Some(Err(error @ CopyError::Corrupt { .. })) => corrupt(task.job, &error),
        Some(Err(error)) => {
            tracing::warn!(job = ?task.job, direction = ?task.direction, "block not copied: {error}");
            BlockOutcome::Unreachable
        }
        None => BlockOutcome::Unreachable,
    }
}

/// Says that a neighbour gave a place away that it had lent, or that its memory lost what it was given.
pub(crate) fn not_as_lent(job: JobId, error: &CopyError) -> BlockOutcome {
    tracing::warn!(?job, "a neighbour's record is not what it lent: {error}");
    BlockOutcome::Corrupt
}

/// Says that the host's memory lost what it was given.
pub(crate) fn corrupt(job: JobId, error: &CopyError) -> BlockOutcome {
    tracing::error!(
        ?job,
        "a record in the host pool is damaged, and its load fails; check the host's memory: {error}"
    );
    BlockOutcome::Corrupt
}
