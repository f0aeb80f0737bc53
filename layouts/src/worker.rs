//! A worker's KV memory as it is registered: groups of one pool, each with a plan to its records, a
//! text that says what those hold, and the canary that proves both.

use std::collections::HashSet;
use std::fmt::Write as _;

use crate::canary::{CanaryMismatch, canary_fill_from};
use crate::content::Rank;
use crate::plan::BlockPlan;
use crate::refusal::{Refusal, shown};
use crate::shape::Order;
use crate::shard::Shard;
use crate::vllm::groups::{self, Group, Pages, Pool};
use crate::vllm::{Escaped, Packing};

/// KV-cache groups of a worker, at most.
pub const GROUPS_MAX: usize = 64;
/// Layers of a worker, at most.
pub const LAYERS_MAX: usize = 1 << 16;
/// Bytes of a layer's name, at most.
pub const NAME_BYTES_MAX: usize = 1024;
/// Bytes of a format, at most.
pub const FORMAT_BYTES_MAX: usize = 1 << 16;
/// Contiguous runs of one block in every group together, at most.
const RUNS_MAX: u64 = 1 << 22;
/// Cells (layer, head, state) of a block, at most: the canary looks at each.
const CELLS_MAX: u64 = 1 << 22;

/// What a worker says of its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Worker {
    /// The name of the physical order.
    pub order: String,
    /// Number of blocks, the same in every group.
    pub num_blocks: u64,
    /// Bytes of the memory handed over.
    pub memory_bytes: u64,
    /// The worker's place in its tensor-parallel group.
    pub rank: u32,
    /// The size of that.
    pub world: u32,
    /// The groups, in the engine's order.
    pub groups: Vec<Group>,
}

impl Worker {
    /// Checks everything and gives what is needed to move blocks, group by group.
    ///
    /// Every byte of the memory belongs to a page that is named here, or is padding that the engine's
    /// own formulas ask for: a group that was forgotten shows where it is the largest, a layer where
    /// its group is. (Smaller groups leave the end of a block alone, as in vLLM.)
    pub fn check(&self) -> Result<Vec<CheckedGroup>, Refusal> {
        let too_much = |what, limit: usize, got: usize| {
            Err(Refusal::TooMuch { what, limit: limit as u64, got: got as u64 })
        };
        if self.groups.len() > GROUPS_MAX {
            return too_much("kv cache groups", GROUPS_MAX, self.groups.len());
        }
        if self.rank >= self.world {
            return Err(Refusal::Rank { index: self.rank, size: self.world });
        }
        let pages = || self.groups.iter().flat_map(|group| &group.pages);
        let layers = pages().fold(0, |all: usize, pages| all.saturating_add(pages.tensor.layers.len()));
        if layers > LAYERS_MAX {
            return too_much("layers", LAYERS_MAX, layers);
        }
        // Every tensor has a layer, or is refused: this bounds them, too.
        if pages().any(|pages| pages.tensor.layers.is_empty()) {
            return Err(Refusal::Zero { what: "layers of a tensor" });
        }
        let mut seen = HashSet::with_capacity(layers);
        for (index, name) in pages().flat_map(|pages| &pages.tensor.layers).enumerate() {
            if name.is_empty() {
                return Err(Refusal::UnnamedLayer { index });
            }
            if name.len() > NAME_BYTES_MAX {
                return too_much("bytes of a layer's name", NAME_BYTES_MAX, name.len());
            }
            if !seen.insert(name) {
                return Err(Refusal::DuplicateLayer { name: shown(name) });
            }
        }
        let pool = Pool {
            order: self.order.parse::<Order>()?,
            num_blocks: self.num_blocks,
            memory_bytes: self.memory_bytes,
            rank: Rank { index: self.rank, size: self.world },
        };
        for group in &self.groups {
            group.pages.iter().try_for_each(|pages| check_states(group.block_tokens, pages))?;
        }
        groups::check(pool, &self.groups)?;
        let mut runs = 0;
        let mut out = Vec::with_capacity(self.groups.len());
        for group in &self.groups {
            let checked = CheckedGroup::new(pool, group)?;
            runs += checked.plan.runs() as u64;
            if runs > RUNS_MAX {
                let what = "contiguous runs of a block in all groups";
                return Err(Refusal::TooMuch { what, limit: RUNS_MAX, got: runs });
            }
            out.push(checked);
        }
        Ok(out)
    }
}

/// A group whose blocks can be moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckedGroup {
    plan: BlockPlan,
    format: String,
    canary: Vec<CanaryPages>,
    rank: Rank,
    shard: Shard,
    /// Layers in the order of the shard's.
    names: Vec<String>,
}

/// Records that a rank of another tensor-parallel size wrote, of which this one holds some heads. They are
/// loaded and never written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherShard {
    plan: BlockPlan,
    format: String,
}

impl OtherShard {
    /// How this rank's blocks and its part of those records correspond.
    pub fn plan(&self) -> &BlockPlan {
        &self.plan
    }

    /// Bytes of a record.
    pub fn record_bytes(&self) -> u64 {
        self.plan.record_bytes()
    }

    /// See [`CheckedGroup::format`].
    pub fn format(&self) -> &str {
        &self.format
    }
}

impl CheckedGroup {
    fn new(pool: Pool, group: &Group) -> Result<CheckedGroup, Refusal> {
        // By place and not by the number in the name: a drafter, an encoder or a second attention of a
        // layer may have the same one, and in this order a block's layers follow each other.
        let mut next = 0;
        let mut number = |_: &str| {
            next += 1;
            Ok(next - 1)
        };
        let canary = group.pages.iter().map(|pages| CanaryPages::new(pool, pages));
        let canary = canary.collect::<Result<Vec<_>, _>>()?;
        let cells = canary.iter().fold(0u64, |all, pages| all.saturating_add(pages.cells()));
        if cells > CELLS_MAX {
            return Err(Refusal::TooMuch { what: "cells of a block", limit: CELLS_MAX, got: cells });
        }
        let shard = groups::shard(pool, group, &mut number)?;
        let plan = BlockPlan::new(&shard)?;
        let (expected, got) = (canary.iter().map(CanaryPages::bytes).sum(), plan.record_bytes());
        if expected != got {
            return Err(Refusal::Inconsistent { what: "bytes of a record", expected, got });
        }
        let names: Vec<String> = group.pages.iter().flat_map(|pages| &pages.tensor.layers).cloned().collect();
        let format = format_of(&shard.record()?, &names)?;
        Ok(CheckedGroup { plan, format, canary, rank: pool.rank, shard, names })
    }

    /// The records of another tensor-parallel size's rank, where it holds heads that this one holds, too.
    pub fn other_shard(&self, of: Rank) -> Result<OtherShard, Refusal> {
        let record = self.shard.record_of_rank(of)?;
        let plan = BlockPlan::of_part(&self.shard, self.rank, &record)?;
        Ok(OtherShard { plan, format: format_of(&record, &self.names)? })
    }

    /// How its blocks and their records correspond.
    pub fn plan(&self) -> &BlockPlan {
        &self.plan
    }

    /// Bytes of a record.
    pub fn record_bytes(&self) -> u64 {
        self.plan.record_bytes()
    }

    /// A canonical, readable description of what a record holds: which heads and states of which
    /// layers, in which format, in which order. It says nothing of the engine's memory. Groups with
    /// equal formats may share records, *within one namespace*.
    pub fn format(&self) -> &str {
        &self.format
    }

    /// Compares a block that was read by [`CheckedGroup::plan`] with the canary.
    ///
    /// The canary of a group is one stream of bytes (see [`crate::canary_byte`]) that fills the pages of
    /// its layers one after the other, in the order of registration, and each page as `[H, N, C]`:
    /// byte `((head × N) + state) × C + byte` of a page. The engine writes it with its own indexing,
    /// this reads it by the declared strides. What a backend packs into C is not looked at.
    pub fn canary_check(&self, seed: u64, record: &[u8]) -> Result<(), CanaryMismatch> {
        let (expected, got) = (self.record_bytes(), record.len() as u64);
        if expected != got {
            return Err(CanaryMismatch::Length { expected, got });
        }
        let cells = self.cells();
        let mut bytes = Vec::new();
        for run in self.plan.segments(0) {
            let mut done = 0;
            while done < run.len {
                let at = run.engine + done;
                // The last one that starts here or before.
                let index = cells.partition_point(|cell| cell.at <= at);
                let cell = index.checked_sub(1).and_then(|index| cells.get(index));
                let left = cell.map_or(0, |cell| (cell.at + cell.len).saturating_sub(at));
                let (Some(cell), 1..) = (cell, left) else {
                    return Err(CanaryMismatch::Outside { at });
                };
                let len = left.min(run.len - done);
                let stream = cell.stream + (at - cell.at);
                bytes.resize(len as usize, 0);
                canary_fill_from(seed, stream, &mut bytes);
                let found = &record[(run.record + done) as usize..(run.record + done + len) as usize];
                if let Some(differs) = bytes.iter().zip(found).position(|(expected, got)| expected != got) {
                    return Err(self.mismatch(stream + differs as u64, bytes[differs], found[differs]));
                }
                done += len;
            }
        }
        Ok(())
    }

    /// The pages' bytes of block 0, by address.
    fn cells(&self) -> Vec<Cell> {
        let mut cells: Vec<Cell> = Vec::new();
        let mut stream = 0;
        for pages in &self.canary {
            stream = pages.place(stream, &mut cells);
        }
        cells.sort_unstable_by_key(|cell| cell.at);
        cells
    }

    fn mismatch(&self, mut stream: u64, expected: u8, got: u8) -> CanaryMismatch {
        for pages in &self.canary {
            if stream < pages.bytes() {
                return pages.mismatch(stream, expected, got);
            }
            stream -= pages.bytes();
        }
        CanaryMismatch::Length { expected: self.record_bytes(), got: stream }
    }
}

/// Attention keeps one state per token, or one for a whole number of them; what keeps another number
/// of states is not what it says.
fn check_states(block_tokens: u32, pages: &Pages) -> Result<(), Refusal> {
    let states = pages.states;
    if states == 0 {
        return Err(Refusal::Zero { what: "states" });
    }
    let served = match pages.packing {
        Packing::States { .. } => true,
        Packing::Latent { .. } | Packing::Index { .. } | Packing::OpaquePage { .. } => {
            block_tokens.is_multiple_of(states)
        }
        _ => states == block_tokens,
    };
    if served { Ok(()) } else { Err(Refusal::StatesPerBlock { states, block_tokens }) }
}

/// Contiguous bytes of block 0 that are contiguous in the canary.
#[derive(Debug, Clone, Copy)]
struct Cell {
    at: u64,
    len: u64,
    stream: u64,
}

/// The pages of one tensor as the engine's own indexing sees them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct CanaryPages {
    names: Vec<String>,
    offset: u64,
    layer_stride: u64,
    kernel_blocks: u64,
    kernel_stride: u64,
    heads: u64,
    head_stride: u64,
    /// Of a kernel block.
    states: u64,
    state_stride: u64,
    content: u64,
}

impl CanaryPages {
    fn new(pool: Pool, pages: &Pages) -> Result<CanaryPages, Refusal> {
        let inside = groups::inside(pool, pages)?;
        Ok(CanaryPages {
            names: pages.tensor.layers.clone(),
            offset: pages.tensor.offset,
            layer_stride: pages.tensor.layer_stride,
            kernel_blocks: pages.kernel_blocks.into(),
            kernel_stride: inside.block,
            heads: pages.heads.into(),
            head_stride: inside.head,
            states: inside.states.into(),
            state_stride: inside.state,
            content: pages.content_bytes.into(),
        })
    }

    /// Cells of all layers; saturates.
    fn cells(&self) -> u64 {
        let states = self.kernel_blocks.saturating_mul(self.states);
        states.saturating_mul(self.heads).saturating_mul(self.names.len() as u64)
    }

    /// Bytes of all layers; only asked where there are few cells.
    fn bytes(&self) -> u64 {
        self.cells().saturating_mul(self.content)
    }

    /// Appends the cells of block 0; returns where the canary goes on.
    fn place(&self, mut stream: u64, cells: &mut Vec<Cell>) -> u64 {
        for layer in 0..self.names.len() as u64 {
            let page = self.offset + layer * self.layer_stride;
            for head in 0..self.heads {
                for state in 0..self.kernel_blocks * self.states {
                    let (kernel, state) = (state / self.states, state % self.states);
                    let at = page
                        + head * self.head_stride
                        + kernel * self.kernel_stride
                        + state * self.state_stride;
                    match cells.last_mut() {
                        Some(last) if last.at + last.len == at && last.stream + last.len == stream => {
                            last.len += self.content;
                        }
                        _ => cells.push(Cell { at, len: self.content, stream }),
                    }
                    stream += self.content;
                }
            }
        }
        stream
    }

    /// Names the place of a byte of these pages' canary.
    fn mismatch(&self, byte: u64, expected: u8, got: u8) -> CanaryMismatch {
        let states = self.kernel_blocks * self.states;
        let (cell, byte) = (byte / self.content, byte % self.content);
        let (row, state) = (cell / states, cell % states);
        let name = self.names.get((row / self.heads) as usize);
        CanaryMismatch::Byte {
            layer: name.map_or_else(String::new, |name| shown(name)),
            head: row % self.heads,
            state,
            byte,
            expected,
            got,
        }
    }
}

/// See [`CheckedGroup::format`].
fn format_of(record: &Shard, names: &[String]) -> Result<String, Refusal> {
    let mut out = format!("pillion-record/2 block_tokens={}", record.content().block_tokens());
    for piece in record.pieces() {
        let plane = &record.content().planes()[piece.part.plane];
        let heads = &piece.part.heads;
        // Writing to a string does not fail.
        let _ = write!(
            out,
            " {}[heads={}..{}/{} states={} bytes={} format={} {} layers=",
            plane.role,
            heads.start,
            heads.end,
            plane.heads,
            plane.states,
            plane.bytes,
            Escaped(&plane.format),
            plane.sharding
        );
        let mut layers = piece.part.layers.as_slice();
        while let Some(first) = layers.first() {
            let next = |pair: &&[u32]| pair[1] == pair[0] + 1;
            let count = layers.windows(2).take_while(next).count() + 1;
            let _ = write!(out, "{first}..{},", u64::from(*first) + count as u64);
            layers = &layers[count..];
        }
        out.push(']');
    }
    out.push_str(" names=[");
    for name in names {
        for c in name.chars() {
            match c {
                // Escaped so that two lists of names never give one text.
                '\\' | ',' | ']' => out.extend(['\\', c]),
                c if c.is_control() => out.extend(c.escape_default()),
                c => out.push(c),
            }
        }
        out.push(',');
    }
    out.push(']');
    if out.len() > FORMAT_BYTES_MAX {
        let (limit, got) = (FORMAT_BYTES_MAX as u64, out.len() as u64);
        return Err(Refusal::TooMuch { what: "bytes of a record's description", limit, got });
    }
    Ok(out)
}
