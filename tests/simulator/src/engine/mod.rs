//! A model engine: a scheduler with its block pool, and a worker on each rank, with the promises of the shim
//! (`integrations/pillion/vllm`): a job holds its blocks from plan to quiesced, a failed load is computed in fresh
//! blocks, what is free is reused at once. What is freed is overwritten, so that a late read or write is seen.

mod lookup;
mod requests;
pub(crate) mod worker;

use std::collections::{BTreeMap, BTreeSet};

use pillion_core::{JobId, Registration};
use pillion_shm::ring::Outcome;

use crate::{
    dice::{Dice, mix},
    net::{Down, End, Half, Net, Up},
    oracle::{self, Hash, Oracle, Space, content},
    plan::{Plan, Sabotage},
    pool::Cell,
};
use lookup::Lookup;
use requests::Request;
use worker::{JobEvent, Link, Worker};

/// One rank's memory and processes.
#[derive(Debug)]
struct Rank {
    sidecar: usize,
    memory: Vec<Cell>,
    lookup: Lookup,
    worker: Worker,
}

/// A job as the scheduler's half keeps it: what it holds, and what the ranks have said.
#[derive(Debug)]
struct Job {
    load: bool,
    request: u64,
    /// Held (I3).
    blocks: Vec<u32>,
    /// What each of them holds or shall hold: group and hash.
    what: Vec<(usize, Hash)>,
    tickets: Vec<u64>,
    deadline: u64,
    /// Per rank: reported, quiesced.
    ranks: Vec<(bool, bool)>,
    failed: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) number: usize,
    pub(crate) life: u64,
    tenant: usize,
    model: usize,
    epoch: u64,
    ranks: Vec<Rank>,
    /// References to each block.
    references: Vec<u32>,
    free: Vec<u32>,
    requests: BTreeMap<u64, Request>,
    next_request: u64,
    jobs: BTreeMap<JobId, Job>,
    minted: u64,
    held: usize,
    limit: usize,
    /// What saves carry: group and hash.
    saving: BTreeSet<(usize, Hash)>,
    canaries: u64,
    dice: Dice,
    /// Whether requests still arrive.
    pub(crate) is_open: bool,
    pub(crate) is_dead: bool,
    sabotage: Option<Sabotage>,
}

impl Engine {
    pub(crate) fn new(
        number: usize,
        life: u64,
        plan: &Plan,
        dice: &Dice,
        sabotage: Option<Sabotage>,
    ) -> Self {
        let (tenant, model, sidecars) = &plan.engines[number];
        let rank = |(shard, sidecar): (usize, &usize)| {
            let of_group = |group| Space {
                tenant: *tenant,
                model: *model,
                epoch: 0,
                group,
                shard,
                shards: sidecars.len(),
            };
            let spaces: Vec<Space> = (0..plan.groups.len()).map(of_group).collect();
            let groups = spaces.iter().zip(&plan.groups);
            let groups = groups.map(|(space, group)| oracle::group(space, group, plan.scale)).collect();
            let registration =
                Registration { num_blocks: plan.blocks.into(), groups, cache_mode: plan.cache_modes[number] };
            Rank {
                sidecar: *sidecar,
                memory: vec![[0; 2]; plan.blocks as usize],
                lookup: Lookup::new(spaces, plan),
                worker: Worker::new(registration),
            }
        };
        Self {
            number,
            life,
            tenant: *tenant,
            model: *model,
            epoch: 0,
            ranks: sidecars.iter().enumerate().map(rank).collect(),
            references: vec![0; plan.blocks as usize],
            free: (0..plan.blocks).collect(),
            requests: BTreeMap::new(),
            next_request: 0,
            jobs: BTreeMap::new(),
            minted: 0,
            held: 0,
            limit: (u64::from(plan.blocks) * plan.hold_permille / 1000).max(1) as usize,
            saving: BTreeSet::new(),
            canaries: 0,
            dice: dice.fork(100 + life),
            is_open: true,
            is_dead: false,
            sabotage,
        }
    }

    fn space(&self, rank: usize, group: usize) -> Space {
        let (tenant, model, epoch, shards) = (self.tenant, self.model, self.epoch, self.ranks.len());
        Space { tenant, model, epoch, group, shard: rank, shards }
    }

    // ---- what sidecars do to its memory

    /// What a copy reads.
    pub(crate) fn cell(&self, rank: usize, block: u64) -> Option<Cell> {
        self.ranks.get(rank)?.memory.get(block as usize).copied()
    }

    /// A copy writes half of a block (I3).
    pub(crate) fn written(
        &mut self,
        net: &mut Net,
        job: JobId,
        rank: usize,
        block: u64,
        half: usize,
        word: u64,
    ) {
        let held = self.jobs.get(&job).is_some_and(|job| job.load && job.blocks.contains(&(block as u32)));
        if !held {
            let number = self.number;
            net.broken("I3", || {
                format!("engine {number}: {job:?} writes block {block} that it does not hold")
            });
        }
        if let Some(cell) = self.ranks[rank].memory.get_mut(block as usize) {
            cell[half] = word;
        }
    }

    // ---- blocks

    fn allocate(&mut self) -> Option<u32> {
        let block = self.free.pop()?;
        self.references[block as usize] = 1;
        Some(block)
    }

    fn let_go(&mut self, blocks: impl IntoIterator<Item = u32>) {
        for block in blocks {
            self.references[block as usize] -= 1;
            if self.references[block as usize] > 0 {
                continue;
            }
            self.canaries += 1;
            let canary = mix(self.life << 32 | self.canaries);
            self.ranks.iter_mut().for_each(|rank| rank.memory[block as usize] = [canary, !canary]);
            self.free.push(block);
        }
    }

    /// Takes a hold and mints the job's id.
    fn open_job(&mut self, mut job: Job) -> JobId {
        job.blocks.iter().for_each(|block| self.references[*block as usize] += 1);
        job.ranks = vec![(false, false); self.ranks.len()];
        self.held += job.blocks.len();
        self.minted += 1;
        let mut id = [0; 16];
        // Its first bytes are what a trace shows.
        id[..2].copy_from_slice(&(self.life as u16).to_be_bytes());
        id[2..8].copy_from_slice(&self.minted.to_be_bytes()[2..]);
        id[2..4].copy_from_slice(&(self.minted as u16).to_be_bytes());
        id[8..].copy_from_slice(&self.minted.to_be_bytes());
        self.jobs.insert(JobId(id), job);
        JobId(id)
    }

    fn close_job(&mut self, net: &mut Net, id: JobId) {
        let Some(job) = self.jobs.remove(&id) else { return };
        self.held -= job.blocks.len();
        if !job.load {
            self.saving.retain(|saved| !job.what.contains(saved));
        }
        for (rank, ticket) in self.ranks.iter_mut().zip(&job.tickets) {
            rank.lookup.release(net, *ticket);
        }
        self.let_go(job.blocks);
    }

    // ---- what workers report

    pub(crate) fn poll(&mut self, net: &mut Net, grace_ns: u64) {
        for rank in 0..self.ranks.len() {
            for event in self.ranks[rank].worker.poll(net) {
                self.report(net, rank, event);
            }
        }
        let late = |job: &&Job| job.deadline + grace_ns < net.now && job.ranks.iter().any(|rank| !rank.0);
        if let Some(job) = self.jobs.values().find(late) {
            let text =
                format!("a job's outcome is not known {} ns after its deadline", net.now - job.deadline);
            net.broken("I2", || text);
        }
    }

    fn report(&mut self, net: &mut Net, rank: usize, event: JobEvent) {
        let JobEvent { job: id, outcome, quiesced, blocks } = event;
        let Some(job) = self.jobs.get_mut(&id) else {
            if self.sabotage.is_none() {
                net.broken("I2", || format!("{id:?} ended again: {outcome:?}, quiesced: {quiesced}"));
            }
            return;
        };
        let said = &mut job.ranks[rank];
        if (said.0 && outcome != Outcome::None)
            || (said.1 && quiesced)
            || (quiesced && outcome == Outcome::None && !said.0)
        {
            net.broken("I2", || {
                format!("{id:?} on rank {rank}: {outcome:?}, quiesced: {quiesced}, said {said:?}")
            });
        }
        said.1 |= quiesced;
        let complete = !job.load || blocks as usize == job.blocks.len();
        let is_done = outcome == Outcome::Done && complete;
        if outcome != Outcome::None {
            said.0 = true;
            job.failed |= !is_done;
        }
        let (is_load, request, failed) = (job.load, job.request, job.failed);
        let (all_reported, all_quiesced) =
            (job.ranks.iter().all(|rank| rank.0), job.ranks.iter().all(|rank| rank.1));
        let now_reported = outcome != Outcome::None && all_reported;
        if is_load && is_done {
            self.check_loaded(net, rank, id);
        }
        if is_load && now_reported {
            net.saw(if failed { "loads failed" } else { "loads done" }, 1);
            self.load_ended(net, request, id, !failed);
        }
        if !is_load && now_reported {
            net.saw(if failed { "saves failed" } else { "saves done" }, 1);
        }
        let early = self.sabotage == Some(Sabotage::HoldsEndEarly) && all_reported;
        if all_quiesced || early {
            self.close_job(net, id);
        }
    }

    /// I1: what is reported as loaded is exactly what was to be there.
    fn check_loaded(&self, net: &mut Net, rank: usize, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        for (block, (group, hash)) in job.blocks.iter().zip(&job.what) {
            let wanted = content(&self.space(rank, *group), hash);
            let found = self.ranks[rank].memory[*block as usize];
            if found != wanted {
                let number = self.number;
                let text = || {
                    format!(
                        "engine {number}, rank {rank}: {id:?} loaded {found:x?} into block {block}, expected {wanted:x?}"
                    )
                };
                return net.broken("I1", text);
            }
        }
        net.saw("blocks loaded and compared", job.blocks.len() as u64);
    }

    // ---- connections

    fn link(&mut self, rank: usize, half: Half) -> &mut Link {
        let rank = &mut self.ranks[rank];
        match half {
            Half::Scheduler => &mut rank.lookup.link,
            Half::Worker => &mut rank.worker.link,
        }
    }

    /// A heartbeat of every connection; those that are lost are tried again now and then.
    pub(crate) fn beat(&mut self, net: &mut Net) {
        for rank in 0..self.ranks.len() {
            self.ranks[rank].lookup.beat(net);
            self.ranks[rank].worker.beat(net);
            for half in [Half::Scheduler, Half::Worker] {
                self.attach(net, rank, half);
            }
        }
    }

    fn attach(&mut self, net: &mut Net, rank: usize, half: Half) {
        let sidecar = self.ranks[rank].sidecar;
        let Some(boot) = net.boots[sidecar] else { return };
        if self.link(rank, half).conn.is_some() || self.is_dead || !self.dice.permille(700) {
            return;
        }
        let conn = net.connect(sidecar, boot);
        self.link(rank, half).begin(conn);
        let from = match half {
            Half::Scheduler => End::Engine { engine: self.number, life: self.life, rank, half },
            Half::Worker => Worker::end(self.number, self.life, rank),
        };
        let role = match half {
            Half::Scheduler => pillion_core::Role::Scheduler,
            Half::Worker => pillion_core::Role::Worker,
        };
        let engine = format!("engine{}-{}", self.number, self.life).into();
        net.up(conn, Up::Hello { role, from, engine, tenant: self.tenant });
    }

    /// Something arrives at one of its halves.
    pub(crate) fn heard(
        &mut self,
        net: &mut Net,
        oracle: &mut Oracle,
        rank: usize,
        half: Half,
        conn: u64,
        message: Down,
    ) {
        if self.link(rank, half).conn.is_none_or(|known| known.id != conn) {
            return;
        }
        match half {
            Half::Scheduler => self.ranks[rank].lookup.heard(net, oracle, message),
            Half::Worker => self.ranks[rank].worker.heard(net, message),
        }
    }

    /// The connections that are there: rank, half and connection.
    pub(crate) fn conns(&mut self) -> Vec<(usize, Half, crate::net::Conn)> {
        let mut found = Vec::new();
        for rank in 0..self.ranks.len() {
            for half in [Half::Scheduler, Half::Worker] {
                found.extend(self.link(rank, half).conn.map(|conn| (rank, half, conn)));
            }
        }
        found
    }

    /// Its processes end: sidecars see the end of their connections.
    pub(crate) fn die(&mut self, net: &mut Net) {
        self.is_dead = true;
        for (rank, half, conn) in self.conns() {
            *self.link(rank, half) = Link::default();
            net.up(conn, Up::End);
        }
    }

    /// A worker takes its memory away for a while.
    pub(crate) fn sleep(&mut self, net: &mut Net) {
        let rank = self.dice.below(self.ranks.len() as u64) as usize;
        self.ranks[rank].worker.sleep(net);
    }

    /// Whether a mute sidecar may write this engine's blocks.
    pub(crate) fn has_overdue_holds(&self, sidecar: usize, now: u64) -> bool {
        self.ranks.iter().any(|rank| rank.sidecar == sidecar && rank.worker.has_overdue_holds(now))
    }

    // ---- the end of a scenario

    /// What is not over: requests, and jobs apart from those that wait for the end of a process.
    pub(crate) fn unfinished(&self) -> usize {
        self.requests.len() + self.ranks.iter().map(|rank| rank.worker.unquiesced()).sum::<usize>()
    }

    /// Blocks that are not free.
    pub(crate) fn taken(&self) -> usize {
        self.references.len() - self.free.len()
    }

    pub(crate) fn jobs_left(&self) -> usize {
        self.jobs.len()
    }
}
