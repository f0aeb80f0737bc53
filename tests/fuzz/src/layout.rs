//! What workers say of their memory: packings as text, layouts as numbers.

use pillion_layouts::{
    BlockPlan, CheckedGroup, FORMAT_BYTES_MAX, Order, RECORD_BYTES_MAX, Rank, Worker,
    vllm::{
        KvCacheTensor, Packing,
        groups::{Group, Pages},
    },
};

use crate::cursor::Cursor;

/// Runs of a block up to which all of them are looked at.
const RUNS_MAX: usize = 1 << 12;
/// Cells of a block up to which a layout is checked at all: larger ones cost seconds and say nothing else.
const CELLS_MAX: u64 = 1 << 14;

/// A text that is a packing is the one text of that packing.
pub fn packing(data: &[u8]) {
    let data = &data[..data.len().min(4096)];
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(packing) = text.parse::<Packing>() {
        assert_eq!(packing.to_string(), text);
    }
}

fn page_packing(c: &mut Cursor<'_>, heads: u32, content: u32, states: u32, world: u32) -> String {
    let total = heads * world;
    let half = content / 2;
    match c.below(10) {
        0 => format!("kv-scaled total_heads={total} key={half} value={} format=int8", content - half),
        1 => format!("kv-planes total_heads={} head={content} dtype=fp8", world),
        2 => format!("latent format=m{}", c.byte() % 3),
        3 => format!("opaque-page format=p{}", c.byte() % 3),
        4 => format!("opaque-heads total_heads={total} format=x"),
        5 => format!("index key={half} scale={} format=fp8", content - half),
        6 => format!("states replicated=1 whole:bytes={},format=a", content * states),
        7 if c.rarely() => c.text(60),
        _ => format!("kv total_heads={total} key={half} value={} dtype=fp8", content - half),
    }
}

/// A number that follows from the others, or what the input says instead.
fn or(c: &mut Cursor<'_>, right: u64) -> u64 {
    match c.byte() {
        250 => right.wrapping_add(c.number()),
        251 => right.wrapping_sub(c.number()),
        252 => right.wrapping_mul(c.number()),
        253.. => c.number(),
        _ => right,
    }
}

fn or32(c: &mut Cursor<'_>, right: u32) -> u32 {
    let other = or(c, right.into());
    u32::try_from(other).unwrap_or(other as u32)
}

fn pages(c: &mut Cursor<'_>, world: u32, name: &mut u32) -> Pages {
    let (heads, states, content) = (1 + c.below(4) as u32, 1 << c.below(5), 1 << (1 + c.below(6)));
    let packing = page_packing(c, heads, content, states, world);
    let layers = (0..1 + c.below(3)).map(|_| {
        // The same one twice, now and then.
        *name += u32::from(!c.rarely());
        format!("model.layers.{name}")
    });
    let layers = layers.collect();
    let dense = u64::from(heads) * u64::from(states) * u64::from(content);
    let padding = if c.rarely() { c.number() } else { 0 };
    let kernel_blocks = if c.rarely() { c.number32() } else { 1 };
    let wanted = packing.parse();
    Pages {
        tensor: KvCacheTensor { size: 0, offset: 0, layer_stride: 0, block_stride: 0, layers },
        heads: or32(c, heads),
        states: or32(c, states),
        content_bytes: or32(c, content),
        page_bytes: dense.saturating_add(padding),
        kernel_blocks,
        packing: wanted.unwrap_or(Packing::Latent { format: "other".into() }),
    }
}

/// Fills in what follows from the pages: strides, offsets, sizes.
fn place(c: &mut Cursor<'_>, order: Order, num_blocks: u64, groups: &mut [Group]) -> u64 {
    let all = |group: &Group| -> u64 {
        let bytes = |pages: &Pages| pages.page_bytes.wrapping_mul(pages.tensor.layers.len() as u64);
        group.pages.iter().fold(0, |sum, pages| sum.wrapping_add(bytes(pages)))
    };
    let aligned = if c.rarely() { c.number() } else { 0 };
    let block = match order.is_block_outermost() {
        true => groups.iter().map(all).max().unwrap_or(0),
        false => {
            groups.iter().flat_map(|group| &group.pages).map(|pages| pages.page_bytes).max().unwrap_or(0)
        }
    };
    let block = block.wrapping_add(aligned);
    let mut longest = 0;
    for group in groups.iter_mut() {
        let mut offset = 0u64;
        for pages in &mut group.pages {
            let row = u64::from(pages.states).wrapping_mul(pages.content_bytes.into());
            let (layer, block) = match order {
                Order::Blhnc | Order::Blnhc => (pages.page_bytes, block),
                Order::Bhlnc => (row, block),
                Order::Lhbnc => (row.wrapping_mul(num_blocks).wrapping_mul(pages.heads.into()), row),
                Order::Lbhnc | Order::Lbnhc => (block.wrapping_mul(num_blocks), block),
            };
            let each = if order.is_block_outermost() { pages.page_bytes } else { layer };
            pages.tensor.layer_stride = or(c, layer);
            pages.tensor.block_stride = or(c, block);
            pages.tensor.offset = or(c, offset);
            offset = offset.wrapping_add(each.wrapping_mul(pages.tensor.layers.len() as u64));
        }
        longest = offset.max(longest);
    }
    let size = if order.is_block_outermost() { block.wrapping_mul(num_blocks) } else { longest };
    for pages in groups.iter_mut().flat_map(|group| &mut group.pages) {
        pages.tensor.size = or(c, size);
    }
    size
}

/// A worker whose numbers go together, apart from those that the input changes.
pub(crate) fn worker(c: &mut Cursor<'_>) -> Worker {
    let order = *c.pick(&Order::ALL);
    let (num_blocks, world) = (1 + c.below(6) as u64, 1 + c.below(2) as u32);
    let mut name = 0;
    let mut groups = Vec::new();
    for _ in 0..1 + c.below(3) {
        let pages = (0..1 + c.below(2)).map(|_| pages(c, world, &mut name)).collect();
        groups.push(Group { block_tokens: 1 << c.below(8), pages });
    }
    if groups.len() > 1 && c.flag() {
        // Groups of one shape, which every order takes.
        let (first, rest) = groups.split_at_mut(1);
        for (group, pages) in
            rest.iter_mut().flat_map(|group| &mut group.pages).zip(first[0].pages.iter().cycle())
        {
            let tensor = group.tensor.clone();
            *group = Pages { tensor, ..pages.clone() };
        }
    }
    let size = place(c, order, num_blocks, &mut groups);
    Worker {
        order: if c.rarely() { c.text(8) } else { order.name().into() },
        num_blocks: or(c, num_blocks),
        memory_bytes: or(c, size),
        rank: if c.rarely() { c.number32() } else { world - 1 },
        world: or32(c, world),
        groups,
    }
}

/// Whether looking at it closely is quick.
pub(crate) fn is_small(worker: &Worker) -> bool {
    let cells = |pages: &Pages| {
        let layers = pages.tensor.layers.len() as u64;
        layers.saturating_mul(pages.heads.into()).saturating_mul(pages.states.into())
    };
    let pages = worker.groups.iter().flat_map(|group| &group.pages);
    pages.fold(0u64, |all, pages| all.saturating_add(cells(pages))) <= CELLS_MAX
}

/// The bytes of a block lie inside of the memory, and its runs cover the record once, in its order, as far as the plan
/// says that they do.
fn check_block(plan: &BlockPlan, block: u64, memory_bytes: u64) -> Vec<(u64, u64)> {
    let (mut record, mut covered) = (0, 0);
    let mut engine = Vec::new();
    for segment in plan.segments(block) {
        assert!(segment.len > 0 && segment.record >= record, "runs of a record overlap");
        let end = segment.engine.checked_add(segment.len).expect("an address");
        assert!(end <= memory_bytes, "block {block} ends at {end}, the memory at {memory_bytes}");
        record = segment.record + segment.len;
        covered += segment.len;
        engine.push((segment.engine, end));
    }
    assert!(record <= plan.record_bytes());
    assert_eq!(covered == plan.record_bytes(), plan.is_whole());
    engine
}

/// No byte of the memory belongs to two blocks, or twice to one.
pub(crate) fn check_plan(plan: &BlockPlan, memory_bytes: u64) {
    assert!(plan.record_bytes() <= RECORD_BYTES_MAX);
    if plan.runs() > RUNS_MAX {
        return;
    }
    let last = plan.num_blocks() - 1;
    let mut blocks = vec![0, 1, last / 2, last];
    blocks.retain(|block| plan.contains(*block));
    blocks.sort_unstable();
    blocks.dedup();
    let mut all: Vec<(u64, u64)> = Vec::new();
    for block in blocks {
        all.extend(check_block(plan, block, memory_bytes));
    }
    all.sort_unstable();
    assert!(all.windows(2).all(|pair| pair[0].1 <= pair[1].0), "two blocks share bytes");
    // Cut into shorter runs it moves the same bytes.
    let cut = plan.cut(7);
    let bytes = |plan: &BlockPlan| plan.segments(last).map(|segment| segment.len).sum::<u64>();
    if plan.record_bytes() <= 1 << 16 {
        assert_eq!(bytes(&cut), bytes(plan));
    }
}

fn check_group(group: &CheckedGroup, worker: &Worker, c: &mut Cursor<'_>) {
    assert!(group.format().len() <= FORMAT_BYTES_MAX && group.plan().is_whole());
    assert_eq!(group.plan().num_blocks(), worker.num_blocks);
    check_plan(group.plan(), worker.memory_bytes);
    if group.record_bytes() <= 1 << 16 {
        let record = vec![c.byte(); group.record_bytes() as usize];
        // Bytes that are all alike are no canary, unless there are next to none.
        assert!(group.canary_check(c.number(), &record).is_err() || record.len() < 16);
        assert!(group.canary_check(0, &record[1..]).is_err());
    }
    let size = 1 + c.below(8) as u32;
    if let Ok(other) = group.other_shard(Rank { index: c.below(8) as u32, size }) {
        assert!(other.format().len() <= FORMAT_BYTES_MAX);
        check_plan(other.plan(), worker.memory_bytes);
    }
}

/// A layout that is accepted keeps every block inside of the memory and apart from all others.
pub fn layout(data: &[u8]) {
    let mut c = Cursor::new(data, 2048);
    let worker = worker(&mut c);
    if !is_small(&worker) {
        return;
    }
    let Ok(groups) = worker.check() else { return };
    assert_eq!(groups.len(), worker.groups.len());
    groups.iter().for_each(|group| check_group(group, &worker, &mut c));
}
