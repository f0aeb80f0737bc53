//! A sidecar's process: the shipped core, and the driver around it as `sidecar/daemon`'s `driver.rs` is.
//!
//! Everything that the core is told and everything that it wants goes through [`World::apply`] and
//! [`World::carry_out`]: a new event or action is at home there.

mod checks;
pub(crate) mod copies;
mod neighbours;
mod readback;
mod sessions;
pub(crate) mod tier;

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, VecDeque},
    rc::Rc,
    sync::Arc,
};

use pillion_core::{Action, CHUNK_BYTES, Core, Event, JobId, Limits, Role, SessionId, SsdLimits};

use crate::{
    dice::mix,
    net::{Conn, Down, End, Next, Tables, Up},
    plan::{MS, Plan, Sabotage},
    pool::Pool,
    world::World,
};
use checks::Accepted;
use copies::Copy;
use neighbours::Neighbour;
use sessions::Live;
use tier::Tier;

/// How often a sidecar's clock ticks.
pub(crate) const TICK_NS: u64 = 20 * MS;

/// One boot of a sidecar.
#[derive(Debug)]
pub(crate) struct Boot {
    pub(crate) id: u64,
    pub(crate) core: Core,
    limits: Limits,
    record_bytes_max: u64,
    pub(crate) pool: Rc<Pool>,
    tables: Tables,
    /// What the table must say, key by key; the table may lack some.
    shown: BTreeMap<(Arc<str>, u64), u8>,
    sessions: BTreeMap<SessionId, Live>,
    copies: BTreeMap<u64, Copy>,
    next_copy: u64,
    pub(crate) tier: Option<Tier>,
    jobs: BTreeMap<(SessionId, JobId), Accepted>,
    /// Places in the pool where a bit was changed, until something else lies there.
    rotten: BTreeSet<u64>,
    /// Tenants with engines here.
    served: BTreeSet<usize>,
    neighbours: BTreeMap<u32, Neighbour>,
    /// Their tables, for schedulers.
    their_tables: Rc<RefCell<BTreeMap<u32, Tables>>>,
    next_neighbour: u32,
    next_look: u64,
    pub(crate) draining: bool,
    pub(crate) drained: bool,
}

impl Boot {
    fn new(id: u64, plan: &Plan) -> Self {
        let pool_bytes = plan.pool_chunks * CHUNK_BYTES;
        let mut lease_seed = [7; 32];
        lease_seed[..8].copy_from_slice(&id.to_le_bytes());
        let limits = Limits {
            pool_bytes,
            pinned_bytes_max: pool_bytes * plan.pinned_share / 10,
            leases_max: plan.leases_max,
            session_jobs_max: plan.session_jobs_max,
            lease_ns: plan.lease_ns,
            lease_seed,
            borrow_wait_ns: plan.borrow_wait_ns,
            ssd: plan.ssd.as_ref().map(|ssd| SsdLimits {
                mode: ssd.mode,
                wait_ns: ssd.wait_ns,
                ahead_ns: ssd.ahead_ns,
                records_max: ssd.records_max,
                offers_max: ssd.offers_max,
                puts_max: ssd.in_flight_max,
                put_bytes_max: pool_bytes / 4,
                gets_max: ssd.in_flight_max,
                get_bytes_max: pool_bytes / 4,
            }),
        };
        Self {
            id,
            core: Core::new(limits.clone()),
            limits,
            record_bytes_max: plan.groups.iter().map(|group| group.bytes * plan.scale).max().unwrap_or(0),
            pool: Rc::new(Pool::new(pool_bytes / plan.scale)),
            tables: Rc::default(),
            shown: BTreeMap::new(),
            sessions: BTreeMap::new(),
            copies: BTreeMap::new(),
            next_copy: 0,
            tier: None,
            jobs: BTreeMap::new(),
            rotten: BTreeSet::new(),
            served: BTreeSet::new(),
            neighbours: BTreeMap::new(),
            their_tables: Rc::default(),
            next_neighbour: 0,
            next_look: 0,
            draining: false,
            drained: false,
        }
    }

    /// What is left to do, for people.
    pub(crate) fn text(&self) -> String {
        let (sessions, jobs, copies) = (self.sessions.len(), self.jobs.len(), self.copies.len());
        format!(
            "{sessions} sessions, {jobs} jobs, {copies} copies, drained: {}, {:?}",
            self.drained, self.tier
        )
    }

    /// Sessions of engines, and copies that run.
    pub(crate) fn busy(&self) -> (usize, usize) {
        let is_engine = |live: &&Live| matches!(live.role, Role::Scheduler | Role::Worker);
        (self.sessions.values().filter(is_engine).count(), self.copies.len())
    }
}

impl World {
    pub(crate) fn boot(&mut self, sidecar: usize) -> Option<&mut Boot> {
        self.sidecars[sidecar].as_mut()
    }

    /// A process starts, on whatever its disk holds.
    pub(crate) fn start(&mut self, sidecar: usize) {
        if self.sidecars[sidecar].is_some() {
            return;
        }
        self.boots += 1;
        let id = self.boots;
        self.net.say(|| format!("sidecar {sidecar} starts, boot {id}"));
        self.sidecars[sidecar] = Some(Boot::new(id, &self.plan));
        self.net.boots[sidecar] = Some(id);
        self.net.after(TICK_NS, Next::Tick { sidecar, boot: id });
        self.start_tier(sidecar);
    }

    /// A process is gone, at once and without a word.
    pub(crate) fn kill(&mut self, sidecar: usize) {
        let Some(mut boot) = self.sidecars[sidecar].take() else { return };
        self.net.boots[sidecar] = None;
        if let Some(tier) = &mut boot.tier {
            tier.killed(&mut self.disk_dice);
        }
        boot.neighbours.values().for_each(|neighbour| self.net.up(neighbour.conn, Up::End));
        self.count(&boot);
        self.say_ended(sidecar, boot.id, false);
    }

    /// Everybody who is connected to a boot, or was about to be, learns that it ended.
    fn say_ended(&mut self, sidecar: usize, boot: u64, in_order: bool) {
        let mut ends = Vec::new();
        for engine in &mut self.engines {
            let (number, life) = (engine.number, engine.life);
            let conns = engine.conns().into_iter();
            let of_it = conns.filter(|(.., conn)| (conn.sidecar, conn.boot) == (sidecar, boot));
            ends.extend(
                of_it.map(|(rank, half, conn)| (End::Engine { engine: number, life, rank, half }, conn)),
            );
        }
        for (end, conn) in ends {
            self.net.down(end, conn.id, Down::End { in_order });
        }
        self.part_all(sidecar, boot);
    }

    /// Something arrives at a sidecar.
    pub(crate) fn arrives(&mut self, conn: Conn, message: Up) {
        let (sidecar, session) = (conn.sidecar, SessionId(conn.id));
        if let Up::Hello { role, from, engine, tenant } = message {
            return self.admit(conn, role, from, engine, tenant);
        }
        let now = self.net.now;
        let Some(boot) = self.boot(sidecar).filter(|boot| boot.id == conn.boot) else { return };
        let Some(live) = boot.sessions.get_mut(&session).filter(|live| !live.ended) else { return };
        let end = live.end;
        match message {
            Up::Core(mut event) => {
                if let Event::Save { deadline_ns, .. } | Event::Load { deadline_ns, .. } = &mut event {
                    *deadline_ns += now;
                }
                self.apply(sidecar, event);
            }
            Up::Register(registration) => self.register(sidecar, session, registration),
            Up::Unregister(request) => self.apply(sidecar, Event::Unregister { session, request }),
            Up::TenantServed(tenant) => self.tenant_served(sidecar, tenant),
            Up::Ping(sequence) => self.net.down(end, conn.id, Down::Pong(sequence)),
            Up::End => {
                live.ended = true;
                self.apply(sidecar, Event::Detached { session });
            }
            Up::Hello { .. } => {}
        }
    }

    /// Tells the core and does what it wants.
    pub(crate) fn apply(&mut self, sidecar: usize, event: Event) {
        let now = self.net.now;
        if !matches!(event, Event::Tick) {
            self.net.say(|| format!("sidecar {sidecar} <- {event:?}"));
        }
        self.accept(sidecar, &event);
        let is_tick = matches!(event, Event::Tick);
        let Some(boot) = self.boot(sidecar) else { return };
        let mut actions = Vec::new();
        boot.core.apply(event, now, &mut actions);
        let mut queue: VecDeque<Action> = actions.into();
        while let Some(action) = queue.pop_front() {
            self.net.say(|| format!("sidecar {sidecar} -> {action:?}"));
            self.net.note(summary(&action));
            let Some(event) = self.carry_out(sidecar, action) else { continue };
            let mut more = Vec::new();
            if let Some(boot) = self.boot(sidecar) {
                boot.core.apply(event, now, &mut more);
            }
            // What follows from an answer comes before what was decided earlier.
            more.into_iter().rev().for_each(|action| queue.push_front(action));
        }
        self.check_bounds(sidecar, is_tick);
    }

    fn carry_out(&mut self, sidecar: usize, action: Action) -> Option<Event> {
        match action {
            Action::NamespaceOpened { session, request, id } => {
                self.send(sidecar, session, Down::Opened { request, id });
            }
            Action::Leased { session, request, lease, blocks } => {
                self.send(sidecar, session, Down::Leased { request, lease, blocks });
            }
            Action::Copy { session, job, direction, items, .. } => {
                self.begin_copy(sidecar, session, job, direction, items);
            }
            Action::Unregistered { session, request } => {
                let copies =
                    self.boot(sidecar)?.copies.values().filter(|copy| copy.session == session).count();
                if copies > 0 {
                    self.net.broken("I3", || "memory was let go of while copies run".into());
                }
                self.send(sidecar, session, Down::Unregistered(request));
            }
            Action::CancelCopy { session, job } => {
                let copies = self.boot(sidecar)?.copies.values_mut();
                copies
                    .filter(|copy| (copy.session, copy.job) == (session, job))
                    .for_each(|copy| copy.cancelled = true);
            }
            Action::TryPublish { session, job, word, tag } => {
                let live = self.boot(sidecar)?.sessions.get(&session);
                let words = live.and_then(|live| live.words.as_ref());
                let mut won = words.is_some_and(|words| words.publish(word, tag));
                won |= self.sabotage == Some(Sabotage::WordIgnored);
                if won {
                    self.check_published(sidecar, session, job);
                }
                return Some(Event::PublishTried { session, job, won });
            }
            Action::Complete { session, job, outcome, quiesced, blocks } => {
                self.complete(sidecar, session, job, outcome, quiesced, blocks);
            }
            Action::TableSet { tenant, key, tiers } => {
                let boot = self.boot(sidecar)?;
                boot.shown.insert((Arc::clone(&tenant), index(key)), tiers);
                let table = boot.tables.borrow().get(&tenant).cloned()?;
                let found = table.borrow_mut().writer.set(key, tiers);
                self.net.saw("presence table full", u64::from(!found));
            }
            Action::TableRemove { tenant, key } => {
                let boot = self.boot(sidecar)?;
                let was_there = boot.shown.remove(&(Arc::clone(&tenant), index(key))).is_some();
                let table = boot.tables.borrow().get(&tenant).cloned();
                if let Some(table) = table {
                    table.borrow_mut().writer.remove(key);
                }
                if !was_there {
                    self.net.broken("table", || format!("{key:?} of {tenant} is removed and was not there"));
                }
            }
            Action::SsdPut { token, record, offset, durable } => {
                self.ssd_put(sidecar, token, *record, offset, durable);
            }
            Action::SsdGet { token, key, offset, bytes } => self.ssd_get(sidecar, token, key, offset, bytes),
            Action::AskNeighbours { questions } => return self.ask_neighbours(sidecar, questions),
            Action::RenewAt { neighbour, lease } => {
                self.tell_neighbour(sidecar, neighbour, |session| Event::Renew { session, lease });
            }
            Action::Return { neighbour, lease } => {
                self.tell_neighbour(sidecar, neighbour, |session| Event::Release { session, lease });
            }
            Action::SayDamaged { neighbour, key, offset } => {
                self.tell_neighbour(sidecar, neighbour, |session| Event::Damaged { session, key, offset });
            }
            Action::Lent { session, request, lease, records } => {
                self.send(sidecar, session, Down::Lent { request, lease, records });
            }
            Action::SessionEnded { session } => self.session_ended(sidecar, session),
            Action::ProtocolError { session, text } => {
                // Who asks for what it does not have may be told so.
                let told = self.plan.rate(crate::plan::Fault::WrongAsked) > 0;
                if !told {
                    self.net.broken("protocol", || format!("{session:?}: {text}"));
                }
            }
            Action::Drained => self.boot(sidecar)?.drained = true,
        }
        None
    }

    /// Every few milliseconds: stamps, deadlines, completions that found their ring full.
    pub(crate) fn tick(&mut self, sidecar: usize) {
        let now = self.net.now;
        let Some(boot) = self.boot(sidecar) else { return };
        let id = boot.id;
        if !boot.draining {
            boot.tables.borrow().values().for_each(|table| table.borrow_mut().stamp_ns = now);
        }
        self.apply(sidecar, Event::Tick);
        if let Some(boot) = self.boot(sidecar) {
            boot.sessions.values_mut().for_each(Live::flush);
        }
        self.look_around(sidecar);
        if self.stop_if_drained(sidecar) {
            return;
        }
        self.net.after(TICK_NS, Next::Tick { sidecar, boot: id });
    }

    /// Stops taking work.
    pub(crate) fn drain(&mut self, sidecar: usize) {
        let Some(boot) = self.boot(sidecar).filter(|boot| !boot.draining) else { return };
        boot.draining = true;
        boot.tables.borrow().values().for_each(|table| table.borrow_mut().stamp_ns = 0);
        self.apply(sidecar, Event::Drain);
    }

    /// After a drain: the sessions end, the SSD is sealed, the process ends. Whether it did.
    fn stop_if_drained(&mut self, sidecar: usize) -> bool {
        let Some(boot) = self.boot(sidecar).filter(|boot| boot.drained) else { return false };
        let (id, sessions): (u64, Vec<_>) = (boot.id, boot.sessions.keys().copied().collect());
        for session in sessions {
            self.apply(sidecar, Event::Detached { session });
        }
        let Some(boot) = self.boot(sidecar).filter(|boot| boot.sessions.is_empty()) else { return false };
        if let Some(tier) = boot.tier.as_mut()
            && !tier.close()
        {
            self.schedule_disk(sidecar);
            return false;
        }
        self.net.say(|| format!("sidecar {sidecar} has stopped in order"));
        let stopped = self.sidecars[sidecar].take();
        if let Some(boot) = stopped {
            boot.neighbours.values().for_each(|neighbour| self.net.up(neighbour.conn, Up::End));
            self.count(&boot);
        }
        self.net.boots[sidecar] = None;
        self.say_ended(sidecar, id, true);
        if self.steps_left > 0 {
            self.net.after(50 * MS, Next::Start { sidecar });
        }
        true
    }
}

/// What an action does, in a number: for the trace's hash.
fn summary(action: &Action) -> u64 {
    match action {
        Action::Copy { items, .. } => {
            items.iter().fold(1, |sum, item| mix(sum ^ item.offset ^ item.block << 40))
        }
        Action::Leased { lease, blocks, .. } => {
            let lease = u64::from(lease.0[0]) << 32;
            blocks.iter().fold(lease | 2, |sum, blocks| mix(sum ^ u64::from(*blocks)))
        }
        Action::Complete { outcome, quiesced, blocks, .. } => {
            u64::from(*blocks) << 8 | (*outcome as u64) << 4 | u64::from(*quiesced) << 2 | 3
        }
        Action::SsdPut { token, offset, .. } => mix(*token ^ offset << 8),
        Action::SsdGet { token, offset, .. } => mix(*token ^ offset << 9),
        Action::TableSet { key, tiers, .. } => index(*key) ^ u64::from(*tiers),
        Action::TableRemove { key, .. } => index(*key),
        Action::AskNeighbours { questions } => questions.len() as u64 | 1 << 40,
        Action::Lent { records, .. } => records.iter().flatten().count() as u64 | 1 << 41,
        _ => 4,
    }
}

fn index(key: pillion_shm::presence::IndexKey) -> u64 {
    // It has no order of its own.
    let mut hasher = std::hash::DefaultHasher::new();
    std::hash::Hash::hash(&key, &mut hasher);
    std::hash::Hasher::finish(&hasher)
}
