//! Making room: a whole segment goes, what is hot in it is written again first.

use super::{DropReason, Location, Owner, Pending, Put, Source, State, Store};
use crate::{
    device::{IoError, Part, What},
    error::GetError,
    format::{Asked, OVERHEAD, RecordKey, SECTOR, padded},
    memory::Aligned,
};

impl Store {
    /// Empties a segment: the one named, or else one without live records, or else the oldest. Records that
    /// `keep` wants (it is told whether one was read since it was written) are written again, up to half of a segment's length; the others are dropped. The file's
    /// next life begins when that is durable and nobody reads it any more. `None`: there is nothing to evict.
    pub fn evict(
        &mut self,
        shelf: usize,
        slot: Option<u32>,
        mut keep: impl FnMut(&RecordKey, bool) -> bool,
    ) -> Option<u32> {
        self.shelves[shelf].asked_for_room = false;
        let sealed = |view: &super::SegmentView| {
            view.state == State::Sealed && slot.is_none_or(|slot| slot == view.slot)
        };
        let views = self.shelves[shelf].views().filter(sealed);
        let Some(victim) = views.min_by_key(|view| (view.live > 0, view.first_sequence)) else {
            // What waits for room ends.
            self.pump(shelf);
            return None;
        };
        let victim = victim.slot;
        self.shelves[shelf].segments[victim as usize].state = State::Draining;
        self.spares.retain(|_, spare| (usize::from(spare.shelf), spare.slot) != (shelf, victim));
        let mut room = self.shelves[shelf].block.segment_bytes / 2;
        let keys: Vec<RecordKey> = self.live_keys(shelf, victim).collect();
        for key in keys {
            let Some(location) = self.index.get(&key) else { continue };
            let bytes = padded(location.bytes) + OVERHEAD;
            let is_elsewhere = self.spares.contains_key(&key);
            if !is_elsewhere
                && bytes <= room
                && !self.shelves[shelf].read_only
                && keep(&key, self.index.was_read(&key))
            {
                room -= bytes;
                self.shelves[shelf].relocate.push_back((key, location));
                self.shelves[shelf].relocations += 1;
                self.shelves[shelf].segments[victim as usize].relocating += 1;
            } else {
                self.drop_record(key, DropReason::Evicted);
            }
        }
        self.free_if_drained(shelf, victim);
        self.pump(shelf);
        Some(victim)
    }

    /// One at a time: room is made in the background of loads, and its memory is bounded.
    pub(super) fn pump_relocations(&mut self, shelf: usize) {
        while self.shelves[shelf].relocation_reads == 0 {
            let Some((key, location)) = self.shelves[shelf].relocate.pop_front() else { return };
            if self.index.get(&key) != Some(location) {
                self.relocated(location);
                continue;
            }
            self.shelves[shelf].relocation_reads += 1;
            let asked = self.asked(key, location);
            let payload = Aligned::zeroed(location.bytes as usize);
            let parts = vec![Part::Owned(Aligned::zeroed(SECTOR)), Part::Owned(payload)];
            let pending = Pending::Relocate { location, asked };
            self.io(shelf, location.slot, What::Read, location.position, parts, pending);
        }
    }

    pub(super) fn relocation_read(
        &mut self,
        from: Location,
        asked: &Asked,
        result: Result<(), IoError>,
        mut parts: Vec<Part>,
    ) {
        let shelf = usize::from(from.shelf);
        self.shelves[shelf].relocation_reads -= 1;
        let header = match result {
            Err(error) => Err(GetError::Io(error)),
            Ok(()) => Self::header_of(asked, &parts).map_err(GetError::Corrupt),
        };
        match (header, parts.pop()) {
            (Ok(header), Some(Part::Owned(payload))) => {
                self.shelves[shelf].load += header.meta.footprint();
                // Durable: the old copy may be one that was acknowledged as such.
                let put = Put {
                    owner: Owner::Relocation(from),
                    meta: header.meta,
                    source: Source::Owned(payload),
                    durable: true,
                };
                self.shelves[shelf].queue.push_front(put);
            }
            (header, _) => {
                if let Err(error) = header {
                    // Too many open files say nothing about the record.
                    let shortage = matches!(error, GetError::Io(error) if error.is_no_space());
                    self.shelves[shelf].segments[from.slot as usize].stays |= shortage;
                    self.bad_read(shelf, from.slot, asked, error);
                }
                self.relocated(from);
            }
        }
    }

    /// A relocation ended, well or not.
    pub(super) fn relocated(&mut self, from: Location) {
        let shelf = usize::from(from.shelf);
        self.shelves[shelf].relocations -= 1;
        self.segment(from).relocating -= 1;
        self.free_if_drained(shelf, from.slot);
    }

    /// The end of a life. Records that are still here could not be written elsewhere: after an error the segment
    /// is as it was, without room for them they go.
    pub(super) fn free_if_drained(&mut self, shelf: usize, slot: u32) {
        let segment = &self.shelves[shelf].segments[slot as usize];
        if segment.state != State::Draining || segment.relocating > 0 {
            return;
        }
        let left: Vec<RecordKey> = self.live_keys(shelf, slot).collect();
        let segment = &mut self.shelves[shelf].segments[slot as usize];
        if std::mem::take(&mut segment.stays) && !left.is_empty() {
            segment.state = if segment.spoiled { State::Retired } else { State::Sealed };
            return;
        }
        for key in left {
            self.drop_record(key, DropReason::Evicted);
        }
        let segment = &mut self.shelves[shelf].segments[slot as usize];
        if segment.readers > 0 {
            return;
        }
        segment.state = if segment.spoiled { State::Retired } else { State::Free };
        self.index.clear(shelf, slot);
    }
}
