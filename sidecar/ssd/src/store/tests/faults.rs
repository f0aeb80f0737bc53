//! Errors of the device, one at a time and for good.

use super::*;
use crate::device::{
    What,
    faulty::{BAD_MEDIUM, Crash, Fault},
};

const ENOSPC: i32 = 28;

fn scenario(world: &mut World) {
    world.hot = [1, 2, 5].into();
    for n in 1..27 {
        let _ = world.put(n, n % 3 == 0);
        if n % 4 == 0 {
            world.drive();
            let _ = world.get(n - 1);
        }
    }
    world.drive();
    world.load_all();
    world.store.close();
    world.drive();
}

#[test]
fn the_nth_operation_fails_in_every_way_and_every_put_and_get_still_ends_once() {
    let faults = [
        Fault::Errno(BAD_MEDIUM),
        Fault::Errno(ENOSPC),
        Fault::Short,
        Fault::Long,
        Fault::Lost,
        Fault::Misdirected(1),
        Fault::Misdirected(3),
    ];
    for fault in faults {
        for n in 0.. {
            let disk = Disk::new(SEGMENT);
            disk.lock().unwrap().fault = Some((n, fault));
            let mut world = World::on(&disk, 3);
            scenario(&mut world);
            world.check();
            let reached = disk.lock().unwrap().operations > n;
            // A fault that reports success can cost what was acknowledged: not a byte of it is wrong.
            let honest = !matches!(fault, Fault::Lost | Fault::Misdirected(_));
            disk.lock().unwrap().crash(Crash::LoseAll);
            let mut again = World::on(&disk, 4);
            for promised in &world.seen.durable {
                assert!(again.load(*promised) || !honest, "{fault:?} at {n}: record {promised}");
            }
            again.load_all();
            again.check();
            if !reached {
                break;
            }
        }
    }
}

#[test]
fn a_segment_that_cannot_be_written_is_retired_and_three_make_the_directory_read_only() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    (0..3).for_each(|n| world.save(n, true));
    disk.lock().unwrap().broken = Some((What::Write, BAD_MEDIUM));
    (10..20).for_each(|n| world.save(n, false));
    world.check();
    assert!(world.seen.read_only && world.store.is_read_only(0));
    assert_eq!(world.put(30, false), Err(PutError::ReadOnly));
    assert_eq!(world.load_all(), 3, "what is there can be read");
    let retired = world.store.segments(0).filter(|view| view.state == State::Retired).count();
    assert_eq!(retired, 3);
}

#[test]
fn a_failed_sync_acknowledges_nothing_and_drops_what_it_doubts() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    world.save(0, true);
    disk.lock().unwrap().broken = Some((What::Sync, BAD_MEDIUM));
    world.save(1, false);
    world.save(2, true);
    world.check();
    assert_eq!(world.seen.put_failed, BTreeMap::from([(2, PutError::Io(IoError::Os(BAD_MEDIUM)))]));
    assert_eq!(world.seen.dropped, [(1, DropReason::Unsynced), (2, DropReason::Unsynced)]);
    assert!(world.load(0));
}

#[test]
fn a_record_that_cannot_be_read_is_dropped_and_its_segment_not_written_again() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    (0..12).for_each(|n| world.save(n, true));
    let slot = world.store.index.get(&key(0)).unwrap().slot;
    disk.lock().unwrap().broken = Some((What::Read, BAD_MEDIUM));
    assert!(!world.load(0));
    disk.lock().unwrap().broken = None;
    assert_eq!(world.seen.get_failed[&0], GetError::Io(IoError::Os(BAD_MEDIUM)));
    assert_eq!(world.seen.dropped, [(0, DropReason::Unreadable)]);
    assert!(world.load(1));
    (100..200).for_each(|n| world.save(n, false));
    world.check();
    assert_eq!(world.store.segments(0).find(|view| view.slot == slot).unwrap().state, State::Retired);
    assert!(world.load(1), "a retired segment is never reused");
}

#[test]
fn a_full_disk_is_lived_with() {
    for files_max in 0..4 {
        let disk = Disk::new(SEGMENT);
        disk.lock().unwrap().files_max = files_max;
        let mut world = World::on(&disk, 1);
        for n in 0..60 {
            world.save(n, n % 2 == 0);
            assert_eq!(world.load(n), files_max > 0, "{files_max} files: reads and writes go on");
        }
        world.check();
        assert!(!world.seen.read_only, "a full disk is no error of the disk");
        assert_eq!(world.seen.put_failed.len(), if files_max == 0 { 60 } else { 0 });
    }
}

#[test]
fn swapped_files_serve_nothing() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    (0..12).for_each(|n| world.save(n, true));
    let a = disk.lock().unwrap().bytes(0).to_vec();
    let b = disk.lock().unwrap().bytes(1).to_vec();
    disk.lock().unwrap().tamper(0, |file| file.copy_from_slice(&b));
    disk.lock().unwrap().tamper(1, |file| file.copy_from_slice(&a));
    let swapped: Vec<u64> =
        (0..12).filter(|n| [0, 1].contains(&world.store.index.get(&key(*n)).unwrap().slot)).collect();
    for n in swapped {
        assert!(!world.load(n));
        assert!(matches!(
            world.seen.get_failed[&n],
            GetError::Corrupt(Refused::Other(_) | Refused::Magic(_))
        ));
    }
    let again = World::on(&disk, 2);
    assert_eq!(again.report.free, 2, "a file under another number is none");
}

#[test]
fn every_flipped_bit_that_is_read_is_found() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    (0..4).for_each(|n| world.save(n, true));
    // Sealed: recovery does not read the payloads, the gets do.
    world.store.close();
    world.drive();
    let (mut injected, mut found) = (0, 0);
    let mut dice = Dice::new(11);
    for n in 0..4 {
        let at = world.store.index.get(&key(n)).unwrap();
        // Bits of header and payload; the exhaustive test of headers is the format's.
        for _ in 0..150 {
            let bit = dice.below((SECTOR as u64 + at.bytes) * 8);
            let byte = (at.position + bit / 8) as usize;
            disk.lock().unwrap().tamper(at.slot, |file| file[byte] ^= 1 << (bit % 8));
            let mut other = World::on(&disk, 2);
            injected += 1;
            found += u64::from(!other.load(n));
            found -= u64::from(other.seen.wrong_bytes > 0);
            disk.lock().unwrap().tamper(at.slot, |file| file[byte] ^= 1 << (bit % 8));
        }
    }
    assert_eq!(found, injected, "detected / injected = 1.0");
    assert_eq!(world.load_all(), 4);
}

#[test]
fn a_durable_put_of_a_record_in_a_retired_segment_is_written_where_it_can_be_synced() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    (0..2).for_each(|n| world.save(n, false));
    disk.lock().unwrap().broken = Some((What::Write, BAD_MEDIUM));
    world.save(2, false);
    disk.lock().unwrap().broken = None;
    assert!(world.load(0));
    world.save(0, true);
    world.check();
    assert!(world.seen.durable.contains(&0));
    disk.lock().unwrap().crash(Crash::LoseAll);
    assert!(World::on(&disk, 2).load(0));
}

#[test]
fn a_durable_record_outlives_an_error_while_it_is_kept_and_the_loss_of_power() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    (0..6).for_each(|n| world.save(n, true));
    let from = world.store.index.get(&key(0)).unwrap().slot;
    assert_eq!(from, world.store.index.get(&key(1)).unwrap().slot);
    // A sync of the open segment takes its time; meanwhile one copy is written there, and the next one fails.
    world.put(6, true).unwrap();
    assert_eq!(world.drive_but(|op| op.what == What::Sync).len(), 1);
    world.store.evict(0, Some(from), |key, _| number(key) < 2).unwrap();
    let mut writes = 0;
    let mut held = world.drive_but(|op| {
        writes += u64::from(op.what == What::Write);
        op.what == What::Sync || (op.what == What::Write && writes == 2)
    });
    assert_eq!((writes, held.len()), (2, 1));
    disk.lock().unwrap().broken = Some((What::Write, BAD_MEDIUM));
    world.device.submit(held.remove(0));
    world.drive();
    disk.lock().unwrap().broken = None;
    assert!(world.load(0) && world.load(1));
    world.save(20, true);
    disk.lock().unwrap().crash(Crash::LoseAll);
    let mut again = World::on(&disk, 2);
    for n in [0, 1] {
        let told = world.seen.dropped.iter().any(|(dropped, _)| *dropped == n);
        assert!(again.load(n) || told, "record {n} is gone and nobody was told");
    }
}

#[test]
fn a_sync_that_fails_while_room_is_made_loses_nothing_that_was_durable() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    (0..6).for_each(|n| world.save(n, true));
    let from = world.store.index.get(&key(0)).unwrap().slot;
    world.store.evict(0, Some(from), |key, _| number(key) < 2).unwrap();
    let mut held = world.drive_but(|op| op.what == What::Sync);
    assert_eq!(held.len(), 1);
    disk.lock().unwrap().broken = Some((What::Sync, BAD_MEDIUM));
    world.device.submit(held.remove(0));
    let mut done = Vec::new();
    world.device.wait(None, &mut done);
    disk.lock().unwrap().broken = None;
    done.into_iter().for_each(|completion| world.store.completed(completion));
    world.drive();
    world.save(20, true);
    world.check();
    assert!(world.load(0) && world.load(1) && world.seen.durable.is_superset(&[0, 1, 5, 20].into()));
    disk.lock().unwrap().crash(Crash::LoseAll);
    let mut again = World::on(&disk, 2);
    assert!([0, 1, 5, 20].into_iter().all(|n| again.load(n)));
}

#[test]
fn puts_end_when_nothing_is_left_to_evict() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    (0..40).for_each(|n| world.put(n, false).unwrap());
    let mut done = Vec::new();
    loop {
        while let Some(action) = world.store.next_action() {
            if let Action::WantsRoom { .. } = action {
                // Between the question and the answer they turn out to be unreadable.
                for segment in &mut world.store.shelves[0].segments {
                    if segment.state == State::Sealed {
                        segment.state = State::Retired;
                    }
                }
                assert_eq!(world.store.evict(0, None, |_, _| true), None);
            } else {
                world.act(action);
            }
        }
        world.device.wait(Some(Duration::ZERO), &mut done);
        if done.is_empty() {
            break;
        }
        done.drain(..).for_each(|completion| world.store.completed(completion));
    }
    world.check();
    assert!(!world.seen.put_failed.is_empty());
    assert!(world.seen.put_failed.values().all(|error| *error == PutError::NoRoom));
}

#[test]
fn too_many_open_files_are_no_error_of_the_disk() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    (0..6).for_each(|n| world.save(n, true));
    for what in [What::Read, What::Write] {
        disk.lock().unwrap().broken = Some((what, 24));
        world.load_all();
        world.save(7, false);
        disk.lock().unwrap().broken = None;
    }
    world.check();
    assert_eq!(world.store.shelves[0].strikes, 0);
    assert!((0..6).all(|n| world.load(n)));
}
