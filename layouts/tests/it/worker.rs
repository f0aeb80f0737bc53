//! What a worker registers: several groups of one pool, their canaries, formats and bounds.

use std::collections::BTreeMap;

use crate::oracle::merged;
use crate::vllm_golden::{int, pages};
use pillion_layouts::vllm::groups::{Group, Pages, Pool, shards};
use pillion_layouts::vllm::{KvCacheTensor, Packing};
use pillion_layouts::{
    BlockPlan, CanaryMismatch, CheckedGroup, GROUPS_MAX, Order, Rank, Refusal, Segment, Worker, canary_byte,
    plan_between,
};
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::Value;

fn golden() -> Vec<Value> {
    let cases: Value = serde_json::from_str(include_str!("../data/vllm_layouts.json")).expect("golden data");
    let cases = cases.as_array().expect("a list").clone();
    let served = |case: &Value| {
        // Head slots of nvfp4 keep data and scales apart: no order but two leaves that in one piece.
        let torn = case["model"] == "nvfp4" && case["order"] != "LBHNC" && case["order"] != "BLHNC"
            || case["model"] == "full and mamba" && case["order"] == "LHBNC";
        !case["refused"].is_string() && !torn
    };
    cases.into_iter().filter(served).collect()
}

/// The worker of a golden case, and its tensors by group.
fn worker_of(case: &Value) -> (Worker, Vec<Vec<&Value>>) {
    let mut groups: BTreeMap<u64, Vec<&Value>> = BTreeMap::new();
    let tensors = case["tensors"].as_array().expect("tensors");
    tensors.iter().for_each(|tensor| groups.entry(int(tensor, "group")).or_default().push(tensor));
    let tokens = int(case, "block_tokens") as u32;
    let group = |tensors: &Vec<&Value>| Group {
        block_tokens: tokens,
        pages: tensors.iter().map(|tensor| pages(case, tensor)).collect(),
    };
    let worker = Worker {
        order: case["order"].as_str().expect("an order").to_owned(),
        num_blocks: int(case, "num_blocks"),
        memory_bytes: int(&tensors[0], "size"),
        rank: 0,
        world: 1,
        groups: groups.values().map(group).collect(),
    };
    (worker, groups.into_values().collect())
}

/// The shim's part: block 0 of a group, through the views that vLLM made.
fn write_by_views(case: &Value, tensors: &[&Value], seed: u64, memory: &mut [u8]) {
    let ratio = int(case, "kernel_blocks");
    let mut stream = 0;
    for tensor in tensors {
        let [heads, states, content] = ["heads", "states", "content"].map(|key| int(tensor, key));
        for view in tensor["views"].as_array().expect("views") {
            let [start, b, h, n] = [0, 1, 2, 3].map(|at| view[at].as_u64().expect("a stride"));
            for (head, state) in (0..heads).flat_map(|head| (0..states).map(move |state| (head, state))) {
                let (row, inside) = (state / (states / ratio), state % (states / ratio));
                let at = start + row * b + head * h + inside * n;
                for byte in 0..content {
                    memory[(at + byte) as usize] = canary_byte(seed, stream + byte);
                }
                stream += content;
            }
        }
    }
}

fn read(plan: &BlockPlan, memory: &[u8], block: u64) -> Option<Vec<u8>> {
    let mut record = vec![0; plan.record_bytes() as usize];
    for Segment { engine, record: to, len } in plan.segments(block) {
        let bytes = memory.get(engine as usize..(engine + len) as usize)?;
        record[to as usize..(to + len) as usize].copy_from_slice(bytes);
    }
    Some(record)
}

#[test]
fn canaries_that_vllm_wrote_are_found_group_after_group() {
    for case in golden() {
        let (worker, tensors) = worker_of(&case);
        let groups = worker.check().unwrap_or_else(|refusal| panic!("{refusal}: {case}"));
        let mut memory = vec![0xEE; worker.memory_bytes as usize];
        for (seed, (group, tensors)) in (7..).zip(groups.iter().zip(&tensors)) {
            write_by_views(&case, tensors, seed, &mut memory);
            let record = read(group.plan(), &memory, 0).expect("inside");
            assert_eq!(group.canary_check(seed, &record), Ok(()), "{case}");
            assert!(group.canary_check(seed + 1, &record).is_err());
        }
        if let [first, _] = groups.as_slice() {
            let record = read(first.plan(), &memory, 0).expect("inside");
            assert!(first.canary_check(7, &record).is_err(), "the second group's is there: {case}");
        }
    }
}

/// A block id is owned by one group at a time, so a byte may belong to one block id only, whatever the group.
#[test]
fn no_byte_belongs_to_two_blocks() {
    for case in golden() {
        let (worker, _) = worker_of(&case);
        let mut owner = vec![None; worker.memory_bytes as usize];
        for group in worker.check().expect("served") {
            for block in 0..worker.num_blocks {
                for run in group.plan().segments(block) {
                    for byte in &mut owner[run.engine as usize..(run.engine + run.len) as usize] {
                        assert!(byte.is_none_or(|before| before == block), "{case}");
                        *byte = Some(block);
                    }
                }
            }
        }
    }
    for order in [Order::Lbnhc, Order::Lbhnc] {
        let mut worker = hybrid(order, 2, 2);
        let second = &mut worker.groups[1].pages[0];
        (second.page_bytes, second.tensor.block_stride, second.tensor.layer_stride) = (40, 40, 80);
        let refusal = worker.check().expect_err("pages of 64 and of 40 bytes");
        assert!(matches!(refusal, Refusal::NotServed { .. }), "{refusal}");
    }
}

/// In all blocks the flat runs are those of the shards, joined where they touch, and cover the record.
#[test]
fn flat_plans_say_what_the_shards_say() {
    let mut steps_differ = 0;
    for case in golden() {
        let (worker, _) = worker_of(&case);
        let groups = worker.check().expect("served");
        let pool = Pool {
            order: worker.order.parse().expect("an order"),
            num_blocks: worker.num_blocks,
            memory_bytes: worker.memory_bytes,
            rank: Rank::ALONE,
        };
        for (group, shard) in groups.iter().zip(shards(pool, &worker.groups).expect("served")) {
            let strides: std::collections::BTreeSet<_> =
                shard.pieces().iter().map(|piece| piece.blocks).collect();
            steps_differ += usize::from(strides.len() > 1);
            let record = shard.record().expect("a record");
            let between =
                plan_between(std::slice::from_ref(&shard), std::slice::from_ref(&record)).expect("a plan");
            for block in 0..worker.num_blocks {
                let run =
                    |run: pillion_layouts::Run| Segment { engine: run.src, record: run.dst, len: run.len };
                let mut runs: Vec<Segment> = between.runs(block, 0).map(run).collect();
                runs.sort_by_key(|run| run.record);
                let flat: Vec<Segment> = group.plan().segments(block).collect();
                assert_eq!(merged(flat.clone()), merged(runs), "{case}");
                let mut at = 0;
                for run in flat {
                    assert_eq!(run.record, at);
                    at += run.len;
                }
                assert_eq!(at, group.record_bytes());
            }
        }
    }
    assert!(steps_differ > 0, "a group whose tensors step differently was looked at");
}

/// An attention group and one of states on the same blocks, as hybrid models have them.
fn hybrid(order: Order, layers: u64, blocks: u64) -> Worker {
    const PAGE: u64 = 64;
    let (layer_stride, block_stride) = match order.is_block_outermost() {
        true => (PAGE, layers * PAGE),
        false => (blocks * PAGE, PAGE),
    };
    let pages = |name: &str, (heads, states, content_bytes), packing: &str| Pages {
        tensor: KvCacheTensor {
            size: layers * blocks * PAGE,
            offset: 0,
            layer_stride,
            block_stride,
            layers: (0..layers).map(|layer| format!("layers.{layer}.{name}")).collect(),
        },
        heads,
        states,
        content_bytes,
        page_bytes: PAGE,
        kernel_blocks: 1,
        packing: packing.parse().expect("a packing"),
    };
    let attention = pages("attn", (2, 4, 8), "kv total_heads=2 key=4 value=4 dtype=bfloat16");
    let state = pages("mixer", (1, 1, 40), "states replicated=0 whole:bytes=40,format=mamba2");
    Worker {
        order: order.to_string(),
        num_blocks: blocks,
        memory_bytes: layers * blocks * PAGE,
        rank: 0,
        world: 1,
        groups: vec![
            Group { block_tokens: 4, pages: vec![attention] },
            Group { block_tokens: 4, pages: vec![state] },
        ],
    }
}

/// The address of a byte of a page by the order alone, for [`hybrid`].
fn address(worker: &Worker, group: usize, block: u64, layer: u64, head: u64, state: u64) -> u64 {
    let order: Order = worker.order.parse().expect("an order");
    let pages = &worker.groups[group].pages[0];
    let (content, states) = (u64::from(pages.content_bytes), u64::from(pages.states));
    let (h, n) = match order {
        Order::Lbnhc | Order::Blnhc => (content, content * u64::from(pages.heads)),
        _ => (states * content, content),
    };
    let tensor = &pages.tensor;
    tensor.offset + layer * tensor.layer_stride + block * tensor.block_stride + head * h + state * n
}

/// Orders whose pages are in one piece: the only ones of groups with different pages.
const COMPACT: [Order; 4] = [Order::Lbnhc, Order::Lbhnc, Order::Blhnc, Order::Blnhc];

fn write_canary(worker: &Worker, group: usize, seed: u64, memory: &mut [u8]) {
    let pages = &worker.groups[group].pages[0];
    let (mut stream, content) = (0, u64::from(pages.content_bytes));
    for layer in 0..pages.tensor.layers.len() as u64 {
        for head in 0..u64::from(pages.heads) {
            for state in 0..u64::from(pages.states) {
                let at = address(worker, group, 0, layer, head, state);
                for byte in 0..content {
                    memory[(at + byte) as usize] = canary_byte(seed, stream + byte);
                }
                stream += content;
            }
        }
    }
}

/// One number or name of a description, changed.
fn mutate(worker: &mut Worker, group: usize, field: usize, by: i64) {
    let shift = |value: &mut u64| *value = value.wrapping_add_signed(by);
    let shift32 = |value: &mut u32| *value = value.wrapping_add_signed(by as i32);
    if field >= 17 {
        match field {
            17 => shift(&mut worker.num_blocks),
            18 => shift(&mut worker.memory_bytes),
            19 => shift32(&mut worker.world),
            20 => worker.order = Order::ALL[by.rem_euclid(6) as usize].to_string(),
            _ => {
                worker.groups.remove(group);
            }
        }
        return;
    }
    let pages = &mut worker.groups[group].pages[0];
    match field {
        0 => shift(&mut pages.tensor.offset),
        1 => shift(&mut pages.tensor.layer_stride),
        2 => shift(&mut pages.tensor.block_stride),
        3 => shift(&mut pages.tensor.size),
        4 => shift(&mut pages.page_bytes),
        5 => shift32(&mut pages.heads),
        6 => shift32(&mut pages.states),
        7 => shift32(&mut pages.content_bytes),
        8 => shift32(&mut pages.kernel_blocks),
        9 => std::mem::swap(&mut pages.heads, &mut pages.states),
        10 => {
            pages.tensor.layers.pop();
        }
        11 => pages.tensor.layers.reverse(),
        12 => pages.tensor.layers[0].push('x'),
        13 => shift32(&mut worker.groups[group].block_tokens),
        14 => worker.groups[group].pages.clear(),
        15 => pages.packing = "opaque-heads total_heads=2 format=cpu".parse().expect("a packing"),
        _ => match &mut pages.packing {
            Packing::KeyValue { key_bytes, value_bytes, .. } => {
                (*key_bytes, *value_bytes) =
                    (key_bytes.wrapping_add_signed(by as i32), value_bytes.wrapping_sub(by as u32));
            }
            other => *other = "states replicated=1 whole:bytes=40,format=mamba2".parse().expect("a packing"),
        },
    }
}

const SEED: u64 = 0xC0FFEE;

proptest! {
    #![proptest_config(ProptestConfig { cases: 8000, ..ProptestConfig::default() })]

    /// Whatever is changed: refused, or some group's canary is not found, or no record is taken for what it is
    /// not: a group with the real format has every byte where the real one has it.
    #[test]
    fn a_wrong_worker_never_moves_a_byte(
        order in select(COMPACT.to_vec()),
        (layers, blocks) in (1..=3u64, 1..=3u64),
        (group, field) in (0..2usize, 0..22usize),
        by in prop_oneof![-40i64..=-1, 1i64..=40, Just(i64::MAX / 3)],
    ) {
        let real = hybrid(order, layers, blocks);
        let right: Vec<CheckedGroup> = real.check().expect("vLLM's own numbers");
        let mut wrong = real.clone();
        mutate(&mut wrong, group, field, by);
        let Ok(checked) = wrong.check() else { return Ok(()) };
        let mut memory = vec![0xEE; real.memory_bytes as usize];
        let mut proved = true;
        for (index, group) in checked.iter().enumerate() {
            write_canary(&real, index.min(real.groups.len() - 1), SEED, &mut memory);
            let record = read(group.plan(), &memory, 0);
            proved &= record.is_some_and(|record| group.canary_check(SEED, &record).is_ok());
        }
        if !proved || checked.len() != right.len() {
            return Ok(());
        }
        for (one, other) in checked.iter().zip(&right) {
            prop_assert!(one.plan().num_blocks() <= other.plan().num_blocks(), "blocks that do not exist");
            if one.format() != other.format() {
                continue;
            }
            for block in 0..one.plan().num_blocks() {
                let (one, other) = (one.plan().segments(block), other.plan().segments(block));
                prop_assert_eq!(one.collect::<Vec<_>>(), other.collect::<Vec<_>>(), "field {} by {}", field, by);
            }
        }
    }

    /// Any numbers at all: an answer, never a panic, and never an address outside the memory.
    #[test]
    fn hostile_workers_are_answered(
        order in select(COMPACT.to_vec()),
        (layers, blocks) in (1..=3u64, 1..=3u64),
        wild in proptest::collection::vec(
            (0..2usize, 0..21usize, prop_oneof![any::<i64>(), -5i64..=5, Just(i64::MAX), Just(i64::MIN)]),
            1..5,
        ),
    ) {
        let mut worker = hybrid(order, layers, blocks);
        for (group, field, by) in wild {
            if worker.groups[group].pages.is_empty() || worker.groups[group].pages[0].tensor.layers.is_empty() {
                break;
            }
            mutate(&mut worker, group, field, by);
        }
        let Ok(groups) = worker.check() else { return Ok(()) };
        for group in &groups {
            prop_assert!(group.format().len() <= 1 << 16);
            for run in group.plan().segments(group.plan().num_blocks() - 1).take(1000) {
                prop_assert!(run.engine.checked_add(run.len).is_some_and(|end| end <= worker.memory_bytes));
            }
            let _ = group.canary_check(SEED, &vec![0; group.record_bytes() as usize]);
        }
    }

    /// A changed byte is found, at its place in the page that the engine sees.
    #[test]
    fn a_changed_byte_is_named(order in select(COMPACT.to_vec()), layers in 1..=3u64, at in any::<prop::sample::Index>()) {
        let worker = hybrid(order, layers, 2);
        let groups = worker.check().expect("served");
        let mut memory = vec![0xEE; worker.memory_bytes as usize];
        write_canary(&worker, 0, SEED, &mut memory);
        let index = at.index((layers * 64) as usize) as u64;
        let (layer, head, state, byte) = (index / 64, index % 64 / 32, index % 32 / 8, index % 8);
        memory[(address(&worker, 0, 0, layer, head, state) + byte) as usize] ^= 0x10;
        let record = read(groups[0].plan(), &memory, 0).expect("inside");
        let named = match groups[0].canary_check(SEED, &record) {
            Err(CanaryMismatch::Byte { layer, head, state, byte, expected, got }) => {
                prop_assert_eq!(expected, got ^ 0x10);
                (layer, head, state, byte)
            }
            other => panic!("{other:?}"),
        };
        prop_assert_eq!(named, (format!("layers.{layer}.attn"), head, state, byte));
    }
}

#[test]
fn what_a_record_holds_is_its_format() {
    let worker = hybrid(Order::Blhnc, 2, 2);
    let groups = worker.check().expect("served");
    assert_eq!(
        [groups[0].format(), groups[1].format()],
        [
            "pillion-record/2 block_tokens=4 key[heads=0..2/2 states=4 bytes=4 format=bfloat16 split_heads \
             layers=0..2,] value[heads=0..2/2 states=4 bytes=4 format=bfloat16 split_heads layers=0..2,] \
             names=[layers.0.attn,layers.1.attn,]",
            "pillion-record/2 block_tokens=4 state0[heads=0..1/1 states=1 bytes=40 format=mamba2 whole_state \
             layers=0..2,] names=[layers.0.mixer,layers.1.mixer,]",
        ]
    );
    assert_eq!([groups[0].record_bytes(), groups[1].record_bytes()], [128, 80], "padding is not stored");
    // The order of memory is not part of it, nor how many blocks there are.
    for order in COMPACT {
        let other = hybrid(order, 2, 3).check().expect("served");
        assert_eq!([other[0].format(), other[1].format()], [groups[0].format(), groups[1].format()]);
    }
    // Everything else is.
    let changes: [fn(&mut Worker); 8] = [
        |w| {
            w.groups[0].pages[0].packing =
                "kv total_heads=2 key=4 value=4 dtype=float16".parse().expect("one")
        },
        |w| {
            w.groups[0].pages[0].packing =
                "kv total_heads=2 key=6 value=2 dtype=bfloat16".parse().expect("one")
        },
        |w| w.groups[0].pages[0].packing = "opaque-heads total_heads=2 format=a".parse().expect("one"),
        |w| w.groups[0].pages[0].packing = "opaque-heads total_heads=2 format=b".parse().expect("one"),
        |w| w.groups[0].pages[0].tensor.layers.reverse(),
        |w| w.groups[0].pages[0].tensor.layers[1].push(','),
        |w| {
            (w.rank, w.world) = (0, 2);
            w.groups[0].pages[0].packing =
                "kv total_heads=4 key=4 value=4 dtype=bfloat16".parse().expect("one");
        },
        |w| {
            (w.rank, w.world) = (1, 2);
            w.groups[0].pages[0].packing =
                "kv total_heads=4 key=4 value=4 dtype=bfloat16".parse().expect("one");
        },
    ];
    let mut formats = vec![groups[0].format().to_owned()];
    for change in changes {
        let mut worker = hybrid(Order::Blhnc, 2, 2);
        change(&mut worker);
        let format = worker.check().expect("served")[0].format().to_owned();
        assert!(!formats.contains(&format), "{format}");
        formats.push(format);
    }
    // A long format is not cut short.
    let of = |last: char| {
        let mut worker = hybrid(Order::Blhnc, 1, 1);
        let name = "x".repeat(80);
        worker.groups[0].pages[0].packing =
            format!("opaque-heads total_heads=2 format={name}{last}").parse().expect("one");
        worker.check().expect("served")[0].format().to_owned()
    };
    assert_ne!(of('a'), of('b'));
}

/// A rank of an engine that divides four heads among `world` ranks.
fn rank_of(rank: u32, world: u32, order: Order, packing: &str) -> Worker {
    let mut worker = hybrid(order, 2, 3);
    worker.groups.truncate(1);
    let pages = &mut worker.groups[0].pages[0];
    pages.heads = (4 / world).max(1);
    pages.page_bytes = u64::from(pages.heads) * 4 * 8;
    pages.packing = packing.parse().expect("a packing");
    let (layers, page) = (2, pages.page_bytes);
    let tensor = &mut pages.tensor;
    tensor.size = layers * 3 * page;
    (tensor.layer_stride, tensor.block_stride) =
        if order.is_block_outermost() { (page, layers * page) } else { (3 * page, page) };
    (worker.rank, worker.world, worker.memory_bytes) = (rank, world, tensor.size);
    worker
}

#[test]
fn another_ranks_records_are_described_as_that_rank_does() {
    let packings =
        ["kv total_heads=4 key=4 value=4 dtype=bfloat16", "opaque-heads total_heads=4 format=CPU_ATTN/vec16"];
    for (packing, (ours, theirs)) in packings.iter().flat_map(|packing| {
        let sizes = [1u32, 2, 4, 8];
        sizes.into_iter().flat_map(move |ours| sizes.map(move |theirs| (*packing, (ours, theirs))))
    }) {
        for rank in 0..ours {
            let own = rank_of(rank, ours, Order::Lbhnc, packing).check().expect("served").remove(0);
            for index in 0..theirs {
                let writer = rank_of(index, theirs, Order::Blhnc, packing).check();
                let writer = writer.expect("served").remove(0);
                // Whose heads overlap: with eight ranks, pairs of them hold the same one.
                let part = |rank: u32, size: u32| (rank * 8 / size)..((rank + 1) * 8 / size);
                let heads = |rank, size| {
                    let part = part(rank, size);
                    (part.start / 2)..part.end.div_ceil(2)
                };
                let (mine, their) = (heads(rank, ours), heads(index, theirs));
                let common = mine.end.min(their.end).saturating_sub(mine.start.max(their.start));
                match own.other_shard(Rank { index, size: theirs }) {
                    Ok(other) => {
                        assert_eq!(
                            (other.format(), other.record_bytes()),
                            (writer.format(), writer.record_bytes())
                        );
                        let bytes: u64 = other.plan().segments(1).map(|run| run.len).sum();
                        assert_eq!(bytes, u64::from(common) * 2 * 4 * 8, "{rank}/{ours} of {index}/{theirs}");
                        assert_eq!(other.plan() == own.plan(), mine == their);
                    }
                    Err(refusal) => {
                        assert!(matches!(refusal, Refusal::NotServed { .. }), "{refusal}");
                        assert_eq!(common, 0, "{rank}/{ours} of {index}/{theirs}");
                    }
                }
            }
        }
    }
    let groups = hybrid(Order::Blhnc, 2, 2).check().expect("served");
    let refusal = groups[1].other_shard(Rank { index: 0, size: 2 }).expect_err("a state is its rank's alone");
    assert!(matches!(refusal, Refusal::Uneven { .. }), "{refusal}");
    let refusal = groups[0].other_shard(Rank { index: 0, size: 3 }).expect_err("two heads for three ranks");
    assert!(matches!(refusal, Refusal::Uneven { .. }), "{refusal}");
    let refusal = groups[0].other_shard(Rank { index: 2, size: 2 }).expect_err("no such rank");
    assert!(matches!(refusal, Refusal::Rank { .. }), "{refusal}");
}

#[test]
fn what_is_too_much_is_refused() {
    let refused = |change: fn(&mut Worker)| {
        let mut worker = hybrid(Order::Lbhnc, 1, 1);
        change(&mut worker);
        worker.check().expect_err("too much")
    };
    let too_much = |refusal: &Refusal, what: &str| match refusal {
        Refusal::TooMuch { what: found, limit, got } => found.contains(what) && got > limit,
        _ => false,
    };
    let refusal = refused(|w| w.groups = vec![w.groups[0].clone(); GROUPS_MAX + 1]);
    assert!(too_much(&refusal, "groups"), "{refusal}");
    let refusal =
        refused(|w| w.groups[0].pages[0].tensor.layers = (0..=1 << 16).map(|at| at.to_string()).collect());
    assert!(too_much(&refusal, "layers"), "{refusal}");
    let refusal = refused(|w| w.groups[0].pages[0].tensor.layers = vec!["x".repeat(1025)]);
    assert!(too_much(&refusal, "name"), "{refusal}");
    let refusal = refused(|w| w.groups[1].pages[0].tensor.layers[0] = "layers.0.attn".into());
    assert!(matches!(refusal, Refusal::DuplicateLayer { .. }), "{refusal}");
    let refusal = refused(|w| w.groups[1].pages[0].tensor.layers[0].clear());
    assert!(matches!(refusal, Refusal::UnnamedLayer { index: 1 }), "{refusal}");
    let refusal = refused(|w| (w.rank, w.world) = (2, 2));
    assert!(matches!(refusal, Refusal::Rank { index: 2, size: 2 }), "{refusal}");
    let refusal = refused(|w| w.groups[0].block_tokens = 8);
    assert!(matches!(refusal, Refusal::StatesPerBlock { states: 4, block_tokens: 8 }), "{refusal}");
    let refusal = refused(|w| w.groups.clear());
    assert!(matches!(refusal, Refusal::Zero { what: "tensors" }), "{refusal}");

    // One layer of one block, [H, N, C], in an order whose record is in one piece or in many.
    let one = |order: Order, heads: u32, states: u32, content_bytes: u32, names: usize| {
        let page = u64::from(heads) * u64::from(states) * u64::from(content_bytes);
        let size = page * names as u64;
        let half = content_bytes / 2;
        let pages = Pages {
            tensor: KvCacheTensor {
                size,
                offset: 0,
                layer_stride: page,
                block_stride: if order.is_block_outermost() { size } else { page },
                layers: (0..names).map(|at| format!("{at}.{}", "x".repeat(1000))).collect(),
            },
            heads,
            states,
            content_bytes,
            page_bytes: page,
            kernel_blocks: 1,
            packing: format!("kv total_heads={heads} key={half} value={half} dtype=fp8")
                .parse()
                .expect("one"),
        };
        let groups = vec![Group { block_tokens: states, pages: vec![pages] }];
        Worker { order: order.to_string(), num_blocks: 1, memory_bytes: size, rank: 0, world: 1, groups }
    };
    assert!(one(Order::Blhnc, 1 << 10, 1 << 10, 1 << 10, 1).check().is_ok(), "1 GiB");
    let refusal = one(Order::Blhnc, 1 << 10, 1 << 10, (1 << 10) + 2, 1).check().expect_err("more");
    assert!(too_much(&refusal, "bytes of a block"), "{refusal}");
    assert_eq!(one(Order::Blnhc, 1 << 10, 1 << 10, 4, 1).check().expect("served")[0].plan().runs(), 1 << 20);
    let refusal = one(Order::Blnhc, 1 << 10, (1 << 10) + 1, 4, 1).check().expect_err("too many runs");
    assert!(too_much(&refusal, "runs of a block"), "{refusal}");
    let refusal = one(Order::Blhnc, 1 << 11, (1 << 11) + 1, 2, 1).check().expect_err("too many cells");
    assert!(too_much(&refusal, "cells"), "{refusal}");
    assert!(one(Order::Blhnc, 1, 1, 2, 64).check().is_ok());
    let refusal = one(Order::Blhnc, 1, 1, 2, 66).check().expect_err("66 names of 1000 bytes");
    assert!(too_much(&refusal, "description"), "{refusal}");

    // Each of five groups has 2^20 runs.
    let mut many = one(Order::Blnhc, 1 << 10, 1 << 10, 4, 1);
    let group = |at: u32| {
        let mut group = many.groups[0].clone();
        group.pages[0].tensor.layers[0] = at.to_string();
        group
    };
    many.groups = (0..5).map(group).collect();
    let refusal = many.check().expect_err("too many runs in all");
    assert!(too_much(&refusal, "in all groups"), "{refusal}");
}

/// Layers of one group with pages of their own: not served, and said so.
#[test]
fn layers_of_a_group_are_alike() {
    let mut worker = hybrid(Order::Lbhnc, 1, 2);
    let mut second = worker.groups[0].pages[0].clone();
    second.tensor.layers[0].push('2');
    second.tensor.offset = 128;
    second.packing = "kv total_heads=2 key=6 value=2 dtype=bfloat16".parse().expect("a packing");
    worker.groups.truncate(1);
    worker.groups[0].pages.push(second);
    for pages in &mut worker.groups[0].pages {
        pages.tensor.size = 256;
    }
    worker.memory_bytes = 256;
    let refusal = worker.check().expect_err("two shapes of keys");
    assert!(matches!(refusal, Refusal::NotServed { .. }), "{refusal}");
}

/// Layers without a number, or with one that another has too, are told apart by their place.
#[test]
fn layers_need_no_numbers() {
    let mut worker = hybrid(Order::Lbhnc, 2, 2);
    worker.groups[0].pages[0].tensor.layers = vec!["encoder.0.attn".into(), "decoder.0.attn".into()];
    worker.groups[1].pages[0].tensor.layers = vec!["a".into(), "b.1.2".into()];
    let groups = worker.check().expect("served");
    assert!(groups[0].format().ends_with("names=[encoder.0.attn,decoder.0.attn,]"));
}
