//! The host tier's records: index, pins, prefix-aware eviction.

use std::{
    collections::{BTreeSet, HashMap},
    hash::{BuildHasherDefault, Hasher},
    sync::Arc,
};

use pillion_shm::presence::IndexKey;

use crate::{
    ids::{NamespaceId, NeighbourId},
    key::BlockKey,
    neighbours::Lent,
    pool::{Extent, Pool},
};

/// A record's place in the arena. Valid while the record is pinned, being written, or just looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RecordId(u32);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// A save writes its bytes: found by nobody.
    Writing,
    /// Its bytes come from the SSD: leased, and loaded when they are there.
    Reading,
    /// Proved: may be leased.
    Published,
    /// Taken out of the index while leases still hold it; freed with the last of them.
    Retired,
}

/// Where a record's bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In this pool.
    Own(Extent),
    /// In a neighbour's.
    Foreign(Foreign, u64),
}

/// Whose a borrowed record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Foreign {
    /// What it came with.
    pub(crate) borrow: u64,
    pub(crate) neighbour: NeighbourId,
}

#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) key: BlockKey,
    pub(crate) index: IndexKey,
    pub(crate) space: NamespaceId,
    pub(crate) hash: [u8; 32],
    pub(crate) tenant: Arc<str>,
    pub(crate) format: Arc<str>,
    pub(crate) bytes: u64,
    pub(crate) checksum: u64,
    pub(crate) state: State,
    place: Place,
    pub(crate) parent: Option<BlockKey>,
    pins: u32,
    /// Leases that found it. That it was written, or came once more with a save, is no use.
    uses: u32,
    due: Due,
    /// Where it stands among `evictable`, if it does.
    queued: Option<Due>,
}

/// Which record goes first: the one whose bought time is over first; among equals the least recently touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Due {
    at: u64,
    touched: u64,
}

impl Record {
    /// Whether a lease keeps it where it is.
    pub(crate) fn is_pinned(&self) -> bool {
        self.pins > 0
    }

    /// Whether it is the block with this hash of a namespace, which is one tenant's: all that goes into its key. A
    /// neighbour's has its key only.
    pub(crate) fn is_named(&self, space: NamespaceId, hash: &[u8; 32]) -> bool {
        !self.is_foreign() && self.space == space && self.hash == *hash
    }

    /// Whether it is a neighbour's.
    pub(crate) fn is_foreign(&self) -> bool {
        matches!(self.place, Place::Foreign(..))
    }

    /// Its owner, where that is a neighbour.
    pub(crate) fn neighbour(&self) -> Option<NeighbourId> {
        match self.place {
            Place::Own(_) => None,
            Place::Foreign(foreign, _) => Some(foreign.neighbour),
        }
    }
}

/// A key is already uniform: eight bytes of it are its hash.
#[derive(Default)]
pub(crate) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 ^= u64::from_le_bytes(*first);
        }
    }
    fn write_usize(&mut self, _: usize) {}
}

pub(crate) type KeyMap<V> = HashMap<BlockKey, V, BuildHasherDefault<KeyHasher>>;

/// What a new record needs.
#[derive(Debug, Clone)]
pub(crate) struct NewRecord {
    pub(crate) key: BlockKey,
    pub(crate) index: IndexKey,
    pub(crate) space: NamespaceId,
    /// The engine's.
    pub(crate) hash: [u8; 32],
    pub(crate) tenant: Arc<str>,
    pub(crate) format: Arc<str>,
    pub(crate) bytes: u64,
    pub(crate) parent: Option<BlockKey>,
}

#[derive(Debug)]
pub(crate) struct Store {
    pool: Pool,
    arena: Vec<Option<Record>>,
    vacant: Vec<u32>,
    by_key: KeyMap<RecordId>,
    /// A short cut: of this pool's records among those in `by_key`, one for each index key. Whoever finds one here
    /// compares its name. Clients know how index keys come about: their hash is seeded.
    by_index: HashMap<IndexKey, RecordId, foldhash::fast::RandomState>,
    /// Records (written or being written) whose parent is this key.
    children: KeyMap<u32>,
    /// What may go, in that order: all published, unpinned leaves. Others are among them, too, and some stand where they
    /// were due before they were found again: that is put right when their turn comes. So a lease of thousands of
    /// blocks moves none of them.
    evictable: BTreeSet<(Due, RecordId)>,
    /// Counts the KiB of the records that were written or found: so it goes on by the pool's length while all of
    /// the pool is touched once, whatever the records' sizes. It lasts for a century at 4 TiB/s.
    clock: u64,
    /// Records of neighbours among those in the arena.
    foreign: BTreeSet<(NeighbourId, RecordId)>,
    /// Borrows that have lost a record since this was last asked, once for each.
    returned: Vec<u64>,
    pool_kib: u64,
    pub(crate) used_bytes: u64,
    /// Of this pool: what is borrowed is pinned at its owner's.
    pub(crate) pinned_bytes: u64,
}

fn kib(bytes: u64) -> u64 {
    bytes >> 10
}

impl Store {
    /// `sectors`: records that an SSD takes, too, lie on its sectors.
    pub(crate) fn new(pool_bytes: u64, sectors: bool) -> Self {
        Self {
            pool: Pool::new(pool_bytes, sectors),
            arena: Vec::new(),
            vacant: Vec::new(),
            by_key: KeyMap::default(),
            by_index: HashMap::default(),
            children: KeyMap::default(),
            evictable: BTreeSet::new(),
            clock: 0,
            foreign: BTreeSet::new(),
            returned: Vec::new(),
            pool_kib: kib(pool_bytes),
            used_bytes: 0,
            pinned_bytes: 0,
        }
    }

    pub(crate) fn fits(&self, bytes: u64) -> bool {
        self.pool.fits(bytes)
    }

    /// Records of this pool.
    pub(crate) fn len(&self) -> usize {
        self.arena.len() - self.vacant.len() - self.foreign.len()
    }

    /// Records of others that are borrowed.
    pub(crate) fn foreign(&self) -> usize {
        self.foreign.len()
    }

    pub(crate) fn find(&self, key: &BlockKey) -> Option<RecordId> {
        self.by_key.get(key).copied()
    }

    /// As by its key, which need not be formed: that takes longer than all the rest of a lookup. `None` says nothing.
    pub(crate) fn find_named(
        &self,
        index: &IndexKey,
        space: NamespaceId,
        hash: &[u8; 32],
    ) -> Option<(RecordId, &Record)> {
        let id = *self.by_index.get(index)?;
        Some((id, self.get(id).filter(|record| record.is_named(space, hash))?))
    }

    pub(crate) fn get(&self, id: RecordId) -> Option<&Record> {
        self.arena.get(id.0 as usize)?.as_ref()
    }

    pub(crate) fn find_bytes(&self, key: &[u8; 32]) -> Option<RecordId> {
        self.by_key.get(key).copied()
    }

    /// Where it lies in its pool.
    pub(crate) fn offset(&self, id: RecordId) -> Option<u64> {
        Some(match self.get(id)?.place {
            Place::Own(extent) => self.pool.offset(extent),
            Place::Foreign(_, offset) => offset,
        })
    }

    /// An entry for a neighbour's record: it can be pinned and found, and goes with its last pin.
    pub(crate) fn insert_foreign(&mut self, key: BlockKey, lent: Lent, foreign: Foreign) -> RecordId {
        debug_assert!(self.find(&key).is_none());
        let record = Record {
            key,
            // Nothing is said of it in our tables.
            index: IndexKey::new(0, &[0; 16], &[0; 32]),
            space: NamespaceId([0; 16]),
            hash: [0; 32],
            tenant: Arc::from(""),
            format: lent.format,
            bytes: lent.bytes,
            checksum: lent.checksum,
            state: State::Published,
            place: Place::Foreign(foreign, lent.offset),
            parent: None,
            pins: 0,
            uses: 0,
            due: Due { at: 0, touched: 0 },
            queued: None,
        };
        let id = self.add(record);
        self.foreign.insert((foreign.neighbour, id));
        id
    }

    /// Takes a neighbour's records out of the index.
    pub(crate) fn retire_foreign(&mut self, neighbour: NeighbourId) {
        let of_it = (neighbour, RecordId(0))..=(neighbour, RecordId(u32::MAX));
        let ids: Vec<RecordId> = self.foreign.range(of_it).map(|(_, id)| *id).collect();
        for id in ids {
            self.retire(id);
        }
    }

    /// Borrows whose records have left the store, one entry for each record.
    pub(crate) fn take_returned(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.returned)
    }

    /// Makes room for a record and inserts it as being written. `evicted` gets what had to go.
    /// `None`: everything else is pinned, written or the parent of something that is.
    pub(crate) fn insert(
        &mut self,
        new: NewRecord,
        state: State,
        evicted: &mut Vec<Record>,
    ) -> Option<RecordId> {
        debug_assert!(self.find(&new.key).is_none());
        // The parent must outlive the search for room.
        self.add_child(new.parent.as_ref());
        let extent = loop {
            if let Some(extent) = self.pool.allocate(new.bytes) {
                break extent;
            }
            match self.evict_first() {
                Some(record) => evicted.push(record),
                None => {
                    self.remove_child(new.parent.as_ref());
                    return None;
                }
            }
        };
        let due = self.due(new.bytes, 0);
        let record = Record {
            key: new.key,
            index: new.index,
            space: new.space,
            hash: new.hash,
            tenant: new.tenant,
            format: new.format,
            bytes: new.bytes,
            checksum: 0,
            state,
            place: Place::Own(extent),
            parent: new.parent,
            pins: 0,
            uses: 0,
            due,
            queued: None,
        };
        self.used_bytes += record.bytes;
        Some(self.add(record))
    }

    fn add(&mut self, record: Record) -> RecordId {
        let (key, index) = (record.key, (!record.is_foreign()).then_some(record.index));
        let id = match self.vacant.pop() {
            Some(index) => {
                self.arena[index as usize] = Some(record);
                RecordId(index)
            }
            None => {
                self.arena.push(Some(record));
                RecordId(self.arena.len() as u32 - 1)
            }
        };
        self.by_key.insert(key, id);
        if let Some(index) = index {
            self.by_index.insert(index, id);
        }
        id
    }

    /// Nobody finds it any more.
    fn hide(&mut self, id: RecordId, key: &BlockKey, index: &IndexKey) {
        if self.by_key.get(key) == Some(&id) {
            self.by_key.remove(key);
        }
        if self.by_index.get(index) == Some(&id) {
            self.by_index.remove(index);
        }
    }

    fn evict_first(&mut self) -> Option<Record> {
        loop {
            let (stood, id) = self.evictable.pop_first()?;
            let may_go = self.may_go(id);
            let Some(record) = self.arena.get_mut(id.0 as usize).and_then(Option::as_mut) else { continue };
            record.queued = None;
            if !may_go {
                continue;
            }
            if record.due == stood {
                return self.remove(id);
            }
            self.requeue(id);
        }
    }

    /// Whether nothing keeps a record here.
    fn may_go(&self, id: RecordId) -> bool {
        let Some(record) = self.get(id) else { return false };
        // Cheapest first: a leased record is asked for often.
        record.pins == 0
            && record.state == State::Published
            && !record.is_foreign()
            && !self.children.contains_key(&record.key)
    }

    /// Takes a record out whatever its state, and frees its bytes.
    fn remove(&mut self, id: RecordId) -> Option<Record> {
        let record = self.arena.get_mut(id.0 as usize)?.take()?;
        if let Some(stood) = record.queued {
            self.evictable.remove(&(stood, id));
        }
        self.hide(id, &record.key, &record.index);
        self.vacant.push(id.0);
        match record.place {
            Place::Own(extent) => {
                self.pool.free(extent);
                self.used_bytes -= record.bytes;
            }
            Place::Foreign(foreign, _) => {
                self.foreign.remove(&(foreign.neighbour, id));
                self.returned.push(foreign.borrow);
            }
        }
        self.remove_child(record.parent.as_ref());
        Some(record)
    }

    /// Its bytes did not come: as if it had never been. Leases that have it keep its place.
    pub(crate) fn abandon(&mut self, id: RecordId) {
        let Some(record) = self.arena.get_mut(id.0 as usize).and_then(Option::as_mut) else { return };
        debug_assert!(matches!(record.state, State::Writing | State::Reading));
        if record.pins == 0 {
            self.remove(id);
            return;
        }
        record.state = State::Retired;
        let (key, index) = (record.key, record.index);
        self.hide(id, &key, &index);
    }

    /// The bytes are there and proved.
    pub(crate) fn publish(&mut self, id: RecordId, checksum: u64) -> Option<&Record> {
        let record = self.arena.get_mut(id.0 as usize)?.as_mut()?;
        record.checksum = checksum;
        record.state = State::Published;
        self.requeue(id);
        self.get(id)
    }

    /// Takes a record out of the index at once; its bytes go with the last pin.
    pub(crate) fn retire(&mut self, id: RecordId) -> Option<(BlockKey, Arc<str>, IndexKey)> {
        let record = self.arena.get_mut(id.0 as usize)?.as_mut()?;
        if record.state != State::Published {
            return None;
        }
        record.state = State::Retired;
        let (key, tenant, index) = (record.key, Arc::clone(&record.tenant), record.index);
        self.hide(id, &key, &index);
        self.requeue(id);
        self.drop_if_unused(id);
        Some((key, tenant, index))
    }

    /// A lease found the record.
    pub(crate) fn touch(&mut self, id: RecordId) {
        if let Some(record) = self.arena.get_mut(id.0 as usize).and_then(Option::as_mut) {
            record.uses = record.uses.saturating_add(1);
        }
        self.renew(id);
    }

    /// As young as one that is found now; that is no use of it.
    pub(crate) fn renew(&mut self, id: RecordId) {
        let Some(record) = self.get(id) else { return };
        let (bytes, uses) = (record.bytes, record.uses);
        let due = self.due(bytes, uses);
        self.set_due(id, due);
    }

    fn set_due(&mut self, id: RecordId, due: Due) {
        let Some(record) = self.arena.get_mut(id.0 as usize).and_then(Option::as_mut) else { return };
        // Later than it stands: it is moved when its turn comes. Earlier: now.
        if let Some(stood) = record.queued.filter(|stood| due < *stood) {
            self.evictable.remove(&(stood, id));
            record.queued = None;
        }
        record.due = due;
        self.requeue(id);
    }

    /// LRU in which hits buy time: with every doubling of uses + 1 a record stays for as long again as it takes to
    /// touch the whole pool once. docs/decisions/008 says why.
    fn due(&mut self, bytes: u64, uses: u32) -> Due {
        self.clock += kib(bytes).max(1);
        let bought = self.pool_kib as f64 * (f64::from(uses) + 1.0).log2();
        Due { at: self.clock + bought as u64, touched: self.clock }
    }

    /// The first to go, until it is touched.
    pub(crate) fn age(&mut self, id: RecordId) {
        self.set_due(id, Due { at: 0, touched: 0 });
    }

    pub(crate) fn pin(&mut self, id: RecordId) {
        if let Some(record) = self.arena.get_mut(id.0 as usize).and_then(Option::as_mut) {
            record.pins += 1;
            if record.pins == 1 && !record.is_foreign() {
                self.pinned_bytes += record.bytes;
            }
        }
    }

    pub(crate) fn unpin(&mut self, id: RecordId) {
        if let Some(record) = self.arena.get_mut(id.0 as usize).and_then(Option::as_mut) {
            debug_assert!(record.pins > 0, "unpin without pin");
            record.pins -= 1;
            if record.pins == 0 && !record.is_foreign() {
                self.pinned_bytes -= record.bytes;
            }
        }
        self.requeue(id);
        self.drop_if_unused(id);
    }

    /// Removes what nobody can find, or is a neighbour's, with its last pin.
    pub(crate) fn drop_if_unused(&mut self, id: RecordId) {
        let gone = |record: &Record| record.state == State::Retired || record.is_foreign();
        if self.get(id).is_some_and(|record| gone(record) && record.pins == 0) {
            self.remove(id);
        }
    }

    fn add_child(&mut self, parent: Option<&BlockKey>) {
        let Some(parent) = parent else { return };
        *self.children.entry(*parent).or_insert(0) += 1;
    }

    fn remove_child(&mut self, parent: Option<&BlockKey>) {
        let Some(parent) = parent else { return };
        if let Some(count) = self.children.get_mut(parent) {
            *count -= 1;
            if *count == 0 {
                self.children.remove(parent);
                if let Some(id) = self.find(parent) {
                    self.requeue(id);
                }
            }
        }
    }

    /// Sees to it that a record that may go is among the evictable ones.
    fn requeue(&mut self, id: RecordId) {
        let may_go = self.may_go(id);
        let Some(record) = self.arena.get_mut(id.0 as usize).and_then(Option::as_mut) else { return };
        if may_go && record.queued.is_none() {
            record.queued = Some(record.due);
            self.evictable.insert((record.due, id));
        }
    }

    /// Borrowed records by their borrow; for tests.
    #[cfg(any(test, feature = "checked"))]
    pub(crate) fn borrowed(&self) -> HashMap<u64, usize> {
        let mut found = HashMap::new();
        for record in self.arena.iter().flatten() {
            if let Place::Foreign(foreign, _) = record.place {
                *found.entry(foreign.borrow).or_default() += 1;
            }
        }
        found
    }

    /// Checks what must always hold; for tests.
    #[cfg(any(test, feature = "checked"))]
    pub(crate) fn check(&self) {
        let mut used = 0;
        let mut pinned = 0;
        let mut children: HashMap<BlockKey, u32> = HashMap::new();
        for (index, record) in self.arena.iter().enumerate() {
            let Some(record) = record else { continue };
            let id = RecordId(index as u32);
            if record.is_foreign() {
                assert!(record.pins > 0, "borrowed for nobody: {record:?}");
                assert!(record.queued.is_none());
                continue;
            }
            used += record.bytes;
            pinned += if record.pins > 0 { record.bytes } else { 0 };
            if let Some(parent) = record.parent {
                *children.entry(parent).or_default() += 1;
            }
            let is_hidden = record.state == State::Retired;
            assert_eq!(self.by_key.get(&record.key) != Some(&id), is_hidden);
            assert!(self.by_index.get(&record.index) != Some(&id) || !is_hidden);
            assert!(is_hidden || self.by_index.contains_key(&record.index));
            let may_go = record.state == State::Published
                && record.pins == 0
                && !self.children.contains_key(&record.key);
            assert!(record.queued.is_some() || !may_go, "never to go: {record:?}");
            assert!(record.queued.is_none_or(|stood| stood <= record.due), "goes too late: {record:?}");
            assert!(record.queued.is_none_or(|stood| self.evictable.contains(&(stood, id))), "{record:?}");
        }
        assert_eq!((used, pinned), (self.used_bytes, self.pinned_bytes));
        assert_eq!(children.len(), self.children.len());
        assert!(children.iter().all(|(key, count)| self.children.get(key) == Some(count)));
        assert_eq!(self.evictable.len(), self.arena.iter().flatten().filter(|r| r.queued.is_some()).count());
    }
}

#[cfg(test)]
mod tests;
