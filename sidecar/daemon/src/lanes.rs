//! Device sessions: two threads each, one per direction. Everything of CUDA that may hang happens there, or on
//! the thread that imports.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Instant,
};

use pillion_core::{BlockOutcome, CopyItem, Direction, JobId, SessionId};
use pillion_cuda::{CopyError, DeviceMemory, Gpu, Item, Lane, Moved, driver};
use pillion_layouts::BlockPlan;
use tokio::sync::mpsc::UnboundedSender;

use crate::copier::{self, CopyReport, Pools};

/// One job's copy.
#[derive(Debug)]
pub struct LaneTask {
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
    /// The engine's event to wait for.
    pub event: Option<u32>,
    /// Set from outside: the rest is skipped.
    pub cancelled: Arc<AtomicBool>,
}

/// The lanes of one engine. When this is dropped, they end their work and unmap the memory.
#[derive(Debug)]
pub struct Lanes {
    loads: mpsc::Sender<LaneTask>,
    saves: mpsc::Sender<LaneTask>,
    waiting: Arc<AtomicUsize>,
    way: &'static str,
}

impl Lanes {
    /// Starts the threads. May wait for the driver.
    ///
    /// # Errors
    /// What the driver or the kernel says.
    pub fn start(
        gpu: &Arc<Gpu>,
        memory: DeviceMemory,
        plans: Vec<BlockPlan>,
        reports: &UnboundedSender<CopyReport>,
    ) -> Result<Self, String> {
        let way = memory.way();
        let (memory, plans): (_, Arc<[BlockPlan]>) = (Arc::new(memory), plans.into());
        let waiting = Arc::new(AtomicUsize::new(0));
        let start = |direction: driver::Direction, name: &str| {
            let (tasks, taken) = mpsc::channel();
            let (ready, made) = mpsc::channel();
            let (gpu, memory, plans) = (Arc::clone(gpu), Arc::clone(&memory), Arc::clone(&plans));
            let (reports, waiting) = (reports.clone(), Arc::clone(&waiting));
            let body = move || match Lane::new(gpu, memory, plans, direction) {
                Ok(lane) => {
                    let _ = ready.send(Ok(()));
                    serve(lane, way, &taken, &reports, &waiting);
                }
                Err(error) => drop(ready.send(Err(error.to_string()))),
            };
            thread::Builder::new().name(name.into()).spawn(body).map_err(|error| error.to_string())?;
            made.recv().map_err(|_| "a copy thread ended at once".to_owned())??;
            Ok::<_, String>(tasks)
        };
        let loads = start(driver::Direction::In, "pillion-load")?;
        let saves = start(driver::Direction::Out, "pillion-save")?;
        Ok(Self { loads, saves, waiting, way })
    }

    /// How the memory is reached.
    pub fn way(&self) -> &'static str {
        self.way
    }

    /// Tasks that have not been begun.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Queues a task.
    pub fn push(&self, task: LaneTask) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let lane = match task.direction {
            Direction::Load => &self.loads,
            Direction::Save => &self.saves,
        };
        // A lane ends only when this value is dropped; a panic on it ends the process.
        let _ = lane.send(task);
    }
}

fn serve(
    mut lane: Lane,
    way: &'static str,
    tasks: &mpsc::Receiver<LaneTask>,
    reports: &UnboundedSender<CopyReport>,
    waiting: &AtomicUsize,
) {
    // Copies are looked at every 20 µs: the default of 50 µs more would be most of a small load's time.
    let _ = rustix::thread::set_current_timer_slack(std::num::NonZero::new(1000));
    for LaneTask { session, job, direction, items, pools, event, cancelled } in tasks {
        waiting.fetch_sub(1, Ordering::Relaxed);
        let begun = Instant::now();
        let foreign: Vec<bool> = items.iter().map(|item| item.pool != 0).collect();
        let moved = if cancelled.load(Ordering::Acquire) {
            vec![Moved::Skipped; items.len()]
        } else if items.iter().any(|item| item.pool != 0 && !pools.contains_key(&item.pool)) {
            vec![Moved::Failed(CopyError::Unreachable("a neighbour is gone".into())); items.len()]
        } else {
            let item = |item: &CopyItem| {
                let CopyItem { group, block, pool, offset, checksum } = *item;
                let foreign = pools.get(&pool).cloned();
                Item { group, block, foreign, offset, checksum }
            };
            let items: Vec<Item> = items.iter().map(item).collect();
            lane.run(&items, event, &cancelled)
        };
        let blocks = moved
            .into_iter()
            .zip(foreign)
            .map(|(moved, foreign)| outcome(job, direction, moved, foreign))
            .collect();
        let report = CopyReport { session, job, direction, way, blocks, took: begun.elapsed() };
        if reports.send(report).is_err() {
            break;
        }
    }
    lane.close();
}

fn outcome(job: JobId, direction: Direction, moved: Moved, foreign: bool) -> BlockOutcome {
    match moved {
        Moved::Copied(checksum) => BlockOutcome::Copied(checksum),
        Moved::Skipped => BlockOutcome::Skipped,
        Moved::Failed(error @ CopyError::Corrupt { .. }) if foreign => copier::not_as_lent(job, &error),
        Moved::Failed(error @ CopyError::Corrupt { .. }) => copier::corrupt(job, &error),
        Moved::Failed(error) => {
            tracing::warn!(?job, ?direction, "block not copied: {error}");
            BlockOutcome::Unreachable
        }
    }
}
