//! Kills a process with a tier at random moments, again and again, and looks at what is left.
//!
//! What must be there is known here, outside: the process that is killed tells before it acts. After a kill the
//! directory is opened again, sometimes by the next process at once (a loop of crashes), else by this one, which
//! reads every record. I1: no wrong byte. I7: what ended durable is there, unless its eviction was told.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::Receiver,
    time::{Duration, Instant},
};

use pillion_ssd::{
    format::Entry,
    store::Action,
    tier::{Engine, Tier},
    verify,
};
use serde_json::{Value, json};

use crate::{
    child::{RECORD_BYTES_MAX, bytes_of, content_seed},
    report,
    rig::{Dice, Outcome, Pool, Scratch, Shape, fill, key, number, start, told},
};

/// Kills of one set of directories; then others, of another shape.
const KILLS_PER_PLACE: u64 = 50;
/// Segments of one directory that a kill may leave to be scanned: one that fills, those that are being sealed.
const SCANNED_MAX: u64 = 4;
const LANES: u64 = 16;

#[derive(Default, Debug)]
struct Tally {
    kills: u64,
    kills_while_starting: u64,
    crash_loops: u64,
    offered: u64,
    acknowledged: u64,
    evicted: u64,
    removed: u64,
    records_checked: u64,
    must_checked: u64,
    scanned_max: u64,
    scanned: u64,
    torn: u64,
    starts: u64,
    recovery_ms: Vec<f64>,
    wrong_bytes: u64,
    lost: u64,
    failures: Vec<String>,
}

impl Tally {
    fn fail(&mut self, run: u64, what: String) {
        eprintln!("run {run}: {what}");
        if self.failures.len() < 50 {
            self.failures.push(format!("run {run}: {what}"));
        }
    }

    fn started(&mut self, run: u64, scanned: u64, directories: u64) {
        self.starts += 1;
        self.scanned += scanned;
        self.scanned_max = self.scanned_max.max(scanned);
        if scanned > SCANNED_MAX * directories {
            self.fail(run, format!("{scanned} segments had to be scanned in {directories} directories"));
        }
    }
}

/// What may and what must be in some directories.
struct Place {
    shape: Shape,
    content: u64,
    /// Ever offered here.
    offered: BTreeSet<u64>,
    /// Acknowledged as durable, or read after an earlier start, and not evicted or removed since.
    must: BTreeSet<u64>,
}

pub(crate) fn run(below: &Path, json: Option<&Path>, runs: u64, seed: u64) -> Outcome<bool> {
    let scratch = Scratch::new(below, "soak")?;
    let machine = report::machine(&scratch.0);
    let mut dice = Dice::new(seed);
    let mut tally = Tally::default();
    let began = Instant::now();
    let mut place: Option<Place> = None;
    for run in 0..runs {
        if let Some(old) = place.take_if(|_| run % KILLS_PER_PLACE == 0) {
            finish(run, &old, &mut tally)?;
        }
        let place = match &mut place {
            Some(place) => place,
            None => place.insert(make(&scratch, run, &mut dice)?),
        };
        let is_last = run + 1 == runs || (run + 1) % KILLS_PER_PLACE == 0;
        let is_loop = dice.percent(25) && !is_last;
        one(run, place, &mut dice, &mut tally)?;
        if is_loop {
            tally.crash_loops += 1;
        } else {
            check(run, place, &mut dice, &mut tally)?;
        }
        if (run + 1) % 100 == 0 {
            eprintln!("    {} of {runs} kills, {} failures", run + 1, tally.failures.len());
        }
    }
    if let Some(place) = place {
        finish(runs, &place, &mut tally)?;
    }
    let sound = tally.failures.is_empty();
    let report = tell(&tally, &machine, runs, seed, began.elapsed());
    println!("{}", serde_json::to_string_pretty(&report)?);
    report::write(json, &report)?;
    Ok(sound)
}

fn make(scratch: &Scratch, run: u64, dice: &mut Dice) -> Outcome<Place> {
    let directories = 1 + u64::from(dice.percent(30));
    let segment_bytes = [1 << 20, 2 << 20, 4 << 20][dice.below(3) as usize];
    let paths: Outcome<Vec<PathBuf>> =
        (0..directories).map(|number| scratch.sub(&format!("place-{run}-{number}"))).collect();
    let capacity_bytes = segment_bytes * (4 + dice.below(9));
    let shape = Shape::of(paths?, capacity_bytes, segment_bytes, Engine::Auto);
    Ok(Place { shape, content: dice.roll(), offered: BTreeSet::new(), must: BTreeSet::new() })
}

/// A process, killed at some moment.
fn one(run: u64, place: &mut Place, dice: &mut Dice, tally: &mut Tally) -> Outcome<()> {
    let shape = &place.shape;
    let numbers = [shape.segment_bytes, shape.capacity_bytes, place.content, dice.roll() >> 1];
    let mut child = Command::new(std::env::current_exe()?)
        .args(["child", if dice.percent(30) { "threads" } else { "auto" }])
        .args(numbers.map(|number| number.to_string()))
        .args(&shape.paths)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let out = child.stdout.take().ok_or("no pipe")?;
    let reader =
        std::thread::spawn(move || BufReader::new(out).lines().map_while(Result::ok).collect::<Vec<_>>());
    // Some while it starts, most while it works.
    let most_us = if dice.percent(20) { 12_000 } else { 150_000 };
    std::thread::sleep(Duration::from_micros(dice.below(most_us)));
    let ended = kill(&mut child)?;
    let lines = reader.join().map_err(|_| "the reader of the pipe panicked")?;
    tally.kills += 1;
    if let Some(code) = ended {
        tally.fail(run, format!("the process ended by itself with {code}"));
    }
    tally.kills_while_starting += u64::from(!lines.iter().any(|line| line.starts_with('+')));
    hear(run, place, &lines, tally);
    Ok(())
}

/// SIGKILL. An exit code, if it was not needed any more.
fn kill(child: &mut Child) -> Outcome<Option<i32>> {
    child.kill()?;
    Ok(child.wait()?.code())
}

fn hear(run: u64, place: &mut Place, lines: &[String], tally: &mut Tally) {
    let directories = place.shape.paths.len() as u64;
    for line in lines {
        let mut words = line.split(' ');
        let what = words.next().unwrap_or_default();
        let mut count = || words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(u64::MAX);
        let n = count();
        match what {
            "+" => tally.started(run, n, directories),
            "P" => {
                tally.offered += 1;
                place.offered.insert(n);
            }
            "S" => {
                if count() == 1 {
                    tally.acknowledged += 1;
                    place.must.insert(n);
                }
            }
            "D" => {
                tally.evicted += 1;
                place.must.remove(&n);
            }
            "R" => {
                tally.removed += 1;
                place.must.remove(&n);
            }
            "W" => {
                tally.wrong_bytes += 1;
                tally.fail(run, format!("wrong bytes of {n}"));
            }
            _ => tally.fail(run, format!("the process said: {line}")),
        }
    }
}

/// Opens what is left, reads all of it, and compares.
fn check(run: u64, place: &mut Place, dice: &mut Dice, tally: &mut Tally) -> Outcome<()> {
    let mut shape = place.shape.clone();
    if dice.percent(30) {
        shape.engine = Engine::Threads;
    }
    let pool = Pool::new(RECORD_BYTES_MAX, LANES)?;
    let (hooks, told) = told();
    // Copies of one key: each was offered, one is served.
    let mut there: BTreeMap<u64, u64> = BTreeMap::new();
    let began = Instant::now();
    let (tier, started) = start(&shape, &pool.memory, hooks, |entry: &Entry| {
        there.insert(number(&entry.meta.key), entry.meta.bytes);
    })?;
    tally.recovery_ms.push(began.elapsed().as_secs_f64() * 1e3);
    let scanned = started.iter().map(|how| u64::from(how.report.scanned)).sum();
    tally.started(run, scanned, place.shape.paths.len() as u64);
    tally.torn += started.iter().map(|how| how.report.torn).sum::<u64>();
    for n in &place.must {
        tally.must_checked += 1;
        if !there.contains_key(n) {
            tally.lost += 1;
            tally.fail(run, format!("record {n} was acknowledged and is gone"));
        }
    }
    for (n, bytes) in &there {
        if !place.offered.contains(n) || *bytes != bytes_of(place.content, *n) {
            tally.fail(run, format!("record {n} of {bytes} bytes was never offered"));
        }
    }
    tally.records_checked += there.len() as u64;
    let wrong = load_all(place, &tier, &pool, &told, there.keys().copied().collect())?;
    tally.wrong_bytes += wrong.iter().filter(|text| text.starts_with("wrong")).count() as u64;
    wrong.into_iter().for_each(|text| tally.fail(run, text));
    // It was read and synced: from now on it is as good as acknowledged.
    place.must = there.into_keys().collect();
    drop(tier);
    Ok(())
}

fn load_all(
    place: &Place,
    tier: &Tier,
    pool: &Pool,
    told: &Receiver<(Action, Instant)>,
    mut numbers: Vec<u64>,
) -> Outcome<Vec<String>> {
    let mut free: Vec<u64> = (0..LANES).collect();
    let (mut wrong, mut in_flight) = (Vec::new(), 0);
    let mut wanted = Vec::new();
    loop {
        while let Some(n) = if free.is_empty() { None } else { numbers.pop() } {
            let lane = free.pop().ok_or("a lane")?;
            tier.get(lane, key(n), pool.lane(lane, bytes_of(place.content, n)))?;
            in_flight += 1;
        }
        if in_flight == 0 {
            return Ok(wrong);
        }
        match told.recv_timeout(Duration::from_secs(30))?.0 {
            Action::Loaded { token, key, .. } => {
                let n = number(&key);
                let extent = pool.lane(token, bytes_of(place.content, n));
                wanted.resize(extent.bytes as usize, 0);
                fill(content_seed(place.content, n), &mut wanted);
                if pool.slice(extent) != wanted {
                    wrong.push(format!("wrong bytes of {n}"));
                }
                free.push(token);
                in_flight -= 1;
            }
            Action::LoadFailed { token, key, error } => {
                wrong.push(format!("record {} was recovered and cannot be had: {error}", number(&key)));
                free.push(token);
                in_flight -= 1;
            }
            other => wrong.push(format!("nothing is written, and {other:?} is told")),
        }
    }
}

/// What the doctor says at the end, when the last owner ended in order.
fn finish(run: u64, place: &Place, tally: &mut Tally) -> Outcome<()> {
    for path in &place.shape.paths {
        let verdict = verify::inspect(path)?;
        if verdict.problem_count > 0 || verdict.unsealed > 0 {
            tally.fail(run, format!("the doctor says: {verdict}"));
        }
        std::fs::remove_dir_all(path)?;
    }
    Ok(())
}

fn tell(tally: &Tally, machine: &Value, runs: u64, seed: u64, time: Duration) -> Value {
    let mut times = tally.recovery_ms.clone();
    times.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let index = ((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1));
        times.get(index).map(|ms| (ms * 100.0).round() / 100.0)
    };
    json!({
        "campaign": "ssd-kill",
        "commit": report::commit(),
        "machine": machine,
        "seed": seed,
        "runs": runs,
        "seconds": time.as_secs(),
        "kills": tally.kills,
        "kills_while_starting": tally.kills_while_starting,
        "starts_right_after_a_kill_without_a_look": tally.crash_loops,
        "puts_offered": tally.offered,
        "puts_acknowledged_durable": tally.acknowledged,
        "evictions_told": tally.evicted,
        "removals": tally.removed,
        "acknowledged_records_looked_for": tally.must_checked,
        "records_read_and_compared": tally.records_checked,
        "records_cut_off": tally.torn,
        "segments_scanned_per_start": { "mean": tally.scanned as f64 / tally.starts.max(1) as f64, "max": tally.scanned_max },
        "recovery_ms": { "p50": at(0.5), "p99": at(0.99), "max": at(1.0) },
        "wrong_bytes": tally.wrong_bytes,
        "acknowledged_and_lost": tally.lost,
        "failures": tally.failures,
    })
}
