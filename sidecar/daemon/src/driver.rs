//! Carries out what the core decides. Lives on one thread, with the sessions.

mod counters;

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap, VecDeque},
    os::fd::OwnedFd,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use pillion_core::{
    Action, Core, Direction, Event, JobId, LeaseRun, NeighbourId, Outcome, Role, SessionId, Tenant,
};
use pillion_cuda::{BlockCopier, ForeignPool, Gpu, HostPool};
use pillion_protocol::{Message, wire};
use pillion_shm::{
    ShmError, clock,
    pidfd::Peer,
    presence::TableWriter,
    ring::{self, Completion, RingWriter},
    words::JobWords,
};
use tokio::sync::{mpsc::UnboundedSender, oneshot};

use self::counters::{metrics_direction, metrics_outcome};
use crate::{
    channel::Outgoing,
    copier::{Copiers, CopyReport, CopyTask},
    lanes::{LaneTask, Lanes},
    metrics::{self, LabelValue, Metrics},
    neighbours::{self, Answer, Neighbours},
    register::Registered,
    ssd::{Recovered, Ssd, Told},
    status::GroupStatus,
};

/// Completions that a worker's ring holds; more than one worker may have jobs.
pub const RING_SLOTS: u32 = 4096;
/// Saves that one worker may have at a time.
pub const WORD_SLOTS: u32 = 1024;
/// Jobs of one worker, at most.
pub const SESSION_JOBS_MAX: usize = 2048;
/// Imports of one session that may be under way or being unmapped.
const IMPORTS_MAX: usize = 8;
/// Bytes that may wait for a client that does not read.
const UNREAD_BYTES_MAX: usize = 8 << 20;

/// What a new session gets.
#[derive(Debug)]
pub struct Tables {
    /// File descriptors for the welcome.
    pub fds: Vec<OwnedFd>,
    /// Seed of the presence table's keys.
    pub index_seed: u64,
}

/// A session as the driver keeps it, until the core says that it has ended.
#[derive(Debug)]
pub struct Live {
    out: UnboundedSender<Outgoing>,
    /// Bytes handed to `out` that the connection has not written.
    pub unread: Rc<std::cell::Cell<usize>>,
    ring: Option<RingWriter>,
    overflow: VecDeque<Completion>,
    words: Option<Arc<JobWords>>,
    mover: Option<Mover>,
    /// Memory that was unregistered, until its last copy has ended.
    leaving: Vec<Mover>,
    /// Imports that are being unmapped, and the last request that is answered when all are.
    unmapping: Vec<u64>,
    let_go: Option<u64>,
    /// The registration that is being carried out on another thread: its request, and the import's number.
    importing: Option<(u64, u64)>,
    /// A request to let go that came meanwhile.
    unregister_next: Option<u64>,
    running: HashMap<JobId, Running>,
    /// For status reports.
    pub view: View,
}

/// What `pillion status` shows of a session.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct View {
    pub role: Role,
    pub peer: Peer,
    pub engine: Arc<str>,
    pub tenant: Arc<str>,
    pub since: Instant,
    pub layout: Option<String>,
    pub num_blocks: u64,
    /// One per group.
    pub record_bytes: Vec<u64>,
    pub groups: Vec<GroupStatus>,
    pub canary: Option<&'static str>,
    pub refused: Option<String>,
}

#[derive(Debug)]
struct Running {
    cancelled: Arc<AtomicBool>,
    begun: Instant,
    direction: Direction,
    bytes: u64,
}

/// How an engine's blocks are moved.
#[derive(Debug)]
pub enum Mover {
    /// By the copy threads.
    Host(BlockCopier),
    /// By threads of its own.
    Device {
        /// Those.
        lanes: Lanes,
        /// Numbers imports.
        import: u64,
    },
}

impl Mover {
    /// How the memory is reached.
    pub fn way(&self) -> &'static str {
        match self {
            Self::Host(copier) => copier.way(),
            Self::Device { lanes, .. } => lanes.way(),
        }
    }

    fn waiting(&self) -> usize {
        match self {
            Self::Host(_) => 0,
            Self::Device { lanes, .. } => lanes.waiting(),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Driver {
    core: Core,
    tables: HashMap<Arc<str>, TableWriter>,
    sessions: BTreeMap<SessionId, Live>,
    /// Sessions that have ended, until their memory is unmapped: to the peer, the end of its connection means that
    /// nothing here has its memory any more.
    ending: HashMap<SessionId, Live>,
    copiers: Copiers,
    /// What others may read.
    pool: Arc<HostPool>,
    /// Those that lend to us.
    pub neighbours: Neighbours,
    stale_ms: u32,
    device: String,
    ssd: Option<Ssd>,
    /// Lease requests that were not answered yet, and when they came.
    asked: HashMap<(SessionId, u64), Instant>,
    gpu: Option<Arc<Gpu>>,
    /// Shared with HTTP.
    pub metrics: Arc<Metrics>,
    presence_slots: u64,
    pool_bytes: u64,
    generation: [u8; 16],
    next_session: u64,
    next_import: u64,
    restarts: u64,
    draining: bool,
    drained: bool,
    last_active: Instant,
    last_stamp: Instant,
}

/// What the driver is made of.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct Parts {
    pub core: Core,
    pub copiers: Copiers,
    pub pool: Arc<HostPool>,
    pub stale_ms: u32,
    pub device: String,
    pub ssd: Option<Ssd>,
    pub gpu: Option<Arc<Gpu>>,
    pub metrics: Arc<Metrics>,
    pub presence_slots: u64,
    pub pool_bytes: u64,
    pub generation: [u8; 16],
    pub restarts: u64,
}

/// The driver as its users hold it: one thread, no locks.
pub type SharedDriver = Rc<RefCell<Driver>>;

impl Driver {
    /// Puts it together.
    pub fn new(parts: Parts) -> Self {
        Self {
            core: parts.core,
            tables: HashMap::new(),
            sessions: BTreeMap::new(),
            ending: HashMap::new(),
            copiers: parts.copiers,
            pool: parts.pool,
            neighbours: Neighbours::default(),
            stale_ms: parts.stale_ms,
            device: parts.device,
            ssd: parts.ssd,
            asked: HashMap::new(),
            gpu: parts.gpu,
            metrics: parts.metrics,
            presence_slots: parts.presence_slots,
            pool_bytes: parts.pool_bytes,
            generation: parts.generation,
            next_session: 0,
            next_import: 0,
            restarts: parts.restarts,
            draining: false,
            drained: false,
            last_active: Instant::now(),
            last_stamp: Instant::now(),
        }
    }

    /// This boot.
    pub fn generation(&self) -> [u8; 16] {
        self.generation
    }

    /// Sessions now.
    pub fn session_count(&self) -> usize {
        self.sessions.len()
    }

    /// Engines attached now.
    pub fn engines(&self) -> usize {
        self.core.engines()
    }

    /// Whether all work has ended after a drain.
    pub fn is_drained(&self) -> bool {
        self.drained
    }

    /// How long no engine has been attached.
    pub fn idle(&self) -> Duration {
        self.last_active.elapsed()
    }

    /// Lets a client in: makes its tables and tells the core.
    ///
    /// # Errors
    /// Where shared memory cannot be had.
    pub fn admit(
        &mut self,
        role: Role,
        peer: Peer,
        engine: Arc<str>,
        tenant: Tenant,
        out: UnboundedSender<Outgoing>,
    ) -> Result<(SessionId, Tables), ShmError> {
        let system = |errno| ShmError::System { call: "dup", errno };
        let duplicate =
            |memfd: &pillion_shm::Memfd| rustix::io::fcntl_dupfd_cloexec(memfd.fd(), 0).map_err(system);
        let name = Arc::clone(&tenant.name);
        let has_table = matches!(role, Role::Scheduler | Role::Worker);
        let is_new = has_table && self.make_table(&name)?;
        let mut fds = Vec::new();
        if let Some(table) = self.tables.get(&name).filter(|_| has_table) {
            fds.push(duplicate(table.memfd())?);
        }
        if role == Role::Neighbour {
            fds.push(duplicate(self.pool.memfd())?);
        }
        let (mut ring, mut words) = (None, None);
        if role == Role::Worker {
            let made = Arc::new(JobWords::create(WORD_SLOTS)?);
            let writer = RingWriter::create(RING_SLOTS, Arc::clone(&made))?;
            fds.push(duplicate(writer.memfd())?);
            if let Some(memfd) = made.memfd() {
                fds.push(duplicate(memfd)?);
            }
            (ring, words) = (Some(writer), Some(made));
        }
        self.next_session += 1;
        let session = SessionId(self.next_session);
        let view = View {
            role,
            peer,
            engine: Arc::clone(&engine),
            tenant: name,
            since: Instant::now(),
            layout: None,
            num_blocks: 0,
            record_bytes: Vec::new(),
            groups: Vec::new(),
            canary: None,
            refused: None,
        };
        let live = Live {
            out,
            unread: Rc::default(),
            ring,
            overflow: VecDeque::new(),
            words,
            mover: None,
            leaving: Vec::new(),
            unmapping: Vec::new(),
            let_go: None,
            importing: None,
            unregister_next: None,
            running: HashMap::new(),
            view,
        };
        self.sessions.insert(session, live);
        let index_seed = tenant.key.index_seed();
        let name = Arc::clone(&tenant.name);
        self.apply(Event::Attached { session, role, engine, uid: peer.uid, tenant });
        if is_new {
            self.show_table_to_all(&name);
            self.neighbours.say_served(&name);
        }
        Ok((session, Tables { fds, index_seed }))
    }

    /// Makes a tenant's presence table. False: it was there.
    fn make_table(&mut self, tenant: &Arc<str>) -> Result<bool, ShmError> {
        if self.tables.contains_key(tenant) {
            return Ok(false);
        }
        self.tables.insert(Arc::clone(tenant), TableWriter::create(self.presence_slots)?);
        Ok(true)
    }

    fn show_table_to_all(&mut self, tenant: &Arc<str>) {
        let borrowers = self.sessions.iter().filter(|(_, live)| live.view.role == Role::Neighbour);
        for borrower in borrowers.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.show_table(borrower, tenant);
        }
    }

    /// A neighbour has engines of a tenant that may have none here: what we have of it, it may borrow.
    ///
    /// # Errors
    /// Where shared memory cannot be had.
    pub fn tenant_served(&mut self, tenant: Tenant) -> Result<(), ShmError> {
        let name = Arc::clone(&tenant.name);
        if self.make_table(&name)? {
            self.apply(Event::TenantServed { tenant });
            self.show_table_to_all(&name);
        }
        Ok(())
    }

    /// A neighbour that has let us in hears for which tenants we may ask it.
    pub fn say_served(&self, neighbour: NeighbourId) {
        for tenant in self.tables.keys() {
            self.neighbours.say_served_to(neighbour, tenant);
        }
    }

    /// Says to a neighbour what we have for a tenant.
    fn show_table(&mut self, session: SessionId, tenant: &Arc<str>) {
        let Some(table) = self.tables.get(tenant) else { return };
        let Ok(fd) = table.memfd().fd().try_clone_to_owned() else { return };
        let message = Message::NeighbourTable(wire::NeighbourTable {
            neighbour: 0,
            tenant: tenant.to_string(),
            stale_ms: self.stale_ms,
            device: self.device.clone(),
        });
        self.send_frame(session, Outgoing::new(&message, vec![fd]));
    }

    /// What a new client must know besides its welcome: a scheduler, what it can have from neighbours; a neighbour,
    /// what we have.
    pub fn introduce_neighbours(&mut self, session: SessionId) {
        let Some(view) = self.sessions.get(&session).map(|live| live.view.clone()) else { return };
        match view.role {
            Role::Scheduler => {
                let of = |id| self.neighbours.introduction(id, &view.tenant);
                for frame in self.neighbours.ids().filter_map(of).collect::<Vec<_>>() {
                    self.send_frame(session, frame);
                }
            }
            Role::Neighbour => {
                for tenant in self.tables.keys().cloned().collect::<Vec<_>>() {
                    self.show_table(session, &tenant);
                }
            }
            Role::Worker | Role::Observer => {}
        }
    }

    /// Schedulers of a tenant may look blocks up in a neighbour's table.
    pub fn introduce(&mut self, neighbour: NeighbourId, tenant: &Arc<str>) {
        for session in self.schedulers(Some(tenant)) {
            if let Some(frame) = self.neighbours.introduction(neighbour, tenant) {
                self.send_frame(session, frame);
            }
        }
    }

    fn schedulers(&self, tenant: Option<&Arc<str>>) -> Vec<SessionId> {
        let wanted =
            |view: &View| view.role == Role::Scheduler && tenant.is_none_or(|tenant| view.tenant == *tenant);
        self.sessions.iter().filter(|(_, live)| wanted(&live.view)).map(|(id, _)| *id).collect()
    }

    /// A neighbour lends from now on.
    pub fn neighbour_came(
        &mut self,
        device: String,
        pool: ForeignPool,
        lease_ms: u32,
        out: UnboundedSender<Outgoing>,
    ) -> NeighbourId {
        let neighbour = self.neighbours.came(device, pool, out);
        let lease_ns = u64::from(lease_ms) * 1_000_000;
        self.apply(Event::NeighbourCame { neighbour, lease_ns });
        neighbour
    }

    /// It does not any more.
    pub fn neighbour_went(&mut self, neighbour: NeighbourId) {
        for session in self.schedulers(None) {
            let gone = wire::NeighbourGone { neighbour: neighbour.0.into() };
            self.send(session, &Message::NeighbourGone(gone));
        }
        let unanswered = self.neighbours.went(neighbour);
        self.apply(Event::NeighbourWent { neighbour });
        self.neighbours_answer(unanswered);
    }

    /// Tells the core what neighbours said.
    pub fn neighbours_answer(&mut self, answer: Option<Answer>) {
        if let Some(Answer { keys, lent }) = answer {
            self.apply(Event::NeighbourAnswered { keys, lent });
        }
    }

    /// Whether the process is about to end.
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// Bytes of the host pool.
    pub fn pool_bytes(&self) -> u64 {
        self.pool_bytes
    }

    /// A session's state.
    pub fn live(&mut self, session: SessionId) -> Option<&mut Live> {
        self.sessions.get_mut(&session)
    }

    /// The device, where one is served.
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        self.gpu.as_ref()
    }

    /// A registration goes on on another thread; the number of its import. `None`: too many are under way.
    pub fn importing(&mut self, session: SessionId, request: u64) -> Option<u64> {
        self.next_import += 1;
        let number = self.next_import;
        let live = self.sessions.get_mut(&session)?;
        if live.unmapping.len() >= IMPORTS_MAX {
            return None;
        }
        if let Some((_, older)) = live.importing.replace((request, number)) {
            // Dropped when it ends; whoever asks to let go waits for that, too.
            live.unmapping.push(older);
        }
        // Whoever asked to let go has presented memory again since.
        live.unregister_next = None;
        Some(number)
    }

    /// It has ended. Whether its result is still wanted.
    pub fn imported(&mut self, session: SessionId, request: u64) -> bool {
        let live = self.sessions.get_mut(&session);
        live.is_some_and(|live| live.importing.take_if(|(newest, _)| *newest == request).is_some())
    }

    /// A worker's memory is about to go away.
    pub fn unregister(&mut self, session: SessionId, request: u64) {
        let Some(live) = self.sessions.get_mut(&session) else { return };
        if live.importing.is_some() {
            live.unregister_next = Some(request);
            return;
        }
        live.leaving.extend(live.mover.take());
        live.view.layout = None;
        self.apply(Event::Unregister { session, request });
    }

    /// Carries out a request to let go that came while the memory was being imported.
    pub fn unregister_if_asked(&mut self, session: SessionId) {
        let asked = self.sessions.get_mut(&session).and_then(|live| live.unregister_next.take());
        if let Some(request) = asked {
            self.unregister(session, request);
        }
    }

    /// Nothing here reaches the memory of an import any more.
    pub fn unmapped(&mut self, session: SessionId, import: u64) {
        if let Some(live) = self.ending.get_mut(&session) {
            live.unmapping.retain(|left| *left != import);
            if live.unmapping.is_empty() {
                self.ending.remove(&session);
            }
        }
        let Some(live) = self.sessions.get_mut(&session) else { return };
        live.unmapping.retain(|left| *left != import);
        self.say_let_go(session);
    }

    /// Every copy of memory that was unregistered has ended.
    fn let_go(&mut self, session: SessionId, request: u64) {
        let Some(live) = self.sessions.get_mut(&session) else { return };
        live.let_go = Some(request);
        live.unmap_leaving();
        self.say_let_go(session);
    }

    fn say_let_go(&mut self, session: SessionId) {
        let Some(live) = self.sessions.get_mut(&session) else { return };
        if live.unmapping.is_empty()
            && let Some(request) = live.let_go.take()
        {
            self.send(session, &Message::Unregistered(wire::Unregistered { request }));
        }
    }

    /// A worker's memory can be moved from now on.
    pub fn registered(&mut self, session: SessionId, request: u64, registered: Registered) {
        let Registered { mover, registration, layout, canary } = registered;
        let record_bytes: Vec<u64> = registration.groups.iter().map(|group| group.record_bytes).collect();
        if let Some(live) = self.sessions.get_mut(&session) {
            live.view.layout = Some(layout);
            live.view.num_blocks = registration.num_blocks;
            live.view.record_bytes.clone_from(&record_bytes);
            live.view.groups = GroupStatus::of_all(&registration.groups);
            live.view.canary = Some(canary);
            live.view.refused = None;
            // A correct client lets go of its memory first. What takes the place of other memory keeps that until
            // the session lets go of all: its copies may still run, and its end waits for every unmap.
            live.leaving.extend(live.mover.replace(mover));
        }
        let answer = wire::Registered { request, record_bytes };
        self.apply(Event::Registered { session, registration });
        self.send(session, &Message::Registered(answer));
    }

    /// Queues a message for a client. One that does not read is dropped.
    pub fn send(&mut self, session: SessionId, message: &Message) {
        self.send_frame(session, Outgoing::new(message, Vec::new()));
    }

    fn send_frame(&mut self, session: SessionId, frame: Outgoing) {
        let Some(live) = self.sessions.get_mut(&session) else { return };
        live.unread.set(live.unread.get() + frame.bytes.len());
        // A closed channel means that the connection is ending already.
        let _ = live.out.send(frame);
    }

    /// Whether a client has let too much pile up.
    pub fn does_not_read(&self, session: SessionId) -> bool {
        self.sessions.get(&session).is_some_and(|live| live.unread.get() > UNREAD_BYTES_MAX)
    }

    /// A scheduler asks for a lease. The answer may have to wait for the SSD.
    pub fn lease(
        &mut self,
        session: SessionId,
        request: u64,
        runs: Vec<LeaseRun>,
        hashes: Vec<[u8; 32]>,
        came: Instant,
    ) {
        self.asked.insert((session, request), came);
        self.apply(Event::Lease { session, request, runs, hashes });
    }

    /// The SSD has been recovered.
    pub fn ssd_recovered(&mut self, recovered: Recovered) {
        let events = self.ssd.as_mut().map(|ssd| ssd.recovered(recovered)).unwrap_or_default();
        events.into_iter().for_each(|event| self.apply(event));
    }

    /// The SSD's threads have something to say.
    pub fn ssd_told(&mut self, told: Told) {
        if let Some(event) = self.ssd.as_mut().and_then(|ssd| ssd.told(told)) {
            self.apply(event);
        }
    }

    /// The SSD, where there is one.
    pub fn ssd(&self) -> Option<&Ssd> {
        self.ssd.as_ref()
    }

    /// Seals what is open on the SSD; see [`Ssd::close`].
    pub fn close_ssd(&mut self) -> Option<oneshot::Receiver<()>> {
        self.ssd.as_mut().and_then(Ssd::close)
    }

    /// Tells the core and does what it wants.
    pub fn apply(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.core.apply(event, clock::monotonic_ns(), &mut actions);
        let mut queue: VecDeque<Action> = actions.into();
        while let Some(action) = queue.pop_front() {
            if let Some(event) = self.carry_out(action) {
                let mut more = Vec::new();
                self.core.apply(event, clock::monotonic_ns(), &mut more);
                // What follows from an answer comes before what was decided earlier.
                for action in more.into_iter().rev() {
                    queue.push_front(action);
                }
            }
        }
    }

    fn carry_out(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::NamespaceOpened { session, request, id } => {
                let opened = wire::NamespaceOpened { request, id: id.0.to_vec() };
                self.send(session, &Message::NamespaceOpened(opened));
            }
            Action::Leased { session, request, lease, blocks } => {
                if let Some(begun) = self.asked.remove(&(session, request)) {
                    self.metrics.lease_answered(begun.elapsed());
                }
                let leased = wire::Leased { request, lease: lease.0.to_vec(), blocks };
                self.send(session, &Message::Leased(leased));
            }
            Action::Copy { session, job, direction, items, event } => {
                self.copy(session, job, direction, items, event);
            }
            Action::Unregistered { session, request } => self.let_go(session, request),
            Action::CancelCopy { session, job } => {
                if let Some(running) = self.sessions.get(&session).and_then(|live| live.running.get(&job)) {
                    running.cancelled.store(true, Ordering::Release);
                }
            }
            Action::TryPublish { session, job, word, tag } => {
                let words = self.sessions.get(&session).and_then(|live| live.words.as_ref());
                let won = words.is_some_and(|words| words.publish(word, tag));
                return Some(Event::PublishTried { session, job, won });
            }
            Action::Complete { session, job, outcome, quiesced, blocks } => {
                self.complete(session, job, outcome, quiesced, blocks);
            }
            Action::TableSet { tenant, key, tiers } => {
                if let Some(table) = self.tables.get_mut(&tenant) {
                    // A key that finds both of its buckets full is left out: a miss, as decision 002 says.
                    table.set(key, tiers);
                }
            }
            Action::TableRemove { tenant, key } => {
                if let Some(table) = self.tables.get_mut(&tenant) {
                    table.remove(key);
                }
            }
            Action::SsdPut { token, record, offset, durable } => {
                return self.ssd.as_mut().and_then(|ssd| ssd.put(token, record, offset, durable));
            }
            Action::SsdGet { token, key, offset, bytes } => {
                return self.ssd.as_ref().and_then(|ssd| ssd.get(token, key, offset, bytes));
            }
            Action::AskNeighbours { questions } => {
                let Answer { keys, lent } = self.neighbours.ask(questions);
                return (!keys.is_empty()).then_some(Event::NeighbourAnswered { keys, lent });
            }
            Action::RenewAt { neighbour, lease } => self.neighbours.renew(neighbour, lease),
            Action::Return { neighbour, lease } => self.neighbours.give_back(neighbour, lease),
            Action::SayDamaged { neighbour, key, offset } => {
                self.neighbours.say_damaged(neighbour, key, offset);
            }
            Action::Lent { session, request, lease, records } => {
                let said = neighbours::borrowed(request, lease, &records);
                self.send(session, &Message::Borrowed(said));
            }
            Action::SessionEnded { session } => {
                self.asked.retain(|(owner, _), _| *owner != session);
                // Dropping it unmaps the engine's memory and closes the channel, which ends the connection.
                if let Some(mut live) = self.sessions.remove(&session) {
                    live.leaving.extend(live.mover.take());
                    live.unmap_leaving();
                    // Dropped when it ends.
                    live.unmapping.extend(live.importing.take().map(|(_, number)| number));
                    if !live.unmapping.is_empty() {
                        self.ending.insert(session, live);
                    }
                }
            }
            Action::ProtocolError { session, text } => {
                let peer = self.sessions.get(&session).map(|live| live.view.peer.pid);
                tracing::warn!(session = session.0, pid = peer, "protocol error: {text}");
                let refused = wire::Refused { request: 0, reason: wire::Reason::Malformed, text };
                self.send(session, &Message::Refused(refused));
            }
            Action::Drained => self.drained = true,
        }
        None
    }

    fn copy(
        &mut self,
        session: SessionId,
        job: JobId,
        direction: Direction,
        items: Vec<pillion_core::CopyItem>,
        event: Option<u32>,
    ) {
        let Some(live) = self.sessions.get_mut(&session) else { return };
        let Some(mover) = &live.mover else { return };
        let of_item = |item: &pillion_core::CopyItem| live.view.record_bytes.get(usize::from(item.group));
        let bytes: u64 = items.iter().filter_map(of_item).sum();
        // A load may come in pieces.
        let running = live.running.entry(job).or_insert_with(|| Running {
            cancelled: Arc::default(),
            begun: Instant::now(),
            direction,
            bytes: 0,
        });
        running.bytes += bytes;
        let cancelled = Arc::clone(&running.cancelled);
        let abroad = items.iter().map(|item| item.pool).filter(|pool| *pool != 0);
        let pools = self.neighbours.pools(abroad);
        match mover {
            Mover::Host(copier) => {
                let copier = copier.clone();
                self.copiers.push(CopyTask { session, job, direction, items, pools, copier, cancelled });
            }
            Mover::Device { lanes, .. } => {
                lanes.push(LaneTask { session, job, direction, items, pools, event, cancelled });
            }
        }
    }

    /// Takes in what a copy thread reports.
    pub fn copied(&mut self, report: CopyReport) {
        let CopyReport { session, job, direction, way, blocks, took } = report;
        let path = metrics::Path::ALL.iter().find(|path| path.text() == way);
        if let Some(path) = path {
            self.metrics.copy_finished(metrics_direction(direction), *path, took);
        }
        self.apply(Event::CopyDone { session, job, blocks });
    }

    fn complete(&mut self, session: SessionId, job: JobId, outcome: Outcome, quiesced: bool, blocks: u32) {
        let Some(live) = self.sessions.get_mut(&session) else { return };
        let reported = match outcome {
            Outcome::AlreadyReported => ring::Outcome::None,
            Outcome::Done => ring::Outcome::Done,
            Outcome::Failed => ring::Outcome::Failed,
            Outcome::Cancelled => ring::Outcome::Cancelled,
        };
        if let (Some(running), Some(outcome)) = (live.running.get(&job), metrics_outcome(outcome)) {
            let Running { begun, direction, bytes, .. } = running;
            self.metrics.job_finished(metrics_direction(*direction), outcome, *bytes, begun.elapsed());
        }
        if quiesced {
            live.running.remove(&job);
        }
        live.overflow.push_back(Completion { job: job.0, outcome: reported, quiesced, blocks });
        live.flush();
    }

    /// Every few milliseconds: stamps, deadlines, completions that found their ring full, metrics.
    pub fn tick(&mut self) {
        let age = self.last_stamp.elapsed();
        self.last_stamp = Instant::now();
        self.metrics.set_stamp_age_max(age);
        // A table that was retired promises nothing any more.
        if !self.draining {
            for table in self.tables.values() {
                table.stamp();
            }
        }
        self.apply(Event::Tick);
        for live in self.sessions.values_mut() {
            live.flush();
        }
        let is_engine = |live: &Live| matches!(live.view.role, Role::Scheduler | Role::Worker);
        if self.sessions.values().any(is_engine) {
            self.last_active = Instant::now();
        }
    }

    /// Stops taking work; the tables promise nothing from now on.
    pub fn drain(&mut self) {
        self.draining = true;
        self.apply(Event::Drain);
        for table in self.tables.values() {
            table.retire();
        }
    }

    /// Ends all sessions, in order.
    pub fn end_sessions(&mut self) {
        let sessions: Vec<_> = self.sessions.keys().copied().collect();
        for session in sessions {
            self.apply(Event::Detached { session });
        }
    }

    /// The sessions, for status reports.
    pub fn views(&self) -> impl Iterator<Item = (SessionId, &View, &'static str, usize)> {
        self.sessions.iter().map(|(id, live)| {
            let way = live.mover.as_ref().map_or("", Mover::way);
            (*id, &live.view, way, live.running.len())
        })
    }
}

impl Live {
    /// Lets go of memory whose copies have ended. Device memory is unmapped by its own threads, which say so.
    fn unmap_leaving(&mut self) {
        for mover in self.leaving.drain(..) {
            if let Mover::Device { import, .. } = &mover {
                self.unmapping.push(*import);
            }
        }
    }

    /// Moves completions into the ring as far as there is room.
    fn flush(&mut self) {
        let Some(ring) = &mut self.ring else { return self.overflow.clear() };
        while let Some(completion) = self.overflow.pop_front() {
            if let Err(completion) = ring.push(completion) {
                return self.overflow.push_front(completion);
            }
        }
    }
}
