//! What goes to the SSD, what comes back from it, and who waits for what.

use super::*;
use crate::event::{TIER_HOST, TIER_SSD};

const MS: u64 = 1_000_000;

pub(super) fn limits(mode: CacheMode) -> SsdLimits {
    SsdLimits {
        mode,
        wait_ns: 200 * MS,
        ahead_ns: 1000 * MS,
        records_max: 100,
        offers_max: 64,
        puts_max: 4,
        put_bytes_max: 4 * RECORD,
        gets_max: 4,
        get_bytes_max: 4 * RECORD,
    }
}

fn rig(pool_records: u64) -> Rig {
    Rig::with(pool_records, Some(limits(CacheMode::WriteBack)))
}

impl Rig {
    fn tiers(&self, engine: &Engine, n: u32) -> u8 {
        let tenant = tenant(1);
        let index = IndexKey::new(tenant.key.index_seed(), &engine.space.0, &hash(n));
        self.present.get(&(tenant.name, index)).copied().unwrap_or(0)
    }

    fn saved(&mut self, engine: &Engine, parent: Option<u32>, blocks: std::ops::Range<u32>) {
        self.save(engine, parent, blocks);
        self.copied();
    }

    fn restarted(&self, pool_records: u64) -> Rig {
        let mut next = rig(pool_records);
        next.disk = self.disk.clone();
        next.apply(Event::SsdFound { records: self.disk.values().cloned().collect() });
        next
    }

    fn answer(&self, request: u64) -> Option<u32> {
        self.leased.get(&request).map(|(_, blocks)| *blocks)
    }
}

#[test]
fn what_is_published_is_written_behind_it_once_and_is_pinned_meanwhile() {
    let mut rig = rig(16);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.save(&engine, None, 0..6);
    assert!(rig.puts.is_empty(), "nothing is written before it is proved");
    rig.copied();
    assert_eq!(rig.last().1, Outcome::Done, "acknowledged before it is written");
    assert_eq!(rig.puts.len(), 4, "so many at a time");
    assert_eq!(rig.puts[0].record.hash, hash(0), "parents first");
    assert_eq!(rig.core.counters().pinned_bytes, 4 * RECORD);
    assert_eq!(rig.tiers(&engine, 0), TIER_HOST);
    rig.put_all();
    assert_eq!((rig.disk.len(), rig.core.counters().pinned_bytes), (6, 0));
    assert!((0..6).all(|n| rig.tiers(&engine, n) == TIER_HOST | TIER_SSD));
    rig.save(&engine, None, 0..6);
    assert_eq!(rig.last(), (rig.last().0, Outcome::Done, true, 0), "stored already");
    assert!(rig.puts.is_empty(), "and written already");
}

#[test]
fn what_leaves_the_pool_is_still_found_and_comes_back_with_its_checksum() {
    let mut rig = rig(8);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..4);
    rig.put_all();
    rig.saved(&engine, None, 10..18);
    rig.put_all();
    assert!((0..4).all(|n| rig.tiers(&engine, n) == TIER_SSD), "evicted from the pool");
    let request = rig.ask(&engine, 0..4);
    assert_eq!((rig.gets.len(), rig.answer(request)), (4, None), "it waits");
    let again = rig.ask(&engine, 0..6);
    assert_eq!(rig.gets.len(), 4, "nobody reads a record twice");
    rig.get_all();
    assert_eq!((rig.answer(request), rig.answer(again)), (Some(4), Some(4)));
    let load = rig.load(&engine, rig.leased[&request].0, 0, 0..4);
    for (item, n) in rig.copies[0].3.iter().zip(0..) {
        let key = BlockKey::new(&tenant(1).key, engine.space, 0, &hash(n));
        assert_eq!(item.checksum, rig.disk[&key.bytes()].checksum);
    }
    rig.copied();
    assert_eq!(rig.last(), (load, Outcome::Done, true, 4));
    assert!((0..4).all(|n| rig.tiers(&engine, n) == TIER_HOST | TIER_SSD));
}

#[test]
fn a_block_that_is_on_the_ssd_only_is_not_stored_again() {
    let mut rig = rig(4);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..4);
    rig.put_all();
    rig.saved(&engine, None, 10..14);
    rig.put_all();
    let save = rig.save(&engine, None, 0..4);
    assert_eq!(rig.last(), (save, Outcome::Done, true, 0));
    assert_eq!(rig.core.counters().blocks_deduplicated, 4);
}

#[test]
fn after_a_restart_records_are_found_by_their_tenant_only() {
    let mut rig = rig(8);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..4);
    rig.put_all();
    let mut next = rig.restarted(8);
    assert_eq!((next.present.len(), next.core.counters().ssd_records_hidden), (0, 4));
    let stranger = next.engine("s", &tenant(2), "m");
    assert!(next.present.is_empty());
    assert_eq!(next.lease(&stranger, 0..4).1, 0);
    let engine = next.engine("e", &tenant(1), "m");
    assert!((0..4).all(|n| next.tiers(&engine, n) == TIER_SSD));
    assert_eq!(next.core.counters().ssd_records_hidden, 0);
    let request = next.ask(&engine, 0..6);
    next.get_all();
    assert_eq!(next.answer(request), Some(4));
    let load = next.load(&engine, next.leased[&request].0, 0, 0..4);
    next.copied();
    assert_eq!(next.last(), (load, Outcome::Done, true, 4));
    let other = next.engine("o", &tenant(1), "another model");
    assert_eq!(next.lease(&other, 0..4).1, 0);
}

#[test]
fn records_of_another_cluster_secret_or_with_another_key_are_ignored() {
    let mut rig = rig(8);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..3);
    rig.put_all();
    let mut records: Vec<_> = rig.disk.values().cloned().collect();
    // Same tenant's name, another key; and a record whose header says another hash or namespace.
    records[0].hash = hash(9);
    records[1].space = NamespaceId([9; 16]);
    let mut next = self::rig(8);
    next.apply(Event::SsdFound { records: records.clone() });
    next.engine("e", &tenant(1), "m");
    assert_eq!((next.present.len(), next.core.counters().ssd_foreign), (1, 2));
    let mut other = self::rig(8);
    other.apply(Event::SsdFound { records });
    let renamed = Tenant { name: tenant(1).name, key: TenantKey::new([77; 32]) };
    other.engine("e", &renamed, "m");
    assert_eq!((other.present.len(), other.core.counters().ssd_foreign), (0, 3));
}

#[test]
fn a_record_of_another_format_or_length_is_not_loaded() {
    let mut rig = rig(8);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..1);
    rig.put_all();
    for change in [
        |record: &mut SsdRecord| record.format = "other".into(),
        |record: &mut SsdRecord| record.bytes = 4096,
    ] {
        let mut changed = rig.disk.clone();
        changed.values_mut().for_each(change);
        let mut next = self::rig(8);
        next.disk = changed.clone();
        next.apply(Event::SsdFound { records: changed.into_values().collect() });
        let engine = next.engine("e", &tenant(1), "m");
        let request = next.ask(&engine, 0..1);
        next.get_all();
        let load = next.load(&engine, next.leased[&request].0, 0, 0..1);
        assert_eq!(next.last(), (load, Outcome::Failed, true, 0));
        assert!(next.copies.is_empty());
    }
}

#[test]
fn a_slow_disk_makes_leases_shorter_and_what_it_brings_is_there_for_the_next() {
    let mut rig = rig(8);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..6);
    rig.put_all();
    let mut next = rig.restarted(8);
    let engine = next.engine("e", &tenant(1), "m");
    let request = next.ask(&engine, 0..6);
    next.get(None);
    next.get(None);
    next.now += 200 * MS - 1;
    next.apply(Event::Tick);
    assert_eq!(next.answer(request), None);
    next.now += 1;
    next.apply(Event::Tick);
    assert_eq!(next.answer(request), Some(2), "what is there");
    assert_eq!((next.core.counters().leases_cut_short, next.gets.len()), (1, 4), "reads go on");
    next.now += 29 * SECOND;
    next.apply(Event::Tick);
    assert_eq!(next.core.counters().leases, 1, "its time counts from the grant");
    next.get_all();
    let again = next.ask(&engine, 0..6);
    assert_eq!((next.answer(again), next.gets.len()), (Some(6), 0), "at once");
}

#[test]
fn nobody_waits_for_a_disk_that_hangs_but_the_first() {
    let mut rig = rig(8);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..4);
    rig.put_all();
    let mut next = rig.restarted(8);
    let engine = next.engine("e", &tenant(1), "m");
    let first = next.ask(&engine, 0..4);
    next.now += 201 * MS;
    next.apply(Event::Tick);
    assert_eq!(next.answer(first), Some(0));
    let second = next.ask(&engine, 0..4);
    assert_eq!(next.answer(second), Some(0), "at once");
    // It comes back: what it was asked for is there, and it is waited for again.
    next.now += 200 * MS;
    next.get(None);
    let third = next.ask(&engine, 0..4);
    assert_eq!(next.answer(third), None);
    next.get_all();
    assert_eq!(next.answer(third), Some(4));
}

#[test]
fn a_damaged_or_lost_record_ends_the_prefix_and_is_saved_anew() {
    for ending in [GetEnding::Corrupt, GetEnding::Gone] {
        let mut rig = rig(8);
        let engine = rig.engine("e", &tenant(1), "m");
        rig.saved(&engine, None, 0..4);
        rig.put_all();
        let mut next = rig.restarted(8);
        let engine = next.engine("e", &tenant(1), "m");
        let request = next.ask(&engine, 0..4);
        next.get(None);
        next.get(Some(ending));
        assert_eq!(next.answer(request), Some(1), "nothing behind the gap is waited for");
        assert_eq!(next.tiers(&engine, 1), 0);
        next.get_all();
        assert_eq!(next.core.counters().ssd_corrupt, u64::from(ending == GetEnding::Corrupt));
        next.saved(&engine, Some(0), 1..2);
        assert_eq!(next.last().3, 1);
        assert_eq!(next.lease(&engine, 0..4).1, 4);
    }
}

#[test]
fn what_the_ssd_drops_is_gone_unless_it_is_in_the_pool() {
    let mut rig = rig(4);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..2);
    rig.put_all();
    rig.saved(&engine, None, 10..13);
    rig.put_all();
    assert_eq!((rig.tiers(&engine, 0), rig.tiers(&engine, 1)), (TIER_HOST | TIER_SSD, TIER_SSD));
    for n in 0..2 {
        let key = BlockKey::new(&tenant(1).key, engine.space, 0, &hash(n)).bytes();
        rig.apply(Event::SsdDropped { key });
    }
    assert_eq!((rig.tiers(&engine, 0), rig.tiers(&engine, 1)), (TIER_HOST, 0));
    assert_eq!(rig.lease(&engine, 0..2).1, 1);
}

#[test]
fn each_run_of_a_lease_is_cut_off_by_itself() {
    let mut rig = rig(16);
    let engine = rig.engine("e", &tenant(1), "m");
    // Another group of the same engine.
    let states = rig.engine("e", &tenant(1), "states");
    rig.saved(&engine, None, 0..3);
    rig.saved(&states, None, 0..3);
    rig.put_all();
    let mut next = rig.restarted(16);
    let engine = next.engine("e", &tenant(1), "m");
    let states = next.engine("e", &tenant(1), "states");
    next.jobs += 1;
    let request = next.jobs;
    let runs = [&engine, &states, &engine].map(|group| LeaseRun { space: group.space, count: 3 }).to_vec();
    let hashes = [0, 1, 2, 0, 1, 2, 0, 9, 2].map(hash).to_vec();
    next.apply(Event::Lease { session: engine.scheduler, request, runs, hashes });
    assert_eq!(next.gets.len(), 4, "of both groups, as far as reading is bounded");
    next.get(None);
    next.get(Some(GetEnding::Corrupt));
    next.get_all();
    // The second block of the first group is lost; the third run ends where nobody has anything.
    assert_eq!((next.answer(request), &next.runs), (Some(5), &vec![1, 3, 1]));
    let lease = next.leased[&request].0;
    next.apply(Event::Release { session: engine.scheduler, lease });
    assert_eq!(next.core.counters().pinned_bytes, 0);
}

#[test]
fn a_scheduler_that_dies_is_not_answered_and_leaves_no_pins() {
    let mut rig = rig(8);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..4);
    rig.put_all();
    let mut next = rig.restarted(8);
    let engine = next.engine("e", &tenant(1), "m");
    let request = next.ask(&engine, 0..4);
    next.get(None);
    assert_eq!(next.core.counters().pinned_bytes, RECORD);
    next.apply(Event::Detached { session: engine.scheduler });
    next.get_all();
    assert_eq!((next.answer(request), next.core.counters().pinned_bytes), (None, 0));
    assert_eq!(next.ended, [engine.scheduler]);
}

#[test]
fn reading_is_bounded_and_the_rest_follows() {
    let mut rig = rig(16);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..10);
    rig.put_all();
    let mut next = rig.restarted(16);
    let engine = next.engine("e", &tenant(1), "m");
    let request = next.ask(&engine, 0..10);
    assert_eq!(next.gets.len(), 4);
    next.get(None);
    assert_eq!(next.gets.len(), 4);
    next.get(Some(GetEnding::Busy));
    assert_eq!(next.tiers(&engine, 1), TIER_SSD, "busy is no loss");
    next.get_all();
    assert_eq!(next.answer(request), Some(1));
}

#[test]
fn a_prompt_longer_than_the_pool_is_leased_as_far_as_it_fits() {
    let mut rig = rig(4);
    let engine = rig.engine("e", &tenant(1), "m");
    for start in [0u32, 4, 8] {
        // Without a parent: a full pool has no room for the children of what fills it.
        rig.saved(&engine, None, start..start + 4);
        rig.put_all();
    }
    let request = rig.ask(&engine, 0..12);
    rig.get_all();
    let (lease, blocks) = rig.leased[&request];
    assert_eq!(blocks, 4);
    rig.apply(Event::Release { session: engine.scheduler, lease });
    assert_eq!(rig.core.counters().pinned_bytes, 0);
}

#[test]
fn a_drain_flushes_what_is_to_be_written_and_answers_who_waits() {
    let mut rig = rig(8);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..6);
    rig.apply(Event::Drain);
    assert!(!rig.drained);
    rig.put_all();
    assert!(rig.drained && rig.disk.len() == 6);
    let mut next = rig.restarted(8);
    let engine = next.engine("e", &tenant(1), "m");
    let request = next.ask(&engine, 0..6);
    next.apply(Event::Drain);
    assert_eq!((next.answer(request), next.drained), (Some(0), false));
    next.get_all();
    assert!(next.drained);
}

#[test]
fn a_write_that_fails_costs_the_copy_only() {
    let mut rig = rig(4);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..2);
    rig.put(PutEnding::Failed);
    rig.put(PutEnding::Stored);
    assert_eq!(rig.last().1, Outcome::Done);
    assert_eq!((rig.tiers(&engine, 0), rig.tiers(&engine, 1)), (TIER_HOST, TIER_HOST | TIER_SSD));
    assert_eq!(rig.core.counters().ssd_writes_failed, 1);
    assert_eq!(rig.lease(&engine, 0..2).1, 2);
}

#[test]
fn write_through_acknowledges_what_is_on_stable_storage() {
    let mut rig = Rig::with(16, Some(limits(CacheMode::WriteThrough)));
    let engine = rig.engine("e", &tenant(1), "m");
    let save = rig.save(&engine, None, 0..6);
    rig.copied();
    assert!(rig.done.is_empty(), "not yet");
    assert!(rig.puts.iter().all(|put| put.durable));
    assert_eq!(rig.tiers(&engine, 0), TIER_HOST, "it can be found all the same");
    rig.put_all();
    assert_eq!(rig.last(), (save, Outcome::Done, true, 6));
    let failed = rig.save(&engine, Some(5), 6..8);
    rig.copied();
    rig.put(PutEnding::Stored);
    rig.put(PutEnding::Failed);
    assert_eq!(rig.last(), (failed, Outcome::Failed, true, 0));
    assert_eq!(rig.lease(&engine, 0..8).1, 8, "and is in the pool");
    let late = rig.save(&engine, Some(7), 8..9);
    rig.copied();
    rig.now += 31 * SECOND;
    rig.apply(Event::Tick);
    assert_eq!(rig.last(), (late, Outcome::Failed, false, 0), "a disk that hangs ends at the deadline");
    rig.put_all();
    assert_eq!(rig.last(), (late, Outcome::AlreadyReported, true, 0));
}

#[test]
fn write_around_lets_what_is_written_go_first() {
    let mut rig = Rig::with(8, Some(limits(CacheMode::WriteAround)));
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..4);
    let (lease, _) = rig.lease(&engine, 0..2);
    rig.apply(Event::Release { session: engine.scheduler, lease });
    rig.saved(&engine, None, 10..14);
    rig.put_all();
    let (lease, _) = rig.lease(&engine, 0..2);
    rig.apply(Event::Release { session: engine.scheduler, lease });
    rig.saved(&engine, None, 20..24);
    let in_pool = |n| rig.tiers(&engine, n) & TIER_HOST != 0;
    assert!((0..2).all(in_pool), "what was asked for again stays");
    assert!((10..14).filter(|n| in_pool(*n)).count() + usize::from(in_pool(2)) <= 2);
}

#[test]
fn read_only_reads_and_writes_nothing() {
    let mut rig = rig(8);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..2);
    rig.put_all();
    let mut next = Rig::with(8, Some(limits(CacheMode::ReadOnly)));
    next.disk = rig.disk.clone();
    next.apply(Event::SsdFound { records: rig.disk.values().cloned().collect() });
    let engine = next.engine("e", &tenant(1), "m");
    next.saved(&engine, Some(1), 2..4);
    assert!(next.puts.is_empty());
    let request = next.ask(&engine, 0..4);
    next.get_all();
    assert_eq!(next.answer(request), Some(4));
}

#[test]
fn what_may_be_known_is_bounded() {
    let mut rig = Rig::with(16, Some(SsdLimits { records_max: 3, ..limits(CacheMode::WriteBack) }));
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..5);
    rig.put_all();
    let on_ssd = (0..5).filter(|n| rig.tiers(&engine, *n) & TIER_SSD != 0).count();
    assert_eq!((on_ssd, rig.core.counters().ssd_records), (3, 3));
}

/// A sidecar that has six blocks on its SSD, has read others from it at a steady pace, and was asked for these.
fn ahead() -> (Rig, Engine, u64) {
    let mut rig = rig(16);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..6);
    rig.saved(&engine, None, 20..24);
    rig.put_all();
    let mut next = rig.restarted(16);
    let engine = next.engine("e", &tenant(1), "m");
    let first = next.ask(&engine, 20..24);
    while !next.gets.is_empty() {
        next.now += 5 * MS;
        next.get(None);
    }
    let (lease, _) = next.leased[&first];
    next.apply(Event::Release { session: engine.scheduler, lease });
    let before = next.core.counters().leases_ahead;
    let request = next.ask(&engine, 0..6);
    assert_eq!(next.core.counters().leases_ahead, before + 1);
    (next, engine, request)
}

#[test]
fn a_lease_covers_what_the_disk_will_have_brought_and_its_load_copies_what_has_come() {
    let (mut rig, engine, request) = ahead();
    assert_eq!((rig.answer(request), rig.gets.len()), (Some(6), 4), "granted while it is read");
    assert_eq!(rig.core.counters().pinned_bytes, 6 * RECORD);
    let load = rig.load(&engine, rig.leased[&request].0, 0, 0..6);
    assert!(rig.copies.is_empty(), "nothing has come");
    rig.get(None);
    rig.get(None);
    assert_eq!(rig.copies.len(), 1, "one piece at a time");
    rig.copied();
    assert_eq!(rig.copies[0].3.len(), 1);
    assert_eq!(rig.copies[0].3[0].checksum, rig.disk[&key_of(&engine, 1)].checksum);
    rig.get_all();
    rig.copied();
    assert_eq!((rig.copies[0].3.len(), rig.done.len()), (4, 0));
    rig.copied();
    assert_eq!(rig.done.len(), 1);
    assert_eq!(rig.last(), (load, Outcome::Done, true, 6));
    assert!((0..6).all(|n| rig.tiers(&engine, n) == TIER_HOST | TIER_SSD));
}

fn key_of(engine: &Engine, n: u32) -> [u8; 32] {
    BlockKey::new(&tenant(1).key, engine.space, 0, &hash(n)).bytes()
}

#[test]
fn a_read_that_fails_under_a_load_fails_it_and_leaves_nothing_behind() {
    for ending in [GetEnding::Corrupt, GetEnding::Gone, GetEnding::Busy] {
        let (mut rig, engine, request) = ahead();
        let lease = rig.leased[&request].0;
        let load = rig.load(&engine, lease, 0, 0..6);
        rig.get(None);
        rig.get(Some(ending));
        assert!(rig.done.is_empty(), "its first block is being copied");
        rig.copied();
        assert_eq!(rig.last(), (load, Outcome::Failed, true, 0));
        let again = rig.load(&engine, lease, 0, 0..6);
        assert_eq!(rig.last(), (again, Outcome::Failed, true, 0), "the lease has lost one");
        rig.get_all();
        assert_eq!(rig.done.len(), 2);
        rig.apply(Event::Release { session: engine.scheduler, lease });
        let counters = rig.core.counters();
        assert_eq!((counters.pinned_bytes, counters.records, counters.jobs), (0, 4 + 5, 0));
    }
}

#[test]
fn a_load_whose_disk_hangs_fails_before_its_deadline() {
    let (mut rig, engine, request) = ahead();
    let load = rig.load(&engine, rig.leased[&request].0, 0, 0..6);
    rig.now += 1000 * MS;
    rig.apply(Event::Tick);
    assert!(rig.done.is_empty());
    rig.now += 1;
    rig.apply(Event::Tick);
    assert_eq!(rig.last(), (load, Outcome::Failed, true, 0), "at once: nothing of it is being copied");
    let request = rig.ask(&engine, 0..6);
    assert_eq!(rig.answer(request), Some(0), "and nobody is promised what hangs");
}

#[test]
fn a_load_that_waits_for_the_disk_is_given_up_at_once() {
    let give_up: [fn(&mut Rig, &Engine, JobId); 4] = [
        |rig, engine, job| rig.apply(Event::Cancel { session: engine.worker, job }),
        |rig, engine, _| rig.apply(Event::Unregister { session: engine.worker, request: 1 }),
        |rig, engine, _| rig.apply(Event::Detached { session: engine.worker }),
        |rig, _, _| {
            rig.now += 2 * SECOND;
            rig.apply(Event::Tick);
        },
    ];
    for (case, give_up) in give_up.into_iter().enumerate() {
        let (mut rig, engine, request) = ahead();
        let lease = rig.leased[&request].0;
        let load = rig.load(&engine, lease, 0, 0..6);
        give_up(&mut rig, &engine, load);
        let outcomes: Vec<_> =
            rig.done.iter().map(|(_, _, outcome, quiesced, _)| (*outcome, *quiesced)).collect();
        let expected = match case {
            0 | 1 => vec![(Outcome::Cancelled, true)],
            2 => vec![],
            _ => vec![(Outcome::Failed, false), (Outcome::AlreadyReported, true)],
        };
        assert_eq!(outcomes, expected, "{case}");
        assert_eq!(
            (rig.unregistered.len(), rig.ended.len()),
            (usize::from(case == 1), usize::from(case == 2))
        );
        rig.get_all();
        assert!(rig.copies.is_empty(), "nothing is copied any more");
        rig.apply(Event::Release { session: engine.scheduler, lease });
        assert_eq!((rig.core.counters().pinned_bytes, rig.core.counters().jobs), (0, 0));
    }
}

/// Groups of the new memory may have other lengths: with them, what lies behind a record would be copied with it.
#[test]
fn what_a_load_still_waits_for_is_not_copied_into_memory_that_was_presented_since() {
    for ended in [false, true] {
        let (mut rig, engine, request) = ahead();
        let load = rig.load(&engine, rig.leased[&request].0, 0, 0..6);
        rig.get(None);
        assert_eq!(rig.copies.len(), 1, "its first block is being copied");
        if ended {
            rig.copied();
        }
        let longer = Registration { num_blocks: 64, groups: vec![group("m", 4 * RECORD)], cache_mode: None };
        rig.apply(Event::Registered { session: engine.worker, registration: longer });
        rig.get_all();
        assert_eq!(rig.copies.len(), usize::from(!ended), "nothing more is copied");
        if !ended {
            rig.copied();
        }
        assert_eq!(rig.last(), (load, Outcome::Cancelled, true, 0));
        assert_eq!(rig.core.counters().jobs, 0);
    }
}

#[test]
fn a_slow_disk_is_promised_for_no_further_than_it_reaches() {
    let mut rig = rig(16);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.saved(&engine, None, 0..10);
    rig.put_all();
    let mut next = rig.restarted(16);
    let engine = next.engine("e", &tenant(1), "m");
    let request = next.ask(&engine, 0..10);
    next.now += 199 * MS;
    next.get(None);
    assert_eq!(next.answer(request), None, "ten would take two seconds");
    next.now += MS;
    next.apply(Event::Tick);
    assert_eq!(next.answer(request), Some(1 + 5), "what is here, and a second of it");
    assert_eq!(next.core.counters().leases_cut_short, 1);
    let (lease, _) = next.leased[&request];
    next.apply(Event::Release { session: engine.scheduler, lease });
    next.get_all();
    assert_eq!(next.core.counters().records, 5, "what had not begun is not read");
    assert_eq!(next.core.counters().pinned_bytes, 0);
}

#[test]
fn each_engine_may_have_a_cache_mode_of_its_own() {
    let mut rig = rig(16);
    let modes = [None, Some(CacheMode::WriteThrough), Some(CacheMode::ReadOnly), Some(CacheMode::WriteBack)];
    let engines: Vec<Engine> = modes
        .into_iter()
        .enumerate()
        .map(|(n, cache_mode)| {
            let engine = rig.engine(&format!("e{n}"), &tenant(1), &format!("m{n}"));
            let registration = Registration { cache_mode, ..registration(&format!("m{n}")) };
            rig.apply(Event::Registered { session: engine.worker, registration });
            engine
        })
        .collect();
    let mut saved = |n: usize| {
        let (done, puts) = (rig.done.len(), rig.puts.len());
        rig.save(&engines[n], None, 0..2);
        rig.copied();
        let durable = rig.puts.iter().skip(puts).filter(|put| put.durable).count();
        let seen = (rig.done.len() > done, rig.puts.len() - puts, durable);
        rig.put_all();
        assert_eq!(rig.last().1, Outcome::Done);
        seen
    };
    assert_eq!(saved(0), (true, 2, 0), "as the sidecar is configured");
    assert_eq!(saved(1), (false, 2, 2), "acknowledged when it is on stable storage");
    assert_eq!(saved(2), (true, 0, 0), "nothing is written");
    assert_eq!(saved(3), (true, 2, 0));
    let mut rig = Rig::with(8, Some(limits(CacheMode::ReadOnly)));
    let engine = rig.engine("e", &tenant(1), "m");
    let registration = Registration { cache_mode: Some(CacheMode::WriteThrough), ..registration("m") };
    rig.apply(Event::Registered { session: engine.worker, registration });
    rig.saved(&engine, None, 0..2);
    assert!(rig.puts.is_empty(), "a disk that is only read stays that, whoever asks");
}
