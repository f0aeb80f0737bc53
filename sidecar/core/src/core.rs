//! The one owner of the sidecar's state.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use crate::{
    event::{Action, Event, Outcome, Registration, Role},
    ids::{NamespaceId, SessionId},
    jobs::{Job, JobKey},
    key::{Namespace, Tenant},
    lease::Leases,
    neighbours::Neighbours,
    ssd::{Ssd, SsdLimits},
    store::Store,
};

mod grant;
mod neighbours;
mod ssd;
mod wait;
mod work;

use wait::Wait;
use work::Submitted;

/// Blocks that one lease or job may name.
const MAX_BLOCKS: usize = 65_536;
/// Runs that one lease or job may have.
const MAX_RUNS: usize = 1024;
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
    /// How long a lease waits for neighbours' answers before it is granted without them.
    pub borrow_wait_ns: u64,
    /// Of the SSD; `None`: there is none.
    pub ssd: Option<SsdLimits>,
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
    pub leases_waited: u64,
    pub leases_cut_short: u64,
    pub leases_ahead: u64,
    pub ssd_records: u64,
    pub ssd_records_hidden: u64,
    pub ssd_writes_waiting: u64,
    pub ssd_blocks_written: u64,
    pub ssd_bytes_written: u64,
    pub ssd_not_written: u64,
    pub ssd_writes_failed: u64,
    pub ssd_blocks_read: u64,
    pub ssd_bytes_read: u64,
    pub ssd_reads_failed: u64,
    pub ssd_corrupt: u64,
    pub ssd_dropped: u64,
    pub ssd_foreign: u64,
    pub ssd_not_indexed: u64,
    pub borrows: u64,
    pub neighbour_blocks_here: u64,
    pub neighbour_blocks_asked: u64,
    pub neighbour_blocks_borrowed: u64,
    pub neighbour_blocks_lent: u64,
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
    /// Counts its registrations.
    registrations: u64,
    /// The last request to let go of memory, until that can be answered.
    unregister: Option<u64>,
    /// Jobs of memory that was unregistered.
    leaving: usize,
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
///
/// The same events at the same times come to the same actions: whatever is iterated has an order.
#[derive(Debug)]
pub struct Core {
    limits: Limits,
    store: Store,
    leases: Leases,
    ssd: Option<Ssd>,
    neighbours: Neighbours,
    /// Lease requests that wait for the SSD or neighbours, oldest first.
    waits: BTreeMap<u64, Wait>,
    wait_count: u64,
    /// What they still lack.
    wait_bytes: u64,
    /// Tenants that have attached since the start.
    tenants: BTreeMap<Arc<str>, Tenant>,
    sessions: BTreeMap<SessionId, Session>,
    spaces: HashMap<NamespaceId, Space>,
    jobs: BTreeMap<JobKey, Job>,
    lease_count: u64,
    load_count: u64,
    counters: Counters,
    draining: bool,
    drained: bool,
}

impl Core {
    /// An empty sidecar.
    pub fn new(limits: Limits) -> Self {
        Self {
            store: Store::new(limits.pool_bytes, limits.ssd.is_some()),
            ssd: limits.ssd.clone().map(Ssd::new),
            neighbours: Neighbours::default(),
            limits,
            leases: Leases::default(),
            waits: BTreeMap::new(),
            wait_count: 0,
            wait_bytes: 0,
            tenants: BTreeMap::new(),
            sessions: BTreeMap::new(),
            spaces: HashMap::new(),
            jobs: BTreeMap::new(),
            lease_count: 0,
            load_count: 0,
            counters: Counters::default(),
            draining: false,
            drained: false,
        }
    }

    /// Takes in what happened and appends what is to be done.
    pub fn apply(&mut self, event: Event, now_ns: u64, actions: &mut Vec<Action>) {
        match event {
            Event::Attached { session, role, engine, uid, tenant } => {
                let new = Session {
                    role,
                    engine,
                    uid,
                    tenant,
                    registration: None,
                    jobs: 0,
                    detached: false,
                    registrations: 0,
                    unregister: None,
                    leaving: 0,
                };
                // Who only observes, or speaks for many, has no table.
                if !matches!(role, Role::Observer | Role::Neighbour) {
                    self.tenants.insert(Arc::clone(&new.tenant.name), new.tenant.clone());
                }
                self.sessions.insert(session, new);
                self.reveal(actions);
            }
            Event::TenantServed { tenant } => {
                self.tenants.entry(Arc::clone(&tenant.name)).or_insert(tenant);
                self.reveal(actions);
            }
            Event::Detached { session } => self.detach(session, actions),
            Event::OpenNamespace { session, request, namespace, epoch } => {
                self.open_namespace(session, request, namespace, &epoch, actions);
            }
            Event::Registered { session, registration } => self.registered(session, registration, actions),
            Event::Unregister { session, request } => self.unregister(session, request, actions),
            Event::Lease { session, request, runs, hashes } => {
                self.lease(session, request, &runs, &hashes, now_ns, actions);
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
            Event::Save { session, job, runs, hashes, blocks, word, tag, deadline_ns, event } => {
                let (hashes, blocks) = (&*hashes, &*blocks);
                let save = Submitted { session, job, hashes, blocks, deadline_ns, event };
                self.save(&save, &runs, word, tag, actions);
            }
            Event::Load { session, job, lease, runs, hashes, blocks, deadline_ns, event } => {
                let (hashes, blocks) = (&*hashes, &*blocks);
                let load = Submitted { session, job, hashes, blocks, deadline_ns, event };
                self.load(&load, lease, &runs, actions);
            }
            Event::Cancel { session, job } => {
                if let Some(running) = self.jobs.get_mut(&(session, job)) {
                    running.cancelled = true;
                    actions.push(Action::CancelCopy { session, job });
                    self.next_piece((session, job), actions);
                }
            }
            Event::CopyDone { session, job, blocks } => self.copy_done(session, job, &blocks, actions),
            Event::PublishTried { session, job, won } => self.publish_tried(session, job, won, actions),
            Event::Tick => self.tick(now_ns, actions),
            Event::Drain => {
                self.draining = true;
                self.refuse_waits(actions);
            }
            Event::SsdFound { records } => self.ssd_found(records, actions),
            Event::SsdPutEnded { token, ending } => self.put_ended(token, ending, actions),
            Event::SsdGetEnded { token, ending } => self.get_ended(token, ending, now_ns, actions),
            Event::SsdDropped { key } => self.ssd_dropped(&key, actions),
            Event::NeighbourCame { neighbour, lease_ns } => self.neighbours.came(neighbour, lease_ns),
            Event::NeighbourWent { neighbour } => self.neighbour_went(neighbour, actions),
            Event::NeighbourAnswered { keys, lent } => self.neighbour_answered(&keys, lent, now_ns, actions),
            Event::Borrow { session, request, keys } => self.lend(session, request, &keys, now_ns, actions),
            Event::Damaged { session, key, offset } => self.damaged(session, &key, offset, actions),
        }
        self.pump_ssd(now_ns, actions);
        self.grant_settled(now_ns, actions);
        self.ask_what_is_lacking(actions);
        self.give_back(actions);
        let is_idle = self.jobs.is_empty() && self.ssd.as_ref().is_none_or(Ssd::is_idle);
        if self.draining && is_idle && !self.drained {
            self.drained = true;
            actions.push(Action::Drained);
        }
    }

    /// Counters and gauges.
    pub fn counters(&self) -> Counters {
        let (ssd_records, ssd_hidden) = self.ssd.as_ref().map_or((0, 0), Ssd::counts);
        let waiting = self.ssd.as_ref().map_or(0, |ssd| ssd.offers.len() + ssd.puts.len());
        Counters {
            records: self.store.len() as u64,
            record_bytes: self.store.used_bytes,
            pinned_bytes: self.store.pinned_bytes,
            leases: self.leases.len() as u64,
            jobs: self.jobs.len() as u64,
            ssd_records: ssd_records as u64,
            ssd_records_hidden: ssd_hidden as u64,
            ssd_writes_waiting: waiting as u64,
            borrows: self.neighbours.borrowed() as u64,
            neighbour_blocks_here: self.store.foreign() as u64,
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
            .filter(|session| !matches!(session.role, Role::Observer | Role::Neighbour) && !session.detached)
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
        self.forget_waits(id);
        self.leases.session_ended(id, &mut self.store);
        self.give_up_jobs(id, true, actions);
        self.if_idle(id, actions);
    }

    /// Memory that takes the place of other memory: jobs that were submitted for that are given up. A piece of a load
    /// that is still to come would be copied by the new memory's layout, which may say that its record is longer.
    fn registered(&mut self, id: SessionId, registration: Registration, actions: &mut Vec<Action>) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if session.registration.replace(registration).is_some() {
            session.registrations += 1;
            session.leaving = session.jobs;
            self.give_up_jobs(id, false, actions);
        }
    }

    fn unregister(&mut self, id: SessionId, request: u64, actions: &mut Vec<Action>) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.registration = None;
        session.registrations += 1;
        session.unregister = Some(request);
        // Those of this registration, and what is left of earlier ones.
        session.leaving = session.jobs;
        self.give_up_jobs(id, false, actions);
        self.if_idle(id, actions);
    }

    fn give_up_jobs(&mut self, id: SessionId, is_gone: bool, actions: &mut Vec<Action>) {
        let mut jobs = Vec::new();
        for ((owner, job), running) in &mut self.jobs {
            if *owner == id {
                running.cancelled = true;
                running.reported |= is_gone;
                actions.push(Action::CancelCopy { session: id, job: *job });
                jobs.push((id, *job));
            }
        }
        for job in jobs {
            self.next_piece(job, actions);
        }
    }

    /// What waits for the last copy of a session.
    fn if_idle(&mut self, id: SessionId, actions: &mut Vec<Action>) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if session.leaving == 0
            && let Some(request) = session.unregister.take()
        {
            actions.push(Action::Unregistered { session: id, request });
        }
        if session.detached && session.jobs == 0 {
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

    fn tick(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        self.reveal(actions);
        self.grant_overdue(now_ns, actions);
        self.renew_borrows(now_ns, actions);
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
            self.next_piece((session, job), actions);
        }
        self.fail_stalled_loads(now_ns, actions);
    }

    /// Checks what must always hold; for tests.
    ///
    /// # Panics
    /// Where it does not.
    #[cfg(any(test, feature = "checked"))]
    pub fn check_invariants(&self) {
        self.store.check();
        self.check_waits();
        self.neighbours.check(&self.store.borrowed());
        if let Some(ssd) = &self.ssd {
            ssd.check();
        }
        for (id, session) in &self.sessions {
            let jobs = self.jobs.keys().filter(|(owner, _)| owner == id).count();
            assert_eq!(jobs, session.jobs, "{id:?}");
            let of_earlier = |running: &Job| running.registration < session.registrations;
            let leaving = self.jobs.iter().filter(|((owner, _), job)| owner == id && of_earlier(job)).count();
            assert_eq!(leaving, session.leaving, "{id:?}");
        }
    }
}

#[cfg(test)]
mod tests;
