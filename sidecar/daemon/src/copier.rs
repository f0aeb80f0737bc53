//! The copy threads: everything that may wait for memory happens here, behind a
//! bounded number of jobs (the core's limits), loads before saves.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use pillion_core::{BlockOutcome, CopyItem, Direction, JobId, SessionId};
use pillion_cuda::{BlockCopier, CopyError, ForeignPool, HostPool};
use tokio::sync::mpsc::UnboundedSender;

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
    loads: VecDeque<CopyTask>,
    saves: VecDeque<CopyTask>,
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
        let mut queues = self.shared.queues();
        match task.direction {
            Direction::Load => queues.loads.push_back(task),
            Direction::Save => queues.saves.push_back(task),
        }
        drop(queues);
        self.shared.work.notify_one();
    }

    /// Tasks that wait.
    pub fn waiting(&self) -> usize {
        let queues = self.shared.queues();
        queues.loads.len() + queues.saves.len()
    }
}

impl Drop for Copiers {
    /// The threads end when what is queued is copied; they are not waited for.
    fn drop(&mut self) {
        self.shared.queues().ended = true;
        self.shared.work.notify_all();
    }
}

fn work(shared: &Shared, reports: &UnboundedSender<CopyReport>) {
    let mut buffer = Vec::new();
    loop {
        let mut queues = shared.queues();
        let task = loop {
            let next = match queues.loads.pop_front() {
                Some(load) => Some(load),
                None => queues.saves.pop_front(),
            };
            match next {
                Some(task) => break task,
                None if queues.ended => return,
                None => queues = shared.work.wait(queues).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(queues);
        let begun = Instant::now();
        let blocks = task.items.iter().map(|item| copy(shared, &task, item, &mut buffer)).collect();
        // A record of a neighbour is copied through it; it is not kept for the rare giant.
        buffer.shrink_to(BUFFER_KEPT);
        let CopyTask { session, job, direction, copier, .. } = task;
        let way = copier.way();
        // The mapping goes before the report: who hears it may count on that.
        drop(copier);
        let report = CopyReport { session, job, direction, way, blocks, took: begun.elapsed() };
        if reports.send(report).is_err() {
            return;
        }
    }
}

fn copy(shared: &Shared, task: &CopyTask, item: &CopyItem, buffer: &mut Vec<u8>) -> BlockOutcome {
    if task.cancelled.load(Ordering::Acquire) {
        return BlockOutcome::Skipped;
    }
    let bytes = match task.copier.record_bytes(item.group) {
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
            let record = unsafe { shared.pool.record_mut(item.offset, bytes) };
            record.map(|record| task.copier.save(item.group, item.block, record))
        }
        Direction::Load if item.pool != 0 => task.pools.get(&item.pool).map(|pool| {
            // Its owner may write there at any time: what is proved must be what is copied on.
            buffer.clear();
            buffer.resize(bytes as usize, 0);
            if !pool.read(item.offset, buffer) {
                let error = CopyError::OutOfBounds { bytes: 0, offset: item.offset, length: bytes };
                return Err(error);
            }
            let loaded = task.copier.load(item.group, item.block, buffer, item.checksum);
            loaded.map(|()| item.checksum)
        }),
        Direction::Load => {
            // SAFETY: the record is published, so that nobody writes it, and pinned by the job's lease, so
            // that its extent is not given away before the job's report has been taken in.
            let record = unsafe { shared.pool.record(item.offset, bytes) };
            record.map(|record| {
                let loaded = task.copier.load(item.group, item.block, record, item.checksum);
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
