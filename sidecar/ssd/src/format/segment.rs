//! Whose directory, and which life of a file.

use super::{DirectoryId, Refused, SECTOR, SegmentId, Writer, peek, prove};

const SUPER: &[u8; 8] = b"PLNSSDT\x01";
const SEGMENT: &[u8; 8] = b"PLNSEGM\x01";
const SUPER_NAME: &str = "superblock of an SSD directory";
/// Segment files are no shorter.
pub const SEGMENT_BYTES_MIN: u64 = 64 << 10;
/// Segment files are no longer.
pub const SEGMENT_BYTES_MAX: u64 = 4 << 30;
/// Sequences are below: counting on from one that was found never overflows.
pub const SEQUENCE_MAX: u64 = 1 << 63;
const SEGMENT_NAME: &str = "segment header";

/// The only content of the file `pillion-ssd`: says that a directory is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    /// Drawn when the directory was made.
    pub directory: DirectoryId,
    /// Length of each segment file.
    pub segment_bytes: u64,
}

impl Superblock {
    /// Fills the sector.
    pub fn encode(&self, sector: &mut [u8]) {
        let mut w = Writer::new(sector, SUPER);
        w.u32(0);
        w.bytes(&self.directory.0);
        w.u64(self.segment_bytes);
        w.finish();
    }

    /// Reads one.
    ///
    /// # Errors
    /// Why the directory is not ours, or not of this version.
    pub fn decode(sector: &[u8]) -> Result<Self, Refused> {
        let mut r = peek(sector, SUPER, SUPER_NAME)?;
        prove(sector, SUPER_NAME)?;
        let block = (|| {
            r.u32()?;
            Some(Self { directory: DirectoryId(r.array()?), segment_bytes: r.u64()? })
        })();
        block
            .filter(|block| block.segment_bytes.is_multiple_of(SECTOR as u64))
            .filter(|block| (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&block.segment_bytes))
            .filter(|_| r.is_zero())
            .ok_or(Refused::Malformed(SUPER_NAME))
    }
}

/// The first sector of a segment file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The directory that the file belongs to.
    pub directory: DirectoryId,
    /// This life of the file.
    pub segment: SegmentId,
    /// The file's number.
    pub slot: u32,
    /// Its length.
    pub segment_bytes: u64,
    /// No record in it is older.
    pub first_sequence: u64,
}

impl SegmentHeader {
    /// Fills the sector.
    pub fn encode(&self, sector: &mut [u8]) {
        let mut w = Writer::new(sector, SEGMENT);
        w.u32(self.slot);
        w.bytes(&self.directory.0);
        w.bytes(&self.segment.0);
        w.u64(self.segment_bytes);
        w.u64(self.first_sequence);
        w.finish();
    }

    /// Reads the header of the file with this number, in this directory.
    ///
    /// # Errors
    /// Why it is not that.
    pub fn expect(sector: &[u8], block: &Superblock, slot: u32) -> Result<Self, Refused> {
        let mut r = peek(sector, SEGMENT, SEGMENT_NAME)?;
        let found = (|| {
            let slot = r.u32()?;
            let (directory, segment) = (DirectoryId(r.array()?), SegmentId(r.array()?));
            Some(Self { directory, segment, slot, segment_bytes: r.u64()?, first_sequence: r.u64()? })
        })();
        let found = found.ok_or(Refused::Malformed(SEGMENT_NAME))?;
        let differs = [
            (found.directory != block.directory, "directory"),
            (found.slot != slot, "file number"),
            (found.segment_bytes != block.segment_bytes, "segment length"),
        ];
        if let Some((_, name)) = differs.into_iter().find(|(differs, _)| *differs) {
            return Err(Refused::Other(name));
        }
        prove(sector, SEGMENT_NAME)?;
        let makes_sense = r.is_zero() && found.first_sequence < SEQUENCE_MAX;
        if makes_sense { Ok(found) } else { Err(Refused::Malformed(SEGMENT_NAME)) }
    }
}
