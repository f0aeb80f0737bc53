//! Save and load jobs: what may begin, and how each of them ends.

use std::sync::Arc;

use pillion_shm::presence::IndexKey;

use super::{Core, MAX_BLOCKS, MAX_RUNS};
use crate::{
    event::{Action, BlockOutcome, CopyItem, Direction, LoadRun, Outcome, Registration, SaveRun},
    ids::{JobId, LeaseId, NamespaceId, SessionId},
    jobs::{Job, JobKey, Progress},
    key::BlockKey,
    ssd::{Awaiting, CacheMode},
    store::{NewRecord, Record, RecordId, State},
};

impl Core {
    /// What save and load jobs must both fulfil; the text says what was expected. Gives each run's group.
    fn check(
        &self,
        submitted: &Submitted<'_>,
        runs: impl ExactSizeIterator<Item = (NamespaceId, u32)> + Clone,
    ) -> Result<Vec<u16>, Refusal> {
        let Submitted { session, job, hashes, blocks, .. } = submitted;
        let owner = self.sessions.get(session).filter(|owner| !owner.detached).ok_or(Refusal::Gone)?;
        let Some(registration) = &owner.registration else {
            return Err(Refusal::Protocol("expected a registration before the first job".into()));
        };
        let counted = runs.clone().map(|(_, count)| u64::from(count)).sum::<u64>();
        let sizes_differ = hashes.len() != blocks.len() || counted != hashes.len() as u64;
        if sizes_differ || hashes.is_empty() || hashes.len() > MAX_BLOCKS || runs.len() > MAX_RUNS {
            return Err(Refusal::Protocol(format!(
                "expected 1 to {MAX_BLOCKS} hashes, as many blocks, and at most {MAX_RUNS} runs that count them, got {}, \
                 {}, and {} runs of {counted}",
                hashes.len(),
                blocks.len(),
                runs.len(),
            )));
        }
        if let Some(block) = blocks.iter().find(|block| u64::from(**block) >= registration.num_blocks) {
            return Err(Refusal::Protocol(format!(
                "expected block ids below {}, got {block}",
                registration.num_blocks
            )));
        }
        if self.jobs.contains_key(&(*session, *job)) {
            return Err(Refusal::Protocol("expected a new job id, got one that is still running".into()));
        }
        let group = |(space, _)| self.group(&owner.tenant.name, registration, space);
        let groups: Vec<u16> = runs.map(group).collect::<Option<_>>().ok_or(Refusal::Identity)?;
        if self.draining || owner.jobs >= self.limits.session_jobs_max {
            return Err(Refusal::Busy);
        }
        Ok(groups)
    }

    /// A part of a record is not a record.
    fn check_saved(&self, save: &Submitted<'_>, groups: Vec<u16>) -> Result<Vec<u16>, Refusal> {
        let registration = self.sessions.get(&save.session).and_then(|owner| owner.registration.as_ref());
        let only_loaded = |group: &&u16| {
            let group = registration.and_then(|known| known.groups.get(usize::from(**group)));
            group.is_none_or(|group| group.load_only)
        };
        match groups.iter().find(only_loaded) {
            Some(group) => Err(Refusal::Protocol(format!(
                "expected saves of blocks that the worker holds whole, got one of group {group}, which is another \
                 tensor-parallel size's"
            ))),
            None => Ok(groups),
        }
    }

    /// The group of a registration whose namespace was opened under this id.
    fn group(&self, tenant: &str, registration: &Registration, space: NamespaceId) -> Option<u16> {
        let space = self.spaces.get(&space).filter(|space| *space.tenant == *tenant)?;
        let mut groups = registration.groups.iter();
        groups.position(|group| group.namespace == space.namespace).map(|index| index as u16)
    }

    fn refuse(
        &mut self,
        submitted: &Submitted<'_>,
        direction: Direction,
        refusal: Refusal,
        actions: &mut Vec<Action>,
    ) {
        let outcome = if matches!(refusal, Refusal::Busy) { Outcome::Cancelled } else { Outcome::Failed };
        let (session, job) = (submitted.session, submitted.job);
        match refusal {
            Refusal::Gone => return,
            Refusal::Protocol(text) => self.protocol_error(session, text, actions),
            Refusal::Identity => self.counters.identity_mismatches += 1,
            Refusal::Busy | Refusal::Lease => {}
        }
        self.count(direction, outcome);
        actions.push(Action::Complete { session, job, outcome, quiesced: true, blocks: 0 });
    }

    pub(super) fn save(
        &mut self,
        save: &Submitted<'_>,
        runs: &[SaveRun],
        word: u32,
        tag: u64,
        actions: &mut Vec<Action>,
    ) {
        let groups = self.check(save, runs.iter().map(|run| (run.space, run.count)));
        let groups = match groups.and_then(|groups| self.check_saved(save, groups)) {
            Ok(groups) => groups,
            Err(refusal) => return self.refuse(save, Direction::Save, refusal, actions),
        };
        let Submitted { session, job, deadline_ns, .. } = *save;
        let mut records = Vec::new();
        let mut items = Vec::new();
        let mut evicted = Vec::new();
        let mode;
        {
            let Self { sessions, store, ssd, counters, .. } = self;
            let Some(owner) = sessions.get_mut(&session) else { return };
            let Some(registration) = &owner.registration else { return };
            let seed = owner.tenant.key.index_seed();
            let on_ssd = |key: &BlockKey| ssd.as_ref().is_some_and(|ssd| ssd.contains(key));
            mode = ssd.as_ref().map_or_else(CacheMode::default, |ssd| ssd.mode(registration.cache_mode));
            let durable = mode == CacheMode::WriteThrough;
            let mut rest = save.hashes.iter().zip(save.blocks);
            'runs: for (run, index) in runs.iter().zip(&groups) {
                let group = &registration.groups[usize::from(*index)];
                let key_of = |hash: &[u8; 32]| BlockKey::new(&owner.tenant.key, run.space, 0, hash);
                let mut parent = run.parent.as_ref().map(key_of);
                for (hash, block) in rest.by_ref().take(run.count as usize) {
                    let key = key_of(hash);
                    // Borrowed is not stored durably: an acknowledgement would promise what its owner does not.
                    if let Some(borrowed) = store.find(&key).filter(|_| durable)
                        && store.get(borrowed).is_some_and(Record::is_foreign)
                    {
                        store.retire(borrowed);
                    }
                    // What is on the SSD only is stored, too.
                    if store.find(&key).is_some() || on_ssd(&key) {
                        counters.blocks_deduplicated += 1;
                        parent = Some(key);
                        continue;
                    }
                    let new = NewRecord {
                        key,
                        index: IndexKey::new(seed, &run.space.0, hash),
                        space: run.space,
                        hash: *hash,
                        tenant: Arc::clone(&owner.tenant.name),
                        format: Arc::clone(&group.format),
                        bytes: group.record_bytes,
                        parent,
                    };
                    let fits = store.fits(new.bytes);
                    let insert = || store.insert(new, State::Writing, &mut evicted);
                    let Some(record) = fits.then(insert).flatten() else {
                        counters.blocks_without_room += 1 + rest.len() as u64;
                        break 'runs;
                    };
                    let offset = store.offset(record).expect("just inserted");
                    items.push(CopyItem {
                        group: *index,
                        block: u64::from(*block),
                        pool: 0,
                        offset,
                        checksum: 0,
                    });
                    records.push(record);
                    parent = Some(key);
                }
            }
            if !records.is_empty() {
                owner.jobs += 1;
            }
        }
        self.announce_evictions(&evicted, actions);
        if records.is_empty() {
            self.count(Direction::Save, Outcome::Done);
            actions.push(Action::Complete {
                session,
                job,
                outcome: Outcome::Done,
                quiesced: true,
                blocks: 0,
            });
            return;
        }
        let registration = self.sessions.get(&session).map_or(0, |owner| owner.registrations);
        let running =
            Job { word, tag, mode, registration, ..Job::new(Direction::Save, records, deadline_ns) };
        self.jobs.insert((session, job), running);
        let direction = Direction::Save;
        actions.push(Action::Copy { session, job, direction, items, event: save.event });
    }

    pub(super) fn load(
        &mut self,
        load: &Submitted<'_>,
        lease_id: LeaseId,
        runs: &[LoadRun],
        actions: &mut Vec<Action>,
    ) {
        let checked = self
            .check(load, runs.iter().map(|run| (run.space, run.count)))
            .and_then(|groups| self.prove(load, lease_id, runs, &groups));
        let (records, items) = match checked {
            Ok(proved) => proved,
            Err(refusal) => return self.refuse(load, Direction::Load, refusal, actions),
        };
        let Submitted { session, job, deadline_ns, event, .. } = *load;
        if let Some(lease) = self.leases.get_mut(lease_id) {
            lease.jobs += 1;
        }
        let Some(owner) = self.sessions.get_mut(&session) else { return };
        owner.jobs += 1;
        let registration = owner.registrations;
        self.load_count += 1;
        let serial = self.load_count;
        let mut progress = Progress { serial, event, ..Progress::default() };
        for (record, item) in records.iter().copied().zip(items) {
            let coming = self.store.get(record).filter(|record| record.state == State::Reading);
            let fetch = coming.and_then(|record| self.ssd.as_mut()?.fetches.get_mut(&record.key));
            match fetch {
                Some(fetch) => {
                    fetch.loads.push(Awaiting { job: (session, job), serial, item });
                    progress.awaited += 1;
                }
                None => progress.ready.push((record, item)),
            }
        }
        let lease = Some(lease_id);
        let running =
            Job { lease, progress, registration, ..Job::new(Direction::Load, records, deadline_ns) };
        self.jobs.insert((session, job), running);
        self.next_piece((session, job), actions);
    }

    /// A record that a load waits for has come, or will not.
    pub(super) fn load_goes_on(
        &mut self,
        awaiting: &Awaiting,
        record: Option<RecordId>,
        actions: &mut Vec<Action>,
    ) {
        let running = self.jobs.get_mut(&awaiting.job).map(|running| &mut running.progress);
        let Some(progress) = running.filter(|progress| progress.serial == awaiting.serial) else { return };
        progress.awaited -= 1;
        let come = record.and_then(|id| Some((id, self.store.get(id)?.checksum)));
        match come {
            Some((id, checksum)) => progress.ready.push((id, CopyItem { checksum, ..awaiting.item })),
            None => progress.failed = true,
        }
        self.next_piece(awaiting.job, actions);
    }

    /// Copies what of a load has come, if nothing of it is being copied; ends it if nothing is left to do.
    pub(super) fn next_piece(&mut self, key: JobKey, actions: &mut Vec<Action>) {
        let Some(running) = self.jobs.get_mut(&key) else { return };
        let given_up = running.cancelled || running.progress.failed;
        let progress = &mut running.progress;
        if running.direction == Direction::Save || !progress.piece.is_empty() {
            return;
        }
        if given_up || (progress.ready.is_empty() && progress.awaited == 0) {
            return self.end_load(key, actions);
        }
        if progress.ready.is_empty() {
            return;
        }
        let (piece, items) = progress.ready.drain(..).unzip();
        progress.piece = piece;
        let ((session, job), event) = (key, progress.event);
        actions.push(Action::Copy { session, job, direction: Direction::Load, items, event });
    }

    /// On a disk that has brought nothing for so long, a request is better computed.
    pub(super) fn fail_stalled_loads(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        let Some(ssd) = &self.ssd else { return };
        if !ssd.is_stalled(ssd.limits.ahead_ns.max(ssd.limits.wait_ns), now_ns) {
            return;
        }
        let waiting = self.jobs.iter_mut().filter(|(_, running)| running.progress.awaited > 0);
        let waiting: Vec<JobKey> = waiting
            .map(|(key, running)| {
                running.progress.failed = true;
                *key
            })
            .collect();
        for key in waiting {
            self.next_piece(key, actions);
        }
    }

    /// The second comparison of identity (the first was the lease): every block of the job
    /// must be the very record that was leased, in a format that this worker can read.
    fn prove(
        &self,
        load: &Submitted<'_>,
        lease_id: LeaseId,
        runs: &[LoadRun],
        groups: &[u16],
    ) -> Result<(Vec<RecordId>, Vec<CopyItem>), Refusal> {
        let owner = self.sessions.get(&load.session).ok_or(Refusal::Gone)?;
        let registration = owner.registration.as_ref().ok_or(Refusal::Gone)?;
        let lease = self
            .leases
            .get(lease_id)
            .filter(|lease| lease.engine == owner.engine && lease.uid == owner.uid)
            .filter(|lease| lease.tenant == owner.tenant.name)
            .ok_or(Refusal::Lease)?;
        let mut records = Vec::with_capacity(load.hashes.len());
        let mut items = Vec::with_capacity(load.hashes.len());
        let mut rest = load.hashes.iter().zip(load.blocks);
        for (run, group) in runs.iter().zip(groups) {
            let wanted = &registration.groups[usize::from(*group)];
            let leased = lease.part(run.run, run.first, run.count, run.space).ok_or(Refusal::Lease)?;
            // The leased records first: a zip that ends with its second half would eat one of the first.
            for (id, (hash, block)) in leased.iter().zip(rest.by_ref()) {
                let record = self.store.get(*id).ok_or(Refusal::Lease)?;
                let is_it = record.is_named(run.space, hash)
                    || record.key == BlockKey::new(&owner.tenant.key, run.space, 0, hash);
                let fits = record.format == wanted.format && record.bytes == wanted.record_bytes;
                if !is_it || !fits {
                    return Err(Refusal::Identity);
                }
                if !matches!(record.state, State::Published | State::Reading) {
                    return Err(Refusal::Lease);
                }
                let offset = self.store.offset(*id).ok_or(Refusal::Lease)?;
                let checksum = record.checksum;
                let pool = record.neighbour().map_or(0, |neighbour| neighbour.0);
                items.push(CopyItem { group: *group, block: u64::from(*block), pool, offset, checksum });
                records.push(*id);
            }
        }
        Ok((records, items))
    }

    pub(super) fn copy_done(
        &mut self,
        session: SessionId,
        job: JobId,
        blocks: &[BlockOutcome],
        actions: &mut Vec<Action>,
    ) {
        let Some(running) = self.jobs.get_mut(&(session, job)) else { return };
        if running.direction == Direction::Load {
            return self.piece_done(session, job, blocks, actions);
        }
        debug_assert_eq!(running.records.len(), blocks.len());
        let checksums: Vec<u64> = blocks
            .iter()
            .filter_map(|block| if let BlockOutcome::Copied(sum) = block { Some(*sum) } else { None })
            .collect();
        if running.cancelled || running.reported || checksums.len() != running.records.len() {
            let outcome = if running.cancelled { Outcome::Cancelled } else { Outcome::Failed };
            return self.end_save(session, job, outcome, actions);
        }
        running.checksums = checksums;
        actions.push(Action::TryPublish { session, job, word: running.word, tag: running.tag });
    }

    pub(super) fn publish_tried(
        &mut self,
        session: SessionId,
        job: JobId,
        won: bool,
        actions: &mut Vec<Action>,
    ) {
        if !won {
            self.counters.saves_revoked += 1;
            return self.end_save(session, job, Outcome::Cancelled, actions);
        }
        let Some(mut running) = self.jobs.remove(&(session, job)) else { return };
        let mut blocks = 0;
        let checksums = std::mem::take(&mut running.checksums);
        // Children first. A shim that reads the table meanwhile finds all of the prefix or nothing of it,
        // and the prefix becomes the younger part.
        for (id, checksum) in running.records.iter().zip(checksums).rev() {
            if let Some(record) = self.store.publish(*id, checksum) {
                self.counters.bytes_saved += record.bytes;
                blocks += 1;
                let (key, tenant, index) = (record.key, Arc::clone(&record.tenant), record.index);
                self.announce(&key, &tenant, index, actions);
            }
            // Written is not used: see decision 008.
            self.store.renew(*id);
        }
        self.counters.blocks_saved += u64::from(blocks);
        running.writes_left = self.offer((session, job), &running.records, running.mode);
        if running.writes_left > 0 {
            self.jobs.insert((session, job), running);
            return;
        }
        self.finish(session, job, &running, Outcome::Done, blocks, actions);
    }

    fn end_save(&mut self, session: SessionId, job: JobId, outcome: Outcome, actions: &mut Vec<Action>) {
        let Some(running) = self.jobs.remove(&(session, job)) else { return };
        // Children first, so that no parent is missed by its child's bookkeeping.
        for id in running.records.iter().rev() {
            self.store.abandon(*id);
        }
        self.finish(session, job, &running, outcome, 0, actions);
    }

    fn piece_done(
        &mut self,
        session: SessionId,
        job: JobId,
        blocks: &[BlockOutcome],
        actions: &mut Vec<Action>,
    ) {
        let Some(running) = self.jobs.get_mut(&(session, job)) else { return };
        let piece = std::mem::take(&mut running.progress.piece);
        debug_assert_eq!(piece.len(), blocks.len());
        let mut loaded = 0;
        for (id, block) in piece.iter().zip(blocks) {
            match block {
                BlockOutcome::Copied(_) => loaded += 1,
                BlockOutcome::Corrupt => {
                    self.counters.checksum_failures += 1;
                    if let Some(neighbour) = self.store.get(*id).and_then(Record::neighbour) {
                        // Or its owner gave the place away, as it had not heard from us: that costs it a hit.
                        let offset = self.store.offset(*id).unwrap_or_default();
                        let key = self.store.retire(*id).map(|(key, ..)| key.bytes());
                        actions.extend(key.map(|key| Action::SayDamaged { neighbour, key, offset }));
                        continue;
                    }
                    if let Some((key, tenant, index)) = self.store.retire(*id) {
                        // A copy on the SSD is proved when it is read.
                        self.announce(&key, &tenant, index, actions);
                    }
                }
                BlockOutcome::Unreachable | BlockOutcome::Skipped => {}
            }
        }
        if let Some(running) = self.jobs.get_mut(&(session, job)) {
            running.progress.loaded += loaded;
            running.progress.failed |= loaded as usize != piece.len();
        }
        self.next_piece((session, job), actions);
    }

    /// Nothing of it is being copied, and nothing more will be.
    fn end_load(&mut self, (session, job): JobKey, actions: &mut Vec<Action>) {
        let Some(running) = self.jobs.remove(&(session, job)) else { return };
        let loaded = running.progress.loaded;
        let outcome = match (loaded as usize == running.records.len(), running.cancelled) {
            (_, true) => Outcome::Cancelled,
            (true, false) => Outcome::Done,
            (false, false) => Outcome::Failed,
        };
        if outcome == Outcome::Done && !running.reported {
            self.counters.blocks_loaded += u64::from(loaded);
            let bytes =
                running.records.iter().filter_map(|id| self.store.get(*id)).map(|record| record.bytes);
            self.counters.bytes_loaded += bytes.sum::<u64>();
        }
        if let Some(lease) = running.lease {
            self.leases.job_ended(lease, &mut self.store);
        }
        self.finish(session, job, &running, outcome, loaded, actions);
    }

    pub(super) fn finish(
        &mut self,
        session: SessionId,
        job: JobId,
        running: &Job,
        outcome: Outcome,
        blocks: u32,
        actions: &mut Vec<Action>,
    ) {
        if !running.reported {
            self.count(running.direction, outcome);
        }
        let Some(owner) = self.sessions.get_mut(&session) else { return };
        owner.jobs -= 1;
        if running.registration < owner.registrations {
            owner.leaving -= 1;
        }
        if !owner.detached {
            let outcome = if running.reported { Outcome::AlreadyReported } else { outcome };
            let blocks = if outcome == Outcome::Done { blocks } else { 0 };
            actions.push(Action::Complete { session, job, outcome, quiesced: true, blocks });
        }
        self.if_idle(session, actions);
    }

    pub(super) fn count(&mut self, direction: Direction, outcome: Outcome) {
        let counters = &mut self.counters;
        let counter = match (direction, outcome) {
            (_, Outcome::AlreadyReported) => return,
            (Direction::Load, Outcome::Done) => &mut counters.loads_done,
            (Direction::Load, Outcome::Failed) => &mut counters.loads_failed,
            (Direction::Load, Outcome::Cancelled) => &mut counters.loads_cancelled,
            (Direction::Save, Outcome::Done) => &mut counters.saves_done,
            (Direction::Save, Outcome::Failed) => &mut counters.saves_failed,
            (Direction::Save, Outcome::Cancelled) => &mut counters.saves_cancelled,
        };
        *counter += 1;
    }
}

/// What save and load jobs have in common.
#[derive(Debug)]
pub(super) struct Submitted<'a> {
    pub(super) session: SessionId,
    pub(super) job: JobId,
    pub(super) hashes: &'a [[u8; 32]],
    pub(super) blocks: &'a [u32],
    pub(super) deadline_ns: u64,
    pub(super) event: Option<u32>,
}

/// Why a job is not begun.
#[derive(Debug)]
enum Refusal {
    /// Nobody is left to tell.
    Gone,
    /// A correct client does not do this.
    Protocol(String),
    /// Another namespace, digest or format.
    Identity,
    /// The lease is unknown, over, somebody else's or too short.
    Lease,
    /// Draining, or too many jobs.
    Busy,
}
