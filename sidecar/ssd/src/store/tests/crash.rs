//! Power goes at every operation; what was acknowledged as durable is there, nothing is ever wrong (I7).

use super::*;
use crate::device::faulty::{Crash, Fault};

/// Saves, evictions with hot records, loads; durable and not.
fn scenario(world: &mut World, from: u64) {
    world.hot = [from, from + 1, from + 4].into();
    for n in from..from + 26 {
        if world.put(n, n % 3 == 0).is_err() {
            continue;
        }
        if n % 4 == 0 {
            world.drive();
        }
        if n % 5 == 0 && world.store.contains(&key(n - 1)) {
            let _ = world.get(n - 1);
        }
    }
    world.drive();
}

/// After a crash: whoever was promised durability gets it; every other record is right or a miss.
fn check_restart(disk: &Arc<Mutex<Disk>>, promised: &BTreeSet<u64>, context: &str) {
    let mut world = World::on(disk, 77);
    for n in promised {
        assert!(world.load(*n), "{context}: record {n} was acknowledged as durable");
    }
    world.load_all();
    world.check();
    if !context.ends_with("LoseAll") {
        return;
    }
    // It works on, and another restart is as good.
    scenario(&mut world, 1000);
    world.check();
    let promised = world.seen.durable.clone();
    disk.lock().unwrap().crash(Crash::LoseAll);
    let mut last = World::on(disk, 78);
    for n in &promised {
        assert!(last.load(*n), "{context}: record {n} after a second crash");
    }
    assert_eq!(last.seen.wrong_bytes, 0);
}

/// More of them for a campaign: `PILLION_SSD_SEEDS=200 cargo test --release -p pillion-ssd crash`.
fn seeds() -> u64 {
    std::env::var("PILLION_SSD_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

#[test]
fn power_lost_at_every_operation_of_a_story_of_saves_evictions_loads_and_a_restart() {
    for seed in 0..seeds() {
        let operations = (0..).take_while(|n| power_lost_at(*n, seed)).count();
        assert!(operations > 40, "only {operations} operations");
    }
}

/// Whether the story was long enough for that.
fn power_lost_at(n: u64, seed: u64) -> bool {
    let disk = Disk::new(SEGMENT);
    disk.lock().unwrap().fault = Some((n, Fault::Crash));
    let mut world = World::on(&disk, 5 + seed);
    scenario(&mut world, 1);
    assert_eq!(world.seen.wrong_bytes, 0);
    if !disk.lock().unwrap().crashed {
        world.check();
        return false;
    }
    let subset = |part: u64| Crash::Subset(seed << 32 | part << 16 | n);
    for how in [Crash::LoseAll, Crash::KeepAll, subset(1), subset(2), subset(3)] {
        let end = disk.lock().unwrap().fork();
        end.lock().unwrap().crash(how);
        check_restart(&end, &world.seen.durable, &format!("seed {seed}, operation {n}, {how:?}"));
    }
    true
}

#[test]
fn a_write_torn_at_every_prefix_never_serves_a_wrong_byte() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 5);
    world.save(0, true);
    (1..5).for_each(|n| world.put(n, false).unwrap());
    world.drive();
    world.load_all();
    let units = disk.lock().unwrap().unsynced_units();
    assert!(units > 60);
    let mut whole = 0;
    for prefix in 0..=units {
        let end = disk.lock().unwrap().fork();
        end.lock().unwrap().crash(Crash::Prefix(prefix));
        let mut again = World::on(&end, 6);
        assert!(again.load(0));
        let there = again.load_all();
        again.check();
        assert_eq!(again.seen.get_failed, BTreeMap::new(), "a prefix is told by its commits");
        assert!(there >= whole, "a longer prefix holds no fewer records");
        whole = there;
    }
    assert_eq!(whole, 5);
}

#[test]
fn lost_and_reordered_sectors_are_found() {
    let (mut injected, mut found) = (0, 0);
    for seed in 0..300 {
        let disk = Disk::new(SEGMENT);
        let mut world = World::on(&disk, seed);
        world.save(0, true);
        (1..5).for_each(|n| world.put(n, false).unwrap());
        world.drive();
        let whole: Vec<u8> = disk.lock().unwrap().bytes(0).to_vec();
        disk.lock().unwrap().crash(Crash::Subset(seed));
        let damaged: Vec<u64> = (1..5)
            .filter(|n| {
                let at = world.store.index.get(&key(*n)).unwrap();
                let range =
                    at.position as usize..(at.position + meta(*n).footprint() - SECTOR as u64) as usize;
                disk.lock().unwrap().bytes(0)[range.clone()] != whole[range]
            })
            .collect();
        let mut again = World::on(&disk, seed);
        again.load_all();
        again.check();
        assert!(again.seen.loaded.contains(&0));
        injected += damaged.len();
        found += damaged.iter().filter(|n| !again.seen.loaded.contains(n)).count();
    }
    assert!(injected > 300);
    assert_eq!(found, injected, "detected / injected = 1.0");
}

#[test]
fn a_copy_that_lost_its_payload_does_not_hide_the_older_whole_one() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    world.hot = [0].into();
    (0..6).for_each(|n| world.save(n, true));
    let from = world.store.index.get(&key(0)).unwrap();
    // Written again to make room, and the power goes before the sync.
    world.store.evict(0, Some(from.slot), |key, _| number(key) == 0);
    let to = loop {
        let moved = world.store.pending.values().find_map(|(_, _, pending)| match pending {
            Pending::Sync { acks, .. } => acks.iter().find_map(|ack| ack.place),
            _ => None,
        });
        if let Some(to) = moved {
            break to;
        }
        let mut done = Vec::new();
        while let Some(action) = world.store.next_action() {
            world.act(action);
        }
        world.device.wait(None, &mut done);
        done.into_iter().for_each(|completion| world.store.completed(completion));
    };
    assert_eq!(
        world.store.index.get(&key(0)).unwrap(),
        from,
        "the old copy counts until the new one is durable"
    );
    let payload = to.position as usize + SECTOR;
    disk.lock().unwrap().tamper(to.slot, |file| file[payload..payload + 512].fill(0));
    let mut again = World::on(&disk, 2);
    assert_eq!(again.report.torn, 1);
    assert!(again.load(0));
    again.check();
}

#[test]
fn a_record_beyond_what_recovery_proves_is_written_again_when_it_is_put() {
    let disk = Disk::new(SEGMENT);
    let mut world = World::on(&disk, 1);
    world.save(0, true);
    let Found::Segment { id, first_sequence, entries, .. } = World::on(&disk, 2).found.remove(0).1 else {
        panic!("a segment")
    };
    let mut other = World::on(&Disk::new(SEGMENT), 3);
    other.store.adopt(0, 0, Some(Life { id, first_sequence, entries: &entries, proved: false }));
    assert!(other.store.contains(&key(0)));
    other.save(0, true);
    assert!(other.load(0));
    other.check();
}

#[test]
fn a_copy_that_nobody_vouches_for_counts_until_the_next_one_is_durable() {
    let disk = Disk::new(SEGMENT);
    let mut first = World::on(&disk, 1);
    first.save(0, true);
    first.store.close();
    first.drive();
    let mut world = World::on(&disk, 2);
    let old = world.store.index.get(&key(0)).unwrap().slot;
    world.store.shelves[0].segments[old as usize].proved = false;
    world.save(0, false);
    world.store.evict(0, None, |_, _| false);
    disk.lock().unwrap().broken = Some((What::Write, 5));
    world.save(2, false);
    disk.lock().unwrap().broken = None;
    world.save(3, true);
    world.check();
    assert!(world.load(0));
    disk.lock().unwrap().crash(Crash::LoseAll);
    assert!(World::on(&disk, 3).load(0));
}

/// Two whole copies of record 0, the second in the segment that a crash left open.
fn copied_twice(disk: &Arc<Mutex<Disk>>, seed: u64, is_synced: bool) -> [super::Location; 2] {
    let mut world = World::on(disk, seed);
    world.save(0, true);
    world.store.close();
    world.drive();
    let old = world.store.index.get(&key(0)).unwrap();
    world.save(1, false);
    if is_synced {
        world.store.shelves[0].segments[old.slot as usize].proved = false;
        world.save(0, true);
        return [old, world.store.index.get(&key(0)).unwrap()];
    }
    disk.lock().unwrap().broken = Some((What::Sync, 5));
    world.store.evict(0, Some(old.slot), |_, _| true);
    world.drive();
    assert!(world.store.counters().relocated > 0, "a second copy was written");
    disk.lock().unwrap().broken = None;
    [old, old]
}

/// What a failed sync leaves is read like any other record until the power goes.
#[test]
fn a_second_copy_whose_sync_failed_does_not_hide_the_durable_one() {
    for seed in 0..32 {
        let disk = Disk::new(SEGMENT);
        copied_twice(&disk, seed, false);
        // Twice: what the first one seals, the second one believes.
        for restart in 0..2 {
            let mut again = World::on(&disk, seed + 100 + restart);
            assert!(again.load(0));
            again.check();
        }
        disk.lock().unwrap().crash(Crash::LoseAll);
        let mut last = World::on(&disk, seed + 200);
        assert!(last.load(0), "seed {seed}");
        last.check();
    }
}

#[test]
fn where_one_copy_is_damaged_the_other_one_is_read() {
    for (first, second) in [(0, 1), (1, 0)] {
        let disk = Disk::new(SEGMENT);
        let copies = copied_twice(&disk, 1, true);
        assert_ne!(copies[0], copies[1]);
        // Sealed, so that recovery does not look at payloads.
        drop(World::on(&disk, 2));
        let flip = |copy: usize| {
            let at = copies[copy].position as usize + SECTOR + 7;
            disk.lock().unwrap().tamper(copies[copy].slot, |file| file[at] ^= 1);
        };
        flip(first);
        let mut world = World::on(&disk, 3);
        assert!(world.load(0), "copy {first} is damaged");
        assert!(world.load(0), "and again");
        world.check();
        flip(second);
        let mut world = World::on(&disk, 4);
        assert!(!world.load(0), "both are damaged");
        assert!(!world.store.contains(&key(0)));
        world.check();
    }
}

#[test]
fn where_one_copy_cannot_be_read_the_other_one_is() {
    let disk = Disk::new(SEGMENT);
    copied_twice(&disk, 1, true);
    drop(World::on(&disk, 2));
    let mut world = World::on(&disk, 3);
    let operations = disk.lock().unwrap().operations;
    disk.lock().unwrap().fault = Some((operations, Fault::Errno(5)));
    assert!(world.load(0));
    assert_eq!(world.store.counters().io_errors, 1);
    world.check();
}

#[test]
fn what_has_a_second_copy_is_not_written_again_when_its_segment_goes() {
    let disk = Disk::new(SEGMENT);
    let [old, new] = copied_twice(&disk, 1, true);
    let mut world = World::on(&disk, 2);
    assert_eq!(world.store.index.get(&key(0)), Some(old), "the earlier one counts");
    world.store.evict(0, Some(old.slot), |_, _| true);
    world.drive();
    assert_eq!(world.store.index.get(&key(0)), Some(new));
    assert_eq!(world.store.counters().relocated, 0);
    assert!(world.load(0));
    world.check();
    // Neither does one whose segment has gone come back.
    let mut world = World::on(&disk, 3);
    world.store.evict(0, Some(new.slot), |_, _| false);
    world.drive();
    world.check();
}
