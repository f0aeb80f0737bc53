//! Leases: which records are promised to whom.

use std::sync::Arc;

use pillion_shm::presence::IndexKey;

use super::{
    Core, MAX_BLOCKS, MAX_RUNS,
    wait::{Run, Slot, Wait},
};
use crate::{
    event::{Action, LeaseRun, Role},
    ids::{LeaseId, SessionId},
    key::{BlockKey, TenantKey},
    lease::{Granted, Lease},
    store::{Record, RecordId, State},
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
        if !runs.iter().all(opened) || session.role == Role::Neighbour {
            actions.push(nothing(runs.len()));
            let text = "expected a lease over namespaces that this session's tenant opened".to_owned();
            return self.protocol_error(id, text, actions);
        }
        self.counters.lease_blocks_asked += hashes.len() as u64;
        if self.draining || self.leases.len() + self.waits.len() >= self.limits.leases_max {
            self.counters.leases_refused += 1;
            return actions.push(nothing(runs.len()));
        }
        let runs = self.plan(&session.tenant.key, runs, hashes);
        let deadline_ns = now_ns + self.patience_ns(&runs, now_ns);
        let wait = Wait::new(id, request, runs, deadline_ns);
        self.begin_wait(wait, now_ns, actions);
    }

    /// How long a lease waits for what is not here before it is granted without the rest.
    fn patience_ns(&self, runs: &[Run], now_ns: u64) -> u64 {
        let slots = || runs.iter().flat_map(|run| &run.slots);
        let ssd_ns = self.ssd.as_ref().map_or(0, |ssd| ssd.patience_ns(now_ns));
        let from_ssd = slots().any(|slot| matches!(slot, Slot::There(..)));
        let from_neighbours = slots().any(|slot| matches!(slot, Slot::Abroad(..)));
        let borrow_ns = if from_neighbours { self.limits.borrow_wait_ns } else { 0 };
        borrow_ns.max(if from_ssd { ssd_ns } else { 0 })
    }

    /// Pins what is here, asks for the rest, and answers at once where there is none.
    pub(super) fn begin_wait(&mut self, wait: Wait, now_ns: u64, actions: &mut Vec<Action>) {
        for slot in wait.runs.iter().flat_map(|run| &run.slots) {
            match slot {
                Slot::Here(record) => self.store.pin(*record),
                Slot::There(_, bytes) => self.wait_bytes += bytes,
                Slot::Abroad(..) => {}
            }
        }
        if wait.left == 0 {
            return self.grant(wait, now_ns, actions);
        }
        self.counters.leases_waited += 1;
        self.wait_count += 1;
        self.waits.insert(self.wait_count, wait);
        self.ask_for_all(self.wait_count, actions);
        self.grant_settled(now_ns, actions);
        self.grant_overdue(now_ns, actions);
    }

    /// Where the blocks of each run are, up to the first that is nowhere or that more than may be pinned begins with.
    fn plan(&self, tenant: &TenantKey, runs: &[LeaseRun], hashes: &[[u8; 32]]) -> Vec<Run> {
        let mut planned = self.store.pinned_bytes + self.wait_bytes;
        let seed = tenant.index_seed();
        let mut rest = hashes;
        let plan = |run: &LeaseRun| {
            let (these, others) = rest.split_at(run.count as usize);
            rest = others;
            let mut slots = Vec::new();
            for hash in these {
                let index = IndexKey::new(seed, &run.space.0, hash);
                let named = self.store.find_named(&index, run.space, hash);
                let found = named.filter(|(_, record)| record.state == State::Published);
                let Some((slot, more)) = found.map(here).or_else(|| {
                    let key = BlockKey::new(tenant, run.space, 0, hash);
                    let abroad = || (!self.neighbours.is_alone()).then_some((Slot::Abroad(key, index), 0));
                    self.look(&key).or_else(abroad)
                }) else {
                    break;
                };
                planned += more;
                if planned > self.limits.pinned_bytes_max {
                    break;
                }
                slots.push(slot);
            }
            Run { space: run.space, slots }
        };
        runs.iter().map(plan).collect()
    }

    /// Where a block is, and how much more it pins.
    fn look(&self, key: &BlockKey) -> Option<(Slot, u64)> {
        match self.store.find(key).and_then(|id| Some((id, self.store.get(id)?))) {
            Some(found) if found.1.state == State::Published => Some(here(found)),
            _ => {
                let found = self.ssd.as_ref()?.find(key)?;
                Some((Slot::There(*key, found.bytes), found.bytes))
            }
        }
    }

    /// The answer: of each run what is here, or nearly, without a gap. Its time begins now.
    pub(super) fn grant(&mut self, mut wait: Wait, now_ns: u64, actions: &mut Vec<Action>) {
        let ahead = self.close_gaps(&mut wait, now_ns);
        let (id, request) = (wait.session, wait.request);
        let Some(session) = self.sessions.get(&id) else { return };
        let mut records = Vec::new();
        let mut granted = Vec::with_capacity(wait.runs.len());
        for run in &wait.runs {
            let start = records.len() as u32;
            records.extend(run.slots.iter().filter_map(Slot::here));
            granted.push(Granted { space: run.space, start, count: records.len() as u32 - start });
        }
        if records.is_empty() {
            self.counters.leases_empty += u64::from(!wait.lends);
            return actions.push(wait.refusal());
        }
        // Children first: a parent must never be older than its child.
        for record in records.iter().rev() {
            self.store.touch(*record);
        }
        if !wait.lends {
            self.counters.lease_blocks_hit += records.len() as u64;
            self.counters.leases_granted += 1;
            self.counters.leases_ahead += u64::from(ahead > 0);
        }
        let blocks: Vec<u32> = granted.iter().map(|run| run.count).collect();
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
        // The wait's pins become the lease's.
        self.leases.grant(lease_id, lease);
        actions.push(if wait.lends {
            self.counters.neighbour_blocks_lent +=
                blocks.iter().map(|blocks| u64::from(*blocks)).sum::<u64>();
            self.lent(&wait, lease_id)
        } else {
            Action::Leased { session: id, request, lease: lease_id, blocks }
        });
    }
}

/// Where a record of the pool is, and how much more it pins.
fn here((id, record): (RecordId, &Record)) -> (Slot, u64) {
    (Slot::Here(id), if record.is_pinned() || record.is_foreign() { 0 } else { record.bytes })
}

fn counted(runs: &[LeaseRun]) -> u64 {
    runs.iter().map(|run| u64::from(run.count)).sum()
}
