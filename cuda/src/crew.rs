//! Checksums by several threads: one core reads memory at a third of a PCIe link's speed.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use crc_fast::{CrcAlgorithm, checksum};

use crate::HostPool;

/// CRC-64/NVME, as stored beside every record.
pub(crate) fn checksum_of(bytes: &[u8]) -> u64 {
    checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

/// Where a record lies in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Records of one pool, to be read by whoever has time.
#[derive(Debug)]
struct Task {
    pool: Arc<HostPool>,
    extents: Vec<Extent>,
    sums: Vec<AtomicU64>,
    next: AtomicUsize,
    left: Mutex<usize>,
    done: Condvar,
}

impl Task {
    /// Takes records until none is left.
    fn work(&self) {
        let mut mine = 0;
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(extent) = self.extents.get(index) else { break };
            // SAFETY: the owner of the extents waits in `Crew::checksums` until all are read, and vouched there
            // that nobody writes them.
            let record = unsafe { self.pool.record(extent.offset, extent.bytes) };
            self.sums[index].store(record.map_or(0, checksum_of), Ordering::Release);
            mine += 1;
        }
        if mine > 0 {
            let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
            *left -= mine;
            if *left == 0 {
                self.done.notify_one();
            }
        }
    }
}

#[derive(Debug, Default)]
struct Board {
    tasks: Mutex<VecDeque<Arc<Task>>>,
    news: Condvar,
}

impl Board {
    fn tasks(&self) -> MutexGuard<'_, VecDeque<Arc<Task>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Threads that help whoever needs checksums. They sleep while nobody does.
#[derive(Debug)]
pub struct Crew {
    board: Arc<Board>,
    helpers: usize,
}

impl Crew {
    /// Starts `helpers` threads; with none, whoever asks does all of it.
    ///
    /// # Errors
    /// Where a thread cannot be started.
    pub fn start(helpers: usize) -> std::io::Result<Self> {
        let board = Arc::new(Board::default());
        for index in 0..helpers {
            let board = Arc::clone(&board);
            thread::Builder::new().name(format!("pillion-sum-{index}")).spawn(move || help(&board))?;
        }
        Ok(Self { board, helpers })
    }

    /// The checksums of the records at these extents of the pool, in order.
    ///
    /// # Errors
    /// `None` where one lies outside of the pool.
    ///
    /// # Safety
    /// Nobody writes these extents meanwhile.
    pub unsafe fn checksums(&self, pool: &Arc<HostPool>, extents: Vec<Extent>) -> Option<Vec<u64>> {
        let inside =
            |extent: &Extent| extent.offset.checked_add(extent.bytes).is_some_and(|end| end <= pool.bytes());
        if !extents.iter().all(inside) {
            return None;
        }
        let count = extents.len();
        let task = Arc::new(Task {
            pool: Arc::clone(pool),
            extents,
            sums: std::iter::repeat_with(AtomicU64::default).take(count).collect(),
            next: AtomicUsize::new(0),
            left: Mutex::new(count),
            done: Condvar::new(),
        });
        let helpers = self.helpers.min(count.saturating_sub(1));
        if helpers > 0 {
            let mut tasks = self.board.tasks();
            for _ in 0..helpers {
                tasks.push_back(Arc::clone(&task));
            }
            drop(tasks);
            self.board.news.notify_all();
        }
        task.work();
        let mut left = task.left.lock().unwrap_or_else(PoisonError::into_inner);
        while *left > 0 {
            left = task.done.wait(left).unwrap_or_else(PoisonError::into_inner);
        }
        Some(task.sums.iter().map(|sum| sum.load(Ordering::Acquire)).collect())
    }
}

fn help(board: &Board) {
    loop {
        let mut tasks = board.tasks();
        let task = loop {
            match tasks.pop_front() {
                Some(task) => break task,
                None => tasks = board.news.wait(tasks).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(tasks);
        task.work();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_record_is_read_once_whoever_reads_it() {
        const SLOT: u64 = 4096;
        let bytes = |index: u64| SLOT - index * 13;
        let extent = |index: u64| Extent { offset: index * SLOT, bytes: bytes(index) };
        let pool = Arc::new(HostPool::create(64 * SLOT).unwrap());
        for index in 0..64u64 {
            // SAFETY: nobody else has the pool yet.
            let record = unsafe { pool.record_mut(index * SLOT, SLOT) }.unwrap();
            record.fill(index as u8 + 1);
        }
        let extents: Vec<Extent> = (0..64).rev().map(extent).collect();
        let content = |index: u64| vec![index as u8 + 1; bytes(index) as usize];
        let expected: Vec<u64> = (0..64).rev().map(|index| checksum_of(&content(index))).collect();
        for helpers in [0, 1, 3] {
            let crew = Crew::start(helpers).unwrap();
            for _ in 0..50 {
                // SAFETY: nobody writes the pool any more.
                let sums = unsafe { crew.checksums(&pool, extents.clone()) };
                assert_eq!(sums.as_ref(), Some(&expected));
            }
            for (offset, bytes) in [(63 * SLOT + 1, SLOT), (u64::MAX, 2)] {
                // SAFETY: as above.
                assert_eq!(unsafe { crew.checksums(&pool, vec![Extent { offset, bytes }]) }, None);
            }
            // SAFETY: as above.
            assert_eq!(unsafe { crew.checksums(&pool, Vec::new()) }, Some(Vec::new()));
        }
    }
}
