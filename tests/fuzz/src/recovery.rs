//! Recovery over files that were written, overwritten, mixed up and damaged.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use pillion_ssd::{
    device::{Completion, Device, Op, Part, Wake, What},
    format::{
        Asked, Commit, DirectoryId, Entry, Footer, OVERHEAD, RecordHeader, RecordMeta, SECTOR, SegmentHeader,
        SegmentId, Superblock, VerifiedRecord, checksum, padded,
    },
    recover::{Found, recover},
    verify::verify,
};

use crate::{cursor::Cursor, ssd};

const SLOTS: usize = 2;
const STEPS_MAX: usize = 64;
const PAYLOAD_MAX: u64 = 5 * SECTOR as u64;
const DIRECTORY: DirectoryId = DirectoryId([7; 16]);

/// A directory in memory that is only read. Some of its sectors cannot be.
struct Files {
    files: Vec<Vec<u8>>,
    unreadable: Option<(u32, u64)>,
    waiting: VecDeque<Op>,
    most_bytes: u64,
}

struct Nobody;

impl Wake for Nobody {
    fn wake(&self) {}
}

impl Files {
    fn bytes(&self) -> u64 {
        self.files[0].len() as u64
    }

    fn run(&mut self, mut op: Op) -> Completion {
        if op.what == What::Sync {
            return Completion::judge(op, Ok(0));
        }
        assert_eq!(op.what, What::Read, "recovery writes nothing");
        let file = &self.files[op.slot as usize];
        let (at, bytes) = (op.at as usize, op.bytes());
        assert!(op.at.is_multiple_of(SECTOR as u64) && bytes.is_multiple_of(SECTOR as u64));
        self.most_bytes = self.most_bytes.max(bytes);
        let bad = |(slot, sector): (u32, u64)| {
            slot == op.slot && (op.at..op.at + bytes).contains(&(sector * SECTOR as u64))
        };
        if self.unreadable.is_some_and(bad) {
            return Completion::judge(op, Err(5));
        }
        let mut from = file.get(at..at + bytes as usize).expect("recovery reads inside of files");
        for part in &mut op.parts {
            let Part::Owned(buffer) = part else { panic!("recovery reads into buffers of its own") };
            let (head, tail) = from.split_at(buffer.len());
            buffer.bytes_mut().copy_from_slice(head);
            from = tail;
        }
        Completion::judge(op, Ok(bytes))
    }
}

impl Device for Files {
    fn engine(&self) -> &'static str {
        "memory"
    }
    fn superblock(&self) -> Superblock {
        Superblock { directory: DIRECTORY, segment_bytes: self.bytes() }
    }
    fn slots(&self) -> Vec<u32> {
        (0..self.files.len() as u32).collect()
    }
    fn depth(&self) -> usize {
        8
    }
    fn submit(&mut self, op: Op) {
        self.waiting.push_back(op);
    }
    fn wait(&mut self, _: Option<Duration>, done: &mut Vec<Completion>) {
        while let Some(op) = self.waiting.pop_front() {
            let completion = self.run(op);
            done.push(completion);
        }
    }
    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(Nobody)
    }
}

/// One file while it is written.
struct File {
    bytes: Vec<u8>,
    /// The step that wrote each sector last: a record is whole where all of its sectors are of its own.
    written_by: Vec<usize>,
    /// Records with the step that wrote them whole.
    whole: Vec<(usize, Entry)>,
    footer: Footer,
    next: u64,
}

impl File {
    fn put(&mut self, step: usize, sector: u64, bytes: &[u8]) {
        let at = sector as usize * SECTOR;
        let Some(place) = self.bytes.get_mut(at..at + bytes.len()) else { return };
        place.copy_from_slice(bytes);
        self.written_by[at / SECTOR..(at + bytes.len()) / SECTOR].fill(step);
    }

    fn is_whole(&self, step: usize, entry: &Entry) -> bool {
        let sectors = entry.position as usize / SECTOR..entry.end() as usize / SECTOR;
        self.written_by.get(sectors).is_some_and(|by| by.iter().all(|by| *by == step))
    }

    /// A record, whole or not quite, where the last one ended or anywhere.
    fn record(&mut self, c: &mut Cursor<'_>, step: usize, segment: SegmentId) {
        let payload = vec![c.byte(); 1 + (c.number() % PAYLOAD_MAX) as usize];
        let position = if c.rarely() { c.number() % 64 * SECTOR as u64 } else { self.next };
        let meta = RecordMeta { bytes: payload.len() as u64, checksum: checksum(&payload), ..ssd::meta(c) };
        let mut entry = Entry { meta, segment, sequence: c.number(), position };
        if position == 0 || entry.end() > self.bytes.len() as u64 {
            return;
        }
        // What is wrong with it, if anything.
        let (wrong, by) = (c.byte(), c.number());
        match wrong {
            240 => entry.position = entry.position.wrapping_add(by.wrapping_mul(SECTOR as u64)),
            241 => entry.meta.checksum ^= by,
            242 => entry.meta.bytes = 1 + by % (4 * PAYLOAD_MAX),
            243 => entry.sequence = by,
            _ => {}
        }
        let mut bytes = vec![0; SECTOR + padded(payload.len() as u64) as usize + SECTOR];
        let sum = entry.encode(&mut bytes[..SECTOR]);
        bytes[SECTOR..SECTOR + payload.len()].copy_from_slice(&payload);
        let last = bytes.len() - SECTOR;
        if entry.position < 1 << 40 {
            entry.commit(sum).encode(&mut bytes[last..]);
        }
        match wrong {
            244 => bytes[last..].fill(0),
            245 => bytes[..SECTOR].fill(0),
            246 => bytes[SECTOR] ^= by as u8,
            _ => {}
        }
        self.put(step, position / SECTOR as u64, &bytes);
        let decodes = RecordHeader::decode(&bytes[..SECTOR]).is_ok_and(|(found, _)| found == entry);
        if !(240..=246).contains(&wrong) && decodes {
            self.whole.push((step, entry.clone()));
            self.footer.push(entry.clone());
            self.next = entry.end();
        }
    }

    fn seal(&mut self, step: usize, segment: SegmentId) {
        let bytes = self.footer.bytes();
        let at = self.bytes.len() as u64 - bytes.min(self.bytes.len() as u64);
        let mut footer = vec![0; bytes as usize];
        self.footer.encode(segment, &mut footer);
        self.put(step, at / SECTOR as u64, &footer);
    }

    fn step(&mut self, c: &mut Cursor<'_>, step: usize, segment: SegmentId) {
        let sectors = self.bytes.len() / SECTOR;
        match c.below(16) {
            0..=8 => self.record(c, step, segment),
            9 => self.seal(step, segment),
            10 => {
                // A write that went elsewhere.
                let (from, to) = (c.below(sectors), c.below(sectors));
                let bytes = self.bytes[from * SECTOR..(from + 1) * SECTOR].to_vec();
                self.put(step, to as u64, &bytes);
            }
            11 => {
                // A bit that rots.
                let at = c.below(sectors) * SECTOR + c.below(SECTOR);
                self.bytes[at] ^= 1 << (c.byte() % 8);
                self.written_by[at / SECTOR] = step;
            }
            12 => {
                let at = c.below(sectors);
                self.put(step, at as u64, &[0; SECTOR]);
            }
            13 => {
                // Any bytes, which may begin as a structure of ours does.
                let at = c.below(sectors);
                let mut sector = self.bytes[at * SECTOR..(at + 1) * SECTOR].to_vec();
                let from = c.below(128);
                let bytes = c.blob(64);
                sector[from..from + bytes.len()].copy_from_slice(bytes);
                if c.flag() {
                    let sum = checksum(&sector[..SECTOR - 8]);
                    sector[SECTOR - 8..].copy_from_slice(&sum.to_le_bytes());
                }
                self.put(step, at as u64, &sector);
            }
            14 => self.next = (1 + c.below(sectors) as u64) * SECTOR as u64,
            _ => self.footer = Footer::default(),
        }
    }
}

fn segment_of(slot: usize) -> SegmentId {
    SegmentId([slot as u8 + 1; 16])
}

fn written(c: &mut Cursor<'_>) -> Vec<File> {
    let sectors = 16 + c.below(49);
    let mut files: Vec<File> = (0..SLOTS)
        .map(|slot| {
            let mut file = File {
                bytes: vec![0; sectors * SECTOR],
                written_by: vec![0; sectors],
                whole: Vec::new(),
                footer: Footer::default(),
                next: SECTOR as u64,
            };
            let header = SegmentHeader {
                directory: DIRECTORY,
                segment: segment_of(slot),
                slot: slot as u32,
                segment_bytes: (sectors * SECTOR) as u64,
                first_sequence: 0,
            };
            if !c.rarely() {
                header.encode(&mut file.bytes[..SECTOR]);
            }
            file
        })
        .collect();
    for step in 1..=STEPS_MAX {
        if c.is_empty() {
            break;
        }
        let slot = if c.rarely() { 1 } else { 0 };
        // Of an earlier life of the file, now and then.
        let segment = if c.rarely() { SegmentId([99; 16]) } else { segment_of(slot) };
        files[slot].step(c, step, segment);
    }
    files
}

/// What recovery finds lies inside of its file, in order, without overlap. In a segment without a footer each record is
/// proved, and every record that was written whole and not touched since is found. Looking twice finds the same, and
/// the verdict of `pillion doctor --ssd` goes together with it.
pub fn ssd_recovery(data: &[u8]) {
    let mut c = Cursor::new(data, 4096);
    let unreadable = c.rarely().then(|| (u32::from(c.flag()), u64::from(c.byte() % 64)));
    let files = written(&mut c);
    let mut device = Files {
        files: files.iter().map(|file| file.bytes.clone()).collect(),
        unreadable,
        waiting: VecDeque::new(),
        most_bytes: 0,
    };
    let mut all = Vec::new();
    let report = recover(&mut device, |slot, found| all.push((slot, found)));
    assert_eq!(all.len(), files.len(), "each file is told once");
    assert!(device.most_bytes <= device.bytes());
    for (slot, found) in &all {
        let file = &files[*slot as usize];
        let Found::Segment { id, sealed, entries, proved, holed, .. } = found else { continue };
        ssd::check_entries(entries, *id, file.bytes.len() as u64);
        assert!(holed.iter().all(|at| (SECTOR as u64..file.bytes.len() as u64).contains(at)));
        assert!(proved, "small files are read whole");
        if *sealed {
            continue;
        }
        entries.iter().for_each(|entry| is_proved(&file.bytes, entry));
        for (step, entry) in &file.whole {
            let is_there = entry.segment != *id || !file.is_whole(*step, entry) || entries.contains(entry);
            assert!(is_there, "a record that is whole was not found: {entry:?}");
        }
    }
    let mut again = Vec::new();
    assert_eq!(recover(&mut device, |slot, found| again.push((slot, found))), report);
    assert_eq!(again, all);
    let verdict = verify(&mut device);
    assert!(verdict.proved <= report.records && verdict.superseded <= verdict.proved);
    assert_eq!(verdict.torn, report.torn);
    assert!(verdict.problems.len() as u64 <= verdict.problem_count);
    assert!(verdict.unused_bytes() <= verdict.file_bytes());
    let _ = verdict.to_string();
}

/// Header, payload and commit are one record's.
fn is_proved(file: &[u8], entry: &Entry) {
    let record = &file[entry.position as usize..entry.end() as usize];
    assert_eq!(record.len() as u64, padded(entry.meta.bytes) + OVERHEAD);
    let (header, rest) = record.split_at(SECTOR);
    let (payload, commit) = rest.split_at(rest.len() - SECTOR);
    let (found, sum) = RecordHeader::decode(header).expect("a header");
    assert_eq!(found, *entry);
    assert_eq!(checksum(&payload[..entry.meta.bytes as usize]), entry.meta.checksum);
    Commit::expect(commit, &found.commit(sum)).expect("its commit");
    let asked = Asked {
        key: entry.meta.key,
        bytes: entry.meta.bytes,
        segment: entry.segment,
        position: entry.position,
    };
    // What fills the last sector is not looked at by recovery, but by every load.
    if payload[entry.meta.bytes as usize..].iter().all(|byte| *byte == 0) {
        let proved = VerifiedRecord::verify(&asked, header, payload).expect("proved");
        assert_eq!(proved.payload().len() as u64, entry.meta.bytes);
    }
}
