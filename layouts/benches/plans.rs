//! What plans cost: descriptors and runs per block, nanoseconds to make a plan, to walk a block's
//! runs, and to move a block's bytes on this host.
//!
//! usage: cargo bench -p pillion-layouts

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use pillion_layouts::vllm::groups::{Group, Pages, Pool, shards};
use pillion_layouts::vllm::{KvCacheTensor, Packing};
use pillion_layouts::{Dtype, Order, Plan, Rank, Shard, plan_between};

const BLOCKS: u64 = 4;

fn shard(order: Order, rank: Rank, layers: u64, (heads, states, content): (u32, u32, u32)) -> Shard {
    let local = (heads / rank.size).max(1);
    let page_bytes = u64::from(local) * u64::from(states) * u64::from(content);
    let (layer_stride, block_stride) = match order.is_block_outermost() {
        true => (page_bytes, layers * page_bytes),
        false => (BLOCKS * page_bytes, page_bytes),
    };
    let size = layers * BLOCKS * page_bytes;
    let names = (0..layers).map(|layer| format!("model.layers.{layer}.self_attn.attn")).collect();
    let half = content / 2;
    let packing = match heads {
        1 => Packing::Latent { format: "bfloat16".into() },
        _ => Packing::KeyValue {
            total_heads: heads,
            key_bytes: half,
            value_bytes: half,
            dtype: Dtype::Bfloat16,
        },
    };
    let pages = Pages {
        tensor: KvCacheTensor { size, offset: 0, layer_stride, block_stride, layers: names },
        heads: local,
        states,
        content_bytes: content,
        page_bytes,
        kernel_blocks: 1,
        packing,
    };
    let group = Group { block_tokens: states, pages: vec![pages] };
    let pool = Pool { order, num_blocks: BLOCKS, memory_bytes: size, rank };
    shards(pool, &[group]).expect("a published geometry").remove(0)
}

/// Name, source and destination.
fn cases() -> Vec<(&'static str, Vec<Shard>, Vec<Shard>)> {
    let llama = |order, rank| shard(order, rank, 32, (8, 16, 512));
    let alone = |order| vec![llama(order, Rank::ALONE)];
    let eight = |order| (0..8).map(|index| llama(order, Rank { index, size: 8 })).collect::<Vec<_>>();
    let record = |of: &[Shard]| of.iter().map(|shard| shard.record().expect("a record")).collect::<Vec<_>>();
    let mla = vec![shard(Order::Blhnc, Rank::ALONE, 61, (1, 64, 1152))];
    let mla_layers = vec![shard(Order::Lbnhc, Rank::ALONE, 61, (1, 64, 1152))];
    let block_first = alone(Order::Blhnc);
    vec![
        ("identity, 2 MiB block first", block_first.clone(), record(&block_first)),
        ("LBNHC, 32 layers, to record", alone(Order::Lbnhc), record(&block_first)),
        ("record to LBNHC, 32 layers", record(&block_first), alone(Order::Lbnhc)),
        ("TP 8 to 1, BLHNC", eight(Order::Blhnc), block_first.clone()),
        ("TP 1 to 8, BLHNC", block_first.clone(), eight(Order::Blhnc)),
        ("NHD to HND", alone(Order::Lbnhc), alone(Order::Lbhnc)),
        ("HND to NHD", alone(Order::Lbhnc), alone(Order::Lbnhc)),
        ("MLA, block first, to record", mla.clone(), record(&mla)),
        ("MLA, layer first, to record", mla_layers, record(&mla)),
    ]
}

fn memory(shards: &[Shard]) -> Vec<Vec<u8>> {
    let end = |shard: &Shard| shard.memory().iter().map(|extent| extent.start + extent.bytes).max();
    shards.iter().map(|shard| vec![1; end(shard).unwrap_or(0) as usize]).collect()
}

fn walk(plan: &Plan, src: u64) -> u64 {
    plan.runs(black_box(src), 0).map(|run| run.src ^ run.dst ^ run.len).fold(0, u64::wrapping_add)
}

fn bench(criterion: &mut Criterion) {
    let cases = cases();
    println!("{:<30} {:>11} {:>11} {:>13} {:>10}", "per block", "bytes", "descriptors", "runs", "run bytes");
    for (name, source, target) in &cases {
        let plan = plan_between(source, target).expect("a plan");
        let (runs, bytes) = (plan.runs(0, 0).count() as u64, plan.bytes());
        println!("{name:<30} {bytes:>11} {:>11} {runs:>13} {:>10}", plan.copies().len(), bytes / runs);
    }
    let mut group = criterion.benchmark_group("plan");
    for (name, source, target) in &cases {
        let id = BenchmarkId::from_parameter(name);
        group.bench_function(id, |bencher| bencher.iter(|| plan_between(black_box(source), target)));
    }
    group.finish();
    let mut group = criterion.benchmark_group("walk a block");
    for (name, source, target) in &cases {
        let plan = plan_between(source, target).expect("a plan");
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| bencher.iter(|| walk(&plan, 0)));
    }
    group.finish();
    let mut group = criterion.benchmark_group("move a block");
    for (name, source, target) in &cases {
        let plan = plan_between(source, target).expect("a plan");
        let (from, mut to) = (memory(source), memory(target));
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter(|| {
                for run in plan.runs(black_box(0), 0) {
                    let (src, dst, len) = (run.src as usize, run.dst as usize, run.len as usize);
                    to[run.to][dst..dst + len].copy_from_slice(&from[run.from][src..src + len]);
                }
            })
        });
    }
    group.finish();
}

criterion_group! {
    name = plans;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_millis(400));
    targets = bench
}
criterion_main!(plans);
