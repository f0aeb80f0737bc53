//! The SSD's part: what is offered to it, what is read from it, and what the table says of both.

use std::sync::Arc;

use pillion_shm::presence::IndexKey;

use super::Core;
use crate::{
    event::{Action, Outcome, TIER_HOST, TIER_SSD},
    jobs::JobKey,
    key::{BlockKey, Tenant},
    pool::SECTOR,
    ssd::{CacheMode, GetEnding, Offer, OnSsd, Put, PutEnding, SsdRecord},
    store::{NewRecord, Record, RecordId, State},
};

/// What became of asking for a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fetching {
    /// In the pool.
    Here(RecordId),
    /// Will be read: the waiter is told.
    Coming,
    /// Not there, or no room for it.
    No,
}

impl Core {
    /// Says where a block lies now, or that it is gone.
    pub(super) fn announce(
        &self,
        key: &BlockKey,
        tenant: &Arc<str>,
        index: IndexKey,
        actions: &mut Vec<Action>,
    ) {
        let host = self.store.find(key).and_then(|id| self.store.get(id));
        let host = host.is_some_and(|record| record.state == State::Published && !record.is_foreign());
        let ssd = self.ssd.as_ref().is_some_and(|ssd| ssd.contains(key));
        let tiers = (if host { TIER_HOST } else { 0 }) | (if ssd { TIER_SSD } else { 0 });
        let tenant = Arc::clone(tenant);
        actions.push(match tiers {
            0 => Action::TableRemove { tenant, key: index },
            tiers => Action::TableSet { tenant, key: index, tiers },
        });
    }

    pub(super) fn announce_evictions(&mut self, evicted: &[Record], actions: &mut Vec<Action>) {
        self.counters.evictions += evicted.len() as u64;
        for record in evicted {
            self.announce(&record.key, &record.tenant, record.index, actions);
        }
    }

    /// Newly published records go to the SSD, parents first: what a crash or a full queue cuts off is a tail.
    /// How many writes the job has to wait for.
    pub(super) fn offer(&mut self, job: JobKey, records: &[RecordId], mode: CacheMode) -> usize {
        let Some(ssd) = &mut self.ssd else { return 0 };
        let waits = mode == CacheMode::WriteThrough;
        let mut waiting = 0;
        for id in records {
            let Some(record) = self.store.get(*id) else { continue };
            if mode == CacheMode::ReadOnly || record.bytes < SECTOR {
                continue;
            }
            // Jobs that wait are bounded by themselves.
            if !waits && ssd.offers.len() >= ssd.limits.offers_max {
                self.counters.ssd_not_written += 1;
                continue;
            }
            ssd.offers.push_back(Offer { key: record.key, mode, waiting: waits.then_some((job, *id)) });
            if waits {
                // Whoever waits for the write must not see it evicted before.
                waiting += 1;
                self.store.pin(*id);
            }
        }
        waiting
    }

    /// Starts what may be started now.
    pub(super) fn pump_ssd(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        self.pump_puts(actions);
        self.pump_gets(now_ns, actions);
    }

    /// Reads what was decided on, in that order, as far as reading is bounded.
    fn pump_gets(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        while let Some(key) = self.ssd.as_ref().and_then(|ssd| ssd.queue.front().copied()) {
            let wanted = self.wanted(&key);
            let Some(ssd) = &mut self.ssd else { return };
            match wanted {
                Some((_, bytes)) if !ssd.may_get(bytes) => return,
                Some((record, bytes)) => {
                    ssd.queue.pop_front();
                    let token = ssd.begin(key, now_ns);
                    let offset = self.store.offset(record).unwrap_or_default();
                    actions.push(Action::SsdGet { token, key: key.bytes(), offset, bytes });
                }
                None => {
                    ssd.queue.pop_front();
                    if let Some(fetch) = ssd.give_up(&key) {
                        self.store.abandon(fetch.record);
                    }
                }
            }
        }
    }

    /// A read that has not begun, if somebody still has a use for it: where it goes, and its length.
    fn wanted(&self, key: &BlockKey) -> Option<(RecordId, u64)> {
        let fetch = self.ssd.as_ref()?.fetches.get(key)?;
        let leased = self.store.get(fetch.record).is_some_and(Record::is_pinned);
        let wanted = leased || fetch.waiters.iter().any(|waiter| self.waits_for(*waiter, key));
        wanted.then_some((fetch.record, fetch.bytes))
    }

    fn pump_puts(&mut self, actions: &mut Vec<Action>) {
        while let Some(ssd) = &mut self.ssd
            && let Some(Offer { key, mode, waiting }) = ssd.offers.front().copied()
        {
            let found = self.store.find(&key).and_then(|id| Some((id, self.store.get(id)?)));
            // A neighbour's record, borrowed since, is not ours to write.
            let ours = |record: &Record| record.state == State::Published && !record.is_foreign();
            let Some((id, record)) = found.filter(|(_, record)| ours(record)) else {
                // Evicted before its turn came, or found to be damaged.
                ssd.offers.pop_front();
                self.counters.ssd_not_written += 1;
                if let Some((job, record)) = waiting {
                    self.store.unpin(record);
                    self.waited_for(job, false, actions);
                }
                continue;
            };
            if !ssd.may_put(record.bytes) {
                return;
            }
            ssd.offers.pop_front();
            let (bytes, offset) = (record.bytes, self.store.offset(id).unwrap_or_default());
            let record = SsdRecord {
                key: key.bytes(),
                space: record.space,
                hash: record.hash,
                parent: record.parent.map(|parent| parent.bytes()),
                tenant: Arc::clone(&record.tenant),
                format: Arc::clone(&record.format),
                bytes,
                checksum: record.checksum,
            };
            let token = ssd.token();
            ssd.put_bytes += bytes;
            ssd.puts.insert(token, Put { key, record: id, bytes, mode, job: waiting.map(|(job, _)| job) });
            let durable = waiting.is_some();
            // One that is waited for is pinned already; it may have been retired and saved anew since.
            self.store.pin(id);
            if let Some((_, record)) = waiting {
                self.store.unpin(record);
            }
            actions.push(Action::SsdPut { token, record: Box::new(record), offset, durable });
        }
    }

    pub(super) fn put_ended(&mut self, token: u64, ending: PutEnding, actions: &mut Vec<Action>) {
        let Some(ssd) = &mut self.ssd else { return };
        let Some(put) = ssd.puts.remove(&token) else { return };
        ssd.put_bytes -= put.bytes;
        let mut stored = ending == PutEnding::Stored;
        if let Some(record) = self.store.get(put.record).filter(|_| stored) {
            let on_ssd = OnSsd {
                space: record.space,
                hash: record.hash,
                index: record.index,
                tenant: Arc::clone(&record.tenant),
                format: Arc::clone(&record.format),
                bytes: record.bytes,
                parent: record.parent,
            };
            let (tenant, index) = (Arc::clone(&record.tenant), record.index);
            stored = ssd.insert(put.key, on_ssd);
            if stored && put.mode == CacheMode::WriteAround {
                self.store.age(put.record);
            }
            if stored {
                self.counters.ssd_blocks_written += 1;
                self.counters.ssd_bytes_written += put.bytes;
                self.announce(&put.key, &tenant, index, actions);
            }
        }
        self.counters.ssd_writes_failed += u64::from(!stored);
        self.store.unpin(put.record);
        if let Some(job) = put.job {
            self.waited_for(job, stored, actions);
        }
    }

    /// A job that waits for stable storage has one write less to wait for.
    fn waited_for(&mut self, key: JobKey, stored: bool, actions: &mut Vec<Action>) {
        let Some(running) = self.jobs.get_mut(&key) else { return };
        running.writes_left -= 1;
        running.writes_failed |= !stored;
        if running.writes_left > 0 {
            return;
        }
        let Some(running) = self.jobs.remove(&key) else { return };
        let outcome = match (running.writes_failed, running.cancelled) {
            (_, true) => Outcome::Cancelled,
            (true, false) => Outcome::Failed,
            (false, false) => Outcome::Done,
        };
        let blocks = running.records.len() as u32;
        self.finish(key.0, key.1, &running, outcome, blocks, actions);
    }

    /// A record that may be at a neighbour, unless it has come to be here meanwhile.
    pub(super) fn borrow(
        &mut self,
        key: &BlockKey,
        index: IndexKey,
        waiter: (u64, usize, usize),
    ) -> Fetching {
        match self.store.find(key).and_then(|id| Some((id, self.store.get(id)?.state))) {
            Some((id, State::Published)) => Fetching::Here(id),
            Some(_) => Fetching::No,
            None => self.ask_neighbours(key, index, waiter),
        }
    }

    /// Makes room in the pool for a record and has it read, once for all who want it.
    pub(super) fn fetch(
        &mut self,
        key: &BlockKey,
        waiter: (u64, usize, usize),
        actions: &mut Vec<Action>,
    ) -> Fetching {
        if let Some(id) = self.store.find(key) {
            if self.store.get(id).is_some_and(|record| record.state == State::Published) {
                return Fetching::Here(id);
            }
            // A save of it may be under way: that is nothing to wait for.
            let fetch = self.ssd.as_mut().and_then(|ssd| ssd.fetches.get_mut(key));
            return fetch.map_or(Fetching::No, |fetch| {
                fetch.waiters.push(waiter);
                Fetching::Coming
            });
        }
        let found = self.ssd.as_ref().and_then(|ssd| ssd.find(key)).cloned();
        let Some(found) = found else { return Fetching::No };
        let new = NewRecord {
            key: *key,
            index: found.index,
            space: found.space,
            hash: found.hash,
            tenant: found.tenant,
            format: found.format,
            bytes: found.bytes,
            parent: found.parent,
        };
        let (mut evicted, fits) = (Vec::new(), self.store.fits(new.bytes));
        let insert = || self.store.insert(new, State::Reading, &mut evicted);
        let inserted = fits.then(insert).flatten();
        self.announce_evictions(&evicted, actions);
        let (Some(record), Some(ssd)) = (inserted, &mut self.ssd) else { return Fetching::No };
        ssd.queue(*key, record, found.bytes).waiters.push(waiter);
        Fetching::Coming
    }

    pub(super) fn get_ended(
        &mut self,
        token: u64,
        ending: GetEnding,
        now_ns: u64,
        actions: &mut Vec<Action>,
    ) {
        let well = matches!(ending, GetEnding::Loaded(_));
        let ended = self.ssd.as_mut().and_then(|ssd| ssd.end(token, well, now_ns));
        let Some((key, fetch)) = ended else { return };
        match ending {
            GetEnding::Loaded(checksum) => {
                self.counters.ssd_blocks_read += 1;
                self.counters.ssd_bytes_read += fetch.bytes;
                let published = self.store.publish(fetch.record, checksum);
                if let Some((tenant, index)) = published.map(|new| (Arc::clone(&new.tenant), new.index)) {
                    self.announce(&key, &tenant, index, actions);
                }
            }
            GetEnding::Corrupt | GetEnding::Gone | GetEnding::Busy => {
                self.store.abandon(fetch.record);
                self.counters.ssd_reads_failed += 1;
                self.counters.ssd_corrupt += u64::from(ending == GetEnding::Corrupt);
                if ending != GetEnding::Busy {
                    self.ssd_dropped(&key.bytes(), actions);
                }
            }
        }
        let record = well.then_some(fetch.record);
        for waiter in fetch.waiters {
            self.arrived(waiter, &key, record);
        }
        for awaiting in fetch.loads {
            self.load_goes_on(&awaiting, record, actions);
        }
        self.grant_settled(now_ns, actions);
    }

    /// A record is not on the SSD any more.
    pub(super) fn ssd_dropped(&mut self, key: &[u8; 32], actions: &mut Vec<Action>) {
        let gone = self.ssd.as_mut().and_then(|ssd| ssd.forget(key));
        if let Some((key, record)) = gone {
            self.counters.ssd_dropped += 1;
            self.announce(&key, &record.tenant, record.index, actions);
        }
    }

    /// Recovery found these: they wait for their tenants.
    pub(super) fn ssd_found(&mut self, records: Vec<SsdRecord>, actions: &mut Vec<Action>) {
        let Some(ssd) = &mut self.ssd else { return };
        for record in records {
            if !ssd.hide(record) {
                self.counters.ssd_not_indexed += 1;
            }
        }
        self.reveal(actions);
    }

    /// Recovered records of tenants that are known by now become visible, some at a time.
    pub(super) fn reveal(&mut self, actions: &mut Vec<Action>) {
        for tenant in self.tenants.values() {
            let Some(ssd) = &mut self.ssd else { return };
            if !ssd.hides(&tenant.name) {
                continue;
            }
            let mut shown = Vec::new();
            for record in ssd.reveal(tenant) {
                match proved(&record, tenant) {
                    // What was saved meanwhile is what was found.
                    Some((key, on_ssd)) => {
                        shown.push((key, on_ssd.index));
                        self.counters.ssd_not_indexed += u64::from(!ssd.insert(key, on_ssd));
                    }
                    // Another cluster secret's: nobody can ask for it.
                    None => self.counters.ssd_foreign += 1,
                }
            }
            for (key, index) in shown {
                self.announce(&key, &tenant.name, index, actions);
            }
        }
    }
}

/// A recovered record whose key is what this tenant's key makes of its namespace and hash (I1, I9).
fn proved(record: &SsdRecord, tenant: &Tenant) -> Option<(BlockKey, OnSsd)> {
    let key = BlockKey::new(&tenant.key, record.space, 0, &record.hash);
    let on_ssd = OnSsd {
        space: record.space,
        hash: record.hash,
        index: IndexKey::new(tenant.key.index_seed(), &record.space.0, &record.hash),
        tenant: Arc::clone(&tenant.name),
        format: Arc::clone(&record.format),
        bytes: record.bytes,
        parent: record.parent.map(BlockKey::parent_of_proved),
    };
    (key.bytes() == record.key).then_some((key, on_ssd))
}
