//! From a pair of layouts to merged strided copies.

use crate::layout::{Layout, Region};
use crate::refusal::Refusal;

/// Equal runs at two nested strides: `count2` rows of `count` runs of `len` bytes.
///
/// `src` is the engine's side (block 0, from the allocation's base), `dst` the record's. A plan is
/// used in both directions; the names are those of a save. A level that is not needed has count 1
/// and stride 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StridedCopy {
    /// First byte in the engine's memory.
    pub src: u64,
    /// First byte in the record.
    pub dst: u64,
    /// Bytes of one contiguous run.
    pub len: u64,
    /// Runs of the inner level.
    pub count: u64,
    /// Between runs, in the engine's memory.
    pub src_stride: u64,
    /// Between runs, in the record.
    pub dst_stride: u64,
    /// Repetitions of the inner level.
    pub count2: u64,
    /// Between repetitions, in the engine's memory.
    pub src_stride2: u64,
    /// Between repetitions, in the record.
    pub dst_stride2: u64,
}

impl StridedCopy {
    /// Bytes that the copy moves.
    pub fn bytes(&self) -> u64 {
        self.len * self.count * self.count2
    }

    /// Run `index` of `count × count2`, for block 0.
    fn run(&self, index: u64) -> Segment {
        let (row, column) = (index / self.count, index % self.count);
        Segment {
            engine: self.src + row * self.src_stride2 + column * self.src_stride,
            record: self.dst + row * self.dst_stride2 + column * self.dst_stride,
            len: self.len,
        }
    }
}

/// One contiguous run of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First byte in the engine's memory, from the allocation's base.
    pub engine: u64,
    /// First byte in the record.
    pub record: u64,
    /// Bytes.
    pub len: u64,
}

/// How any block of an engine and its record correspond, in both directions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockPlan {
    copies: Vec<StridedCopy>,
    engine_block_stride: u64,
    num_blocks: u64,
    record_bytes: u64,
}

impl BlockPlan {
    /// The copies of block 0, in record order; together they cover the record once. Block `b` is
    /// `b × engine_block_stride` further on the engine's side.
    pub fn copies(&self) -> &[StridedCopy] {
        &self.copies
    }

    /// Bytes between one block's addresses and the next one's.
    pub fn engine_block_stride(&self) -> u64 {
        self.engine_block_stride
    }

    /// Number of blocks of the engine.
    pub fn num_blocks(&self) -> u64 {
        self.num_blocks
    }

    /// Whether a block id may be given to [`BlockPlan::segments`]. Ids come from other processes:
    /// ask where they enter.
    pub fn contains(&self, block: u64) -> bool {
        block < self.num_blocks
    }

    /// Bytes of a record.
    pub fn record_bytes(&self) -> u64 {
        self.record_bytes
    }

    /// The contiguous runs of a block, as long as they can be, in record order.
    ///
    /// # Panics
    /// If the engine has no such block: an address outside its blocks must never be computed.
    pub fn segments(&self, block: u64) -> Segments<'_> {
        assert!(self.contains(block), "block {block}: the engine has blocks 0 to {}", self.num_blocks - 1);
        let shift = block * self.engine_block_stride;
        Segments { copies: &self.copies, run: 0, shift, pending: None }
    }
}

/// The runs of one block. See [`BlockPlan::segments`].
#[derive(Debug, Clone)]
pub struct Segments<'a> {
    copies: &'a [StridedCopy],
    run: u64,
    shift: u64,
    pending: Option<Segment>,
}

impl Segments<'_> {
    /// The next run of the copies, not merged.
    fn step(&mut self) -> Option<Segment> {
        let copy = self.copies.first()?;
        let mut run = copy.run(self.run);
        run.engine += self.shift;
        self.run += 1;
        if self.run == copy.count * copy.count2 {
            self.run = 0;
            self.copies = &self.copies[1..];
        }
        Some(run)
    }
}

impl Iterator for Segments<'_> {
    type Item = Segment;

    fn next(&mut self) -> Option<Segment> {
        let mut whole = match self.pending.take() {
            Some(segment) => segment,
            None => self.step()?,
        };
        // Runs of different copies, or the end of one row and the start of the next, can touch.
        while let Some(next) = self.step() {
            if next.engine != whole.engine + whole.len || next.record != whole.record + whole.len {
                self.pending = Some(next);
                break;
            }
            whole.len += next.len;
        }
        Some(whole)
    }
}

/// Plans the copies between the blocks of an engine and their records.
pub fn plan(engine: &Layout) -> Result<BlockPlan, Refusal> {
    let record = Layout::record(engine.content().clone())?;
    between(engine, &record)
}

/// Plans for two layouts of equal content, of which the second is one block.
fn between(engine: &Layout, record: &Layout) -> Result<BlockPlan, Refusal> {
    if engine.format() != record.format() {
        return Err(Refusal::Format { expected: engine.format(), got: record.format() });
    }
    let (Some(first), [stored]) = (engine.regions().first(), record.regions()) else {
        return Err(Refusal::Zero { what: "regions" });
    };
    let engine_block_stride = first.blocks.stride;
    let mut copies = Vec::new();
    for (index, region) in engine.regions().iter().enumerate() {
        let (expected, got) = (engine_block_stride, region.blocks.stride);
        if expected != got {
            return Err(Refusal::MixedBlockStrides { region: index, expected, got });
        }
        for copy in region_copies(region, stored) {
            append(&mut copies, copy);
        }
    }
    let (num_blocks, record_bytes) = (engine.num_blocks(), engine.record_bytes());
    debug_assert_eq!(copies.iter().map(StridedCopy::bytes).sum::<u64>(), record_bytes);
    Ok(BlockPlan { copies, engine_block_stride, num_blocks, record_bytes })
}

/// An axis as both sides see it.
#[derive(Clone, Copy)]
struct Axis {
    len: u64,
    src: u64,
    dst: u64,
}

/// No step at all: fills up the levels of a copy.
const ONCE: Axis = Axis { len: 1, src: 0, dst: 0 };

/// The copies of one region. Axes that continue each other on both sides become one; of what
/// remains (three at most) the outermost is written out, so that no copy is made per token.
fn region_copies(region: &Region, stored: &Region) -> impl Iterator<Item = StridedCopy> {
    let mut len = region.content_bytes;
    let mut axes: Vec<Axis> = Vec::with_capacity(3);
    let pairs =
        [(region.states, stored.states), (region.heads, stored.heads), (region.layers, stored.layers)];
    for (source, target) in pairs {
        let axis = Axis { len: source.len, src: source.stride, dst: target.stride };
        match axes.last_mut() {
            _ if axis.len == 1 => {}
            None if axis.src == len && axis.dst == len => len *= axis.len,
            Some(last) if axis.src == last.src * last.len && axis.dst == last.dst * last.len => {
                last.len *= axis.len;
            }
            _ => axes.push(axis),
        }
    }
    let mut axes = axes.into_iter();
    let mut level = || axes.next().unwrap_or(ONCE);
    let (inner, middle, outer) = (level(), level(), level());
    let src = region.offset;
    let dst = u64::from(region.first_layer - stored.first_layer) * stored.layers.stride;
    (0..outer.len).map(move |step| StridedCopy {
        src: src + step * outer.src,
        dst: dst + step * outer.dst,
        len,
        count: inner.len,
        src_stride: inner.src,
        dst_stride: inner.dst,
        count2: middle.len,
        src_stride2: middle.src,
        dst_stride2: middle.dst,
    })
}

/// Adds a copy, as part of the one before where that is possible.
fn append(copies: &mut Vec<StridedCopy>, next: StridedCopy) {
    if let Some(last) = copies.last_mut()
        && let Some(merged) = merge(last, &next)
    {
        *last = merged;
        return;
    }
    copies.push(next);
}

/// Two copies as one: a longer run, or more runs at the same stride.
fn merge(last: &StridedCopy, next: &StridedCopy) -> Option<StridedCopy> {
    if last.count2 != 1 || next.count2 != 1 {
        return None;
    }
    let (src_step, dst_step) = (next.src.checked_sub(last.src)?, next.dst.checked_sub(last.dst)?);
    if last.count == 1 && next.count == 1 && src_step == last.len && dst_step == last.len {
        return Some(StridedCopy { len: last.len + next.len, ..*last });
    }
    let (src_stride, dst_stride) =
        if last.count == 1 { (src_step, dst_step) } else { (last.src_stride, last.dst_stride) };
    let continues = src_step == last.count * src_stride && dst_step == last.count * dst_stride;
    let same = next.count == 1 || (next.src_stride == src_stride && next.dst_stride == dst_stride);
    (last.len == next.len && continues && same).then(|| StridedCopy {
        count: last.count + next.count,
        src_stride,
        dst_stride,
        ..*last
    })
}
