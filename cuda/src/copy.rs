//! Blocks between engine and pool, with their checksums.

use std::sync::Arc;

use crc_fast::{CrcAlgorithm, Digest};
use pillion_layouts::{BlockPlan, Segment};

use crate::EngineMemory;

/// Bytes that are copied and checksummed at a time: they stay in the L2 cache in between.
const SPAN_BYTES: u64 = 256 << 10;

/// Why a block could not be copied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// The engine is gone, or we may not touch its memory.
    #[error("cannot reach the engine's memory: {0}")]
    Unreachable(String),
    /// A place outside of what was registered.
    #[error("expected a place inside the engine's {bytes} bytes, got {offset} + {length}")]
    OutOfBounds {
        /// Registered bytes.
        bytes: u64,
        /// First byte.
        offset: u64,
        /// Length.
        length: u64,
    },
    /// The pool holds other bytes than those that were stored.
    #[error("expected checksum {expected:016x}, got {found:016x}: the record is retired")]
    Corrupt {
        /// At the time of the save.
        expected: u64,
        /// Now.
        found: u64,
    },
    /// The block id or the record's length do not belong to this engine.
    #[error(
        "expected a block below {blocks} and a record of {record_bytes} bytes, got block {block} and {length} bytes"
    )]
    Shape {
        /// Blocks of the engine.
        blocks: u64,
        /// Bytes of its records.
        record_bytes: u64,
        /// Asked for.
        block: u64,
        /// Length of the record that was passed.
        length: u64,
    },
}

/// Moves blocks of one engine by its layout.
#[derive(Debug, Clone)]
pub struct BlockCopier {
    memory: Arc<dyn EngineMemory>,
    plan: Arc<BlockPlan>,
    /// Block 0's segments cut to spans, in the order of the record.
    spans: Arc<[Segment]>,
}

impl BlockCopier {
    /// A copier for an engine whose blocks lie as `plan` says.
    pub fn new(memory: Arc<dyn EngineMemory>, plan: BlockPlan) -> Self {
        let mut segments: Vec<Segment> = plan.segments(0).collect();
        segments.sort_by_key(|segment| segment.record);
        let spans = segments.into_iter().flat_map(cut).collect();
        Self { memory, plan: Arc::new(plan), spans }
    }

    /// How the memory is reached.
    pub fn way(&self) -> &'static str {
        self.memory.way()
    }

    /// Bytes of one record.
    pub fn record_bytes(&self) -> u64 {
        self.plan.record_bytes()
    }

    /// Copies a block into `record` and returns the checksum of what lies there now.
    ///
    /// # Errors
    /// Where the engine cannot be reached or the block does not exist.
    pub fn save(&self, block: u64, record: &mut [u8]) -> Result<u64, CopyError> {
        self.check(block, record.len())?;
        let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
        self.batches(block, |batch, from, to| {
            self.memory.read(batch, record)?;
            digest.update(&record[from..to]);
            Ok(())
        })?;
        Ok(digest.finalize())
    }

    /// Copies `record` into a block.
    ///
    /// # Errors
    /// [`CopyError::Corrupt`] when the record's bytes are not those of `checksum`: the block then
    /// holds garbage and must not be used, like after every other error.
    pub fn load(&self, block: u64, record: &[u8], checksum: u64) -> Result<(), CopyError> {
        self.check(block, record.len())?;
        let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
        self.batches(block, |batch, from, to| {
            digest.update(&record[from..to]);
            self.memory.write(batch, record)
        })?;
        let found = digest.finalize();
        if found != checksum {
            return Err(CopyError::Corrupt { expected: checksum, found });
        }
        Ok(())
    }

    fn check(&self, block: u64, length: usize) -> Result<(), CopyError> {
        if !self.plan.contains(block) || length as u64 != self.plan.record_bytes() {
            return Err(CopyError::Shape {
                blocks: self.plan.num_blocks(),
                record_bytes: self.plan.record_bytes(),
                block,
                length: length as u64,
            });
        }
        Ok(())
    }

    /// Calls `each` with batches of about one span that cover the record without gaps, in order.
    fn batches(
        &self,
        block: u64,
        mut each: impl FnMut(&[Segment], usize, usize) -> Result<(), CopyError>,
    ) -> Result<(), CopyError> {
        let shift = block * self.plan.engine_block_stride();
        let mut batch: Vec<Segment> = Vec::with_capacity(16);
        let mut from = 0;
        for (index, span) in self.spans.iter().enumerate() {
            batch.push(Segment { engine: span.engine + shift, ..*span });
            let to = (span.record + span.len) as usize;
            if (to - from) as u64 >= SPAN_BYTES || index + 1 == self.spans.len() {
                each(&batch, from, to)?;
                batch.clear();
                from = to;
            }
        }
        Ok(())
    }
}

fn cut(segment: Segment) -> impl Iterator<Item = Segment> {
    (0..segment.len.div_ceil(SPAN_BYTES)).map(move |index| {
        let skip = index * SPAN_BYTES;
        Segment {
            engine: segment.engine + skip,
            record: segment.record + skip,
            len: SPAN_BYTES.min(segment.len - skip),
        }
    })
}
