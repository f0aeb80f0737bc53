//! Random geometries in all six orders, simulated byte by byte and compared with the oracle.

use crate::oracle::{Geometry, KvCache, any_geometry, any_order, load, merged, save};
use pillion_layouts::{CheckedGroup, Dtype, Order, Refusal, Segment, canary_byte, canary_fill};
use proptest::prelude::*;

const SEED: u64 = 0x5eed_0000_1234;

/// Bytes that tell most places apart.
fn noise(bytes: u64) -> Vec<u8> {
    (0..bytes).map(|index| canary_byte(!SEED, index)).collect()
}

fn planned(cache: &KvCache) -> CheckedGroup {
    cache.check().expect("a description by vLLM's own formulas is served")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    /// Saving any block gives its logical tensor.
    #[test]
    fn a_saved_block_is_the_logical_tensor(geometry in any_geometry()) {
        let oracle = geometry.oracle();
        let group = planned(&oracle.cache);
        let plan = group.plan();
        prop_assert_eq!(plan.record_bytes(), geometry.record_bytes());
        let memory = noise(oracle.cache.memory_bytes);
        for block in 0..geometry.blocks {
            let logical: Vec<u8> =
                geometry.addresses(&oracle, block).into_iter().map(|at| memory[at as usize]).collect();
            prop_assert_eq!(save(plan, &memory, block), logical);
        }
    }

    /// Loading writes exactly the bytes of that block, each with its own value, and no other.
    #[test]
    fn a_loaded_block_changes_its_own_bytes_only(geometry in any_geometry(), pick in any::<prop::sample::Index>()) {
        let oracle = geometry.oracle();
        let group = planned(&oracle.cache);
        let plan = group.plan();
        let block = pick.index(geometry.blocks as usize) as u64;
        let record = noise(geometry.record_bytes());
        let mut memory = vec![0xEE; oracle.cache.memory_bytes as usize];
        let mut expected = memory.clone();
        for (at, byte) in geometry.addresses(&oracle, block).into_iter().zip(&record) {
            expected[at as usize] = *byte;
        }
        load(plan, &record, &mut memory, block);
        prop_assert!(memory == expected);
        prop_assert_eq!(save(plan, &memory, block), record);
    }

    /// The segments are what remains when all bytes that touch are joined: none could be longer.
    #[test]
    fn segments_are_maximal_and_in_record_order(geometry in any_geometry()) {
        let oracle = geometry.oracle();
        let group = planned(&oracle.cache);
        let plan = group.plan();
        for block in 0..geometry.blocks {
            let bytes = geometry.addresses(&oracle, block);
            let single = (0u64..).zip(bytes).map(|(record, engine)| Segment { engine, record, len: 1 });
            prop_assert_eq!(plan.segments(block).collect::<Vec<_>>(), merged(single));
        }
    }

    /// Cut into pieces, the runs are as long as they may be and say the same.
    #[test]
    fn cut_runs_say_the_same(geometry in any_geometry(), len in 1..=40u64) {
        let oracle = geometry.oracle();
        let group = planned(&oracle.cache);
        let cut = group.plan().cut(len);
        prop_assert_eq!(cut.record_bytes(), group.record_bytes());
        for block in 0..geometry.blocks {
            let runs: Vec<_> = cut.segments(block).collect();
            prop_assert_eq!(runs.len(), cut.runs());
            prop_assert!(runs.iter().all(|run| run.len <= len));
            let least: u64 = group.plan().segments(block).map(|run| run.len.div_ceil(len)).sum();
            prop_assert_eq!(runs.len() as u64, least);
            prop_assert_eq!(merged(runs), group.plan().segments(block).collect::<Vec<_>>());
        }
    }

    /// What one order stored, another order loads: the formats agree and the tensors do.
    #[test]
    fn orders_share_records(geometry in any_geometry(), other in any_order()) {
        let twin = Geometry { order: other, ..geometry.clone() };
        let (one, two) = (geometry.oracle(), twin.oracle());
        let (from, to) = (planned(&one.cache), planned(&two.cache));
        prop_assert_eq!(from.format(), to.format());
        let source = noise(one.cache.memory_bytes);
        let mut target = vec![0; two.cache.memory_bytes as usize];
        for block in 0..geometry.blocks {
            load(to.plan(), &save(from.plan(), &source, block), &mut target, block);
        }
        for block in 0..geometry.blocks {
            for (from, to) in geometry.addresses(&one, block).into_iter().zip(twin.addresses(&two, block)) {
                prop_assert_eq!(source[from as usize], target[to as usize]);
            }
        }
    }
}

/// One number or name of a description, changed.
#[derive(Debug, Clone)]
enum Mutation {
    Order(Order),
    Size(i64),
    Offset(usize, i64),
    LayerStride(usize, i64),
    BlockStride(usize, i64),
    AllBlockStrides(i64),
    NumBlocks(i64),
    MemoryBytes(i64),
    PageBytes(i64),
    Heads(i64),
    States(i64),
    Content(i64),
    SwapHeadsAndStates,
    DropLayer(usize),
    DropTensor(usize),
    SwapTensors,
}

fn any_mutation() -> impl Strategy<Value = Mutation> {
    let by = || prop_oneof![-64i64..=-1, 1i64..=64, Just(i64::MIN / 2), Just(i64::MAX / 2)];
    let tensor = || 0..3usize;
    prop_oneof![
        any_order().prop_map(Mutation::Order),
        by().prop_map(Mutation::Size),
        (tensor(), by()).prop_map(|(at, by)| Mutation::Offset(at, by)),
        (tensor(), by()).prop_map(|(at, by)| Mutation::LayerStride(at, by)),
        (tensor(), by()).prop_map(|(at, by)| Mutation::BlockStride(at, by)),
        by().prop_map(Mutation::AllBlockStrides),
        by().prop_map(Mutation::NumBlocks),
        by().prop_map(Mutation::MemoryBytes),
        by().prop_map(Mutation::PageBytes),
        by().prop_map(Mutation::Heads),
        by().prop_map(Mutation::States),
        by().prop_map(Mutation::Content),
        Just(Mutation::SwapHeadsAndStates),
        tensor().prop_map(Mutation::DropLayer),
        tensor().prop_map(Mutation::DropTensor),
        Just(Mutation::SwapTensors),
    ]
}

fn shift(value: &mut u64, by: i64) {
    *value = value.wrapping_add_signed(by);
}

fn shift32(value: &mut u32, by: i64) {
    *value = (*value).wrapping_add_signed(by as i32);
}

fn mutated(cache: &KvCache, mutation: &Mutation) -> KvCache {
    let mut cache = cache.clone();
    let count = cache.tensors.len();
    let tensors = &mut cache.tensors;
    match *mutation {
        Mutation::Order(order) => cache.order = order.to_string(),
        Mutation::Size(by) => tensors.iter_mut().for_each(|tensor| shift(&mut tensor.size, by)),
        Mutation::Offset(at, by) => shift(&mut tensors[at % count].offset, by),
        Mutation::LayerStride(at, by) => shift(&mut tensors[at % count].layer_stride, by),
        Mutation::BlockStride(at, by) => shift(&mut tensors[at % count].block_stride, by),
        Mutation::AllBlockStrides(by) => {
            tensors.iter_mut().for_each(|tensor| shift(&mut tensor.block_stride, by))
        }
        Mutation::NumBlocks(by) => shift(&mut cache.num_blocks, by),
        Mutation::MemoryBytes(by) => shift(&mut cache.memory_bytes, by),
        Mutation::PageBytes(by) => shift(&mut cache.page_bytes, by),
        Mutation::Heads(by) => shift32(&mut cache.heads, by),
        Mutation::States(by) => shift32(&mut cache.states, by),
        Mutation::Content(by) => shift32(&mut cache.content_bytes, by),
        Mutation::SwapHeadsAndStates => std::mem::swap(&mut cache.heads, &mut cache.states),
        Mutation::DropLayer(at) => {
            tensors[at % count].layers.pop();
        }
        Mutation::DropTensor(at) => {
            tensors.remove(at % count);
        }
        Mutation::SwapTensors => tensors.reverse(),
    }
    cache
}

/// The shim's part: block 0 of the *real* cache, written with the engine's own indexing.
fn write_canary(geometry: &Geometry, memory: &mut [u8]) {
    let mut record = vec![0; geometry.record_bytes() as usize];
    canary_fill(SEED, &mut record);
    for (at, byte) in geometry.addresses(&geometry.oracle(), 0).into_iter().zip(record) {
        memory[at as usize] = byte;
    }
}

/// The sidecar's part: false if reading block 0 by this description would not give the canary.
fn canary_sees_it(group: &CheckedGroup, memory: &[u8]) -> bool {
    let plan = group.plan();
    plan.segments(0).all(|run| run.engine + run.len <= memory.len() as u64)
        && group.canary_check(SEED, &save(plan, memory, 0)).is_ok()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    /// A wrong description is refused, or caught by the canary, or it was not wrong: every block it
    /// names has every byte where the real one has it.
    #[test]
    fn a_wrong_description_never_moves_a_byte(geometry in any_geometry(), mutation in any_mutation()) {
        let oracle = geometry.oracle();
        let Ok(group) = mutated(&oracle.cache, &mutation).check() else { return Ok(()) };
        let plan = group.plan();
        let mut memory = noise(oracle.cache.memory_bytes);
        write_canary(&geometry, &mut memory);
        if !canary_sees_it(&group, &memory) {
            return Ok(());
        }
        prop_assert!(plan.record_bytes() == geometry.record_bytes(), "another record passed: {mutation:?}");
        prop_assert!(plan.num_blocks() <= geometry.blocks, "blocks that do not exist: {mutation:?}");
        for block in 0..plan.num_blocks() {
            let real = (0u64..).zip(geometry.addresses(&oracle, block));
            let real = merged(real.map(|(record, engine)| Segment { engine, record, len: 1 }));
            prop_assert_eq!(plan.segments(block).collect::<Vec<_>>(), real, "{:?}", mutation);
        }
    }

    /// Any numbers at all: an answer, never a panic, and never an address outside the memory.
    #[test]
    fn hostile_numbers_are_answered(
        geometry in any_geometry(),
        wild in proptest::collection::vec((0..10usize, prop_oneof![any::<u64>(), 0..5u64, Just(u64::MAX)]), 1..6),
    ) {
        let mut cache = geometry.oracle().cache;
        for (field, value) in wild {
            let tensor = &mut cache.tensors[0];
            match field {
                0 => tensor.size = value,
                1 => tensor.offset = value,
                2 => tensor.layer_stride = value,
                3 => tensor.block_stride = value,
                4 => cache.num_blocks = value,
                5 => cache.heads = value as u32,
                6 => (cache.states, cache.block_tokens) = (value as u32, value as u32),
                7 => cache.content_bytes = value as u32,
                8 => cache.memory_bytes = value,
                _ => cache.page_bytes = value,
            }
        }
        if let Ok(group) = cache.check() {
            let plan = group.plan();
            for run in plan.segments(plan.num_blocks() - 1).take(1000) {
                prop_assert!(run.engine.checked_add(run.len).is_some_and(|end| end <= cache.memory_bytes));
            }
        }
    }

    /// A single changed byte is found, at its coordinates.
    #[test]
    fn the_canary_names_the_place(geometry in any_geometry(), seed in any::<u64>(), pick in any::<prop::sample::Index>()) {
        let group = planned(&geometry.oracle().cache);
        let mut record = vec![0; geometry.record_bytes() as usize];
        canary_fill(seed, &mut record);
        prop_assert_eq!(group.canary_check(seed, &record), Ok(()));
        let at = pick.index(record.len());
        prop_assert_eq!(record[at], canary_byte(seed, at as u64));
        record[at] ^= 0x40;
        let (layer, head, state) = geometry.cells().nth(at / geometry.content as usize).expect("a cell");
        let mismatch = group.canary_check(seed, &record).expect_err("a changed byte");
        let expected = pillion_layouts::CanaryMismatch::Byte {
            layer: format!("layers.{layer}.attn"),
            head,
            state,
            byte: at as u64 % geometry.content,
            expected: record[at] ^ 0x40,
            got: record[at],
        };
        prop_assert_eq!(mismatch, expected);
    }
}

/// The mutations above do reach the checks: for a cache without slack, each is refused by name.
#[test]
fn refusals_name_what_is_wrong() {
    let geometry = Geometry {
        order: Order::Blhnc,
        tensors: vec![2, 1],
        blocks: 4,
        heads: 2,
        states: 3,
        content: 8,
        dtype: Dtype::Float32,
        align: 0,
        tail: 48,
    };
    let cache = geometry.oracle().cache;
    let refused = |mutation| mutated(&cache, &mutation).check().expect_err("a wrong description");
    assert!(matches!(refused(Mutation::Size(48)), Refusal::AllocationSize { .. }));
    assert!(matches!(refused(Mutation::Offset(1, 8)), Refusal::Stride { what: "offset", tensor: 1, .. }));
    assert!(matches!(refused(Mutation::LayerStride(0, 8)), Refusal::Stride { what: "layer stride", .. }));
    assert!(matches!(refused(Mutation::AllBlockStrides(-8)), Refusal::BlockStride { .. }));
    assert!(matches!(refused(Mutation::AllBlockStrides(8)), Refusal::AllocationSize { .. }));
    assert!(matches!(refused(Mutation::BlockStride(1, 8)), Refusal::Stride { tensor: 1, .. }));
    assert!(matches!(refused(Mutation::NumBlocks(1)), Refusal::AllocationSize { .. }));
    assert!(matches!(refused(Mutation::MemoryBytes(-49)), Refusal::OutsideMemory { .. }));
    assert!(matches!(refused(Mutation::PageBytes(16)), Refusal::Stride { what: "layer stride", .. }));
    assert!(matches!(refused(Mutation::SwapHeadsAndStates), Refusal::StatesPerBlock { .. }));
    assert!(matches!(refused(Mutation::DropTensor(1)), Refusal::UnclaimedPage { unclaimed: 48, .. }));
}
