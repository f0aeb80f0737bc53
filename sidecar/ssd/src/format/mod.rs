//! What lies on the disk: encode, decode, verify. No I/O.
//!
//! Every structure is a whole number of [`SECTOR`]s, little-endian, starts with its magic and version and
//! ends with the CRC-64/NVME of all bytes before. `docs/FORMAT.md` argues the order of things.

mod footer;
mod record;
mod segment;

pub use footer::{Entry, Footer, Trailer, footer_bytes};
pub use record::{
    Asked, Commit, FORMAT_BYTES_MAX, RecordHeader, RecordMeta, TENANT_BYTES_MAX, VerifiedRecord,
};
pub use segment::{SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN, SEQUENCE_MAX, SegmentHeader, Superblock};

use std::fmt;

use crc_fast::CrcAlgorithm;

/// The version that this code writes, and the only one that it reads.
pub const VERSION: u32 = 2;
/// The unit of everything: O_DIRECT's alignment on every device that matters, and what a modern one writes
/// atomically.
pub const SECTOR: usize = 4096;
/// The longest payload.
pub const PAYLOAD_BYTES_MAX: u64 = 64 << 20;
/// What a record takes beside its payload: header and commit footer.
pub const OVERHEAD: u64 = 2 * SECTOR as u64;

const CRC_AT: usize = SECTOR - 8;

/// What a payload of so many bytes takes: whole sectors, the rest of the last one zeros.
pub fn padded(bytes: u64) -> u64 {
    bytes.next_multiple_of(SECTOR as u64)
}

/// Identity of a record: the sidecar's `BlockKey`. The tenant is inside.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordKey(pub [u8; 32]);

/// The namespace's id.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SpaceId(pub [u8; 16]);

/// One life of a segment file: random, drawn anew each time the file is opened for writing.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SegmentId(pub [u8; 16]);

/// One directory: random, drawn when it was made.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct DirectoryId(pub [u8; 16]);

fn short_hex(f: &mut fmt::Formatter<'_>, name: &str, bytes: &[u8]) -> fmt::Result {
    write!(f, "{name}(")?;
    bytes.iter().take(4).try_for_each(|byte| write!(f, "{byte:02x}"))?;
    f.write_str("…)")
}

macro_rules! short_debug {
    ($($name:ident)*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                short_hex(f, stringify!($name), &self.0)
            }
        }
    )*};
}
short_debug!(RecordKey SpaceId SegmentId DirectoryId);

/// Why bytes from the disk are not what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The magic is another one: never written, or something else lies here.
    #[error("expected a {0}, found other bytes: never written, or overwritten")]
    Magic(&'static str),
    /// Written by another version of this format.
    #[error(
        "format version {0}, this program reads {VERSION}: use the program that wrote it, or another directory"
    )]
    Version(u32),
    /// A field differs from what the caller asked for: a misdirected or an older write.
    #[error("another {0} than was asked for: a misdirected write or an earlier life of the file")]
    Other(&'static str),
    /// The structure's own checksum.
    #[error("the checksum of the {0} differs: its bytes changed")]
    Checksum(&'static str),
    /// The checksum is right and the content makes no sense.
    #[error("the {0} is malformed")]
    Malformed(&'static str),
}

/// CRC-64/NVME, as everywhere in Pillion.
pub fn checksum(bytes: &[u8]) -> u64 {
    crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

/// Writes one structure's fields, from the front.
struct Writer<'a> {
    sector: &'a mut [u8],
    at: usize,
}

impl<'a> Writer<'a> {
    fn new(sector: &'a mut [u8], magic: &[u8; 8]) -> Self {
        sector.fill(0);
        let mut writer = Self { sector, at: 0 };
        writer.bytes(magic);
        writer.u32(VERSION);
        writer
    }
    fn bytes(&mut self, bytes: &[u8]) {
        self.sector[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }
    fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }
    fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }
    fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }
    /// The checksum of all before it, in the last eight bytes of the sector.
    fn finish(self) -> u64 {
        let sum = checksum(&self.sector[..CRC_AT]);
        self.sector[CRC_AT..SECTOR].copy_from_slice(&sum.to_le_bytes());
        sum
    }
}

/// Reads fields; `None` at the end.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(count)?;
        self.0 = tail;
        Some(head)
    }
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.first_chunk().copied()
    }
    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
    fn text(&mut self, count: usize) -> Option<&'a str> {
        std::str::from_utf8(self.bytes(count)?).ok()
    }
    /// Whether all that is left is zero: one content has one form.
    fn is_zero(&self) -> bool {
        self.0.iter().all(|byte| *byte == 0)
    }
}

/// Magic and version; the fields of a sector whose checksum was not looked at yet.
fn peek<'a>(sector: &'a [u8], magic: &[u8; 8], name: &'static str) -> Result<Reader<'a>, Refused> {
    let sector = sector.get(..SECTOR).ok_or(Refused::Malformed(name))?;
    let mut reader = Reader(&sector[..CRC_AT]);
    if reader.bytes(8) != Some(magic) {
        return Err(Refused::Magic(name));
    }
    match reader.u32() {
        Some(VERSION) => Ok(reader),
        other => Err(Refused::Version(other.unwrap_or(0))),
    }
}

/// The stored checksum, if it is right.
fn prove(sector: &[u8], name: &'static str) -> Result<u64, Refused> {
    let stored = sector.get(CRC_AT..SECTOR).and_then(|bytes| bytes.first_chunk().copied());
    let stored = stored.map(u64::from_le_bytes).ok_or(Refused::Malformed(name))?;
    if stored == checksum(&sector[..CRC_AT]) { Ok(stored) } else { Err(Refused::Checksum(name)) }
}
