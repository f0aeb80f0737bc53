//! Reads a whole directory and says what it holds: for `pillion doctor --ssd DIR`. Writes nothing.

use std::{collections::HashMap, fmt};

use crate::{
    device::{Device, IoError},
    format::{
        Asked, Commit, Entry, OVERHEAD, RecordHeader, RecordKey, Refused, SECTOR, Superblock, VerifiedRecord,
        padded,
    },
    recover::{Found, read, recover},
};

/// Problems that are listed one by one; more are counted.
const PROBLEMS_MAX: usize = 100;

/// One thing that is not as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// The segment file.
    pub slot: u32,
    /// Where the record begins; 0 is the segment itself.
    pub position: u64,
    /// What.
    pub what: Wrong,
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// The bytes are not the record's.
    #[error("{0}")]
    Refused(#[from] Refused),
    /// They cannot be read.
    #[error("{0}")]
    Io(#[from] IoError),
}

/// What a directory holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Whose directory.
    pub superblock: Superblock,
    /// Segments with a valid footer.
    pub sealed: u32,
    /// Segments whose headers were scanned: open when the writer ended.
    pub unsealed: u32,
    /// Files without records.
    pub free: u32,
    /// Records whose identity and bytes were proved.
    pub proved: u64,
    /// Bytes of their payloads.
    pub proved_bytes: u64,
    /// Proved, and superseded by a later copy.
    pub superseded: u64,
    /// Headers without commit: writes that a crash cut off. Not a problem.
    pub torn: u64,
    /// Proved records of each namespace, as its id.
    pub spaces: HashMap<[u8; 16], u64>,
    /// All problems.
    pub problem_count: u64,
    /// The first of them.
    pub problems: Vec<Problem>,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Superblock { directory, segment_bytes } = self.superblock;
        writeln!(f, "{directory:?}, segments of {} MiB", segment_bytes >> 20)?;
        writeln!(f, "segments: {} sealed, {} not sealed, {} free", self.sealed, self.unsealed, self.free)?;
        let (records, spaces) = (self.proved, self.spaces.len());
        writeln!(f, "records proved: {records} ({} bytes) in {spaces} namespaces", self.proved_bytes)?;
        writeln!(f, "superseded: {}, cut off by a crash: {}", self.superseded, self.torn)?;
        writeln!(f, "problems: {}", self.problem_count)?;
        for Problem { slot, position, what } in &self.problems {
            writeln!(f, "  segment {slot} at {position}: {what}")?;
        }
        Ok(())
    }
}

/// Reads everything and proves it.
pub fn verify<D: Device + ?Sized>(device: &mut D) -> Verdict {
    let mut segments = Vec::new();
    let report = recover(device, |slot, found| segments.push((slot, found)));
    let mut verdict = Verdict {
        superblock: device.superblock(),
        sealed: report.sealed,
        unsealed: report.scanned,
        free: report.free,
        proved: 0,
        proved_bytes: 0,
        superseded: 0,
        torn: report.torn,
        spaces: HashMap::new(),
        problem_count: 0,
        problems: Vec::new(),
    };
    let mut newest: HashMap<RecordKey, u64> = HashMap::new();
    segments.sort_by_key(|(slot, _)| *slot);
    for (slot, found) in segments {
        match found {
            Found::Unreadable(error) => verdict.add(Problem { slot, position: 0, what: error.into() }),
            // Zeros are a file that was never written; anything else was a header once.
            Found::Free(Refused::Magic(_)) => {}
            Found::Free(why) => verdict.add(Problem { slot, position: 0, what: why.into() }),
            Found::Segment { entries, .. } => {
                for entry in &entries {
                    match record(device, slot, entry) {
                        Ok(()) => verdict.count(entry, &mut newest),
                        Err(what) => verdict.add(Problem { slot, position: entry.position, what }),
                    }
                }
            }
        }
    }
    verdict
}

impl Verdict {
    fn add(&mut self, problem: Problem) {
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        }
    }

    fn count(&mut self, entry: &Entry, newest: &mut HashMap<RecordKey, u64>) {
        self.proved += 1;
        self.proved_bytes += entry.meta.bytes;
        *self.spaces.entry(entry.meta.space.0).or_default() += 1;
        let known = newest.entry(entry.meta.key).or_insert(entry.sequence);
        if *known != entry.sequence {
            self.superseded += 1;
            *known = entry.sequence.max(*known);
        }
    }
}

fn record<D: Device + ?Sized>(device: &mut D, slot: u32, entry: &Entry) -> Result<(), Wrong> {
    let bytes = entry.meta.bytes;
    let all = read(device, slot, entry.position, padded(bytes) + OVERHEAD)?;
    let (header, rest) = all.bytes().split_at(SECTOR);
    let (payload, commit) = rest.split_at(padded(bytes) as usize);
    let asked = Asked { key: entry.meta.key, bytes, segment: entry.segment, position: entry.position };
    VerifiedRecord::verify(&asked, header, payload).map(drop)?;
    let (found, sum) = RecordHeader::decode(header)?;
    if found != *entry {
        return Err(Refused::Other("record in the segment footer").into());
    }
    Commit::expect(commit, &found.commit(sum))?;
    Ok(())
}
