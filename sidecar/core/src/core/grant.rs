//! Leases: which records are promised to whom.

use std::sync::Arc;

use super::{Core, MAX_BLOCKS, MAX_RUNS};
use crate::{
    event::{Action, LeaseRun},
    ids::{LeaseId, SessionId},
    key::BlockKey,
    lease::{Granted, Lease},
    store::State,
};

impl Core {
    pub(super) fn lease(
        &mut self,
        id: SessionId,
        request: u64,
        runs: &[LeaseRun],
        hashes: &[[u8; 32]],
        now_ns: u64,
        actions: &mut Vec<Action>,
    ) {
        let nothing = |runs: usize| Action::Leased {
            session: id,
            request,
            lease: LeaseId([0; 16]),
            blocks: vec![0; runs],
        };
        let Some(session) = self.sessions.get(&id) else { return };
        if runs.len() > MAX_RUNS || hashes.len() > MAX_BLOCKS || counted(runs) != hashes.len() as u64 {
            actions.push(nothing(runs.len().min(MAX_RUNS)));
            let text = format!(
                "expected a lease over at most {MAX_RUNS} runs that count their hashes, at most {MAX_BLOCKS}, got {} \
                 runs of {} and {} hashes",
                runs.len(),
                counted(runs),
                hashes.len()
            );
            return self.protocol_error(id, text, actions);
        }
        let opened = |run: &LeaseRun| {
            self.spaces.get(&run.space).is_some_and(|space| space.tenant == session.tenant.name)
        };
        if !runs.iter().all(opened) {
            actions.push(nothing(runs.len()));
            let text = "expected a lease over namespaces that this session's tenant opened".to_owned();
            return self.protocol_error(id, text, actions);
        }
        self.counters.lease_blocks_asked += hashes.len() as u64;
        if self.draining || self.leases.len() >= self.limits.leases_max {
            self.counters.leases_refused += 1;
            return actions.push(nothing(runs.len()));
        }
        let mut records = Vec::with_capacity(hashes.len());
        let mut granted = Vec::with_capacity(runs.len());
        let mut pinned = self.store.pinned_bytes;
        let mut rest = hashes;
        for run in runs {
            let (these, others) = rest.split_at(run.count as usize);
            rest = others;
            let start = records.len() as u32;
            for hash in these {
                let key = BlockKey::new(&session.tenant.key, run.space, 0, hash);
                let Some(record) = self.store.find(&key) else { break };
                let Some(found) = self.store.get(record).filter(|found| found.state == State::Published)
                else {
                    break;
                };
                pinned += if found.is_pinned() { 0 } else { found.bytes };
                if pinned > self.limits.pinned_bytes_max {
                    break;
                }
                records.push(record);
            }
            granted.push(Granted { space: run.space, start, count: records.len() as u32 - start });
        }
        if records.is_empty() {
            self.counters.leases_empty += 1;
            return actions.push(nothing(runs.len()));
        }
        // Children first: a parent must never be older than its child.
        for record in records.iter().rev() {
            self.store.touch(*record);
        }
        self.counters.lease_blocks_hit += records.len() as u64;
        self.counters.leases_granted += 1;
        let blocks = granted.iter().map(|run| run.count).collect();
        let lease = Lease {
            session: id,
            engine: Arc::clone(&session.engine),
            uid: session.uid,
            tenant: Arc::clone(&session.tenant.name),
            runs: granted,
            records,
            expires_ns: now_ns + self.limits.lease_ns,
            jobs: 0,
            released: false,
        };
        self.lease_count += 1;
        let hash = blake3::keyed_hash(&self.limits.lease_seed, &self.lease_count.to_le_bytes());
        let lease_id = LeaseId(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"));
        self.leases.grant(lease_id, lease, &mut self.store);
        actions.push(Action::Leased { session: id, request, lease: lease_id, blocks });
    }
}

fn counted(runs: &[LeaseRun]) -> u64 {
    runs.iter().map(|run| u64::from(run.count)).sum()
}
