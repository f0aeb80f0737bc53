//! Lease requests that wait for the SSD or a neighbour: what they lack, what comes, and when they are answered anyway.

use pillion_shm::presence::IndexKey;

use super::{Core, neighbours::nothing_lent, ssd::Fetching};
use crate::{
    event::Action,
    ids::{LeaseId, NamespaceId, SessionId},
    key::BlockKey,
    store::RecordId,
};

/// A request for a lease that is not answered yet.
#[derive(Debug)]
pub(super) struct Wait {
    pub(super) session: SessionId,
    pub(super) request: u64,
    pub(super) runs: Vec<Run>,
    /// Slots that are not here.
    pub(super) left: usize,
    /// Those of them that may be at a neighbour.
    pub(super) abroad: usize,
    /// Where the last of its reads stands among all reads.
    pub(super) end: u64,
    pub(super) deadline_ns: u64,
    /// Of a neighbour: each of its keys is a run of its own.
    pub(super) lends: bool,
}

/// A run of blocks, up to the first that is nowhere.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) space: NamespaceId,
    pub(super) slots: Vec<Slot>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Slot {
    /// In the pool, pinned by the wait.
    Here(RecordId),
    /// On the SSD, of so many bytes.
    There(BlockKey, u64),
    /// Perhaps at a neighbour, whose table has it under this key.
    Abroad(BlockKey, IndexKey),
}

impl Wait {
    /// With runs whose records in the pool are pinned.
    pub(super) fn new(session: SessionId, request: u64, runs: Vec<Run>, deadline_ns: u64) -> Self {
        let slots = || runs.iter().flat_map(|run| &run.slots);
        let left = slots().filter(|slot| slot.here().is_none()).count();
        let abroad = slots().filter(|slot| matches!(slot, Slot::Abroad(..))).count();
        Self { session, request, runs, left, abroad, end: 0, deadline_ns, lends: false }
    }

    /// The answer that nothing was granted.
    pub(super) fn refusal(&self) -> Action {
        let Self { session, request, .. } = *self;
        if self.lends {
            return nothing_lent(session, request, self.runs.len());
        }
        Action::Leased { session, request, lease: LeaseId([0; 16]), blocks: vec![0; self.runs.len()] }
    }

    /// Cuts a run off before a slot: the pins to be undone, and the bytes that are not wanted any more.
    fn cut(&mut self, run: usize, slot: usize) -> (Vec<RecordId>, u64) {
        let (mut pins, mut bytes) = (Vec::new(), 0);
        for gone in self.runs[run].slots.drain(slot..) {
            match gone {
                Slot::Here(record) => pins.push(record),
                Slot::There(_, length) => {
                    self.left -= 1;
                    bytes += length;
                }
                Slot::Abroad(..) => {
                    self.left -= 1;
                    self.abroad -= 1;
                }
            }
        }
        (pins, bytes)
    }
}

impl Core {
    /// Asks for what a waiting lease lacks.
    pub(super) fn ask_for_all(&mut self, id: u64, actions: &mut Vec<Action>) {
        let Some(wait) = self.waits.get(&id) else { return };
        let places = wait.runs.iter().enumerate();
        let places = places.flat_map(|(run, of)| (0..of.slots.len()).map(move |slot| (run, slot)));
        for (run, slot) in places.collect::<Vec<_>>() {
            // What is nowhere ends its run.
            let wanted = self.waits.get(&id).and_then(|wait| wait.runs[run].slots.get(slot)).copied();
            let (fetching, key) = match wanted {
                Some(Slot::Abroad(key, index)) => (self.borrow(&key, index, (id, run, slot)), key),
                Some(Slot::There(key, _)) => (self.fetch(&key, (id, run, slot), actions), key),
                Some(Slot::Here(_)) | None => continue,
            };
            match fetching {
                Fetching::Here(record) => self.arrived((id, run, slot), &key, Some(record)),
                Fetching::No => self.arrived((id, run, slot), &key, None),
                Fetching::Coming => {
                    let fetch = self.ssd.as_ref().and_then(|ssd| ssd.fetches.get(&key));
                    let end = fetch.map_or(0, |fetch| fetch.end);
                    if let Some(wait) = self.waits.get_mut(&id) {
                        wait.end = wait.end.max(end);
                    }
                }
            }
        }
    }

    /// A record that somebody waits for is here, or will not come.
    pub(super) fn arrived(
        &mut self,
        (id, run, slot): (u64, usize, usize),
        key: &BlockKey,
        record: Option<RecordId>,
    ) {
        let planned = self.store.pinned_bytes + self.wait_bytes;
        let own = record.and_then(|id| self.store.get(id)).filter(|record| !record.is_foreign());
        // One that is pinned may be so by a write to the SSD only, which ends before the lease does.
        let more = own.map(|record| if record.is_pinned() { 0 } else { record.bytes });
        let fits = more.is_none_or(|more| planned + more <= self.limits.pinned_bytes_max);
        // Its wait may have been answered, or have given up this part of its run.
        let Some(wait) = self.waits.get_mut(&id) else { return };
        let (wanted, bytes, fits) = match wait.runs[run].slots.get(slot) {
            Some(Slot::There(wanted, bytes)) => (*wanted, *bytes, true),
            // One that has come to be here was not counted among what may be pinned (I8).
            Some(Slot::Abroad(wanted, _)) => (*wanted, 0, fits),
            Some(Slot::Here(_)) | None => return,
        };
        debug_assert_eq!(wanted, *key);
        match record.filter(|_| fits) {
            Some(record) => {
                let was = std::mem::replace(&mut wait.runs[run].slots[slot], Slot::Here(record));
                wait.left -= 1;
                wait.abroad -= usize::from(matches!(was, Slot::Abroad(..)));
                self.wait_bytes -= bytes;
                self.store.pin(record);
            }
            None => {
                let (pins, bytes) = wait.cut(run, slot);
                self.wait_bytes -= bytes;
                self.unpin_all(&pins);
            }
        }
    }

    fn unpin_all(&mut self, pins: &[RecordId]) {
        for record in pins.iter().rev() {
            self.store.unpin(*record);
        }
    }

    /// Answers those that lack nothing any more, or nothing that the SSD will not have brought in time.
    pub(super) fn grant_settled(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        let settled: Vec<u64> =
            self.waits.iter().filter(|(_, wait)| self.is_settled(wait, now_ns)).map(|(id, _)| *id).collect();
        self.grant_all(settled, now_ns, actions);
    }

    fn is_settled(&self, wait: &Wait, now_ns: u64) -> bool {
        let coming = || self.ssd.as_ref().is_some_and(|ssd| ssd.will_bring(wait.end, now_ns));
        // A neighbour could do nothing with what is not here.
        wait.left == 0 || (wait.abroad == 0 && !wait.lends && coming())
    }

    /// Answers those that have waited long enough, with what is here. What is being read goes on: the next one who
    /// asks finds it.
    pub(super) fn grant_overdue(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        let late = self.waits.iter().filter(|(_, wait)| wait.deadline_ns <= now_ns);
        let late: Vec<u64> = late.map(|(id, _)| *id).collect();
        self.counters.leases_cut_short += late.len() as u64;
        self.grant_all(late, now_ns, actions);
    }

    fn grant_all(&mut self, ids: Vec<u64>, now_ns: u64, actions: &mut Vec<Action>) {
        for id in ids {
            if let Some(wait) = self.waits.remove(&id) {
                self.grant(wait, now_ns, actions);
            }
        }
    }

    /// The process is about to end: nobody is to wait for it.
    pub(super) fn refuse_waits(&mut self, actions: &mut Vec<Action>) {
        for wait in std::mem::take(&mut self.waits).into_values() {
            self.counters.leases_refused += 1;
            actions.push(wait.refusal());
            self.drop_wait(wait);
        }
    }

    /// Nobody is left to answer to.
    pub(super) fn forget_waits(&mut self, session: SessionId) {
        let ids: Vec<u64> =
            self.waits.iter().filter(|(_, wait)| wait.session == session).map(|(id, _)| *id).collect();
        for id in ids {
            if let Some(wait) = self.waits.remove(&id) {
                self.drop_wait(wait);
            }
        }
    }

    fn drop_wait(&mut self, mut wait: Wait) {
        for run in 0..wait.runs.len() {
            self.cut_off(&mut wait, run, 0);
        }
    }

    fn cut_off(&mut self, wait: &mut Wait, run: usize, slot: usize) {
        let (pins, bytes) = wait.cut(run, slot);
        self.wait_bytes -= bytes;
        self.unpin_all(&pins);
    }

    /// Cuts each run off at the first slot that is not here and will not come in time, and pins what will. How
    /// much that is.
    pub(super) fn close_gaps(&mut self, wait: &mut Wait, now_ns: u64) -> usize {
        let mut ahead = 0;
        for run in 0..wait.runs.len() {
            for slot in 0..wait.runs[run].slots.len() {
                let coming = match wait.runs[run].slots[slot] {
                    Slot::Here(_) => continue,
                    Slot::There(key, bytes) if !wait.lends => self.coming(&key, now_ns).zip(Some(bytes)),
                    Slot::There(..) | Slot::Abroad(..) => None,
                };
                let Some((record, bytes)) = coming else {
                    self.cut_off(wait, run, slot);
                    break;
                };
                wait.runs[run].slots[slot] = Slot::Here(record);
                wait.left -= 1;
                self.wait_bytes -= bytes;
                self.store.pin(record);
                ahead += 1;
            }
        }
        ahead
    }

    /// The place of a record that the SSD will have brought in time.
    fn coming(&self, key: &BlockKey, now_ns: u64) -> Option<RecordId> {
        let ssd = self.ssd.as_ref()?;
        let fetch = ssd.fetches.get(key)?;
        ssd.will_bring(fetch.end, now_ns).then_some(fetch.record)
    }

    /// Whether a waiting lease still lacks a record.
    pub(super) fn waits_for(&self, (id, run, slot): (u64, usize, usize), key: &BlockKey) -> bool {
        let run = self.waits.get(&id).and_then(|wait| wait.runs.get(run));
        run.is_some_and(|run| matches!(run.slots.get(slot), Some(Slot::There(lacking, _)) if lacking == key))
    }

    /// Checks what must always hold; for tests.
    #[cfg(any(test, feature = "checked"))]
    pub(super) fn check_waits(&self) {
        let mut bytes = 0;
        for wait in self.waits.values() {
            let slots = || wait.runs.iter().flat_map(|run| &run.slots);
            let left = slots().filter(|slot| slot.here().is_none()).count();
            assert_eq!(left, wait.left);
            assert!(left > 0, "settled and not answered");
            for slot in slots() {
                if let Slot::There(_, length) = slot {
                    bytes += length;
                }
            }
        }
        assert_eq!(bytes, self.wait_bytes);
    }
}

impl Slot {
    pub(super) fn here(&self) -> Option<RecordId> {
        match self {
            Self::Here(record) => Some(*record),
            Self::There(..) | Self::Abroad(..) => None,
        }
    }
}
