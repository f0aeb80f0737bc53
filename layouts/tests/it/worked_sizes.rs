//! Published sizes of pages and blocks, and what moving such a block costs.

use pillion_layouts::vllm::groups::{Group, Pages, Pool, shards};
use pillion_layouts::vllm::{KvCacheTensor, Packing};
use pillion_layouts::{Dtype, Order, Rank, Shard, plan_between};
use serde_json::Value;

/// A model's cache on one rank in an order, eight blocks.
fn shard(case: &Value, order: Order, rank: Rank) -> (u64, Shard) {
    let int = |key: &str| case[key].as_u64().unwrap_or(0) as u32;
    let (total_heads, states) = (int("heads"), int("tokens"));
    let heads = (total_heads / rank.size).max(1);
    let (content_bytes, packing) = if case["key"].is_u64() {
        let (key_bytes, value_bytes, dtype) = (int("key"), int("value"), Dtype::Bfloat16);
        (key_bytes + value_bytes, Packing::KeyValue { total_heads, key_bytes, value_bytes, dtype })
    } else if case["row"].is_u64() {
        (int("row"), Packing::Latent { format: "bytes".into() })
    } else if case["opaque"].is_u64() {
        (int("opaque"), Packing::OpaquePage { format: "bytes".into() })
    } else {
        let [key_bytes, scale_bytes] = [0, 1].map(|at| case["index"][at].as_u64().unwrap_or(0) as u32);
        (key_bytes + scale_bytes, Packing::Index { key_bytes, scale_bytes, format: "fp8".into() })
    };
    let dense = u64::from(heads) * u64::from(states) * u64::from(content_bytes);
    let padded = case["what"].as_str().is_some_and(|what| what.contains("padded"));
    let page_bytes = if padded { dense.next_multiple_of(576) } else { dense };
    let (layers, blocks) = (u64::from(int("layers")), 8);
    let (layer_stride, block_stride) = match order {
        Order::Blhnc | Order::Blnhc => (page_bytes, layers * page_bytes),
        _ => (blocks * page_bytes, page_bytes),
    };
    let size = layers * blocks * page_bytes;
    let names = (0..layers).map(|layer| format!("model.layers.{layer}.self_attn.attn")).collect();
    let tensor = KvCacheTensor { size, offset: 0, layer_stride, block_stride, layers: names };
    let pages = Pages { tensor, heads, states, content_bytes, page_bytes, kernel_blocks: 1, packing };
    let group = Group { block_tokens: states, pages: vec![pages] };
    let pool = Pool { order, num_blocks: blocks, memory_bytes: size, rank };
    (page_bytes, shards(pool, &[group]).expect("a published size").remove(0))
}

fn cases() -> Vec<Value> {
    serde_json::from_str(include_str!("../data/worked_sizes.json")).expect("golden data")
}

#[test]
fn published_sizes() {
    for case in cases() {
        let rank = Rank { index: 0, size: case["ranks"].as_u64().unwrap_or(1) as u32 };
        let (page, shard) = shard(&case, Order::Blhnc, rank);
        assert_eq!(case["page"], page, "{case}");
        assert_eq!(case["block"], shard.block_bytes(), "{case}");
        assert_eq!(shard.record().expect("a record").block_bytes(), shard.block_bytes());
    }
}

/// Copies and runs of one block of Llama-8B.
#[test]
fn what_a_transfer_costs() {
    let llama = &cases()[0];
    let rank = |index, size| Rank { index, size };
    let alone = |order| vec![shard(llama, order, Rank::ALONE).1];
    let eight = |order| (0..8).map(|index| shard(llama, order, rank(index, 8)).1).collect::<Vec<Shard>>();
    let records = |shards: &[Shard]| -> Vec<Shard> {
        shards.iter().map(|shard| shard.record().expect("a record")).collect()
    };
    let cost = |source: &[Shard], target: &[Shard]| {
        let plan = plan_between(source, target).expect("a plan");
        (plan.copies().len(), plan.runs(3, 0).count())
    };
    let (blhnc, lbnhc, lbhnc) = (alone(Order::Blhnc), alone(Order::Lbnhc), alone(Order::Lbhnc));
    assert_eq!(cost(&blhnc, &records(&blhnc)), (1, 1), "block-first is one run");
    assert_eq!(cost(&lbhnc, &records(&lbhnc)), (1, 32), "HND: a page each");
    assert_eq!(cost(&lbnhc, &records(&lbnhc)), (8, 32 * 8 * 16), "NHD: a token of a head each");
    assert_eq!(cost(&lbnhc, &lbhnc), (8, 32 * 8 * 16), "NHD to HND");
    assert_eq!(cost(&lbnhc, &lbnhc), (1, 32), "NHD to NHD");
    assert_eq!(cost(&eight(Order::Lbhnc), &lbhnc), (8, 8 * 32), "8 ranks to 1, HND");
    assert_eq!(cost(&lbhnc, &eight(Order::Lbhnc)), (8, 8 * 32), "1 rank to 8, HND");
    assert_eq!(cost(&eight(Order::Blhnc), &records(&blhnc)), (8, 8 * 32), "8 ranks to one record");
    assert_eq!(cost(&eight(Order::Lbnhc), &lbnhc), (8, 8 * 32 * 16), "8 ranks to 1, NHD");
    let mla = &cases()[4];
    let ranks: Vec<Shard> = (0..8).map(|index| shard(mla, Order::Blhnc, rank(index, 8)).1).collect();
    assert_eq!(cost(&ranks, &ranks[..1]), (1, 1), "MLA is the same on all ranks");
    let spread = plan_between(&ranks, &ranks).expect("a plan");
    assert!(spread.copies().iter().enumerate().all(|(at, copy)| (copy.from, copy.to) == (at, at)));
}
