//! Blade-KVT's published formulas: `tests/data/blade_kvt.py` writes them out for one full block.

use std::collections::BTreeMap;

use pillion_layouts::blade_kvt::{Pages, Shape, Tensor, Tensors, attention, indexer, sparse_mla, state};
use pillion_layouts::vllm::StatePart;
use pillion_layouts::{Attention, Dtype, Rank, Shard, plan_between};
use serde_json::Value;

fn int(case: &Value, key: &str) -> u64 {
    case[key].as_u64().unwrap_or_else(|| panic!("{key} of {case}"))
}

fn or(case: &Value, key: &str, other: u64) -> u64 {
    case[key].as_u64().unwrap_or(other)
}

/// The sides of a transfer: ranks, blocks and kernel tokens.
struct Side {
    ranks: u32,
    blocks: u64,
    kernel: u32,
}

fn tensors(rank: Rank, bases: &[u64], pack: u64, blocks: u64, block_bytes: u64) -> Tensors {
    let layers = |at: usize| (0..pack as u32).map(|layer| at as u32 * pack as u32 + layer).collect();
    Tensors {
        rank,
        tensors: (0..).zip(bases).map(|(at, base)| Tensor { base: *base, layers: layers(at) }).collect(),
        num_blocks: blocks,
        block_bytes,
        tensor_bytes: blocks * block_bytes,
    }
}

fn keys_and_values(case: &Value, side: &Side, rank: Rank, shape: Shape) -> Shard {
    let (heads, head_bytes) = (int(case, "heads") as u32, int(case, "head_bytes") as u32);
    let (tokens, pack) = (int(case, "tokens"), or(case, "pack", 1));
    let token_bytes = 2 * u64::from(heads / rank.size * head_bytes);
    let block_bytes = token_bytes * tokens * pack + or(case, "pad", 0);
    let pages = Pages {
        shape,
        block_tokens: tokens as u32,
        kernel_tokens: side.kernel,
        pack: pack as u32,
        token_bytes,
        attention: Attention::KeyValue { total_heads: heads, head_bytes, dtype: Dtype::Fp8 },
    };
    attention(&tensors(rank, &[0], pack, side.blocks, block_bytes), &pages).expect("a shape of Blade-KVT")
}

fn shard(case: &Value, side: &Side, rank: Rank) -> Shard {
    let tokens = int(case, "tokens") as u32;
    let pad = or(case, "pad", 0);
    let row = |key: &str| int(case, key) as u32;
    let rows = |row: u32, base: u64, pad: u64| {
        tensors(rank, &[base], 1, side.blocks, u64::from(row) * u64::from(tokens) + pad)
    };
    match case["shape"].as_str().expect("a shape") {
        "ragged" => keys_and_values(case, side, rank, Shape::Ragged),
        "flash" => keys_and_values(case, side, rank, Shape::Flash),
        "hybrid" | "turboquant" => keys_and_values(case, side, rank, Shape::KernelFlash),
        "flashinfer" | "hybrid_hnd" => keys_and_values(case, side, rank, Shape::KernelHnd),
        "rows" => {
            let pages = Pages {
                shape: Shape::Ragged,
                block_tokens: tokens,
                kernel_tokens: tokens,
                pack: 1,
                token_bytes: row("row").into(),
                attention: Attention::Latent { row_bytes: row("row"), format: "bfloat16".into() },
            };
            attention(&rows(row("row"), 0, pad), &pages).expect("rows of MLA")
        }
        "indexer" => indexer(&rows(row("row"), 0, pad), row("row"), tokens, "fp8").expect("an indexer"),
        "sparse_mla" => {
            let index = rows(row("index_row"), int(case, "index_base"), 0);
            let mla = rows(row("row"), 0, 0);
            sparse_mla((&index, row("index_row")), (&mla, row("row")), tokens, "fp8").expect("two tensors")
        }
        "state" => {
            let parts = case["parts"].as_array().expect("parts").iter();
            let parts: Vec<u32> = parts.map(|part| part.as_u64().expect("channels") as u32).collect();
            let ranks = u64::from(rank.size);
            let channels = u64::from(parts.iter().sum::<u32>()) / ranks;
            let conv = channels * int(case, "rows") * int(case, "element");
            let ssm = int(case, "heads") / ranks * int(case, "head_bytes");
            let parts = [
                StatePart::Channels {
                    rows: row("rows"),
                    parts,
                    element_bytes: row("element"),
                    channels_first: case["channels_first"].as_bool().expect("an order"),
                    format: "bfloat16".into(),
                },
                StatePart::Heads { total: row("heads"), bytes: row("head_bytes"), format: "float32".into() },
            ];
            let tensors = tensors(rank, &[0], 1, side.blocks, conv + ssm + pad);
            state(&tensors, tokens, &parts, false).expect("a linear state")
        }
        other => panic!("shape {other}"),
    }
}

type Runs = BTreeMap<(i64, i64), Vec<[u64; 3]>>;

/// Runs of every pair of ranks, by source, those that touch joined.
fn joined(runs: impl Iterator<Item = (i64, i64, [u64; 3])>) -> Runs {
    let mut out = Runs::new();
    runs.for_each(|(from, to, run)| out.entry((from, to)).or_default().push(run));
    for runs in out.values_mut() {
        runs.sort_unstable();
        let mut whole: Vec<[u64; 3]> = Vec::new();
        for &[src, dst, len] in runs.iter() {
            match whole.last_mut() {
                Some(last) if last[0] + last[2] == src && last[1] + last[2] == dst => last[2] += len,
                _ => whole.push([src, dst, len]),
            }
        }
        *runs = whole;
    }
    out
}

#[test]
fn the_eight_shapes_of_blade_kvt() {
    let cases: Value = serde_json::from_str(include_str!("../data/blade_kvt.json")).expect("golden data");
    let cases = cases.as_array().expect("a list");
    let mut numbers = std::collections::BTreeSet::new();
    for case in cases {
        numbers.insert(int(case, "number"));
        let side = |ranks: &str, blocks: &str, kernel: &str| Side {
            ranks: int(case, ranks) as u32,
            blocks: int(case, blocks),
            kernel: or(case, kernel, int(case, "tokens")) as u32,
        };
        let shards = |side: Side| {
            let ranks = 0..side.ranks;
            let shard = |index| shard(case, &side, Rank { index, size: side.ranks });
            ranks.map(shard).collect::<Vec<Shard>>()
        };
        let source = shards(side("p", "src_blocks", "p_kernel"));
        let target = shards(side("d", "dst_blocks", "d_kernel"));
        let plan = plan_between(&source, &target).expect("a plan");
        let records = case["records"].as_array().expect("records").iter().map(|record| {
            let number = |at: usize| record[at].as_i64().expect("a number");
            (number(0), number(1), [2, 3, 4].map(|at| number(at) as u64))
        });
        let expected = joined(records);
        let any = expected.keys().any(|(from, _)| *from == -1);
        let runs = plan
            .runs(int(case, "src"), int(case, "dst"))
            .map(|run| (if any { -1 } else { run.from as i64 }, run.to as i64, [run.src, run.dst, run.len]));
        assert_eq!(joined(runs), expected, "{case}");
    }
    assert_eq!(numbers.into_iter().collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(cases.len(), 92);
}
