//! Sessions: who is let in, what it gets, what is said to it, and its end.

use std::{collections::VecDeque, rc::Rc, sync::Arc};

use pillion_core::{CacheMode, Event, JobId, Outcome, Registration, Role, SessionId};
use pillion_shm::{
    ring::{self, Completion, RingReader, RingWriter},
    words::JobWords,
};

use crate::{
    net::{Conn, Down, End, Shared, Table},
    oracle,
    plan::Sabotage,
    world::World,
};

/// A session as the driver keeps it.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) end: End,
    pub(super) role: Role,
    ring: Option<RingWriter>,
    overflow: VecDeque<Completion>,
    pub(super) words: Option<Arc<JobWords>>,
    /// Bytes of each group's record, in the simulated pool.
    pub(super) record_bytes: Vec<u64>,
    /// As its engine asked.
    pub(super) cache_mode: Option<CacheMode>,
    /// Its connection has ended: nothing more is read.
    pub(super) ended: bool,
}

impl World {
    pub(super) fn admit(&mut self, conn: Conn, role: Role, end: End, engine: Arc<str>, tenant: usize) {
        let (sidecar, now) = (conn.sidecar, self.net.now);
        let (ring_slots, word_slots) = (self.plan.ring_slots, self.plan.word_slots);
        let mixed = self.sabotage == Some(Sabotage::TenantsMixed);
        let tenant = if mixed { 0 } else { tenant };
        let Some(boot) = self.boot(sidecar).filter(|boot| boot.id == conn.boot && !boot.draining) else {
            return self.net.down(end, conn.id, Down::End { in_order: false });
        };
        let mut shared = Shared { neighbours: Rc::clone(&boot.their_tables), ..Shared::default() };
        let (mut ring, mut words) = (None, None);
        if role == Role::Worker {
            let made = Arc::new(JobWords::create(word_slots).expect("a memfd"));
            let writer = RingWriter::create(ring_slots, Arc::clone(&made)).expect("a memfd");
            let fd = writer.memfd().fd().try_clone_to_owned().expect("a descriptor");
            let reader = RingReader::open(fd, ring_slots, Arc::clone(&made)).expect("our own ring");
            (shared.ring, shared.words) = (Some(reader), Some(Arc::clone(&made)));
            (ring, words) = (Some(writer), Some(made));
        }
        let live = Live {
            end,
            role,
            ring,
            overflow: VecDeque::new(),
            words,
            record_bytes: Vec::new(),
            cache_mode: None,
            ended: false,
        };
        let session = SessionId(conn.id);
        boot.sessions.insert(session, live);
        let tenant_of = oracle::tenant(tenant);
        let is_engine = matches!(role, Role::Scheduler | Role::Worker);
        if is_engine {
            self.make_table(sidecar, &tenant_of.name, now);
        }
        if let Some(boot) = self.boot(sidecar) {
            shared.table = boot.tables.borrow().get(&tenant_of.name).cloned();
        }
        self.apply(sidecar, Event::Attached { session, role, engine, uid: 7, tenant: tenant_of });
        if is_engine {
            self.say_served(sidecar, tenant);
        }
        if is_engine {
            self.net.down(end, conn.id, Down::Welcome(Box::new(shared)));
        }
    }

    pub(super) fn make_table(&mut self, sidecar: usize, tenant: &Arc<str>, now: u64) -> bool {
        let slots = self.plan.table_slots;
        let Some(boot) = self.boot(sidecar) else { return false };
        let mut tables = boot.tables.borrow_mut();
        let is_new = !tables.contains_key(tenant);
        if is_new {
            tables.insert(Arc::clone(tenant), Table::new(slots, now));
        }
        is_new
    }

    pub(super) fn register(&mut self, sidecar: usize, session: SessionId, registration: Registration) {
        let scale = self.plan.scale;
        let Some(live) = self.boot(sidecar).and_then(|boot| boot.sessions.get_mut(&session)) else { return };
        live.record_bytes = registration.groups.iter().map(|group| group.record_bytes / scale).collect();
        live.cache_mode = registration.cache_mode;
        let end = live.end;
        self.apply(sidecar, Event::Registered { session, registration });
        self.net.down(end, session.0, Down::Registered);
    }

    pub(super) fn send(&mut self, sidecar: usize, session: SessionId, message: Down) {
        let end = self.boot(sidecar).and_then(|boot| boot.sessions.get(&session)).map(|live| live.end);
        if let Some(end) = end {
            self.net.down(end, session.0, message);
        }
    }

    pub(super) fn session_ended(&mut self, sidecar: usize, session: SessionId) {
        let Some(boot) = self.boot(sidecar) else { return };
        let copies = boot.copies.values().filter(|copy| copy.session == session).count();
        boot.jobs.retain(|(owner, _), _| *owner != session);
        let live = boot.sessions.remove(&session);
        if copies > 0 {
            self.net.broken("I3", || format!("{session:?} ended while {copies} copies run"));
        }
        if let Some(live) = live {
            // Only now the connection is closed: to the client, its end means that nothing touches its memory.
            self.net.down(live.end, session.0, Down::End { in_order: true });
        }
    }

    pub(super) fn complete(
        &mut self,
        sidecar: usize,
        session: SessionId,
        job: JobId,
        outcome: Outcome,
        quiesced: bool,
        blocks: u32,
    ) {
        self.check_completed(sidecar, session, job, outcome, quiesced);
        let lost = self.sabotage == Some(Sabotage::CompletionsLost) && self.disk_dice.permille(200);
        let Some(live) = self.boot(sidecar).and_then(|boot| boot.sessions.get_mut(&session)) else { return };
        let outcome = match outcome {
            Outcome::AlreadyReported => ring::Outcome::None,
            Outcome::Done => ring::Outcome::Done,
            Outcome::Failed => ring::Outcome::Failed,
            Outcome::Cancelled => ring::Outcome::Cancelled,
        };
        if !lost {
            live.overflow.push_back(Completion { job: job.0, outcome, quiesced, blocks });
        }
        live.flush();
    }
}

impl Live {
    /// Moves completions into the ring as far as there is room.
    pub(super) fn flush(&mut self) {
        let Some(ring) = &mut self.ring else { return self.overflow.clear() };
        while let Some(completion) = self.overflow.pop_front() {
            if let Err(completion) = ring.push(completion) {
                return self.overflow.push_front(completion);
            }
        }
    }
}
