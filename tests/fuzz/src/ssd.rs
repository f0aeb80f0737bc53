//! The SSD tier's structures.

use pillion_ssd::format::{
    Commit, DirectoryId, Entry, FORMAT_BYTES_MAX, Footer, PAYLOAD_BYTES_MAX, RecordHeader, RecordKey,
    RecordMeta, Refused, SECTOR, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN, SEQUENCE_MAX, SegmentHeader,
    SegmentId, SpaceId, Superblock, TENANT_BYTES_MAX, Trailer, checksum,
};

use crate::cursor::Cursor;

/// Makes the checksum of a sector right again: what a decoder does with a structure that makes no sense is only seen
/// behind it.
fn seal(sector: &mut [u8]) {
    let sum = checksum(&sector[..SECTOR - 8]);
    sector[SECTOR - 8..].copy_from_slice(&sum.to_le_bytes());
}

/// What an input does to encoded bytes.
fn spoil(c: &mut Cursor<'_>, bytes: &mut [u8], at_most: usize) {
    for _ in 0..c.below(5) {
        // Most fields lie in front.
        let at = usize::from(c.u16()) % bytes.len().min(at_most);
        bytes[at] ^= c.byte();
    }
}

/// Whatever a record may say of itself.
pub(crate) fn meta(c: &mut Cursor<'_>) -> RecordMeta {
    let text = |c: &mut Cursor<'_>, max: usize| -> String {
        let word = c.text(12);
        // As long as it may be.
        if c.rarely() { "x".repeat(max) } else { word }
    };
    RecordMeta {
        key: RecordKey([c.byte(); 32]),
        space: SpaceId([c.byte(); 16]),
        hash: [c.byte(); 32],
        parent: c.flag().then(|| RecordKey([c.byte(); 32])),
        tenant: text(c, TENANT_BYTES_MAX).into(),
        format: text(c, FORMAT_BYTES_MAX).into(),
        bytes: c.number().clamp(1, PAYLOAD_BYTES_MAX),
        checksum: c.number(),
    }
}

fn superblock(c: &mut Cursor<'_>) -> Superblock {
    let sectors = c.number() % (SEGMENT_BYTES_MAX / SECTOR as u64);
    let segment_bytes = (sectors * SECTOR as u64).max(SEGMENT_BYTES_MIN);
    Superblock { directory: DirectoryId([c.byte(); 16]), segment_bytes }
}

fn record_header(c: &mut Cursor<'_>) -> RecordHeader {
    RecordHeader {
        meta: meta(c),
        segment: SegmentId([c.byte(); 16]),
        sequence: c.number() % SEQUENCE_MAX,
        position: c.number() & !(SECTOR as u64 - 1),
    }
}

/// One structure, encoded, changed, sealed again or not: what is accepted is within bounds and says the same when it is
/// encoded again; what is unchanged is accepted; what is changed and not sealed again is not.
pub fn ssd_format(data: &[u8]) {
    let mut c = Cursor::new(data, 4096);
    let c = &mut c;
    match c.below(5) {
        0 => {
            let block = superblock(c);
            one(
                c,
                64,
                |sector| block.encode(sector),
                |sector| {
                    let found = Superblock::decode(sector)?;
                    assert!((SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&found.segment_bytes));
                    assert!(found.segment_bytes.is_multiple_of(SECTOR as u64));
                    let mut again = vec![0; SECTOR];
                    found.encode(&mut again);
                    assert_eq!(Superblock::decode(&again), Ok(found));
                    Ok(found == block)
                },
            );
        }
        1 => {
            let block = superblock(c);
            let (slot, first_sequence) = (c.number32(), c.number() % SEQUENCE_MAX);
            let (directory, segment) = (block.directory, SegmentId([c.byte(); 16]));
            let header = SegmentHeader {
                directory,
                segment,
                slot,
                segment_bytes: block.segment_bytes,
                first_sequence,
            };
            one(
                c,
                96,
                |sector| header.encode(sector),
                |sector| {
                    let found = SegmentHeader::expect(sector, &block, slot)?;
                    assert_eq!((found.directory, found.slot), (block.directory, slot));
                    assert!(
                        found.segment_bytes == block.segment_bytes && found.first_sequence < SEQUENCE_MAX
                    );
                    Ok(found == header)
                },
            );
        }
        2 => {
            let header = record_header(c);
            one(
                c,
                300,
                |sector| _ = header.encode(sector),
                |sector| {
                    let (found, sum) = RecordHeader::decode(sector)?;
                    assert!(found.meta.check().is_ok() && found.sequence < SEQUENCE_MAX);
                    let mut again = vec![0; SECTOR];
                    assert_eq!(found.encode(&mut again), sum);
                    assert_eq!(again, sector, "one content has one form");
                    Ok(found == header)
                },
            );
        }
        3 => {
            let header = record_header(c);
            // Where it would end beyond what 64 bits count, recovery never gets to its commit.
            let header = RecordHeader { position: header.position % (1 << 40), ..header };
            let commit = header.commit(c.number());
            let encode = |sector: &mut [u8]| commit.encode(sector);
            one(c, 120, encode, |sector| Commit::expect(sector, &commit).map(|()| true));
        }
        _ => footer(c),
    }
}

/// Encodes, spoils and decodes one sector. `decode` says whether it is what was encoded.
fn one(
    c: &mut Cursor<'_>,
    at_most: usize,
    encode: impl Fn(&mut [u8]),
    decode: impl Fn(&[u8]) -> Result<bool, Refused>,
) {
    let mut sector = vec![0; SECTOR];
    encode(&mut sector);
    let before = sector.clone();
    let sealed = c.flag();
    let at_most = if c.rarely() { SECTOR } else { at_most };
    spoil(c, &mut sector, at_most);
    if sealed {
        seal(&mut sector);
    }
    let same = before == sector;
    match decode(&sector) {
        Ok(equal) => assert!(equal || sealed, "other bytes with an old checksum were accepted"),
        Err(why) => assert!(!same, "what was written is refused: {why}"),
    }
    if !same && !sealed {
        assert!(decode(&sector).is_err(), "changed bytes were accepted");
    }
    // Any length is answered.
    assert!(decode(&sector[..c.below(SECTOR)]).is_err());
}

/// The entries of a footer lie one behind the other, before the footer, and are as many as its trailer says.
pub(crate) fn check_entries(entries: &[Entry], segment: SegmentId, end: u64) {
    let mut from = SECTOR as u64;
    for entry in entries {
        assert!(entry.meta.check().is_ok() && entry.sequence < SEQUENCE_MAX && entry.segment == segment);
        assert!(entry.position >= from && entry.position.is_multiple_of(SECTOR as u64));
        from = entry.end();
    }
    assert!(from <= end, "a record ends at {from}, beyond {end}");
}

fn footer(c: &mut Cursor<'_>) {
    let segment = SegmentId([c.byte(); 16]);
    let (mut footer, mut position) = (Footer::default(), SECTOR as u64);
    for _ in 0..c.below(40) {
        let meta = RecordMeta { bytes: 1 + c.number() % (64 << 10), ..meta(c) };
        let entry = Entry { segment, sequence: c.number() % SEQUENCE_MAX, position, meta };
        position = entry.end();
        footer.push(entry);
    }
    let mut bytes = vec![0; footer.bytes() as usize];
    let segment_bytes = (position + bytes.len() as u64).max(SEGMENT_BYTES_MIN);
    footer.encode(segment, &mut bytes);
    let before = bytes.clone();
    let (body, trailer) = bytes.split_at_mut(footer.bytes() as usize - SECTOR);
    if !body.is_empty() {
        spoil(c, body, usize::MAX);
    }
    spoil(c, trailer, 64);
    let sealed = c.flag();
    if sealed {
        // Behind magic, version, flags, segment, two counts and a length.
        trailer[48..56].copy_from_slice(&checksum(body).to_le_bytes());
        seal(trailer);
    }
    let found = Trailer::expect(trailer, segment, segment_bytes);
    if bytes == before {
        let found = found.expect("what was written is accepted");
        let body = &bytes[..bytes.len() - SECTOR];
        assert_eq!(Footer::decode(&found, body, segment_bytes), Ok(footer.entries));
    } else if let Ok(found) = found {
        let body = &bytes[..bytes.len() - SECTOR];
        // A trailer may announce another length than was written.
        let wanted = &body[body.len().saturating_sub(found.body_bytes as usize)..];
        if let Ok(entries) = Footer::decode(&found, wanted, segment_bytes) {
            assert!(sealed, "changed bytes with an old checksum were accepted");
            assert_eq!(entries.len(), found.records as usize);
            check_entries(&entries, segment, segment_bytes - SECTOR as u64 - found.body_bytes);
        }
    }
}
