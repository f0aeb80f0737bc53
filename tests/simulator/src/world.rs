//! One scenario: everything that takes part in it, and the loop.

use std::sync::{Arc, Mutex};

use pillion_ssd::device::faulty::Disk;

use crate::{
    dice::Dice,
    engine::Engine,
    net::{End, Net, Next, Violation},
    oracle::Oracle,
    plan::{Budget, MS, Plan, Sabotage},
    sidecar::{Boot, tier::disk_of},
};

/// How long everything may take to come to its end when nothing disturbs it any more.
const CALM_NS: u64 = 20_000 * MS;
/// Between two looks of whoever makes trouble.
pub(crate) const TROUBLE_NS: u64 = 20 * MS;

/// What came of a scenario.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What was broken, if anything.
    pub violation: Option<Violation>,
    /// Things that happened.
    pub events: u64,
    /// Faults by kind, in the order of [`crate::Fault::ALL`].
    pub faults: Vec<u64>,
    /// What else was seen, how often: a campaign in which something never happens tests nothing of it.
    pub seen: std::collections::BTreeMap<&'static str, u64>,
    /// Of everything that happened and when: equal for equal courses.
    pub hash: u64,
    /// What was said and done, where it was asked for: nanoseconds and text.
    pub trace: Vec<(u64, String)>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) sabotage: Option<Sabotage>,
    pub(crate) net: Net,
    pub(crate) oracle: Oracle,
    pub(crate) sidecars: Vec<Option<Boot>>,
    pub(crate) disks: Vec<Arc<Mutex<Disk>>>,
    pub(crate) engines: Vec<Engine>,
    pub(crate) boots: u64,
    lives: u64,
    /// Whether each process stands still, and what came for it meanwhile: sidecars, then engines.
    stopped: Vec<Option<Vec<Next>>>,
    pub(crate) disk_until: u64,
    /// The scenario has been played: what stops now does not start again.
    is_over: bool,
    pub(crate) steps_left: u64,
    dice: Dice,
    pub(crate) trouble_dice: Dice,
    pub(crate) copy_dice: Dice,
    pub(crate) disk_dice: Dice,
}

/// Runs the scenario of a seed.
pub fn run(seed: u64, budget: &Budget, sabotage: Option<Sabotage>, traced: bool) -> Outcome {
    let mut world = World::new(seed, budget, sabotage, traced);
    world.play();
    let Net { violation, events, faults, seen, .. } = &mut world.net;
    let (violation, events, faults) = (violation.take(), *events, std::mem::take(faults));
    let seen = std::mem::take(seen);
    Outcome { violation, events, faults, seen, hash: world.net.hash(), trace: world.net.take_trace() }
}

impl World {
    fn new(seed: u64, budget: &Budget, sabotage: Option<Sabotage>, traced: bool) -> Self {
        let dice = Dice::new(seed);
        let plan = Plan::new(seed, budget);
        let segment_bytes = plan.ssd.as_ref().map_or(64 << 10, |ssd| ssd.segment_bytes);
        let mut net = Net::new(&dice, &plan, traced);
        net.say(|| format!("{plan:?}"));
        Self {
            sabotage,
            oracle: Oracle::new(&plan),
            sidecars: (0..plan.sidecars).map(|_| None).collect(),
            disks: (0..plan.sidecars).map(|_| Disk::new(segment_bytes)).collect(),
            engines: Vec::new(),
            boots: 0,
            lives: 0,
            stopped: (0..plan.sidecars + plan.engines.len()).map(|_| None).collect(),
            disk_until: 0,
            is_over: false,
            steps_left: plan.steps,
            trouble_dice: dice.fork(3),
            copy_dice: dice.fork(4),
            disk_dice: dice.fork(5),
            dice,
            net,
            plan,
        }
    }

    fn play(&mut self) {
        for sidecar in 0..self.plan.sidecars {
            self.net.after(0, Next::Start { sidecar });
        }
        for number in 0..self.plan.engines.len() {
            let engine = self.engine(number);
            self.engines.push(engine);
        }
        self.net.after(TROUBLE_NS, Next::Trouble);
        let until = self.net.now + (self.plan.steps + 1) * TROUBLE_NS;
        self.go_on(until, |_| false);
        self.end();
    }

    /// A new life of an engine.
    pub(crate) fn engine(&mut self, number: usize) -> Engine {
        self.lives += 1;
        let life = self.lives;
        self.net.after(self.plan.step_ns, Next::Step { engine: number, life });
        self.net.after(MS, Next::Beat { engine: number, life });
        Engine::new(number, life, &self.plan, &self.dice, self.sabotage)
    }

    /// Until then, or until something holds, or is broken. Whether it holds.
    fn go_on(&mut self, until: u64, mut is_over: impl FnMut(&mut Self) -> bool) -> bool {
        while self.net.violation.is_none() {
            let Some(next) = self.net.pop(until) else { break };
            let is_step = matches!(next, Next::Step { .. } | Next::Tick { .. });
            self.happens(next);
            if is_step && is_over(self) {
                return true;
            }
        }
        false
    }

    /// Whose it is, if a process that stands still does not see it.
    fn process_of(&self, next: &Next) -> Option<usize> {
        match next {
            Next::Up(conn, _) => Some(conn.sidecar),
            Next::Tick { sidecar, .. }
            | Next::Copy { sidecar, .. }
            | Next::Disk { sidecar, .. }
            | Next::Told { sidecar, .. }
            | Next::Recovered { sidecar, .. }
            | Next::Down(End::Sidecar { sidecar, .. }, ..) => Some(*sidecar),
            Next::Step { engine, .. }
            | Next::Beat { engine, .. }
            | Next::Down(End::Engine { engine, .. }, ..) => Some(self.plan.sidecars + engine),
            Next::Start { .. } | Next::Resume { .. } | Next::Trouble => None,
        }
    }

    fn happens(&mut self, next: Next) {
        if let Some(held) = self.process_of(&next).and_then(|process| self.stopped[process].as_mut()) {
            return held.push(next);
        }
        match next {
            Next::Up(conn, message) => {
                if self.net.is_up(conn.sidecar, conn.boot) {
                    self.arrives(conn, message);
                } else if let crate::net::Up::Hello { from, .. } = message {
                    self.net.down(from, conn.id, crate::net::Down::End { in_order: false });
                }
            }
            Next::Down(End::Engine { engine, life, rank, half }, conn, message) => {
                let Self { engines, net, oracle, .. } = self;
                if engines[engine].life == life && !engines[engine].is_dead {
                    engines[engine].heard(net, oracle, rank, half, conn, message);
                }
            }
            Next::Down(End::Sidecar { sidecar, boot, number }, conn, message) => {
                self.neighbour_says(sidecar, boot, number, conn, message);
            }
            Next::Tick { sidecar, boot } if self.net.is_up(sidecar, boot) => self.tick(sidecar),
            Next::Copy { sidecar, boot, copy } if self.net.is_up(sidecar, boot) => {
                self.copy_step(sidecar, copy)
            }
            Next::Disk { sidecar, boot } if self.net.is_up(sidecar, boot) => self.disk_step(sidecar),
            Next::Told { sidecar, boot, event } if self.net.is_up(sidecar, boot) => {
                self.apply(sidecar, *event)
            }
            Next::Recovered { sidecar, boot } if self.net.is_up(sidecar, boot) => self.recovered(sidecar),
            Next::Start { sidecar } if !self.is_over => self.start(sidecar),
            Next::Step { engine, life } if self.engines[engine].life == life => self.step(engine, life),
            Next::Beat { engine, life } if self.engines[engine].life == life => self.beat(engine, life),
            Next::Resume { process } => self.resume(process),
            Next::Trouble => self.trouble(),
            // Of a process that is gone.
            _ => {}
        }
    }

    fn step(&mut self, engine: usize, life: u64) {
        let Self { engines, net, oracle, plan, .. } = self;
        if !engines[engine].is_dead {
            engines[engine].step(net, oracle, plan);
            let delay = net.jitter(plan.step_ns);
            net.after(delay, Next::Step { engine, life });
        }
    }

    fn beat(&mut self, engine: usize, life: u64) {
        let Self { engines, net, plan, .. } = self;
        if !engines[engine].is_dead || engines[engine].jobs_left() > 0 {
            engines[engine].beat(net);
            net.after(plan.beat_ns, Next::Beat { engine, life });
        }
    }

    // ---- processes that stand still

    pub(crate) fn is_paused(&self, process: usize) -> bool {
        self.stopped[process].is_some()
    }

    pub(crate) fn pause(&mut self, process: usize, ns: u64) {
        if !self.is_paused(process) {
            self.stopped[process] = Some(Vec::new());
            self.net.after(ns, Next::Resume { process });
        }
    }

    /// What came meanwhile is seen now, in its order.
    pub(crate) fn resume(&mut self, process: usize) {
        for next in self.stopped[process].take().unwrap_or_default() {
            if self.net.violation.is_none() {
                self.happens(next);
            }
        }
    }

    // ---- the end

    /// Nothing disturbs any more: everything must come to its end, and leave nothing.
    fn end(&mut self) {
        self.plan.calm();
        self.disk_until = 0;
        self.net.say(|| "calm".into());
        for process in 0..self.stopped.len() {
            self.resume(process);
        }
        for disk in &self.disks {
            let mut disk = disk_of(disk);
            (disk.fault, disk.broken, disk.files_max) = (None, None, usize::MAX);
        }
        for sidecar in 0..self.plan.sidecars {
            self.start(sidecar);
        }
        self.is_over = true;
        for engine in &mut self.engines {
            engine.close(&mut self.net);
        }
        let until = self.net.now + CALM_NS;
        let over = |world: &mut Self| world.engines.iter().all(|engine| engine.unfinished() == 0);
        self.must(until, "I2", "jobs, requests and leases of engines end", over);
        for engine in &mut self.engines {
            engine.die(&mut self.net);
        }
        let idle = |world: &mut Self| (0..world.plan.sidecars).all(|sidecar| world.is_idle(sidecar));
        self.must(until, "leak", "sessions, jobs and leases of sidecars end", idle);
        if self.net.violation.is_some() {
            return;
        }
        for sidecar in 0..self.plan.sidecars {
            self.check_idle(sidecar);
            self.drain(sidecar);
        }
        let stopped = |world: &mut Self| world.sidecars.iter().all(Option::is_none);
        self.must(until, "I2", "sidecars stop in order", stopped);
        if self.net.violation.is_some() {
            return;
        }
        for engine in &mut self.engines {
            engine.beat(&mut self.net);
            engine.poll(&mut self.net, CALM_NS);
            let taken = engine.taken();
            if taken > 0 {
                let number = engine.number;
                self.net
                    .broken("leak", || format!("engine {number}: {taken} blocks are not free in the end"));
            }
        }
        for sidecar in 0..self.plan.sidecars {
            self.read_back(sidecar);
        }
    }

    fn must(
        &mut self,
        until: u64,
        invariant: &'static str,
        what: &'static str,
        is_over: impl FnMut(&mut Self) -> bool,
    ) {
        let mut is_over = is_over;
        let holds = is_over(self) || self.go_on(until, &mut is_over);
        if !holds && self.net.violation.is_none() {
            let left: Vec<_> = self.sidecars.iter().flatten().map(Boot::text).collect();
            self.net.broken(invariant, || format!("expected within 20 s of calm: {what}; {left:?}"));
        }
    }

    /// Whether a sidecar has nothing to do for anybody.
    fn is_idle(&self, sidecar: usize) -> bool {
        let Some(boot) = self.sidecars[sidecar].as_ref() else { return true };
        let counters = boot.core.counters();
        let left = [counters.leases, counters.jobs, counters.pinned_bytes, counters.borrows];
        boot.busy() == (0, 0)
            && left == [0; 4]
            && boot.tier.as_ref().is_none_or(|tier| tier.is_idle(self.net.now))
    }
}
