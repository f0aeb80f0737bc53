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
    /// The first slot that has not been asked for: run, slot.
    pub(super) next: (usize, usize),
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
        let slots = runs.iter().flat_map(|run| &run.slots);
        let left = slots.filter(|slot| slot.here().is_none()).count();
        Self { session, request, runs, left, next: (0, 0), deadline_ns, lends: false }
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
                Slot::Abroad(..) => self.left -= 1,
            }
        }
        (pins, bytes)
    }
}

impl Core {
    /// Asks for what waiting leases still lack, the oldest first, as far as reading is bounded.
    pub(super) fn pump_waits(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        let ids: Vec<u64> = self.waits.keys().copied().collect();
        for id in ids {
            while let Some((run, slot, wanted)) = self.next_slot(id) {
                let (fetching, key) = match wanted {
                    Slot::Abroad(key, index) => (self.borrow(&key, index, (id, run, slot)), key),
                    Slot::There(key, _) => (self.fetch(&key, (id, run, slot), now_ns, actions), key),
                    Slot::Here(_) => continue,
                };
                match fetching {
                    // The next may lack what a neighbour has.
                    Fetching::Later => break,
                    Fetching::Here(record) => self.arrived((id, run, slot), &key, Some(record)),
                    Fetching::No => self.arrived((id, run, slot), &key, None),
                    Fetching::Coming => {}
                }
                if let Some(wait) = self.waits.get_mut(&id) {
                    wait.next = (run, slot + 1);
                }
            }
        }
    }

    /// The next place that nothing was asked for.
    fn next_slot(&mut self, id: u64) -> Option<(usize, usize, Slot)> {
        let wait = self.waits.get_mut(&id)?;
        loop {
            let (run, slot) = wait.next;
            match wait.runs.get(run)?.slots.get(slot) {
                Some(Slot::Here(_)) => wait.next = (run, slot + 1),
                Some(wanted) => return Some((run, slot, *wanted)),
                None => wait.next = (run + 1, 0),
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
        let room = self.limits.pinned_bytes_max.saturating_sub(self.store.pinned_bytes + self.wait_bytes);
        let found = record.and_then(|id| self.store.get(id));
        let free = found.filter(|record| !record.is_pinned() && !record.is_foreign());
        let fits = free.is_none_or(|record| record.bytes <= room);
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
                wait.runs[run].slots[slot] = Slot::Here(record);
                wait.left -= 1;
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

    /// Answers those that lack nothing any more.
    pub(super) fn grant_settled(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        self.grant_where(|wait| wait.left == 0, now_ns, actions);
    }

    /// Answers those that have waited long enough, with what is here. What is being read goes on: the next one who
    /// asks finds it.
    pub(super) fn grant_overdue(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        let late = self.waits.values().filter(|wait| wait.deadline_ns <= now_ns).count();
        self.counters.leases_cut_short += late as u64;
        self.grant_where(|wait| wait.deadline_ns <= now_ns, now_ns, actions);
    }

    fn grant_where(&mut self, which: impl Fn(&Wait) -> bool, now_ns: u64, actions: &mut Vec<Action>) {
        let ids: Vec<u64> = self.waits.iter().filter(|(_, wait)| which(wait)).map(|(id, _)| *id).collect();
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

    /// Cuts each run off at its first gap.
    pub(super) fn close_gaps(&mut self, wait: &mut Wait) {
        for run in 0..wait.runs.len() {
            if let Some(gap) = wait.runs[run].slots.iter().position(|slot| slot.here().is_none()) {
                self.cut_off(wait, run, gap);
            }
        }
    }

    /// Checks what must always hold; for tests.
    #[cfg(test)]
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
