//! The order in which records go.

use proptest::prelude::*;

use super::*;
use crate::{ids::NamespaceId, key::TenantKey};

const RECORD: u64 = 512 << 10;

fn key(name: u32) -> BlockKey {
    let mut hash = [0; 32];
    hash[..4].copy_from_slice(&name.to_le_bytes());
    BlockKey::new(&TenantKey::new([1; 32]), NamespaceId([1; 16]), 0, &hash)
}

/// Writes a record; the names of what had to go for it, `None` if there was no room.
fn write(store: &mut Store, name: u32, parent: Option<u32>) -> Option<Vec<BlockKey>> {
    let new = NewRecord {
        key: key(name),
        index: IndexKey::new(0, &[1; 16], &[name as u8; 32]),
        space: NamespaceId([1; 16]),
        hash: [name as u8; 32],
        tenant: "t".into(),
        format: "f".into(),
        bytes: RECORD,
        parent: parent.map(key),
    };
    let mut evicted = Vec::new();
    let id = store.insert(new, State::Writing, &mut evicted);
    if let Some(id) = id {
        store.publish(id, 0);
    }
    store.check();
    id.map(|_| evicted.iter().map(|record| record.key).collect())
}

/// As a lease does, which ends at once.
fn hit(store: &mut Store, name: u32) {
    let id = store.find(&key(name)).unwrap();
    store.touch(id);
    store.pin(id);
    store.unpin(id);
    store.check();
}

#[test]
fn a_hit_buys_the_time_of_one_turn_of_the_pool_and_a_write_buys_none() {
    let mut store = Store::new(4 * RECORD, false);
    // In records: 0 is touched at 1 and 2, so due at 2 + 4; 1 to 5 are due at 3 to 7.
    write(&mut store, 0, None);
    hit(&mut store, 0);
    for name in 1..=3 {
        assert_eq!(write(&mut store, name, None), Some(vec![]));
    }
    assert_eq!(write(&mut store, 4, None), Some(vec![key(1)]));
    assert_eq!(write(&mut store, 5, None), Some(vec![key(2)]));
    assert_eq!(write(&mut store, 6, None), Some(vec![key(3)]));
    // Equals: 4 is due at 6, too, but was touched later.
    assert_eq!(write(&mut store, 7, None), Some(vec![key(0)]));
    assert_eq!(write(&mut store, 8, None), Some(vec![key(4)]));
}

#[test]
fn only_hits_are_uses_and_each_doubling_buys_the_same() {
    let mut store = Store::new(4 * RECORD, false);
    write(&mut store, 0, None);
    // Looked up by a save that brings it once more, pinned, the parent of a child that goes: no uses.
    let id = store.find(&key(0)).unwrap();
    store.pin(id);
    store.unpin(id);
    write(&mut store, 1, Some(0));
    assert_eq!(store.get(id).unwrap().uses, 0);
    let turn = store.pool_kib;
    let mut bought = Vec::new();
    for _ in 0..3 {
        hit(&mut store, 0);
        let due = store.get(id).unwrap().due;
        bought.push(due.at - due.touched);
    }
    assert_eq!(store.get(id).unwrap().uses, 3);
    assert_eq!((bought[0], bought[2]), (turn, 2 * turn));
    assert!(turn < bought[1] && bought[1] < 2 * turn, "{bought:?}");
}

#[test]
fn without_hits_it_is_lru_over_leaves() {
    let mut store = Store::new(4 * RECORD, false);
    write(&mut store, 0, None);
    write(&mut store, 1, Some(0));
    write(&mut store, 2, None);
    write(&mut store, 3, None);
    // 0 is the oldest, but has a child.
    assert_eq!(write(&mut store, 4, None), Some(vec![key(1)]));
    assert_eq!(write(&mut store, 5, None), Some(vec![key(0)]));
    assert_eq!(write(&mut store, 6, None), Some(vec![key(2)]));
}

#[test]
fn records_of_another_size_pay_by_their_bytes() {
    let mut store = Store::new(4 * RECORD, false);
    write(&mut store, 0, None);
    let id = store.find(&key(0)).unwrap();
    let before = store.clock;
    hit(&mut store, 0);
    assert_eq!(store.clock - before, RECORD >> 10);
    assert_eq!(store.get(id).unwrap().due.at, store.clock + store.pool_kib);
}

proptest! {
    /// Against the plainest form of the policy. Blocks are nodes of a binary tree: the parent of n is n / 2.
    #[test]
    fn what_goes_is_the_first_due_of_the_leaves_and_no_child_outlives_its_parent(
        steps in proptest::collection::vec((any::<bool>(), 1u32..40), 1..300),
    ) {
        const RECORDS: usize = 8;
        let mut store = Store::new(RECORDS as u64 * RECORD, false);
        // Name → when it is due and when it was touched, in KiB; uses.
        let mut oracle: HashMap<u32, (u64, u64, u32)> = HashMap::new();
        let (record, pool) = (RECORD >> 10, (RECORDS as u64 * RECORD) >> 10);
        let mut clock = 0;
        for (is_hit, name) in steps {
            let parent = (name > 1).then_some(name / 2);
            if oracle.contains_key(&name) {
                if is_hit {
                    clock += record;
                    let uses = oracle[&name].2 + 1;
                    let bought = pool as f64 * (f64::from(uses) + 1.0).log2();
                    oracle.insert(name, (clock + bought as u64, clock, uses));
                    hit(&mut store, name);
                }
                continue;
            }
            if parent.is_some_and(|parent| !oracle.contains_key(&parent)) {
                continue;
            }
            let mut expected = Vec::new();
            if oracle.len() == RECORDS {
                let leaf = |candidate: u32| {
                    Some(candidate) != parent && oracle.keys().all(|child| child / 2 != candidate)
                };
                let leaves = oracle.iter().filter(|(candidate, _)| leaf(**candidate));
                let first = leaves.min_by_key(|(_, due)| **due).map(|(first, _)| *first);
                if let Some(first) = first {
                    oracle.remove(&first);
                    expected.push(key(first));
                }
            }
            let written = write(&mut store, name, parent);
            if oracle.len() < RECORDS {
                clock += record;
                oracle.insert(name, (clock, clock, 0));
                prop_assert_eq!(written, Some(expected));
            } else {
                prop_assert_eq!(written, None);
            }
            for name in oracle.keys().filter(|name| **name > 1) {
                prop_assert!(store.find(&key(name / 2)).is_some(), "{} without its parent", name);
            }
            prop_assert_eq!(store.len(), oracle.len());
            for (name, (_, _, uses)) in &oracle {
                let id = store.find(&key(*name)).unwrap();
                prop_assert_eq!(store.get(id).unwrap().uses, *uses);
            }
        }
    }
}
