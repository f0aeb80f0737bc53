//! P14: how long a start takes, by the footers of sealed segments and by the headers of records, and its memory.
//!
//! Each start is a process of its own, so that its memory is only its own.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use pillion_ssd::{
    Aligned,
    device::directory::{Directory, Use},
    format::{Entry, Footer, SECTOR, SegmentHeader, SegmentId, checksum},
    store::Action,
    tier::Engine,
};
use serde_json::{Value, json};

use crate::{
    report::{self, Better, Row},
    rig::{Outcome, Pool, Scratch, Shape, fill, meta, start, told, usage},
};

const SEGMENT: u64 = 64 << 20;
const RECORD: u64 = SECTOR as u64;
/// The page of budgets speaks of records of 2 MiB, in segments of the product's default length.
const LARGE_RECORD: u64 = 2 << 20;
const LARGE_SEGMENT: u64 = 256 << 20;
const TERABYTE: u64 = 1_000_000_000_000;
const LANES: u64 = 128;

pub(crate) fn run(below: &Path, json: Option<&Path>, quick: bool) -> Outcome<bool> {
    let scratch = Scratch::new(below, "recovery")?;
    let machine = report::machine(&scratch.0);
    let mut rows = Vec::new();
    let (runs, counts): (usize, &[u64]) = if quick { (3, &[20_000]) } else { (3, &[100_000, 1_000_000]) };
    for &records in counts {
        rows.extend(small(&scratch, records, runs)?);
    }
    rows.extend(terabyte(&scratch, runs)?);
    report::publish(&machine, &rows, json)
}

/// `recover-once SEGMENT CAPACITY DIR`: a start, as JSON.
pub(crate) fn once(arguments: impl Iterator<Item = String>) -> Outcome<()> {
    let arguments: Vec<String> = arguments.collect();
    let [segment, capacity, directory] = arguments.as_slice() else {
        return Err("expected 3 arguments".into());
    };
    let shape = Shape::one(Path::new(directory), capacity.parse()?, segment.parse()?, Engine::Auto);
    let pool = Pool::new(RECORD, 1)?;
    let (hooks, _told) = told();
    let ((cpu_before, rss_before), began) = (usage(), Instant::now());
    let mut records = 0_u64;
    let (tier, started) = start(&shape, &pool.memory, hooks, |_| records += 1)?;
    let seconds = began.elapsed().as_secs_f64();
    let (cpu, rss) = usage();
    let report = started[0].report;
    println!(
        "{}",
        json!({
            "seconds": seconds, "records": records, "sealed": report.sealed, "scanned": report.scanned,
            "cpu_s": cpu - cpu_before, "rss_before": rss_before, "rss": rss,
        })
    );
    // Without an orderly end: the next start is to find the same.
    std::mem::forget(tier);
    std::process::exit(0);
}

struct Start {
    seconds: f64,
    records: f64,
    scanned: f64,
    cpu_s: f64,
    rss: f64,
}

fn recover(directory: &Path, segment: u64, capacity: u64) -> Outcome<Start> {
    let output = Command::new(std::env::current_exe()?)
        .args(["recover-once".to_owned(), segment.to_string(), capacity.to_string()])
        .arg(directory)
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    let value: Value = serde_json::from_slice(&output.stdout)?;
    let of = |name: &str| value.get(name).and_then(Value::as_f64).ok_or("a figure is missing");
    Ok(Start {
        seconds: of("seconds")?,
        records: of("records")?,
        scanned: of("scanned")?,
        cpu_s: of("cpu_s")?,
        rss: of("rss")?,
    })
}

/// Many small records: by footers, then without any.
fn small(scratch: &Scratch, records: u64, runs: usize) -> Outcome<Vec<Row>> {
    eprintln!("    {records} records of {RECORD} bytes");
    let directory = scratch.sub("small")?;
    let capacity = (records * (RECORD + 8192 + 200) / SEGMENT + 4) * SEGMENT;
    write(&directory, records, capacity)?;
    let (mut footers, mut headers, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    let mut rss = Vec::new();
    let trailers = trailers(&directory)?;
    for _ in 0..runs {
        let start = expect(records, recover(&directory, SEGMENT, capacity)?)?;
        footers.push(start.records / start.seconds);
        rss.push((start.rss / 1e6, 100.0));
        // As if every segment had been open when the writer was killed. The start seals them: each time anew.
        wipe(&trailers)?;
        let start = expect(records, recover(&directory, SEGMENT, capacity)?)?;
        if start.scanned < trailers.len() as f64 {
            return Err("a footer was used that should be gone".into());
        }
        headers.push(start.records / start.seconds);
        cpu.push(start.cpu_s / start.seconds);
        for (path, trailer) in &trailers {
            File::options().write(true).open(path)?.write_all_at(trailer, SEGMENT - SECTOR as u64)?;
        }
    }
    std::fs::remove_dir_all(&directory)?;
    let thousands = format!("{} k records of 4 KiB", records / 1000);
    let pairs: Vec<_> = footers.into_iter().zip(headers).collect();
    let mut scan = Row::of(
        "P14",
        format!("recovery by headers and payloads, {thousands}"),
        "by footers",
        "1/s",
        Better::More,
        None,
        &pairs.iter().map(|(footers, headers)| (*headers, *footers)).collect::<Vec<_>>(),
    );
    scan.note = report::median(&cpu).map(|cores| format!("{cores:.2} cores"));
    Ok(vec![
        Row::of(
            "P14",
            format!("recovery by footers, {thousands}"),
            "header scan",
            "1/s",
            Better::More,
            None,
            &pairs,
        ),
        scan,
        Row::of("P14", format!("peak RSS, {thousands}"), "100 MB", "MB", Better::Less, Some(1.0), &rss),
    ])
}

fn expect(records: u64, start: Start) -> Outcome<Start> {
    if start.records as u64 == records {
        return Ok(start);
    }
    Err(format!("{} records were recovered, {records} had been written", start.records).into())
}

fn write(directory: &Path, records: u64, capacity: u64) -> Outcome<()> {
    let mut pool = Pool::new(RECORD, LANES)?;
    let lane = pool.lane(0, RECORD);
    fill(1, pool.slice_mut(lane));
    let sum = checksum(pool.slice(lane));
    let (hooks, told) = told();
    let (tier, _) =
        start(&Shape::one(directory, capacity, SEGMENT, Engine::Auto), &pool.memory, hooks, |_| ())?;
    let put = |number: u64| tier.put(number, meta(number, RECORD, sum), lane, false);
    (0..LANES.min(records)).try_for_each(put)?;
    for number in 0..records {
        match told.recv_timeout(Duration::from_secs(60))?.0 {
            Action::Stored { .. } => {}
            other => return Err(format!("{other:?}").into()),
        }
        if number + LANES < records {
            put(number + LANES)?;
        }
    }
    Ok(())
}

type Trailers = Vec<(std::path::PathBuf, Vec<u8>)>;

/// The last sectors of all segments.
fn trailers(directory: &Path) -> Outcome<Trailers> {
    let mut trailers = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "segment") {
            let mut trailer = vec![0; SECTOR];
            File::open(&path)?.read_exact_at(&mut trailer, SEGMENT - SECTOR as u64)?;
            trailers.push((path, trailer));
        }
    }
    Ok(trailers)
}

fn wipe(trailers: &Trailers) -> Outcome<()> {
    for (path, _) in trailers {
        let file = File::options().write(true).open(path)?;
        file.write_all_at(&[0; SECTOR], SEGMENT - SECTOR as u64)?;
        file.sync_all()?;
    }
    Ok(())
}

/// A terabyte of records of 2 MiB: files with holes for payloads, which a start by footers does not read.
fn terabyte(scratch: &Scratch, runs: usize) -> Outcome<Vec<Row>> {
    eprintln!("    a terabyte of records of 2 MiB");
    let directory = scratch.sub("terabyte")?;
    let block = Directory::open(&directory, Use::Own { segment_bytes: LARGE_SEGMENT })?.superblock();
    let segments = TERABYTE.div_ceil(LARGE_SEGMENT) as u32;
    let mut sequence = 1;
    for slot in 0..segments {
        let mut id = [0; 16];
        fill(u64::from(slot) + 1, &mut id);
        let segment = SegmentId(id);
        let mut sector = Aligned::zeroed(SECTOR);
        let header = SegmentHeader {
            directory: block.directory,
            segment,
            slot,
            segment_bytes: LARGE_SEGMENT,
            first_sequence: sequence,
        };
        header.encode(sector.bytes_mut());
        let (mut footer, mut position) = (Footer::default(), SECTOR as u64);
        loop {
            let meta = meta(sequence, LARGE_RECORD, 0);
            if position + meta.footprint() + footer.bytes_with(&meta) > LARGE_SEGMENT {
                break;
            }
            let entry = Entry { meta, segment, sequence, position };
            (position, sequence) = (entry.end(), sequence + 1);
            footer.push(entry);
        }
        let mut tail = Aligned::zeroed(footer.bytes() as usize);
        footer.encode(segment, tail.bytes_mut());
        let file = File::create_new(directory.join(format!("{slot:08}.segment")))?;
        file.set_len(LARGE_SEGMENT)?;
        file.write_all_at(sector.bytes(), 0)?;
        file.write_all_at(tail.bytes(), LARGE_SEGMENT - tail.len() as u64)?;
    }
    // On the disk, and out of the way of the first start.
    rustix::fs::sync();
    let capacity = u64::from(segments) * LARGE_SEGMENT;
    let (mut seconds, mut rss, mut cores) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        let start = expect(sequence - 1, recover(&directory, LARGE_SEGMENT, capacity)?)?;
        seconds.push((start.seconds * TERABYTE as f64 / capacity as f64, 5.0));
        rss.push((start.rss / 1e6, 100.0));
        cores.push((start.cpu_s / start.seconds, 1.0));
    }
    std::fs::remove_dir_all(&directory)?;
    let name = format!("a terabyte of 2 MiB records ({} k)", (sequence - 1) / 1000);
    let row = |case: String, peer: &str, unit, budget, pairs: &[(f64, f64)]| {
        Row::of("P14", case, peer, unit, Better::Less, budget, pairs)
    };
    Ok(vec![
        row(format!("recovery by footers, {name}"), "5 s", "s/TB", Some(1.0), &seconds),
        row(format!("peak RSS, {name}"), "100 MB", "MB", Some(1.0), &rss),
        row(format!("cores while recovering, {name}"), "1 core", "cores", Some(1.0), &cores),
    ])
}
