//! Without faults: what is put can be got, before and after a restart, within the capacity.

use super::*;
use crate::{device::Device as _, verify::verify};

#[test]
fn what_is_put_can_be_got_and_is_there_after_an_orderly_restart() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    for n in 0..5 {
        world.put(n, n % 2 == 0).unwrap();
    }
    world.drive();
    world.store.close();
    world.drive();
    world.check();
    assert_eq!(world.load_all(), 5);

    let mut again = World::on(&disk, 2);
    assert_eq!((again.report.sealed, again.report.scanned, again.report.records), (1, 0, 5));
    assert_eq!(again.load_all(), 5);
    again.check();
    let Found::Segment { entries, .. } = &again.found[0].1 else { panic!("a segment") };
    let first = entries.iter().find(|entry| entry.meta.key == key(4)).unwrap();
    assert_eq!(first.meta, meta(4), "all of the meta data comes back");
}

#[test]
fn without_footers_the_headers_say_the_same() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    (0..5).for_each(|n| world.save(n, true));
    world.store.close();
    world.drive();
    let sealed = World::on(&disk, 2);
    disk.lock().unwrap().tamper(0, |file| file[SEGMENT as usize - 1] ^= 1);
    let mut scanned = World::on(&disk, 3);
    assert_eq!((scanned.report.sealed, scanned.report.scanned), (0, 1));
    let entries = |world: &World| match &world.found[0].1 {
        Found::Segment { entries, .. } => entries.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(entries(&sealed), entries(&scanned));
    assert_eq!(scanned.load_all(), 5);
}

#[test]
fn records_are_gathered_and_nothing_is_written_twice() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    (0..9).for_each(|n| world.put(n, true).unwrap());
    assert_eq!(world.put(3, true), Err(PutError::BeingWritten));
    world.drive();
    // Already there: no I/O, and durable at once or with the next sync.
    let before = disk.lock().unwrap().bytes_written;
    (0..9).for_each(|n| world.put(n, true).unwrap());
    world.drive();
    world.check();
    let records: u64 = (0..9).map(|n| meta(n).footprint()).sum();
    assert_eq!(disk.lock().unwrap().bytes_written, before);
    assert!(before <= records + 4 * SECTOR as u64, "{before} bytes for {records}");
    assert!((0..9).all(|n| world.seen.stored[&n] == 2 && world.seen.durable.contains(&n)));
    // 9 records of up to 20 KiB, 40 KiB a write: prepare, header, sync, four writes, syncs.
    assert!(disk.lock().unwrap().operations < 20);
}

#[test]
fn what_was_read_since_it_was_written_is_told_so_once() {
    let mut world = World::on(&Disk::new(SEGMENT), 5);
    (0..4).for_each(|n| world.save(n, false));
    assert!(world.load(1) && world.load(2));
    world.store.close();
    world.drive();
    let mut told = Vec::new();
    world.store.evict(0, None, |key, was_read| {
        told.push((number(key), was_read));
        was_read
    });
    world.drive();
    told.sort_unstable();
    assert_eq!(told, [(0, false), (1, true), (2, true), (3, false)]);
    assert!(world.store.contains(&key(1)) && world.store.contains(&key(2)) && world.store.len() == 2);
    assert!((1..3).all(|n| !world.store.index.was_read(&key(n))), "written again, and not read since");
    world.check();
}

#[test]
fn eviction_by_segment_keeps_what_is_hot_and_never_exceeds_the_capacity() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    world.hot = [0, 1].into();
    for n in 0..200 {
        world.save(n, n % 5 == 0);
        assert!(world.load(0) && (n == 0 || world.load(1)), "hot records outlive their segments");
    }
    world.check();
    assert_eq!(world.seen.put_failed, BTreeMap::new());
    let counters = world.store.counters();
    assert!(counters.evicted > 100 && counters.relocated > 5 && counters.corrupt == 0);
    assert!(world.load(199));
    assert_eq!(disk.lock().unwrap().slots(), [0, 1, 2, 3]);
    let mut again = World::on(&disk, 9);
    assert!(again.load_all() >= world.store.len());
    assert!(again.load(0) && again.load(1));
}

#[test]
fn a_segment_is_not_reused_while_it_is_read() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    (0..30).for_each(|n| world.save(n, false));
    let first: u64 = world.store.index.iter().map(|(key, _)| number(&key)).min().unwrap();
    let slot = world.store.index.get(&key(first)).unwrap().slot;
    world.get(first).unwrap();
    world.store.evict(0, Some(slot), |_, _| false);
    assert_eq!(world.store.segments(0).find(|view| view.slot == slot).unwrap().state, State::Draining);
    assert!(!world.store.contains(&key(first)));
    world.drive();
    assert!(world.seen.loaded.contains(&first));
    assert_eq!(world.store.segments(0).find(|view| view.slot == slot).unwrap().state, State::Free);
    world.check();
}

#[test]
fn bounds_are_kept_and_said() {
    let disk = Disk::new(SEGMENT);
    let limits = Limits { puts_max: 3, gets_max: 1, ..Limits::default() };
    let mut world = World::with(&disk, 1, limits);
    (0..3).for_each(|n| world.put(n, false).unwrap());
    assert_eq!(world.put(3, false), Err(PutError::Busy));
    world.drive();
    world.get(0).unwrap();
    assert_eq!(world.get(1), Err(GetError::Busy));
    assert_eq!(world.get(77), Err(GetError::Missing));
    let wrong = Extent { offset: 0, bytes: 4096 * 9 };
    assert_eq!(world.store.get(1, key(0), wrong), Err(GetError::Extent { expected: 4096 }));
    let outside = Extent { offset: LANE * LANES, bytes: 4096 };
    assert_eq!(world.store.put(9, meta(9), outside, false), Err(PutError::Extent));
    for bytes in [0, (64 << 20) + 1] {
        let odd = RecordMeta { bytes, ..meta(9) };
        assert!(matches!(world.store.put(9, odd, outside, false), Err(PutError::Record(_))));
    }
    let long = RecordMeta { bytes: SEGMENT, ..meta(9) };
    let extent = Extent { offset: 0, bytes: SEGMENT };
    assert!(matches!(world.store.put(9, long, extent, false), Err(PutError::TooLong { .. })));
    world.drive();
    world.check();
}

#[test]
fn the_verdict_names_what_is_there_and_what_is_wrong() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    (0..12).for_each(|n| world.save(n, true));
    let verdict = verify(&mut world.device);
    assert_eq!((verdict.proved, verdict.problem_count), (12, 0));
    assert_eq!(verdict.spaces, HashMap::from([([3; 16], 12)]));
    let at = world.store.index.get(&key(7)).unwrap();
    let byte = (at.position as usize) + SECTOR + 17;
    disk.lock().unwrap().tamper(at.slot, |file| file[byte] ^= 4);
    let verdict = verify(&mut world.device);
    assert_eq!((verdict.proved, verdict.problem_count), (11, 1));
    assert_eq!((verdict.problems[0].slot, verdict.problems[0].position), (at.slot, at.position));
    assert!(verdict.to_string().contains("the checksum of the payload differs"));
    assert_eq!(world.device.engine(), "faulty");
}

#[test]
fn the_footers_of_a_full_directory_bring_all_its_records_back() {
    use crate::format::{DirectoryId, Footer, Trailer};
    const PER_SEGMENT: u64 = 128;
    let (segment_bytes, segments) = (1 << 30, 200);
    let block = Superblock { directory: DirectoryId([1; 16]), segment_bytes };
    let mut footers = Vec::new();
    for slot in 0..segments {
        let id = SegmentId([slot as u8; 16]);
        let mut footer = Footer::default();
        for n in slot * PER_SEGMENT..(slot + 1) * PER_SEGMENT {
            let meta = RecordMeta { key: key(n), bytes: 2 << 20, ..meta(0) };
            let position = SECTOR as u64 + (n % PER_SEGMENT) * meta.footprint();
            footer.push(Entry { meta, segment: id, sequence: n, position });
        }
        let mut bytes = vec![0; footer.bytes() as usize];
        footer.encode(id, &mut bytes);
        footers.push((id, bytes));
    }
    let memory = Arc::new(Memory::owned(LANE));
    let mut store = Store::new(&[(block, segments as u32)], memory, Limits::default(), Box::new(|| [0; 16]));
    for (slot, (id, bytes)) in footers.iter().enumerate() {
        let (body, trailer) = bytes.split_at(bytes.len() - SECTOR);
        let trailer = Trailer::expect(trailer, *id, segment_bytes).unwrap();
        let entries = Footer::decode(&trailer, body, segment_bytes).unwrap();
        store.adopt(
            0,
            slot as u32,
            Some(Life { id: *id, first_sequence: 0, entries: &entries, proved: true }),
        );
    }
    assert_eq!(store.len() as u64, segments * PER_SEGMENT);
}

#[test]
fn a_durable_put_that_comes_while_the_footer_is_synced_ends() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    world.save(0, false);
    world.store.close();
    let mut syncs = 0;
    let held = world.drive_but(|op| {
        syncs += u64::from(op.what == What::Sync);
        op.what == What::Sync && syncs == 2
    });
    world.put(0, true).unwrap();
    assert!(world.drive_but(|_| false).is_empty());
    held.into_iter().for_each(|op| world.device.submit(op));
    world.drive();
    world.check();
    assert!(world.seen.durable.contains(&0));
}

#[test]
fn a_full_segment_gives_way_to_the_next_without_waiting_for_a_sync() {
    let disk = Disk::new(SEGMENT);
    for (seed, ahead) in [(1, false), (2, true)] {
        let mut world = World::on(&disk, seed);
        let first = 100 * seed;
        let is_ready = |world: &World| world.store.segments(0).any(|view| view.state == State::Ready);
        (first..first + 4).for_each(|n| world.save(n, false));
        assert_eq!(is_ready(&world), ahead, "past its half");
        (first + 4..first + 9).for_each(|n| world.put(n, false).unwrap());
        let held = world.drive_but(|op| op.what == What::Sync);
        let written = (first..first + 9).filter(|n| world.store.contains(&key(*n))).count();
        assert_eq!(written == 9, ahead, "{written} of 9");
        held.into_iter().for_each(|op| world.device.submit(op));
        world.drive();
        world.check();
        world.store.close();
        world.drive();
        world.check();
        assert!(!is_ready(&world), "an orderly end seals it, too");
    }
}

#[test]
fn durable_puts_that_wait_for_a_sync_are_bounded() {
    let disk = Disk::new(SEGMENT);
    let limits = Limits { puts_max: 3, ..Limits::default() };
    let mut world = World::with(&disk, 1, limits);
    world.save(0, false);
    (0..3).for_each(|_| world.put(0, true).unwrap());
    assert_eq!(world.put(0, true), Err(PutError::Busy));
    assert_eq!(world.put(1, false), Err(PutError::Busy));
    world.drive();
    world.check();
    world.put(1, true).unwrap();
    world.drive();
    world.check();
}

#[test]
fn a_loop_of_crashes_leaves_no_more_to_read_than_one() {
    let disk = Disk::new(SEGMENT);
    for life in 0..3 {
        let mut world = World::on(&disk, life);
        // The one before ended without a word; what it had open is sealed before anything else.
        assert_eq!(world.report.scanned, u32::from(life > 0), "life {life}");
        world.drive();
        assert_eq!(world.store.segments(0).filter(|view| view.state == State::Sealed).count() as u64, life);
        world.save(life, true);
    }
    // One that ends before its first put leaves nothing.
    World::on(&disk, 8).drive();
    let mut last = World::on(&disk, 9);
    assert_eq!((last.report.sealed, last.report.scanned), (3, 0));
    assert_eq!(last.load_all(), 3);
    last.check();
    let verdict = verify(&mut last.device);
    assert_eq!((verdict.problem_count, verdict.proved), (0, 3), "{verdict}");
}

#[test]
fn what_a_crash_left_open_without_a_record_is_not_searched_twice() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    world.put(1, true).unwrap();
    // The header of the segment is there; the record's write never came to an end.
    world.drive_but(|op| op.what == What::Write && op.at > 0);
    let mut next = World::on(&disk, 2);
    next.drive();
    next.check();
    let again = World::on(&disk, 3);
    assert_eq!((next.report.scanned, again.report.scanned, again.report.sealed), (1, 0, 1));
}
