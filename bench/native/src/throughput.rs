//! P9: records through the tier as it ships, beside fio on the same file system, in turn.

use std::{
    collections::{HashSet, VecDeque},
    path::Path,
    sync::mpsc::Receiver,
    thread::sleep,
    time::{Duration, Instant},
};

use pillion_ssd::{
    format::{Entry, checksum},
    store::{Action, Limits},
    tier::{Engine, Tier},
};

use crate::{
    peers::{self, Load, Peer, Sample, Way},
    report::{self, Better, Row},
    rig::{Outcome, Pool, Scratch, Shape, fill, key, meta, number, start, told, usage},
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SIZES: [u64; 4] = [256 * KIB, MIB, 2 * MIB, 8 * MIB];
const DEPTHS: [u64; 4] = [1, 8, 32, 64];
/// For all that is asked at once, and one more.
const LANES: u64 = 2 * DEPTHS[3] + 1;
/// What peers move, and what the tier holds for certain while it is read.
const TOTAL: u64 = 1 << 30;
const SEGMENT: u64 = 256 * MIB;
/// After its header, its records, its footer.
const SYNCS_OF_A_SEGMENT: u64 = 3;
const CAPACITY: u64 = 8 * SEGMENT;
const LATENCIES: &str = "p99 of a 2 MiB read while writes saturate";
const END: Duration = Duration::from_secs(60);
/// Before each measurement: virtual disks save up credit while they rest, and starting a process is a rest.
const REST: Duration = Duration::from_millis(300);

/// How much of everything.
#[derive(Debug, Clone, Copy)]
struct Effort {
    runs: usize,
    seconds: f64,
    depths: &'static [u64],
    sizes: &'static [u64],
}

fn size_name(bytes: u64) -> String {
    if bytes < MIB { format!("{} MiB", bytes as f64 / MIB as f64) } else { format!("{} MiB", bytes / MIB) }
}

fn case(load: &Load) -> String {
    format!("{} {} qd{}", load.way.name(), size_name(load.bytes), load.depth)
}

fn budget(load: &Load) -> Option<f64> {
    // What the page of budgets names: records of 2 MiB, with the disk busy.
    let named = load.bytes == 2 * MIB && load.depth >= 8;
    named.then_some(if load.way == Way::Read { 0.95 } else { 0.90 })
}

/// A depth is what the device has at once, ours as fio's: of reads, operations; of writes, which are gathered, bytes.
fn limits(load: &Load) -> Limits {
    let all = Limits::default();
    match load.way {
        Way::Read => Limits { depth: load.depth as usize, ..all },
        Way::Write => {
            let writes = load.depth.min(all.batches_max.into());
            let batch_bytes = all.batch_bytes.min(load.depth * load.bytes / writes);
            // Writes have half of a tier's places. As of reads, there are some that wait for theirs.
            let batches_max = all.batches_max.min(2 * writes as u32);
            Limits { batch_bytes, batches_max, depth: 2 * writes as usize, ..all }
        }
    }
}

/// What is asked of the tier at once, so that the device has its next one when it is done with one, as with fio: while
/// what was read is proved, and until what is to be written is gathered. Few more reads: with the memory that is used,
/// the time grows that a virtual disk's host takes to copy. What is written is as many buffers as fio has.
fn asked(load: &Load) -> u64 {
    match load.way {
        Way::Read => load.depth + 2.max(load.depth / 8),
        Way::Write => 2 * load.depth,
    }
}

/// `only`: cases whose name has this in it.
pub(crate) fn run(below: &Path, json: Option<&Path>, quick: bool, only: &str) -> Outcome<bool> {
    let effort = if quick {
        Effort { runs: 3, seconds: 0.4, depths: &[1, 32], sizes: &[256 * KIB, 2 * MIB] }
    } else {
        Effort { runs: 5, seconds: 1.0, depths: &DEPTHS, sizes: &SIZES }
    };
    let scratch = Scratch::new(below, "bench")?;
    let machine = report::machine(&scratch.0);
    peers::fio_lay_out(&scratch.0, CAPACITY)?;
    let foyer = Peer::of_variable("foyer", "PILLION_PEER_FOYER");
    let nixl = Peer::of_variable("NIXL POSIX", "PILLION_PEER_NIXL");
    let lmcache = Peer::of_variable("LMCache fs_native", "PILLION_PEER_LMCACHE_FS");
    let mut rows = Vec::new();
    for &bytes in effort.sizes {
        let is_wanted = |load: &Load| case(load).contains(only);
        let of = |way, depth| Load { way, bytes, depth, seconds: effort.seconds, total: TOTAL };
        let loads = effort.depths.iter().flat_map(|&depth| [of(Way::Write, depth), of(Way::Read, depth)]);
        let loads: Vec<Load> = loads.filter(is_wanted).collect();
        let latencies_are_wanted = bytes == 2 * MIB && LATENCIES.contains(only);
        if loads.is_empty() && !latencies_are_wanted {
            continue;
        }
        let place = scratch.sub("ours")?;
        let mut ours = Ours::start(&place, bytes, Engine::Auto)?;
        for load in &loads {
            let has_peers = bytes == 2 * MIB && load.depth == 32;
            let with: &[&Peer] = if has_peers { &[&nixl, &lmcache, &foyer] } else { &[] };
            ours = ours.again(limits(load))?;
            // The disk is a noisy one: more where a budget is to be told from its moods.
            let runs = if budget(load).is_some() { 2 * effort.runs - 1 } else { effort.runs };
            rows.extend(beside(&scratch.0, &mut ours, load, with, runs)?);
        }
        if latencies_are_wanted {
            ours = ours.again(Limits::default())?;
            rows.extend(latencies(&scratch.0, &mut ours, quick)?);
        }
        let engine = ours.engine;
        drop(ours);
        std::fs::remove_dir_all(&place)?;
        if engine != "threads" && bytes == 2 * MIB && only.is_empty() {
            rows.extend(threads(&scratch, bytes, effort)?);
        }
    }
    report::publish(&machine, &rows, json)
}

/// The same without io_uring.
fn threads(scratch: &Scratch, bytes: u64, effort: Effort) -> Outcome<Vec<Row>> {
    let place = scratch.sub("threads")?;
    let mut ours = Ours::start(&place, bytes, Engine::Threads)?;
    let mut rows = Vec::new();
    for way in [Way::Write, Way::Read] {
        let load = Load { way, bytes, depth: 32, seconds: effort.seconds, total: TOTAL };
        ours = ours.again(limits(&load))?;
        for mut row in beside(&scratch.0, &mut ours, &load, &[], effort.runs)? {
            row.case += ", pread threads";
            // The budget is io_uring's: this is what there is where the kernel refuses it.
            (row.budget, row.met) = (None, None);
            rows.push(row);
        }
    }
    drop(ours);
    std::fs::remove_dir_all(&place)?;
    Ok(rows)
}

/// Ours, fio, the others; again and again.
fn beside(
    directory: &Path,
    ours: &mut Ours,
    load: &Load,
    others: &[&Peer],
    runs: usize,
) -> Outcome<Vec<Row>> {
    eprintln!("    {} ({})", case(load), ours.engine);
    let (mut fio, mut syncing) = (Vec::new(), Vec::new());
    let mut theirs = vec![Vec::new(); others.len()];
    let syncs = load.way == Way::Write && load.bytes == 2 * MIB;
    let mut refused = vec![None; others.len()];
    for _ in 0..runs {
        sleep(REST);
        let mine = ours.run(load)?;
        sleep(REST);
        // It goes over as much of the disk as we do: what a host keeps in memory behind a virtual disk is the same share.
        let total = if load.way == Way::Write { CAPACITY } else { load.total };
        let load_of_fio = Load { total, ..*load };
        let has_huge_pages = ours.pool.has_huge_pages;
        fio.push((mine, peers::fio(directory, &load_of_fio, has_huge_pages, 0)?));
        if syncs {
            sleep(REST);
            let every = SEGMENT / load.bytes / SYNCS_OF_A_SEGMENT;
            syncing.push((mine, peers::fio(directory, &load_of_fio, has_huge_pages, every)?));
        }
    }
    // After that: what some of them leave behind, the disk goes on with for a while.
    for (number, peer) in others.iter().enumerate() {
        // foyer starts and recovers within its run: a longer one.
        let longer = Load { seconds: load.seconds.max(1.0), ..*load };
        for _ in 0..runs.div_ceil(2) {
            sleep(REST);
            let mine = ours.run(load)?;
            sleep(REST);
            match peer.run(directory, &longer) {
                Ok(sample) => theirs[number].push((mine, sample)),
                Err(why) => {
                    refused[number] = Some(why);
                    break;
                }
            }
        }
    }
    let speed = |pairs: &[(Sample, Sample)]| -> Vec<(f64, f64)> {
        pairs.iter().map(|(ours, theirs)| (ours.gbps, theirs.gbps)).collect()
    };
    let cpu = |pairs: &[(Sample, Sample)]| -> Vec<(f64, f64)> {
        pairs.iter().map(|(ours, theirs)| (ours.cpu_s_per_gb, theirs.cpu_s_per_gb)).collect()
    };
    let name = case(load);
    let mut rows = vec![
        Row::of("P9", name.clone(), "fio", "GB/s", Better::More, budget(load), &speed(&fio)),
        Row::of("P9", format!("{name}, CPU"), "fio", "s/GB", Better::Less, None, &cpu(&fio)),
    ];
    if syncs {
        let peer = "fio, syncing as often";
        rows.push(Row::of("P9", name.clone(), peer, "GB/s", Better::More, None, &speed(&syncing)));
    }
    for (number, peer) in others.iter().enumerate() {
        if let Some(why) = &refused[number] {
            rows.push(Row::without("P9", name.clone(), peer.name, why));
            continue;
        }
        let target = match peer.name {
            "NIXL POSIX" => Some(1.0),
            "LMCache fs_native" => Some(1.8),
            _ => None,
        };
        let pairs = &theirs[number];
        rows.push(Row::of("P9", name.clone(), peer.name, "GB/s", Better::More, target, &speed(pairs)));
        rows.push(Row::of("P9", format!("{name}, CPU"), peer.name, "s/GB", Better::Less, None, &cpu(pairs)));
    }
    Ok(rows)
}

/// p99 of single reads of 2 MiB: alone, and while writes saturate. fio does the same, to know what the disk adds.
fn latencies(directory: &Path, ours: &mut Ours, quick: bool) -> Outcome<Vec<Row>> {
    eprintln!("    reads while writes saturate");
    let (runs, seconds) = if quick { (2, 1.5) } else { (5, 3.0) };
    let load = Load { way: Way::Read, bytes: 2 * MIB, depth: 1, seconds, total: TOTAL };
    let (mut ms, mut against) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        sleep(REST);
        let idle = ours.p99_ms(&load, 0)?;
        sleep(REST);
        let busy = ours.p99_ms(&load, 32)?;
        sleep(REST);
        let their_idle = peers::fio_p99(directory, &load, 0, ours.pool.has_huge_pages)?;
        sleep(REST);
        let their_busy = peers::fio_p99(directory, &load, 32, ours.pool.has_huge_pages)?;
        ms.push((busy, idle));
        against.push((busy / idle, their_busy / their_idle));
    }
    let name = LATENCIES;
    Ok(vec![
        Row::of("P9", name, "idle", "ms", Better::Less, Some(0.5), &ms),
        Row::of("P9", format!("{name}, × idle"), "fio", "times", Better::Less, None, &against),
    ])
}

/// A tier, full, with what it holds.
struct Ours {
    shape: Shape,
    tier: Tier,
    told: Receiver<(Action, Instant)>,
    pool: Pool,
    bytes: u64,
    engine: &'static str,
    /// Records that can be got, oldest first.
    there: VecDeque<u64>,
    gone: HashSet<u64>,
    next: u64,
    /// Where reading goes on.
    at: usize,
}

impl Ours {
    fn start(place: &Path, bytes: u64, engine: Engine) -> Outcome<Self> {
        let mut pool = Pool::new(bytes, LANES)?;
        for lane in 0..LANES {
            let extent = pool.lane(lane, bytes);
            fill(lane, pool.slice_mut(extent));
        }
        let mut ours = Self::open(Shape::one(place, CAPACITY, SEGMENT, engine), pool, bytes)?;
        // Once over everything: from then on each write goes where one was before, as in a cache that is in use.
        let load = Load { way: Way::Write, bytes, depth: 32, seconds: f64::INFINITY, total: CAPACITY };
        ours.moved(&load, CAPACITY + SEGMENT)?;
        Ok(ours)
    }

    fn open(shape: Shape, pool: Pool, bytes: u64) -> Outcome<Self> {
        let (hooks, told) = told();
        let mut found = Vec::new();
        let each = |entry: &Entry| found.push((entry.sequence, number(&entry.meta.key)));
        let (tier, started) = start(&shape, &pool.memory, hooks, each)?;
        // The peers' memory is registered before their time begins.
        while started.iter().any(|how| how.is_registering(pool.memory.bytes())) {
            sleep(Duration::from_millis(1));
        }
        found.sort_unstable();
        let there: VecDeque<u64> = found.into_iter().map(|(_, number)| number).collect();
        let next = there.back().map_or(0, |last| last + 1);
        let (engine, gone) = (started[0].engine, HashSet::new());
        Ok(Self { shape, tier, told, pool, bytes, engine, there, gone, next, at: 0 })
    }

    /// The same with other limits.
    fn again(self, limits: Limits) -> Outcome<Self> {
        let Self { shape, tier, pool, bytes, .. } = self;
        drop(tier);
        Self::open(Shape { limits, ..shape }, pool, bytes)
    }

    fn run(&mut self, load: &Load) -> Outcome<Sample> {
        // From the same place each time, as fio.
        self.at = 0;
        let ((cpu_before, _), began) = (usage(), Instant::now());
        let moved = self.moved(load, u64::MAX)?;
        let seconds = began.elapsed().as_secs_f64();
        let gb = moved as f64 / 1e9;
        Ok(Sample { gbps: gb / seconds, cpu_s_per_gb: (usage().0 - cpu_before) / gb })
    }

    /// Until the time is over or so much is under way; bytes of what ended.
    fn moved(&mut self, load: &Load, bytes_max: u64) -> Outcome<u64> {
        let (began, mut begun, mut ended) = (Instant::now(), 0, 0);
        let mut in_flight = 0;
        for lane in 0..asked(load) {
            self.begin(load, lane)?;
            (begun, in_flight) = (begun + self.bytes, in_flight + 1);
        }
        while in_flight > 0 {
            let (action, _) = self.told.recv_timeout(END)?;
            let Some((_, lane)) = self.ended(action)? else { continue };
            (ended, in_flight) = (ended + self.bytes, in_flight - 1);
            if began.elapsed().as_secs_f64() < load.seconds && begun < bytes_max {
                self.begin(load, lane)?;
                (begun, in_flight) = (begun + self.bytes, in_flight + 1);
            }
        }
        Ok(ended)
    }

    fn begin(&mut self, load: &Load, lane: u64) -> Outcome<()> {
        match load.way {
            Way::Write => {
                // Nobody writes into it: two puts may have one.
                let extent = self.pool.lane(lane % load.depth, self.bytes);
                // As in the product: the checksum is computed when the block is copied, for each record.
                let sum = checksum(self.pool.slice(extent));
                self.tier.put(lane, meta(self.next, self.bytes, sum), extent, false)?;
                self.next += 1;
            }
            Way::Read => {
                let wanted = self.readable()?;
                self.tier.get(lane, key(wanted), self.pool.lane(lane, self.bytes))?;
            }
        }
        Ok(())
    }

    /// The next record in the order of writing, over the newest `TOTAL` bytes.
    fn readable(&mut self) -> Outcome<u64> {
        while self.there.front().is_some_and(|first| self.gone.contains(first)) {
            let first = self.there.pop_front().ok_or("no record is there")?;
            self.gone.remove(&first);
        }
        let count = ((TOTAL / self.bytes) as usize).min(self.there.len());
        if count == 0 {
            return Err("no record is there".into());
        }
        self.at = (self.at + 1) % count;
        let mut index = self.there.len() - count + self.at;
        // While others write, the oldest go: the newest are there.
        while self.gone.contains(&self.there[index]) {
            index += 1;
        }
        Ok(self.there[index])
    }

    fn ended(&mut self, action: Action) -> Outcome<Option<(Way, u64)>> {
        match action {
            Action::Stored { token, key, .. } => {
                self.there.push_back(number(&key));
                Ok(Some((Way::Write, token)))
            }
            Action::Loaded { token, .. } => Ok(Some((Way::Read, token))),
            Action::Dropped { key, .. } => {
                self.gone.insert(number(&key));
                Ok(None)
            }
            other => Err(format!("{other:?}").into()),
        }
    }

    /// Of one read after the other, while so many writes are kept under way.
    fn p99_ms(&mut self, load: &Load, writes: u64) -> Outcome<f64> {
        let began = Instant::now();
        let is_over = || began.elapsed().as_secs_f64() > load.seconds;
        // The reader's lane is the last one: no writer has it.
        let reader = LANES - 1;
        let writing = Load { way: Way::Write, depth: writes, ..*load };
        let mut times = Vec::new();
        (0..writes).try_for_each(|lane| self.begin(&writing, lane))?;
        self.begin(load, reader)?;
        let (mut in_flight, mut asked) = (writes + 1, Instant::now());
        while in_flight > 0 {
            let (action, at) = self.told.recv_timeout(END)?;
            let Some((way, lane)) = self.ended(action)? else { continue };
            in_flight -= 1;
            if way == Way::Read {
                times.push(at.duration_since(asked).as_secs_f64() * 1e3);
            }
            if !is_over() {
                if way == Way::Read {
                    asked = Instant::now();
                }
                self.begin(if way == Way::Read { load } else { &writing }, lane)?;
                in_flight += 1;
            }
        }
        times.sort_by(f64::total_cmp);
        Ok(times[(times.len() * 99 / 100).min(times.len() - 1)])
    }
}
