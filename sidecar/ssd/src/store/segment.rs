//! Segments: their states, and how one is opened and sealed.
//!
//! ```text
//! Absent ─prepare─► Opening ─header, sync─► Ready ─turn─► Open ─full─► Sealing ─sync, footer, sync─► Sealed
//!   Free ───────────►                                                                                  │ evict
//!    ▲                                                                                                 ▼
//!    └────────────────────────────── nobody reads, what is hot is durable elsewhere ──────────── Draining
//! The next one is opened while the open one fills: a sync can take as long as many writes.
//! A segment that a crash left open is Sealing from the start.
//! Retired: after an I/O error, from any state; read, never written again.
//! ```

use std::collections::VecDeque;

use super::{Ack, Action, DropReason, Location, Owner, Pending, Put, Store, SyncFor};
use crate::{
    device::{IoError, Part, What},
    error::PutError,
    format::{
        Entry, Footer, OVERHEAD, RecordKey, SECTOR, SegmentHeader, SegmentId, Superblock, footer_bytes,
    },
    memory::Aligned,
};

/// What a segment is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// No file yet.
    Absent,
    /// A file without records that matter.
    Free,
    /// Its header is being written.
    Opening,
    /// Its header is durable; it takes records when the open one is full.
    Ready,
    /// Takes records.
    Open,
    /// Takes no more; its footer is being written.
    Sealing,
    /// Complete, or found without a footer at the start: read only.
    Sealed,
    /// Being emptied for its next life.
    Draining,
    /// An I/O error: read, never written again by this process.
    Retired,
    /// The disk had no room for its file.
    NoSpace,
}

/// A segment, as the policy sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentView {
    /// The file's number.
    pub slot: u32,
    /// What it is doing.
    pub state: State,
    /// Records that can be got.
    pub live: u32,
    /// Bytes of their payloads.
    pub live_bytes: u64,
    /// How old: no record in it was written before.
    pub first_sequence: u64,
    /// Reads in flight.
    pub readers: u32,
}

/// A directory, for people.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ShelfView {
    /// Bytes of segment files, at most.
    pub capacity_bytes: u64,
    /// Bytes on the disk of records that can be got.
    pub used_bytes: u64,
    /// Those records.
    pub records: u64,
    /// Segment files that are there.
    pub segments: u32,
    /// Of these, not written again after an error.
    pub retired: u32,
    /// Nothing is written any more.
    pub is_read_only: bool,
}

#[derive(Debug)]
pub(super) struct Segment {
    pub(super) state: State,
    pub(super) id: SegmentId,
    pub(super) live: u32,
    pub(super) live_bytes: u64,
    pub(super) first_sequence: u64,
    pub(super) readers: u32,
    /// Records of it that are being written elsewhere.
    pub(super) relocating: u32,
    /// Its records are whole, and on stable storage or about to be synced by its writer.
    pub(super) proved: bool,
    /// It could not be read: retire it when it is sealed.
    pub(super) spoiled: bool,
    /// An error kept a record of it from being written elsewhere: it stays as it is.
    pub(super) stays: bool,
    pub(super) writer: Option<Box<Writer>>,
}

/// What an open segment has beside.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) tail: u64,
    pub(super) footer: Footer,
    pub(super) in_flight: u32,
    /// Written; told when a sync has come.
    pub(super) waiting: Vec<Ack>,
    /// Placed since the last good sync began.
    pub(super) unsynced: Vec<(RecordKey, u64)>,
    /// What the sync in flight is for.
    pub(super) syncing: Vec<(RecordKey, u64)>,
    pub(super) is_syncing: bool,
}

impl Writer {
    fn at(tail: u64) -> Self {
        Self {
            tail,
            footer: Footer::default(),
            in_flight: 0,
            waiting: Vec::new(),
            unsynced: Vec::new(),
            syncing: Vec::new(),
            is_syncing: false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Shelf {
    pub(super) block: Superblock,
    pub(super) segments: Vec<Segment>,
    pub(super) open: Option<u32>,
    /// The one after it.
    pub(super) ready: Option<u32>,
    pub(super) opening: bool,
    pub(super) queue: VecDeque<Put>,
    /// Records to be read and written again.
    pub(super) relocate: VecDeque<(RecordKey, Location)>,
    /// Such a read is in flight.
    pub(super) relocation_reads: u32,
    /// Relocations from reading to durable.
    pub(super) relocations: u32,
    /// Bytes that wait or are being written.
    pub(super) load: u64,
    /// Bytes that it was ever given: among idle directories the one that got less is next.
    pub(super) taken_bytes: u64,
    pub(super) strikes: u32,
    pub(super) read_only: bool,
    pub(super) asked_for_room: bool,
}

impl Shelf {
    pub(super) fn new(block: Superblock, slots: u32) -> Self {
        let segment = || Segment {
            state: State::Absent,
            id: SegmentId([0; 16]),
            live: 0,
            live_bytes: 0,
            first_sequence: 0,
            readers: 0,
            relocating: 0,
            proved: true,
            spoiled: false,
            stays: false,
            writer: None,
        };
        Self {
            block,
            segments: (0..slots).map(|_| segment()).collect(),
            open: None,
            ready: None,
            opening: false,
            queue: VecDeque::new(),
            relocate: VecDeque::new(),
            relocation_reads: 0,
            relocations: 0,
            load: 0,
            taken_bytes: 0,
            strikes: 0,
            read_only: false,
            asked_for_room: false,
        }
    }

    /// The longest record, header and footer included, that a segment of its own holds, whatever its strings.
    pub(super) fn record_bytes_max(&self) -> u64 {
        let strings = 4 + crate::format::TENANT_BYTES_MAX + crate::format::FORMAT_BYTES_MAX;
        let around = SECTOR as u64 + footer_bytes(1, strings as u64);
        self.block.segment_bytes.saturating_sub(around).max(OVERHEAD)
    }

    pub(super) fn views(&self) -> impl Iterator<Item = SegmentView> + '_ {
        self.segments.iter().enumerate().map(|(slot, segment)| SegmentView {
            slot: slot as u32,
            state: segment.state,
            live: segment.live,
            live_bytes: segment.live_bytes,
            first_sequence: segment.first_sequence,
            readers: segment.readers,
        })
    }

    pub(super) fn view(&self) -> ShelfView {
        let count = |is: fn(&State) -> bool| self.segments.iter().filter(|one| is(&one.state)).count() as u32;
        let records: u64 = self.segments.iter().map(|segment| u64::from(segment.live)).sum();
        let payloads: u64 = self.segments.iter().map(|segment| segment.live_bytes).sum();
        ShelfView {
            capacity_bytes: self.segments.len() as u64 * self.block.segment_bytes,
            used_bytes: payloads + records * OVERHEAD,
            records,
            segments: count(|state| !matches!(state, State::Absent | State::NoSpace)),
            retired: count(|state| *state == State::Retired),
            is_read_only: self.read_only,
        }
    }

    /// A segment for a new life: files that are there first.
    pub(super) fn vacant(&self) -> Option<u32> {
        let with = |state| self.segments.iter().position(|segment| segment.state == state);
        with(State::Free).or_else(|| with(State::Absent)).map(|slot| slot as u32)
    }

    /// Whether something is under way after which a segment may be free, or can be evicted.
    pub(super) fn is_moving(&self) -> bool {
        use State::{Draining, Open, Opening, Ready, Sealing};
        let moving = |state| matches!(state, Opening | Ready | Open | Sealing | Draining);
        self.segments.iter().any(|segment| moving(segment.state))
    }
}

impl Store {
    fn at(&mut self, shelf: usize, slot: u32) -> &mut Segment {
        &mut self.shelves[shelf].segments[slot as usize]
    }

    /// Begins a new life of a segment.
    pub(super) fn open_next(&mut self, shelf: usize) -> bool {
        let Some(slot) = self.shelves[shelf].vacant() else { return false };
        self.shelves[shelf].opening = true;
        let was = std::mem::replace(&mut self.at(shelf, slot).state, State::Opening);
        if was == State::Absent {
            self.io(shelf, slot, What::Prepare, 0, Vec::new(), Pending::Prepare);
        } else {
            self.write_header(shelf, slot);
        }
        true
    }

    pub(super) fn prepared(&mut self, shelf: usize, slot: u32, result: Result<(), IoError>) {
        match result {
            Ok(()) => self.write_header(shelf, slot),
            Err(error) if error.is_no_space() => {
                // The capacity that was configured is not there: make do with the files that are.
                self.shelves[shelf].opening = false;
                for segment in &mut self.shelves[shelf].segments {
                    if segment.state == State::Absent {
                        segment.state = State::NoSpace;
                    }
                }
                self.at(shelf, slot).state = State::NoSpace;
            }
            Err(error) => self.retire(shelf, slot, error),
        }
    }

    fn write_header(&mut self, shelf: usize, slot: u32) {
        let id = SegmentId((self.random)());
        let (block, first_sequence) = (self.shelves[shelf].block, self.next_sequence);
        let segment = self.at(shelf, slot);
        (segment.id, segment.first_sequence, segment.proved) = (id, first_sequence, true);
        let header = SegmentHeader {
            directory: block.directory,
            segment: id,
            slot,
            segment_bytes: block.segment_bytes,
            first_sequence,
        };
        let mut sector = Aligned::zeroed(SECTOR);
        header.encode(sector.bytes_mut());
        self.io(shelf, slot, What::Write, 0, vec![Part::Owned(sector)], Pending::Header);
    }

    pub(super) fn header_written(&mut self, shelf: usize, slot: u32, result: Result<(), IoError>) {
        match result {
            // Before the first record: the footer of the earlier life must never be believed again.
            Ok(()) => self.sync(shelf, slot, SyncFor::Open),
            Err(error) => self.retire(shelf, slot, error),
        }
    }

    fn sync(&mut self, shelf: usize, slot: u32, why: SyncFor) {
        let mut acks = Vec::new();
        if let Some(writer) = self.at(shelf, slot).writer.as_mut() {
            acks = std::mem::take(&mut writer.waiting);
            writer.syncing = std::mem::take(&mut writer.unsynced);
            writer.is_syncing = true;
        }
        self.io(shelf, slot, What::Sync, 0, Vec::new(), Pending::Sync { why, acks });
    }

    pub(super) fn synced(
        &mut self,
        shelf: usize,
        slot: u32,
        why: SyncFor,
        acks: Vec<Ack>,
        result: Result<(), IoError>,
    ) {
        if let Err(error) = result {
            self.fail_acks(&acks, error);
            self.drop_unsynced(shelf, slot);
            self.retire(shelf, slot, error);
            return;
        }
        for ack in acks {
            self.acked(ack);
        }
        if let Some(writer) = self.at(shelf, slot).writer.as_mut() {
            writer.is_syncing = false;
            writer.syncing.clear();
        }
        match why {
            SyncFor::Open => self.opened(shelf, slot),
            SyncFor::Acks => self.settle(shelf, slot),
            SyncFor::Seal => self.write_footer(shelf, slot),
            SyncFor::Sealed => {
                let segment = self.at(shelf, slot);
                // Who came while the footer was synced: the records were synced before it.
                let waiting = segment.writer.take().map(|writer| writer.waiting).unwrap_or_default();
                segment.state = if segment.spoiled { State::Retired } else { State::Sealed };
                self.index.shrink(shelf, slot);
                waiting.into_iter().for_each(|ack| self.acked(ack));
            }
        }
    }

    /// A sync came after the record was written.
    fn acked(&mut self, ack: Ack) {
        self.acks -= usize::from(ack.place.is_none());
        match ack.owner {
            Owner::Caller(token) => {
                if let Some(location) = ack.place {
                    self.place(ack.key, location);
                }
                self.no_longer_written(&ack.key, token);
                self.actions.push_back(Action::Stored { token, key: ack.key, durable: true });
            }
            Owner::Relocation(from) => {
                // It may have been removed, or found corrupt, while it was copied.
                let still = self.index.get(&ack.key) == Some(from);
                if let Some(location) = ack.place.filter(|_| still) {
                    self.place(ack.key, location);
                }
                self.relocated(from);
            }
        }
    }

    fn opened(&mut self, shelf: usize, slot: u32) {
        if self.at(shelf, slot).state != State::Opening {
            return;
        }
        self.at(shelf, slot).state = State::Ready;
        self.shelves[shelf].opening = false;
        self.shelves[shelf].ready = Some(slot);
        if self.shelves[shelf].open.is_none() {
            self.turn(shelf);
        }
    }

    /// The open segment takes no more: the next one does, if it is there already.
    fn turn(&mut self, shelf: usize) {
        let next = self.shelves[shelf].ready.take();
        self.shelves[shelf].open = next;
        if let Some(slot) = next {
            let segment = self.at(shelf, slot);
            segment.state = State::Open;
            segment.writer = Some(Box::new(Writer::at(SECTOR as u64)));
        }
    }

    /// Ends a life that recovery read record by record, because a crash had left it open: with a footer the next
    /// start need not read it again, however often there is a crash. Not for one whose payloads were not read: its
    /// footer would vouch for what nobody looked at.
    pub fn seal_recovered(&mut self, shelf: usize, slot: u32, entries: &[Entry]) {
        let segment_bytes = self.shelves[shelf].block.segment_bytes;
        let Some(segment) = self.shelves[shelf].segments.get_mut(slot as usize) else { return };
        if segment.state != State::Sealed || !segment.proved || segment.writer.is_some() {
            return;
        }
        let mut footer = Footer::default();
        for entry in entries {
            if !footer.has_room() {
                return;
            }
            footer.push(entry.clone());
        }
        // One without records gets one, too: it need not be searched again.
        let end = entries.last().map_or(SECTOR as u64, Entry::end);
        // Its writer left room for it; a header that lies about its length must not be overwritten all the same.
        if end + footer.bytes() > segment_bytes {
            return;
        }
        segment.state = State::Sealing;
        segment.writer = Some(Box::new(Writer { footer, ..Writer::at(end) }));
        self.settle(shelf, slot);
    }

    /// Takes no more records; the footer follows when all writes have ended.
    pub(super) fn seal(&mut self, shelf: usize, slot: u32) {
        if self.shelves[shelf].open == Some(slot) {
            self.turn(shelf);
        }
        let segment = self.at(shelf, slot);
        if segment.state == State::Open {
            segment.state = State::Sealing;
            self.settle(shelf, slot);
        }
    }

    /// Seals what is open, and what is ready: before an orderly end, so that the next start needs no scan.
    pub fn close(&mut self) {
        for shelf in 0..self.shelves.len() {
            while let Some(slot) = self.shelves[shelf].open {
                self.seal(shelf, slot);
            }
        }
    }

    /// The next sync of a segment, if one is due.
    pub(super) fn settle(&mut self, shelf: usize, slot: u32) {
        let segment = self.at(shelf, slot);
        let sealing = segment.state == State::Sealing;
        let Some(writer) = segment.writer.as_ref().filter(|writer| !writer.is_syncing) else { return };
        if sealing && writer.in_flight == 0 {
            self.sync(shelf, slot, SyncFor::Seal);
        } else if !writer.waiting.is_empty() {
            self.sync(shelf, slot, SyncFor::Acks);
        }
    }

    fn write_footer(&mut self, shelf: usize, slot: u32) {
        let segment_bytes = self.shelves[shelf].block.segment_bytes;
        let segment = self.at(shelf, slot);
        let id = segment.id;
        let Some(writer) = segment.writer.as_mut() else { return };
        // Nothing but the footer is written from here on.
        writer.is_syncing = true;
        writer.footer.entries.sort_by_key(|entry| entry.position);
        let mut buffer = Aligned::zeroed(writer.footer.bytes() as usize);
        writer.footer.encode(id, buffer.bytes_mut());
        let at = segment_bytes - buffer.len() as u64;
        self.io(shelf, slot, What::Write, at, vec![Part::Owned(buffer)], Pending::Footer);
    }

    pub(super) fn footer_written(&mut self, shelf: usize, slot: u32, result: Result<(), IoError>) {
        match result {
            Ok(()) => self.sync(shelf, slot, SyncFor::Sealed),
            Err(error) => self.retire(shelf, slot, error),
        }
    }

    /// Ends a segment's writing after an error: what waits fails, what is there stays readable.
    pub(super) fn retire(&mut self, shelf: usize, slot: u32, error: IoError) {
        let segment = self.at(shelf, slot);
        let was = std::mem::replace(&mut segment.state, State::Retired);
        // Without its writer nothing syncs what was written: a put of such a record writes it elsewhere.
        segment.proved = false;
        if let Some(writer) = segment.writer.take() {
            self.fail_acks(&writer.waiting, error);
        }
        if self.shelves[shelf].open == Some(slot) {
            self.turn(shelf);
        }
        if was == State::Opening {
            self.shelves[shelf].opening = false;
        }
        if was != State::Retired && !error.is_no_space() {
            self.strike(shelf);
        }
    }

    /// It could not be read: not to be written again.
    pub(super) fn spoil(&mut self, shelf: usize, slot: u32) {
        let segment = self.at(shelf, slot);
        match segment.state {
            State::Sealed => segment.state = State::Retired,
            State::Open | State::Sealing if !segment.spoiled => segment.spoiled = true,
            State::Draining if !segment.spoiled => segment.spoiled = true,
            _ => return,
        }
        self.seal(shelf, slot);
        self.strike(shelf);
    }

    fn strike(&mut self, shelf: usize) {
        self.shelves[shelf].strikes += 1;
        if self.shelves[shelf].strikes >= self.limits.strikes_max && !self.shelves[shelf].read_only {
            self.shelves[shelf].read_only = true;
            self.actions.push_back(Action::ReadOnly { shelf });
        }
    }

    fn fail_acks(&mut self, acks: &[Ack], error: IoError) {
        for ack in acks {
            self.acks -= usize::from(ack.place.is_none());
            self.failed(ack.owner, ack.key, PutError::Io(error));
        }
    }

    /// After a failed sync nobody knows what of the last writes is on the disk; not even a second sync tells.
    fn drop_unsynced(&mut self, shelf: usize, slot: u32) {
        let Some(writer) = self.at(shelf, slot).writer.as_mut() else { return };
        let mut doubtful = std::mem::take(&mut writer.syncing);
        doubtful.append(&mut writer.unsynced);
        for (key, position) in doubtful {
            if self.lies_at(&key, shelf, slot, position) {
                self.drop_record(key, DropReason::Unsynced);
            }
        }
    }
}
