//! Engines with several KV cache groups: one lease and one job for all of them.

use super::*;

/// Records of the second group: another size, as state pages have.
const STATE: u64 = 128 << 10;

/// An engine whose first group is "m" and whose second "states".
fn hybrid(rig: &mut Rig, name: &str) -> (Engine, NamespaceId) {
    let engine = rig.engine(name, &tenant(1), "m");
    let groups = vec![group("m", RECORD), group("states", STATE)];
    rig.apply(Event::Registered {
        session: engine.worker,
        registration: Registration { num_blocks: 64, groups, cache_mode: None },
    });
    let states = namespace("states");
    let space = states.id(&tenant(1), b"");
    let open =
        Event::OpenNamespace { session: engine.scheduler, request: 1, namespace: states, epoch: Vec::new() };
    rig.apply(open);
    (engine, space)
}

fn job(rig: &mut Rig) -> JobId {
    rig.jobs += 1;
    JobId(u128::from(rig.jobs).to_le_bytes())
}

/// Blocks 0 to 3 of the first group and the state after block 3, in one job.
fn save_both(rig: &mut Rig, engine: &Engine, states: NamespaceId) -> JobId {
    let id = job(rig);
    let runs = vec![
        SaveRun { space: engine.space, parent: None, count: 4 },
        SaveRun { space: states, parent: None, count: 1 },
    ];
    rig.apply(Event::Save {
        session: engine.worker,
        job: id,
        runs,
        hashes: [0, 1, 2, 3, 3].map(hash).to_vec(),
        blocks: vec![1, 2, 3, 4, 40],
        word: 0,
        tag: 1,
        deadline_ns: rig.now + SECOND,
        event: None,
    });
    id
}

fn lease_runs(rig: &mut Rig, engine: &Engine, runs: &[(NamespaceId, &[u32])]) -> (LeaseId, Vec<u32>) {
    rig.jobs += 1;
    let request = rig.jobs;
    let hashes = runs.iter().flat_map(|(_, hashes)| hashes.iter().copied().map(hash)).collect();
    let runs =
        runs.iter().map(|(space, hashes)| LeaseRun { space: *space, count: hashes.len() as u32 }).collect();
    rig.apply(Event::Lease { session: engine.scheduler, request, runs, hashes });
    (rig.leased[&request].0, rig.runs.clone())
}

fn load_runs(rig: &mut Rig, engine: &Engine, lease: LeaseId, runs: &[LoadRun], hashes: &[u32]) -> JobId {
    let id = job(rig);
    rig.apply(Event::Load {
        session: engine.worker,
        job: id,
        lease,
        runs: runs.to_vec(),
        hashes: hashes.iter().copied().map(hash).collect(),
        blocks: (10..).take(hashes.len()).collect(),
        deadline_ns: rig.now + SECOND,
        event: Some(3),
    });
    id
}

#[test]
fn one_job_carries_all_groups_each_with_its_own_records() {
    let mut rig = Rig::new(16);
    let (engine, states) = hybrid(&mut rig, "e");
    save_both(&mut rig, &engine, states);
    let items = &rig.copies[0].3;
    assert_eq!(items.iter().map(|item| item.group).collect::<Vec<_>>(), [0, 0, 0, 0, 1]);
    rig.copied();
    assert_eq!(rig.core.counters().record_bytes, 4 * RECORD + STATE);
    let (lease, granted) = lease_runs(&mut rig, &engine, &[(engine.space, &[0, 1, 2, 3]), (states, &[3])]);
    assert_eq!(granted, [4, 1]);
    let runs = [
        LoadRun { run: 0, first: 1, space: engine.space, count: 3 },
        LoadRun { run: 1, first: 0, space: states, count: 1 },
    ];
    let load = load_runs(&mut rig, &engine, lease, &runs, &[1, 2, 3, 3]);
    let groups: Vec<_> = rig.copies[0].3.iter().map(|item| (item.group, item.block)).collect();
    assert_eq!(groups, [(0, 10), (0, 11), (0, 12), (1, 13)]);
    rig.copied();
    assert_eq!(rig.last(), (load, Outcome::Done, true, 4));
    assert_eq!(rig.core.counters().bytes_loaded, 3 * RECORD + STATE);
}

#[test]
fn a_run_is_granted_up_to_its_first_missing_block_and_the_others_are_not_touched_by_that() {
    let mut rig = Rig::new(16);
    let (engine, states) = hybrid(&mut rig, "e");
    save_both(&mut rig, &engine, states);
    rig.copied();
    let asked: [(NamespaceId, &[u32]); 4] =
        [(states, &[2]), (engine.space, &[0, 1, 9, 3]), (states, &[3]), (engine.space, &[])];
    let (lease, granted) = lease_runs(&mut rig, &engine, &asked);
    assert_eq!(granted, [0, 2, 1, 0]);
    assert_ne!(lease, LeaseId([0; 16]));
    let load = |rig: &mut Rig, run, first, space, hashes: &[u32]| {
        let runs = [LoadRun { run, first, space, count: hashes.len() as u32 }];
        let id = load_runs(rig, &engine, lease, &runs, hashes);
        rig.done.iter().any(|done| done.1 == id)
    };
    assert!(!load(&mut rig, 1, 0, engine.space, &[0, 1]), "granted");
    assert!(!load(&mut rig, 2, 0, states, &[3]), "granted");
    for (run, first, space, hashes) in [
        (1, 1, engine.space, &[1, 9][..]),
        (2, 1, states, &[3]),
        (0, 0, states, &[2]),
        (3, 0, engine.space, &[0]),
        (4, 0, engine.space, &[0]),
        (u32::MAX, u32::MAX, engine.space, &[0]),
        // The record is leased, but in another namespace.
        (1, 0, states, &[0]),
        (2, 0, engine.space, &[3]),
        // The right place, another block's hash.
        (1, 0, engine.space, &[1]),
    ] {
        assert!(load(&mut rig, run, first, space, hashes), "run {run} from {first} of {hashes:?}");
        assert_eq!(rig.last().1, Outcome::Failed);
    }
}

#[test]
fn a_group_that_a_worker_has_not_registered_fails_the_whole_job() {
    let mut rig = Rig::new(16);
    let (engine, states) = hybrid(&mut rig, "e");
    save_both(&mut rig, &engine, states);
    rig.copied();
    let (lease, _) = lease_runs(&mut rig, &engine, &[(engine.space, &[0]), (states, &[3])]);
    rig.apply(Event::Registered { session: engine.worker, registration: registration("m") });
    let runs = [
        LoadRun { run: 0, first: 0, space: engine.space, count: 1 },
        LoadRun { run: 1, first: 0, space: states, count: 1 },
    ];
    load_runs(&mut rig, &engine, lease, &runs, &[0, 3]);
    assert_eq!(rig.last().1, Outcome::Failed);
    assert!(rig.copies.is_empty(), "nothing was copied");
    assert_eq!(rig.core.counters().identity_mismatches, 1);
}

#[test]
fn runs_that_do_not_count_their_hashes_are_a_protocol_error() {
    let mut rig = Rig::new(16);
    let (engine, _) = hybrid(&mut rig, "e");
    let run = |count| LeaseRun { space: engine.space, count };
    for runs in [vec![run(1)], vec![run(3)], vec![run(u32::MAX), run(3)], vec![], vec![run(0); MAX_RUNS + 1]]
    {
        let errors = rig.errors.len();
        let hashes = vec![hash(1), hash(2)];
        rig.apply(Event::Lease { session: engine.scheduler, request: 5, runs, hashes });
        assert_eq!(rig.errors.len(), errors + 1);
        assert_eq!(rig.leased[&5].1, 0);
    }
    let errors = rig.errors.len();
    for counts in [[1, 0], [2, 1], [u32::MAX, u32::MAX]] {
        let runs = counts.map(|count| SaveRun { space: engine.space, parent: None, count }).to_vec();
        let id = job(&mut rig);
        rig.apply(Event::Save {
            session: engine.worker,
            job: id,
            runs,
            hashes: vec![hash(1), hash(2)],
            blocks: vec![1, 2],
            word: 0,
            tag: 1,
            deadline_ns: SECOND,
            event: None,
        });
        assert_eq!(rig.last(), (id, Outcome::Failed, true, 0));
    }
    assert_eq!(rig.errors.len(), errors + 3);
}

#[test]
fn a_save_that_finds_no_room_in_one_group_keeps_what_was_stored_before() {
    // Room for two large records in two chunks, none for a small one beside them.
    let mut rig = Rig::new(8);
    let (engine, states) = hybrid(&mut rig, "e");
    let id = job(&mut rig);
    let runs = vec![
        SaveRun { space: engine.space, parent: None, count: 8 },
        SaveRun { space: states, parent: None, count: 2 },
    ];
    rig.apply(Event::Save {
        session: engine.worker,
        job: id,
        runs,
        hashes: (0..10).map(hash).collect(),
        blocks: (1..11).collect(),
        word: 0,
        tag: 1,
        deadline_ns: SECOND,
        event: None,
    });
    assert_eq!(rig.copies[0].3.len(), 8);
    assert_eq!(rig.core.counters().blocks_without_room, 2);
    rig.copied();
    assert_eq!(rig.last(), (id, Outcome::Done, true, 8));
}

#[test]
fn blocks_that_another_lease_pins_count_once() {
    let mut rig = Rig::new(4);
    rig.core.limits.pinned_bytes_max = 2 * RECORD;
    let engine = rig.engine("e", &tenant(1), "m");
    rig.save(&engine, None, 0..3);
    rig.copied();
    assert_eq!(rig.lease(&engine, 0..3).1, 2, "as much as may be pinned");
    assert_eq!(rig.lease(&engine, 0..2).1, 2, "the same bytes again");
}

/// Decision 008: what was found once stays for a pool's length longer than what was only written.
#[test]
fn being_written_is_no_use() {
    let mut rig = Rig::new(4);
    let engine = rig.engine("e", &tenant(1), "m");
    for block in [10, 20, 30, 40] {
        rig.save(&engine, None, block..block + 1);
        rig.copied();
    }
    let (lease, _) = rig.lease(&engine, [10].into_iter());
    rig.apply(Event::Release { session: engine.scheduler, lease });
    // Three newer ones: the three that nobody asked for go.
    for block in [50, 60, 70] {
        rig.save(&engine, None, block..block + 1);
        rig.copied();
    }
    for (block, there) in [(10, 1), (20, 0), (30, 0), (40, 0), (70, 1)] {
        assert_eq!(rig.lease(&engine, [block].into_iter()).1, there, "block {block}");
    }
}

/// Two ranks of one engine store halves; an engine whose only rank holds both heads loads both into one block.
#[test]
fn halves_that_two_ranks_stored_fill_the_blocks_of_one() {
    let mut rig = Rig::new(16);
    let writers = [rig.engine("first", &tenant(1), "half1"), rig.engine("second", &tenant(1), "half2")];
    let reader = rig.engine("reader", &tenant(1), "whole");
    let halves = ["half1", "half2"].map(|name| Group { load_only: true, ..group(name, RECORD) });
    let groups = [vec![group("whole", 2 * RECORD)], halves.to_vec()].concat();
    rig.apply(Event::Registered {
        session: reader.worker,
        registration: Registration { num_blocks: 64, groups, cache_mode: None },
    });
    for writer in &writers {
        rig.save(writer, None, 1..3);
        rig.copied();
    }
    let spaces = writers.each_ref().map(|writer| writer.space);
    let (lease, granted) = lease_runs(&mut rig, &reader, &[(spaces[0], &[1, 2]), (spaces[1], &[1, 2])]);
    assert_eq!(granted, [2, 2]);
    let runs = [0u32, 1].map(|run| LoadRun { run, first: 0, space: spaces[run as usize], count: 2 });
    let load = load_runs(&mut rig, &reader, lease, &runs, &[1, 2, 1, 2]);
    let groups: Vec<_> = rig.copies[0].3.iter().map(|item| item.group).collect();
    assert_eq!(groups, [1, 1, 2, 2]);
    rig.copied();
    assert_eq!(rig.last(), (load, Outcome::Done, true, 4));
    // Half of what this engine would save is another rank's: nothing is copied, and the session is told so.
    let id = job(&mut rig);
    let runs = vec![
        SaveRun { space: reader.space, parent: None, count: 1 },
        SaveRun { space: spaces[1], parent: None, count: 1 },
    ];
    rig.apply(Event::Save {
        session: reader.worker,
        job: id,
        runs,
        hashes: [8, 9].map(hash).to_vec(),
        blocks: vec![1, 2],
        word: 0,
        tag: 1,
        deadline_ns: rig.now + SECOND,
        event: None,
    });
    assert_eq!(rig.last(), (id, Outcome::Failed, true, 0));
    assert!(rig.copies.is_empty(), "nothing is copied of such a job");
    assert!(rig.errors.iter().any(|text| text.contains("holds whole")), "{:?}", rig.errors);
}
