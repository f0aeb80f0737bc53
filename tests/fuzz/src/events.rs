//! The core, whose clients send what they like in any order, and whose surroundings are honest about what they did.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use pillion_core::{
    Action, CacheMode, CopyItem, Core, Direction, Event, Group, JobId, LeaseId, Limits, NeighbourId, Outcome,
    Registration, Role, SessionId, SsdLimits, SsdRecord, Tenant, TenantKey, key::Namespace,
};

use crate::cursor::Cursor;

mod steps;

const POOL_BYTES: u64 = 4 << 20;
const STEPS_MAX: usize = 200;
const SESSIONS_MAX: usize = 24;
const SECOND: u64 = 1_000_000_000;

fn tenant(n: usize) -> Tenant {
    Tenant { name: ["red", "blue"][n % 2].into(), key: TenantKey::new([n as u8 % 2 + 1; 32]) }
}

fn namespace(n: usize) -> Namespace {
    let fields =
        vec![("model".to_owned(), ["m", "n", "o"][n % 3].to_owned()), ("shard".to_owned(), "1/2".to_owned())];
    Namespace::new(fields).expect("different names")
}

#[derive(Debug)]
struct Copy {
    session: SessionId,
    job: JobId,
    direction: Direction,
    items: Vec<CopyItem>,
    /// Where in our pool, until its end.
    places: Vec<(u64, u64)>,
}

#[derive(Debug, Default)]
struct Told {
    submitted: u32,
    ended: u32,
    quiesced: u32,
    /// Under which registration of its session.
    registration: u64,
}

struct World {
    core: Core,
    ssd: Option<SsdLimits>,
    now: u64,
    sessions: Vec<(SessionId, usize)>,
    sizes: HashMap<SessionId, Vec<u64>>,
    blocks: HashMap<SessionId, u64>,
    registrations: u64,
    registered: HashMap<SessionId, u64>,
    next: u64,
    copies: Vec<Copy>,
    puts: Vec<(u64, SsdRecord, u64)>,
    gets: Vec<(u64, [u8; 32], u64, u64)>,
    disk: BTreeMap<[u8; 32], SsdRecord>,
    asked: Vec<[u8; 32]>,
    neighbours: Vec<NeighbourId>,
    leases: Vec<LeaseId>,
    jobs: HashMap<(SessionId, JobId), Told>,
    present: HashMap<(Arc<str>, pillion_shm::presence::IndexKey), u8>,
    won: u8,
}

fn overlaps(one: (u64, u64), other: (u64, u64)) -> bool {
    one.0 < other.0 + other.1 && other.0 < one.0 + one.1
}

fn core(ssd: Option<SsdLimits>) -> Core {
    Core::new(Limits {
        pool_bytes: POOL_BYTES,
        pinned_bytes_max: POOL_BYTES / 8 * 7,
        leases_max: 6,
        session_jobs_max: 6,
        lease_ns: 30 * SECOND,
        lease_seed: [1; 32],
        borrow_wait_ns: SECOND / 5,
        ssd,
    })
}

impl World {
    fn new(c: &mut Cursor<'_>) -> Self {
        let ssd = c.flag().then(|| {
            let mode = *c.pick(&[
                CacheMode::WriteBack,
                CacheMode::WriteThrough,
                CacheMode::WriteAround,
                CacheMode::ReadOnly,
            ]);
            SsdLimits {
                mode,
                records_max: 16,
                offers_max: 8,
                puts_max: 4,
                gets_max: 4,
                ..SsdLimits::for_pool(POOL_BYTES)
            }
        });
        Self::empty(ssd)
    }

    fn empty(ssd: Option<SsdLimits>) -> Self {
        let core = core(ssd.clone());
        Self {
            core,
            ssd,
            now: SECOND,
            sessions: Vec::new(),
            sizes: HashMap::new(),
            blocks: HashMap::new(),
            registrations: 0,
            registered: HashMap::new(),
            next: 0,
            copies: Vec::new(),
            puts: Vec::new(),
            gets: Vec::new(),
            disk: BTreeMap::new(),
            asked: Vec::new(),
            neighbours: Vec::new(),
            leases: vec![LeaseId([0; 16])],
            jobs: HashMap::new(),
            present: HashMap::new(),
            won: 0,
        }
    }

    /// Three engines, each a scheduler and a worker.
    fn engines(&mut self, c: &mut Cursor<'_>) {
        for n in 0..3 {
            let scheduler = self.attach(Role::Scheduler, n);
            let (request, epoch) = (0, Vec::new());
            self.apply(Event::OpenNamespace { session: scheduler, request, namespace: namespace(n), epoch });
            let worker = self.attach(Role::Worker, n);
            self.register(worker, c);
        }
    }

    /// The sidecar is killed and starts again: of all that was, the SSD has what it has.
    fn restart(&mut self, c: &mut Cursor<'_>) {
        let disk = std::mem::take(&mut self.disk);
        let records = disk.values().cloned().collect();
        let (now, next, registrations) = (self.now, self.next, self.registrations);
        *self = Self { now, next, registrations, disk, ..Self::empty(self.ssd.take()) };
        self.apply(Event::SsdFound { records });
        self.engines(c);
    }

    fn apply(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.core.apply(event, self.now, &mut actions);
        let mut queue: std::collections::VecDeque<Action> = actions.into();
        while let Some(action) = queue.pop_front() {
            if let Some(event) = self.carry_out(action) {
                let mut more = Vec::new();
                self.core.apply(event, self.now, &mut more);
                more.into_iter().rev().for_each(|action| queue.push_front(action));
            }
        }
        self.core.check_invariants();
        let counters = self.core.counters();
        assert!(counters.record_bytes <= POOL_BYTES && counters.pinned_bytes <= POOL_BYTES);
    }

    fn carry_out(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Copy { session, job, direction, items, .. } => self.begin(session, job, direction, items),
            Action::TryPublish { session, job, .. } => {
                self.won = self.won.wrapping_add(1);
                return Some(Event::PublishTried { session, job, won: !self.won.is_multiple_of(4) });
            }
            Action::Complete { session, job, outcome, quiesced, .. } => {
                let told = self.jobs.get_mut(&(session, job)).expect("a job that somebody submitted");
                told.ended += u32::from(outcome != Outcome::AlreadyReported);
                told.quiesced += u32::from(quiesced);
                assert!(told.ended <= told.submitted && told.quiesced <= told.submitted, "{told:?}");
            }
            Action::Leased { lease, blocks, .. } if blocks.iter().any(|blocks| *blocks > 0) => {
                self.leases.push(lease);
            }
            Action::Lent { lease, .. } => self.leases.push(lease),
            Action::TableSet { tenant, key, tiers } => {
                assert!(tiers != 0);
                self.present.insert((tenant, key), tiers);
            }
            Action::TableRemove { tenant, key } => {
                assert!(self.present.remove(&(tenant, key)).is_some(), "removed and not there");
            }
            Action::SessionEnded { session } => {
                assert!(self.copies.iter().all(|copy| copy.session != session), "its memory is being copied");
                self.sizes.remove(&session);
            }
            Action::SsdPut { token, record, offset, .. } => {
                self.in_pool((offset, record.bytes));
                self.puts.push((token, *record, offset));
            }
            Action::SsdGet { token, key, offset, bytes } => {
                self.alone((offset, bytes));
                self.gets.push((token, key, offset, bytes));
            }
            Action::AskNeighbours { questions } => {
                self.asked.extend(questions.iter().map(|question| question.key))
            }
            _ => {}
        }
        None
    }

    fn in_pool(&self, (offset, bytes): (u64, u64)) {
        assert!(
            bytes > 0 && offset.checked_add(bytes).is_some_and(|end| end <= POOL_BYTES),
            "{offset} {bytes}"
        );
    }

    /// Nobody else touches what is about to be written.
    fn alone(&self, place: (u64, u64)) {
        self.in_pool(place);
        let copied = self.copies.iter().flat_map(|copy| &copy.places);
        assert!(copied.into_iter().all(|other| !overlaps(place, *other)), "a copy runs there");
        assert!(self.gets.iter().all(|get| !overlaps(place, (get.2, get.3))), "a read of the SSD runs there");
        assert!(
            self.puts.iter().all(|put| !overlaps(place, (put.2, put.1.bytes))),
            "a write to the SSD reads there"
        );
    }

    fn begin(&mut self, session: SessionId, job: JobId, direction: Direction, items: Vec<CopyItem>) {
        let sizes = self.sizes.get(&session).expect("memory that was registered");
        let meant = self.jobs.get(&(session, job)).map(|told| told.registration);
        assert_eq!(meant, self.registered.get(&session).copied(), "memory that came after the job");
        let mut places = Vec::new();
        for item in &items {
            assert!(item.block < self.blocks[&session], "a block that there is not");
            let bytes = *sizes.get(usize::from(item.group)).expect("a group that there is");
            if item.pool != 0 {
                assert_eq!(direction, Direction::Load, "nobody writes a neighbour's pool");
                continue;
            }
            places.push((item.offset, bytes));
        }
        for (index, place) in places.iter().enumerate() {
            if direction == Direction::Save {
                self.alone(*place);
                assert!(
                    places[..index].iter().all(|other| !overlaps(*place, *other)),
                    "two blocks of one save"
                );
            }
            self.in_pool(*place);
            let written = self.copies.iter().filter(|copy| copy.direction == Direction::Save);
            assert!(
                written.flat_map(|copy| &copy.places).all(|other| !overlaps(*place, *other)),
                "written meanwhile"
            );
        }
        self.copies.push(Copy { session, job, direction, items, places });
    }

    fn session(&self, c: &mut Cursor<'_>) -> (SessionId, usize) {
        if self.sessions.is_empty() || c.rarely() {
            return (SessionId(c.number()), 0);
        }
        self.sessions[c.below(self.sessions.len())]
    }

    fn attach(&mut self, role: Role, n: usize) -> SessionId {
        self.next += 1;
        let session = SessionId(self.next);
        let engine = ["e", "f", "g"][n % 3].into();
        self.sessions.push((session, n));
        self.apply(Event::Attached { session, role, engine, uid: 0, tenant: tenant(n) });
        session
    }

    fn register(&mut self, session: SessionId, c: &mut Cursor<'_>) {
        // What the daemon lets through: sizes that it has checked.
        let groups: Vec<Group> = (0..1 + c.below(3))
            .map(|n| Group {
                namespace: namespace(n),
                // Most are alike, so that what one worker saves another can load.
                record_bytes: if c.rarely() { 1 + c.number() % (1 << 20) } else { 512 << 10 },
                format: ["x", "y"][usize::from(c.rarely())].into(),
                load_only: c.rarely(),
            })
            .collect();
        let num_blocks = 1 + u64::from(c.byte());
        let modes =
            [CacheMode::WriteBack, CacheMode::WriteThrough, CacheMode::WriteAround, CacheMode::ReadOnly];
        let cache_mode = c.rarely().then(|| *c.pick(&modes));
        self.sizes.insert(session, groups.iter().map(|group| group.record_bytes).collect());
        self.blocks.insert(session, num_blocks);
        self.registrations += 1;
        self.registered.insert(session, self.registrations);
        self.apply(Event::Registered {
            session,
            registration: Registration { num_blocks, groups, cache_mode },
        });
    }
}

/// Events of hostile clients in any order: what must always hold does; copies stay inside of the pool, write where
/// nobody else is, and touch blocks that there are; each job ends once and is quiet once; when all have gone nothing is
/// leased, pinned or running.
pub fn core_events(data: &[u8]) {
    let mut c = Cursor::new(data, 8192);
    let mut world = World::new(&mut c);
    world.engines(&mut c);
    for _ in 0..STEPS_MAX {
        if c.is_empty() {
            break;
        }
        world.step(&mut c);
    }
    world.settle(&mut c);
    let there: Vec<SessionId> = world.core.sessions().map(|view| view.session).collect();
    for ((session, job), told) in &world.jobs {
        let all = told.ended == told.submitted && told.quiesced == told.submitted;
        assert!(all || !there.contains(session), "{session:?} {job:?}: {told:?}");
    }
    for session in there {
        world.apply(Event::Detached { session });
    }
    // Not only when their time is over.
    assert_eq!(world.core.counters().leases, 0, "leases of sessions that have ended");
    for neighbour in std::mem::take(&mut world.neighbours) {
        world.apply(Event::NeighbourWent { neighbour });
    }
    world.settle(&mut c);
    let counters = world.core.counters();
    let left = (
        counters.jobs,
        counters.leases,
        counters.pinned_bytes,
        counters.borrows,
        world.core.sessions().count(),
    );
    assert_eq!(left, (0, 0, 0, 0, 0), "jobs, leases, pinned bytes, borrows, sessions");
}
