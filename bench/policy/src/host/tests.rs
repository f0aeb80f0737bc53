//! Tiny traces that were worked out by hand, and random ones on which the ceiling must hold.

use super::{
    belady::Belady,
    classic::{Lru, S3Fifo, WTinyLfu},
    leaves::{Growth, Leaves, Order},
    *,
};
use crate::{
    generate::{NAMES, Random, generate},
    study::{Host, host_policies, run_host},
};

/// Prompts without answers.
fn trace(requests: &[&[u64]]) -> Trace {
    Trace::new("t", requests.iter().map(|blocks| (blocks.to_vec(), blocks.len()))).unwrap()
}

fn served(trace: &Trace, policy: &mut impl Policy) -> u64 {
    run(trace, policy).served
}

/// What is there at the end, by the names of the blocks in the order of their first appearance.
fn left(trace: &Trace, policy: &mut impl Policy) -> Vec<Block> {
    run(trace, policy);
    (0..trace.blocks() as Block).filter(|block| policy.holds(*block)).collect()
}

fn buy(weight: f64, growth: Growth) -> Order {
    Order::BuyTime { weight, growth, writes: false }
}

#[test]
fn lru_told_the_first_block_first_evicts_the_root_and_what_is_left_is_worth_nothing() {
    let trace = trace(&[&[0, 1], &[2], &[0, 1]]);
    // Of 0, 1, 2 in a cache of two, 0 is the oldest.
    let outcome = run(&trace, &mut Lru::new(&trace, 2, false));
    assert_eq!((outcome.served, outcome.found), (0, 1));
    let outcome = run(&trace, &mut Lru::new(&trace, 2, true));
    assert_eq!((outcome.served, outcome.found), (1, 1));
}

#[test]
fn leaves_go_before_their_parents_and_the_oldest_first() {
    let trace = trace(&[&[0, 1], &[2], &[3]]);
    assert_eq!(left(&trace, &mut Leaves::new(&trace, 3, Order::Lru)), [0, 2, 3]);
    let trace = self::trace(&[&[0, 1], &[2], &[0], &[3], &[4]]);
    // 1 first; then 2: 0 was hit since.
    assert_eq!(left(&trace, &mut Leaves::new(&trace, 3, Order::Lru)), [0, 3, 4]);
}

#[test]
fn a_request_that_does_not_fit_keeps_its_leading_blocks() {
    let trace = trace(&[&[0, 1, 2, 3], &[0, 1, 2, 3]]);
    assert_eq!(served(&trace, &mut Leaves::new(&trace, 3, Order::Lru)), 3);
    assert_eq!(served(&trace, &mut Belady::new(&trace, 3)), 3);
}

#[test]
fn hits_buy_time_and_writes_do_not() {
    // Touches: 0 at 1, hit at 2 (one use: + 4 · ½ · 1 = 4), then 1, 2, 3, 4 at 3, 4, 5, 6.
    let requests: [&[u64]; 6] = [&[0], &[0], &[1], &[2], &[3], &[4]];
    let short = trace(&requests);
    assert_eq!(left(&short, &mut Leaves::new(&short, 4, Order::Lru)), [1, 2, 3, 4]);
    assert_eq!(left(&short, &mut Leaves::new(&short, 4, buy(0.5, Growth::Log))), [0, 2, 3, 4]);
    // Its time of 6 is over when 4 (6, later) and younger ones are all that is left.
    let long = trace(&[&[0], &[0], &[1], &[2], &[3], &[4], &[5], &[6], &[7]]);
    assert_eq!(left(&long, &mut Leaves::new(&long, 4, buy(0.5, Growth::Log))), [4, 5, 6, 7]);
}

#[test]
fn growth_is_what_it_says() {
    // Three hits: log2(4) = 2, once 1, linear 3 times half of the capacity of 4 behind the touch at 4.
    for (growth, lasts) in [(Growth::Log, 8), (Growth::LogFloor, 8), (Growth::Once, 6), (Growth::Linear, 10)]
    {
        let alive = |others: u64| {
            let mut requests: Vec<Vec<u64>> = vec![vec![0]; 4];
            requests.extend((1..=others).map(|name| vec![name]));
            let requests: Vec<&[u64]> = requests.iter().map(Vec::as_slice).collect();
            let trace = trace(&requests);
            left(&trace, &mut Leaves::new(&trace, 4, buy(0.5, growth))).contains(&0)
        };
        // The nth of the others is touched at 4 + n; when it comes, the oldest other of the four is from n + 1.
        let last = (0..20).take_while(|others| alive(*others)).last().unwrap();
        assert_eq!(last + 1, lasts - 1, "{growth:?}");
    }
}

#[test]
fn lfu_keeps_what_was_hit_for_ever_and_aging_does_not() {
    let mut requests: Vec<&[u64]> = vec![&[0], &[0], &[0]];
    let fillers: Vec<[u64; 1]> = (1..6).map(|name| [name]).collect();
    for filler in &fillers {
        requests.extend([&filler[..], &filler[..]]);
    }
    let trace = trace(&requests);
    assert!(left(&trace, &mut Leaves::new(&trace, 2, Order::Lfu)).contains(&0));
    // The floor: 1 after the first eviction, 2 after the second, and then 0 with its two hits is the oldest.
    assert!(!left(&trace, &mut Leaves::new(&trace, 2, Order::LfuAging)).contains(&0));
}

#[test]
fn what_was_never_hit_goes_first() {
    let trace = trace(&[&[0], &[0], &[1], &[2], &[3]]);
    assert_eq!(left(&trace, &mut Leaves::new(&trace, 2, Order::UnhitFirst)), [0, 3]);
    assert_eq!(left(&trace, &mut Leaves::new(&trace, 2, Order::Split { unhit: 0.4 })), [0, 3]);
    assert_eq!(left(&trace, &mut Leaves::new(&trace, 2, Order::Split { unhit: 1.0 })), [2, 3]);
}

#[test]
fn a_ghost_that_comes_back_counts_as_hit() {
    // 0 is evicted for 1 and 2, comes back, and has then bought a capacity: 2 and 3 go before it.
    let trace = trace(&[&[0], &[1], &[2], &[0], &[3], &[4]]);
    let order = buy(1.0, Growth::Log);
    assert_eq!(left(&trace, &mut Leaves::new(&trace, 2, order)), [3, 4]);
    assert_eq!(left(&trace, &mut Leaves::new(&trace, 2, order).with_ghosts()), [0, 4]);
}

#[test]
fn s3_fifo_drops_what_was_not_hit_and_remembers_its_name() {
    // Small queue of one. 0 is hit twice and moves to the main queue; 1 to 3 pass by.
    let requests: [&[u64]; 7] = [&[0], &[0], &[0], &[1], &[2], &[3], &[4]];
    let trace = self::trace(&requests);
    assert_eq!(left(&trace, &mut S3Fifo::new(&trace, 3, 2)), [0, 3, 4]);
    // 1 is a ghost when it comes back: it goes to the main queue and outlives what follows.
    let trace = self::trace(&[&[0], &[1], &[2], &[3], &[4], &[1], &[5], &[6], &[7]]);
    assert_eq!(left(&trace, &mut S3Fifo::new(&trace, 3, 2)), [1, 6, 7]);
}

#[test]
fn w_tinylfu_admits_what_was_seen_more_often() {
    // Window of one, main part of two: full with 0 and 1, seen twice; 2 and 3 are seen once.
    let trace = trace(&[&[0], &[0], &[1], &[1], &[2], &[3], &[0], &[1]]);
    assert_eq!(served(&trace, &mut WTinyLfu::new(&trace, 3)), 4);
    // Seen three times, 2 is admitted in the place of the older of the two.
    let trace = self::trace(&[&[0], &[0], &[1], &[1], &[2], &[2], &[2], &[3], &[4], &[2]]);
    assert!(left(&trace, &mut WTinyLfu::new(&trace, 3)).contains(&2));
}

#[test]
fn belady_keeps_what_comes_soonest_and_nothing_that_does_not_come() {
    // One place: 0 comes back before 1 does.
    let trace = trace(&[&[0], &[1], &[0], &[1]]);
    assert_eq!(served(&trace, &mut Belady::new(&trace, 1)), 1);
    assert_eq!(served(&trace, &mut Belady::new(&trace, 2)), 2);
    // What is only written counts from then on.
    let trace = Trace::new("t", [(vec![0, 1], 1), (vec![0, 1], 2)]).unwrap();
    assert_eq!(served(&trace, &mut Belady::new(&trace, 2)), 2);
}

/// Trees that no generator would make: short, bushy, with blocks that come in every distance.
fn random_trace(seed: u64) -> Trace {
    let mut random = Random::new(seed);
    let mut chains: Vec<Vec<u64>> = vec![Vec::new()];
    let mut requests = Vec::new();
    for name in 0..120 {
        let at = random.below(chains.len());
        let mut chain = chains[at].clone();
        if random.one_in(2) || chain.is_empty() {
            chain.push(name);
        }
        chains.push(chain.clone());
        let asked = chain.len() - usize::from(random.one_in(4));
        requests.push((chain, asked));
    }
    Trace::new("random", requests).unwrap()
}

#[test]
fn nothing_beats_the_ceiling_and_the_ceiling_has_no_holes() {
    let mut traces: Vec<Trace> = (0..60).map(random_trace).collect();
    traces.extend(NAMES.iter().map(|name| generate(name, 1, 2_000).unwrap()));
    for trace in &traces {
        for capacity in [2, 5, 12, 40, 150] {
            let ceiling = run_host(trace, Host::Belady, capacity);
            assert_eq!(ceiling.served, ceiling.found, "{} {capacity}", trace.name);
            for (name, policy) in host_policies() {
                let outcome = run_host(trace, policy, capacity);
                assert_eq!(outcome.asked, ceiling.asked);
                assert!(outcome.served <= outcome.found);
                assert!(outcome.found <= ceiling.found, "{name} on {} with {capacity}", trace.name);
            }
        }
    }
}

#[test]
fn nothing_beats_the_ceiling_behind_an_engines_cache_either() {
    for name in NAMES {
        let trace = generate(name, 2, 2_000).unwrap().behind_engine(60);
        let ceiling = run_host(&trace, Host::Belady, 80);
        for (name, policy) in host_policies() {
            assert!(run_host(&trace, policy, 80).found <= ceiling.found, "{name} on {}", trace.name);
        }
    }
}

#[test]
fn over_leaves_no_child_outlives_its_parent() {
    for (name, policy) in host_policies() {
        let (Host::Leaves(order) | Host::Ghosts(order)) = policy else { continue };
        for seed in 0..5 {
            let trace = random_trace(seed);
            let mut leaves = Leaves::new(&trace, 7, order);
            for request in &trace.requests {
                let asked = &request.blocks[..request.asked];
                let hit = asked.iter().take_while(|block| leaves.holds(**block)).count();
                leaves.serve(request, hit);
                leaves.check();
            }
            let outcome = run_host(&trace, policy, 7);
            assert_eq!(outcome.served, outcome.found, "{name}: there are no holes");
        }
    }
}

#[test]
fn with_room_for_all_every_policy_is_the_ceiling() {
    let trace = generate("mix", 1, 2_000).unwrap();
    let ceiling = run_host(&trace, Host::Belady, trace.blocks());
    for (name, policy) in host_policies() {
        assert_eq!(run_host(&trace, policy, trace.blocks() * 101 / 100 + 1).served, ceiling.served, "{name}");
    }
}
