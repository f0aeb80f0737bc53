//! Leases: what is granted at once, and what waits for the SSD.

use std::sync::Arc;

use super::{Core, MAX_BLOCKS};
use crate::{
    core::ssd::Fetching,
    event::Action,
    ids::{LeaseId, NamespaceId, SessionId},
    key::BlockKey,
    lease::Lease,
    store::{RecordId, State},
};

/// A request for a lease that is not answered yet.
#[derive(Debug)]
pub(crate) struct Wait {
    session: SessionId,
    request: u64,
    runs: Vec<Run>,
    /// Slots that are not here.
    left: usize,
    /// The first slot that has not been asked for: run, slot.
    next: (usize, usize),
    deadline_ns: u64,
}

#[derive(Debug)]
struct Run {
    space: NamespaceId,
    slots: Vec<Slot>,
}

#[derive(Debug, Clone, Copy)]
enum Slot {
    /// In the pool, pinned by the wait.
    Here(RecordId),
    /// On the SSD, of so many bytes.
    There(BlockKey, u64),
}

impl Wait {
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
            }
        }
        (pins, bytes)
    }
}

impl Core {
    pub(super) fn lease(
        &mut self,
        id: SessionId,
        request: u64,
        space: NamespaceId,
        hashes: &[[u8; 32]],
        now_ns: u64,
        actions: &mut Vec<Action>,
    ) {
        let none = Action::Leased { session: id, request, lease: LeaseId([0; 16]), blocks: 0 };
        let Some(session) = self.sessions.get(&id) else { return };
        let known = self.spaces.get(&space).is_some_and(|space| space.tenant == session.tenant.name);
        if !known || hashes.len() > MAX_BLOCKS {
            actions.push(none);
            let text =
                "expected a lease over at most 65536 blocks of a namespace that this session's tenant opened";
            return self.protocol_error(id, text.to_owned(), actions);
        }
        self.counters.lease_blocks_asked += hashes.len() as u64;
        if self.draining || self.leases.len() + self.waits.len() >= self.limits.leases_max {
            self.counters.leases_refused += 1;
            return actions.push(none);
        }
        let mut slots = Vec::new();
        let mut planned = self.store.pinned_bytes + self.wait_bytes;
        for hash in hashes {
            let key = BlockKey::new(&session.tenant.key, space, 0, hash);
            let Some((slot, bytes)) = self.look(&key) else { break };
            planned += bytes;
            if planned > self.limits.pinned_bytes_max {
                break;
            }
            slots.push(slot);
        }
        let left = slots.iter().filter(|slot| matches!(slot, Slot::There(..))).count();
        for slot in &slots {
            match slot {
                Slot::Here(record) => self.store.pin(*record),
                Slot::There(_, bytes) => self.wait_bytes += bytes,
            }
        }
        let deadline_ns = now_ns + self.ssd.as_ref().map_or(0, |ssd| ssd.limits.wait_ns);
        let runs = vec![Run { space, slots }];
        let wait = Wait { session: id, request, runs, left, next: (0, 0), deadline_ns };
        if left == 0 {
            return self.grant(wait, now_ns, actions);
        }
        self.counters.leases_waited += 1;
        self.wait_count += 1;
        self.waits.insert(self.wait_count, wait);
        self.pump_waits(actions);
        self.grant_settled(now_ns, actions);
    }

    /// Where a block is, and its length.
    fn look(&self, key: &BlockKey) -> Option<(Slot, u64)> {
        let here = self.store.find(key).and_then(|id| Some((id, self.store.get(id)?)));
        match here {
            Some((id, record)) if record.state == State::Published => Some((Slot::Here(id), record.bytes)),
            _ => {
                let found = self.ssd.as_ref()?.find(key)?;
                Some((Slot::There(*key, found.bytes), found.bytes))
            }
        }
    }

    /// Asks for what waiting leases still lack, the oldest first, as far as reading is bounded.
    pub(super) fn pump_waits(&mut self, actions: &mut Vec<Action>) {
        let ids: Vec<u64> = self.waits.keys().copied().collect();
        for id in ids {
            while let Some((run, slot, key)) = self.next_slot(id) {
                match self.fetch(&key, (id, run, slot), actions) {
                    Fetching::Later => return,
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
    fn next_slot(&mut self, id: u64) -> Option<(usize, usize, BlockKey)> {
        let wait = self.waits.get_mut(&id)?;
        loop {
            let (run, slot) = wait.next;
            match wait.runs.get(run)?.slots.get(slot) {
                Some(Slot::There(key, _)) => return Some((run, slot, *key)),
                Some(Slot::Here(_)) => wait.next = (run, slot + 1),
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
        // Its wait may have been answered, or have given up this part of its run.
        let Some(wait) = self.waits.get_mut(&id) else { return };
        let Some(Slot::There(wanted, bytes)) = wait.runs[run].slots.get(slot).copied() else { return };
        debug_assert_eq!(wanted, *key);
        match record {
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
            let Wait { session, request, .. } = wait;
            self.drop_wait(wait);
            self.counters.leases_refused += 1;
            actions.push(Action::Leased { session, request, lease: LeaseId([0; 16]), blocks: 0 });
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
            let (pins, bytes) = wait.cut(run, 0);
            self.wait_bytes -= bytes;
            self.unpin_all(&pins);
        }
    }

    /// The answer: of each run what is here without a gap. Its time begins now.
    fn grant(&mut self, mut wait: Wait, now_ns: u64, actions: &mut Vec<Action>) {
        for run in 0..wait.runs.len() {
            let gap = wait.runs[run].slots.iter().position(|slot| matches!(slot, Slot::There(..)));
            if let Some(gap) = gap {
                let (pins, bytes) = wait.cut(run, gap);
                self.wait_bytes -= bytes;
                self.unpin_all(&pins);
            }
        }
        let Wait { session: id, request, runs, .. } = wait;
        let Some(session) = self.sessions.get(&id) else { return };
        let Some(Run { space, slots }) = runs.into_iter().next() else { return };
        let records: Vec<RecordId> = slots.iter().filter_map(|slot| slot.here()).collect();
        if records.is_empty() {
            self.counters.leases_empty += 1;
            return actions.push(Action::Leased { session: id, request, lease: LeaseId([0; 16]), blocks: 0 });
        }
        // Children first: a parent must never be older than its child.
        for record in records.iter().rev() {
            self.store.touch(*record);
        }
        let blocks = records.len() as u32;
        self.counters.lease_blocks_hit += u64::from(blocks);
        self.counters.leases_granted += 1;
        let lease = Lease {
            session: id,
            engine: Arc::clone(&session.engine),
            uid: session.uid,
            tenant: Arc::clone(&session.tenant.name),
            space,
            records,
            expires_ns: now_ns + self.limits.lease_ns,
            jobs: 0,
            released: false,
        };
        self.lease_count += 1;
        let hash = blake3::keyed_hash(&self.limits.lease_seed, &self.lease_count.to_le_bytes());
        let lease_id = LeaseId(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"));
        // The wait's pins become the lease's.
        self.leases.grant(lease_id, lease);
        actions.push(Action::Leased { session: id, request, lease: lease_id, blocks });
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
    fn here(&self) -> Option<RecordId> {
        match self {
            Self::Here(record) => Some(*record),
            Self::There(..) => None,
        }
    }
}
