//! P12: the presence table, which is what an engine's scheduler looks into, on one core; beside dashmap and a Python
//! dictionary, which is what vLLM's own prefix cache is.

use std::{hint::black_box, path::Path, time::Instant};

use pillion_shm::presence::{IndexKey, TableReader, TableWriter, table_bytes};
use serde_json::Value;

use crate::{
    peers::Peer,
    report::{self, Better, Row},
    rig::{Dice, Outcome},
};

/// A long prefix: 8 k tokens in blocks of 16.
const PREFIX: usize = 512;
const STALE_MS: u32 = 60_000;
/// What a page of budgets says.
const BUDGET_MOPS: f64 = 7.0;
const BUDGET_PREFIX_US: f64 = 10.0;
const BUDGET_ENTRY_BYTES: f64 = 64.0;
/// A dictionary as vLLM's, asked block by block; microseconds.
const DICTIONARY: &str = "
import os, statistics, sys, time
blocks, prefix = int(sys.argv[1]), int(sys.argv[2])
hashes = [os.urandom(32) for _ in range(blocks)]
table = dict.fromkeys(hashes, 1)
times = []
for turn in range(400):
    at = turn * 7919 % (blocks - prefix)
    run = hashes[at : at + prefix]
    began = time.perf_counter()
    found = 0
    for block in run:
        if table.get(block) is None:
            break
        found += 1
    times.append(time.perf_counter() - began)
print('{\"prefix_us\": %f}' % (statistics.median(times) * 1e6))
";

/// Millions of operations a second, and what a prefix takes.
#[derive(Debug, Clone, Copy)]
struct Sample {
    publish: f64,
    lookup: f64,
    withdraw: f64,
    prefix_us: f64,
}

fn hashes(count: usize) -> Vec<[u8; 32]> {
    let mut dice = Dice::new(1);
    let mut hash = || {
        let mut bytes = [0; 32];
        bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&dice.roll().to_le_bytes()));
        bytes
    };
    (0..count).map(|_| hash()).collect()
}

/// Every operation begins with the engine's own hash of a block, as in the product.
fn ours(hashes: &[[u8; 32]]) -> Outcome<Sample> {
    let (blocks, space, seed) = (hashes.len(), [7; 16], 11);
    let key = |hash: &[u8; 32]| IndexKey::new(seed, &space, hash);
    let millions = |began: Instant| blocks as f64 / began.elapsed().as_secs_f64() / 1e6;
    // Half full, as configured by default.
    let mut writer = TableWriter::create(2 * blocks as u64)?;
    let reader = TableReader::open(writer.memfd().fd().try_clone_to_owned()?, STALE_MS)?;
    // The pages are there before an engine comes.
    for hash in hashes {
        writer.set(key(hash), 1);
        writer.remove(key(hash));
    }

    let began = Instant::now();
    let refused = hashes.iter().filter(|hash| !writer.set(key(hash), 1)).count();
    let publish = millions(began);
    if refused * 1000 > blocks {
        return Err(
            format!("{refused} of {blocks} blocks found no place in a table that is half full").into()
        );
    }

    let (mut dice, mut found) = (Dice::new(7), 0);
    let runs = blocks / PREFIX;
    let mut times = Vec::with_capacity(runs);
    let began = Instant::now();
    for _ in 0..runs {
        let from = dice.below((blocks - PREFIX) as u64) as usize;
        let asked = Instant::now();
        let keys = hashes[from..from + PREFIX].iter().map(key);
        found += reader.ahead(keys).take_while(|key| reader.get(*key) != 0).count();
        times.push(asked.elapsed().as_secs_f64() * 1e6);
    }
    let lookup = millions(began);
    if found * 100 < runs * PREFIX * 95 {
        return Err(format!("{found} of {} blocks were found", runs * PREFIX).into());
    }
    let prefix_us = report::median(&times).ok_or("no lookups")?;

    let began = Instant::now();
    hashes.iter().for_each(|hash| writer.remove(key(hash)));
    let withdraw = millions(began);
    black_box(&reader);
    Ok(Sample { publish, lookup, withdraw, prefix_us })
}

pub(crate) fn run(json: Option<&Path>, quick: bool) -> Outcome<bool> {
    let (sizes, runs): (&[usize], usize) = if quick { (&[1 << 18], 3) } else { (&[1 << 18, 1 << 20], 7) };
    let machine = report::machine(Path::new("."));
    let dashmap = Peer::of_variable("dashmap", "PILLION_PEER_DASHMAP");
    let mut rows = Vec::new();
    for &blocks in sizes {
        rows.extend(beside(blocks, runs, &dashmap)?);
    }
    let entry = table_bytes(2 << 20) as f64 / f64::from(1 << 20);
    let pairs = [(entry, BUDGET_ENTRY_BYTES)];
    rows.push(Row::of("P12", "memory of an entry", "64 B", "B", Better::Less, Some(1.0), &pairs));
    report::publish(&machine, &rows, json)
}

type Rate = fn(&Sample) -> f64;

/// Ours and the others, in turn.
fn beside(blocks: usize, runs: usize, dashmap: &Peer) -> Outcome<Vec<Row>> {
    let hashes = hashes(blocks);
    let (count, prefix) = (blocks.to_string(), PREFIX.to_string());
    let asked = ["--blocks", &count, "--prefix", &prefix].map(str::to_owned);
    let python = Peer::of_command("Python's dict", &["python3", "-c", DICTIONARY, &count, &prefix]);
    let (mut samples, mut theirs, mut dictionary) = (Vec::new(), Vec::new(), Vec::new());
    let mut refused = None;
    for _ in 0..runs {
        samples.push(ours(&hashes)?);
        match dashmap.ask(&asked) {
            Ok(value) => theirs.push(value),
            Err(why) => refused = Some(why),
        }
        let said = python.ask(&[])?;
        dictionary.push(said.get("prefix_us").and_then(Value::as_f64).ok_or("the dictionary said nothing")?);
    }
    let against = |of: Rate, limit: f64| -> Vec<(f64, f64)> {
        samples.iter().map(|sample| (of(sample), limit)).collect()
    };
    let mut rows = Vec::new();
    let kinds: [(&str, Rate); 3] =
        [("publish", |one| one.publish), ("lookup", |one| one.lookup), ("withdraw", |one| one.withdraw)];
    for (name, of) in kinds {
        let case = format!("{name}, {} k blocks", blocks >> 10);
        let limit = against(of, BUDGET_MOPS);
        rows.push(Row::of("P12", case.clone(), "7 M/s", "M/s", Better::More, Some(1.0), &limit));
        if let Some(why) = &refused {
            rows.push(Row::without("P12", case, "dashmap", why));
            continue;
        }
        let their = |value: &Value| value.get(name).and_then(Value::as_f64).map(|rate| rate / 1e6);
        let pairs: Option<Vec<_>> =
            samples.iter().zip(&theirs).map(|(one, value)| Some((of(one), their(value)?))).collect();
        let pairs = pairs.ok_or("dashmap's program said nothing")?;
        rows.push(Row::of("P12", case, "dashmap", "M/s", Better::More, None, &pairs));
    }
    let case = format!("a prefix of {PREFIX} of {} k blocks", blocks >> 10);
    let limit = against(|one| one.prefix_us, BUDGET_PREFIX_US);
    rows.push(Row::of("P12", case.clone(), "10 µs", "µs", Better::Less, Some(1.0), &limit));
    let pairs: Vec<_> = samples.iter().zip(&dictionary).map(|(one, us)| (one.prefix_us, *us)).collect();
    rows.push(Row::of("P12", case, "Python's dict", "µs", Better::Less, None, &pairs));
    Ok(rows)
}
