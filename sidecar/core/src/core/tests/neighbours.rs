//! Sidecars of one node that borrow from each other, over a network that is a function call.

use std::collections::HashSet;

use super::*;
use crate::{ids::NeighbourId, neighbours::Lent};

/// Rig `n` is neighbour `n + 1` of the others, and their session `1000 + n` is its.
struct Node {
    rigs: Vec<Rig>,
    /// Whether the first borrows from the second.
    up: HashSet<(usize, usize)>,
    requests: u64,
    /// Answers are kept back while this is set.
    slow: bool,
}

fn session_of(rig: usize) -> SessionId {
    SessionId(1000 + rig as u64)
}

impl Node {
    fn new(count: usize, pool_records: u64) -> Self {
        Self::of((0..count).map(|_| Rig::new(pool_records)).collect())
    }

    fn of(rigs: Vec<Rig>) -> Self {
        let count = rigs.len();
        let mut node = Self { rigs, up: HashSet::new(), requests: 0, slow: false };
        for from in 0..count {
            for to in (0..count).filter(|to| *to != from) {
                node.come(from, to);
            }
        }
        node
    }

    fn come(&mut self, from: usize, to: usize) {
        if self.up.insert((from, to)) {
            self.rigs[to].apply(Event::Attached {
                session: session_of(from),
                role: Role::Neighbour,
                engine: "neighbour".into(),
                uid: 7,
                tenant: tenant(9),
            });
            let (neighbour, lease_ns) = (NeighbourId(to as u32 + 1), 30 * SECOND);
            self.rigs[from].apply(Event::NeighbourCame { neighbour, lease_ns });
        }
    }

    /// The connection by which the first borrows from the second breaks.
    fn go(&mut self, from: usize, to: usize) {
        if self.up.remove(&(from, to)) {
            self.rigs[to].apply(Event::Detached { session: session_of(from) });
            self.rigs[from].apply(Event::NeighbourWent { neighbour: NeighbourId(to as u32 + 1) });
            self.settle();
        }
    }

    /// Delivers everything.
    fn settle(&mut self) {
        while let Some(from) = self.rigs.iter().position(|rig| !rig.abroad.is_empty()) {
            if self.slow {
                return;
            }
            match self.rigs[from].abroad.remove(0) {
                Action::AskNeighbours { questions } => self.ask(from, &questions),
                Action::RenewAt { neighbour, lease } => {
                    let to = neighbour.0 as usize - 1;
                    self.rigs[to].apply(Event::Renew { session: session_of(from), lease });
                }
                Action::Return { neighbour, lease } => {
                    let to = neighbour.0 as usize - 1;
                    self.rigs[to].apply(Event::Release { session: session_of(from), lease });
                }
                Action::SayDamaged { neighbour, key, offset } => {
                    let to = neighbour.0 as usize - 1;
                    self.rigs[to].apply(Event::Damaged { session: session_of(from), key, offset });
                }
                other => panic!("nobody asked: {other:?}"),
            }
        }
    }

    fn ask(&mut self, from: usize, questions: &[crate::neighbours::Question]) {
        let mut nobody = Vec::new();
        for question in questions {
            let entry = (Arc::clone(&question.tenant), question.index);
            let has =
                |to: &usize| self.up.contains(&(from, *to)) && self.rigs[*to].present.contains_key(&entry);
            let Some(to) = (0..self.rigs.len()).find(has) else {
                nobody.push(question.key);
                continue;
            };
            self.requests += 1;
            let keys = vec![question.key];
            let borrow =
                Event::Borrow { session: session_of(from), request: self.requests, keys: keys.clone() };
            self.rigs[to].apply(borrow);
            let Some(Action::Lent { lease, records, .. }) = self.rigs[to].abroad.pop() else {
                panic!("no answer")
            };
            let lent = Some((NeighbourId(to as u32 + 1), lease, records));
            self.rigs[from].apply(Event::NeighbourAnswered { keys, lent });
        }
        self.rigs[from].apply(Event::NeighbourAnswered { keys: nobody, lent: None });
    }

    fn lease(&mut self, rig: usize, engine: &Engine, hashes: impl Iterator<Item = u32>) -> (LeaseId, u32) {
        let rig_of = &mut self.rigs[rig];
        rig_of.jobs += 1;
        let request = rig_of.jobs;
        let hashes: Vec<_> = hashes.map(hash).collect();
        let runs = vec![LeaseRun { space: engine.space, count: hashes.len() as u32 }];
        rig_of.apply(Event::Lease { session: engine.scheduler, request, runs, hashes });
        self.settle();
        self.rigs[rig].leased.get(&request).copied().unwrap_or((LeaseId([0; 16]), u32::MAX))
    }

    fn pass(&mut self, ns: u64) {
        for rig in 0..self.rigs.len() {
            self.rigs[rig].now += ns;
            self.rigs[rig].apply(Event::Tick);
            self.settle();
        }
    }
}

fn saved(node: &mut Node, rig: usize, blocks: std::ops::Range<u32>) -> Engine {
    let engine = node.rigs[rig].engine(&format!("e{rig}"), &tenant(1), "m");
    node.rigs[rig].save(&engine, None, blocks);
    node.rigs[rig].copied();
    engine
}

#[test]
fn what_a_neighbour_has_is_loaded_from_its_pool_and_stored_once() {
    let mut node = Node::new(2, 16);
    saved(&mut node, 0, 0..4);
    let engine = node.rigs[1].engine("other", &tenant(1), "m");
    let (lease, blocks) = node.lease(1, &engine, 0..6);
    assert_eq!(blocks, 4);
    node.rigs[1].load(&engine, lease, 0, 0..4);
    let items = node.rigs[1].copies[0].3.clone();
    assert!(items.iter().all(|item| item.pool == 1), "{items:?}");
    node.rigs[1].copied();
    assert_eq!(node.rigs[1].last().1, Outcome::Done);
    let (own, other) = (node.rigs[0].core.counters(), node.rigs[1].core.counters());
    assert_eq!((own.records, other.records, other.record_bytes), (4, 0, 0), "one copy");
    assert_eq!((own.pinned_bytes, other.pinned_bytes), (4 * RECORD, 0), "pinned where it lies");
    node.rigs[1].apply(Event::Release { session: engine.scheduler, lease });
    node.settle();
    assert_eq!(node.rigs[0].core.counters().pinned_bytes, 0);
    assert_eq!(node.rigs[1].core.counters().borrows, 0);
}

#[test]
fn a_prefix_may_lie_here_and_there() {
    let mut node = Node::new(3, 16);
    let engine = saved(&mut node, 0, 0..2);
    saved(&mut node, 1, 2..4);
    saved(&mut node, 2, 4..6);
    let (lease, blocks) = node.lease(0, &engine, 0..8);
    assert_eq!(blocks, 6);
    node.rigs[0].load(&engine, lease, 0, 0..6);
    let pools: Vec<_> = node.rigs[0].copies[0].3.iter().map(|item| item.pool).collect();
    assert_eq!(pools, [0, 0, 2, 2, 3, 3]);
}

#[test]
fn tenants_are_walls_between_neighbours_too() {
    let mut node = Node::new(2, 16);
    saved(&mut node, 0, 0..4);
    let stranger = node.rigs[1].engine("stranger", &tenant(2), "m");
    assert_eq!(node.lease(1, &stranger, 0..4).1, 0);
    let other_model = node.rigs[1].engine("model", &tenant(1), "n");
    assert_eq!(node.lease(1, &other_model, 0..4).1, 0);
    // A client that is no neighbour cannot borrow, with the right keys in hand or not.
    let engine = node.rigs[0].engine("thief", &tenant(1), "m");
    let keys = vec![crate::key::BlockKey::new(&tenant(1).key, engine.space, 0, &hash(0)).bytes()];
    node.rigs[0].apply(Event::Borrow { session: engine.scheduler, request: 5, keys });
    let Some(Action::Lent { records, .. }) = node.rigs[0].abroad.pop() else { panic!("no answer") };
    assert_eq!(records, [None]);
    assert_eq!(node.rigs[0].errors.len(), 1);
}

#[test]
fn what_is_borrowed_is_not_lent_on() {
    let mut node = Node::new(3, 16);
    saved(&mut node, 0, 0..2);
    node.go(2, 0);
    let middle = node.rigs[1].engine("middle", &tenant(1), "m");
    assert_eq!(node.lease(1, &middle, 0..2).1, 2);
    // The third asks the second directly: its table says nothing, and it would not lend either.
    let key = crate::key::BlockKey::new(&tenant(1).key, middle.space, 0, &hash(0)).bytes();
    node.rigs[1].apply(Event::Borrow { session: session_of(2), request: 5, keys: vec![key] });
    let Some(Action::Lent { records, .. }) = node.rigs[1].abroad.pop() else { panic!("no answer") };
    assert_eq!(records, [None]);
    let last = node.rigs[2].engine("last", &tenant(1), "m");
    assert_eq!(node.lease(2, &last, 0..2).1, 0);
}

#[test]
fn a_neighbour_that_goes_fails_loads_that_have_not_begun() {
    let mut node = Node::new(2, 16);
    saved(&mut node, 0, 0..2);
    let engine = node.rigs[1].engine("other", &tenant(1), "m");
    let (lease, _) = node.lease(1, &engine, 0..2);
    let running = node.rigs[1].load(&engine, lease, 0, 0..2);
    node.go(1, 0);
    assert_eq!(node.rigs[0].core.counters().pinned_bytes, 0, "its owner does not wait");
    node.rigs[1].load(&engine, lease, 0, 0..2);
    assert_eq!(node.rigs[1].last().1, Outcome::Failed);
    node.rigs[1].copied();
    assert_eq!(node.rigs[1].last(), (running, Outcome::Done, true, 2), "what it read was proved");
    assert_eq!(node.lease(1, &engine, 0..2).1, 0);
}

#[test]
fn a_damaged_record_is_forgotten_on_both_sides() {
    let mut node = Node::new(2, 16);
    saved(&mut node, 0, 0..2);
    let engine = node.rigs[1].engine("other", &tenant(1), "m");
    let (lease, _) = node.lease(1, &engine, 0..2);
    node.rigs[1].load(&engine, lease, 0, 0..2);
    node.rigs[1].copy(|_| BlockOutcome::Corrupt);
    node.settle();
    assert_eq!(node.rigs[1].last().1, Outcome::Failed);
    assert_eq!(node.lease(1, &engine, 0..2).1, 0);
    assert!(node.rigs[0].present.is_empty());
    node.rigs[1].apply(Event::Release { session: engine.scheduler, lease });
    node.settle();
    assert_eq!(node.rigs[0].core.counters().records, 0);
}

#[test]
fn an_answer_that_does_not_come_is_waited_for_a_while_and_its_lease_given_back() {
    let mut node = Node::new(2, 16);
    let engine = saved(&mut node, 1, 0..2);
    saved(&mut node, 0, 2..4);
    node.slow = true;
    let (_, blocks) = node.lease(1, &engine, 0..4);
    assert_eq!(blocks, u32::MAX, "not answered yet");
    let request = node.rigs[1].jobs;
    node.rigs[1].now += SECOND / 4;
    node.rigs[1].apply(Event::Tick);
    assert_eq!(node.rigs[1].leased[&request].1, 2, "what is here");
    node.slow = false;
    node.settle();
    assert_eq!(node.rigs[0].core.counters().pinned_bytes, 0, "nobody waits for it any more");
    assert_eq!(node.lease(1, &engine, 0..4).1, 4);
}

#[test]
fn what_is_saved_here_while_a_lease_waits_for_neighbours_is_pinned_as_far_as_it_may_be() {
    let mut node = Node::new(2, 16);
    let engine = node.rigs[1].engine("e", &tenant(1), "m");
    node.rigs[1].core.limits.pinned_bytes_max = 2 * RECORD;
    node.slow = true;
    let (_, blocks) = node.lease(1, &engine, 0..4);
    assert_eq!(blocks, u32::MAX, "not answered yet");
    let request = node.rigs[1].jobs;
    node.rigs[1].save(&engine, None, 0..4);
    node.rigs[1].copied();
    node.slow = false;
    node.settle();
    assert_eq!(node.rigs[1].leased[&request].1, 2);
    assert_eq!(node.rigs[1].core.counters().pinned_bytes, 2 * RECORD);
}

#[test]
fn what_the_ssd_pins_while_a_lease_waits_for_neighbours_does_not_widen_what_leases_may_pin() {
    let mut node =
        Node::of(vec![Rig::new(16), Rig::with(16, Some(super::ssd::limits(CacheMode::WriteBack)))]);
    let engine = node.rigs[1].engine("e", &tenant(1), "m");
    node.rigs[1].core.limits.pinned_bytes_max = 2 * RECORD;
    node.slow = true;
    node.lease(1, &engine, 0..4);
    node.rigs[1].save(&engine, None, 0..4);
    node.rigs[1].copied();
    assert_eq!(node.rigs[1].core.counters().pinned_bytes, 4 * RECORD, "by writes to the SSD");
    node.slow = false;
    node.settle();
    node.rigs[1].put_all();
    assert!(node.rigs[1].core.counters().pinned_bytes <= 2 * RECORD);
    assert_eq!(node.lease(1, &engine, 0..4).1, 2, "what it may be");
}

#[test]
fn what_is_borrowed_for_long_is_renewed() {
    let mut node = Node::new(2, 16);
    saved(&mut node, 0, 0..2);
    let engine = node.rigs[1].engine("other", &tenant(1), "m");
    let (lease, _) = node.lease(1, &engine, 0..2);
    for _ in 0..10 {
        node.rigs[1].apply(Event::Renew { session: engine.scheduler, lease });
        node.pass(12 * SECOND);
    }
    assert_eq!(node.rigs[0].core.counters().leases, 2, "one for each question");
    node.pass(40 * SECOND);
    assert_eq!(node.rigs[1].core.counters().leases, 0, "its own ran out");
    assert_eq!(node.rigs[0].core.counters().leases, 0);
}

#[test]
fn what_is_borrowed_is_not_written_to_our_ssd() {
    let slow = SsdLimits { puts_max: 1, ..super::ssd::limits(CacheMode::WriteBack) };
    let mut node = Node::of(vec![Rig::new(16), Rig::with(4, Some(slow))]);
    let engine = node.rigs[1].engine("e", &tenant(1), "m");
    node.rigs[1].save(&engine, None, 0..3);
    node.rigs[1].copied();
    assert_eq!(node.rigs[1].puts.len(), 1, "two are waiting");
    // They leave the pool before their turn comes, and one of them is borrowed.
    saved(&mut node, 0, 1..3);
    node.rigs[1].save(&engine, None, 10..13);
    node.rigs[1].copied();
    let (lease, blocks) = node.lease(1, &engine, 1..3);
    assert_eq!((blocks, node.rigs[1].core.counters().neighbour_blocks_here), (2, 2));
    while !node.rigs[1].puts.is_empty() {
        node.rigs[1].put(PutEnding::Stored);
    }
    let mut written: Vec<_> = node.rigs[1].disk.values().map(|record| record.hash).collect();
    written.sort_unstable();
    assert_eq!(written, [0, 10, 11, 12].map(hash));
    node.rigs[1].apply(Event::Release { session: engine.scheduler, lease });
    node.settle();
}

#[test]
fn a_durable_save_of_what_is_borrowed_is_stored_here() {
    let through = super::ssd::limits(CacheMode::WriteThrough);
    let mut node = Node::of(vec![Rig::new(16), Rig::with(16, Some(through))]);
    saved(&mut node, 0, 0..2);
    let engine = node.rigs[1].engine("e", &tenant(1), "m");
    let (lease, blocks) = node.lease(1, &engine, 0..2);
    assert_eq!(blocks, 2);
    let save = node.rigs[1].save(&engine, None, 0..2);
    node.rigs[1].copied();
    assert!(node.rigs[1].done.iter().all(|done| done.1 != save), "not before it is on the disk");
    node.rigs[1].put_all();
    assert_eq!(node.rigs[1].last(), (save, Outcome::Done, true, 2));
    assert_eq!(node.rigs[1].disk.len(), 2);
    node.rigs[1].apply(Event::Release { session: engine.scheduler, lease });
    node.settle();
    assert_eq!(node.rigs[0].core.counters().pinned_bytes, 0);
}

#[test]
fn a_complaint_about_another_place_costs_nothing() {
    let mut node = Node::new(2, 16);
    let engine = saved(&mut node, 0, 0..1);
    let key = crate::key::BlockKey::new(&tenant(1).key, engine.space, 0, &hash(0)).bytes();
    node.rigs[0].apply(Event::Damaged { session: session_of(1), key, offset: RECORD });
    assert_eq!(node.lease(0, &engine, 0..1).1, 1);
    node.rigs[0].apply(Event::Damaged { session: session_of(1), key, offset: 0 });
    assert_eq!(node.lease(0, &engine, 0..1).1, 0);
}

#[test]
fn our_own_engines_come_before_those_of_others() {
    let mut node = Node::new(2, 4);
    let engine = saved(&mut node, 0, 0..4);
    let other = node.rigs[1].engine("other", &tenant(1), "m");
    assert_eq!(node.lease(1, &other, 0..4).1, 2, "half of what may be pinned");
    assert_eq!(node.lease(0, &engine, 0..4).1, 4);
}

#[derive(Debug, Clone)]
enum Step {
    Save { engine: usize, start: u32, count: u32 },
    Lease { engine: usize, start: u32, count: u32 },
    Load { pick: usize },
    Release { pick: usize },
    Copy { rig: usize },
    Pass { seconds: u64 },
    Go { from: usize, to: usize },
    Come { from: usize, to: usize },
    Slow { slow: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let (engine, start, count) = (0usize..6, 0u32..3, 1u32..6);
    prop_oneof![
        3 => (engine.clone(), start.clone(), count.clone())
            .prop_map(|(engine, start, count)| Step::Save { engine, start: start * 10, count }),
        4 => (engine, start, count)
            .prop_map(|(engine, start, count)| Step::Lease { engine, start: start * 10, count }),
        3 => (0usize..16).prop_map(|pick| Step::Load { pick }),
        2 => (0usize..16).prop_map(|pick| Step::Release { pick }),
        4 => (0usize..3).prop_map(|rig| Step::Copy { rig }),
        1 => (0u64..20).prop_map(|seconds| Step::Pass { seconds }),
        1 => (0usize..3, 0usize..3).prop_map(|(from, to)| Step::Go { from, to }),
        1 => (0usize..3, 0usize..3).prop_map(|(from, to)| Step::Come { from, to }),
        1 => any::<bool>().prop_map(|slow| Step::Slow { slow }),
    ]
}

/// What lies where in each pool, as the copies wrote it.
type Pools = Vec<HashMap<u64, (NamespaceId, u32)>>;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Three sidecars, two tenants: a load that ends well has read what was saved under that very key, wherever it
    /// lies; while all are connected nothing is ever read that changed; and in the end nothing is pinned anywhere.
    #[test]
    fn a_random_walk_over_three_sidecars(steps in proptest::collection::vec(step(), 1..100)) {
        let mut node = Node::new(3, 8);
        let engines: Vec<(usize, Engine)> = (0..6)
            .map(|n| (n % 3, node.rigs[n % 3].engine(&format!("e{n}"), &tenant((n / 3) as u8), "m")))
            .collect();
        let mut pools: Pools = vec![HashMap::new(); 3];
        let mut leases: Vec<(usize, Engine, LeaseId, u32, u32)> = Vec::new();
        let mut meant: HashMap<(usize, JobId), Vec<(NamespaceId, u32)>> = HashMap::new();
        let mut torn = false;
        for step in steps {
            match step {
                Step::Save { engine, start, count } => {
                    let (rig, engine) = engines[engine];
                    let job = node.rigs[rig].save(&engine, None, start..start + count);
                    let all: Vec<_> = (start..start + count).map(|n| (engine.space, n)).collect();
                    meant.insert((rig, job), all);
                }
                Step::Lease { engine, start, count } => {
                    let (rig, engine) = engines[engine];
                    let (lease, blocks) = node.lease(rig, &engine, start..start + count);
                    if blocks > 0 && blocks < u32::MAX {
                        leases.push((rig, engine, lease, start, blocks));
                    }
                }
                Step::Load { pick } if !leases.is_empty() => {
                    let (rig, engine, lease, start, blocks) = leases[pick % leases.len()];
                    let job = node.rigs[rig].load(&engine, lease, 0, start..start + blocks);
                    meant.insert((rig, job), (start..start + blocks).map(|n| (engine.space, n)).collect());
                }
                Step::Release { pick } if !leases.is_empty() => {
                    let (rig, engine, lease, ..) = leases.swap_remove(pick % leases.len());
                    node.rigs[rig].apply(Event::Release { session: engine.scheduler, lease });
                }
                Step::Copy { rig } if !node.rigs[rig].copies.is_empty() => {
                    let (_, job, direction, items) = node.rigs[rig].copies[0].clone();
                    let meant = &meant[&(rig, job)];
                    match direction {
                        Direction::Save => {
                            // Blocks that were there already are not among the items: by their engine's number.
                            for item in &items {
                                let what = meant.iter().find(|(_, n)| u64::from(n % 64) == item.block).unwrap();
                                pools[rig].insert(item.offset, *what);
                            }
                            node.rigs[rig].copied();
                        }
                        Direction::Load => {
                            prop_assert_eq!(items.len(), meant.len());
                            let mut all_right = true;
                            let outcomes: Vec<_> = items.iter().zip(meant).map(|(item, what)| {
                                let owner = if item.pool == 0 { rig } else { item.pool as usize - 1 };
                                let right = pools[owner].get(&item.offset) == Some(what);
                                all_right &= right;
                                if right { BlockOutcome::Copied(1) } else { BlockOutcome::Corrupt }
                            }).collect();
                            prop_assert!(all_right || torn, "a borrowed record changed under a lease");
                            let (session, job, ..) = node.rigs[rig].copies.remove(0);
                            node.rigs[rig].apply(Event::CopyDone { session, job, blocks: outcomes });
                        }
                    }
                }
                Step::Pass { seconds } => {
                    // Nobody hears a renewal while the network stands still.
                    torn |= node.slow;
                    node.pass(seconds * SECOND);
                }
                Step::Go { from, to } => {
                    torn |= node.up.contains(&(from, to));
                    node.go(from, to);
                }
                Step::Come { from, to } if from != to && !node.slow => node.come(from, to),
                Step::Slow { slow } => node.slow = slow,
                _ => {}
            }
            node.settle();
        }
        node.slow = false;
        node.settle();
        for rig in 0..3 {
            while !node.rigs[rig].copies.is_empty() {
                node.rigs[rig].copy(|_| BlockOutcome::Copied(1));
            }
        }
        for (rig, engine) in engines {
            for session in [engine.scheduler, engine.worker] {
                node.rigs[rig].apply(Event::Detached { session });
            }
        }
        node.settle();
        for rig in &node.rigs {
            let counters = rig.core.counters();
            prop_assert_eq!(counters.pinned_bytes, 0);
            prop_assert_eq!((counters.leases, counters.borrows, counters.neighbour_blocks_here), (0, 0, 0));
        }
    }
}

#[test]
fn a_lent_record_says_what_it_is() {
    let mut node = Node::new(2, 16);
    let engine = saved(&mut node, 0, 0..1);
    let key = crate::key::BlockKey::new(&tenant(1).key, engine.space, 0, &hash(0)).bytes();
    let keys = vec![key, [9; 32]];
    node.rigs[0].apply(Event::Borrow { session: session_of(1), request: 7, keys });
    let Some(Action::Lent { request, records, .. }) = node.rigs[0].abroad.pop() else { panic!("no answer") };
    let first = Lent { offset: 0, bytes: RECORD, checksum: 0, format: "format".into() };
    assert_eq!((request, records), (7, vec![Some(first), None]));
}
