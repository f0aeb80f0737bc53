//! Reads a whole directory and says what it holds: for `pillion doctor --ssd DIR`. Writes nothing.

use std::{collections::HashMap, fmt, path::Path, sync::Arc};

use crate::{
    Memory, OpenError,
    device::{
        Device, IoError, Op, Part, What,
        directory::{Directory, Use},
    },
    format::{
        Asked, Commit, Entry, OVERHEAD, RecordHeader, RecordKey, Refused, SECTOR, Superblock, Trailer,
        VerifiedRecord, padded,
    },
    memory::Aligned,
    recover::{Found, read, recover},
    tier::{Engine, engine},
};

/// Problems that are listed one by one; more are counted.
const PROBLEMS_MAX: usize = 100;
/// Bytes of records that are read at once; a longer record is read alone.
const AT_ONCE_BYTES: u64 = 32 << 20;

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
    /// A committed record of an open segment without all of its bytes.
    #[error("the checksum of the payload differs: its bytes changed, or were lost with the power")]
    Holed,
    /// The segment's file was cut or extended.
    #[error("the file has {found} bytes, expected {expected}")]
    Length {
        /// Of all segment files of the directory.
        expected: u64,
        /// Of this one.
        found: u64,
    },
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
    /// Files that cannot be read: the next start leaves them alone.
    pub unreadable: u32,
    /// Records whose identity and bytes were proved.
    pub proved: u64,
    /// Bytes of their payloads.
    pub proved_bytes: u64,
    /// Proved, and superseded by a later copy.
    pub superseded: u64,
    /// Bytes of these payloads.
    pub superseded_bytes: u64,
    /// Headers without commit: writes that a crash cut off. Not a problem.
    pub torn: u64,
    /// Proved records of each namespace, as its id.
    pub spaces: HashMap<[u8; 16], u64>,
    /// Names of files that are not the tier's. Not a problem.
    pub strangers: Vec<String>,
    /// All problems.
    pub problem_count: u64,
    /// The first of them.
    pub problems: Vec<Problem>,
}

impl Verdict {
    /// Bytes of all segment files.
    pub fn file_bytes(&self) -> u64 {
        let files = self.sealed + self.unsealed + self.free + self.unreadable;
        u64::from(files) * self.superblock.segment_bytes
    }

    /// Bytes of the segment files that no proved, current record takes, with its header and commit: free files,
    /// the ends of segments, dead and damaged records.
    pub fn unused_bytes(&self) -> u64 {
        let records = self.proved - self.superseded;
        let used = self.proved_bytes - self.superseded_bytes + records * OVERHEAD;
        self.file_bytes().saturating_sub(used)
    }
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

/// Opens a directory to look at it only, and verifies it. Not a byte of it changes.
///
/// # Errors
/// It is not ours, of another version, in use, or cannot be opened.
pub fn inspect(path: &Path) -> Result<Verdict, OpenError> {
    let directory = Directory::open(path, Use::Inspect)?;
    let (misfits, strangers) = (directory.misfits().to_vec(), directory.strangers().to_vec());
    let engine = engine(directory, &Arc::new(Memory::none()), Engine::Auto);
    let (mut device, _) = engine.map_err(|source| {
        let doing = "start the I/O of";
        OpenError::Io { path: path.to_owned(), doing, source }
    })?;
    let mut verdict = verify(&mut *device);
    let expected = verdict.superblock.segment_bytes;
    for (slot, found) in misfits {
        verdict.add(Problem { slot, position: 0, what: Wrong::Length { expected, found } });
    }
    verdict.strangers = strangers;
    Ok(verdict)
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
        unreadable: report.unreadable,
        proved: 0,
        proved_bytes: 0,
        superseded: 0,
        superseded_bytes: 0,
        torn: report.torn,
        spaces: HashMap::new(),
        strangers: Vec::new(),
        problem_count: 0,
        problems: Vec::new(),
    };
    let mut newest: HashMap<RecordKey, u64> = HashMap::new();
    segments.sort_by_key(|(slot, _)| *slot);
    for (slot, found) in segments {
        match found {
            Found::Unreadable(error) => verdict.add(Problem { slot, position: 0, what: error.into() }),
            // Zeros are a file that was never written; anything else was a header once.
            Found::Free(why @ Refused::Magic(_)) => match read(device, slot, 0, SECTOR as u64) {
                Ok(sector) if sector.bytes().iter().all(|byte| *byte == 0) => {}
                Ok(_) => verdict.add(Problem { slot, position: 0, what: why.into() }),
                Err(error) => verdict.add(Problem { slot, position: 0, what: error.into() }),
            },
            Found::Free(why) => verdict.add(Problem { slot, position: 0, what: why.into() }),
            Found::Segment { id, sealed, entries, holed, .. } => {
                records(device, slot, &entries, |entry, proof| match proof {
                    Ok(()) => verdict.count(entry, &mut newest),
                    Err(what) => verdict.add(Problem { slot, position: entry.position, what }),
                });
                for position in holed {
                    verdict.add(Problem { slot, position, what: Wrong::Holed });
                }
                let at = verdict.superblock.segment_bytes - SECTOR as u64;
                if let Some(what) = if sealed { None } else { damaged_footer(device, slot, id, at) } {
                    verdict.add(Problem { slot, position: at, what });
                }
            }
        }
    }
    verdict
}

/// What is wrong with the footer of a segment that was scanned; nothing, if it never had one in this life.
fn damaged_footer<D: Device + ?Sized>(
    device: &mut D,
    slot: u32,
    id: crate::format::SegmentId,
    at: u64,
) -> Option<Wrong> {
    match read(device, slot, at, SECTOR as u64) {
        Err(error) => Some(error.into()),
        Ok(sector) => match Trailer::expect(sector.bytes(), id, at + SECTOR as u64) {
            // The trailer is right, and recovery did not use it: the body is not.
            Ok(_) => Some(Refused::Checksum("segment footer").into()),
            Err(why @ (Refused::Checksum(_) | Refused::Malformed(_))) => Some(why.into()),
            Err(_) => None,
        },
    }
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
            self.superseded_bytes += entry.meta.bytes;
            *known = entry.sequence.max(*known);
        }
    }
}

/// Proves records, some at once; `each` gets them in no particular order.
fn records<D: Device + ?Sized>(
    device: &mut D,
    slot: u32,
    entries: &[Entry],
    mut each: impl FnMut(&Entry, Result<(), Wrong>),
) {
    let (mut next, mut in_flight, mut bytes) = (0, 0, 0);
    let mut done = Vec::new();
    while next < entries.len() || in_flight > 0 {
        while let Some(entry) = entries.get(next) {
            let length = entry.meta.footprint();
            if in_flight == device.depth() || (in_flight > 0 && bytes + length > AT_ONCE_BYTES) {
                break;
            }
            let parts = vec![Part::Owned(Aligned::zeroed(length as usize))];
            device.submit(Op { ticket: next as u64, slot, what: What::Read, at: entry.position, parts });
            (next, in_flight, bytes) = (next + 1, in_flight + 1, bytes + length);
        }
        device.wait(None, &mut done);
        for completion in done.drain(..) {
            let Some(entry) = entries.get(completion.ticket as usize) else { continue };
            (in_flight, bytes) = (in_flight - 1, bytes - entry.meta.footprint());
            let proof = match (completion.result, completion.parts.first()) {
                (Ok(()), Some(Part::Owned(all))) => record(entry, all.bytes()),
                (Ok(()), _) => Err(IoError::Os(5).into()),
                (Err(error), _) => Err(error.into()),
            };
            each(entry, proof);
        }
    }
}

fn record(entry: &Entry, all: &[u8]) -> Result<(), Wrong> {
    let bytes = entry.meta.bytes;
    let (header, rest) = all.split_at(SECTOR);
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
