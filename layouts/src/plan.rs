//! The runs between the blocks of one engine and their records.

use crate::content::Rank;
use crate::refusal::Refusal;
use crate::shard::Shard;
use crate::transfer::plan_between;

/// Equal runs at two nested strides: `count2` rows of `count` runs of `len` bytes.
///
/// A level that is not needed has count 1 and stride 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StridedCopy {
    /// First byte in the source.
    pub src: u64,
    /// First byte in the destination.
    pub dst: u64,
    /// Bytes of one contiguous run.
    pub len: u64,
    /// Runs of the inner level.
    pub count: u64,
    /// Between runs, in the source.
    pub src_stride: u64,
    /// Between runs, in the destination.
    pub dst_stride: u64,
    /// Repetitions of the inner level.
    pub count2: u64,
    /// Between repetitions, in the source.
    pub src_stride2: u64,
    /// Between repetitions, in the destination.
    pub dst_stride2: u64,
}

impl StridedCopy {
    /// Bytes that the copy moves.
    pub fn bytes(&self) -> u64 {
        self.len * self.count * self.count2
    }

    /// Runs that it stands for; saturates.
    pub(crate) fn runs(&self) -> u64 {
        self.count.saturating_mul(self.count2)
    }

    /// Its runs, as `(source, destination, bytes)`.
    pub(crate) fn each(&self) -> impl Iterator<Item = (u64, u64, u64)> + use<> {
        let copy = *self;
        (0..copy.count2).flat_map(move |row| {
            (0..copy.count).map(move |column| {
                let src = copy.src + row * copy.src_stride2 + column * copy.src_stride;
                let dst = copy.dst + row * copy.dst_stride2 + column * copy.dst_stride;
                (src, dst, copy.len)
            })
        })
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

/// Bytes of a record, at most.
pub const RECORD_BYTES_MAX: u64 = 1 << 30;
/// Runs of a block, at most: more would cost more to name than to move.
pub const RUNS_MAX: u64 = 1 << 20;

/// How far the runs move from block to block.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Steps {
    /// All alike.
    Even(u64),
    /// One per run.
    Each(Vec<u64>),
}

/// How any block of an engine and its record correspond, in both directions: the contiguous runs of
/// block 0, in record order, and how far each moves from block to block. They cover the record once,
/// or the part of it that the engine holds ([`BlockPlan::of_part`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockPlan {
    runs: Vec<Segment>,
    steps: Steps,
    num_blocks: u64,
    record_bytes: u64,
    /// Whether the runs cover the record.
    whole: bool,
}

impl BlockPlan {
    /// The plan between a shard's blocks and their records (see [`Shard::record`]).
    pub fn new(shard: &Shard) -> Result<BlockPlan, Refusal> {
        let record = shard.record()?;
        Self::between(shard, &record, record.block_bytes())
    }

    /// The plan between a shard's blocks and another rank's records, of which it holds some heads.
    pub fn of_part(shard: &Shard, rank: Rank, record: &Shard) -> Result<BlockPlan, Refusal> {
        Self::between(shard, &record.held_by(rank)?, record.block_bytes())
    }

    /// `part` lies in a record of so many bytes.
    fn between(shard: &Shard, part: &Shard, record_bytes: u64) -> Result<BlockPlan, Refusal> {
        let too_much = |what, limit, got| Refusal::TooMuch { what, limit, got };
        if record_bytes > RECORD_BYTES_MAX {
            return Err(too_much("bytes of a block", RECORD_BYTES_MAX, record_bytes));
        }
        let plan = plan_between(std::slice::from_ref(shard), std::slice::from_ref(part))?;
        let count = plan.copies().iter().fold(0u64, |all, shard| all.saturating_add(shard.copy.runs()));
        if count > RUNS_MAX {
            return Err(too_much("contiguous runs of a block", RUNS_MAX, count));
        }
        let mut runs: Vec<(Segment, u64)> = Vec::with_capacity(count as usize);
        for shard in plan.copies() {
            let run = |(engine, record, len)| (Segment { engine, record, len }, shard.src_block_stride);
            runs.extend(shard.copy.each().map(run));
        }
        runs.sort_unstable_by_key(|(run, _)| run.record);
        Ok(Self::merged(runs, shard.num_blocks(), record_bytes))
    }

    /// Joins runs that touch on both sides in every block.
    fn merged(runs: Vec<(Segment, u64)>, num_blocks: u64, record_bytes: u64) -> BlockPlan {
        let mut whole: Vec<Segment> = Vec::with_capacity(runs.len());
        let mut steps: Vec<u64> = Vec::with_capacity(runs.len());
        for (run, step) in runs {
            match (whole.last_mut(), steps.last()) {
                (Some(last), Some(same))
                    if *same == step
                        && last.engine + last.len == run.engine
                        && last.record + last.len == run.record =>
                {
                    last.len += run.len;
                }
                _ => {
                    whole.push(run);
                    steps.push(step);
                }
            }
        }
        whole.shrink_to_fit();
        let first = steps.first().copied().unwrap_or(0);
        let even = steps.iter().all(|step| *step == first);
        let steps = if even { Steps::Even(first) } else { Steps::Each(steps) };
        let covered: u64 = whole.iter().map(|run| run.len).sum();
        BlockPlan { runs: whole, steps, num_blocks, record_bytes, whole: covered == record_bytes }
    }

    /// The same with runs of at most `len` bytes.
    ///
    /// # Panics
    /// If `len` is 0.
    pub fn cut(&self, len: u64) -> BlockPlan {
        assert!(len > 0, "runs of no bytes");
        let mut runs = Vec::with_capacity(self.runs.len());
        let mut steps = Vec::new();
        for (index, run) in self.runs.iter().enumerate() {
            for skip in (0..run.len).step_by(len as usize) {
                let (engine, record) = (run.engine + skip, run.record + skip);
                runs.push(Segment { engine, record, len: len.min(run.len - skip) });
                if let Steps::Each(each) = &self.steps {
                    steps.push(each[index]);
                }
            }
        }
        let steps = match self.steps {
            Steps::Even(step) => Steps::Even(step),
            Steps::Each(_) => Steps::Each(steps),
        };
        BlockPlan { runs, steps, ..*self }
    }

    /// Runs of a block.
    pub fn runs(&self) -> usize {
        self.runs.len()
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

    /// Whether the runs cover the record, and not only a part of it.
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// The contiguous runs of a block, as long as they can be, in record order.
    ///
    /// # Panics
    /// If the engine has no such block: an address outside its blocks must never be computed.
    pub fn segments(&self, block: u64) -> Segments<'_> {
        assert!(self.contains(block), "block {block}: the engine has blocks 0 to {}", self.num_blocks - 1);
        let (shift, each) = match &self.steps {
            Steps::Even(step) => (block * step, [].as_slice()),
            Steps::Each(each) => (0, each.as_slice()),
        };
        Segments { runs: self.runs.iter(), each: each.iter(), block, shift }
    }
}

/// The runs of one block. See [`BlockPlan::segments`].
#[derive(Debug, Clone)]
pub struct Segments<'a> {
    runs: std::slice::Iter<'a, Segment>,
    /// Empty where all runs move alike.
    each: std::slice::Iter<'a, u64>,
    block: u64,
    shift: u64,
}

impl Iterator for Segments<'_> {
    type Item = Segment;

    #[inline]
    fn next(&mut self) -> Option<Segment> {
        let run = self.runs.next()?;
        let shift = self.each.next().map_or(self.shift, |step| self.block * step);
        Some(Segment { engine: run.engine + shift, ..*run })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.runs.size_hint()
    }
}

impl ExactSizeIterator for Segments<'_> {}
