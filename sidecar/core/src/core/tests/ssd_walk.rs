//! A random walk with an SSD: whatever happens in whatever order, nobody is ever promised another block's bytes,
//! everything that was begun ends once, and nothing stays pinned.

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Save {
        engine: usize,
        start: u32,
        count: u32,
    },
    Lease {
        engine: usize,
        start: u32,
        count: u32,
    },
    Load {
        pick: usize,
    },
    Release {
        pick: usize,
    },
    Copy {
        bad: bool,
    },
    Put {
        bad: bool,
    },
    Get {
        bad: u8,
    },
    /// The SSD makes room.
    Drop {
        pick: usize,
    },
    Pass {
        ms: u64,
    },
    Replace {
        engine: usize,
    },
    /// The process ends and another one recovers what is on the SSD.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let blocks = || (0usize..3, 0u32..24, 1u32..9);
    prop_oneof![
        4 => blocks().prop_map(|(engine, start, count)| Step::Save { engine, start, count }),
        4 => blocks().prop_map(|(engine, start, count)| Step::Lease { engine, start, count }),
        2 => any::<usize>().prop_map(|pick| Step::Load { pick }),
        3 => any::<usize>().prop_map(|pick| Step::Release { pick }),
        5 => (0u8..10).prop_map(|bad| Step::Copy { bad: bad == 0 }),
        6 => (0u8..10).prop_map(|bad| Step::Put { bad: bad == 0 }),
        6 => (0u8..10).prop_map(|bad| Step::Get { bad }),
        1 => any::<usize>().prop_map(|pick| Step::Drop { pick }),
        2 => prop_oneof![Just(20u64), Just(250), Just(40_000)].prop_map(|ms| Step::Pass { ms }),
        1 => (0usize..3).prop_map(|engine| Step::Replace { engine }),
        1 => Just(Step::Restart),
    ]
}

fn mode() -> impl Strategy<Value = CacheMode> {
    prop_oneof![
        3 => Just(CacheMode::WriteBack),
        2 => Just(CacheMode::WriteThrough),
        1 => Just(CacheMode::WriteAround),
        1 => Just(CacheMode::ReadOnly),
    ]
}

/// The rig, and an oracle that knows whose bytes lie where.
struct Walk {
    rig: Rig,
    mode: CacheMode,
    ahead_ns: u64,
    engines: Vec<Engine>,
    /// Per offset, the key whose bytes lie there.
    lies: HashMap<u64, [u8; 32]>,
    leases: Vec<(Engine, u64, u32)>,
    /// Requests that were not answered: who asked, the blocks, and when.
    asked: Vec<(Engine, u64, u32, u64)>,
    /// Which key each block of a job is about.
    meant: HashMap<JobId, HashMap<u64, [u8; 32]>>,
    names: u32,
}

impl Walk {
    fn limits(mode: CacheMode, ahead_ns: u64) -> SsdLimits {
        SsdLimits {
            mode,
            wait_ns: 200_000_000,
            ahead_ns,
            records_max: 40,
            offers_max: 8,
            puts_max: 3,
            put_bytes_max: 2 * RECORD,
            gets_max: 3,
            get_bytes_max: 2 * RECORD,
        }
    }

    fn new(mode: CacheMode, ahead_ns: u64) -> Self {
        let rig = Rig::with(10, Some(Self::limits(mode, ahead_ns)));
        let mut walk = Self {
            rig,
            mode,
            ahead_ns,
            engines: Vec::new(),
            lies: HashMap::new(),
            leases: Vec::new(),
            asked: Vec::new(),
            meant: HashMap::new(),
            names: 0,
        };
        walk.attach();
        walk
    }

    fn attach(&mut self) {
        self.engines = (0..3).map(|n| self.engine(n)).collect();
    }

    /// Engines 0 and 2 share a tenant.
    fn engine(&mut self, number: usize) -> Engine {
        self.names += 1;
        self.rig.engine(&format!("e{}", self.names), &tenant(number as u8 % 2), "m")
    }

    fn key(engine: &Engine, n: u32) -> [u8; 32] {
        // Two tenants, one model: the namespace says which tenant.
        let owner = (0..2).map(tenant).find(|tenant| namespace("m").id(tenant, b"") == engine.space).unwrap();
        BlockKey::new(&owner.key, engine.space, 0, &hash(n)).bytes()
    }

    /// The engine's blocks of these hashes, and their keys.
    fn keys(engine: &Engine, hashes: std::ops::Range<u32>) -> HashMap<u64, [u8; 32]> {
        hashes.map(|n| (u64::from(n % 64), Self::key(engine, n))).collect()
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Save { engine, start, count } => {
                let engine = self.engines[engine];
                let before = self.rig.copies.len();
                self.rig.save(&engine, start.checked_sub(1), start..start + count);
                if let Some((_, job, _, items)) = self.rig.copies.get(before).cloned() {
                    let keys = Self::keys(&engine, start..start + count);
                    for item in items {
                        self.lies.insert(item.offset, keys[&item.block]);
                    }
                    self.meant.insert(job, keys);
                }
            }
            Step::Lease { engine, start, count } => {
                let engine = self.engines[engine];
                let request = self.rig.ask(&engine, start..start + count);
                self.asked.push((engine, request, start, self.rig.now));
            }
            Step::Load { pick } if !self.leases.is_empty() => {
                let (engine, request, start) = self.leases[pick % self.leases.len()];
                let (lease, blocks) = self.rig.leased[&request];
                let job = self.rig.load(&engine, lease, 0, start..start + blocks);
                self.meant.insert(job, Self::keys(&engine, start..start + blocks));
            }
            Step::Release { pick } if !self.leases.is_empty() => {
                let (engine, request, _) = self.leases.swap_remove(pick % self.leases.len());
                let lease = self.rig.leased[&request].0;
                self.rig.apply(Event::Release { session: engine.scheduler, lease });
            }
            Step::Copy { bad } if !self.rig.copies.is_empty() => {
                let fault = match self.rig.copies[0].2 {
                    Direction::Load => BlockOutcome::Corrupt,
                    Direction::Save => BlockOutcome::Unreachable,
                };
                self.rig.copy(|item| if bad { fault } else { BlockOutcome::Copied(item.offset ^ 77) });
            }
            Step::Put { bad } if !self.rig.puts.is_empty() => {
                let PutAsked { record, offset, .. } = &self.rig.puts[0];
                assert_eq!(self.lies[offset], record.key, "overwritten while it was being written");
                self.rig.put(if bad { PutEnding::Failed } else { PutEnding::Stored });
            }
            Step::Get { bad } if !self.rig.gets.is_empty() => {
                let GetAsked { key, offset, .. } = self.rig.gets[0].clone();
                self.lies.insert(offset, key);
                self.rig.now += 2_500_000;
                self.rig.get(match bad {
                    0 => Some(GetEnding::Corrupt),
                    1 => Some(GetEnding::Gone),
                    2 => Some(GetEnding::Busy),
                    _ => None,
                });
            }
            Step::Drop { pick } if !self.rig.disk.is_empty() => {
                let mut keys: Vec<_> = self.rig.disk.keys().copied().collect();
                keys.sort_unstable();
                let key = keys[pick % keys.len()];
                self.rig.disk.remove(&key);
                self.rig.apply(Event::SsdDropped { key });
            }
            Step::Pass { ms } => {
                self.rig.now += ms * 1_000_000;
                self.rig.apply(Event::Tick);
                self.answers();
                let late =
                    self.asked.iter().filter(|(.., since)| since + 200_000_000 <= self.rig.now).count();
                assert_eq!(late, 0, "answered in time");
            }
            Step::Replace { engine } => {
                let old = self.engines[engine];
                self.rig.apply(Event::Detached { session: old.worker });
                self.rig.apply(Event::Detached { session: old.scheduler });
                self.leases.retain(|(owner, ..)| owner.worker != old.worker);
                self.asked.retain(|(owner, ..)| owner.worker != old.worker);
                self.engines[engine] = self.engine(engine);
            }
            Step::Restart => self.restart(),
            _ => {}
        }
        self.answers();
        self.check_copies();
    }

    fn answers(&mut self) {
        let (rig, leases) = (&self.rig, &mut self.leases);
        self.asked.retain(|(engine, request, start, _)| {
            let Some((_, blocks)) = rig.leased.get(request) else { return true };
            if *blocks > 0 {
                leases.push((*engine, *request, *start));
            }
            false
        });
    }

    /// The extents of what is being copied hold what it is about, from its begin to its end.
    fn check_copies(&self) {
        for (_, job, _, items) in &self.rig.copies {
            for item in items {
                assert_eq!(self.lies[&item.offset], self.meant[job][&item.block], "a copy of another block");
            }
        }
    }

    fn restart(&mut self) {
        let disk = std::mem::take(&mut self.rig.disk);
        let mut rig = Rig::with(10, Some(Self::limits(self.mode, self.ahead_ns)));
        rig.now = self.rig.now;
        (rig.jobs, rig.sessions) = (self.rig.jobs, self.rig.sessions);
        rig.apply(Event::SsdFound { records: disk.values().cloned().collect() });
        rig.disk = disk;
        self.rig = rig;
        self.lies.clear();
        self.leases.clear();
        self.asked.clear();
        self.meant.clear();
        self.attach();
        assert!(self.rig.present.len() <= self.rig.disk.len());
    }

    /// Everything comes to its end.
    fn end(mut self) {
        for engine in self.engines.clone() {
            self.rig.apply(Event::Detached { session: engine.worker });
            self.rig.apply(Event::Detached { session: engine.scheduler });
        }
        self.rig.apply(Event::Drain);
        while !(self.rig.copies.is_empty() && self.rig.puts.is_empty() && self.rig.gets.is_empty()) {
            if !self.rig.copies.is_empty() {
                self.rig.copied();
            }
            self.rig.put_all();
            self.rig.get_all();
        }
        assert!(self.rig.drained);
        let counters = self.rig.core.counters();
        assert_eq!((counters.jobs, counters.leases, counters.pinned_bytes), (0, 0, 0));
        assert_eq!(self.rig.core.sessions().count(), 0);
        let on_ssd = self.rig.present.values().filter(|tiers| **tiers & crate::TIER_SSD != 0).count();
        let in_pool = self.rig.present.values().filter(|tiers| **tiers & crate::TIER_HOST != 0).count();
        assert_eq!((on_ssd as u64, in_pool as u64), (counters.ssd_records, counters.records));
        let mut outcomes: HashMap<JobId, u32> = HashMap::new();
        for (_, job, outcome, ..) in &self.rig.done {
            *outcomes.entry(*job).or_default() += u32::from(*outcome != Outcome::AlreadyReported);
        }
        assert!(outcomes.values().all(|ended| *ended == 1), "{outcomes:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_mixed_up_and_everything_ends(
        mode in mode(),
        ahead_ns in prop_oneof![Just(0u64), Just(5_000_000), Just(1_000_000_000)],
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        let mut walk = Walk::new(mode, ahead_ns);
        for step in &steps {
            walk.step(step);
        }
        walk.end();
    }
}
