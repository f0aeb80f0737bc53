//! A wrong description is refused, or its canary does not read back, or it was not wrong: every block
//! that it names has every byte where the real one has it.

use crate::pairs::{any_engine, any_what};
use crate::worlds::{Setup, World};
use pillion_layouts::vllm::groups::{Group, Pages, Pool, shards};
use pillion_layouts::vllm::{KvCacheTensor, Packing, StatePart};
use pillion_layouts::{
    Dim, Dtype, Extent, Order, Piece, Rank, Refusal, Shard, canary_byte, canary_fill, plan_between,
};
use proptest::prelude::*;
use proptest::sample::{Index, select};

const SEED: u64 = 0xCA_7A_17;

fn memory_of(bytes: u64) -> Vec<u8> {
    (0..bytes).map(|index| canary_byte(!SEED, index)).collect()
}

/// Block `block` as its record, read by a description; `None` where it points outside the memory.
fn read(shard: &Shard, memory: &[u8], block: u64) -> Option<Vec<u8>> {
    let record = shard.record().ok()?;
    let plan = plan_between(std::slice::from_ref(shard), std::slice::from_ref(&record)).ok()?;
    let mut out = vec![0; record.block_bytes() as usize];
    for run in plan.runs(block, 0) {
        let (src, dst, len) = (run.src as usize, run.dst as usize, run.len as usize);
        out[dst..dst + len].copy_from_slice(memory.get(src..src.checked_add(len)?)?);
    }
    Some(out)
}

/// The shim's part: canaries written into a block of the real cache, with the engine's own indexing.
fn write_canary(shard: &Shard, memory: &mut [u8], block: u64, seed: u64) -> Vec<u8> {
    let record = shard.record().expect("a record");
    let mut bytes = vec![0; record.block_bytes() as usize];
    canary_fill(seed, &mut bytes);
    let plan = plan_between(std::slice::from_ref(&record), std::slice::from_ref(shard)).expect("a plan");
    for run in plan.runs(0, block) {
        let (src, dst, len) = (run.src as usize, run.dst as usize, run.len as usize);
        memory[dst..dst + len].copy_from_slice(&bytes[src..src + len]);
    }
    bytes
}

/// Every run of every block, as bytes from memory to record.
fn meaning(shard: &Shard) -> Vec<Vec<(u64, u64)>> {
    let record = shard.record().expect("a record");
    let plan = plan_between(std::slice::from_ref(shard), std::slice::from_ref(&record)).expect("a plan");
    let bytes = |block| {
        let runs =
            plan.runs(block, 0).flat_map(|run| (0..run.len).map(move |at| (run.dst + at, run.src + at)));
        let mut bytes: Vec<_> = runs.collect();
        bytes.sort_unstable();
        bytes
    };
    (0..shard.num_blocks()).map(bytes).collect()
}

/// One number of a piece, changed; or its shape.
fn mutate(piece: &mut Piece, field: usize, by: i64) {
    let shift = |value: &mut u64| *value = value.wrapping_add_signed(by);
    match field {
        0 => shift(&mut piece.offset),
        1 => shift(&mut piece.blocks),
        2 => shift(&mut piece.layers),
        3 => shift(&mut piece.heads),
        4 => piece.states.iter_mut().for_each(|digit| shift(&mut digit.stride)),
        5 => piece.states.reverse(),
        6 => std::mem::swap(&mut piece.heads, &mut piece.states[0].stride),
        7 => piece.part.layers.reverse(),
        8 => piece.part.heads.start = piece.part.heads.start.wrapping_add_signed(by as i32),
        9 => piece.part.heads.end = piece.part.heads.end.wrapping_add_signed(by as i32),
        10 => piece.part.plane = piece.part.plane.wrapping_add_signed(by as isize),
        11 => piece.states.push(Dim { len: 2, stride: 1 }),
        _ => {
            piece.part.layers.pop();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6000, max_global_rejects: 100_000, ..ProptestConfig::default() })]

    /// Any layout as data: canaries in the first and the last block catch every number that matters.
    #[test]
    fn a_wrong_piece_never_moves_a_byte(
        what in any_what(),
        (tokens, layers, blocks) in (select(vec![1u32, 2, 4]), 1..=3u32, 1..=3u64),
        engine in any_engine(),
        (at, field, by) in (any::<Index>(), 0..13usize, prop_oneof![-20i64..=-1, 1i64..=20, Just(i64::MAX / 3)]),
    ) {
        let layers = (0..layers).collect();
        let setup = Setup { what, tokens, blocks, layers, rank: Rank::ALONE, channels_first: false };
        let Some(World { shard, bytes, .. }) = setup.world(&engine) else { return Ok(()) };
        let mut memory = memory_of(bytes);
        let last = shard.num_blocks() - 1;
        let canaries = [(0, SEED), (last, SEED + 1_000_000)]
            .map(|(block, seed)| (block, write_canary(&shard, &mut memory, block, seed)));
        let mut pieces = shard.pieces().to_vec();
        let at = at.index(pieces.len());
        mutate(&mut pieces[at], field, by);
        let extents = shard.memory().to_vec();
        let Ok(wrong) = Shard::new(shard.content().clone(), extents, shard.num_blocks(), pieces) else { return Ok(()) };
        // A single block's canary was overwritten by the second.
        let seen = canaries.iter().skip(usize::from(last == 0)).all(|(block, canary)| {
            read(&wrong, &memory, *block).is_some_and(|read| read == *canary)
        });
        prop_assert!(!seen || meaning(&wrong) == meaning(&shard), "field {} by {} of {:?}", field, by, engine);
    }
}

/// One number or name of vLLM's description, changed.
fn mutate_group(pool: &mut Pool, pages: &mut Pages, field: usize, by: i64) {
    let shift = |value: &mut u64| *value = value.wrapping_add_signed(by);
    let shift32 = |value: &mut u32| *value = value.wrapping_add_signed(by as i32);
    let tensor = &mut pages.tensor;
    match field {
        0 => shift(&mut tensor.offset),
        1 => shift(&mut tensor.layer_stride),
        2 => shift(&mut tensor.block_stride),
        3 => shift(&mut tensor.size),
        4 => shift(&mut pool.num_blocks),
        5 => shift(&mut pages.page_bytes),
        6 => shift32(&mut pages.heads),
        7 => shift32(&mut pages.states),
        8 => shift32(&mut pages.content_bytes),
        9 => shift32(&mut pages.kernel_blocks),
        10 => pool.order = Order::ALL[by.rem_euclid(6) as usize],
        11 => shift32(&mut pool.rank.size),
        12 => std::mem::swap(&mut pages.heads, &mut pages.states),
        13 => {
            tensor.layers.pop();
        }
        14 => tensor.layers.reverse(),
        _ => mutate_packing(&mut pages.packing, by as i32),
    }
}

fn mutate_packing(packing: &mut Packing, by: i32) {
    let shift = |value: &mut u32| *value = value.wrapping_add_signed(by);
    match packing {
        Packing::KeyValue { total_heads, key_bytes, value_bytes, dtype } => match by.rem_euclid(4) {
            0 => shift(total_heads),
            1 => shift(key_bytes),
            2 => *dtype = Dtype::Float32,
            _ => {
                *key_bytes = key_bytes.wrapping_add_signed(by);
                *value_bytes = value_bytes.wrapping_sub(by as u32);
            }
        },
        Packing::Index { key_bytes, .. } => shift(key_bytes),
        Packing::States { parts, .. } => match parts.first_mut() {
            Some(StatePart::Channels { rows, parts, channels_first, element_bytes, .. }) => {
                match by.rem_euclid(4) {
                    0 => shift(rows),
                    1 => parts.reverse(),
                    2 => *channels_first = true,
                    _ => shift(element_bytes),
                }
            }
            _ => parts.reverse(),
        },
        _ => {}
    }
}

/// A pool with one group of keys and values, indexer rows or states.
fn description(order: Order, kind: usize, layers: u64, blocks: u64, pad: u64) -> (Pool, Pages) {
    let (heads, states, content_bytes, packing) = match kind {
        0 => {
            let (key_bytes, value_bytes, dtype) = (4, 4, Dtype::Bfloat16);
            (2, 4, 8, Packing::KeyValue { total_heads: 2, key_bytes, value_bytes, dtype })
        }
        1 => (1, 4, 6, Packing::Index { key_bytes: 4, scale_bytes: 2, format: "fp8".into() }),
        _ => {
            let conv = StatePart::Channels {
                rows: 2,
                parts: vec![4, 2],
                element_bytes: 2,
                channels_first: false,
                format: "bfloat16".into(),
            };
            let ssm = StatePart::Heads { total: 2, bytes: 8, format: "float32".into() };
            (1, 1, 40, Packing::States { parts: vec![conv, ssm], replicated: false })
        }
    };
    let dense = u64::from(heads) * u64::from(states) * u64::from(content_bytes);
    let torn = matches!(order, Order::Lhbnc | Order::Bhlnc) && heads > 1;
    let page_bytes = dense + if torn { 0 } else { pad };
    let run = u64::from(states) * u64::from(content_bytes);
    let (layer_stride, block_stride) = match order {
        Order::Lbnhc | Order::Lbhnc => (blocks * page_bytes, page_bytes),
        Order::Lhbnc => (blocks * page_bytes, if torn { run } else { page_bytes }),
        Order::Blhnc | Order::Blnhc => (page_bytes, layers * page_bytes),
        Order::Bhlnc => (if torn { run } else { page_bytes }, layers * page_bytes),
    };
    let size = layers * blocks * page_bytes;
    let names = (0..layers).map(|layer| format!("layers.{layer}")).collect();
    let tensor = KvCacheTensor { size, offset: 0, layer_stride, block_stride, layers: names };
    let pool = Pool { order, num_blocks: blocks, memory_bytes: size, rank: Rank::ALONE };
    (pool, Pages { tensor, heads, states, content_bytes, page_bytes, kernel_blocks: 1, packing })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8000, ..ProptestConfig::default() })]

    /// vLLM's groups: what passes the checks and the canary in block 0 is right in every block.
    #[test]
    fn a_wrong_group_never_moves_a_byte(
        order in select(Order::ALL.to_vec()),
        (kind, layers, blocks, pad) in (0..3usize, 1..=3u64, 1..=3u64, prop_oneof![Just(0u64), 1..=8u64]),
        (field, by) in (0..16usize, prop_oneof![-40i64..=-1, 1i64..=40, Just(i64::MAX / 3)]),
    ) {
        let (pool, pages) = description(order, kind, layers, blocks, pad);
        let tokens = 4;
        let group = |pages| [Group { block_tokens: tokens, pages: vec![pages] }];
        let real = shards(pool, &group(pages.clone())).expect("vLLM's own numbers").remove(0);
        let (mut wrong_pool, mut wrong) = (pool, pages);
        mutate_group(&mut wrong_pool, &mut wrong, field, by);
        let Ok(mut wrong) = shards(wrong_pool, &group(wrong)) else { return Ok(()) };
        let wrong = wrong.remove(0);
        let mut memory = memory_of(pool.memory_bytes);
        let canary = write_canary(&real, &mut memory, 0, SEED);
        if read(&wrong, &memory, 0).is_none_or(|read| read != canary) {
            return Ok(());
        }
        // What is left may hold the same bytes under another name: then no transfer accepts it.
        if wrong.content() != real.content() {
            let refused = plan_between(std::slice::from_ref(&wrong), std::slice::from_ref(&real));
            let refused = matches!(refused, Err(Refusal::ContentDiffers { .. }));
            prop_assert!(refused, "two contents");
            return Ok(());
        }
        let real = meaning(&real);
        let wrong = meaning(&wrong);
        prop_assert!(wrong.len() <= real.len(), "blocks that do not exist: field {} by {}", field, by);
        prop_assert!(wrong == real[..wrong.len()], "field {} by {} of {:?} kind {}", field, by, order, kind);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    /// Any numbers at all: an answer, never a panic, and never an address outside the memory.
    #[test]
    fn hostile_groups_are_answered(
        order in select(Order::ALL.to_vec()),
        (kind, layers, blocks, pad) in (0..3usize, 1..=3u64, 1..=3u64, 0..=3u64),
        wild in proptest::collection::vec(
            (0..16usize, prop_oneof![any::<i64>(), -5i64..=5, Just(i64::MAX), Just(i64::MIN)]),
            1..5,
        ),
    ) {
        let (mut pool, mut pages) = description(order, kind, layers, blocks, pad);
        for (field, by) in wild {
            mutate_group(&mut pool, &mut pages, field, by);
        }
        let memory = pool.memory_bytes;
        let Ok(shards) = shards(pool, &[Group { block_tokens: 4, pages: vec![pages] }]) else { return Ok(()) };
        let shard = &shards[..1];
        let record = [shard[0].record().expect("a record")];
        let plan = plan_between(shard, &record).expect("a plan");
        for run in plan.runs(shard[0].num_blocks() - 1, 0).take(1000) {
            prop_assert!(run.src.checked_add(run.len).is_some_and(|end| end <= memory));
        }
    }

    /// Whatever pieces are accepted own their bytes: counted one by one.
    #[test]
    fn accepted_pieces_share_no_byte(
        pieces in proptest::collection::vec((0..40u64, [0..30u64, 0..30, 0..30, 0..30, 0..30]), 1..=3),
        (blocks, layers, states) in (1..=3u64, 1..=2u32, (1..=2u64, 1..=3u64)),
    ) {
        const MEMORY: u64 = 72;
        let planes = (0..pieces.len()).map(|part| pillion_layouts::Plane {
            role: pillion_layouts::Role::State(part as u8),
            heads: 2,
            states: (states.0 * states.1) as u32,
            bytes: 2,
            format: "fp8".into(),
            sharding: pillion_layouts::Sharding::SplitHeads,
        });
        let content = pillion_layouts::BlockContent::new(1, planes.collect()).expect("a content");
        let place = |(plane, (offset, [block, layer, head, outer, inner])): (usize, &(u64, [u64; 5]))| Piece {
            part: pillion_layouts::Part { plane, layers: (0..layers).collect(), heads: 0..2 },
            offset: *offset,
            blocks: *block,
            layers: *layer,
            heads: *head,
            states: vec![Dim { len: states.0, stride: *outer }, Dim { len: states.1, stride: *inner }],
        };
        let pieces: Vec<Piece> = pieces.iter().enumerate().map(place).collect();
        let memory = vec![Extent { start: 0, bytes: MEMORY }];
        let Ok(shard) = Shard::new(content, memory, blocks, pieces.clone()) else { return Ok(()) };
        let mut owned = [false; MEMORY as usize];
        for (plane, block, layer) in (0..pieces.len())
            .flat_map(|plane| (0..blocks).flat_map(move |block| (0..layers).map(move |at| (plane, block, at))))
        {
            for (head, state) in (0..2).flat_map(|head| (0..states.0 * states.1).map(move |at| (head, at as u32))) {
                let at = shard.address(plane, block, layer, head, state).expect("a held row") as usize;
                for byte in &mut owned[at..at + 2] {
                    prop_assert!(!std::mem::replace(byte, true), "a byte with two owners");
                }
            }
        }
    }
}

/// Two contents that differ in one word are never copied into each other.
#[test]
fn contents_that_differ_are_refused() {
    let of = |packing: Packing, heads, content_bytes| {
        let (pool, mut pages) = description(Order::Blhnc, 0, 2, 2, 0);
        pages.packing = packing;
        (pages.heads, pages.content_bytes) = (heads, content_bytes);
        shards(pool, &[Group { block_tokens: 4, pages: vec![pages] }]).expect("served").remove(0)
    };
    let dtype = |dtype| of(Packing::KeyValue { total_heads: 2, key_bytes: 4, value_bytes: 4, dtype }, 2, 8);
    let half = dtype(Dtype::Float16);
    for other in [
        dtype(Dtype::Bfloat16),
        of(Packing::OpaqueHeads { total_heads: 2, format: "cpu amx".into() }, 2, 8),
        of(Packing::KeyValue { total_heads: 2, key_bytes: 6, value_bytes: 2, dtype: Dtype::Float16 }, 2, 8),
    ] {
        let refusal = plan_between(std::slice::from_ref(&half), &[other]).expect_err("another content");
        assert!(matches!(refusal, Refusal::ContentDiffers { .. }), "{refusal}");
    }
    let amx = of(Packing::OpaqueHeads { total_heads: 2, format: "cpu amx".into() }, 2, 8);
    let neon = of(Packing::OpaqueHeads { total_heads: 2, format: "cpu neon".into() }, 2, 8);
    assert!(plan_between(std::slice::from_ref(&amx), &[neon]).is_err());
    assert!(plan_between(std::slice::from_ref(&amx), std::slice::from_ref(&amx)).is_ok());
}
