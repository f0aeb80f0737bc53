//! Which policies are compared, on what, and how large.

use std::sync::{
    Mutex,
    atomic::{AtomicUsize, Ordering},
};

use crate::{
    generate::{self, NAMES},
    host::{
        self,
        belady::Belady,
        classic::{Lru, S3Fifo, WTinyLfu},
        leaves::{Growth, Leaves, Order},
    },
    ssd::{self, Admission, Keep, Setup, When},
    trace::Trace,
};

/// How much is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Blocks of a made-up trace.
    pub blocks: usize,
    /// Made-up traces of each kind.
    pub seeds: u64,
    /// Every nth size of the pool.
    pub step: usize,
}

impl Size {
    /// For results worth keeping.
    pub const FULL: Self = Self { blocks: 100_000, seeds: 3, step: 1 };
    /// For a look.
    pub const QUICK: Self = Self { blocks: 20_000, seeds: 1, step: 3 };
}

/// Sizes of the pool, in thousandths of a trace's distinct blocks.
pub const POOLS: [usize; 7] = [5, 10, 20, 50, 100, 200, 500];

/// The same where an engine's cache of [`ENGINE`] is before it: smaller ones than that make no sense.
const POOLS_BEHIND: [usize; 3] = [20, 50, 200];

/// Pool and SSD of the second study, in thousandths.
pub const TIERS: [(usize, usize); 4] = [(10, 50), (10, 150), (20, 300), (50, 300)];

/// Segments of the SSD.
const SEGMENTS: usize = 32;

/// The engine's own cache, where there is one, in thousandths.
const ENGINE: usize = 10;

/// What is in a cell of the first study.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Host {
    /// The ceiling.
    Belady,
    /// LRU over blocks; the first block of a request is the youngest if so.
    Lru(bool),
    /// With its threshold.
    S3Fifo(u8),
    /// See there.
    WTinyLfu,
    /// Over leaves.
    Leaves(Order),
    /// Over leaves, with a memory of what was evicted.
    Ghosts(Order),
}

/// The policy that the others are compared with: the one that was there first.
pub const BASE: &str = "LRU over leaves";

const fn buy(weight: f64, growth: Growth, writes: bool) -> Order {
    Order::BuyTime { weight, growth, writes }
}

/// What the sidecar's `Store` does.
pub const CHOSEN: (&str, Order) = ("buy 1 log2", buy(1.0, Growth::Log, false));

/// All policies of the host tier.
pub fn host_policies() -> Vec<(&'static str, Host)> {
    let split = |unhit| Order::Split { unhit };
    vec![
        ("ceiling (Belady)", Host::Belady),
        ("LRU, first block first", Host::Lru(false)),
        ("LRU, last block first", Host::Lru(true)),
        ("S3-FIFO", Host::S3Fifo(2)),
        ("S3-FIFO, one hit promotes", Host::S3Fifo(1)),
        ("W-TinyLFU", Host::WTinyLfu),
        (BASE, Host::Leaves(Order::Lru)),
        ("LFU over leaves", Host::Leaves(Order::Lfu)),
        ("LFU over leaves, aging", Host::Leaves(Order::LfuAging)),
        ("never hit first", Host::Leaves(Order::UnhitFirst)),
        ("split, ⅓ never hit", Host::Leaves(split(1.0 / 3.0))),
        ("split, ½ never hit", Host::Leaves(split(0.5))),
        ("split, ⅔ never hit", Host::Leaves(split(2.0 / 3.0))),
        ("buy ¼ log2", Host::Leaves(buy(0.25, Growth::Log, false))),
        ("buy ½ log2", Host::Leaves(buy(0.5, Growth::Log, false))),
        (CHOSEN.0, Host::Leaves(CHOSEN.1)),
        ("buy 2 log2", Host::Leaves(buy(2.0, Growth::Log, false))),
        ("buy 1 ⌊log2⌋", Host::Leaves(buy(1.0, Growth::LogFloor, false))),
        ("buy 1 once", Host::Leaves(buy(1.0, Growth::Once, false))),
        ("buy ½ · hits", Host::Leaves(buy(0.5, Growth::Linear, false))),
        ("buy 1 log2, clock of writes", Host::Leaves(buy(1.0, Growth::Log, true))),
        ("buy ½ log2, ghosts", Host::Ghosts(buy(0.5, Growth::Log, false))),
        ("buy 1 log2, ghosts", Host::Ghosts(CHOSEN.1)),
        ("split, ½ never hit, ghosts", Host::Ghosts(split(0.5))),
    ]
}

/// What of the second study is varied. `None`: the ceiling of one tier as large as both.
pub fn ssd_policies() -> Vec<(&'static str, Option<Setup>)> {
    let base = Setup {
        order: CHOSEN.1,
        host: 0,
        ssd: 0,
        segments: SEGMENTS,
        admission: Admission::All,
        when: When::Evicted,
        keep: Keep::ReadParent,
    };
    let published = Setup { when: When::Published, ..base };
    let setups = [
        ("keep nothing", Setup { keep: Keep::Nothing, ..base }),
        ("keep read", Setup { keep: Keep::Read, ..base }),
        ("keep read with parent", base),
        ("keep read twice", Setup { keep: Keep::Frequent, ..base }),
        ("keep used with parent", Setup { keep: Keep::UsedParent, ..base }),
        ("keep all with parent", Setup { keep: Keep::Reachable, ..base }),
        ("… admit what was hit", Setup { admission: Admission::Hit, ..base }),
        ("… admit at the second request", Setup { admission: Admission::Second, ..base }),
        ("… admit chains > 4", Setup { admission: Admission::LongerThan(4), ..base }),
        ("… admit chains > 16", Setup { admission: Admission::LongerThan(16), ..base }),
        ("… over plain LRU in the pool", Setup { order: Order::Lru, ..base }),
        ("at once: keep nothing", Setup { keep: Keep::Nothing, ..published }),
        ("at once: keep read", Setup { keep: Keep::Read, ..published }),
        ("at once: keep read with parent", published),
        ("at once: keep used with parent", Setup { keep: Keep::UsedParent, ..published }),
        ("at once: … admit what was hit", Setup { admission: Admission::Hit, ..published }),
        ("at once: … admit at the second request", Setup { admission: Admission::Second, ..published }),
    ];
    let ceiling = std::iter::once(("ceiling (Belady)", None));
    ceiling.chain(setups.map(|(name, setup)| (name, Some(setup)))).collect()
}

/// The SSD policy that the others are compared with.
pub const SSD_BASE: &str = "keep nothing";

/// One workload, one size, one policy; a value per seed.
#[derive(Debug, Clone, PartialEq)]
pub struct Cell<T> {
    /// Of the workload.
    pub trace: String,
    /// Blocks of the pool, in thousandths of the distinct ones.
    pub pool: usize,
    /// Blocks of the SSD, likewise.
    pub ssd: usize,
    /// Its name.
    pub policy: &'static str,
    /// In the order of the seeds.
    pub runs: Vec<T>,
}

/// What a workload is.
#[derive(Debug, Clone, PartialEq)]
pub struct Workload {
    /// Its name.
    pub name: String,
    /// Of its first seed.
    pub requests: usize,
    /// Asked for, of its first seed.
    pub asked: u64,
    /// Distinct ones, of its first seed.
    pub blocks: usize,
}

/// Everything that was found out.
#[derive(Debug, Default)]
pub struct Results {
    /// In the order of the tables.
    pub workloads: Vec<Workload>,
    /// Of the first study.
    pub host: Vec<Cell<host::Outcome>>,
    /// Of the second.
    pub ssd: Vec<Cell<ssd::Outcome>>,
}

/// The made-up workloads: of each the seeds 1, 2, ….
pub fn made_up(size: Size) -> Vec<Vec<Trace>> {
    let seeds = |name: &&str| {
        (1..=size.seeds)
            .map(|seed| generate::generate(name, seed, size.blocks).expect("it is one of NAMES"))
            .collect()
    };
    NAMES.iter().map(seeds).collect()
}

/// One policy, one trace, a pool of so many blocks.
pub fn run_host(trace: &Trace, policy: Host, capacity: usize) -> host::Outcome {
    match policy {
        Host::Belady => host::run(trace, &mut Belady::new(trace, capacity)),
        Host::Lru(last_first) => host::run(trace, &mut Lru::new(trace, capacity, last_first)),
        Host::S3Fifo(threshold) => host::run(trace, &mut S3Fifo::new(trace, capacity, threshold)),
        Host::WTinyLfu => host::run(trace, &mut WTinyLfu::new(trace, capacity)),
        Host::Leaves(order) => host::run(trace, &mut Leaves::new(trace, capacity, order)),
        Host::Ghosts(order) => host::run(trace, &mut Leaves::new(trace, capacity, order).with_ghosts()),
    }
}

/// One policy of the second study, one trace, a pool and an SSD of so many blocks.
pub fn run_tiers(trace: &Trace, setup: Option<Setup>, host: usize, ssd: usize) -> ssd::Outcome {
    let Some(setup) = setup else {
        let host::Outcome { asked, served, .. } = run_host(trace, Host::Belady, host + ssd);
        return ssd::Outcome { asked, served, ..ssd::Outcome::default() };
    };
    ssd::run(trace, Setup { host, ssd, ..setup })
}

fn share(trace: &Trace, thousandths: usize) -> usize {
    (trace.blocks() * thousandths / 1000).max(2)
}

/// Runs both studies. Each workload is a list of traces, one for each seed.
pub fn study(workloads: &[Vec<Trace>], size: Size) -> Results {
    let mut all: Vec<(&[Trace], bool)> = workloads.iter().map(|traces| (&traces[..], true)).collect();
    // The same again, as what an engine's cache leaves over; for the pool alone.
    let behind: Vec<Vec<Trace>> = workloads
        .iter()
        .map(|traces| traces.iter().map(|trace| trace.behind_engine(share(trace, ENGINE))).collect())
        .collect();
    all.extend(behind.iter().map(|traces| (&traces[..], false)));
    let mut results = Results::default();
    let (mut host_jobs, mut ssd_jobs) = (Vec::new(), Vec::new());
    for (traces, both) in all {
        let Some(first) = traces.first() else { continue };
        results.workloads.push(Workload {
            name: first.name.clone(),
            requests: first.requests.len(),
            asked: first.asked(),
            blocks: first.blocks(),
        });
        let pools = if both { &POOLS[..] } else { &POOLS_BEHIND[..] };
        for pool in pools.iter().copied().step_by(size.step) {
            host_jobs.extend(host_policies().into_iter().map(|policy| (traces, pool, policy)));
        }
        for tiers in TIERS.into_iter().filter(|_| both).step_by(size.step) {
            ssd_jobs.extend(ssd_policies().into_iter().map(|policy| (traces, tiers, policy)));
        }
    }
    results.host = in_parallel(&host_jobs, |(traces, pool, (policy, host))| Cell {
        trace: traces[0].name.clone(),
        pool: *pool,
        ssd: 0,
        policy,
        runs: traces.iter().map(|trace| run_host(trace, *host, share(trace, *pool))).collect(),
    });
    results.ssd = in_parallel(&ssd_jobs, |(traces, (pool, ssd), (policy, setup))| Cell {
        trace: traces[0].name.clone(),
        pool: *pool,
        ssd: *ssd,
        policy,
        runs: traces
            .iter()
            .map(|trace| run_tiers(trace, *setup, share(trace, *pool), share(trace, *ssd)))
            .collect(),
    });
    results
}

/// The results, in the order of the jobs.
fn in_parallel<J: Sync, R: Send>(jobs: &[J], work: impl Fn(&J) -> R + Sync) -> Vec<R> {
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(index) else { return };
                    let result = work(job);
                    done.lock().expect("no thread panics with it").push((index, result));
                }
            });
        }
    });
    let mut done = done.into_inner().expect("no thread panics with it");
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}
