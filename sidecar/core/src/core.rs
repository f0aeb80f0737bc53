//! The one owner of the sidecar's state.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use pillion_shm::presence::IndexKey;

use crate::{
    event::{Action, BlockOutcome, CopyItem, Direction, Event, Outcome, Registration, Role},
    ids::{JobId, LeaseId, NamespaceId, SessionId},
    jobs::{Job, JobKey},
    key::{BlockKey, Namespace, Tenant},
    lease::{Lease, Leases},
    store::{NewRecord, Record, RecordId, State, Store},
};

/// Blocks that one lease or job may name.
const MAX_BLOCKS: usize = 65_536;
/// Namespaces that are remembered; beyond it the sidecar refuses new ones until it restarts.
const MAX_NAMESPACES: usize = 65_536;

/// Bounds of everything (I8).
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of the host pool.
    pub pool_bytes: u64,
    /// Bytes of it that leases may pin.
    pub pinned_bytes_max: u64,
    /// Leases at a time.
    pub leases_max: usize,
    /// Jobs of one worker at a time.
    pub session_jobs_max: usize,
    /// Length of a lease.
    pub lease_ns: u64,
    /// Seeds lease ids; random at each boot.
    pub lease_seed: [u8; 32],
    /// This boot.
    pub generation: [u8; 16],
}

/// What has happened since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Counters {
    pub records: u64,
    pub record_bytes: u64,
    pub pinned_bytes: u64,
    pub leases: u64,
    pub jobs: u64,
    pub lease_blocks_asked: u64,
    pub lease_blocks_hit: u64,
    pub leases_granted: u64,
    pub leases_empty: u64,
    pub leases_refused: u64,
    pub leases_expired: u64,
    pub loads_done: u64,
    pub loads_failed: u64,
    pub loads_cancelled: u64,
    pub saves_done: u64,
    pub saves_failed: u64,
    pub saves_cancelled: u64,
    pub saves_revoked: u64,
    pub blocks_loaded: u64,
    pub blocks_saved: u64,
    pub blocks_deduplicated: u64,
    pub blocks_without_room: u64,
    pub bytes_loaded: u64,
    pub bytes_saved: u64,
    pub evictions: u64,
    pub checksum_failures: u64,
    pub identity_mismatches: u64,
    pub deadline_misses: u64,
    pub protocol_errors: u64,
}

#[derive(Debug)]
struct Session {
    role: Role,
    engine: Arc<str>,
    uid: u32,
    tenant: Tenant,
    registration: Option<Registration>,
    jobs: usize,
    detached: bool,
}

/// One session, for status reports.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SessionView {
    pub session: SessionId,
    pub role: Role,
    pub engine: Arc<str>,
    pub tenant: Arc<str>,
    pub jobs: usize,
    pub registered: bool,
}

#[derive(Debug)]
struct Space {
    tenant: Arc<str>,
    namespace: Namespace,
}

/// The state. See the crate's documentation.
#[derive(Debug)]
pub struct Core {
    limits: Limits,
    store: Store,
    leases: Leases,
    sessions: BTreeMap<SessionId, Session>,
    spaces: HashMap<NamespaceId, Space>,
    jobs: HashMap<JobKey, Job>,
    lease_count: u64,
    counters: Counters,
    draining: bool,
    drained: bool,
}

impl Core {
    /// An empty sidecar.
    pub fn new(limits: Limits) -> Self {
        Self {
            store: Store::new(limits.pool_bytes),
            limits,
            leases: Leases::default(),
            sessions: BTreeMap::new(),
            spaces: HashMap::new(),
            jobs: HashMap::new(),
            lease_count: 0,
            counters: Counters::default(),
            draining: false,
            drained: false,
        }
    }

    /// Takes in what happened and appends what is to be done.
    pub fn apply(&mut self, event: Event, now_ns: u64, actions: &mut Vec<Action>) {
        match event {
            Event::Attached { session, role, engine, uid, tenant } => {
                let registration = None;
                let new = Session { role, engine, uid, tenant, registration, jobs: 0, detached: false };
                self.sessions.insert(session, new);
            }
            Event::Detached { session } => self.detach(session, actions),
            Event::OpenNamespace { session, request, namespace, epoch } => {
                self.open_namespace(session, request, namespace, &epoch, actions);
            }
            Event::Registered { session, registration } => {
                if let Some(session) = self.sessions.get_mut(&session) {
                    session.registration = Some(registration);
                }
            }
            Event::Lease { session, request, space, hashes } => {
                self.lease(session, request, space, &hashes, now_ns, actions);
            }
            Event::Renew { session, lease } => {
                if let Some(lease) = self.leases.get_mut(lease).filter(|lease| lease.session == session) {
                    lease.expires_ns = now_ns + self.limits.lease_ns;
                }
            }
            Event::Release { session, lease } => {
                if self.leases.get(lease).is_some_and(|lease| lease.session == session) {
                    self.leases.release(lease, &mut self.store);
                }
            }
            Event::Save { session, job, space, parent, hashes, blocks, word, tag, deadline_ns } => {
                let save = Submitted { session, job, space, hashes: &hashes, blocks: &blocks, deadline_ns };
                self.save(&save, parent, word, tag, actions);
            }
            Event::Load { session, job, lease, first, space, hashes, blocks, deadline_ns } => {
                let load = Submitted { session, job, space, hashes: &hashes, blocks: &blocks, deadline_ns };
                self.load(&load, lease, first, actions);
            }
            Event::Cancel { session, job } => {
                if let Some(running) = self.jobs.get_mut(&(session, job)) {
                    running.cancelled = true;
                    actions.push(Action::CancelCopy { session, job });
                }
            }
            Event::CopyDone { session, job, blocks } => self.copy_done(session, job, &blocks, actions),
            Event::PublishTried { session, job, won } => self.publish_tried(session, job, won, actions),
            Event::Tick => self.tick(now_ns, actions),
            Event::Drain => self.draining = true,
        }
        if self.draining && self.jobs.is_empty() && !self.drained {
            self.drained = true;
            actions.push(Action::Drained);
        }
    }

    /// Counters and gauges.
    pub fn counters(&self) -> Counters {
        Counters {
            records: self.store.len() as u64,
            record_bytes: self.store.used_bytes,
            pinned_bytes: self.store.pinned_bytes,
            leases: self.leases.len() as u64,
            jobs: self.jobs.len() as u64,
            ..self.counters.clone()
        }
    }

    /// The sessions, oldest first.
    pub fn sessions(&self) -> impl Iterator<Item = SessionView> + '_ {
        self.sessions.iter().map(|(id, session)| SessionView {
            session: *id,
            role: session.role,
            engine: Arc::clone(&session.engine),
            tenant: Arc::clone(&session.tenant.name),
            jobs: session.jobs,
            registered: session.registration.is_some(),
        })
    }

    /// Engines that have a living session.
    pub fn engines(&self) -> usize {
        let mut engines: Vec<&str> = self
            .sessions
            .values()
            .filter(|session| session.role != Role::Observer && !session.detached)
            .map(|session| &*session.engine)
            .collect();
        engines.sort_unstable();
        engines.dedup();
        engines.len()
    }

    fn protocol_error(&mut self, session: SessionId, text: String, actions: &mut Vec<Action>) {
        self.counters.protocol_errors += 1;
        actions.push(Action::ProtocolError { session, text });
    }

    fn detach(&mut self, id: SessionId, actions: &mut Vec<Action>) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.detached = true;
        self.leases.session_ended(id, &mut self.store);
        for ((owner, job), running) in &mut self.jobs {
            if *owner == id {
                running.cancelled = true;
                running.reported = true;
                actions.push(Action::CancelCopy { session: id, job: *job });
            }
        }
        self.end_session_if_idle(id, actions);
    }

    fn end_session_if_idle(&mut self, id: SessionId, actions: &mut Vec<Action>) {
        if self.sessions.get(&id).is_some_and(|session| session.detached && session.jobs == 0) {
            self.sessions.remove(&id);
            actions.push(Action::SessionEnded { session: id });
        }
    }

    fn open_namespace(
        &mut self,
        session: SessionId,
        request: u64,
        namespace: Namespace,
        epoch: &[u8],
        actions: &mut Vec<Action>,
    ) {
        let Some(owner) = self.sessions.get(&session) else { return };
        let id = namespace.id(&owner.tenant, epoch);
        let tenant = Arc::clone(&owner.tenant.name);
        if self.spaces.len() >= MAX_NAMESPACES && !self.spaces.contains_key(&id) {
            let text =
                format!("expected at most {MAX_NAMESPACES} namespaces since the start: restart the sidecar");
            return self.protocol_error(session, text, actions);
        }
        self.spaces.insert(id, Space { tenant, namespace });
        actions.push(Action::NamespaceOpened { session, request, id });
    }

    fn lease(
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
        if self.draining || self.leases.len() >= self.limits.leases_max {
            self.counters.leases_refused += 1;
            return actions.push(none);
        }
        let mut records = Vec::new();
        let mut pinned = self.store.pinned_bytes;
        for hash in hashes {
            let key = BlockKey::new(&session.tenant.key, space, 0, hash);
            let Some(record) = self.store.find(&key) else { break };
            let Some(found) = self.store.get(record).filter(|found| found.state == State::Published) else {
                break;
            };
            pinned += found.bytes;
            if pinned > self.limits.pinned_bytes_max {
                break;
            }
            records.push(record);
        }
        if records.is_empty() {
            self.counters.leases_empty += 1;
            return actions.push(none);
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
        self.leases.grant(lease_id, lease, &mut self.store);
        actions.push(Action::Leased { session: id, request, lease: lease_id, blocks });
    }

    /// What save and load jobs must both fulfil; the text says what was expected.
    fn check(&self, submitted: &Submitted<'_>) -> Result<(), Refusal> {
        let Submitted { session, job, space, hashes, blocks, .. } = submitted;
        let owner = self.sessions.get(session).filter(|owner| !owner.detached).ok_or(Refusal::Gone)?;
        let Some(registration) = &owner.registration else {
            return Err(Refusal::Protocol("expected a registration before the first job".into()));
        };
        if hashes.len() != blocks.len() || hashes.is_empty() || hashes.len() > MAX_BLOCKS {
            return Err(Refusal::Protocol(format!(
                "expected 1 to {MAX_BLOCKS} hashes and as many blocks, got {} and {}",
                hashes.len(),
                blocks.len()
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
        let space = self.spaces.get(space);
        if !space.is_some_and(|space| {
            space.tenant == owner.tenant.name && space.namespace == registration.namespace
        }) {
            return Err(Refusal::Identity);
        }
        if self.draining || owner.jobs >= self.limits.session_jobs_max {
            return Err(Refusal::Busy);
        }
        Ok(())
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

    fn save(
        &mut self,
        save: &Submitted<'_>,
        parent: Option<[u8; 32]>,
        word: u32,
        tag: u64,
        actions: &mut Vec<Action>,
    ) {
        if let Err(refusal) = self.check(save) {
            return self.refuse(save, Direction::Save, refusal, actions);
        }
        let Submitted { session, job, space, deadline_ns, .. } = *save;
        let mut records = Vec::new();
        let mut items = Vec::new();
        let mut evicted = Vec::new();
        {
            let Self { sessions, store, counters, limits, .. } = self;
            let Some(owner) = sessions.get_mut(&session) else { return };
            let Some(registration) = &owner.registration else { return };
            let seed = owner.tenant.key.index_seed(&limits.generation);
            let mut parent = parent.map(|hash| BlockKey::new(&owner.tenant.key, space, 0, &hash));
            for (position, (hash, block)) in save.hashes.iter().zip(save.blocks).enumerate() {
                let key = BlockKey::new(&owner.tenant.key, space, 0, hash);
                if store.find(&key).is_some() {
                    counters.blocks_deduplicated += 1;
                    parent = Some(key);
                    continue;
                }
                let new = NewRecord {
                    key,
                    index: IndexKey::new(seed, &space.0, hash),
                    tenant: Arc::clone(&owner.tenant.name),
                    format: Arc::clone(&registration.format),
                    bytes: registration.record_bytes,
                    parent,
                };
                let fits = store.fits(new.bytes);
                let Some(record) = fits.then(|| store.insert(new, &mut evicted)).flatten() else {
                    counters.blocks_without_room += (save.hashes.len() - position) as u64;
                    break;
                };
                let offset = store.offset(record).expect("just inserted");
                items.push(CopyItem { block: u64::from(*block), offset, checksum: 0 });
                records.push(record);
                parent = Some(key);
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
        let direction = Direction::Save;
        let running = Job {
            direction,
            records,
            lease: None,
            word,
            tag,
            deadline_ns,
            reported: false,
            cancelled: false,
            checksums: Vec::new(),
        };
        self.jobs.insert((session, job), running);
        actions.push(Action::Copy { session, job, direction, items, deadline_ns });
    }

    fn announce_evictions(&mut self, evicted: &[Record], actions: &mut Vec<Action>) {
        self.counters.evictions += evicted.len() as u64;
        for record in evicted {
            actions.push(Action::TableRemove { tenant: Arc::clone(&record.tenant), key: record.index });
        }
    }

    fn load(&mut self, load: &Submitted<'_>, lease_id: LeaseId, first: u32, actions: &mut Vec<Action>) {
        let checked = self.check(load).and_then(|()| self.prove(load, lease_id, first));
        let (records, items) = match checked {
            Ok(proved) => proved,
            Err(refusal) => return self.refuse(load, Direction::Load, refusal, actions),
        };
        let Submitted { session, job, deadline_ns, .. } = *load;
        if let Some(lease) = self.leases.get_mut(lease_id) {
            lease.jobs += 1;
        }
        if let Some(owner) = self.sessions.get_mut(&session) {
            owner.jobs += 1;
        }
        let direction = Direction::Load;
        let running = Job {
            direction,
            records,
            lease: Some(lease_id),
            word: 0,
            tag: 0,
            deadline_ns,
            reported: false,
            cancelled: false,
            checksums: Vec::new(),
        };
        self.jobs.insert((session, job), running);
        actions.push(Action::Copy { session, job, direction, items, deadline_ns });
    }

    /// The second comparison of identity (the first was the lease): every block of the job
    /// must be the very record that was leased, in a format that this worker can read.
    fn prove(
        &self,
        load: &Submitted<'_>,
        lease_id: LeaseId,
        first: u32,
    ) -> Result<(Vec<RecordId>, Vec<CopyItem>), Refusal> {
        let owner = self.sessions.get(&load.session).ok_or(Refusal::Gone)?;
        let registration = owner.registration.as_ref().ok_or(Refusal::Gone)?;
        let lease = self
            .leases
            .get(lease_id)
            .filter(|lease| lease.engine == owner.engine && lease.uid == owner.uid)
            .filter(|lease| lease.tenant == owner.tenant.name && lease.space == load.space)
            .ok_or(Refusal::Lease)?;
        let leased = lease
            .records
            .get(first as usize..)
            .and_then(|rest| rest.get(..load.hashes.len()))
            .ok_or(Refusal::Lease)?;
        let mut items = Vec::with_capacity(leased.len());
        for ((id, hash), block) in leased.iter().zip(load.hashes).zip(load.blocks) {
            let record = self.store.get(*id).ok_or(Refusal::Lease)?;
            let key = BlockKey::new(&owner.tenant.key, load.space, 0, hash);
            if record.key != key || record.format != registration.format {
                return Err(Refusal::Identity);
            }
            if record.state != State::Published {
                return Err(Refusal::Lease);
            }
            let offset = self.store.offset(*id).ok_or(Refusal::Lease)?;
            items.push(CopyItem { block: u64::from(*block), offset, checksum: record.checksum });
        }
        Ok((leased.to_vec(), items))
    }

    fn copy_done(
        &mut self,
        session: SessionId,
        job: JobId,
        blocks: &[BlockOutcome],
        actions: &mut Vec<Action>,
    ) {
        let Some(running) = self.jobs.get_mut(&(session, job)) else { return };
        debug_assert_eq!(running.records.len(), blocks.len());
        if running.direction == Direction::Load {
            return self.load_done(session, job, blocks, actions);
        }
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

    fn publish_tried(&mut self, session: SessionId, job: JobId, won: bool, actions: &mut Vec<Action>) {
        if !won {
            self.counters.saves_revoked += 1;
            return self.end_save(session, job, Outcome::Cancelled, actions);
        }
        let Some(mut running) = self.jobs.remove(&(session, job)) else { return };
        let mut blocks = 0;
        let checksums = std::mem::take(&mut running.checksums);
        for (id, checksum) in running.records.iter().zip(checksums) {
            if let Some(record) = self.store.publish(*id, checksum) {
                self.counters.bytes_saved += record.bytes;
                blocks += 1;
                actions.push(Action::TableSet { tenant: Arc::clone(&record.tenant), key: record.index });
            }
        }
        // Children first, as in a lease: the prefix must be the younger part.
        for id in running.records.iter().rev() {
            self.store.touch(*id);
        }
        self.counters.blocks_saved += u64::from(blocks);
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

    fn load_done(
        &mut self,
        session: SessionId,
        job: JobId,
        blocks: &[BlockOutcome],
        actions: &mut Vec<Action>,
    ) {
        let Some(running) = self.jobs.remove(&(session, job)) else { return };
        let mut loaded = 0;
        for (id, block) in running.records.iter().zip(blocks) {
            match block {
                BlockOutcome::Copied(_) => loaded += 1,
                BlockOutcome::Corrupt => {
                    self.counters.checksum_failures += 1;
                    if let Some((tenant, key)) = self.store.retire(*id) {
                        actions.push(Action::TableRemove { tenant, key });
                    }
                }
                BlockOutcome::Unreachable | BlockOutcome::Skipped => {}
            }
        }
        let outcome = match (loaded == running.records.len(), running.cancelled) {
            (_, true) => Outcome::Cancelled,
            (true, false) => Outcome::Done,
            (false, false) => Outcome::Failed,
        };
        if outcome == Outcome::Done && !running.reported {
            self.counters.blocks_loaded += loaded as u64;
            let bytes =
                running.records.iter().filter_map(|id| self.store.get(*id)).map(|record| record.bytes);
            self.counters.bytes_loaded += bytes.sum::<u64>();
        }
        if let Some(lease) = running.lease {
            self.leases.job_ended(lease, &mut self.store);
        }
        self.finish(session, job, &running, outcome, loaded as u32, actions);
    }

    fn finish(
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
        if !owner.detached {
            let outcome = if running.reported { Outcome::AlreadyReported } else { outcome };
            let blocks = if outcome == Outcome::Done { blocks } else { 0 };
            actions.push(Action::Complete { session, job, outcome, quiesced: true, blocks });
        }
        self.end_session_if_idle(session, actions);
    }

    fn count(&mut self, direction: Direction, outcome: Outcome) {
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

    fn tick(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        self.counters.leases_expired += self.leases.expire(now_ns, &mut self.store);
        let late: Vec<JobKey> = self
            .jobs
            .iter()
            .filter(|(_, job)| !job.reported && job.deadline_ns <= now_ns)
            .map(|(key, _)| *key)
            .collect();
        for (session, job) in late {
            let Some(running) = self.jobs.get_mut(&(session, job)) else { continue };
            running.reported = true;
            running.cancelled = true;
            let direction = running.direction;
            self.counters.deadline_misses += 1;
            self.count(direction, Outcome::Failed);
            actions.push(Action::CancelCopy { session, job });
            let outcome = Outcome::Failed;
            actions.push(Action::Complete { session, job, outcome, quiesced: false, blocks: 0 });
        }
    }

    /// Checks what must always hold; for tests.
    #[cfg(test)]
    pub(crate) fn check_invariants(&self) {
        self.store.check();
        for (id, session) in &self.sessions {
            let jobs = self.jobs.keys().filter(|(owner, _)| owner == id).count();
            assert_eq!(jobs, session.jobs, "{id:?}");
        }
    }
}

/// What save and load jobs have in common.
#[derive(Debug)]
struct Submitted<'a> {
    session: SessionId,
    job: JobId,
    space: NamespaceId,
    hashes: &'a [[u8; 32]],
    blocks: &'a [u32],
    deadline_ns: u64,
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

#[cfg(test)]
mod tests;
