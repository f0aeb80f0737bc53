//! Records that other sidecars of this node have: who was asked, and what is borrowed.
//!
//! A borrowed record lies in its owner's pool, which is mapped here; it has an entry in the store while a lease or a
//! waiting lease pins it, and its owner keeps it where it is until the last one of its *borrow* is given back.

use std::{collections::BTreeMap, sync::Arc};

use pillion_shm::presence::IndexKey;

use crate::{
    ids::{LeaseId, NeighbourId},
    key::BlockKey,
    store::KeyMap,
};

/// Keys that may be asked for at a time (I8).
const ASKED_MAX: usize = 1 << 18;

/// A record of another sidecar's pool.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Lent {
    /// Where it lies in its owner's pool.
    pub offset: u64,
    pub bytes: u64,
    pub checksum: u64,
    pub format: Arc<str>,
}

/// A key that is to be found at a neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// In whose presence tables.
    pub tenant: Arc<str>,
    /// Under which key there.
    pub index: IndexKey,
    /// The block key's bytes, which its owner compares.
    pub key: [u8; 32],
    /// Blocks of one run are wanted up to the first that nobody has.
    pub run: (u64, usize),
}

/// What was borrowed by one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Borrow {
    pub(crate) neighbour: NeighbourId,
    pub(crate) lease: LeaseId,
    /// Records of it that are still in the store.
    pub(crate) records: usize,
    pub(crate) renewed_ns: u64,
}

/// A place of a waiting lease: wait, run, slot.
pub(crate) type Waiter = (u64, usize, usize);

#[derive(Debug, Default)]
pub(crate) struct Neighbours {
    /// How long their leases last.
    up: BTreeMap<NeighbourId, u64>,
    /// Who waits for an answer about which key.
    asked: KeyMap<Vec<Waiter>>,
    /// To be asked with the end of this event.
    next: Vec<Question>,
    borrows: BTreeMap<u64, Borrow>,
    borrow_count: u64,
}

impl Neighbours {
    pub(crate) fn is_alone(&self) -> bool {
        self.up.is_empty()
    }

    pub(crate) fn came(&mut self, neighbour: NeighbourId, lease_ns: u64) {
        self.up.insert(neighbour, lease_ns);
    }

    pub(crate) fn went(&mut self, neighbour: NeighbourId) {
        self.up.remove(&neighbour);
    }

    /// Asks for a key, once for all who want it. False: too much is being asked.
    pub(crate) fn ask(
        &mut self,
        key: BlockKey,
        index: IndexKey,
        tenant: &Arc<str>,
        run: (u64, usize),
        waiter: Waiter,
    ) -> bool {
        if let Some(waiters) = self.asked.get_mut(&key) {
            waiters.push(waiter);
            return true;
        }
        if self.asked.len() >= ASKED_MAX {
            return false;
        }
        self.asked.insert(key, vec![waiter]);
        self.next.push(Question { tenant: Arc::clone(tenant), index, key: key.bytes(), run });
        true
    }

    /// What is to be asked now.
    pub(crate) fn questions(&mut self) -> Vec<Question> {
        std::mem::take(&mut self.next)
    }

    /// A key was answered: who waits for it.
    pub(crate) fn answered(&mut self, key: &[u8; 32]) -> Option<(BlockKey, Vec<Waiter>)> {
        self.asked.remove_entry(key)
    }

    /// Room for the records of one answer.
    pub(crate) fn borrow(&mut self, neighbour: NeighbourId, lease: LeaseId, now_ns: u64) -> u64 {
        self.borrow_count += 1;
        let new = Borrow { neighbour, lease, records: 0, renewed_ns: now_ns };
        self.borrows.insert(self.borrow_count, new);
        self.borrow_count
    }

    pub(crate) fn took(&mut self, borrow: u64) {
        if let Some(borrow) = self.borrows.get_mut(&borrow) {
            borrow.records += 1;
        }
    }

    /// A record of it is not in the store any more.
    pub(crate) fn gave(&mut self, borrow: u64) {
        if let Some(borrow) = self.borrows.get_mut(&borrow) {
            borrow.records -= 1;
        }
    }

    /// Forgets a borrow of which nothing is left.
    pub(crate) fn end_if_empty(&mut self, borrow: u64) -> Option<Borrow> {
        let is_empty = self.borrows.get(&borrow).is_some_and(|borrow| borrow.records == 0);
        is_empty.then(|| self.borrows.remove(&borrow)).flatten()
    }

    /// Borrows of which a third of their owner's term is over; they count as renewed now.
    pub(crate) fn renew(&mut self, now_ns: u64) -> Vec<Borrow> {
        let mut due = Vec::new();
        let up = &self.up;
        let is_due = |borrow: &Borrow| {
            let term_ns = up.get(&borrow.neighbour).copied().unwrap_or_default();
            borrow.renewed_ns + term_ns / 3 <= now_ns
        };
        for borrow in self.borrows.values_mut().filter(|borrow| is_due(borrow)) {
            borrow.renewed_ns = now_ns;
            due.push(*borrow);
        }
        due
    }

    /// Leases at neighbours that are held now.
    pub(crate) fn borrowed(&self) -> usize {
        self.borrows.len()
    }

    /// Checks what must always hold; for tests.
    #[cfg(any(test, feature = "checked"))]
    pub(crate) fn check(&self, records: &std::collections::HashMap<u64, usize>) {
        assert!(self.next.is_empty(), "asked at the end of every event");
        assert_eq!(records.len(), self.borrows.len(), "an empty borrow was given back");
        assert!(self.borrows.iter().all(|(id, borrow)| records.get(id) == Some(&borrow.records)));
    }
}
