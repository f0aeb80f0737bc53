//! What a directory holds: by the footers of its segments, else by their records' headers.

use std::collections::HashMap;

use crate::{
    device::{Completion, Device, IoError, Op, Part, What},
    format::{
        Commit, Entry, Footer, OVERHEAD, RecordHeader, Refused, SECTOR, SegmentHeader, SegmentId, Trailer,
        checksum, padded,
    },
    memory::Aligned,
};

/// Read at the end of each file: a footer of some hundred records comes with its trailer.
const TAIL_BYTES: u64 = 64 << 10;
/// Read at once while every sector is looked at.
const WINDOW_BYTES: u64 = 1 << 20;
/// Read at once where only headers and commits are.
const GLANCE_BYTES: u64 = 64 << 10;
/// Payloads that are read where no footer vouches for them: some segments for each crash. Where more footers are
/// lost, the records beyond are found by header and commit only.
const PROVE_BYTES_MAX: u64 = 4 << 30;
/// Files whose ends are read at once.
const FILES_AT_ONCE: usize = 16;

/// What a segment file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// No valid header: it may be written.
    Free(Refused),
    /// It could not be read: left alone.
    Unreadable(IoError),
    /// A life of the file, with its records in order of their place.
    Segment {
        /// The life.
        id: SegmentId,
        /// No record is older.
        first_sequence: u64,
        /// Whether the footer vouches for the records; else their headers and commits do.
        sealed: bool,
        /// The records.
        entries: Vec<Entry>,
        /// Whether each of them is known to be whole: by the footer, or because its payload was read.
        proved: bool,
        /// Headers without their commit or their payload: writes that a crash cut off.
        torn: u32,
        /// Where those of them begin that have their commit: of a write that ended sectors are missing, or they
        /// changed since.
        holed: Vec<u64>,
    },
}

/// What recovery met.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// Segments whose footer was used.
    pub sealed: u32,
    /// Segments whose headers were scanned.
    pub scanned: u32,
    /// Files without a life.
    pub free: u32,
    /// Files that could not be read.
    pub unreadable: u32,
    /// Records, those with several copies several times.
    pub records: u64,
    /// Headers without commit or payload.
    pub torn: u64,
}

/// Looks at every segment file; `each` gets them in no particular order.
pub fn recover<D: Device + ?Sized>(device: &mut D, mut each: impl FnMut(u32, Found)) -> Report {
    let mut report = Report::default();
    let mut budget = PROVE_BYTES_MAX;
    let slots = device.slots();
    for group in slots.chunks(FILES_AT_ONCE) {
        for (slot, ends) in read_ends(device, group) {
            let found = match ends {
                Ok((head, tail)) => {
                    segment(device, slot, &head, &tail, &mut budget).unwrap_or_else(Found::Unreadable)
                }
                Err(error) => Found::Unreadable(error),
            };
            match &found {
                Found::Free(_) => report.free += 1,
                Found::Unreadable(_) => report.unreadable += 1,
                Found::Segment { sealed, entries, torn, .. } => {
                    if *sealed {
                        report.sealed += 1;
                    } else {
                        report.scanned += 1;
                    }
                    report.records += entries.len() as u64;
                    report.torn += u64::from(*torn);
                }
            }
            each(slot, found);
        }
    }
    report
}

type Ends = Result<(Aligned, Aligned), IoError>;

fn tail_bytes(segment_bytes: u64) -> u64 {
    TAIL_BYTES.min(segment_bytes - SECTOR as u64)
}

/// First sector and last part of some files, all at once.
fn read_ends<D: Device + ?Sized>(device: &mut D, slots: &[u32]) -> Vec<(u32, Ends)> {
    let segment_bytes = device.superblock().segment_bytes;
    let tail = tail_bytes(segment_bytes);
    let (mut done, mut ended) = (Vec::new(), 0);
    for (number, slot) in slots.iter().enumerate() {
        let ticket = 2 * number as u64;
        device.submit(read_op(ticket, *slot, 0, SECTOR as u64));
        device.submit(read_op(ticket + 1, *slot, segment_bytes - tail, tail));
    }
    let mut results: HashMap<u64, Completion> = HashMap::new();
    while ended < 2 * slots.len() {
        device.wait(None, &mut done);
        ended += done.len();
        results.extend(done.drain(..).map(|completion| (completion.ticket, completion)));
    }
    let mut take = |ticket| results.remove(&ticket).map_or(Err(IoError::Os(5)), buffer_of);
    let ends = |(number, slot): (usize, &u32)| {
        let (head, tail) = (take(2 * number as u64), take(2 * number as u64 + 1));
        (*slot, head.and_then(|head| Ok((head, tail?))))
    };
    slots.iter().enumerate().map(ends).collect()
}

fn read_op(ticket: u64, slot: u32, at: u64, bytes: u64) -> Op {
    let parts = vec![Part::Owned(Aligned::zeroed(bytes as usize))];
    Op { ticket, slot, what: What::Read, at, parts }
}

fn buffer_of(completion: Completion) -> Result<Aligned, IoError> {
    completion.result?;
    match completion.parts.into_iter().next() {
        Some(Part::Owned(buffer)) => Ok(buffer),
        _ => Err(IoError::Os(5)),
    }
}

/// One read, waited for.
pub(crate) fn read<D: Device + ?Sized>(
    device: &mut D,
    slot: u32,
    at: u64,
    bytes: u64,
) -> Result<Aligned, IoError> {
    device.submit(read_op(0, slot, at, bytes));
    let mut done = Vec::new();
    while done.is_empty() {
        device.wait(None, &mut done);
    }
    done.pop().map_or(Err(IoError::Os(5)), buffer_of)
}

fn segment<D: Device + ?Sized>(
    device: &mut D,
    slot: u32,
    head: &Aligned,
    tail: &Aligned,
    budget: &mut u64,
) -> Result<Found, IoError> {
    let block = device.superblock();
    let header = match SegmentHeader::expect(head.bytes(), &block, slot) {
        Ok(header) => header,
        Err(why) => return Ok(Found::Free(why)),
    };
    let (id, first_sequence) = (header.segment, header.first_sequence);
    if let Some(entries) = by_footer(device, slot, id, tail)? {
        return Ok(Found::Segment {
            id,
            first_sequence,
            sealed: true,
            entries,
            proved: true,
            torn: 0,
            holed: Vec::new(),
        });
    }
    let proved = *budget >= block.segment_bytes;
    *budget -= if proved { block.segment_bytes } else { 0 };
    let Scan { entries, torn, holed } = by_headers(device, slot, id, proved)?;
    if proved {
        // What was read may still be in the drive's cache only.
        sync(device, slot)?;
    }
    Ok(Found::Segment { id, first_sequence, sealed: false, entries, proved, torn, holed })
}

fn sync<D: Device + ?Sized>(device: &mut D, slot: u32) -> Result<(), IoError> {
    device.submit(Op { ticket: 0, slot, what: What::Sync, at: 0, parts: Vec::new() });
    let mut done = Vec::new();
    while done.is_empty() {
        device.wait(None, &mut done);
    }
    done.pop().map_or(Err(IoError::Os(5)), |completion| completion.result)
}

/// The records that the footer lists. `None`: there is no valid one.
fn by_footer<D: Device + ?Sized>(
    device: &mut D,
    slot: u32,
    id: SegmentId,
    tail: &Aligned,
) -> Result<Option<Vec<Entry>>, IoError> {
    let segment_bytes = device.superblock().segment_bytes;
    let (before, last) = tail.bytes().split_at(tail.len() - SECTOR);
    let Ok(trailer) = Trailer::expect(last, id, segment_bytes) else { return Ok(None) };
    let wanted = trailer.body_bytes as usize;
    let entries = if wanted <= before.len() {
        Footer::decode(&trailer, &before[before.len() - wanted..], segment_bytes)
    } else {
        let at = segment_bytes - SECTOR as u64 - trailer.body_bytes;
        let body = read(device, slot, at, trailer.body_bytes)?;
        Footer::decode(&trailer, body.bytes(), segment_bytes)
    };
    Ok(entries.ok())
}

#[derive(Default)]
struct Scan {
    entries: Vec<Entry>,
    torn: u32,
    holed: Vec<u64>,
}

/// Follows the headers. After a hole (a write that was lost, a header that changed) every sector is looked
/// at: a later record may have been acknowledged.
fn by_headers<D: Device + ?Sized>(
    device: &mut D,
    slot: u32,
    id: SegmentId,
    prove: bool,
) -> Result<Scan, IoError> {
    let segment_bytes = device.superblock().segment_bytes;
    let (mut scan, mut at) = (Scan::default(), SECTOR as u64);
    // Payloads are looked at: then long reads cost nothing more. Else what lies between headers need not be read.
    let step = if prove { WINDOW_BYTES } else { GLANCE_BYTES };
    let mut window = Window { device, slot, segment_bytes, step, at: 0, bytes: Aligned::zeroed(0) };
    while at + OVERHEAD < segment_bytes {
        let Some((header, sum)) = header_at(window.read(at, SECTOR as u64)?, id, at, segment_bytes) else {
            match window.next_header(id, at + SECTOR as u64)? {
                Some(next) => at = next,
                None => break,
            }
            continue;
        };
        let committed = window.has_commit(&header, sum, prove)?;
        // Sectors of a record can be lost between its header and its commit. It must not hide an older, whole copy.
        if committed && (!prove || window.has_payload(&header)?) {
            at = header.end();
            scan.entries.push(header);
        } else {
            scan.torn += 1;
            if committed {
                scan.holed.push(at);
            }
            // Its length may not be trusted to skip: look at every sector.
            match window.next_header(id, at + SECTOR as u64)? {
                Some(next) => at = next,
                None => break,
            }
        }
    }
    Ok(scan)
}

/// The part of a segment that was read last: small records come by the hundred with one read.
struct Window<'a, D: Device + ?Sized> {
    device: &'a mut D,
    slot: u32,
    segment_bytes: u64,
    /// Read at once, where no more is wanted.
    step: u64,
    at: u64,
    bytes: Aligned,
}

impl<D: Device + ?Sized> Window<'_, D> {
    fn read(&mut self, at: u64, bytes: u64) -> Result<&[u8], IoError> {
        let end = at + bytes;
        if at < self.at || end > self.at + self.bytes.len() as u64 {
            // The old one goes first: of two long ones only one is there.
            self.bytes = Aligned::zeroed(0);
            let length = bytes.max(self.step).min(self.segment_bytes - at);
            self.bytes = read(self.device, self.slot, at, length)?;
            self.at = at;
        }
        let from = (at - self.at) as usize;
        self.bytes.bytes().get(from..from + bytes as usize).ok_or(IoError::Os(5))
    }

    fn has_commit(&mut self, header: &RecordHeader, sum: u64, prove: bool) -> Result<bool, IoError> {
        let (payload_at, commit_at) = (header.position + SECTOR as u64, header.end() - SECTOR as u64);
        if prove {
            // Payload, commit and the next header with one read.
            let next = (header.end() + SECTOR as u64).min(self.segment_bytes);
            self.read(payload_at, next - payload_at)?;
        }
        let commit = self.read(commit_at, SECTOR as u64)?;
        Ok(Commit::expect(commit, &header.commit(sum)).is_ok())
    }

    fn has_payload(&mut self, header: &RecordHeader) -> Result<bool, IoError> {
        let bytes = header.meta.bytes;
        let payload = self.read(header.position + SECTOR as u64, padded(bytes))?;
        Ok(checksum(&payload[..bytes as usize]) == header.meta.checksum)
    }

    fn next_header(&mut self, id: SegmentId, mut at: u64) -> Result<Option<u64>, IoError> {
        self.step = WINDOW_BYTES;
        while at < self.segment_bytes {
            let segment_bytes = self.segment_bytes;
            if header_at(self.read(at, SECTOR as u64)?, id, at, segment_bytes).is_some() {
                return Ok(Some(at));
            }
            at += SECTOR as u64;
        }
        Ok(None)
    }
}

fn header_at(sector: &[u8], id: SegmentId, at: u64, segment_bytes: u64) -> Option<(RecordHeader, u64)> {
    let (header, sum) = RecordHeader::decode(sector).ok()?;
    let here = header.segment == id && header.position == at && header.end() <= segment_bytes;
    here.then_some((header, sum))
}
