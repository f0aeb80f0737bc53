//! The format: golden files, and every bit of every structure.

use std::{fs, path::PathBuf};

use pillion_ssd::format::{
    Asked, Commit, DirectoryId, Entry, Footer, RecordHeader, RecordKey, RecordMeta, Refused, SECTOR,
    SegmentHeader, SegmentId, SpaceId, Superblock, Trailer, VerifiedRecord, checksum,
};

const SEGMENT_BYTES: usize = 64 << 10;
const SEGMENT: SegmentId = SegmentId([0xa7; 16]);
const BLOCK: Superblock =
    Superblock { directory: DirectoryId([0xd1; 16]), segment_bytes: SEGMENT_BYTES as u64 };

fn payload(n: u8, sectors: usize) -> Vec<u8> {
    // The second one ends in the middle of a sector.
    let bytes = sectors * SECTOR - if n > 1 { 1000 } else { 0 };
    (0..bytes).map(|at| (at as u8).wrapping_mul(31).wrapping_add(n)).collect()
}

fn entries() -> Vec<(Entry, Vec<u8>)> {
    let mut position = SECTOR as u64;
    let records = [(1u8, 1, "default", "vllm-0.32/f16"), (2, 2, "team-a", "vllm-0.32/f16")];
    let entry = |(n, sectors, tenant, format): (u8, usize, &str, &str)| {
        let bytes = payload(n, sectors);
        let meta = RecordMeta {
            key: RecordKey([n; 32]),
            space: SpaceId([0x50 + n; 16]),
            hash: [0x60 + n; 32],
            parent: (n > 1).then(|| RecordKey([n - 1; 32])),
            tenant: tenant.into(),
            format: format.into(),
            bytes: bytes.len() as u64,
            checksum: checksum(&bytes),
        };
        let entry = Entry { meta, segment: SEGMENT, sequence: 40 + u64::from(n), position };
        position = entry.end();
        (entry, bytes)
    };
    records.into_iter().map(entry).collect()
}

fn segment_header() -> SegmentHeader {
    SegmentHeader {
        directory: BLOCK.directory,
        segment: SEGMENT,
        slot: 7,
        segment_bytes: BLOCK.segment_bytes,
        first_sequence: 41,
    }
}

/// A whole file, as the store would have left it.
fn image() -> Vec<u8> {
    let mut file = vec![0; SEGMENT_BYTES];
    segment_header().encode(&mut file[..SECTOR]);
    let mut footer = Footer::default();
    for (entry, bytes) in entries() {
        let (at, end) = (entry.position as usize, entry.end() as usize);
        let sum = entry.encode(&mut file[at..at + SECTOR]);
        file[at + SECTOR..at + SECTOR + bytes.len()].copy_from_slice(&bytes);
        entry.commit(sum).encode(&mut file[end - SECTOR..end]);
        footer.push(entry);
    }
    let footer_at = SEGMENT_BYTES - footer.bytes() as usize;
    footer.encode(SEGMENT, &mut file[footer_at..]);
    file
}

fn superblock() -> Vec<u8> {
    let mut sector = vec![0; SECTOR];
    BLOCK.encode(&mut sector);
    sector
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn asked(entry: &Entry) -> Asked {
    Asked { key: entry.meta.key, bytes: entry.meta.bytes, segment: SEGMENT, position: entry.position }
}

/// A new version of the format gets new files beside these; those of older ones stay.
#[test]
fn the_golden_files_are_what_this_code_writes() {
    for (name, bytes) in [("superblock-v2.bin", superblock()), ("segment-v2.bin", image())] {
        if fs::read(golden(name)).ok().as_ref() != Some(&bytes) {
            let written = std::env::temp_dir().join(name);
            fs::write(&written, bytes).unwrap();
            panic!("{name} is not what this code writes, which is in {}", written.display());
        }
    }
}

#[test]
fn the_golden_files_are_read() {
    assert_eq!(Superblock::decode(&fs::read(golden("superblock-v2.bin")).unwrap()), Ok(BLOCK));
    let file = fs::read(golden("segment-v2.bin")).unwrap();
    assert_eq!(SegmentHeader::expect(&file, &BLOCK, 7), Ok(segment_header()));
    let trailer_at = file.len() - SECTOR;
    let trailer = Trailer::expect(&file[trailer_at..], SEGMENT, BLOCK.segment_bytes).unwrap();
    let body = &file[trailer_at - trailer.body_bytes as usize..trailer_at];
    let listed = Footer::decode(&trailer, body, BLOCK.segment_bytes).unwrap();
    assert_eq!(listed, entries().into_iter().map(|(entry, _)| entry).collect::<Vec<_>>());
    for (entry, bytes) in entries() {
        let (at, end) = (entry.position as usize, entry.end() as usize);
        let (header, sum) = RecordHeader::decode(&file[at..]).unwrap();
        assert_eq!(header, entry);
        let payload = &file[at + SECTOR..end - SECTOR];
        let proved = VerifiedRecord::verify(&asked(&entry), &file[at..at + SECTOR], payload).unwrap();
        assert_eq!(
            (proved.payload(), proved.checksum(), proved.sequence()),
            (&bytes[..], checksum(&bytes), entry.sequence)
        );
        assert_eq!(Commit::expect(&file[end - SECTOR..], &header.commit(sum)), Ok(()));
    }
}

/// A record was a whole number of sectors in version 1; its directories are refused and left as they are.
#[test]
fn directories_of_version_1_are_refused() {
    let block = fs::read(golden("superblock-v1.bin")).unwrap();
    assert_eq!(Superblock::decode(&block).err(), Some(Refused::Version(1)));
    let file = fs::read(golden("segment-v1.bin")).unwrap();
    assert_eq!(SegmentHeader::expect(&file, &BLOCK, 7).err(), Some(Refused::Version(1)));
}

/// Every bit of a range, one at a time: how many flips were not noticed.
fn unnoticed(bytes: &mut [u8], range: std::ops::Range<usize>, accepts: impl Fn(&[u8]) -> bool) -> usize {
    assert!(accepts(bytes));
    let mut missed = 0;
    for bit in range.start * 8..range.end * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        missed += usize::from(accepts(bytes));
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    missed
}

#[test]
fn every_flipped_bit_of_every_structure_is_found() {
    let mut file = image();
    let (entry, _) = entries().pop().unwrap();
    let (at, end) = (entry.position as usize, entry.end() as usize);
    let (_, sum) = RecordHeader::decode(&file[at..]).unwrap();
    let whole = file[at + SECTOR..end - SECTOR].to_vec();
    let header = &mut file[at..at + SECTOR];
    assert_eq!(
        unnoticed(header, 0..SECTOR, |header| VerifiedRecord::verify(&asked(&entry), header, &whole).is_ok()),
        0
    );
    assert_eq!(unnoticed(header, 0..SECTOR, |header| RecordHeader::decode(header).is_ok()), 0);
    let commit = &mut file[end - SECTOR..end];
    assert_eq!(unnoticed(commit, 0..SECTOR, |commit| Commit::expect(commit, &entry.commit(sum)).is_ok()), 0);
    let head = &mut file[..SECTOR];
    assert_eq!(unnoticed(head, 0..SECTOR, |head| SegmentHeader::expect(head, &BLOCK, 7).is_ok()), 0);
    let trailer_at = SEGMENT_BYTES - SECTOR;
    let read = |footer: &[u8]| {
        let (body, trailer) = footer.split_at(SECTOR);
        Trailer::expect(trailer, SEGMENT, BLOCK.segment_bytes)
            .and_then(|trailer| Footer::decode(&trailer, body, BLOCK.segment_bytes))
            .is_ok()
    };
    assert_eq!(unnoticed(&mut file[trailer_at - SECTOR..], 0..2 * SECTOR, read), 0);
    let mut block = superblock();
    assert_eq!(unnoticed(&mut block, 0..SECTOR, |block| Superblock::decode(block).is_ok()), 0);
}

#[test]
fn the_rest_of_the_last_sector_is_zeros() {
    let file = image();
    let (entry, bytes) = entries().pop().unwrap();
    let at = entry.position as usize;
    let mut whole = file[at + SECTOR..entry.end() as usize - SECTOR].to_vec();
    let proved = VerifiedRecord::verify(&asked(&entry), &file[at..at + SECTOR], &whole).unwrap();
    assert_eq!(proved.payload(), bytes);
    *whole.last_mut().unwrap() = 1;
    let refused = VerifiedRecord::verify(&asked(&entry), &file[at..at + SECTOR], &whole).err();
    assert_eq!(refused, Some(Refused::Malformed("padding of the payload")));
    let short = VerifiedRecord::verify(&asked(&entry), &file[at..at + SECTOR], &bytes).err();
    assert_eq!(short, Some(Refused::Other("payload length")));
}

#[test]
fn sampled_bits_of_the_payload_are_found() {
    let file = image();
    let (entry, mut bytes) = entries().remove(0);
    let header = &file[entry.position as usize..][..SECTOR];
    for byte in (0..bytes.len()).step_by(7) {
        bytes[byte] ^= 1 << (byte % 8);
        let refused = VerifiedRecord::verify(&asked(&entry), header, &bytes).err();
        assert_eq!(refused, Some(Refused::Checksum("payload")));
        bytes[byte] ^= 1 << (byte % 8);
    }
}

#[test]
fn what_was_asked_for_is_compared_before_any_checksum_counts() {
    let file = image();
    let (first, bytes) = entries().remove(0);
    let header = &file[first.position as usize..][..SECTOR];
    let right = asked(&first);
    let others = [
        (Asked { key: RecordKey([9; 32]), ..right }, "key"),
        (Asked { segment: SegmentId([9; 16]), ..right }, "segment"),
        (Asked { position: 8192, ..right }, "position"),
        (Asked { bytes: 8192, ..right }, "length"),
    ];
    for (other, name) in others {
        assert_eq!(VerifiedRecord::verify(&other, header, &bytes).err(), Some(Refused::Other(name)));
    }
    let mut newer = header.to_vec();
    newer[8] = 3;
    assert_eq!(RecordHeader::decode(&newer).err(), Some(Refused::Version(3)));
    assert_eq!(RecordHeader::decode(&[0; SECTOR]).err(), Some(Refused::Magic("record header")));
    assert_eq!(RecordHeader::decode(&[0; 100]).err(), Some(Refused::Malformed("record header")));
}

#[test]
fn a_segment_length_that_no_directory_has_is_refused() {
    for (segment_bytes, is_right) in
        [(0, false), (4096, false), (64 << 10, true), (4 << 30, true), (1 << 40, false)]
    {
        let mut sector = vec![0; SECTOR];
        Superblock { segment_bytes, ..BLOCK }.encode(&mut sector);
        assert_eq!(Superblock::decode(&sector).is_ok(), is_right, "{segment_bytes}");
    }
}

#[test]
fn a_sequence_after_which_none_comes_is_refused() {
    for (first_sequence, is_right) in [((1 << 63) - 1, true), (1 << 63, false), (u64::MAX, false)] {
        let mut sector = vec![0; SECTOR];
        let header = SegmentHeader {
            directory: BLOCK.directory,
            segment: SEGMENT,
            slot: 0,
            segment_bytes: BLOCK.segment_bytes,
            first_sequence,
        };
        header.encode(&mut sector);
        assert_eq!(SegmentHeader::expect(&sector, &BLOCK, 0).is_ok(), is_right, "{first_sequence}");
    }
}
