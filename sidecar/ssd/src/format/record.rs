//! Records: header, payload, commit footer.

use std::sync::Arc;

use super::{
    OVERHEAD, PAYLOAD_BYTES_MAX, Reader, RecordKey, Refused, SECTOR, SegmentId, SpaceId, Writer, checksum,
    padded, peek, prove,
};

const HEAD: &[u8; 8] = b"PLNHEAD\x01";
const COMMIT: &[u8; 8] = b"PLNDONE\x01";
const HEAD_NAME: &str = "record header";
const COMMIT_NAME: &str = "commit footer";
/// The longest name of a tenant.
pub const TENANT_BYTES_MAX: usize = 256;
/// The longest name of a record format.
pub const FORMAT_BYTES_MAX: usize = 2048;

/// What a record is, apart from its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordMeta {
    /// Its identity.
    pub key: RecordKey,
    /// Its namespace.
    pub space: SpaceId,
    /// The engine's own hash: index keys are seeded anew at each boot and are formed from it.
    pub hash: [u8; 32],
    /// The block before it: eviction takes children before their parents.
    pub parent: Option<RecordKey>,
    /// Whose presence table it belongs into.
    pub tenant: Arc<str>,
    /// The byte format of the payload, as the namespace names it.
    pub format: Arc<str>,
    /// Length of the payload, without the zeros that fill its last sector.
    pub bytes: u64,
    /// CRC-64/NVME of the payload, without these zeros.
    pub checksum: u64,
}

impl RecordMeta {
    /// Whether this can be stored at all.
    ///
    /// # Errors
    /// The field that is out of bounds.
    pub fn check(&self) -> Result<(), Refused> {
        if !(1..=PAYLOAD_BYTES_MAX).contains(&self.bytes) {
            return Err(Refused::Malformed("payload length (1 byte to 64 MiB)"));
        }
        if self.tenant.len() > TENANT_BYTES_MAX {
            return Err(Refused::Malformed("tenant name (at most 256 bytes)"));
        }
        if self.format.len() > FORMAT_BYTES_MAX {
            return Err(Refused::Malformed("format name (at most 2048 bytes)"));
        }
        Ok(())
    }

    /// Bytes on the disk.
    pub fn footprint(&self) -> u64 {
        padded(self.bytes) + OVERHEAD
    }
}

/// What is known of a record before its bytes come: they must say the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// Its identity, as the caller of `get` gave it.
    pub key: RecordKey,
    /// Length of the payload.
    pub bytes: u64,
    /// The life of the file that it was written in.
    pub segment: SegmentId,
    /// Where its header lies in the file.
    pub position: u64,
}

/// A record's first sector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordHeader {
    /// What it is.
    pub meta: RecordMeta,
    /// The life of the file that it was written in.
    pub segment: SegmentId,
    /// Order of writing, over all directories: of two records with one key the later counts.
    pub sequence: u64,
    /// Where this sector lies in the file.
    pub position: u64,
}

impl RecordHeader {
    /// Fills the sector; returns its checksum, which the commit footer repeats.
    ///
    /// # Panics
    /// If the meta data were not checked.
    pub fn encode(&self, sector: &mut [u8]) -> u64 {
        let meta = &self.meta;
        assert!(meta.check().is_ok(), "a record is checked when it is accepted");
        let mut w = Writer::new(sector, HEAD);
        w.u32(u32::from(meta.parent.is_some()));
        w.bytes(&meta.key.0);
        w.bytes(&meta.space.0);
        w.bytes(&meta.hash);
        w.bytes(&meta.parent.map_or([0; 32], |parent| parent.0));
        w.bytes(&self.segment.0);
        w.u64(self.sequence);
        w.u64(self.position);
        w.u64(meta.bytes);
        w.u64(meta.checksum);
        w.u16(meta.tenant.len() as u16);
        w.u16(meta.format.len() as u16);
        w.bytes(meta.tenant.as_bytes());
        w.bytes(meta.format.as_bytes());
        w.finish()
    }

    /// Reads a header of which nothing was known before; returns its checksum, too.
    ///
    /// # Errors
    /// Why it is none.
    pub fn decode(sector: &[u8]) -> Result<(Self, u64), Refused> {
        let fields = peek(sector, HEAD, HEAD_NAME)?;
        let sum = prove(sector, HEAD_NAME)?;
        let header = Self::fields(fields).ok_or(Refused::Malformed(HEAD_NAME))?;
        header.meta.check()?;
        Ok((header, sum))
    }

    /// Reads the header of a record that was asked for: its fields are compared before its checksum counts,
    /// so that a misdirected write is called what it is.
    ///
    /// # Errors
    /// The first thing that differs.
    pub fn expect(sector: &[u8], asked: &Asked) -> Result<Self, Refused> {
        let header = Self::fields(peek(sector, HEAD, HEAD_NAME)?);
        if let Some(found) = &header {
            let differs = [
                (found.meta.key != asked.key, "key"),
                (found.segment != asked.segment, "segment"),
                (found.position != asked.position, "position"),
                (found.meta.bytes != asked.bytes, "length"),
            ];
            if let Some((_, name)) = differs.into_iter().find(|(differs, _)| *differs) {
                return Err(Refused::Other(name));
            }
        }
        prove(sector, HEAD_NAME)?;
        header.ok_or(Refused::Malformed(HEAD_NAME))
    }

    fn fields(mut r: Reader<'_>) -> Option<Self> {
        let flags = r.u32()?;
        let (key, space, hash) = (RecordKey(r.array()?), SpaceId(r.array()?), r.array()?);
        let parent = RecordKey(r.array()?);
        let (segment, sequence, position) = (SegmentId(r.array()?), r.u64()?, r.u64()?);
        let (bytes, checksum) = (r.u64()?, r.u64()?);
        let (tenant, format) = (r.u16()?, r.u16()?);
        let tenant = r.text(tenant.into())?.into();
        let format = r.text(format.into())?.into();
        let parent = match flags {
            0 if parent.0 == [0; 32] => None,
            1 => Some(parent),
            _ => return None,
        };
        let meta = RecordMeta { key, space, hash, parent, tenant, format, bytes, checksum };
        let makes_sense = r.is_zero() && sequence < super::SEQUENCE_MAX;
        makes_sense.then_some(Self { meta, segment, sequence, position })
    }

    /// The commit footer that belongs to this header.
    pub fn commit(&self, header_checksum: u64) -> Commit {
        Commit {
            key: self.meta.key,
            segment: self.segment,
            sequence: self.sequence,
            position: self.position + SECTOR as u64 + padded(self.meta.bytes),
            header_checksum,
            payload_checksum: self.meta.checksum,
        }
    }

    /// Where the record ends.
    pub fn end(&self) -> u64 {
        self.position + self.meta.footprint()
    }
}

/// A record's last sector. It repeats what the header says, so that the two are one record's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// The record's identity.
    pub key: RecordKey,
    /// The life of the file.
    pub segment: SegmentId,
    /// The header's sequence.
    pub sequence: u64,
    /// Where this sector lies in the file.
    pub position: u64,
    /// The header's checksum.
    pub header_checksum: u64,
    /// The payload's checksum.
    pub payload_checksum: u64,
}

impl Commit {
    /// Fills the sector.
    pub fn encode(&self, sector: &mut [u8]) {
        let mut w = Writer::new(sector, COMMIT);
        w.u32(0);
        w.bytes(&self.key.0);
        w.bytes(&self.segment.0);
        w.u64(self.sequence);
        w.u64(self.position);
        w.u64(self.header_checksum);
        w.u64(self.payload_checksum);
        w.finish();
    }

    /// Reads one and compares it with the header's.
    ///
    /// # Errors
    /// Why it does not commit this record.
    pub fn expect(sector: &[u8], asked: &Self) -> Result<(), Refused> {
        let mut r = peek(sector, COMMIT, COMMIT_NAME)?;
        let found = (|| {
            r.u32()?;
            Some(Self {
                key: RecordKey(r.array()?),
                segment: SegmentId(r.array()?),
                sequence: r.u64()?,
                position: r.u64()?,
                header_checksum: r.u64()?,
                payload_checksum: r.u64()?,
            })
        })();
        if found.as_ref() != Some(asked) {
            return Err(Refused::Other("record in the commit footer"));
        }
        prove(sector, COMMIT_NAME)?;
        Ok(())
    }
}

/// A record whose identity and bytes were proved (I1). There is no other way to one.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct VerifiedRecord<'a> {
    payload: &'a [u8],
    checksum: u64,
    sequence: u64,
}

impl<'a> VerifiedRecord<'a> {
    /// Compares the header with what was asked for, then its checksum, then the payload's. `payload` is the whole
    /// sectors that it lies in.
    ///
    /// # Errors
    /// The first thing that differs.
    pub fn verify(asked: &Asked, header: &[u8], payload: &'a [u8]) -> Result<Self, Refused> {
        let header = RecordHeader::expect(header, asked)?;
        if payload.len() as u64 != padded(header.meta.bytes) {
            return Err(Refused::Other("payload length"));
        }
        let (payload, padding) = payload.split_at(header.meta.bytes as usize);
        if padding.iter().any(|byte| *byte != 0) {
            return Err(Refused::Malformed("padding of the payload"));
        }
        if checksum(payload) != header.meta.checksum {
            return Err(Refused::Checksum("payload"));
        }
        Ok(Self { payload, checksum: header.meta.checksum, sequence: header.sequence })
    }

    /// The bytes.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// Their proved checksum.
    pub fn checksum(&self) -> u64 {
        self.checksum
    }

    /// When it was written.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }
}
