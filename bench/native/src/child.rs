//! The process that is killed: a tier under a random load, that says what it does before it does it.
//!
//! One line each, written at once to standard output: `+` it runs, `P n d` a put is offered (`d` 1: durable),
//! `S n d` it ended so, `F n` it failed, `R n` a record is about to be removed, `D n` one was evicted, `B n …` one
//! could not be read or was not proved, `W n` a get brought wrong bytes.

use std::{
    collections::{HashMap, HashSet},
    io::Write,
    path::PathBuf,
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use pillion_ssd::{
    Extent, GetError,
    format::checksum,
    store::{Action, DropReason},
    tier::{Engine, Hooks, Started, Tier},
};

use crate::rig::{Dice, Outcome, Pool, Shape, fill, key, meta, number, start};

const LANES: u64 = 24;
/// The longest record of a soak.
pub(crate) const RECORD_BYTES_MAX: u64 = 512 << 10;
/// Numbers of records: some are put again and again, as engines do.
const NUMBERS: u64 = 600;

/// Length of a record, from one sector to 512 KiB; short ones are gathered, long ones go alone.
pub(crate) fn bytes_of(content: u64, number: u64) -> u64 {
    let mut dice = Dice::new(content ^ number.rotate_left(20));
    let sectors = if dice.percent(70) { 1 + dice.below(16) } else { 1 + dice.below(RECORD_BYTES_MAX / 4096) };
    sectors * 4096
}

pub(crate) fn content_seed(content: u64, number: u64) -> u64 {
    content.rotate_left(32) ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93)
}

/// `child ENGINE SEGMENT CAPACITY CONTENT SEED DIR…`
pub(crate) fn run(mut arguments: impl Iterator<Item = String>) -> Outcome<()> {
    let engine = match arguments.next().as_deref() {
        Some("threads") => Engine::Threads,
        _ => Engine::Auto,
    };
    let mut count = || -> Outcome<u64> { Ok(arguments.next().ok_or("expected a number")?.parse()?) };
    let (segment_bytes, capacity_bytes, content, seed) = (count()?, count()?, count()?, count()?);
    let paths: Vec<PathBuf> = arguments.map(PathBuf::from).collect();
    let shape = Shape::of(paths, capacity_bytes, segment_bytes, engine);
    let pool = Pool::new(RECORD_BYTES_MAX, LANES)?;
    let (tell, told) = channel();
    let heard = move |action: Action| {
        match &action {
            Action::Stored { key, durable, .. } => say(&format!("S {} {}", number(key), u8::from(*durable))),
            Action::StoreFailed { key, error, .. } => say(&format!("F {} {error}", number(key))),
            Action::Dropped { key, reason: DropReason::Evicted } => say(&format!("D {}", number(key))),
            Action::Dropped { key, reason } => say(&format!("B {} {reason:?}", number(key))),
            Action::ReadOnly { shelf } => say(&format!("B {shelf} read only")),
            _ => {}
        }
        let _ = tell.send(action);
    };
    let hooks = Hooks { tell: Box::new(heard), keep: Box::new(|key, _| number(key).is_multiple_of(5)) };
    let mut there = HashSet::new();
    let (tier, started) = start(&shape, &pool.memory, hooks, |entry| {
        there.insert(number(&entry.meta.key));
    })?;
    let scanned: u32 = started.iter().map(|how: &Started| how.report.scanned).sum();
    let sealed: u32 = started.iter().map(|how: &Started| how.report.sealed).sum();
    say(&format!("+ {scanned} {sealed} {} {}", there.len(), started[0].engine));
    let free = (0..LANES).collect();
    let (dice, durable) = (Dice::new(seed), [5, 30, 100][(seed % 3) as usize]);
    let load = Load {
        tier,
        pool,
        told,
        free,
        gets: HashMap::new(),
        writing: HashSet::new(),
        dice,
        content,
        durable,
    };
    load.run()
}

/// Whole lines, at once: what is not said cannot be held against the tier.
fn say(line: &str) {
    let mut line = line.replace('\n', " ");
    line.push('\n');
    let sent = std::io::stdout().lock().write_all(line.as_bytes());
    if sent.and_then(|()| std::io::stdout().flush()).is_err() {
        // The parent is gone: so are we.
        std::process::exit(3);
    }
}

struct Load {
    tier: Tier,
    pool: Pool,
    told: Receiver<Action>,
    free: Vec<u64>,
    /// Where a get's bytes go, by lane.
    gets: HashMap<u64, Extent>,
    writing: HashSet<u64>,
    dice: Dice,
    content: u64,
    durable: u64,
}

impl Load {
    /// Until it is killed.
    fn run(mut self) -> Outcome<()> {
        loop {
            let wait = if self.free.is_empty() { Duration::from_secs(30) } else { Duration::ZERO };
            match self.told.recv_timeout(wait) {
                Ok(action) => {
                    self.ended(action);
                    continue;
                }
                Err(_) if self.free.is_empty() => return Err("nothing ended for 30 s".into()),
                Err(_) => {}
            }
            let n = self.dice.below(NUMBERS);
            match self.dice.below(100) {
                0..60 => self.put(n)?,
                60..92 => self.get(n)?,
                92..96 => self.remove(n),
                _ => std::thread::sleep(Duration::from_micros(self.dice.below(3000))),
            }
        }
    }

    fn put(&mut self, n: u64) -> Outcome<()> {
        // One at a time for each key: the parent knows then which ending is whose.
        if !self.writing.insert(n) {
            return Ok(());
        }
        let Some(lane) = self.free.pop() else { return Ok(()) };
        let extent = self.pool.lane(lane, bytes_of(self.content, n));
        fill(content_seed(self.content, n), self.pool.slice_mut(extent));
        let sum = checksum(self.pool.slice(extent));
        let durable = self.dice.percent(self.durable);
        say(&format!("P {n} {}", u8::from(durable)));
        self.tier.put(lane, meta(n, extent.bytes, sum), extent, durable)?;
        Ok(())
    }

    fn get(&mut self, n: u64) -> Outcome<()> {
        let Some(lane) = self.free.pop() else { return Ok(()) };
        let extent = self.pool.lane(lane, bytes_of(self.content, n));
        self.gets.insert(lane, extent);
        self.tier.get(lane, key(n), extent)?;
        Ok(())
    }

    fn remove(&mut self, n: u64) {
        if !self.writing.contains(&n) {
            say(&format!("R {n}"));
            let _ = self.tier.remove(key(n));
        }
    }

    fn ended(&mut self, action: Action) {
        match action {
            Action::Stored { token, key, .. } | Action::StoreFailed { token, key, .. } => {
                self.writing.remove(&number(&key));
                self.free.push(token);
            }
            Action::Loaded { token, key, .. } => {
                self.free.push(token);
                let n = number(&key);
                if let Some(extent) = self.gets.remove(&token) {
                    let mut wanted = vec![0; extent.bytes as usize];
                    fill(content_seed(self.content, n), &mut wanted);
                    if self.pool.slice(extent) != wanted {
                        say(&format!("W {n}"));
                    }
                }
            }
            Action::LoadFailed { token, key, error } => {
                self.free.push(token);
                self.gets.remove(&token);
                if error != GetError::Missing {
                    say(&format!("B {} {error}", number(&key)));
                }
            }
            _ => {}
        }
    }
}
