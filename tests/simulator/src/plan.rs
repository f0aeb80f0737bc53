//! What a scenario is: sizes, bounds, which faults and how often. All of it from a seed.
//!
//! *Swarm testing*: a scenario has a random subset of the faults, so that each is also met without the others, and
//! random sizes, most of them tiny, so that whatever is bounded is full.

use pillion_core::CacheMode;

use crate::dice::Dice;

/// A millisecond of the simulated clock.
pub(crate) const MS: u64 = 1_000_000;

macro_rules! faults {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $usual:literal;)*) => {
        /// What may go wrong, and what is rare.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Fault { $($(#[$doc])* $name,)* }

        impl Fault {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Its name in reports and on the command line.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// How often it is usual: in a thousand occasions.
            fn usual(self) -> u32 {
                match self { $(Self::$name => $usual,)* }
            }
        }
    };
}

faults! {
    /// A sidecar's process ends between two instructions; what its kernel was told to write may be written.
    SidecarKilled = "sidecar killed", 12;
    /// It is told to stop: it drains, seals, ends its sessions, and starts again.
    SidecarStopped = "sidecar stopped in order", 6;
    /// SIGSTOP, and SIGCONT or SIGKILL later.
    SidecarPaused = "sidecar paused", 10;
    /// Every process of the machine ends, and a subset of what was not synced is lost.
    PowerLost = "power lost", 5;
    /// An engine dies; another takes its place.
    EngineKilled = "engine killed", 12;
    /// An engine stands still.
    EnginePaused = "engine paused", 10;
    /// A connection breaks while both ends live.
    ConnectionBroken = "connection broken", 8;
    /// The engine resets its cache: a new epoch, in which the same tokens have other bytes.
    CacheReset = "cache reset", 12;
    /// A worker takes its memory away and presents it again.
    WorkerSleeps = "worker sleeps", 6;
    /// A request is aborted at any point.
    Aborted = "request aborted", 25;
    /// A running request is preempted: its blocks are reused at once.
    Preempted = "request preempted", 25;
    /// A copy stands still for longer than its job's deadline.
    CopyHangs = "copy hangs", 30;
    /// The engine's memory cannot be reached.
    MemoryUnreachable = "memory unreachable", 20;
    /// A bit of the host pool changes.
    PoolRots = "bit flipped in the pool", 25;
    /// A bit on the disk changes.
    DiskRots = "bit flipped on the disk", 25;
    /// An operation of the disk fails.
    DiskFails = "disk operation failed", 25;
    /// An operation of the disk moves half of its bytes.
    DiskShort = "disk operation short", 15;
    /// A write or a sync is reported and not done, or goes elsewhere.
    DiskLies = "disk lied", 20;
    /// All writes, reads or syncs fail for a while.
    DiskBreaks = "disk broken for a while", 6;
    /// The disk has no room for another file.
    DiskFull = "disk full", 6;
    /// The disk does nothing for a while.
    DiskHangs = "disk hangs", 12;
    /// The connection of two sidecars breaks.
    NeighboursPart = "neighbours parted", 20;
    /// Everything takes long to arrive for a while.
    NetworkSlow = "network slow", 12;
    /// Ids of blocks, of leases, of jobs: a client asks for what it does not have.
    WrongAsked = "lease not its own", 20;
}

/// A part of the simulator that is broken on purpose: the oracle must see it. The shipped code is as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// Copies out of the pool do not compare checksums.
    ChecksumsSkipped,
    /// An engine reuses a load's blocks when its outcome is known, not when it has quiesced.
    HoldsEndEarly,
    /// A save is published whoever won its word.
    WordIgnored,
    /// What the SSD reads counts as proved, whatever the store says.
    DiskTrusted,
    /// Nothing is synced, and is acknowledged as durable.
    SyncsSkipped,
    /// A write to the SSD ends before its bytes were taken from the pool.
    PutsEndEarly,
    /// Every now and then a completion is lost.
    CompletionsLost,
    /// Sessions act for another tenant than their engine's.
    TenantsMixed,
    /// A reset cache goes on in its old epoch.
    EpochKept,
    /// A neighbour's records are copied without being proved.
    LoansTrusted,
}

impl Sabotage {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::ChecksumsSkipped,
        Self::HoldsEndEarly,
        Self::WordIgnored,
        Self::DiskTrusted,
        Self::SyncsSkipped,
        Self::PutsEndEarly,
        Self::CompletionsLost,
        Self::TenantsMixed,
        Self::EpochKept,
        Self::LoansTrusted,
    ];
}

/// What shrinking has taken away from a scenario.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    /// Looks of whoever makes trouble, 20 ms apart; the scenario's length.
    pub steps: u64,
    /// Faults that do not happen.
    pub without: Vec<Fault>,
    /// Engines, at most.
    pub engines: usize,
    /// Sidecars, at most.
    pub sidecars: usize,
    /// What a process acknowledges counts even where an earlier process saw a sync fail and the power has not gone
    /// since. Known not to hold: see docs/ROBUSTNESS.md.
    pub strict_syncs: bool,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            steps: u64::MAX,
            without: Vec::new(),
            engines: usize::MAX,
            sidecars: usize::MAX,
            strict_syncs: false,
        }
    }
}

/// The SSD of each sidecar.
#[derive(Debug, Clone)]
pub(crate) struct SsdPlan {
    pub(crate) mode: CacheMode,
    pub(crate) wait_ns: u64,
    pub(crate) ahead_ns: u64,
    pub(crate) segment_bytes: u64,
    pub(crate) slots: u32,
    pub(crate) records_max: usize,
    pub(crate) offers_max: usize,
    pub(crate) in_flight_max: usize,
    pub(crate) store_puts_max: usize,
    pub(crate) batch_bytes: u64,
}

/// One KV cache group of a model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupPlan {
    /// Of a record in the simulated memory; the core sees [`Plan::scale`] times as many.
    pub(crate) bytes: u64,
}

/// A scenario.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) steps: u64,
    pub(crate) strict_syncs: bool,
    rates: Vec<u32>,
    pub(crate) sidecars: usize,
    /// Per engine: tenant, model, and the sidecar of each rank.
    pub(crate) engines: Vec<(usize, usize, Vec<usize>)>,
    /// Per engine: how it asks its blocks to be kept.
    pub(crate) cache_modes: Vec<Option<CacheMode>>,
    pub(crate) groups: Vec<GroupPlan>,
    /// One byte here stands for so many of a real pool, whose slabs are of 2 MiB: a pool of few records costs little.
    pub(crate) scale: u64,
    pub(crate) pool_chunks: u64,
    pub(crate) pinned_share: u64,
    pub(crate) leases_max: usize,
    pub(crate) session_jobs_max: usize,
    pub(crate) lease_ns: u64,
    pub(crate) borrow_wait_ns: u64,
    pub(crate) neighbours: bool,
    pub(crate) table_slots: u64,
    pub(crate) ring_slots: u32,
    pub(crate) word_slots: u32,
    pub(crate) ssd: Option<SsdPlan>,
    pub(crate) blocks: u32,
    pub(crate) hold_permille: u64,
    pub(crate) prompts: u64,
    pub(crate) prompt_blocks: u64,
    pub(crate) arrivals: u32,
    pub(crate) load_deadline_ns: u64,
    pub(crate) save_deadline_ns: u64,
    pub(crate) lookup_deadline_ns: u64,
    pub(crate) step_ns: u64,
    pub(crate) net_ns: u64,
    pub(crate) copy_ns: u64,
    pub(crate) disk_ns: u64,
    pub(crate) beat_ns: u64,
    pub(crate) grace_ns: u64,
}

impl Plan {
    /// The scenario of a seed, as far as the budget goes.
    pub(crate) fn new(seed: u64, budget: &Budget) -> Self {
        let dice = &mut Dice::new(seed).fork(1);
        let steps = dice.within(10, 100).min(budget.steps);
        let rates = Fault::ALL.iter().map(|fault| rate(*fault, dice, budget)).collect();
        let sidecars = dice.pick(&[1, 1, 2, 2, 3]);
        let (tenants, models) = (dice.within(1, 2), dice.within(1, 2));
        let engines = (0..dice.within(1, 3)).map(|_| {
            let first = dice.below(sidecars) as usize;
            let mut ranks = vec![first];
            if sidecars > 1 && dice.permille(250) {
                ranks.push((first + 1) % sidecars as usize);
            }
            (dice.below(tenants) as usize, dice.below(models) as usize, ranks)
        });
        let mut engines: Vec<_> = engines.collect();
        engines.truncate(budget.engines.max(1));
        if budget.sidecars < sidecars as usize {
            engines.iter_mut().for_each(|engine| engine.2 = vec![engine.2[0] % budget.sidecars.max(1)]);
        }
        let asked = [
            None,
            None,
            None,
            Some(CacheMode::WriteThrough),
            Some(CacheMode::WriteBack),
            Some(CacheMode::ReadOnly),
        ];
        let cache_modes = engines.iter().map(|_| dice.pick(&asked)).collect();
        let scale = dice.pick(&[32, 64, 128]);
        let groups = (0..dice.pick(&[1, 1, 2])).map(|_| group(dice, scale)).collect();
        let prompt_blocks = dice.within(2, 8);
        Self {
            steps,
            strict_syncs: budget.strict_syncs,
            rates,
            sidecars: (sidecars as usize).min(budget.sidecars.max(1)),
            engines,
            cache_modes,
            groups,
            scale,
            pool_chunks: dice.within(2, 5),
            pinned_share: dice.within(3, 10),
            leases_max: dice.pick(&[2, 4, 16, 64]),
            session_jobs_max: dice.pick(&[1, 4, 64]),
            lease_ns: dice.pick(&[60, 300, 2000]) * MS,
            borrow_wait_ns: dice.pick(&[10, 50, 200]) * MS,
            neighbours: dice.permille(800),
            table_slots: dice.pick(&[8, 64, 256]),
            ring_slots: dice.pick(&[2, 8, 64]),
            word_slots: dice.pick(&[1, 4, 16]),
            ssd: dice.permille(650).then(|| ssd(dice)),
            blocks: (prompt_blocks * dice.within(4, 8)) as u32,
            hold_permille: dice.pick(&[300, 600, 1000]),
            prompts: dice.within(2, 10),
            prompt_blocks,
            arrivals: dice.pick(&[50, 150, 400]),
            load_deadline_ns: dice.pick(&[8, 40, 200]) * MS,
            save_deadline_ns: dice.pick(&[8, 40, 200]) * MS,
            lookup_deadline_ns: dice.pick(&[5, 30, 300]) * MS,
            step_ns: dice.within(2, 15) * MS,
            net_ns: dice.pick(&[20_000, 200_000, 3 * MS]),
            copy_ns: dice.pick(&[100_000, MS, 10 * MS]),
            disk_ns: dice.pick(&[100_000, MS, 10 * MS]),
            beat_ns: dice.pick(&[25, 50, 100]) * MS,
            grace_ns: dice.pick(&[150, 400]) * MS,
        }
    }

    /// Nothing goes wrong any more.
    pub(crate) fn calm(&mut self) {
        self.rates.fill(0);
    }

    /// How often a fault happens: in a thousand occasions.
    pub(crate) fn rate(&self, fault: Fault) -> u32 {
        self.rates[fault as usize]
    }
}

fn rate(fault: Fault, dice: &mut Dice, budget: &Budget) -> u32 {
    let (chosen, times) = (dice.permille(300), dice.pick(&[1, 2, 4, 8]));
    let rate = fault.usual() * times / 2;
    if chosen && !budget.without.contains(&fault) { rate.min(500) } else { 0 }
}

fn group(dice: &mut Dice, scale: u64) -> GroupPlan {
    // Some records end in the middle of a sector; scaled up, they must still fill the same number of sectors.
    let sectors = dice.pick(&[1, 1, 1, 2]);
    let missing = dice.pick(&[0, 0, 1, 4096 / scale - 1]);
    GroupPlan { bytes: sectors * 4096 - missing }
}

fn ssd(dice: &mut Dice) -> SsdPlan {
    let modes =
        [CacheMode::WriteBack, CacheMode::WriteThrough, CacheMode::WriteThrough, CacheMode::WriteAround];
    SsdPlan {
        // What is only read would be empty for ever.
        mode: dice.pick(&modes),
        wait_ns: dice.pick(&[2, 20, 200]) * MS,
        ahead_ns: dice.pick(&[0, 5, 50, 500]) * MS,
        segment_bytes: dice.pick(&[64, 96, 160]) << 10,
        slots: dice.within(3, 5) as u32,
        records_max: dice.pick(&[6, 40, 1000, 1000]),
        offers_max: dice.pick(&[2, 8, 1000]),
        in_flight_max: dice.pick(&[1, 3, 16]),
        store_puts_max: dice.pick(&[2, 8, 256]),
        batch_bytes: dice.pick(&[16, 40, 4096]) << 10,
    }
}
