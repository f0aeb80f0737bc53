//! Every covered layout to every other of the same content, cut into any shards: real bytes moved,
//! and compared with logical tensors that the oracles of `worlds` place.

use crate::worlds::{Engine, Row, Setup, What, World};
use pillion_layouts::blade_kvt::Shape;
use pillion_layouts::sglang::PoolOrder;
use pillion_layouts::tensorrt_llm::PageOrder;
use pillion_layouts::{BlockPlan, Order, Plan, Plane, Rank, Role, Segment, plan_between};
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// The byte of a logical element: different for each, mostly.
pub(crate) fn logical(block: u64, row: Row, byte: u64) -> u8 {
    let role = match row.role {
        Role::State(part) => 100 + u64::from(part),
        other => other.to_string().bytes().map(u64::from).sum(),
    };
    let mut z = block.wrapping_mul(31).wrapping_add(role);
    for part in [u64::from(row.layer), u64::from(row.head), u64::from(row.state), byte] {
        z = (z ^ part).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z ^= z >> 29;
    }
    (z >> 32) as u8
}

/// A set of shards: tensor-parallel ranks × pipeline stages.
#[derive(Debug, Clone)]
pub(crate) struct Cut {
    pub(crate) ranks: u32,
    pub(crate) stages: usize,
    pub(crate) engine: Engine,
    pub(crate) blocks: u64,
    pub(crate) channels_first: bool,
}

/// The worlds of a cut; `None` where the engine cannot hold the content.
pub(crate) fn worlds(what: &What, tokens: u32, layers: u32, cut: &Cut) -> Option<Vec<World>> {
    let all: Vec<u32> = (0..layers).collect();
    let each = all.len().div_ceil(cut.stages);
    let mut out = Vec::new();
    for stage in all.chunks(each) {
        for index in 0..cut.ranks {
            let setup = Setup {
                what: what.clone(),
                tokens,
                blocks: cut.blocks,
                layers: stage.to_vec(),
                rank: Rank { index, size: cut.ranks },
                channels_first: cut.channels_first,
            };
            out.push(setup.world(&cut.engine)?);
        }
    }
    Some(out)
}

/// The memory of a world, every block full of logical tensors.
pub(crate) fn filled(world: &World) -> Vec<u8> {
    let mut memory = vec![0xAA; world.bytes as usize];
    for block in 0..world.shard.num_blocks() {
        for (row, bytes) in &world.rows {
            let at = (world.at)(block, *row);
            (0..*bytes).for_each(|byte| memory[(at + byte) as usize] = logical(block, *row, byte));
        }
    }
    memory
}

pub(crate) fn apply(plan: &Plan, source: &[Vec<u8>], target: &mut [Vec<u8>], src: u64, dst: u64) {
    for run in plan.runs(src, dst) {
        let (from, to, len) = (run.src as usize, run.dst as usize, run.len as usize);
        target[run.to][to..to + len].copy_from_slice(&source[run.from][from..from + len]);
    }
}

pub(crate) fn any_what() -> impl Strategy<Value = What> {
    let heads = || select(vec![1u32, 2, 4]);
    prop_oneof![
        4 => (heads(), 1..=4u32).prop_map(|(heads, bytes)| What::Kv { heads, bytes }),
        1 => (heads(), 1..=4u32).prop_map(|(heads, bytes)| What::Scaled { heads, bytes }),
        1 => (heads(), 1..=4u32, 1..=2u32).prop_map(|(heads, data, scale)| What::Nvfp4 { heads, data, scale }),
        1 => (heads(), 1..=4u32).prop_map(|(heads, bytes)| What::OpaqueHeads { heads, bytes }),
        2 => (1..=6u32).prop_map(|row| What::Latent { row }),
        1 => (1..=6u32, 1..=4u32, 1..=2u32).prop_map(|(row, key, scale)| What::LatentIndex { row, key, scale }),
        1 => (1..=6u32).prop_map(|row| What::OpaquePage { row }),
        2 => (1..=3u32, proptest::collection::vec(select(vec![4u32, 8]), 1..=3), 1..=2u32, 1..=3u32, any::<bool>())
            .prop_map(|(rows, parts, element, bytes, replicated)| {
                What::State { rows, parts, element, heads: 4, bytes, replicated }
            }),
    ]
}

pub(crate) fn any_engine() -> impl Strategy<Value = Engine> {
    let order = || select(Order::ALL.to_vec());
    let page = || select(vec![PageOrder::Hnd, PageOrder::Nhd]);
    let shape = select(vec![Shape::Ragged, Shape::Flash, Shape::KernelFlash, Shape::KernelHnd]);
    let slack = || prop_oneof![Just(0u64), 1..=9u64];
    prop_oneof![
        4 => (order(), slack(), slack(), select(vec![1u32, 2, 3])).prop_map(|(order, align, pad, kernel)| {
            Engine::Vllm { order, align, pad, kernel }
        }),
        1 => select(vec![Order::Lbnhc, Order::Lbhnc]).prop_map(|order| Engine::VllmPlanes { order }),
        1 => page().prop_map(Engine::TrtV1),
        1 => page().prop_map(Engine::TrtV2),
        2 => select(PoolOrder::ALL.to_vec()).prop_map(Engine::Sglang),
        3 => (shape, select(vec![1u32, 2]), select(vec![1u32, 2]), slack())
            .prop_map(|(shape, kernel, pack, pad)| Engine::Blade { shape, kernel, pack, pad }),
        1 => Just(Engine::Record),
    ]
}

pub(crate) fn any_cut() -> impl Strategy<Value = Cut> {
    (select(vec![1u32, 2, 4, 8]), 1..=2usize, any_engine(), 1..=3u64, any::<bool>()).prop_map(
        |(ranks, stages, engine, blocks, channels_first)| Cut {
            ranks,
            stages,
            engine,
            blocks,
            channels_first,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6000, max_global_rejects: 400_000, ..ProptestConfig::default() })]

    /// After any plan the destination holds the logical tensor of the source's block, and every byte
    /// outside that block's content is as it was.
    #[test]
    fn any_layout_becomes_any_other(
        what in any_what(),
        (tokens, layers) in (select(vec![1u32, 2, 4, 6]), 1..=4u32),
        (from, to) in (any_cut(), any_cut()),
        (src, dst) in (any::<Index>(), any::<Index>()),
    ) {
        // Sizes that do not divide are refused elsewhere.
        let cut = |mut cut: Cut| {
            while !what.allows(cut.ranks) {
                cut.ranks /= 2;
            }
            cut
        };
        let (from, to) = (cut(from), cut(to));
        // Kernel blocks of 6 tokens cut in 2 and in 3 do not divide each other: refused elsewhere.
        prop_assume!(tokens != 6 || !matches!(
            (&from.engine, &to.engine),
            (Engine::Vllm { .. } | Engine::Blade { .. }, Engine::Vllm { .. } | Engine::Blade { .. })
        ));
        let Some(source) = worlds(&what, tokens, layers, &from) else { return Err(TestCaseError::reject("n/a")) };
        let Some(target) = worlds(&what, tokens, layers, &to) else { return Err(TestCaseError::reject("n/a")) };
        let shards = |worlds: &[World]| worlds.iter().map(|world| world.shard.clone()).collect::<Vec<_>>();
        let plan = plan_between(&shards(&source), &shards(&target)).expect("equal content");
        let blocks = |worlds: &[World]| worlds.iter().map(|world| world.shard.num_blocks()).min().unwrap_or(1);
        let (src, dst) = (src.index(blocks(&source) as usize) as u64, dst.index(blocks(&target) as usize) as u64);

        let memory: Vec<Vec<u8>> = source.iter().map(filled).collect();
        let mut after: Vec<Vec<u8>> = target.iter().map(|world| vec![0xEE; world.bytes as usize]).collect();
        apply(&plan, &memory, &mut after, src, dst);
        let mut written = 0;
        for (world, after) in target.iter().zip(&after) {
            let mut expected = vec![0xEE; world.bytes as usize];
            for (row, bytes) in &world.rows {
                let at = (world.at)(dst, *row);
                (0..*bytes).for_each(|byte| expected[(at + byte) as usize] = logical(src, *row, byte));
                written += bytes;
            }
            prop_assert!(*after == expected, "{what:?}\n{from:?}\n{to:?}");
        }
        prop_assert_eq!(plan.bytes(), written);
        prop_assert_eq!(plan.runs(src, dst).map(|run| run.len).sum::<u64>(), written);
    }

    /// What an engine of one tensor-parallel size has stored fills the blocks of another's, whatever both sizes and
    /// layouts are: each rank takes what it holds from every record that has some of it.
    #[test]
    fn records_of_any_ranks_fill_any_others(
        what in any_what(),
        (tokens, layers) in (select(vec![1u32, 2, 4]), 1..=4u32),
        (from, to) in (any_cut(), any_cut()),
        (src, dst) in (any::<Index>(), any::<Index>()),
    ) {
        let cut = |mut cut: Cut| {
            while !what.allows(cut.ranks) {
                cut.ranks /= 2;
            }
            cut.stages = 1;
            cut
        };
        let (from, to) = (cut(from), cut(to));
        let Some(source) = worlds(&what, tokens, layers, &from) else { return Err(TestCaseError::reject("n/a")) };
        let Some(target) = worlds(&what, tokens, layers, &to) else { return Err(TestCaseError::reject("n/a")) };
        let (src, dst) = (
            src.index(source[0].shard.num_blocks() as usize) as u64,
            dst.index(target[0].shard.num_blocks() as usize) as u64,
        );
        let stored: Vec<Vec<u8>> = source.iter().map(|world| {
            let (plan, memory) = (BlockPlan::new(&world.shard).expect("covered"), filled(world));
            let mut record = vec![0; plan.record_bytes() as usize];
            for Segment { engine, record: to, len } in plan.segments(src) {
                let (engine, to, len) = (engine as usize, to as usize, len as usize);
                record[to..to + len].copy_from_slice(&memory[engine..engine + len]);
            }
            record
        }).collect();
        for (rank, world) in (0..).zip(&target) {
            let mut after = vec![0xEE; world.bytes as usize];
            let mut expected = after.clone();
            let own = Rank { index: rank, size: to.ranks };
            for (rank, stored) in (0..).zip(&stored) {
                let record = world.shard.record_of_rank(Rank { index: rank, size: from.ranks }).expect("allowed");
                prop_assert_eq!(record.block_bytes(), stored.len() as u64);
                let Ok(plan) = BlockPlan::of_part(&world.shard, own, &record) else {
                    let shares = |plane: &Plane| {
                        let theirs = plane.heads_of(Rank { index: rank, size: from.ranks }).expect("allowed");
                        plane.heads_of(own).expect("allowed").any(|head| theirs.contains(&head))
                    };
                    prop_assert!(!record.content().planes().iter().any(shares), "refused where heads are shared");
                    continue;
                };
                let moved: u64 = plan.segments(dst).map(|run| run.len).sum();
                prop_assert_eq!(plan.is_whole(), moved == plan.record_bytes());
                for Segment { engine, record: from, len } in plan.segments(dst) {
                    let (engine, from, len) = (engine as usize, from as usize, len as usize);
                    after[engine..engine + len].copy_from_slice(&stored[from..from + len]);
                }
            }
            for (row, bytes) in &world.rows {
                let at = (world.at)(dst, *row);
                (0..*bytes).for_each(|byte| expected[(at + byte) as usize] = logical(src, *row, byte));
            }
            prop_assert!(after == expected, "rank {rank}: {what:?}\n{from:?}\n{to:?}");
        }
    }

    /// A shard's own addresses are the oracle's.
    #[test]
    fn addresses_are_the_engines(
        what in any_what(),
        (tokens, layers) in (select(vec![1u32, 2, 4, 6]), 1..=4u32),
        cut in any_cut(),
    ) {
        prop_assume!(what.allows(cut.ranks));
        let Some(all) = worlds(&what, tokens, layers, &cut) else { return Err(TestCaseError::reject("n/a")) };
        for world in all {
            let planes = world.shard.content().planes();
            for block in 0..world.shard.num_blocks() {
                for (row, _) in &world.rows {
                    let plane = planes.iter().position(|plane| plane.role == row.role).expect("a plane");
                    let at = world.shard.address(plane, block, row.layer, row.head, row.state);
                    prop_assert_eq!(at, Some((world.at)(block, *row)), "{:?} {:?} {:?}", what, cut, row);
                }
            }
        }
    }
}
