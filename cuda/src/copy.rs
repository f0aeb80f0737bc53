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
    /// The group does not belong to this engine.
    #[error("expected a group below {groups}, got {group}")]
    Group {
        /// Groups of the engine.
        groups: usize,
        /// Asked for.
        group: u16,
    },
    /// The group's records are those of another tensor-parallel size: this engine holds a part of them.
    #[error("expected a group that this engine can save, got {group}, whose records it only loads")]
    OnlyLoaded {
        /// Asked for.
        group: u16,
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

/// One group's runs, whole and cut to spans, in the order of the record.
#[derive(Debug)]
struct Route {
    plan: BlockPlan,
    spans: BlockPlan,
}

/// Moves blocks of one engine's groups by their layouts.
#[derive(Debug, Clone)]
pub struct BlockCopier {
    memory: Arc<dyn EngineMemory>,
    routes: Arc<[Route]>,
}

impl BlockCopier {
    /// A copier for an engine whose groups' blocks lie as `plans` say.
    pub fn new(memory: Arc<dyn EngineMemory>, plans: Vec<BlockPlan>) -> Self {
        let route = |plan: BlockPlan| Route { spans: plan.cut(SPAN_BYTES), plan };
        Self { memory, routes: plans.into_iter().map(route).collect() }
    }

    /// How the memory is reached.
    pub fn way(&self) -> &'static str {
        self.memory.way()
    }

    /// Bytes of one record of a group.
    ///
    /// # Errors
    /// [`CopyError::Group`].
    pub fn record_bytes(&self, group: u16) -> Result<u64, CopyError> {
        Ok(self.route(group)?.plan.record_bytes())
    }

    /// Copies a block of a group into `record` and returns the checksum of what lies there now.
    ///
    /// # Errors
    /// Where the engine cannot be reached or the block does not exist.
    pub fn save(&self, group: u16, block: u64, record: &mut [u8]) -> Result<u64, CopyError> {
        let route = self.checked(group, block, record.len())?;
        if !route.plan.is_whole() {
            return Err(CopyError::OnlyLoaded { group });
        }
        let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
        route.batches(block, |batch, from, to| {
            self.memory.read(batch, record)?;
            digest.update(&record[from..to]);
            Ok(())
        })?;
        Ok(digest.finalize())
    }

    /// Copies `record`, or the part of it that the engine holds, into a block of a group.
    ///
    /// # Errors
    /// [`CopyError::Corrupt`] when the record's bytes are not those of `checksum`: the block then
    /// holds garbage and must not be used, like after every other error.
    pub fn load(&self, group: u16, block: u64, record: &[u8], checksum: u64) -> Result<(), CopyError> {
        let route = self.checked(group, block, record.len())?;
        let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
        let is_right = |found: u64| match found == checksum {
            true => Ok(()),
            false => Err(CopyError::Corrupt { expected: checksum, found }),
        };
        if !route.plan.is_whole() {
            // The checksum is that of the record, so all of it is looked at before a part is used.
            digest.update(record);
            is_right(digest.finalize())?;
            return route.batches(block, |batch, _, _| self.memory.write(batch, record));
        }
        route.batches(block, |batch, from, to| {
            digest.update(&record[from..to]);
            self.memory.write(batch, record)
        })?;
        is_right(digest.finalize())
    }

    fn route(&self, group: u16) -> Result<&Route, CopyError> {
        let groups = self.routes.len();
        self.routes.get(usize::from(group)).ok_or(CopyError::Group { groups, group })
    }

    fn checked(&self, group: u16, block: u64, length: usize) -> Result<&Route, CopyError> {
        let route = self.route(group)?;
        if !route.plan.contains(block) || length as u64 != route.plan.record_bytes() {
            return Err(CopyError::Shape {
                blocks: route.plan.num_blocks(),
                record_bytes: route.plan.record_bytes(),
                block,
                length: length as u64,
            });
        }
        Ok(route)
    }
}

impl Route {
    /// Calls `each` with batches of about one span, in order. Those of a whole record cover it without gaps.
    fn batches(
        &self,
        block: u64,
        mut each: impl FnMut(&[Segment], usize, usize) -> Result<(), CopyError>,
    ) -> Result<(), CopyError> {
        let mut batch: Vec<Segment> = Vec::with_capacity(16);
        let mut from = 0;
        let mut spans = self.spans.segments(block);
        while let Some(span) = spans.next() {
            batch.push(span);
            let to = (span.record + span.len) as usize;
            if (to - from) as u64 >= SPAN_BYTES || spans.len() == 0 {
                each(&batch, from, to)?;
                batch.clear();
                from = to;
            }
        }
        Ok(())
    }
}
