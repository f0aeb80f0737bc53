//! What clients and the core's surroundings do, one step at a time.

use pillion_core::{
    BlockOutcome, CopyItem, Direction, Event, GetEnding, JobId, LeaseId, LeaseRun, Lent, LoadRun,
    NamespaceId, NeighbourId, PutEnding, Role, SaveRun,
};

use super::{Copy, SECOND, SESSIONS_MAX, World, namespace, tenant};
use crate::cursor::Cursor;

fn hash(c: &mut Cursor<'_>) -> [u8; 32] {
    [c.byte() % 24; 32]
}

fn space(c: &mut Cursor<'_>, n: usize) -> NamespaceId {
    if c.rarely() { NamespaceId([c.byte(); 16]) } else { namespace(c.below(3)).id(&tenant(n), b"") }
}

/// Runs and what they count; now and then they do not.
fn counted<T>(
    c: &mut Cursor<'_>,
    mut run: impl FnMut(&mut Cursor<'_>, u32) -> T,
) -> (Vec<T>, Vec<[u8; 32]>, Vec<u32>) {
    let (mut runs, mut hashes, mut blocks) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..1 + c.below(3) {
        let count = c.below(5) as u32;
        let said = if c.rarely() { c.number32() } else { count };
        runs.push(run(c, said));
        hashes.extend((0..count).map(|_| hash(c)));
        blocks.extend((0..count).map(|_| if c.rarely() { c.number32() } else { 0 }));
    }
    (runs, hashes, blocks)
}

impl World {
    fn job(&mut self, c: &mut Cursor<'_>) {
        let (session, n) = self.session(c);
        let job = JobId([c.byte() % 12; 16]);
        let deadline_ns = self.now.saturating_add(if c.rarely() { c.number() } else { 2 * SECOND });
        let event = c.rarely().then(|| c.number32());
        // Only sessions that are there are answered.
        let there = self.core.sessions().any(|view| view.session == session);
        if there || self.jobs.contains_key(&(session, job)) {
            let registration = self.registered.get(&session).copied().unwrap_or(0);
            let told = self.jobs.entry((session, job)).or_default();
            if told.quiesced == told.submitted {
                told.registration = registration;
            }
            told.submitted += 1;
        }
        if c.flag() {
            let save = |c: &mut Cursor<'_>, count| SaveRun {
                space: space(c, n),
                parent: c.flag().then(|| hash(c)),
                count,
            };
            let (runs, hashes, blocks) = counted(c, save);
            let (word, tag) = (c.number32(), c.number());
            self.apply(Event::Save { session, job, runs, hashes, blocks, word, tag, deadline_ns, event });
        } else {
            let lease = *c.pick(&self.leases);
            let load = |c: &mut Cursor<'_>, count| {
                let (run, first) = if c.rarely() { (c.number32(), c.number32()) } else { (0, 0) };
                LoadRun { run, first, space: space(c, n), count }
            };
            let (runs, hashes, blocks) = counted(c, load);
            self.apply(Event::Load { session, job, lease, runs, hashes, blocks, deadline_ns, event });
        }
    }

    pub(super) fn step(&mut self, c: &mut Cursor<'_>) {
        match c.below(20) {
            0 if self.next < SESSIONS_MAX as u64 => {
                let role =
                    *c.pick(&[Role::Scheduler, Role::Worker, Role::Worker, Role::Observer, Role::Neighbour]);
                let session = self.attach(role, c.below(6));
                if role == Role::Worker {
                    self.register(session, c);
                }
            }
            1 if c.rarely() => {
                let (session, _) = self.session(c);
                self.sessions.retain(|(known, _)| *known != session);
                self.apply(Event::Detached { session });
            }
            2 => {
                let (session, n) = self.session(c);
                let epoch = if c.rarely() { vec![1; 16] } else { Vec::new() };
                let namespace = namespace(n);
                self.apply(Event::OpenNamespace { session, request: c.number(), namespace, epoch });
            }
            3 => {
                let (session, _) = self.session(c);
                if self.core.sessions().any(|view| view.session == session && view.role == Role::Worker) {
                    self.register(session, c);
                }
            }
            4 if c.rarely() => {
                let (session, _) = self.session(c);
                self.apply(Event::Unregister { session, request: c.number() });
            }
            5..=8 => self.job(c),
            9 | 10 => {
                let (session, n) = self.session(c);
                let (runs, hashes, _) = counted(c, |c, count| LeaseRun { space: space(c, n), count });
                self.apply(Event::Lease { session, request: c.number(), runs, hashes });
            }
            11 => {
                let ((session, _), lease) = (self.session(c), *c.pick(&self.leases));
                let event = if c.flag() {
                    Event::Renew { session, lease }
                } else {
                    Event::Release { session, lease }
                };
                self.apply(event);
            }
            12 => {
                let (session, _) = self.session(c);
                self.apply(Event::Cancel { session, job: JobId([c.byte() % 12; 16]) });
            }
            13 => {
                self.now = self.now.saturating_add(match c.byte() {
                    0..=127 => SECOND / 10,
                    128..=250 => 2 * SECOND,
                    _ => 40 * SECOND,
                });
                self.apply(Event::Tick);
            }
            14 => {
                let (session, _) = self.session(c);
                let keys = c.some(4, hash);
                self.apply(Event::Borrow { session, request: c.number(), keys });
            }
            15 => {
                let (session, _) = self.session(c);
                let key = self.disk.keys().next().copied().unwrap_or_else(|| hash(c));
                self.apply(Event::Damaged { session, key, offset: c.number() });
            }
            16 => self.neighbour(c),
            17 => self.apply(Event::TenantServed { tenant: tenant(c.below(2)) }),
            18 if c.rarely() => self.apply(Event::Drain),
            18 if c.rarely() && self.ssd.is_some() => self.restart(c),
            _ => self.surroundings(c),
        }
    }

    fn neighbour(&mut self, c: &mut Cursor<'_>) {
        match c.below(4) {
            0 => {
                let neighbour = NeighbourId(1 + c.below(3) as u32);
                if !self.neighbours.contains(&neighbour) {
                    self.neighbours.push(neighbour);
                    self.apply(Event::NeighbourCame { neighbour, lease_ns: 30 * SECOND });
                }
            }
            1 if !self.neighbours.is_empty() && c.rarely() => {
                let neighbour = self.neighbours.swap_remove(c.below(self.neighbours.len()));
                self.apply(Event::NeighbourWent { neighbour });
            }
            _ => self.answer(c, false),
        }
    }

    /// What a neighbour says: anything of what it was asked.
    fn answer(&mut self, c: &mut Cursor<'_>, nothing: bool) {
        let count = if nothing { self.asked.len() } else { c.below(self.asked.len() + 1) };
        let keys: Vec<[u8; 32]> = self.asked.drain(..count).collect();
        if keys.is_empty() {
            return;
        }
        let by = (!nothing && !self.neighbours.is_empty()).then(|| *c.pick(&self.neighbours));
        let lent = by.map(|neighbour| {
            let lent = keys.iter().map(|_| {
                (!c.rarely()).then(|| Lent {
                    offset: c.number(),
                    bytes: 1 + c.number() % (1 << 20),
                    checksum: c.number(),
                    format: ["x", "y"][usize::from(c.rarely())].into(),
                })
            });
            let lent = lent.collect();
            (neighbour, LeaseId([c.byte(); 16]), lent)
        });
        self.apply(Event::NeighbourAnswered { keys, lent });
    }

    /// A copy or a piece of the SSD's work ends.
    fn surroundings(&mut self, c: &mut Cursor<'_>) {
        match c.below(4) {
            0 | 1 => self.copied(c, false),
            2 => self.put(c, false),
            _ => self.got(c, false),
        }
    }

    fn copied(&mut self, c: &mut Cursor<'_>, well: bool) {
        if self.copies.is_empty() {
            return;
        }
        let Copy { session, job, direction, items, .. } = self.copies.swap_remove(c.below(self.copies.len()));
        let outcome = |_: &CopyItem| match c.byte() {
            _ if well => BlockOutcome::Copied(1),
            240..=243 => BlockOutcome::Skipped,
            244..=247 => BlockOutcome::Unreachable,
            248.. if direction == Direction::Load => BlockOutcome::Corrupt,
            sum => BlockOutcome::Copied(sum.into()),
        };
        let blocks = items.iter().map(outcome).collect();
        self.apply(Event::CopyDone { session, job, blocks });
    }

    fn put(&mut self, c: &mut Cursor<'_>, well: bool) {
        if self.puts.is_empty() {
            return;
        }
        let (token, record, _) = self.puts.swap_remove(c.below(self.puts.len()));
        let ending = if c.rarely() && !well { PutEnding::Failed } else { PutEnding::Stored };
        if ending == PutEnding::Stored {
            self.disk.insert(record.key, record);
        }
        self.apply(Event::SsdPutEnded { token, ending });
    }

    fn got(&mut self, c: &mut Cursor<'_>, well: bool) {
        if self.gets.is_empty() {
            return;
        }
        // A disk has a pace, by which leases reach further than what has come.
        self.now = self.now.saturating_add(SECOND / 200);
        let (token, key, ..) = self.gets.swap_remove(c.below(self.gets.len()));
        let known = self.disk.get(&key).map(|record| GetEnding::Loaded(record.checksum));
        let ending = match c.byte() {
            0..=239 => known.unwrap_or(GetEnding::Gone),
            _ if well => known.unwrap_or(GetEnding::Gone),
            240..=247 => GetEnding::Busy,
            248..=251 => GetEnding::Corrupt,
            _ => GetEnding::Gone,
        };
        if matches!(ending, GetEnding::Corrupt | GetEnding::Gone) {
            self.disk.remove(&key);
        }
        self.apply(Event::SsdGetEnded { token, ending });
    }

    /// All that is under way ends, with time where it takes some.
    pub(super) fn settle(&mut self, c: &mut Cursor<'_>) {
        for round in 0..200 {
            while !self.copies.is_empty() {
                self.copied(c, true);
            }
            while !self.puts.is_empty() {
                self.put(c, true);
            }
            while !self.gets.is_empty() {
                self.got(c, true);
            }
            self.answer(c, true);
            // Leases are to outlive this where nothing waits for time to pass.
            self.now = self.now.saturating_add(if round < 3 { 1 } else { 60 * SECOND });
            self.apply(Event::Tick);
            let idle = self.copies.is_empty()
                && self.puts.is_empty()
                && self.gets.is_empty()
                && self.asked.is_empty();
            if idle && self.core.counters().jobs == 0 {
                return;
            }
        }
        panic!("something never ends: {:?}", self.core.counters());
    }
}
