//! Borrowing from the other sidecars of this node, and lending to them.

use std::sync::Arc;

use pillion_shm::presence::IndexKey;

use super::{
    Core, MAX_BLOCKS,
    ssd::Fetching,
    wait::{Run, Slot, Wait},
};
use crate::{
    event::{Action, Role},
    ids::{LeaseId, NamespaceId, NeighbourId, SessionId},
    key::BlockKey,
    neighbours::{Lent, Waiter},
    store::{Foreign, RecordId, State},
};

impl Core {
    // ---- borrowing

    /// Asks the neighbours for a record that is not here.
    pub(super) fn ask_neighbours(&mut self, key: &BlockKey, index: IndexKey, waiter: Waiter) -> Fetching {
        let (wait, run, _) = waiter;
        let tenant = self.waits.get(&waiter.0).and_then(|wait| self.sessions.get(&wait.session));
        let Some(tenant) = tenant.map(|session| Arc::clone(&session.tenant.name)) else {
            return Fetching::No;
        };
        if !self.neighbours.is_alone() && self.neighbours.ask(*key, index, &tenant, (wait, run), waiter) {
            Fetching::Coming
        } else {
            Fetching::No
        }
    }

    /// A neighbour lends some of these keys' records, or nobody does.
    pub(super) fn neighbour_answered(
        &mut self,
        keys: &[[u8; 32]],
        lent: Option<(NeighbourId, LeaseId, Vec<Option<Lent>>)>,
        now_ns: u64,
        actions: &mut Vec<Action>,
    ) {
        let (neighbour, lease, records) = match lent {
            Some((neighbour, lease, records)) => (Some(neighbour), lease, records),
            None => (None, LeaseId([0; 16]), Vec::new()),
        };
        let is_lease = lease != LeaseId([0; 16]);
        let borrow = neighbour.filter(|_| is_lease).map(|from| self.neighbours.borrow(from, lease, now_ns));
        let mut records = records.into_iter();
        for key in keys {
            let lent = records.next().flatten();
            let Some((key, waiters)) = self.neighbours.answered(key) else { continue };
            let record = match (self.store.find(&key), borrow, lent) {
                // Saved here meanwhile, or borrowed by somebody else's answer.
                (Some(id), ..) => self.store.get(id).filter(|r| r.state == State::Published).map(|_| id),
                (None, Some(borrow), Some(lent)) => Some(self.take(key, borrow, neighbour, lent)),
                _ => None,
            };
            for waiter in waiters {
                self.arrived(waiter, &key, record);
            }
            if let Some(record) = record {
                // Nobody waits any more.
                self.store.drop_if_unused(record);
            }
        }
        self.give_back(actions);
        if let Some(borrow) = borrow {
            self.end_borrow(borrow, actions);
        }
        self.grant_settled(now_ns, actions);
    }

    fn take(&mut self, key: BlockKey, borrow: u64, from: Option<NeighbourId>, lent: Lent) -> RecordId {
        self.neighbours.took(borrow);
        self.counters.neighbour_blocks_borrowed += 1;
        let neighbour = from.unwrap_or_default();
        self.store.insert_foreign(key, lent, Foreign { borrow, neighbour })
    }

    /// What left the store goes back to its owner.
    pub(super) fn give_back(&mut self, actions: &mut Vec<Action>) {
        for borrow in self.store.take_returned() {
            self.neighbours.gave(borrow);
            self.end_borrow(borrow, actions);
        }
    }

    fn end_borrow(&mut self, borrow: u64, actions: &mut Vec<Action>) {
        if let Some(ended) = self.neighbours.end_if_empty(borrow) {
            actions.push(Action::Return { neighbour: ended.neighbour, lease: ended.lease });
        }
    }

    /// What was borrowed from it may change under our hands: loads that have not begun are misses, and those that
    /// run prove what they have read.
    pub(super) fn neighbour_went(&mut self, neighbour: NeighbourId, actions: &mut Vec<Action>) {
        self.neighbours.went(neighbour);
        self.store.retire_foreign(neighbour);
        self.give_back(actions);
    }

    pub(super) fn renew_borrows(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        for borrow in self.neighbours.renew(now_ns) {
            actions.push(Action::RenewAt { neighbour: borrow.neighbour, lease: borrow.lease });
        }
    }

    pub(super) fn ask_what_is_lacking(&mut self, actions: &mut Vec<Action>) {
        let questions = self.neighbours.questions();
        if !questions.is_empty() {
            self.counters.neighbour_blocks_asked += questions.len() as u64;
            actions.push(Action::AskNeighbours { questions });
        }
    }

    // ---- lending

    /// Another sidecar asks for records by their keys. Nothing but this pool's own records and the SSD's is lent.
    pub(super) fn lend(
        &mut self,
        id: SessionId,
        request: u64,
        keys: &[[u8; 32]],
        now_ns: u64,
        actions: &mut Vec<Action>,
    ) {
        let is_neighbour = self.sessions.get(&id).is_some_and(|session| session.role == Role::Neighbour);
        if !is_neighbour || keys.len() > MAX_BLOCKS {
            let text = format!("expected a neighbour that asks for at most {MAX_BLOCKS} blocks");
            actions.push(nothing_lent(id, request, keys.len().min(MAX_BLOCKS)));
            return self.protocol_error(id, text, actions);
        }
        // Half of what there is: our own engines come first.
        if self.draining || self.leases.len() + self.waits.len() >= self.limits.leases_max / 2 {
            self.counters.leases_refused += 1;
            return actions.push(nothing_lent(id, request, keys.len()));
        }
        let mut pinned = self.store.pinned_bytes + self.wait_bytes;
        let mut runs = Vec::with_capacity(keys.len());
        for key in keys {
            let slot =
                self.look_by_bytes(key).filter(|(_, more)| pinned + more <= self.limits.pinned_bytes_max / 2);
            pinned += slot.map_or(0, |(_, more)| more);
            let slots = slot.map(|(slot, _)| slot).into_iter().collect();
            runs.push(Run { space: NamespaceId([0; 16]), slots });
        }
        // Whoever asks waits for us: what is here must reach it before it gives up on all of it.
        let ssd_ns = self.ssd.as_ref().map_or(0, |ssd| ssd.patience_ns(now_ns));
        let deadline_ns = now_ns + ssd_ns.min(self.limits.borrow_wait_ns / 2);
        let wait = Wait { lends: true, ..Wait::new(id, request, runs, deadline_ns) };
        self.begin_wait(wait, now_ns, actions);
    }

    fn look_by_bytes(&self, key: &[u8; 32]) -> Option<(Slot, u64)> {
        let here = self.store.find_bytes(key).and_then(|id| Some((id, self.store.get(id)?)));
        match here {
            Some((_, record)) if record.is_foreign() => None,
            Some((id, record)) if record.state == State::Published => {
                Some((Slot::Here(id), if record.is_pinned() { 0 } else { record.bytes }))
            }
            Some(_) => None,
            None => {
                let (key, found) = self.ssd.as_ref()?.find_bytes(key)?;
                Some((Slot::There(*key, found.bytes), found.bytes))
            }
        }
    }

    /// The answer to a neighbour, once the lease stands.
    pub(super) fn lent(&self, wait: &Wait, lease: LeaseId) -> Action {
        let record = |run: &Run| {
            let id = run.slots.first()?.here()?;
            let record = self.store.get(id).filter(|record| !record.is_foreign())?;
            Some(Lent {
                offset: self.store.offset(id)?,
                bytes: record.bytes,
                checksum: record.checksum,
                format: Arc::clone(&record.format),
            })
        };
        let records = wait.runs.iter().map(record).collect();
        Action::Lent { session: wait.session, request: wait.request, lease, records }
    }

    /// A neighbour found that a record's bytes are not those that were stored: whoever asks next computes it anew.
    pub(super) fn damaged(&mut self, id: SessionId, key: &[u8; 32], offset: u64, actions: &mut Vec<Action>) {
        let is_neighbour = self.sessions.get(&id).is_some_and(|session| session.role == Role::Neighbour);
        let found = self.store.find_bytes(key).filter(|_| is_neighbour);
        // One that was given another place since is not the one that was read.
        let own = found.filter(|id| self.store.get(*id).is_some_and(|record| !record.is_foreign()));
        let own = own.filter(|id| self.store.offset(*id) == Some(offset));
        if let Some((key, tenant, index)) = own.and_then(|id| self.store.retire(id)) {
            self.announce(&key, &tenant, index, actions);
        }
    }
}

pub(super) fn nothing_lent(session: SessionId, request: u64, keys: usize) -> Action {
    Action::Lent { session, request, lease: LeaseId([0; 16]), records: vec![None; keys] }
}
