//! Leases: bounded promises that records stay where they are.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    ids::{LeaseId, NamespaceId, SessionId},
    store::{RecordId, Store},
};

/// The records that were granted of one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Granted {
    pub(crate) space: NamespaceId,
    /// Where they begin among the lease's records.
    pub(crate) start: u32,
    pub(crate) count: u32,
}

#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) session: SessionId,
    /// Jobs under it must come from this engine instance, user and tenant.
    pub(crate) engine: Arc<str>,
    pub(crate) uid: u32,
    pub(crate) tenant: Arc<str>,
    pub(crate) runs: Vec<Granted>,
    pub(crate) records: Vec<RecordId>,
    pub(crate) expires_ns: u64,
    pub(crate) jobs: u32,
    /// Its owner is done with it, or gone: it ends with its last job.
    pub(crate) released: bool,
}

impl Lease {
    /// Blocks `first..first + count` of a run, if all of them were granted in this namespace.
    pub(crate) fn part(&self, run: u32, first: u32, count: u32, space: NamespaceId) -> Option<&[RecordId]> {
        let granted = self.runs.get(run as usize).filter(|granted| granted.space == space)?;
        let records = self.records.get(granted.start as usize..)?.get(..granted.count as usize)?;
        records.get(first as usize..)?.get(..count as usize)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Leases {
    leases: BTreeMap<LeaseId, Lease>,
}

impl Leases {
    pub(crate) fn len(&self) -> usize {
        self.leases.len()
    }

    pub(crate) fn get(&self, id: LeaseId) -> Option<&Lease> {
        self.leases.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: LeaseId) -> Option<&mut Lease> {
        self.leases.get_mut(&id)
    }

    /// The records are pinned, and stay so until the lease ends.
    pub(crate) fn grant(&mut self, id: LeaseId, lease: Lease) {
        self.leases.insert(id, lease);
    }

    pub(crate) fn release(&mut self, id: LeaseId, store: &mut Store) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.released = true;
            if lease.jobs == 0 {
                self.end(id, store);
            }
        }
    }

    pub(crate) fn job_ended(&mut self, id: LeaseId, store: &mut Store) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.jobs -= 1;
            if lease.jobs == 0 && lease.released {
                self.end(id, store);
            }
        }
    }

    fn end(&mut self, id: LeaseId, store: &mut Store) {
        if let Some(lease) = self.leases.remove(&id) {
            // Children first, so that parents become the younger of the two in the queue.
            for record in lease.records.iter().rev() {
                store.unpin(*record);
            }
        }
    }

    pub(crate) fn session_ended(&mut self, session: SessionId, store: &mut Store) {
        let ids: Vec<_> =
            self.leases.iter().filter(|(_, l)| l.session == session).map(|(id, _)| *id).collect();
        for id in ids {
            self.release(id, store);
        }
    }

    pub(crate) fn expire(&mut self, now_ns: u64, store: &mut Store) -> u64 {
        let ids: Vec<_> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.expires_ns <= now_ns && lease.jobs == 0)
            .map(|(id, _)| *id)
            .collect();
        for id in &ids {
            self.end(*id, store);
        }
        ids.len() as u64
    }
}
