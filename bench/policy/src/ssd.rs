//! A host pool before an SSD: segments are written once and evicted whole, the oldest first.

use std::collections::VecDeque;

use crate::{
    host::{
        Policy as _,
        leaves::{Leaves, Order},
    },
    trace::{Block, Trace},
};

/// What is written to the SSD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// All.
    All,
    /// What was hit in the pool.
    Hit,
    /// What is in its second request, hit or not: needs a memory of names.
    Second,
    /// Blocks of chains of more than so many blocks.
    LongerThan(u32),
}

/// When it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// When the pool evicts it: write-back.
    Evicted,
    /// As soon as it is in the pool and admitted: it survives a restart.
    Published,
}

/// What of a segment is written again when the segment goes, up to half of its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Nothing.
    Nothing,
    /// What was read from the SSD since it was written there, last time.
    Read,
    /// The same, if its parent is on the SSD or in the pool: without it nobody can ask for it.
    ReadParent,
    /// What was read from the SSD twice since it was first written.
    Frequent,
    /// What was read from the SSD or hit in the pool since it was written there, and has its parent.
    UsedParent,
    /// All that has its parent.
    Reachable,
}

/// The two tiers' policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Setup {
    /// Of the pool.
    pub order: Order,
    /// Blocks of the pool.
    pub host: usize,
    /// Blocks of the SSD.
    pub ssd: usize,
    /// How many segments they are divided into.
    pub segments: usize,
    /// See there.
    pub admission: Admission,
    /// See there.
    pub when: When,
    /// See there.
    pub keep: Keep,
}

/// What a run counted, in blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Asked for.
    pub asked: u64,
    /// Served from either tier: there, and all before them too.
    pub served: u64,
    /// Of them, read from the SSD.
    pub read: u64,
    /// Written to the SSD because they were admitted.
    pub written: u64,
    /// Written once more because they were kept.
    pub rewritten: u64,
}

impl Outcome {
    /// Served / asked.
    pub fn hit_rate(&self) -> f64 {
        self.served as f64 / self.asked.max(1) as f64
    }

    /// All writes / those of the admission.
    pub fn write_amplification(&self) -> f64 {
        (self.written + self.rewritten) as f64 / self.written.max(1) as f64
    }

    /// All writes / blocks asked.
    pub fn writes_per_asked(&self) -> f64 {
        (self.written + self.rewritten) as f64 / self.asked.max(1) as f64
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Record {
    there: bool,
    /// Since it was written, last time.
    read: bool,
    /// Since it was written, last time; in the pool or here.
    used: bool,
    /// Since it was written, first time.
    reads: u8,
}

struct Tiers<'a> {
    trace: &'a Trace,
    setup: Setup,
    host: Leaves,
    records: Vec<Record>,
    /// Blocks of the longest chain through a block, so far.
    chain: Vec<u32>,
    /// Requests that a block was in, so far.
    requests: Vec<u32>,
    /// Sealed segments, the oldest first.
    sealed: VecDeque<Vec<Block>>,
    open: Vec<Block>,
    segment: usize,
    slots: usize,
    outcome: Outcome,
}

/// Plays a trace.
pub fn run(trace: &Trace, setup: Setup) -> Outcome {
    let segment = (setup.ssd / setup.segments).max(2);
    let mut tiers = Tiers {
        trace,
        setup,
        host: Leaves::new(trace, setup.host, setup.order),
        records: vec![Record::default(); trace.blocks()],
        chain: vec![0; trace.blocks()],
        requests: vec![0; trace.blocks()],
        sealed: VecDeque::new(),
        open: Vec::new(),
        segment,
        slots: (setup.ssd / segment).max(2),
        outcome: Outcome::default(),
    };
    for request in &trace.requests {
        let prompt = &request.blocks[request.from..request.asked];
        let found = |block: &Block| tiers.host.holds(*block) || tiers.records[*block as usize].there;
        let hit = prompt.iter().take_while(|block| found(block)).count();
        tiers.outcome.asked += prompt.len() as u64;
        tiers.outcome.served += hit as u64;
        for block in &prompt[..hit] {
            let in_pool = tiers.host.holds(*block);
            let record = &mut tiers.records[*block as usize];
            record.used = true;
            if !in_pool {
                record.read = true;
                record.reads = record.reads.saturating_add(1);
                tiers.outcome.read += 1;
            }
        }
        for block in &request.blocks {
            let chain = &mut tiers.chain[*block as usize];
            *chain = (*chain).max(request.blocks.len() as u32);
            tiers.requests[*block as usize] += 1;
        }
        tiers.host.serve(request, hit);
        if setup.when == When::Published {
            for block in &request.blocks {
                if tiers.host.holds(*block) {
                    tiers.admit(*block, tiers.host.uses(*block));
                }
            }
        }
        let evicted = std::mem::take(&mut tiers.host.evicted);
        for (block, uses) in &evicted {
            tiers.admit(*block, *uses);
        }
        tiers.host.evicted = evicted;
        tiers.host.evicted.clear();
    }
    tiers.outcome
}

impl Tiers<'_> {
    fn admit(&mut self, block: Block, uses: u32) {
        let admitted = match self.setup.admission {
            Admission::All => true,
            Admission::Hit => uses > 0,
            Admission::Second => self.requests[block as usize] > 1,
            Admission::LongerThan(length) => self.chain[block as usize] > length,
        };
        if admitted && !self.records[block as usize].there {
            self.records[block as usize] = Record { there: true, ..Record::default() };
            self.outcome.written += 1;
            self.append(block);
        }
    }

    fn append(&mut self, block: Block) {
        if self.open.len() >= self.segment {
            let full = std::mem::take(&mut self.open);
            self.sealed.push_back(full);
        }
        // The open one counts, too.
        while self.open.is_empty() && self.sealed.len() >= self.slots {
            self.evict();
        }
        self.open.push(block);
    }

    fn evict(&mut self) {
        let Some(victim) = self.sealed.pop_front() else { return };
        let mut room = self.segment / 2;
        for block in victim {
            if room > 0 && self.wanted(block) {
                room -= 1;
                let record = &mut self.records[block as usize];
                (record.read, record.used) = (false, false);
                self.open.push(block);
                self.outcome.rewritten += 1;
            } else {
                self.records[block as usize].there = false;
            }
        }
    }

    fn wanted(&self, block: Block) -> bool {
        let record = self.records[block as usize];
        let there = |parent| self.records[parent as usize].there || self.host.holds(parent);
        let reachable = || self.trace.parent(block).is_none_or(there);
        match self.setup.keep {
            Keep::Nothing => false,
            Keep::Read => record.read,
            Keep::ReadParent => record.read && reachable(),
            Keep::Frequent => record.reads >= 2,
            Keep::UsedParent => record.used && reachable(),
            Keep::Reachable => reachable(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::{NAMES, generate};

    fn trace(requests: &[&[u64]]) -> Trace {
        Trace::new("t", requests.iter().map(|blocks| (blocks.to_vec(), blocks.len()))).unwrap()
    }

    /// A pool of one block, two segments of two.
    fn setup(keep: Keep) -> Setup {
        Setup {
            order: Order::Lru,
            host: 1,
            ssd: 4,
            segments: 2,
            admission: Admission::All,
            when: When::Evicted,
            keep,
        }
    }

    #[test]
    fn segments_go_in_the_order_of_their_age_and_what_was_read_is_written_again() {
        // Each is written when the next one comes, unless it is still on the SSD.
        // 0, 1 fill the first segment; 0 is read; 2, 3 fill the second; 4 needs the first one's place.
        let requests: [&[u64]; 8] = [&[0], &[1], &[2], &[0], &[3], &[4], &[5], &[0]];
        let trace = trace(&requests);
        let nothing = run(&trace, setup(Keep::Nothing));
        assert_eq!((nothing.served, nothing.read, nothing.written, nothing.rewritten), (1, 1, 6, 0));
        let read = run(&trace, setup(Keep::Read));
        // 0 is written again, so that it can be read again.
        assert_eq!((read.served, read.read, read.written, read.rewritten), (2, 2, 6, 1));
        assert_eq!(read.write_amplification(), 7.0 / 6.0);
        // Read once only.
        assert_eq!(run(&trace, setup(Keep::Frequent)).served, 1);
    }

    #[test]
    fn admission_keeps_writes_away() {
        let trace = trace(&[&[0], &[0], &[1], &[2, 3, 4], &[0], &[1]]);
        let base = setup(Keep::Nothing);
        let hit = run(&trace, Setup { admission: Admission::Hit, ..base });
        // Of 0, 1, 2 (3 and 4 find no room in the pool) only 0 was hit; it is read from the SSD.
        assert_eq!((hit.written, hit.read, hit.served), (1, 1, 2));
        let long = run(&trace, Setup { admission: Admission::LongerThan(2), ..base });
        assert_eq!((long.written, long.read), (1, 0), "2 of the chain of three");
    }

    #[test]
    fn written_at_once_is_written_before_the_pool_evicts_it() {
        let trace = trace(&[&[0], &[1]]);
        let at_once = Setup { when: When::Published, ..setup(Keep::Nothing) };
        assert_eq!(run(&trace, setup(Keep::Nothing)).written, 1);
        assert_eq!(run(&trace, at_once).written, 2);
    }

    #[test]
    fn two_tiers_do_not_beat_the_ceiling_of_both_as_one() {
        for name in NAMES {
            let trace = generate(name, 1, 3_000).unwrap();
            for (policy, setup) in crate::study::ssd_policies() {
                let outcome = crate::study::run_tiers(&trace, setup, 100, 400);
                let ceiling = crate::study::run_host(&trace, crate::study::Host::Belady, 500);
                assert!(outcome.served <= ceiling.served, "{policy} on {name}");
                assert!(outcome.read <= outcome.served && outcome.rewritten <= outcome.written);
            }
        }
    }

    #[test]
    fn an_ssd_that_holds_all_misses_nothing() {
        let trace = generate("chat", 1, 3_000).unwrap();
        let ceiling = crate::study::run_host(&trace, crate::study::Host::Belady, trace.blocks());
        let setup = Setup { host: 100, ssd: trace.blocks() * 2, segments: 32, ..setup(Keep::Nothing) };
        assert_eq!(run(&trace, setup).served, ceiling.served);
    }
}
