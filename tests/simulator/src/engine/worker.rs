//! A worker's half of one rank, as `pillion-client`'s `worker.rs` is: registration, jobs, and the one ending of each.

use std::{collections::BTreeMap, sync::Arc};

use pillion_core::{Event, JobId, LeaseId, LoadRun, Registration, SaveRun, SessionId};
use pillion_shm::{
    ring::{Completion, Outcome, RingReader},
    words::JobWords,
};

use crate::{
    net::{Conn, Down, End, Net, Shared, Up},
    oracle::Hash,
};

/// What became of a job, for the engine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct JobEvent {
    pub(crate) job: JobId,
    /// [`Outcome::None`] if it was told before.
    pub(crate) outcome: Outcome,
    pub(crate) quiesced: bool,
    pub(crate) blocks: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Load,
    Save { slot: u32, tag: u64 },
}

#[derive(Debug)]
struct Job {
    what: What,
    deadline: u64,
    reported: bool,
}

#[derive(Debug)]
struct Memory {
    words: Arc<JobWords>,
    ring: RingReader,
    free: Vec<u32>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Worker {
    pub(crate) link: Link,
    registration: Option<Registration>,
    memory: Option<Memory>,
    ready: bool,
    tag: u64,
    request: u64,
    jobs: BTreeMap<JobId, Job>,
    /// Loads of connections that broke: they quiesce with the process.
    orphans: Vec<(Conn, Vec<JobId>)>,
    events: Vec<JobEvent>,
}

/// The part of a client that every half has: whether a sidecar is there.
#[derive(Debug, Default)]
pub(crate) struct Link {
    pub(crate) conn: Option<Conn>,
    pub(crate) attached: bool,
    pub(crate) alive: bool,
    sequence: u64,
    answered: u64,
}

impl Link {
    /// One that was asked for.
    pub(crate) fn begin(&mut self, conn: Conn) {
        *self = Self { conn: Some(conn), ..Self::default() };
    }

    pub(crate) fn welcomed(&mut self) {
        (self.attached, self.alive) = (true, true);
    }

    /// A heartbeat; after three without an answer nothing new is asked of the sidecar.
    pub(crate) fn beat(&mut self, net: &mut Net) {
        let Some(conn) = self.conn.filter(|_| self.attached) else { return };
        self.sequence += 1;
        net.up(conn, Up::Ping(self.sequence));
        self.alive = self.sequence - self.answered <= 3;
    }

    pub(crate) fn answered(&mut self, sequence: u64) {
        self.answered = self.answered.max(sequence);
        self.alive = true;
    }

    /// Where messages go, if anybody listens.
    pub(crate) fn to(&self) -> Option<Conn> {
        self.conn.filter(|_| self.attached)
    }
}

impl Worker {
    pub(crate) fn new(registration: Registration) -> Self {
        Self { registration: Some(registration), ..Self::default() }
    }

    /// Whether jobs can be submitted.
    pub(crate) fn ready(&self) -> bool {
        self.link.alive && self.ready
    }

    /// Jobs whose blocks something may still touch; those of lost connections apart.
    pub(crate) fn unquiesced(&self) -> usize {
        self.jobs.len()
    }

    fn emit(&mut self, job: JobId, outcome: Outcome, quiesced: bool, blocks: u32) {
        self.events.push(JobEvent { job, outcome, quiesced, blocks });
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one load")]
    pub(crate) fn load(
        &mut self,
        net: &mut Net,
        job: JobId,
        lease: LeaseId,
        runs: Vec<LoadRun>,
        hashes: Vec<Hash>,
        blocks: Vec<u32>,
        deadline_ns: u64,
    ) {
        let Some(conn) = self.link.to().filter(|_| self.ready()) else {
            return self.emit(job, Outcome::Failed, true, 0);
        };
        let session = SessionId(conn.id);
        net.up(
            conn,
            Up::Core(Event::Load { session, job, lease, runs, hashes, blocks, deadline_ns, event: None }),
        );
        self.jobs.insert(job, Job { what: What::Load, deadline: net.now + deadline_ns, reported: false });
    }

    pub(crate) fn save(
        &mut self,
        net: &mut Net,
        job: JobId,
        runs: Vec<SaveRun>,
        hashes: Vec<Hash>,
        blocks: Vec<u32>,
        deadline_ns: u64,
    ) {
        let ready = self.ready();
        let taken = self.link.to().zip(self.memory.as_mut().filter(|_| ready));
        let taken =
            taken.and_then(|(conn, memory)| Some((conn, memory.free.pop()?, Arc::clone(&memory.words))));
        let Some((conn, slot, words)) = taken else { return self.emit(job, Outcome::Cancelled, true, 0) };
        self.tag += 1;
        let (tag, session) = (self.tag, SessionId(conn.id));
        words.hold(slot, tag);
        let word = slot;
        net.up(
            conn,
            Up::Core(Event::Save { session, job, runs, hashes, blocks, word, tag, deadline_ns, event: None }),
        );
        let deadline = net.now + deadline_ns;
        self.jobs.insert(job, Job { what: What::Save { slot, tag }, deadline, reported: false });
    }

    /// What has happened to jobs since the last call.
    pub(crate) fn poll(&mut self, net: &mut Net) -> Vec<JobEvent> {
        self.drain_ring();
        let due = |job: &Job| job.deadline <= net.now && !job.reported;
        let late: Vec<_> =
            self.jobs.iter().filter(|(_, job)| due(job)).map(|(id, job)| (*id, job.what)).collect();
        for (job, what) in late {
            net.saw("deadlines missed", 1);
            if let Some(conn) = self.link.to() {
                net.up(conn, Up::Core(Event::Cancel { session: SessionId(conn.id), job }));
            }
            match what {
                What::Load => self.report_failed(job),
                What::Save { slot, tag } => {
                    let revoked = self.end_save(job, slot, tag);
                    net.saw("saves revoked", u64::from(revoked));
                }
            }
        }
        std::mem::take(&mut self.events)
    }

    fn drain_ring(&mut self) {
        while let Some(completion) = self.memory.as_mut().and_then(|memory| memory.ring.pop()) {
            self.complete(completion);
        }
    }

    fn complete(&mut self, completion: Completion) {
        let Completion { job, outcome, quiesced, blocks } = completion;
        let job = JobId(job);
        let Some(running) = self.jobs.get_mut(&job) else { return };
        if let (What::Save { slot, tag }, false) = (running.what, quiesced) {
            self.end_save(job, slot, tag);
            return;
        }
        let outcome = if running.reported { Outcome::None } else { outcome };
        running.reported |= outcome != Outcome::None;
        if quiesced && let Some(Job { what: What::Save { slot, .. }, .. }) = self.jobs.remove(&job) {
            self.give_back(slot);
        }
        if outcome != Outcome::None || quiesced {
            self.emit(job, outcome, quiesced, blocks);
        }
    }

    fn give_back(&mut self, slot: u32) {
        if let Some(memory) = &mut self.memory {
            memory.free.push(slot);
        }
    }

    /// Whoever wins the word decides (I4).
    fn end_save(&mut self, job: JobId, slot: u32, tag: u64) -> bool {
        let revoked = self.memory.as_ref().is_some_and(|memory| memory.words.revoke(slot, tag));
        let reported = self.jobs.remove(&job).is_some_and(|running| running.reported);
        self.give_back(slot);
        let outcome = match (reported, revoked) {
            (true, _) => Outcome::None,
            (false, true) => Outcome::Cancelled,
            (false, false) => Outcome::Done,
        };
        self.emit(job, outcome, true, 0);
        revoked
    }

    /// A load that is not waited for any more. It still holds its blocks.
    fn report_failed(&mut self, job: JobId) {
        if let Some(running) = self.jobs.get_mut(&job).filter(|running| !running.reported) {
            running.reported = true;
            self.emit(job, Outcome::Failed, false, 0);
        }
    }

    // ---- the connection

    pub(crate) fn heard(&mut self, net: &mut Net, message: Down) {
        match message {
            Down::Welcome(shared) => {
                let Shared { words: Some(words), ring: Some(ring), .. } = *shared else { return };
                self.link.welcomed();
                let free = (0..words.slots()).rev().collect();
                self.memory = Some(Memory { words, ring, free });
                self.present(net);
            }
            Down::Registered => self.ready = self.registration.is_some(),
            Down::Unregistered(request) if request == self.request => self.present(net),
            Down::Pong(sequence) => self.link.answered(sequence),
            Down::End { in_order } => self.lost(net, in_order),
            _ => {}
        }
    }

    fn present(&mut self, net: &mut Net) {
        if let (Some(conn), Some(registration)) = (self.link.to(), &self.registration) {
            net.up(conn, Up::Register(registration.clone()));
        }
    }

    /// Takes the memory away: no new jobs, all of them given up. It is presented again when the sidecar has let go.
    pub(crate) fn sleep(&mut self, net: &mut Net) {
        let Some(conn) = self.link.to().filter(|_| self.ready) else { return };
        self.ready = false;
        self.drain_ring();
        let jobs: Vec<_> = self.jobs.iter().map(|(id, job)| (*id, job.what)).collect();
        for (job, what) in jobs {
            match what {
                What::Save { slot, tag } => drop(self.end_save(job, slot, tag)),
                What::Load => self.report_failed(job),
            }
        }
        self.request += 1;
        net.up(conn, Up::Unregister(self.request));
    }

    /// `in_order`: the sidecar said that nothing of it touches our memory any more.
    pub(crate) fn lost(&mut self, net: &mut Net, in_order: bool) {
        let Some(conn) = self.link.conn else { return };
        self.drain_ring();
        let gone = in_order || !net.is_up(conn.sidecar, conn.boot);
        let jobs: Vec<_> = self.jobs.iter().map(|(id, job)| (*id, job.what)).collect();
        let mut orphans = Vec::new();
        for (job, what) in jobs {
            match what {
                What::Save { slot, tag } => drop(self.end_save(job, slot, tag)),
                What::Load => {
                    let reported = self.jobs.remove(&job).is_some_and(|job| job.reported);
                    let outcome = if reported { Outcome::None } else { Outcome::Failed };
                    if !reported || gone {
                        self.emit(job, outcome, gone, 0);
                    }
                    if !gone {
                        orphans.push(job);
                    }
                }
            }
        }
        if !orphans.is_empty() {
            net.saw("loads orphaned", orphans.len() as u64);
            self.orphans.push((conn, orphans));
        }
        (self.memory, self.ready, self.link) = (None, false, Link::default());
    }

    /// What the link's thread does now and then.
    pub(crate) fn beat(&mut self, net: &mut Net) {
        self.link.beat(net);
        for (conn, jobs) in std::mem::take(&mut self.orphans) {
            if net.is_up(conn.sidecar, conn.boot) {
                self.orphans.push((conn, jobs));
            } else {
                jobs.into_iter().for_each(|job| self.emit(job, Outcome::None, true, 0));
            }
        }
    }

    /// Whether a mute sidecar may still write our blocks.
    pub(crate) fn has_overdue_holds(&self, now: u64) -> bool {
        self.jobs.values().any(|job| job.what == What::Load && job.deadline <= now)
    }

    /// Whose end this is.
    pub(crate) fn end(engine: usize, life: u64, rank: usize) -> End {
        End::Engine { engine, life, rank, half: crate::net::Half::Worker }
    }
}
