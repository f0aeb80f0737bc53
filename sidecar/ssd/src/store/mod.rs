//! The owner of all state: which record lies where, which segment is in which state. Without I/O.
//!
//! Calls and completions go in, [`Action`]s come out: operations for the directories' devices, and outcomes.

mod evict;
mod index;
mod segment;
#[cfg(test)]
mod tests;
mod write;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use crate::{
    device::{Completion, IoError, Op, Part, What},
    error::{GetError, PutError},
    format::{
        Asked, Entry, RecordHeader, RecordKey, RecordMeta, Refused, SECTOR, SegmentId, Superblock,
        VerifiedRecord,
    },
    memory::{Aligned, Extent, Memory},
};

use index::Index;
use segment::{Segment, Shelf};
pub use segment::{SegmentView, ShelfView, State};

/// Bounds of a store.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Records that wait to be written, are being written, or wait for a sync.
    pub puts_max: usize,
    /// Records that are being read.
    pub gets_max: usize,
    /// One write gathers records until it has so many bytes. A read that comes waits until it is over.
    pub batch_bytes: u64,
    /// Writes in flight per directory.
    pub batches_max: u32,
    /// Operations in flight per directory. An engine has a bound of its own, too.
    pub depth: usize,
    /// I/O errors after which a directory takes no more writes.
    pub strikes_max: u32,
    /// A directory of so many segments opens the next one while one fills; one of fewer has none to spare for that.
    pub ahead_segments_min: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            puts_max: 256,
            gets_max: 1024,
            batch_bytes: 2 << 20,
            batches_max: 16,
            depth: 64,
            strikes_max: 3,
            ahead_segments_min: 8,
        }
    }
}

/// Why a record is not here any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropReason {
    /// Its segment was needed and nobody wanted to keep it.
    Evicted,
    /// Its bytes were not what was written.
    Corrupt,
    /// It could not be read.
    Unreadable,
    /// A sync failed after it was written: nobody knows whether it is on the disk.
    Unsynced,
}

/// What is to be done or told.
#[derive(Debug)]
pub enum Action {
    /// Give this to the directory's device.
    Io {
        /// Which directory.
        shelf: usize,
        /// What.
        op: Op,
    },
    /// The record can be got. With `durable`, also after a crash from now on.
    Stored {
        /// The put's.
        token: u64,
        /// Its key.
        key: RecordKey,
        /// Whether it is on stable storage.
        durable: bool,
    },
    /// The put's one ending, otherwise.
    StoreFailed {
        /// The put's.
        token: u64,
        /// Its key.
        key: RecordKey,
        /// Why.
        error: PutError,
    },
    /// The bytes are in the extent, and proved (I1).
    Loaded {
        /// The get's.
        token: u64,
        /// Its key.
        key: RecordKey,
        /// Their checksum.
        checksum: u64,
    },
    /// The get's one ending, otherwise.
    LoadFailed {
        /// The get's.
        token: u64,
        /// Its key.
        key: RecordKey,
        /// Why.
        error: GetError,
    },
    /// A record that could be got before cannot any more.
    Dropped {
        /// Its key.
        key: RecordKey,
        /// Why.
        reason: DropReason,
    },
    /// No segment is left to write into: call [`Store::evict`].
    WantsRoom {
        /// Which directory.
        shelf: usize,
    },
    /// Too many errors: this directory is only read from now on.
    ReadOnly {
        /// Which directory.
        shelf: usize,
    },
}

/// Monotonic counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Records written.
    pub stored: u64,
    /// Records read and proved.
    pub loaded: u64,
    /// Records whose bytes were not what was written.
    pub corrupt: u64,
    /// Operations that failed.
    pub io_errors: u64,
    /// Records dropped to make room.
    pub evicted: u64,
    /// Records written again to make room around them.
    pub relocated: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Location {
    shelf: u16,
    slot: u32,
    position: u64,
    bytes: u64,
    sequence: u64,
}

/// Who wants to know how a write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Caller(u64),
    /// Making room: the record lay there.
    Relocation(Location),
}

#[derive(Debug)]
struct Put {
    owner: Owner,
    meta: RecordMeta,
    source: Source,
    durable: bool,
}

/// Where a record's bytes are until they are written.
#[derive(Debug)]
enum Source {
    /// In the pool.
    Pool(Extent),
    /// Read from elsewhere on the disk: whole sectors.
    Owned(Aligned),
}

#[derive(Debug, Clone, Copy)]
struct Ack {
    owner: Owner,
    key: RecordKey,
    /// Where the record will be when the sync has come; until then an older copy of it is the live one.
    place: Option<Location>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SyncFor {
    /// The header of a new life: records may follow.
    Open,
    /// Acknowledgements.
    Acks,
    /// All records, before the footer vouches for them.
    Seal,
    /// The footer.
    Sealed,
}

#[derive(Debug)]
enum Pending {
    Prepare,
    Header,
    Batch(Vec<(Put, Entry)>),
    Sync { why: SyncFor, acks: Vec<Ack> },
    Footer,
    Load { token: u64, asked: Asked, extent: Extent },
    Relocate { location: Location, asked: Asked },
}

/// A life of a segment file, as recovery found it.
#[derive(Debug, Clone, Copy)]
pub struct Life<'a> {
    /// Its name.
    pub id: SegmentId,
    /// No record is older.
    pub first_sequence: u64,
    /// Its records.
    pub entries: &'a [Entry],
    /// Whether each of them is known to be whole and on stable storage.
    pub proved: bool,
}

/// The store. See the module.
pub struct Store {
    shelves: Vec<Shelf>,
    index: Index,
    /// Keys that wait or are being written, each with its put's token.
    writing: HashMap<RecordKey, u64>,
    pending: HashMap<u64, (u16, u32, Pending)>,
    actions: VecDeque<Action>,
    memory: Arc<Memory>,
    random: Box<dyn FnMut() -> [u8; 16] + Send>,
    limits: Limits,
    counters: Counters,
    gets: usize,
    /// Durable puts whose record is there and that wait for a sync.
    acks: usize,
    next_ticket: u64,
    next_sequence: u64,
    /// Second copies that recovery found: where the first turns out to be bad, this one is read.
    spares: HashMap<RecordKey, Location>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("records", &self.index.len()).field("shelves", &self.shelves).finish()
    }
}

impl Store {
    /// An empty store over these directories, each with so many segments at most. `random` names the lives
    /// of files: it must not repeat, not even after a restart.
    pub fn new(
        directories: &[(Superblock, u32)],
        memory: Arc<Memory>,
        limits: Limits,
        random: Box<dyn FnMut() -> [u8; 16] + Send>,
    ) -> Self {
        Self {
            shelves: directories.iter().map(|(block, slots)| Shelf::new(*block, *slots)).collect(),
            index: Index::new(directories.iter().map(|(_, slots)| *slots)),
            writing: HashMap::new(),
            pending: HashMap::new(),
            actions: VecDeque::new(),
            memory,
            random,
            limits,
            counters: Counters::default(),
            gets: 0,
            acks: 0,
            next_ticket: 0,
            next_sequence: 1,
            spares: HashMap::new(),
        }
    }

    /// Takes over a file that recovery found, before the first put. `segment` is `None` where its header is
    /// not valid: it is there and free.
    pub fn adopt(&mut self, shelf: usize, slot: u32, segment: Option<Life<'_>>) {
        let Some(place) = self.shelves[shelf].segments.get_mut(slot as usize) else { return };
        let Some(Life { id, first_sequence, entries, proved }) = segment else {
            place.state = State::Free;
            return;
        };
        place.state = State::Sealed;
        (place.id, place.first_sequence, place.proved) = (id, first_sequence, proved);
        // A terabyte has half a million of them: no slack.
        self.index.reserve(shelf, slot, entries.len());
        self.next_sequence = self.next_sequence.max(first_sequence);
        for entry in entries {
            self.next_sequence = self.next_sequence.max(entry.sequence + 1);
            let (position, bytes) = (entry.position, entry.meta.bytes);
            let location = Location { shelf: shelf as u16, slot, position, bytes, sequence: entry.sequence };
            let key = entry.meta.key;
            let Some(known) = self.index.get(&key) else {
                self.place(key, location);
                continue;
            };
            // Of two records with one key one that is known to be whole counts, and then the earlier: the later may be
            // a copy whose sync failed, and that can be read until the power goes.
            let mut spare = location;
            if (!proved, location.sequence) < (!self.segment(known).proved, known.sequence) {
                self.place(key, location);
                spare = known;
            }
            if known.bytes == location.bytes {
                self.spares.insert(key, spare);
            }
        }
    }

    /// A file that recovery could not read: it is left alone.
    pub fn adopt_unreadable(&mut self, shelf: usize, slot: u32) {
        if let Some(place) = self.shelves[shelf].segments.get_mut(slot as usize) {
            place.state = State::Retired;
        }
    }

    /// Whether the record can be got.
    pub fn contains(&self, key: &RecordKey) -> bool {
        self.index.contains(key)
    }

    /// The length of a record's payload.
    pub fn bytes_of(&self, key: &RecordKey) -> Option<u64> {
        self.index.get(key).map(|location| location.bytes)
    }

    /// Records.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.index.len() == 0
    }

    /// Counts since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Nothing waits for a completion.
    pub fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.shelves.iter().all(|shelf| shelf.queue.is_empty())
    }

    /// What is to be done next.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Stores a record from an extent of the pool. Its one ending comes as an action with this token; a
    /// `durable` one ends when a sync came after it.
    ///
    /// # Errors
    /// Why it was not taken; no action follows.
    pub fn put(
        &mut self,
        token: u64,
        meta: RecordMeta,
        extent: Extent,
        durable: bool,
    ) -> Result<(), PutError> {
        meta.check().map_err(PutError::Record)?;
        if extent.bytes != meta.bytes || !self.memory.holds(extent.padded()) {
            return Err(PutError::Extent);
        }
        if self.writing.contains_key(&meta.key) {
            return Err(PutError::BeingWritten);
        }
        if self.writing.len() + self.acks >= self.limits.puts_max {
            return Err(PutError::Busy);
        }
        let there = self.index.get(&meta.key);
        if let Some(location) = there.filter(|there| self.segment(*there).proved) {
            // Nothing is written twice, unless nobody knows whether it is there.
            self.stored_already(token, meta.key, location, durable);
            return Ok(());
        }
        let writable = self.shelves.iter().enumerate().filter(|(_, shelf)| !shelf.read_only);
        let (shelf, max) = writable
            .min_by_key(|(_, shelf)| (shelf.load, shelf.taken_bytes))
            .map(|(number, shelf)| (number, shelf.record_bytes_max()))
            .ok_or(PutError::ReadOnly)?;
        let bytes = meta.footprint();
        if bytes > max {
            return Err(PutError::TooLong { bytes, max });
        }
        self.writing.insert(meta.key, token);
        self.shelves[shelf].load += bytes;
        self.shelves[shelf].taken_bytes += bytes;
        self.shelves[shelf].queue.push_back(Put {
            owner: Owner::Caller(token),
            meta,
            source: Source::Pool(extent),
            durable,
        });
        self.pump(shelf);
        Ok(())
    }

    fn stored_already(&mut self, token: u64, key: RecordKey, location: Location, durable: bool) {
        let (shelf, slot) = (usize::from(location.shelf), location.slot);
        let writer = self.shelves[shelf].segments[slot as usize].writer.as_mut();
        match writer.filter(|_| durable) {
            Some(writer) => {
                writer.waiting.push(Ack { owner: Owner::Caller(token), key, place: None });
                self.acks += 1;
                self.settle(shelf, slot);
            }
            // Sealed: a sync came before the footer, or recovery read it all. Retired ones are not proved.
            None => self.actions.push_back(Action::Stored { token, key, durable }),
        }
    }

    /// Reads a record into an extent of its length; where that ends in the middle of a sector, what follows up to
    /// the sector's end is written, too. Its one ending comes as an action with this token.
    ///
    /// # Errors
    /// Why it was not begun; no action follows.
    pub fn get(&mut self, token: u64, key: RecordKey, extent: Extent) -> Result<(), GetError> {
        let location = self.index.get(&key).ok_or(GetError::Missing)?;
        if extent.bytes != location.bytes || !self.memory.holds(extent.padded()) {
            return Err(GetError::Extent { expected: location.bytes });
        }
        if self.gets >= self.limits.gets_max {
            return Err(GetError::Busy);
        }
        self.load(token, key, location, extent.padded());
        Ok(())
    }

    fn load(&mut self, token: u64, key: RecordKey, location: Location, extent: Extent) {
        self.gets += 1;
        let asked = self.asked(key, location);
        let parts = vec![Part::Owned(Aligned::zeroed(SECTOR)), Part::Pool(extent)];
        self.segment(location).readers += 1;
        self.io(
            location.shelf.into(),
            location.slot,
            What::Read,
            location.position,
            parts,
            Pending::Load { token, asked, extent },
        );
    }

    /// Forgets a record. It may come back after a restart: nothing on the disk says that it went.
    pub fn remove(&mut self, key: &RecordKey) -> bool {
        self.spares.remove(key);
        self.displace(key).is_some()
    }

    fn asked(&mut self, key: RecordKey, location: Location) -> Asked {
        Asked { key, bytes: location.bytes, segment: self.segment(location).id, position: location.position }
    }

    fn segment(&mut self, location: Location) -> &mut Segment {
        &mut self.shelves[usize::from(location.shelf)].segments[location.slot as usize]
    }

    /// Enters a record into the index; an older one with its key is dead.
    fn place(&mut self, key: RecordKey, location: Location) {
        self.displace(&key);
        self.index.insert(key, location);
        let segment = self.segment(location);
        segment.live += 1;
        segment.live_bytes += location.bytes;
    }

    fn displace(&mut self, key: &RecordKey) -> Option<Location> {
        let location = self.index.remove(key)?;
        let segment = self.segment(location);
        segment.live -= 1;
        segment.live_bytes -= location.bytes;
        Some(location)
    }

    fn drop_record(&mut self, key: RecordKey, reason: DropReason) {
        if self.displace(&key).is_none() {
            return;
        }
        if let Some(spare) = self.spares.remove(&key) {
            self.place(key, spare);
        } else {
            self.counters.evicted += u64::from(reason == DropReason::Evicted);
            self.actions.push_back(Action::Dropped { key, reason });
        }
    }

    fn io(&mut self, shelf: usize, slot: u32, what: What, at: u64, parts: Vec<Part>, pending: Pending) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.pending.insert(ticket, (shelf as u16, slot, pending));
        self.actions.push_back(Action::Io { shelf, op: Op { ticket, slot, what, at, parts } });
    }

    /// An operation ended.
    pub fn completed(&mut self, completion: Completion) {
        let Completion { ticket, result, parts } = completion;
        let Some((shelf, slot, pending)) = self.pending.remove(&ticket) else { return };
        let shelf = usize::from(shelf);
        self.counters.io_errors += u64::from(result.is_err());
        match pending {
            Pending::Load { token, asked, extent } => {
                self.load_ended(shelf, slot, token, &asked, extent, result, &parts)
            }
            Pending::Relocate { location, asked } => self.relocation_read(location, &asked, result, parts),
            Pending::Batch(puts) => self.batch_ended(shelf, slot, puts, result),
            Pending::Prepare => self.prepared(shelf, slot, result),
            Pending::Header => self.header_written(shelf, slot, result),
            Pending::Footer => self.footer_written(shelf, slot, result),
            Pending::Sync { why, acks } => self.synced(shelf, slot, why, acks, result),
        }
        self.pump(shelf);
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one pending load")]
    fn load_ended(
        &mut self,
        shelf: usize,
        slot: u32,
        token: u64,
        asked: &Asked,
        extent: Extent,
        result: Result<(), IoError>,
        parts: &[Part],
    ) {
        self.gets -= 1;
        self.shelves[shelf].segments[slot as usize].readers -= 1;
        let key = asked.key;
        let proved = match (result, parts) {
            (Err(error), _) => Err(GetError::Io(error)),
            (Ok(()), [Part::Owned(header), Part::Pool(_)]) => {
                let proved = self.memory.with(extent, |payload| {
                    VerifiedRecord::verify(asked, header.bytes(), payload).map(|record| record.checksum())
                });
                proved.unwrap_or(Err(Refused::Malformed("extent"))).map_err(GetError::Corrupt)
            }
            _ => Err(GetError::Corrupt(Refused::Malformed("completion"))),
        };
        match proved {
            Ok(checksum) => {
                self.counters.loaded += 1;
                self.index.mark_read(&key);
                self.actions.push_back(Action::Loaded { token, key, checksum });
            }
            Err(error) => {
                let first = self.actions.len();
                self.bad_read(shelf, slot, asked, error);
                let elsewhere = self.index.get(&key).filter(|location| location.bytes == asked.bytes);
                match elsewhere.filter(|location| self.asked(key, *location) != *asked) {
                    Some(location) => self.load(token, key, location, extent),
                    // Before what it drops.
                    None => self.actions.insert(first, Action::LoadFailed { token, key, error }),
                }
            }
        }
        self.free_if_drained(shelf, slot);
    }

    /// A record that cannot be read is dropped; a segment that cannot be read is not written again.
    fn bad_read(&mut self, shelf: usize, slot: u32, asked: &Asked, error: GetError) {
        let same = self.lies_at(&asked.key, shelf, slot, asked.position);
        if let GetError::Io(error) = error {
            if error.is_no_space() {
                return;
            }
            if same {
                self.drop_record(asked.key, DropReason::Unreadable);
            }
            self.spoil(shelf, slot);
        } else {
            self.counters.corrupt += 1;
            if same {
                self.drop_record(asked.key, DropReason::Corrupt);
            }
        }
    }

    /// What segments there are: for whoever decides what to evict.
    pub fn segments(&self, shelf: usize) -> impl Iterator<Item = SegmentView> + '_ {
        self.shelves[shelf].views()
    }

    /// The directories, in their order: for people.
    pub fn shelves(&self) -> Vec<ShelfView> {
        self.shelves.iter().map(Shelf::view).collect()
    }

    /// Live records of a segment.
    pub fn live_keys(&self, shelf: usize, slot: u32) -> impl Iterator<Item = RecordKey> + '_ {
        self.index.keys_in(shelf, slot)
    }

    fn lies_at(&self, key: &RecordKey, shelf: usize, slot: u32, position: u64) -> bool {
        self.index
            .get(key)
            .is_some_and(|at| (usize::from(at.shelf), at.slot, at.position) == (shelf, slot, position))
    }

    /// Whether a directory takes no writes any more.
    pub fn is_read_only(&self, shelf: usize) -> bool {
        self.shelves[shelf].read_only
    }

    fn header_of(asked: &Asked, parts: &[Part]) -> Result<RecordHeader, Refused> {
        match parts {
            [Part::Owned(header), Part::Owned(payload)] => {
                VerifiedRecord::verify(asked, header.bytes(), payload.bytes()).map(drop)?;
                RecordHeader::expect(header.bytes(), asked)
            }
            _ => Err(Refused::Malformed("completion")),
        }
    }
}
