//! The presence table: which blocks a sidecar has, readable without a call.
//!
//! A hint (I6), so it needs no lock: an entry is two words that hold 120 bits of
//! the block's index key and 8 tier bits. A reader that catches half of one entry
//! and half of another matches neither key. Each key has two buckets of four
//! entries (one cache line each); a key that finds both full is left out, which
//! costs a hit, never a wrong one.
//!
//! The writer stamps the table every few milliseconds. A table whose stamp is old
//! belongs to a sidecar that is dead, stopped or hung, and counts as empty.

use std::os::fd::OwnedFd;

use crate::{
    Access, Mapping, Memfd, Seal, ShmError, clock,
    sync::{AtomicU64, Ordering},
};

const MAGIC: u64 = 0x3130_4c42_5450_4c50;
const HEADER_WORDS: usize = 8;
const BUCKET: usize = 4;
const AT_MAGIC: usize = 0;
const AT_SLOTS: usize = 1;
const AT_STAMP: usize = 2;

/// The key of one block in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IndexKey(u128);

impl IndexKey {
    /// The key of a block: a seeded xxh3-128 over namespace, group, shard and the engine's hash.
    /// Tenant and namespace are inside `seed` and `space`.
    pub fn new(seed: u64, space: &[u8; 16], hash: &[u8; 32]) -> Self {
        let mut input = [0u8; 48];
        input[..16].copy_from_slice(space);
        input[16..].copy_from_slice(hash);
        let key = xxhash_rust::xxh3::xxh3_128_with_seed(&input, seed);
        // The all-zero entry means empty.
        Self(if key >> 8 == 0 { key | 1 << 64 } else { key })
    }

    /// A key of these two words, whose buckets follow from them.
    #[cfg(all(test, loom))]
    pub(crate) fn of_words(high: u64, low: u64) -> Self {
        Self(u128::from(high) << 64 | u128::from(low << 8))
    }

    fn words(self) -> (u64, u64) {
        ((self.0 >> 64) as u64, self.0 as u64 & !0xff)
    }

    fn buckets(self, mask: u64) -> [usize; 2] {
        let first = (self.0 >> 64) as u64 & mask;
        let second = (self.0 as u64 >> 8) & mask;
        [first as usize, second as usize]
    }
}

/// Bytes of a table of so many entries.
pub fn table_bytes(slots: u64) -> u64 {
    HEADER_WORDS as u64 * 8 + rounded(slots) * 16
}

fn rounded(slots: u64) -> u64 {
    slots.next_power_of_two().max(BUCKET as u64 * 2)
}

fn entry(words: &[AtomicU64], bucket: usize, slot: usize) -> (&AtomicU64, &AtomicU64) {
    let at = HEADER_WORDS + (bucket * BUCKET + slot) * 2;
    (&words[at], &words[at + 1])
}

/// The sidecar's end: the only writer.
#[derive(Debug)]
pub struct TableWriter {
    memfd: Memfd,
    map: Mapping,
    mask: u64,
}

impl TableWriter {
    /// An empty table, stamped now.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(slots: u64) -> Result<Self, ShmError> {
        let slots = rounded(slots);
        let memfd = Memfd::create("pillion-presence", table_bytes(slots))?;
        let map = memfd.map(Access::ReadWrite)?;
        memfd.seal(Seal::SizeAndFutureWrites)?;
        map.words()[AT_SLOTS].store(slots, Ordering::Relaxed);
        map.words()[AT_MAGIC].store(MAGIC, Ordering::Release);
        let table = Self { memfd, map, mask: slots / BUCKET as u64 - 1 };
        table.stamp();
        Ok(table)
    }

    /// A reader's end of it.
    #[cfg(all(test, loom))]
    pub(crate) fn other_end(&self) -> TableReader {
        TableReader { map: self.map.clone(), mask: self.mask, stale_ns: u64::MAX }
    }

    /// What is passed to readers.
    pub fn memfd(&self) -> &Memfd {
        &self.memfd
    }

    /// Says that the sidecar is alive and that the table is true.
    pub fn stamp(&self) {
        self.map.words()[AT_STAMP].store(clock::monotonic_ns(), Ordering::Release);
    }

    /// Says that nothing here counts any more (a drain).
    pub fn retire(&self) {
        self.map.words()[AT_STAMP].store(0, Ordering::Release);
    }

    /// Sets a key's tier bits; false if both of its buckets are full.
    pub fn set(&mut self, key: IndexKey, tiers: u8) -> bool {
        let (high, low) = key.words();
        // The emptier of the two buckets takes a new key: at half load next to none is refused.
        let mut free = None;
        let mut most = 0;
        for bucket in key.buckets(self.mask) {
            let mut empty = 0;
            let mut place = None;
            for slot in 0..BUCKET {
                let (a, b) = entry(self.map.words(), bucket, slot);
                let (seen_a, seen_b) = (a.load(Ordering::Relaxed), b.load(Ordering::Relaxed));
                if seen_a == high && seen_b & !0xff == low {
                    b.store(low | u64::from(tiers), Ordering::Release);
                    return true;
                }
                if seen_a == 0 && seen_b == 0 {
                    empty += 1;
                    place = Some((a, b));
                }
            }
            if empty > most {
                most = empty;
                free = place;
            }
        }
        let Some((a, b)) = free else { return false };
        a.store(high, Ordering::Relaxed);
        b.store(low | u64::from(tiers), Ordering::Release);
        true
    }

    /// Takes a key out.
    pub fn remove(&mut self, key: IndexKey) {
        let (high, low) = key.words();
        for bucket in key.buckets(self.mask) {
            for slot in 0..BUCKET {
                let (a, b) = entry(self.map.words(), bucket, slot);
                if a.load(Ordering::Relaxed) == high && b.load(Ordering::Relaxed) & !0xff == low {
                    b.store(0, Ordering::Release);
                    a.store(0, Ordering::Release);
                    return;
                }
            }
        }
    }
}

/// A shim's end.
#[derive(Debug)]
pub struct TableReader {
    map: Mapping,
    mask: u64,
    stale_ns: u64,
}

/// Keys whose entries are on their way from memory while others are looked at: a table of a million blocks is in no cache.
const AHEAD: usize = 16;

/// Keys in their order; see [`TableReader::ahead`].
#[derive(Debug)]
pub struct Ahead<'a, I> {
    table: &'a TableReader,
    keys: I,
    /// A ring of those that were fetched.
    waiting: [IndexKey; AHEAD],
    at: usize,
    count: usize,
}

impl<I: Iterator<Item = IndexKey>> Iterator for Ahead<'_, I> {
    type Item = IndexKey;

    fn next(&mut self) -> Option<IndexKey> {
        while self.count < AHEAD
            && let Some(key) = self.keys.next()
        {
            self.table.fetch(key);
            self.waiting[(self.at + self.count) % AHEAD] = key;
            self.count += 1;
        }
        if self.count == 0 {
            return None;
        }
        let key = self.waiting[self.at];
        self.at = (self.at + 1) % AHEAD;
        self.count -= 1;
        Some(key)
    }
}

/// Tables up to this length are mapped as a whole when they are opened: an engine's first lookups should not pay for
/// a fault each. A longer one would take memory that the sidecar may never use.
const POPULATED_MAX: u64 = 64 << 20;

impl TableReader {
    /// Maps a table that the sidecar passed.
    ///
    /// # Errors
    /// Where it is not sealed, or is not a table.
    pub fn open(fd: OwnedFd, stale_ms: u32) -> Result<Self, ShmError> {
        let found = rustix::fs::fstat(&fd).map_err(|errno| ShmError::System { call: "fstat", errno })?;
        let bytes = found.st_size as u64;
        let memfd = Memfd::adopt(fd, Seal::SizeAndFutureWrites, bytes)?;
        let map = memfd.map(Access::Read)?;
        let magic = map.words().first().map_or(0, |word| word.load(Ordering::Acquire));
        if magic != MAGIC {
            return Err(ShmError::Magic { what: "presence table", expected: MAGIC, found: magic });
        }
        let slots = map.words().get(AT_SLOTS).map_or(0, |word| word.load(Ordering::Relaxed));
        // The length that so many slots need may be beyond 64 bits.
        let too_many = slots > bytes / 16;
        if !slots.is_power_of_two() || slots < BUCKET as u64 * 2 || too_many || table_bytes(slots) != bytes {
            return Err(ShmError::Size { expected: table_bytes(slots.min(1 << 40)), found: bytes });
        }
        let stale_ns = u64::from(stale_ms) * 1_000_000;
        if bytes <= POPULATED_MAX {
            map.populate();
        }
        Ok(Self { map, mask: slots / BUCKET as u64 - 1, stale_ns })
    }

    /// Whether the sidecar has stamped the table lately.
    pub fn is_fresh(&self) -> bool {
        let stamp = self.map.words()[AT_STAMP].load(Ordering::Acquire);
        clock::monotonic_ns().saturating_sub(stamp) <= self.stale_ns
    }

    /// The same keys in the same order, each asked for from memory some places before it comes: for who looks up many.
    pub fn ahead<I: Iterator<Item = IndexKey>>(&self, keys: I) -> Ahead<'_, I> {
        Ahead { table: self, keys, waiting: [IndexKey(0); AHEAD], at: 0, count: 0 }
    }

    /// A hint to the processor: this key's entries are about to be looked at.
    fn fetch(&self, key: IndexKey) {
        #[cfg(all(target_arch = "x86_64", not(loom)))]
        for bucket in key.buckets(self.mask) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let first = self.map.words().as_ptr().wrapping_add(HEADER_WORDS + bucket * BUCKET * 2);
            // SAFETY: a prefetch changes nothing, whatever it is given; every x86-64 has it.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(first.cast()) };
        }
        #[cfg(not(all(target_arch = "x86_64", not(loom))))]
        let _ = key;
    }

    /// A key's tier bits, 0 if it is absent. Look at [`TableReader::is_fresh`] once for many keys.
    pub fn get(&self, key: IndexKey) -> u8 {
        let (high, low) = key.words();
        for bucket in key.buckets(self.mask) {
            for slot in 0..BUCKET {
                let (a, b) = entry(self.map.words(), bucket, slot);
                let found = b.load(Ordering::Acquire);
                if found & !0xff == low && a.load(Ordering::Relaxed) == high {
                    return found as u8;
                }
            }
        }
        0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn pair(slots: u64) -> (TableWriter, TableReader) {
        let writer = TableWriter::create(slots).unwrap();
        let fd = writer.memfd().fd().try_clone_to_owned().unwrap();
        let reader = TableReader::open(fd, 100).unwrap();
        (writer, reader)
    }

    fn key(n: u32) -> IndexKey {
        let mut hash = [0; 32];
        hash[..4].copy_from_slice(&n.to_le_bytes());
        IndexKey::new(1, &[9; 16], &hash)
    }

    proptest! {
        #[test]
        fn agrees_with_a_map(operations in proptest::collection::vec((0u32..40, 0u8..4), 1..300)) {
            let (mut writer, reader) = pair(256);
            let mut oracle = HashMap::new();
            for (n, tiers) in operations {
                if tiers == 0 {
                    writer.remove(key(n));
                    oracle.remove(&n);
                } else if writer.set(key(n), tiers) {
                    oracle.insert(n, tiers);
                }
                for n in 0..40 {
                    prop_assert_eq!(reader.get(key(n)), oracle.get(&n).copied().unwrap_or(0));
                }
            }
        }
    }

    #[test]
    fn half_full_it_takes_nearly_everything() {
        let (mut writer, _) = pair(1 << 14);
        let refused = (0..1 << 13).filter(|n| !writer.set(key(*n), 1)).count();
        assert!(refused < 16, "{refused} of 8192 keys found no place at half load");
    }

    #[test]
    fn keys_that_are_fetched_ahead_come_in_their_order_and_all_of_them() {
        let (_, reader) = pair(64);
        for count in [0, 1, AHEAD as u32 - 1, AHEAD as u32, AHEAD as u32 + 1, 100] {
            let keys: Vec<IndexKey> = (0..count).map(key).collect();
            let mut ahead = reader.ahead(keys.iter().copied());
            assert_eq!(ahead.by_ref().take(200).collect::<Vec<_>>(), keys);
            assert_eq!(ahead.next(), None);
        }
    }

    #[test]
    fn a_full_table_refuses_and_loses_nothing() {
        let (mut writer, reader) = pair(8);
        let taken: Vec<u32> = (0..64).filter(|n| writer.set(key(*n), 1)).collect();
        assert!(taken.len() <= 8);
        assert!(taken.iter().all(|n| reader.get(key(*n)) == 1));
    }

    #[test]
    fn a_retired_table_is_not_fresh_and_a_stamp_brings_it_back() {
        let (writer, reader) = pair(8);
        assert!(reader.is_fresh());
        writer.retire();
        assert!(!reader.is_fresh());
        writer.stamp();
        assert!(reader.is_fresh());
    }

    #[test]
    fn other_memory_is_refused() {
        let memfd = Memfd::create("t", table_bytes(64)).unwrap();
        memfd.seal(Seal::SizeAndFutureWrites).unwrap();
        let fd = memfd.fd().try_clone_to_owned().unwrap();
        assert!(matches!(TableReader::open(fd, 100), Err(ShmError::Magic { .. })));
    }

    #[test]
    fn a_table_of_more_slots_than_its_memory_holds_is_refused() {
        // 2^60 slots of 16 bytes are no bytes at all, in 64 bits.
        for slots in [0, 1, 4, 16, 1 << 59, 1 << 60, 1 << 63, u64::MAX] {
            let memfd = Memfd::create("t", table_bytes(8).min(HEADER_WORDS as u64 * 8)).unwrap();
            let map = memfd.map(Access::ReadWrite).unwrap();
            map.words()[AT_MAGIC].store(MAGIC, Ordering::Relaxed);
            map.words()[AT_SLOTS].store(slots, Ordering::Relaxed);
            memfd.seal(Seal::SizeAndFutureWrites).unwrap();
            let fd = memfd.fd().try_clone_to_owned().unwrap();
            assert!(matches!(TableReader::open(fd, 100), Err(ShmError::Size { .. })), "{slots}");
        }
    }

    #[test]
    fn keys_differ_by_namespace_and_seed() {
        let hash = [3; 32];
        let base = IndexKey::new(1, &[1; 16], &hash);
        assert_ne!(base, IndexKey::new(1, &[2; 16], &hash));
        assert_ne!(base, IndexKey::new(2, &[1; 16], &hash));
    }
}
