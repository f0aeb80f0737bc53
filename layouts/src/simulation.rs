//! Layouts that no engine declares today: regions at random strides, checked by counting bytes.
//!
//! vLLM's descriptions are so strict that most of the general checks never fire for them; the next
//! engine's will.

use proptest::collection::vec;
use proptest::prelude::*;

use crate::layout::{Content, Dim, Layout, Region};
use crate::plan::{Segment, plan};
use crate::refusal::Refusal;
use crate::shape::{Dtype, Kind, LogicalShape, Sharding};

const MEMORY: u64 = 192;

/// Layers, offset, and strides of layers, blocks, heads and states.
type Place = (u64, u64, [u64; 4]);

fn layout_of(
    places: &[Place],
    blocks: u64,
    heads: u32,
    states: u32,
    content: u32,
) -> Result<Layout, Refusal> {
    let layers = places.iter().map(|place| place.0).sum::<u64>() as u32;
    let what = Content {
        shape: LogicalShape { layers, heads, states, content_bytes: content },
        block_tokens: states,
        dtype: Dtype::Fp8,
        kind: Kind::FullAttention,
        sharding: Sharding::SplitHeads,
        layers: (0..layers).map(|layer| layer.to_string()).collect(),
    };
    let mut first_layer = 0;
    let regions = places.iter().map(|&(count, offset, [layer, block, head, state])| {
        first_layer += count as u32;
        Region {
            first_layer: first_layer - count as u32,
            offset,
            layers: Dim { len: count, stride: layer },
            blocks: Dim { len: blocks, stride: block },
            heads: Dim { len: heads.into(), stride: head },
            states: Dim { len: states.into(), stride: state },
            content_bytes: content.into(),
            element_bytes: 1,
            sharding: Sharding::SplitHeads,
        }
    });
    Layout::new(what, MEMORY, regions.collect())
}

/// Addresses of every byte of a block in record order, by the definition of a region.
fn bytes_of(places: &[Place], block: u64, heads: u32, states: u32, content: u32) -> Vec<u64> {
    let mut out = Vec::new();
    for &(count, offset, [layer, step, head, state]) in places {
        for l in 0..count {
            for (h, n) in (0..heads).flat_map(|h| (0..states).map(move |n| (u64::from(h), u64::from(n)))) {
                let at = offset + l * layer + block * step + h * head + n * state;
                out.extend(at..at + u64::from(content));
            }
        }
    }
    out
}

/// Strides that are often dense, so that many layouts are accepted.
fn any_place(same: bool) -> impl Strategy<Value = Place> {
    let stride = || prop_oneof![1..=8u64, proptest::sample::select(vec![0, 12, 16, 18, 24, 32, 48, 64])];
    let block = if same { Just(48).boxed() } else { stride().boxed() };
    (1..=2u64, 0..=96u64, stride(), block, stride(), stride())
        .prop_map(|(count, offset, layer, block, head, state)| (count, offset, [layer, block, head, state]))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    /// Whatever is accepted owns each of its bytes once, inside the memory, and its plan says the
    /// same as its addresses.
    #[test]
    fn accepted_layouts_own_their_bytes(
        places in prop_oneof![vec(any_place(true), 1..=3), vec(any_place(false), 1..=2)],
        (blocks, heads, states, content) in (1..=3u64, 1..=2u32, 1..=3u32, 1..=3u32),
    ) {
        let Ok(layout) = layout_of(&places, blocks, heads, states, content) else { return Ok(()) };
        let mut owned = [false; MEMORY as usize];
        for block in 0..blocks {
            for at in bytes_of(&places, block, heads, states, content) {
                prop_assert!(at < MEMORY && !owned[at as usize], "byte {at} outside or owned twice");
                owned[at as usize] = true;
            }
        }
        let plan = match plan(&layout) {
            Ok(plan) => plan,
            Err(refusal) => {
                let mixed = matches!(refusal, Refusal::MixedBlockStrides { .. });
                prop_assert!(mixed && places.iter().any(|place| place.2[1] != places[0].2[1]));
                return Ok(());
            }
        };
        for block in 0..blocks {
            let moved = plan.segments(block).flat_map(|Segment { engine, record, len }| {
                (0..len).map(move |byte| (record + byte, engine + byte))
            });
            let real = (0u64..).zip(bytes_of(&places, block, heads, states, content));
            prop_assert_eq!(moved.collect::<Vec<_>>(), real.collect::<Vec<_>>());
        }
    }
}

/// One head of two states of 4 bytes, two blocks: the smallest layouts that differ in one point.
fn small(places: &[Place]) -> Result<Layout, Refusal> {
    layout_of(places, 2, 1, 2, 4)
}

#[test]
fn regions_lie_apart_or_beside_each_other() {
    let apart = [(1, 0, [0, 8, 8, 4]), (1, 16, [0, 8, 8, 4])];
    let beside = [(1, 0, [0, 16, 8, 4]), (1, 8, [0, 16, 8, 4])];
    assert!(small(&apart).is_ok() && small(&beside).is_ok());
    // In any order of the layers.
    assert!(small(&[apart[1], apart[0]]).is_ok() && small(&[beside[1], beside[0]]).is_ok());

    let overlap = Err(Refusal::Overlap { first: 0, second: 1 });
    assert_eq!(small(&[(1, 0, [0, 8, 8, 4]), (1, 15, [0, 8, 8, 4])]), overlap);
    assert_eq!(small(&[(1, 0, [0, 15, 8, 4]), (1, 8, [0, 15, 8, 4])]), overlap);
    assert_eq!(small(&[(1, 0, [0, 16, 8, 4]), (1, 8, [0, 24, 8, 4])]), overlap);
    assert_eq!(small(&[(1, 0, [0, 16, 8, 4]), (1, 7, [0, 16, 8, 4])]), overlap);
}

#[test]
fn a_region_does_not_overlap_itself() {
    let own = Err(Refusal::Overlap { first: 0, second: 0 });
    assert_eq!(small(&[(1, 0, [0, 8, 8, 3])]), own, "states");
    assert_eq!(small(&[(1, 0, [0, 7, 8, 4])]), own, "blocks");
    assert_eq!(small(&[(2, 0, [4, 16, 8, 4])]), own, "layers");
    assert_eq!(small(&[(2, 0, [0, 16, 8, 4])]), own, "a stride of nothing");
}

#[test]
fn the_last_byte_must_be_inside() {
    assert!(small(&[(1, MEMORY - 16, [0, 8, 8, 4])]).is_ok());
    let beyond = small(&[(1, MEMORY - 15, [0, 8, 8, 4])]);
    assert_eq!(beyond, Err(Refusal::OutsideMemory { region: 0, end: MEMORY + 1, memory_bytes: MEMORY }));
    for far in [(1, u64::MAX, [0, 8, 8, 4]), (1, 0, [0, u64::MAX, 8, 4]), (2, 0, [u64::MAX / 2, 8, 8, 4])] {
        assert!(small(&[far]).is_err(), "{far:?}");
    }
}

#[test]
fn tensors_that_step_differently_are_not_planned() {
    let layout = small(&[(1, 0, [0, 8, 8, 4]), (1, 16, [0, 12, 8, 4])]).expect("disjoint");
    let refusal = plan(&layout).expect_err("two strides");
    assert_eq!(refusal, Refusal::MixedBlockStrides { region: 1, expected: 8, got: 12 });
}

/// Copies of neighbours become one only where the second continues the first exactly.
#[test]
fn copies_merge_only_when_they_continue() {
    let copies = |places: &[Place]| {
        let layout = small(places).expect("disjoint");
        plan(&layout).expect("a plan").copies().iter().map(|copy| (copy.count, copy.len)).collect::<Vec<_>>()
    };
    // Two layers 48 apart, then two more.
    assert_eq!(copies(&[(2, 0, [48, 8, 8, 4]), (2, 96, [48, 8, 8, 4])]), [(4, 8)], "in step");
    assert_eq!(copies(&[(2, 0, [48, 8, 8, 4]), (2, 100, [48, 8, 8, 4])]), [(2, 8), (2, 8)], "late");
    assert_eq!(copies(&[(2, 0, [48, 8, 8, 4]), (2, 96, [40, 8, 8, 4])]), [(2, 8), (2, 8)], "slower");
    assert_eq!(copies(&[(1, 96, [0, 8, 8, 4]), (1, 0, [0, 8, 8, 4])]), [(1, 8), (1, 8)], "backwards");
}

#[test]
fn sharding_has_a_stable_name() {
    let parts = Sharding::SplitChannels { parts: vec![8, 4, 4] };
    let names = [Sharding::SplitHeads, Sharding::Replicated, parts, Sharding::WholeState];
    let names = names.map(|sharding| sharding.to_string());
    assert_eq!(names, ["split_heads", "replicated", "split_channels[8, 4, 4]", "whole_state"]);
}
