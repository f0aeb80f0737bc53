//! A disk in memory that fails as it is told: for tests.
//!
//! The fault model. Writes go into a volatile cache; a sync makes the cache of one file stable. Operations in
//! flight are done in any order (seeded). A crash keeps an arbitrary subset of the unsynced 512-byte units,
//! those of operations in flight included. A failed sync makes a random part of the cache stable, and the rest
//! is read until a crash and never stable. The n-th operation can fail, end short, go elsewhere, or be the
//! last before the crash.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use super::{Completion, Device, Op, Part, Wake, What};
use crate::{
    format::{DirectoryId, Superblock},
    memory::Memory,
};

const UNIT: usize = 512;
const EIO: i32 = 5;

/// A small generator: the same seed, the same faults.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number (xorshift64*).
    pub fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        (self.roll() >> 16) % bound.max(1)
    }
}

/// What happens at one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this errno; a write may have been done in part.
    Errno(i32),
    /// It moves half of its bytes and says so.
    Short,
    /// It reports one sector too many.
    Long,
    /// A write goes so many sectors further, and reports success.
    Misdirected(u64),
    /// A write is reported and not done.
    Lost,
    /// The machine stops before it.
    Crash,
}

/// What a crash does to what was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// All of it is gone.
    LoseAll,
    /// All of it had just been written.
    KeepAll,
    /// Each 512-byte unit is kept or lost by itself.
    Subset(u64),
    /// The first so many units are kept, in order of their place.
    Prefix(usize),
}

#[derive(Debug, Clone, Default)]
struct File {
    now: Vec<u8>,
    stable: Vec<u8>,
    unsynced: BTreeSet<usize>,
}

impl File {
    fn settle(&mut self, unit: usize) {
        let range = unit * UNIT..(unit + 1) * UNIT;
        self.stable[range.clone()].copy_from_slice(&self.now[range]);
    }
}

/// What outlives a crash, and the faults to come.
#[derive(Debug)]
pub struct Disk {
    /// What the directory says.
    pub superblock: Superblock,
    files: BTreeMap<u32, File>,
    /// Operations so far.
    pub operations: u64,
    /// The operation (from 0) that fails, and how.
    pub fault: Option<(u64, Fault)>,
    /// Reads, writes or syncs that fail from now on, all of them.
    pub broken: Option<(What, i32)>,
    /// Segment files that fit; one more is ENOSPC.
    pub files_max: usize,
    /// It stopped; nothing completes any more.
    pub crashed: bool,
    /// Units that were ever written twice in one life of a file would break "nothing written twice".
    pub bytes_written: u64,
}

impl Disk {
    /// An empty one.
    pub fn new(segment_bytes: u64) -> Arc<Mutex<Self>> {
        let superblock = Superblock { directory: DirectoryId([0xd1; 16]), segment_bytes };
        Arc::new(Mutex::new(Self {
            superblock,
            files: BTreeMap::new(),
            operations: 0,
            fault: None,
            broken: None,
            files_max: usize::MAX,
            crashed: false,
            bytes_written: 0,
        }))
    }

    /// Power off and on.
    pub fn crash(&mut self, how: Crash) {
        let mut dice = Dice::new(if let Crash::Subset(seed) = how { seed } else { 0 });
        let mut left = if let Crash::Prefix(units) = how { units } else { 0 };
        for file in self.files.values_mut() {
            for unit in std::mem::take(&mut file.unsynced) {
                let keep = match how {
                    Crash::LoseAll => false,
                    Crash::KeepAll => true,
                    Crash::Subset(_) => dice.below(2) == 0,
                    Crash::Prefix(_) => left.checked_sub(1).map(|less| left = less).is_some(),
                };
                if keep {
                    file.settle(unit);
                }
            }
            file.now.clone_from(&file.stable);
        }
        self.crashed = false;
        self.fault = None;
        self.broken = None;
    }

    /// Units that a crash could lose.
    pub fn unsynced_units(&self) -> usize {
        self.files.values().map(|file| file.unsynced.len()).sum()
    }

    /// A file's bytes.
    pub fn bytes(&self, slot: u32) -> &[u8] {
        self.files.get(&slot).map_or(&[], |file| &file.now)
    }

    /// Changes bytes behind everybody's back.
    pub fn tamper(&mut self, slot: u32, change: impl FnOnce(&mut [u8])) {
        if let Some(file) = self.files.get_mut(&slot) {
            change(&mut file.now);
            file.stable.clone_from(&file.now);
        }
    }

    /// Files that are there.
    pub fn slots(&self) -> Vec<u32> {
        self.files.keys().copied().collect()
    }

    /// A copy, to try several ends of one story.
    pub fn fork(&self) -> Arc<Mutex<Self>> {
        let disk = Self {
            superblock: self.superblock,
            files: self.files.clone(),
            operations: self.operations,
            fault: self.fault,
            broken: self.broken,
            files_max: self.files_max,
            crashed: self.crashed,
            bytes_written: self.bytes_written,
        };
        Arc::new(Mutex::new(disk))
    }

    /// A sync failed: some of what it was for is on the disk, and no later one brings the rest there.
    fn forget(&mut self, slot: u32, dice: &mut Dice) {
        let Some(file) = self.files.get_mut(&slot) else { return };
        for unit in std::mem::take(&mut file.unsynced) {
            if dice.below(2) == 0 {
                file.settle(unit);
            }
        }
    }

    fn put(&mut self, slot: u32, at: u64, bytes: &[u8]) {
        let Some(file) = self.files.get_mut(&slot) else { return };
        let at = at as usize;
        let Some(target) = file.now.get_mut(at..at + bytes.len()) else { return };
        target.copy_from_slice(bytes);
        file.unsynced.extend(at / UNIT..(at + bytes.len()).div_ceil(UNIT));
        self.bytes_written += bytes.len() as u64;
    }
}

/// The device over a [`Disk`].
#[derive(Debug)]
pub struct Faulty {
    disk: Arc<Mutex<Disk>>,
    memory: Arc<Memory>,
    waiting: Vec<Op>,
    dice: Dice,
}

impl Faulty {
    /// Operations in flight are done in an order that the seed decides.
    pub fn new(disk: Arc<Mutex<Disk>>, memory: Arc<Memory>, seed: u64) -> Self {
        Self { disk, memory, waiting: Vec::new(), dice: Dice::new(seed) }
    }

    fn gather(&self, op: &Op) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(op.bytes() as usize);
        for part in &op.parts {
            match part {
                Part::Owned(buffer) => bytes.extend_from_slice(buffer.bytes()),
                Part::Pool(extent) => {
                    self.memory.with(*extent, |pool| bytes.extend_from_slice(pool)).expect("a checked extent")
                }
            }
        }
        bytes
    }

    fn scatter(&self, parts: &mut [Part], mut bytes: &[u8]) {
        for part in parts {
            let (head, tail) = bytes.split_at((part.bytes() as usize).min(bytes.len()));
            match part {
                Part::Owned(buffer) => buffer.bytes_mut()[..head.len()].copy_from_slice(head),
                Part::Pool(extent) => self
                    .memory
                    .with_mut(*extent, |pool| pool[..head.len()].copy_from_slice(head))
                    .expect("a checked extent"),
            }
            bytes = tail;
        }
    }

    fn run(&mut self, mut op: Op) -> Option<Completion> {
        let disk = Arc::clone(&self.disk);
        let mut disk = disk.lock().unwrap_or_else(PoisonError::into_inner);
        let number = disk.operations;
        disk.operations += 1;
        let fault = disk.fault.filter(|(at, _)| *at == number).map(|(_, fault)| fault);
        if disk.crashed || fault == Some(Fault::Crash) {
            disk.crashed = true;
            if op.what == What::Write {
                // In flight when the power went: as unsynced as anything.
                let bytes = self.gather(&op);
                disk.put(op.slot, op.at, &bytes);
            }
            return None;
        }
        let broken = disk.broken.filter(|(what, _)| *what == op.what).map(|(_, errno)| errno);
        if op.what == What::Sync && (broken.is_some() || matches!(fault, Some(Fault::Errno(_)))) {
            disk.forget(op.slot, &mut self.dice);
        }
        if let Some(errno) = broken {
            return Some(Completion::judge(op, Err(errno)));
        }
        let bytes = op.bytes();
        let moved = match (fault, op.what) {
            (Some(Fault::Errno(errno)), what) => {
                if what == What::Write {
                    let all = self.gather(&op);
                    disk.put(op.slot, op.at, &all[..all.len() / 2 / UNIT * UNIT]);
                }
                Err(errno)
            }
            (_, What::Prepare) => Self::prepare(&mut disk, op.slot),
            (_, What::Sync) => {
                if let Some(file) = disk.files.get_mut(&op.slot).filter(|_| fault != Some(Fault::Lost)) {
                    for unit in std::mem::take(&mut file.unsynced) {
                        file.settle(unit);
                    }
                }
                Ok(0)
            }
            (_, What::Write) => {
                let all = self.gather(&op);
                let at = if let Some(Fault::Misdirected(sectors)) = fault {
                    op.at + sectors * 4096
                } else {
                    op.at
                };
                match fault {
                    Some(Fault::Lost) => {}
                    Some(Fault::Short) => disk.put(op.slot, at, &all[..all.len() / 2 / UNIT * UNIT]),
                    _ => disk.put(op.slot, at, &all),
                }
                Ok(bytes)
            }
            (_, What::Read) => match disk.bytes(op.slot).get(op.at as usize..(op.at + bytes) as usize) {
                Some(stored) => {
                    let stored =
                        if fault == Some(Fault::Short) { &stored[..stored.len() / 2] } else { stored };
                    self.scatter(&mut op.parts, stored);
                    Ok(bytes)
                }
                None => Ok(0),
            },
        };
        let moved = match fault {
            Some(Fault::Short) if bytes > 0 => moved.map(|bytes| bytes / 2),
            Some(Fault::Long) if bytes > 0 => moved.map(|bytes| bytes + 4096),
            _ => moved,
        };
        Some(Completion::judge(op, moved))
    }

    fn prepare(disk: &mut Disk, slot: u32) -> Result<u64, i32> {
        if disk.files.contains_key(&slot) {
            return Ok(0);
        }
        if disk.files.len() >= disk.files_max {
            return Err(28);
        }
        let zeros = vec![0; disk.superblock.segment_bytes as usize];
        disk.files.insert(slot, File { stable: zeros.clone(), now: zeros, unsynced: BTreeSet::new() });
        Ok(0)
    }
}

struct Nobody;

impl Wake for Nobody {
    fn wake(&self) {}
}

impl Device for Faulty {
    fn engine(&self) -> &'static str {
        "faulty"
    }
    fn superblock(&self) -> Superblock {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner).superblock
    }
    fn slots(&self) -> Vec<u32> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner).slots()
    }
    fn depth(&self) -> usize {
        64
    }
    fn submit(&mut self, op: Op) {
        self.waiting.push(op);
    }
    fn wait(&mut self, _: Option<Duration>, done: &mut Vec<Completion>) {
        // Some of what is in flight, in any order.
        let count = 1 + self.dice.below(self.waiting.len() as u64);
        for _ in 0..count.min(self.waiting.len() as u64) {
            let pick = self.dice.below(self.waiting.len() as u64) as usize;
            let op = self.waiting.swap_remove(pick);
            done.extend(self.run(op));
        }
    }
    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(Nobody)
    }
}

/// The errno of a bad medium.
pub const BAD_MEDIUM: i32 = EIO;
