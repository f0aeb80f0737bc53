//! Writes and reads 2 MiB records, 32 at once, and prints GB/s for both engines: a rough look at a disk.
//!
//! `cargo run --release -p pillion-ssd --example throughput -- DIRECTORY [GIB]`
//!
//! It works in directories of its own below the one that is named, and removes them.

use std::{
    fs,
    path::Path,
    ptr::NonNull,
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    time::Instant,
};

use pillion_ssd::{
    Aligned, Extent, Memory,
    format::{RecordKey, RecordMeta, SpaceId, checksum},
    store::{Action, Limits},
    tier::{Config, DirectoryConfig, Engine, Hooks, Tier},
};

const RECORD: u64 = 2 << 20;
const DEPTH: u64 = 32;
const SEGMENT: u64 = 256 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let home = arguments.next().ok_or("usage: throughput DIRECTORY [GIB]")?;
    let gib: u64 = arguments.next().map_or(Ok(2), |text| text.parse())?;
    for (name, engine) in [("io_uring", Engine::Uring), ("threads", Engine::Threads)] {
        let path = Path::new(&home).join(format!("pillion-throughput-{name}"));
        fs::create_dir(&path)?;
        let result = measure(&path, engine, gib << 30);
        fs::remove_dir_all(&path)?;
        let [write, read] = result?;
        println!(
            "{name}: write {write:.2} GB/s, read {read:.2} GB/s (2 MiB records, {DEPTH} at once, proved)"
        );
    }
    Ok(())
}

fn measure(path: &Path, engine: Engine, bytes: u64) -> Result<[f64; 2], Box<dyn std::error::Error>> {
    let mut buffer = Box::new(Aligned::zeroed((DEPTH * RECORD) as usize));
    buffer.bytes_mut().iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 4) as u8);
    let sums: Vec<u64> = buffer.bytes().chunks(RECORD as usize).map(checksum).collect();
    let base = NonNull::new(buffer.bytes_mut().as_mut_ptr()).ok_or("no memory")?;
    // SAFETY: the buffer lives in the `Arc`; each lane has one operation at a time, and nobody else looks.
    let memory = Arc::new(unsafe { Memory::from_raw(base, DEPTH * RECORD, Arc::new(buffer)) });
    let (tell, told) = channel();
    let hooks =
        Hooks { tell: Box::new(move |action| tell.send(action).unwrap_or(())), keep: Box::new(|_, _| false) };
    let directory = DirectoryConfig { path: path.to_owned(), capacity_bytes: bytes + 4 * SEGMENT };
    let config =
        Config { directories: vec![directory], segment_bytes: SEGMENT, limits: Limits::default(), engine };
    let (tier, _) = Tier::start(&config, &memory, hooks, |_| ())?;
    let records = bytes / RECORD;
    let lane = |lane: u64| Extent { offset: lane * RECORD, bytes: RECORD };
    let write = turn(records, &told, |number, free| {
        let meta = RecordMeta {
            key: key(number),
            space: SpaceId([0; 16]),
            hash: [0; 32],
            parent: None,
            tenant: "default".into(),
            format: "throughput".into(),
            bytes: RECORD,
            checksum: sums[free as usize],
        };
        tier.put(free, meta, lane(free), false).map_err(|error| error.to_string())
    })?;
    let read = turn(records, &told, |number, free| {
        tier.get(free, key(number), lane(free)).map_err(|error| error.to_string())
    })?;
    Ok([write, read].map(|seconds| bytes as f64 / seconds / 1e9))
}

/// Seconds for so many operations, `DEPTH` at once; each uses a free lane.
fn turn(
    count: u64,
    told: &Receiver<Action>,
    start: impl Fn(u64, u64) -> Result<(), String>,
) -> Result<f64, Box<dyn std::error::Error>> {
    let began = Instant::now();
    let mut next = DEPTH.min(count);
    (0..next).try_for_each(|number| start(number, number))?;
    for _ in 0..count {
        let free = match told.recv()? {
            Action::Stored { token, .. } | Action::Loaded { token, .. } => token,
            other => return Err(format!("{other:?}").into()),
        };
        if next < count {
            start(next, free)?;
            next += 1;
        }
    }
    Ok(began.elapsed().as_secs_f64())
}

fn key(number: u64) -> RecordKey {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&number.to_le_bytes());
    RecordKey(key)
}
