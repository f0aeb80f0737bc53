//! The footer of a sealed segment: all its headers once more, in one place.
//!
//! ```text
//! … records │ free │ strings, entries, zeros to a sector │ trailer │ end of the file
//! ```

use std::{collections::HashMap, sync::Arc};

use super::{
    Reader, RecordHeader, RecordKey, RecordMeta, Refused, SECTOR, SegmentId, SpaceId, Writer, checksum, peek,
    prove,
};

const FOOT: &[u8; 8] = b"PLNFOOT\x01";
const FOOT_NAME: &str = "segment footer";
const ENTRY_BYTES: u64 = 152;

/// One record of the footer: what its header says.
pub type Entry = RecordHeader;

/// The last sector of a sealed segment's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trailer {
    /// This life of the file.
    pub segment: SegmentId,
    /// Records.
    pub records: u32,
    /// Different strings.
    pub strings: u32,
    /// Length of the body before the trailer, a whole number of sectors.
    pub body_bytes: u64,
    /// CRC-64/NVME of the body.
    pub body_checksum: u64,
}

impl Trailer {
    fn encode(&self, sector: &mut [u8]) {
        let mut w = Writer::new(sector, FOOT);
        w.u32(0);
        w.bytes(&self.segment.0);
        w.u32(self.records);
        w.u32(self.strings);
        w.u64(self.body_bytes);
        w.u64(self.body_checksum);
        w.finish();
    }

    /// Reads the trailer of this life of a file.
    ///
    /// # Errors
    /// Why there is none: never sealed, an earlier life's, or damaged.
    pub fn expect(sector: &[u8], segment: SegmentId, segment_bytes: u64) -> Result<Self, Refused> {
        let mut r = peek(sector, FOOT, FOOT_NAME)?;
        let found = (|| {
            r.u32()?;
            Some(Self {
                segment: SegmentId(r.array()?),
                records: r.u32()?,
                strings: r.u32()?,
                body_bytes: r.u64()?,
                body_checksum: r.u64()?,
            })
        })();
        let found = found.ok_or(Refused::Malformed(FOOT_NAME))?;
        if found.segment != segment {
            return Err(Refused::Other("segment"));
        }
        prove(sector, FOOT_NAME)?;
        let records = u64::from(found.records);
        let strings = 2 * (2 + super::TENANT_BYTES_MAX.max(super::FORMAT_BYTES_MAX) as u64);
        let body_bytes_max = (records * (ENTRY_BYTES + strings)).next_multiple_of(SECTOR as u64);
        let fits = records <= segment_bytes / (super::OVERHEAD + SECTOR as u64)
            && found.body_bytes <= body_bytes_max
            && found.body_bytes.is_multiple_of(SECTOR as u64)
            && found.body_bytes <= segment_bytes.saturating_sub(2 * SECTOR as u64)
            && records * ENTRY_BYTES <= found.body_bytes;
        if fits { Ok(found) } else { Err(Refused::Malformed(FOOT_NAME)) }
    }
}

/// Bytes of a footer with so many records and so many bytes of different strings (each with its length).
pub fn footer_bytes(records: u64, string_bytes: u64) -> u64 {
    (records * ENTRY_BYTES + string_bytes).next_multiple_of(SECTOR as u64) + SECTOR as u64
}

/// Collects what the footer of an open segment will say.
#[derive(Debug, Default, Clone)]
pub struct Footer {
    /// Its records, in order of their place.
    pub entries: Vec<Entry>,
    strings: Vec<Arc<str>>,
    known: HashMap<Arc<str>, u16>,
    string_bytes: u64,
}

impl Footer {
    fn new_string_bytes(&self, text: &Arc<str>) -> u64 {
        if self.known.contains_key(text) { 0 } else { 2 + text.len() as u64 }
    }

    /// Its length on the disk, were this record in it.
    pub fn bytes_with(&self, meta: &RecordMeta) -> u64 {
        let strings = self.new_string_bytes(&meta.tenant) + self.new_string_bytes(&meta.format);
        footer_bytes(self.entries.len() as u64 + 1, self.string_bytes + strings)
    }

    /// Its length on the disk.
    pub fn bytes(&self) -> u64 {
        footer_bytes(self.entries.len() as u64, self.string_bytes)
    }

    /// Whether it can name one more record's strings: their numbers have 16 bits.
    pub fn has_room(&self) -> bool {
        self.strings.len() + 2 <= usize::from(u16::MAX)
    }

    /// Adds a record.
    pub fn push(&mut self, header: Entry) {
        for text in [&header.meta.tenant, &header.meta.format] {
            let bytes = self.new_string_bytes(text);
            if bytes > 0 {
                self.known.insert(Arc::clone(text), self.strings.len() as u16);
                self.strings.push(Arc::clone(text));
                self.string_bytes += bytes;
            }
        }
        self.entries.push(header);
    }

    /// Fills body and trailer; `into` is as long as [`bytes`](Self::bytes) says.
    pub fn encode(&self, segment: SegmentId, into: &mut [u8]) {
        into.fill(0);
        let (body, trailer) = into.split_at_mut(into.len() - SECTOR);
        let mut w = Writer { sector: body, at: 0 };
        for text in &self.strings {
            w.u16(text.len() as u16);
            w.bytes(text.as_bytes());
        }
        for entry in &self.entries {
            let meta = &entry.meta;
            w.bytes(&meta.key.0);
            w.bytes(&meta.space.0);
            w.bytes(&meta.hash);
            w.bytes(&meta.parent.map_or([0; 32], |parent| parent.0));
            w.u32(u32::from(meta.parent.is_some()));
            w.u16(self.known[&meta.tenant]);
            w.u16(self.known[&meta.format]);
            w.u64(entry.position);
            w.u64(meta.bytes);
            w.u64(meta.checksum);
            w.u64(entry.sequence);
        }
        let trailer_of = Trailer {
            segment,
            records: self.entries.len() as u32,
            strings: self.strings.len() as u32,
            body_bytes: body.len() as u64,
            body_checksum: checksum(body),
        };
        trailer_of.encode(trailer);
    }

    /// Reads the body that a trailer announces.
    ///
    /// # Errors
    /// Why the footer cannot be used: the headers have to be scanned.
    pub fn decode(trailer: &Trailer, body: &[u8], segment_bytes: u64) -> Result<Vec<Entry>, Refused> {
        if body.len() as u64 != trailer.body_bytes || checksum(body) != trailer.body_checksum {
            return Err(Refused::Checksum(FOOT_NAME));
        }
        let records_end = segment_bytes - trailer.body_bytes - SECTOR as u64;
        Self::entries(trailer, Reader(body), records_end).ok_or(Refused::Malformed(FOOT_NAME))
    }

    fn entries(trailer: &Trailer, mut r: Reader<'_>, records_end: u64) -> Option<Vec<Entry>> {
        let mut strings: Vec<Arc<str>> = Vec::new();
        for _ in 0..trailer.strings {
            let length = r.u16()?;
            strings.push(r.text(length.into())?.into());
        }
        let mut entries = Vec::with_capacity(trailer.records as usize);
        let mut from = SECTOR as u64;
        for _ in 0..trailer.records {
            let (key, space, hash) = (RecordKey(r.array()?), SpaceId(r.array()?), r.array()?);
            let (parent, flags) = (RecordKey(r.array()?), r.u32()?);
            let tenant = Arc::clone(strings.get(usize::from(r.u16()?))?);
            let format = Arc::clone(strings.get(usize::from(r.u16()?))?);
            let (position, bytes, checksum, sequence) = (r.u64()?, r.u64()?, r.u64()?, r.u64()?);
            let parent = (flags == 1).then_some(parent);
            let meta = RecordMeta { key, space, hash, parent, tenant, format, bytes, checksum };
            meta.check().ok()?;
            let entry = Entry { meta, segment: trailer.segment, sequence, position };
            let in_place =
                sequence < super::SEQUENCE_MAX && position.is_multiple_of(SECTOR as u64) && position >= from;
            if !in_place || position.checked_add(entry.meta.footprint())? > records_end {
                return None;
            }
            from = entry.end();
            entries.push(entry);
        }
        r.is_zero().then_some(entries)
    }
}
