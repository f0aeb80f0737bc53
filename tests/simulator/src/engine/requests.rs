//! Requests: lookup, lease, load or computation, saves, and every way in which one ends.

use pillion_core::{JobId, LoadRun, NamespaceId, SaveRun};

use super::{Engine, Job, lookup::Grant};
use crate::{
    dice::mix,
    net::Net,
    oracle::{Hash, Oracle, content},
    plan::{Fault, Plan},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Waits for leases.
    Asking,
    /// Waits for blocks.
    Waiting,
    Loading(JobId),
    Running,
}

#[derive(Debug)]
pub(super) struct Request {
    prompt: Vec<Hash>,
    phase: Phase,
    /// One per rank.
    tickets: Vec<u64>,
    grants: Vec<Grant>,
    asked_at: u64,
    /// Blocks that all ranks have granted.
    hit: usize,
    /// Per group, the engine's blocks.
    table: Vec<Vec<u32>>,
    computed: usize,
    saved: usize,
    no_save: bool,
}

/// The prompts of all engines are of a few families, whose members share their first blocks.
fn prompt(number: u64, length: u64) -> Vec<Hash> {
    let (family, member) = (number % 3, number / 3);
    let fork = mix(member ^ 0x77) % (length + 1);
    let block = |index: u64| {
        let branch = if index < fork { 0 } else { member + 1 };
        let mut hash = [0; 32];
        for (word, value) in hash.as_chunks_mut::<8>().0.iter_mut().zip([family, branch, index, 0x5a5a]) {
            *word = mix(value ^ 0xabcd ^ family << 40).to_le_bytes();
        }
        hash
    };
    (0..length).map(block).collect()
}

impl Engine {
    /// One scheduling step.
    pub(crate) fn step(&mut self, net: &mut Net, oracle: &mut Oracle, plan: &Plan) {
        self.poll(net, plan.grace_ns);
        if self.is_open && self.dice.permille(plan.arrivals) && self.requests.len() < 6 {
            self.arrive(net, plan);
        }
        for id in self.requests.keys().copied().collect::<Vec<_>>() {
            self.trouble(net, plan, id);
            match self.requests.get(&id).map(|request| request.phase) {
                Some(Phase::Asking) => self.look(net, plan, id),
                Some(Phase::Waiting) => self.admit(net, plan, id),
                Some(Phase::Running) => self.run(net, oracle, plan, id),
                Some(Phase::Loading(_)) | None => {}
            }
        }
    }

    fn arrive(&mut self, net: &mut Net, plan: &Plan) {
        let length = self.dice.within(1, plan.prompt_blocks);
        let whole = prompt(self.dice.below(plan.prompts), plan.prompt_blocks);
        let prompt: Vec<Hash> = whole.into_iter().take(length as usize).collect();
        let tickets = self.ranks.iter_mut().map(|rank| rank.lookup.lease(net, &prompt)).collect();
        self.next_request += 1;
        let request = Request {
            prompt,
            phase: Phase::Asking,
            tickets,
            grants: Vec::new(),
            asked_at: net.now,
            hit: 0,
            table: Vec::new(),
            computed: 0,
            saved: 0,
            no_save: false,
        };
        self.requests.insert(self.next_request, request);
    }

    /// What happens to requests at any point.
    fn trouble(&mut self, net: &mut Net, plan: &Plan, id: u64) {
        if self.dice.permille(plan.rate(Fault::Aborted)) {
            net.injected(Fault::Aborted);
            self.end_request(net, id);
        } else if self.dice.permille(plan.rate(Fault::Preempted)) {
            self.preempt(net, id);
        }
    }

    fn preempt(&mut self, net: &mut Net, id: u64) {
        let Some(request) = self.requests.get_mut(&id).filter(|request| request.phase == Phase::Running)
        else {
            return;
        };
        net.injected(Fault::Preempted);
        (request.phase, request.computed, request.saved, request.hit) = (Phase::Waiting, 0, 0, 0);
        let table = std::mem::take(&mut request.table);
        self.let_go(table.into_iter().flatten());
    }

    /// Whether all ranks have answered, and what they have in common.
    fn look(&mut self, net: &mut Net, plan: &Plan, id: u64) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let polled = self.ranks.iter().zip(&request.tickets).map(|(rank, ticket)| rank.lookup.poll(*ticket));
        let answers: Option<Vec<Option<Grant>>> = polled.collect();
        match answers {
            Some(answers) => {
                let grants: Option<Vec<Grant>> = answers.into_iter().collect();
                request.grants = grants.unwrap_or_default();
                let shortest = |grant: &Grant| grant.blocks.iter().copied().min().unwrap_or(0);
                let hit = request.grants.iter().map(shortest).min().unwrap_or(0);
                request.hit = (hit as usize).min(request.prompt.len());
            }
            None if net.now - request.asked_at < plan.lookup_deadline_ns => return,
            None => net.saw("lookups timed out", 1),
        }
        request.phase = Phase::Waiting;
        if request.hit == 0 {
            self.release(net, id);
        }
    }

    fn release(&mut self, net: &mut Net, id: u64) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.hit = 0;
        for (rank, ticket) in self.ranks.iter_mut().zip(std::mem::take(&mut request.tickets)) {
            rank.lookup.release(net, ticket);
        }
    }

    /// Blocks for the whole prompt, or none. Then the load, of what all ranks have.
    fn admit(&mut self, net: &mut Net, plan: &Plan, id: u64) {
        let Some(length) = self.requests.get(&id).map(|request| request.prompt.len()) else { return };
        let groups = plan.groups.len();
        if self.free.len() < length * groups {
            return;
        }
        let table: Vec<Vec<u32>> =
            (0..groups).map(|_| (0..length).filter_map(|_| self.allocate()).collect()).collect();
        let room = (self.limit.saturating_sub(self.held)) / groups;
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.table = table;
        request.phase = Phase::Running;
        let hit = request.hit.min(room);
        let spaces: Option<Vec<Vec<NamespaceId>>> = self.ranks.iter().map(|rank| rank.lookup.ids()).collect();
        match spaces.filter(|_| hit > 0) {
            Some(spaces) => self.plan_load(net, plan, id, hit, &spaces),
            None => self.release(net, id),
        }
    }

    fn plan_load(&mut self, net: &mut Net, plan: &Plan, id: u64, hit: usize, spaces: &[Vec<NamespaceId>]) {
        // Some load the end of what was granted only, as when the engine has the beginning itself.
        let first = if self.dice.permille(300) { self.dice.below(hit as u64) as usize } else { 0 };
        let wrong = self.dice.permille(plan.rate(Fault::WrongAsked));
        let Some(request) = self.requests.get_mut(&id) else { return };
        let of_group = |group: usize| request.prompt[first..hit].iter().map(move |hash| (group, *hash));
        let what: Vec<(usize, Hash)> = (0..request.table.len()).flat_map(of_group).collect();
        let blocks: Vec<u32> = request.table.iter().flat_map(|table| &table[first..hit]).copied().collect();
        let tickets = std::mem::take(&mut request.tickets);
        let grants = std::mem::take(&mut request.grants);
        request.hit = 0;
        // What comes before is computed, at once.
        let before: Vec<(usize, u32, Hash)> = (0..request.table.len())
            .flat_map(|group| (0..first).map(move |index| (group, index)))
            .map(|(group, index)| (group, request.table[group][index], request.prompt[index]))
            .collect();
        request.computed = hit;
        before.into_iter().for_each(|(group, block, hash)| self.compute(group, block, &hash));
        let deadline = net.now + plan.load_deadline_ns;
        let job = self.open_job(Job {
            load: true,
            request: id,
            blocks: blocks.clone(),
            what: what.clone(),
            tickets,
            deadline,
            ranks: Vec::new(),
            failed: false,
        });
        if let Some(request) = self.requests.get_mut(&id) {
            request.phase = Phase::Loading(job);
        }
        let mut hashes: Vec<Hash> = what.iter().map(|(_, hash)| *hash).collect();
        let stolen = self.ranks[0].lookup.any_lease();
        for (rank, (grant, spaces)) in self.ranks.iter_mut().zip(grants.iter().zip(spaces)) {
            let (count, mut lease) = ((hit - first) as u32, grant.lease);
            let mut runs: Vec<LoadRun> = (0u32..)
                .zip(spaces)
                .map(|(run, space)| LoadRun { run, first: first as u32, space: *space, count })
                .collect();
            if wrong {
                net.injected(Fault::WrongAsked);
                match (deadline / 7 % 3, stolen) {
                    (0, _) => hashes[0][9] ^= 1,
                    (1, Some(stolen)) => lease = stolen,
                    _ => runs[0].first += 1,
                }
            }
            rank.worker.load(net, job, lease, runs, hashes.clone(), blocks.clone(), plan.load_deadline_ns);
        }
    }

    /// A load ended, well or not; its request may be gone.
    pub(super) fn load_ended(&mut self, _net: &mut Net, id: u64, job: JobId, done: bool) {
        let Some(request) = self.requests.get_mut(&id).filter(|request| request.phase == Phase::Loading(job))
        else {
            return;
        };
        request.phase = Phase::Running;
        if !done {
            // Computed in fresh blocks: the old ones stay held until nothing writes them.
            (request.phase, request.computed, request.saved) = (Phase::Waiting, 0, 0);
            let table = std::mem::take(&mut request.table);
            self.let_go(table.into_iter().flatten());
        }
    }

    fn compute(&mut self, group: usize, block: u32, hash: &Hash) {
        for rank in 0..self.ranks.len() {
            self.ranks[rank].memory[block as usize] = content(&self.space(rank, group), hash);
        }
    }

    /// Computes some more, saves what is full, and ends at some time.
    fn run(&mut self, net: &mut Net, oracle: &mut Oracle, plan: &Plan, id: u64) {
        let more = self.dice.within(1, 3) as usize;
        let Some(request) = self.requests.get_mut(&id) else { return };
        let (from, to) = (request.computed, (request.computed + more).min(request.prompt.len()));
        request.computed = to;
        let fresh: Vec<(usize, u32, Hash)> = (0..request.table.len())
            .flat_map(|group| (from..to).map(move |index| (group, index)))
            .map(|(group, index)| (group, request.table[group][index], request.prompt[index]))
            .collect();
        let is_over = to == request.prompt.len();
        fresh.into_iter().for_each(|(group, block, hash)| self.compute(group, block, &hash));
        self.plan_saves(net, oracle, plan, id);
        if is_over && self.dice.permille(500) {
            self.end_request(net, id);
        }
    }

    /// What is full, and what a rank's sidecar lacks.
    fn plan_saves(&mut self, net: &mut Net, oracle: &mut Oracle, plan: &Plan, id: u64) {
        let Some(request) = self.requests.get(&id).filter(|request| !request.no_save) else { return };
        let spaces: Option<Vec<Vec<NamespaceId>>> = self.ranks.iter().map(|rank| rank.lookup.ids()).collect();
        let ready = self.ranks.iter().all(|rank| rank.lookup.ready());
        let Some(spaces) = spaces.filter(|_| ready) else { return };
        let mut room = self.limit.saturating_sub(self.held);
        let (mut runs, mut what, mut blocks) = (Vec::new(), Vec::new(), Vec::new());
        for (group, table) in request.table.iter().enumerate() {
            let mut before = usize::MAX;
            let full = request.saved..request.computed;
            for (index, block) in full.clone().zip(&table[full]) {
                let hash = request.prompt[index];
                let lacked = self.ranks.iter().any(|rank| rank.lookup.lacks(group, &hash, net.now));
                if !lacked || self.saving.contains(&(group, hash)) || room == 0 {
                    continue;
                }
                room -= 1;
                if before.wrapping_add(1) != index || before == usize::MAX {
                    runs.push((group, index.checked_sub(1).map(|parent| request.prompt[parent]), 0));
                }
                before = index;
                if let Some((.., count)) = runs.last_mut() {
                    *count += 1;
                }
                what.push((group, hash));
                blocks.push(*block);
            }
        }
        let computed = request.computed;
        if let Some(request) = self.requests.get_mut(&id) {
            request.saved = computed;
        }
        if !what.is_empty() {
            self.submit_save(net, oracle, plan, id, &spaces, &runs, what, blocks);
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one save")]
    fn submit_save(
        &mut self,
        net: &mut Net,
        oracle: &mut Oracle,
        plan: &Plan,
        id: u64,
        spaces: &[Vec<NamespaceId>],
        runs: &[(usize, Option<Hash>, u32)],
        what: Vec<(usize, Hash)>,
        blocks: Vec<u32>,
    ) {
        for ids in spaces {
            for (group, hash) in &what {
                oracle.means(ids[*group], hash);
            }
        }
        self.saving.extend(what.iter().copied());
        let hashes: Vec<Hash> = what.iter().map(|(_, hash)| *hash).collect();
        let job = self.open_job(Job {
            load: false,
            request: id,
            blocks: blocks.clone(),
            what,
            tickets: Vec::new(),
            deadline: net.now + plan.save_deadline_ns,
            ranks: Vec::new(),
            failed: false,
        });
        for (rank, spaces) in self.ranks.iter_mut().zip(spaces) {
            let run = |(group, parent, count): &(usize, Option<Hash>, u32)| SaveRun {
                space: spaces[*group],
                parent: *parent,
                count: *count,
            };
            let runs = runs.iter().map(run).collect();
            rank.worker.save(net, job, runs, hashes.clone(), blocks.clone(), plan.save_deadline_ns);
        }
    }

    /// It is done, or aborted: its blocks are free but for those that jobs hold.
    pub(super) fn end_request(&mut self, net: &mut Net, id: u64) {
        self.release(net, id);
        if let Some(request) = self.requests.remove(&id) {
            self.let_go(request.table.into_iter().flatten());
        }
    }

    /// Nothing more arrives, and what is here is aborted.
    pub(crate) fn close(&mut self, net: &mut Net) {
        self.is_open = false;
        for id in self.requests.keys().copied().collect::<Vec<_>>() {
            self.end_request(net, id);
        }
    }

    /// A new epoch. Refused while blocks are held, as by vLLM.
    pub(crate) fn reset(&mut self, net: &mut Net) {
        if !self.jobs.is_empty() {
            return;
        }
        net.injected(Fault::CacheReset);
        for id in self.requests.keys().copied().collect::<Vec<_>>() {
            self.release(net, id);
            if let Some(request) = self.requests.get_mut(&id) {
                request.no_save = true;
            }
        }
        self.saving.clear();
        self.epoch = self.dice.roll() | 1;
        let (epoch, sabotage) = (self.epoch, self.sabotage);
        self.ranks.iter_mut().for_each(|rank| rank.lookup.new_epoch(net, epoch, sabotage));
    }
}
