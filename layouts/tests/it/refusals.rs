//! What is not covered is refused, with the reason.

use crate::worlds::{Engine, Setup, What};
use pillion_layouts::blade_kvt::{Pages, Shape, Tensor, Tensors, attention};
use pillion_layouts::sglang::{HostPool, PoolOrder};
use pillion_layouts::tensorrt_llm::{
    Buffer, LayerGroup, PageOrder, PrimaryPool, Region, layer_group, primary,
};
use pillion_layouts::vllm::groups::layer_number;
use pillion_layouts::{
    Attention, CanaryMismatch, Dtype, Order, Rank, Refusal, Shard, canary_check_record, canary_fill,
    plan_between, sglang,
};

fn keys(total_heads: u32) -> Attention {
    Attention::KeyValue { total_heads, head_bytes: 8, dtype: Dtype::Float16 }
}

fn latent() -> Attention {
    Attention::Latent { row_bytes: 16, format: "bfloat16".into() }
}

fn setup(heads: u32, index: u32, size: u32) -> Setup {
    Setup {
        what: What::Kv { heads, bytes: 2 },
        tokens: 6,
        blocks: 2,
        layers: vec![0, 1],
        rank: Rank { index, size },
        channels_first: false,
    }
}

fn vllm(setup: &Setup, kernel: u32) -> Shard {
    let engine = Engine::Vllm { order: Order::Lbhnc, align: 0, pad: 0, kernel };
    setup.world(&engine).expect("vLLM holds everything").shard
}

#[test]
fn kernel_blocks_that_do_not_divide_each_other() {
    let alone = setup(2, 0, 1);
    let refusal = plan_between(&[vllm(&alone, 2)], &[vllm(&alone, 3)]).expect_err("3 tokens against 2");
    assert!(matches!(refusal, Refusal::KernelBlocks { .. }), "{refusal}");
}

#[test]
fn a_rank_that_is_missing() {
    let half = vllm(&setup(2, 0, 2), 1);
    let whole = vllm(&setup(2, 0, 1), 1);
    let refusal =
        plan_between(std::slice::from_ref(&half), std::slice::from_ref(&whole)).expect_err("one of two");
    assert!(matches!(refusal, Refusal::NoSource { layer: 0, head: 1, .. }), "{refusal}");
    assert!(plan_between(&[whole], &[half]).is_ok());
    assert!(matches!(plan_between(&[], &[]), Err(Refusal::Zero { .. })));
}

#[test]
fn a_layer_that_is_missing() {
    let stage = Setup { layers: vec![1], ..setup(2, 0, 1) };
    let refusal =
        plan_between(&[vllm(&stage, 1)], &[vllm(&setup(2, 0, 1), 1)]).expect_err("one of two stages");
    assert!(matches!(refusal, Refusal::NoSource { layer: 0, head: 0, .. }), "{refusal}");
}

fn primary_pool() -> PrimaryPool {
    PrimaryPool {
        num_blocks: 2,
        layers: vec![0, 1],
        tokens_per_block: 4,
        attention: keys(2),
        order: PageOrder::Hnd,
        rank: Rank::ALONE,
        pools: 1,
        memory_bytes: 2 * 2 * 2 * 2 * 4 * 8,
    }
}

#[test]
fn tensorrt_llm_v1() {
    let refused = |change: fn(&mut PrimaryPool)| {
        let mut pool = primary_pool();
        change(&mut pool);
        primary(&pool).expect_err("not served")
    };
    assert!(primary(&primary_pool()).is_ok());
    assert!(matches!(refused(|pool| pool.pools = 2), Refusal::NotServed { .. }), "NVFP4 scales, DSA");
    assert!(matches!(refused(|pool| pool.num_blocks = 3), Refusal::Inconsistent { .. }));
    assert!(matches!(refused(|pool| pool.layers = vec![0, 0]), Refusal::HeldTwice { layer: 0, .. }));
    assert!(matches!(refused(|pool| pool.rank.size = 3), Refusal::Uneven { heads: 2, ranks: 3, .. }));
    assert!(matches!(refused(|pool| pool.rank.index = 1), Refusal::Rank { index: 1, size: 1 }));
    assert!(matches!(refused(|pool| pool.tokens_per_block = 0), Refusal::Zero { .. }));
    assert!(matches!(refused(|pool| pool.attention = keys(0)), Refusal::Zero { .. }));
    let odd = refused(|pool| {
        pool.attention = Attention::KeyValue { total_heads: 2, head_bytes: 7, dtype: Dtype::Float16 };
    });
    assert!(matches!(odd, Refusal::ElementSize { .. }));
}

#[test]
fn tensorrt_llm_v2() {
    let buffer = |role: &str, expansion| Buffer { layer: 0, role: role.into(), expansion };
    let group = |attention, buffers: Vec<Buffer>, size, stride| LayerGroup {
        tokens_per_block: 4,
        attention,
        index_page_bytes: None,
        order: PageOrder::Nhd,
        rank: Rank::ALONE,
        regions: vec![Region { base: 4096, size, stride, num_slots: 3, buffers }],
    };
    let both = vec![buffer("key", 1), buffer("value", 1)];
    assert!(layer_group(&group(keys(2), both.clone(), 128, 128)).is_ok());
    let refused = |group| layer_group(&group).expect_err("not served");
    let expanded = group(keys(2), vec![buffer("key", 2)], 64, 64);
    assert!(matches!(refused(expanded), Refusal::NotServed { .. }));
    assert!(matches!(refused(group(keys(2), both.clone(), 120, 128)), Refusal::Inconsistent { .. }));
    assert!(matches!(refused(group(keys(2), both.clone(), 128, 120)), Refusal::SharedBytes));
    assert!(matches!(refused(group(latent(), both, 128, 128)), Refusal::UnknownRole { .. }));
    let scales = group(keys(2), vec![buffer("key_scale", 1)], 64, 64);
    assert!(matches!(refused(scales), Refusal::UnknownRole { .. }));
    let twice = group(keys(2), vec![buffer("key", 1), buffer("key", 1)], 128, 128);
    assert!(matches!(refused(twice), Refusal::HeldTwice { .. }));
}

#[test]
fn sglang_and_blade_kvt() {
    let pool = HostPool {
        order: PoolOrder::PageHead,
        pages: 2,
        page_tokens: 4,
        layers: vec![0],
        attention: latent(),
        rank: Rank::ALONE,
        memory_bytes: 128,
    };
    assert!(matches!(sglang::shard(&pool), Err(Refusal::NotServed { .. })), "MLA has no heads");
    let tensors = Tensors {
        rank: Rank::ALONE,
        tensors: vec![Tensor { base: 0, layers: vec![0] }],
        num_blocks: 2,
        block_bytes: 64,
        tensor_bytes: 128,
    };
    let pages = Pages {
        shape: Shape::Ragged,
        block_tokens: 4,
        kernel_tokens: 4,
        pack: 1,
        token_bytes: 16,
        attention: latent(),
    };
    let refused = |change: fn(&mut Tensors, &mut Pages)| {
        let (mut tensors, mut pages) = (tensors.clone(), pages.clone());
        change(&mut tensors, &mut pages);
        attention(&tensors, &pages).expect_err("not served")
    };
    assert!(attention(&tensors, &pages).is_ok());
    assert!(matches!(refused(|_, pages| pages.shape = Shape::Flash), Refusal::NotServed { .. }));
    assert!(matches!(refused(|_, pages| pages.kernel_tokens = 3), Refusal::Inconsistent { .. }));
    assert!(matches!(refused(|_, pages| pages.token_bytes = 8), Refusal::Inconsistent { .. }));
    assert!(matches!(refused(|_, pages| pages.block_tokens = 8), Refusal::Inconsistent { .. }));
    assert!(matches!(refused(|_, pages| pages.pack = 2), Refusal::Inconsistent { .. }));
    assert!(matches!(refused(|tensors, _| tensors.num_blocks = 3), Refusal::Inconsistent { .. }));
}

#[test]
fn layers_by_number() {
    assert_eq!(layer_number("model.layers.17.self_attn.attn"), Ok(17));
    for name in ["model.attn", "layers.1.experts.2.attn", "", "model.layers.99999999999.attn"] {
        assert!(matches!(layer_number(name), Err(Refusal::LayerNumber { .. })), "{name}");
    }
}

/// A wrong byte of a record is named by what it is, not by where it is.
#[test]
fn the_canary_names_the_element() {
    let record = vllm(&setup(2, 1, 2), 1).record().expect("a record");
    let mut bytes = vec![0; record.block_bytes() as usize];
    canary_fill(5, &mut bytes);
    assert_eq!(canary_check_record(5, &record, &bytes), Ok(()));
    // Two layers of one head of six tokens, two bytes each of K and V: the last value's last byte.
    *bytes.last_mut().expect("bytes") ^= 1;
    let mismatch = canary_check_record(5, &record, &bytes).expect_err("a wrong byte");
    let text = mismatch.to_string();
    assert!(text.contains("in value of layer 1, head 1, state 5, byte 1"), "{text}");
    let short = canary_check_record(5, &record, &bytes[1..]);
    assert!(matches!(short, Err(CanaryMismatch::Length { expected: 48, got: 47 })));
}

/// A state that nobody can divide belongs to the rank that wrote it, of as many ranks.
#[test]
fn a_whole_state_stays_with_its_rank() {
    use pillion_layouts::vllm::StatePart;
    let of = |index, size| {
        let tensors = Tensors {
            rank: Rank { index, size },
            tensors: vec![Tensor { base: 0, layers: vec![0] }],
            num_blocks: 2,
            block_bytes: 24,
            tensor_bytes: 48,
        };
        let part = StatePart::Whole { bytes: 20, format: "somebody's state".into() };
        pillion_layouts::blade_kvt::state(&tensors, 16, &[part], false).expect("a state")
    };
    let two = [of(0, 2), of(1, 2)];
    let plan = plan_between(&two, &two).expect("rank by rank");
    let routes: Vec<_> = plan.copies().iter().map(|copy| (copy.from, copy.to)).collect();
    assert_eq!(routes, [(0, 0), (1, 1)]);
    let refusal = plan_between(&two, &[of(0, 1)]).expect_err("two states do not become one");
    assert!(matches!(refusal, Refusal::ContentDiffers { .. }), "{refusal}");
}

/// MLA with an indexer in V2: two regions, the indexer's pages opaque and the same on all ranks.
#[test]
fn tensorrt_llm_v2_with_an_indexer() {
    let of = |index, size| {
        let region = |base, size, role: &str, layers: u32| Region {
            base,
            size: size * u64::from(layers),
            stride: size * u64::from(layers) + 8,
            num_slots: 3,
            buffers: (0..layers).map(|layer| Buffer { layer, role: role.into(), expansion: 1 }).collect(),
        };
        let group = LayerGroup {
            tokens_per_block: 4,
            attention: latent(),
            index_page_bytes: Some(20),
            order: PageOrder::Hnd,
            rank: Rank { index, size },
            regions: vec![region(4096, 64, "key", 2), region(8192, 20, "index_key", 2)],
        };
        layer_group(&group).expect("a V2 group")
    };
    let (four, one) = ([0, 1, 2, 3].map(|index| of(index, 4)), of(0, 1));
    assert_eq!(one.block_bytes(), 2 * (64 + 20));
    assert_eq!(one.address(1, 2, 1, 0, 0), Some(8192 + 2 * 48 + 20));
    let plan = plan_between(&four, std::slice::from_ref(&one)).expect("one of four copies");
    let runs: Vec<_> = plan.runs(1, 2).map(|run| (run.from, run.src, run.dst, run.len)).collect();
    assert_eq!(runs, [(0, 8192 + 48, 8192 + 96, 40), (0, 4096 + 136, 4096 + 272, 128)]);
}

/// The last byte of the last block lies inside; one byte less memory, or one byte further, does not.
#[test]
fn memory_that_ends_too_early() {
    let shard = vllm(&setup(2, 0, 1), 2);
    let with = |less: u64, further: u64| {
        let mut memory = shard.memory().to_vec();
        // The test's pools have five bytes behind the tensors.
        memory[0].bytes -= 5 + less;
        let mut pieces = shard.pieces().to_vec();
        pieces.iter_mut().for_each(|piece| piece.offset += further);
        Shard::new(shard.content().clone(), memory, shard.num_blocks(), pieces)
    };
    assert!(with(0, 0).is_ok());
    assert!(matches!(with(1, 0), Err(Refusal::OutsideMemory { .. })));
    assert!(matches!(with(0, 1), Err(Refusal::OutsideMemory { .. })));
    assert!(matches!(with(0, u64::MAX / 2), Err(Refusal::Overflow { .. })));
}
