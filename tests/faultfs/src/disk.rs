//! Files in memory, what of them would outlive a power cut, and the faults to come.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// What a disk writes at once, or not at all.
pub(crate) const UNIT: usize = 512;

/// An operation on the data of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Read,
    Write,
    Sync,
}

/// What happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It fails.
    Errno(i32),
    /// So many units of a write are done; it fails.
    Torn(usize),
    /// A write is acknowledged and not done.
    Lost,
    /// A write goes so many units further.
    Misdirected(u64),
    /// A bit of what is read, or written, is another one. Counted from its first.
    Flip(u64),
    /// It takes longer.
    Slow(Duration),
}

/// When.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rule {
    pub(crate) what: What,
    /// Operations of the kind that go well before.
    pub(crate) after: u64,
    /// Then one of so many; 0: only the first.
    pub(crate) every: u64,
    pub(crate) fault: Fault,
    seen: u64,
}

impl Rule {
    pub(crate) fn new(what: What, after: u64, every: u64, fault: Fault) -> Self {
        Self { what, after, every, fault, seen: 0 }
    }

    fn strikes(&mut self) -> bool {
        let number = self.seen;
        self.seen += 1;
        match number.checked_sub(self.after) {
            Some(0) => true,
            Some(later) => self.every > 0 && later.is_multiple_of(self.every),
            None => false,
        }
    }
}

/// A small generator: the same seed, the same cut.
#[derive(Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn even(&mut self) -> bool {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 63 == 0
    }
}

/// What a power cut does to units that were not synced.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Cut {
    /// All are lost.
    Lose,
    /// All had just been written.
    Keep,
    /// Each by itself.
    Some(u64),
    /// The first so many were, by file and place.
    First(usize),
}

#[derive(Debug, Default)]
pub(crate) struct File {
    pub(crate) now: Vec<u8>,
    stable: Vec<u8>,
    unsynced: BTreeSet<usize>,
}

#[derive(Debug, Default)]
pub(crate) struct Disk {
    pub(crate) names: BTreeMap<String, u64>,
    pub(crate) files: BTreeMap<u64, File>,
    pub(crate) rules: Vec<Rule>,
    /// Bytes that fit; 0: as many as there is memory.
    pub(crate) capacity: u64,
    next: u64,
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) syncs: u64,
    pub(crate) injected: u64,
}

impl Disk {
    /// A new empty file; `None` where one has the name.
    pub(crate) fn make(&mut self, name: &str) -> Option<u64> {
        if self.names.contains_key(name) {
            return None;
        }
        self.next += 1;
        // 1 is the directory.
        let number = self.next + 1;
        self.names.insert(name.to_owned(), number);
        self.files.insert(number, File::default());
        Some(number)
    }

    /// What happens to the next operation of a kind.
    pub(crate) fn fault(&mut self, what: What) -> Option<Fault> {
        match what {
            What::Read => self.reads += 1,
            What::Write => self.writes += 1,
            What::Sync => self.syncs += 1,
        }
        let mut strikes = None;
        for rule in self.rules.iter_mut().filter(|rule| rule.what == what) {
            if rule.strikes() {
                strikes = strikes.or(Some(rule.fault));
            }
        }
        self.injected += u64::from(strikes.is_some());
        strikes
    }

    pub(crate) fn used(&self) -> u64 {
        self.files.values().map(|file| file.now.len() as u64).sum()
    }

    /// Sets a file's length. New bytes are zeros, durably: file systems keep lengths and allocations in a journal.
    /// False: there is no room.
    pub(crate) fn resize(&mut self, number: u64, bytes: u64) -> bool {
        let others = self.used() - self.files.get(&number).map_or(0, |file| file.now.len() as u64);
        if self.capacity > 0 && others + bytes > self.capacity {
            return false;
        }
        let Some(file) = self.files.get_mut(&number) else { return false };
        file.now.resize(bytes as usize, 0);
        file.stable.resize(bytes as usize, 0);
        file.unsynced.retain(|unit| unit * UNIT < bytes as usize);
        true
    }

    /// False: there is no room.
    pub(crate) fn write(&mut self, number: u64, offset: u64, data: &[u8]) -> bool {
        let end = offset + data.len() as u64;
        let length = self.files.get(&number).map_or(0, |file| file.now.len() as u64);
        if end > length && !self.resize(number, end) {
            return false;
        }
        let Some(file) = self.files.get_mut(&number) else { return false };
        file.now[offset as usize..end as usize].copy_from_slice(data);
        file.unsynced.extend(offset as usize / UNIT..(end as usize).div_ceil(UNIT));
        true
    }

    pub(crate) fn sync(&mut self, number: u64) {
        if let Some(file) = self.files.get_mut(&number) {
            file.stable.clone_from(&file.now);
            file.unsynced.clear();
        }
    }

    /// The power goes and comes back.
    pub(crate) fn cut(&mut self, cut: Cut) {
        let mut dice = Dice::new(if let Cut::Some(seed) = cut { seed } else { 0 });
        let mut number = 0;
        for file in self.files.values_mut() {
            for unit in std::mem::take(&mut file.unsynced) {
                let kept = match cut {
                    Cut::Lose => false,
                    Cut::Keep => true,
                    Cut::Some(_) => dice.even(),
                    Cut::First(count) => number < count,
                };
                number += 1;
                if kept {
                    let range = unit * UNIT..((unit + 1) * UNIT).min(file.now.len());
                    file.stable[range.clone()].copy_from_slice(&file.now[range]);
                }
            }
            file.now.clone_from(&file.stable);
        }
    }

    /// Units that a cut would decide about.
    pub(crate) fn unsynced(&self) -> usize {
        self.files.values().map(|file| file.unsynced.len()).sum()
    }

    /// Another bit in what lies there, as time does it. False: there is no such place.
    pub(crate) fn rot(&mut self, name: &str, bit: u64) -> bool {
        let file = self.names.get(name).and_then(|number| self.files.get_mut(number));
        let at = (bit / 8) as usize;
        match file.filter(|file| at < file.now.len()) {
            Some(file) => {
                file.now[at] ^= 1 << (bit % 8);
                file.stable[at] ^= 1 << (bit % 8);
                true
            }
            None => false,
        }
    }
}
