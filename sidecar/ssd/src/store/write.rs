//! Writing: whole records gathered into large writes.

use super::{Ack, Action, Owner, Pending, Put, Source, Store};
use crate::{
    device::{IoError, Part, What},
    error::PutError,
    format::{Entry, RecordKey, SECTOR},
    memory::{Aligned, Memory},
    store::{Location, State},
};

impl Store {
    /// Whatever a directory can do now: read what moves, open a segment, write what waits.
    pub(super) fn pump(&mut self, shelf: usize) {
        self.pump_relocations(shelf);
        loop {
            let place = &self.shelves[shelf];
            if place.queue.is_empty() {
                return;
            }
            if place.read_only {
                self.fail_queue(shelf, PutError::ReadOnly);
                return;
            }
            if place.opening && place.open.is_none() {
                return;
            }
            // Making room goes before using it.
            let moving = place.queue.front().is_some_and(|put| matches!(put.owner, Owner::Relocation(_)));
            if place.relocations > 0 && !moving {
                return;
            }
            match place.open {
                None => {
                    if !self.make_place(shelf, moving) {
                        return;
                    }
                }
                Some(slot) => {
                    if !self.write_batch(shelf, slot) {
                        return;
                    }
                }
            }
        }
    }

    /// Opens a segment. Whether the queue can be looked at again at once.
    fn make_place(&mut self, shelf: usize, moving: bool) -> bool {
        if self.open_next(shelf) {
            self.want_room(shelf);
            return false;
        }
        if moving {
            // The room that it was to make is the room that it needs.
            if let Some(Put { owner: Owner::Relocation(from), meta, .. }) =
                self.shelves[shelf].queue.pop_front()
            {
                self.shelves[shelf].load -= meta.footprint();
                self.relocated(from);
            }
            return true;
        }
        self.want_room(shelf);
        if !self.shelves[shelf].asked_for_room && !self.shelves[shelf].is_moving() {
            self.fail_queue(shelf, PutError::NoRoom);
        }
        false
    }

    /// Asks for an eviction if nothing is vacant and something could be evicted.
    pub(super) fn want_room(&mut self, shelf: usize) {
        let place = &mut self.shelves[shelf];
        let sealed = place.segments.iter().any(|segment| segment.state == State::Sealed);
        let draining = place.segments.iter().any(|segment| segment.state == State::Draining);
        if place.vacant().is_none() && sealed && !draining && !place.asked_for_room {
            place.asked_for_room = true;
            self.actions.push_back(Action::WantsRoom { shelf });
        }
    }

    /// Writes what fits into one write. Whether there may be more to do.
    fn write_batch(&mut self, shelf: usize, slot: u32) -> bool {
        let (batches_max, batch_bytes) = (self.limits.batches_max, self.limits.batch_bytes);
        let place = &mut self.shelves[shelf];
        let segment_bytes = place.block.segment_bytes;
        let segment = &mut place.segments[slot as usize];
        let id = segment.id;
        let Some(writer) = segment.writer.as_mut() else { return false };
        if writer.in_flight >= batches_max {
            return false;
        }
        let (at, mut puts) = (writer.tail, Vec::new());
        while let Some(next) = place.queue.front() {
            let end = writer.tail + next.meta.footprint();
            let fits =
                end + writer.footer.bytes_with(&next.meta) <= segment_bytes && writer.footer.has_room();
            let moving = matches!(next.owner, Owner::Relocation(_));
            if !fits || writer.tail - at >= batch_bytes || (place.relocations > 0 && !moving) {
                break;
            }
            let Some(put) = place.queue.pop_front() else { break };
            let sequence = self.next_sequence;
            self.next_sequence += 1;
            let entry = Entry { meta: put.meta.clone(), segment: id, sequence, position: writer.tail };
            writer.tail = end;
            writer.footer.push(entry.clone());
            puts.push((put, entry));
        }
        if puts.is_empty() {
            // It does not fit, however little is in flight.
            self.seal(shelf, slot);
            return true;
        }
        writer.in_flight += 1;
        let is_half_full = writer.tail >= segment_bytes / 2;
        let parts = gather(&self.memory, &mut puts);
        self.io(shelf, slot, What::Write, at, parts, Pending::Batch(puts));
        if is_half_full {
            self.open_ahead(shelf);
        }
        true
    }

    /// Opens the segment after the open one, or asks for room for it.
    fn open_ahead(&mut self, shelf: usize) {
        let place = &self.shelves[shelf];
        let has_many = place.segments.len() >= self.limits.ahead_segments_min as usize;
        if has_many && !place.opening && place.ready.is_none() {
            self.open_next(shelf);
            self.want_room(shelf);
        }
    }

    pub(super) fn batch_ended(
        &mut self,
        shelf: usize,
        slot: u32,
        puts: Vec<(Put, Entry)>,
        result: Result<(), IoError>,
    ) {
        let there = &mut self.shelves[shelf];
        there.load -= puts.iter().map(|(put, _)| put.meta.footprint()).sum::<u64>();
        let writer = there.segments[slot as usize].writer.as_mut();
        let alive = writer.map(|writer| writer.in_flight -= 1).is_some();
        let result = if alive { result } else { result.and(Err(IoError::Os(5))) };
        for (put, entry) in puts {
            match result {
                Ok(()) => self.record_written(shelf, slot, &put, &entry),
                Err(error) => self.failed(put.owner, put.meta.key, PutError::Io(error)),
            }
        }
        match result {
            Ok(()) => self.settle(shelf, slot),
            Err(error) => self.retire(shelf, slot, error),
        }
    }

    fn record_written(&mut self, shelf: usize, slot: u32, put: &Put, entry: &Entry) {
        let key = put.meta.key;
        let location = Location {
            shelf: shelf as u16,
            slot,
            position: entry.position,
            bytes: put.meta.bytes,
            sequence: entry.sequence,
        };
        let waits = match put.owner {
            Owner::Caller(_) => {
                self.counters.stored += 1;
                // What is there is a copy that nobody vouches for, and it may be a durable one: it counts until
                // this one is durable for certain.
                self.index.contains(&key)
            }
            // The old copy counts, and its segment is not written again, until this one is durable.
            Owner::Relocation(_) => {
                self.counters.relocated += 1;
                true
            }
        };
        if !waits {
            self.place(key, location);
            if let Owner::Caller(token) = put.owner {
                self.no_longer_written(&key, token);
            }
        }
        let Some(writer) = self.shelves[shelf].segments[slot as usize].writer.as_mut() else { return };
        if !waits {
            writer.unsynced.push((key, entry.position));
        }
        match put.owner {
            Owner::Caller(token) if !put.durable && !waits => {
                self.actions.push_back(Action::Stored { token, key, durable: false });
            }
            owner => {
                // One that waits with its place is still one that is being written.
                self.acks += usize::from(!waits);
                writer.waiting.push(Ack { owner, key, place: waits.then_some(location) });
            }
        }
    }

    pub(super) fn no_longer_written(&mut self, key: &RecordKey, token: u64) {
        if self.writing.get(key) == Some(&token) {
            self.writing.remove(key);
        }
    }

    /// The one bad ending of a put.
    pub(super) fn failed(&mut self, owner: Owner, key: RecordKey, error: PutError) {
        match owner {
            Owner::Caller(token) => {
                self.no_longer_written(&key, token);
                self.actions.push_back(Action::StoreFailed { token, key, error });
            }
            Owner::Relocation(from) => {
                // After an error, room is no reason to lose what is still whole where it was.
                self.shelves[usize::from(from.shelf)].segments[from.slot as usize].stays |=
                    error != PutError::NoRoom;
                self.relocated(from);
            }
        }
    }

    fn fail_queue(&mut self, shelf: usize, error: PutError) {
        while let Some(put) = self.shelves[shelf].queue.pop_front() {
            self.shelves[shelf].load -= put.meta.footprint();
            self.failed(put.owner, put.meta.key, error);
        }
    }
}

/// Header, payload, commit. What lies between two payloads is one buffer: the end of the one that fills no sector,
/// its commit, the next header.
fn gather(memory: &Memory, puts: &mut [(Put, Entry)]) -> Vec<Part> {
    let mut parts = Vec::with_capacity(2 * puts.len() + 1);
    let mut between = Between::default();
    for (put, entry) in puts.iter_mut() {
        let sum = between.sector(|sector| entry.encode(sector));
        parts.push(Part::Owned(between.take()));
        match std::mem::replace(&mut put.source, Source::Owned(Aligned::zeroed(0))) {
            Source::Pool(extent) => {
                let whole = extent.whole();
                parts.extend((whole.bytes > 0).then_some(Part::Pool(whole)));
                // Checked when the put was taken.
                if let Some(tail) = memory.tail(extent).filter(|tail| !tail.is_empty()) {
                    between.sector(|sector| sector.copy_from_slice(tail.bytes()));
                }
            }
            Source::Owned(payload) => parts.push(Part::Owned(payload)),
        }
        between.sector(|sector| entry.commit(sum).encode(sector));
    }
    parts.push(Part::Owned(between.take()));
    parts
}

/// At most three sectors in a row.
#[derive(Default)]
struct Between(Option<(Aligned, usize)>);

impl Between {
    fn sector<R>(&mut self, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let (buffer, count) = self.0.get_or_insert_with(|| (Aligned::zeroed(3 * SECTOR), 0));
        let at = *count * SECTOR;
        *count += 1;
        fill(&mut buffer.bytes_mut()[at..at + SECTOR])
    }

    fn take(&mut self) -> Aligned {
        let (mut buffer, count) = self.0.take().unwrap_or_else(|| (Aligned::zeroed(0), 0));
        buffer.truncate(count * SECTOR);
        buffer
    }
}
