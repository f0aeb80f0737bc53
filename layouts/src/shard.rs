//! What one rank holds of a content, and where.

use std::ops::Range;

use crate::content::{BlockContent, Rank};
use crate::disjoint::{Comb, disjoint};
use crate::refusal::Refusal;
use crate::shape::Dim;

/// Part of a plane: a set of layers × a range of heads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Index of the plane in the content.
    pub plane: usize,
    /// Layers of the model, in the order of their places.
    pub layers: Vec<u32>,
    /// Heads of the model.
    pub heads: Range<u32>,
}

/// A part at regular distances in memory. All in bytes.
///
/// The bytes of (block, layer, head, state) start at
/// `offset + block × blocks + position of layer × layers + (head − heads.start) × heads + state's digits`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// What lies here.
    pub part: Part,
    /// Where the first layer's, head's and state's bytes of block 0 start.
    pub offset: u64,
    /// From block to block.
    pub blocks: u64,
    /// From layer to layer.
    pub layers: u64,
    /// From head to head.
    pub heads: u64,
    /// The states as digits, outermost first: kernel blocks in a block, states in a kernel block.
    pub states: Vec<Dim>,
}

/// Memory that a shard may use: addresses count from one base, or are absolute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub bytes: u64,
}

/// One rank's part of a content, in its memory. Only checked shards exist: every byte of every
/// block lies inside the memory, no two logical elements share a byte, and none is held twice.
///
/// Shards of different groups may use the same memory: a block belongs to one group at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    content: BlockContent,
    memory: Vec<Extent>,
    num_blocks: u64,
    pieces: Vec<Piece>,
}

/// Pieces and layers that one shard may describe; larger descriptions are refused.
const PIECES_MAX: usize = 1 << 14;
const LAYERS_MAX: usize = 1 << 16;
/// Digits of the state axis of a piece.
const DIGITS_MAX: usize = 4;
/// Addresses stay below this, so that sums and products of accepted strides never overflow.
const ADDRESS_MAX: u64 = 1 << 60;

impl Shard {
    /// Checks and makes a shard.
    pub fn new(
        content: BlockContent,
        memory: Vec<Extent>,
        num_blocks: u64,
        pieces: Vec<Piece>,
    ) -> Result<Shard, Refusal> {
        if num_blocks == 0 {
            return Err(Refusal::Zero { what: "blocks" });
        }
        if pieces.is_empty() {
            return Err(Refusal::Zero { what: "pieces" });
        }
        let layers: usize = pieces.iter().map(|piece| piece.part.layers.len()).sum();
        if pieces.len() > PIECES_MAX || layers > LAYERS_MAX {
            return Err(Refusal::Overflow { what: "pieces of a shard" });
        }
        let shard = Shard { content, memory, num_blocks, pieces };
        let mut combs = Vec::with_capacity(shard.pieces.len());
        for index in 0..shard.pieces.len() {
            combs.push(shard.checked_piece(index)?);
        }
        shard.check_parts()?;
        if !disjoint(combs) {
            return Err(Refusal::SharedBytes);
        }
        Ok(shard)
    }

    /// A piece's bytes, if its numbers make sense and lie in the memory.
    fn checked_piece(&self, index: usize) -> Result<Comb, Refusal> {
        let Piece { part, offset, blocks, layers, heads, states } = &self.pieces[index];
        let plane =
            self.content.planes().get(part.plane).ok_or(Refusal::Zero { what: "planes of a piece" })?;
        if part.layers.is_empty() {
            return Err(Refusal::Zero { what: "layers of a piece" });
        }
        if part.heads.start >= part.heads.end || part.heads.end > plane.heads {
            let (start, end) = (part.heads.start, part.heads.end);
            return Err(Refusal::HeadRange { role: plane.role.to_string(), start, end, heads: plane.heads });
        }
        if matches!(plane.sharding, crate::Sharding::Replicated) && part.heads != (0..plane.heads) {
            let (start, end) = (part.heads.start, part.heads.end);
            return Err(Refusal::HeadRange { role: plane.role.to_string(), start, end, heads: plane.heads });
        }
        if states.len() > DIGITS_MAX {
            return Err(Refusal::Overflow { what: "digits of the states" });
        }
        let described = states.iter().try_fold(1u64, |all, digit| all.checked_mul(digit.len));
        if described != Some(u64::from(plane.states)) {
            let (expected, got) = (u64::from(plane.states), described.unwrap_or(u64::MAX));
            return Err(Refusal::States { role: plane.role.to_string(), expected, got });
        }
        let mut axes = vec![
            Dim { len: self.num_blocks, stride: *blocks },
            Dim { len: part.layers.len() as u64, stride: *layers },
            Dim { len: part.heads.len() as u64, stride: *heads },
        ];
        axes.extend(states);
        let comb = Comb { start: *offset, axes, len: plane.bytes.into() };
        let end = comb.end().filter(|end| *end <= ADDRESS_MAX);
        let end = end.ok_or(Refusal::Overflow { what: "end of a piece" })?;
        let inside = |extent: &Extent| {
            extent.start <= *offset && extent.start.checked_add(extent.bytes).is_some_and(|last| end <= last)
        };
        match self.memory.iter().any(inside) {
            true => Ok(comb),
            false => Err(Refusal::OutsideMemory {
                region: index,
                end,
                memory_bytes: self.memory.iter().map(|extent| extent.bytes).max().unwrap_or(0),
            }),
        }
    }

    /// No logical element twice.
    fn check_parts(&self) -> Result<(), Refusal> {
        let mut held: Vec<(usize, u32, Range<u32>)> = Vec::new();
        for Piece { part, .. } in &self.pieces {
            held.extend(part.layers.iter().map(|layer| (part.plane, *layer, part.heads.clone())));
        }
        held.sort_by_key(|(plane, layer, heads)| (*plane, *layer, heads.start));
        for pair in held.windows(2) {
            let [(plane, layer, one), (next_plane, next_layer, two)] = pair else { continue };
            if (plane, layer) == (next_plane, next_layer) && two.start < one.end {
                let role = self.content.planes()[*plane].role.to_string();
                return Err(Refusal::HeldTwice { role, layer: *layer, head: two.start });
            }
        }
        Ok(())
    }

    /// The stored form of the same parts: one block without gaps, `[L, H, N, bytes]`, planes that
    /// divide alike side by side (so keys and values of a token touch), channels as `[L, N, H, bytes]`.
    pub fn record(&self) -> Result<Shard, Refusal> {
        Shard::record_of(self.content.clone(), self.pieces.iter().map(|piece| piece.part.clone()).collect())
    }

    /// The stored form of what a rank of some tensor-parallel size holds of the same layers.
    pub fn record_of_rank(&self, rank: Rank) -> Result<Shard, Refusal> {
        let part = |piece: &Piece| {
            let heads = self.content.planes()[piece.part.plane].heads_of(rank)?;
            Ok(Part { heads, ..piece.part.clone() })
        };
        let parts = self.pieces.iter().map(part).collect::<Result<_, _>>()?;
        Shard::record_of(self.content.clone(), parts)
    }

    /// The stored form of some parts. Layers and heads are put in order; parts of one plane with the
    /// same heads become one.
    pub fn record_of(content: BlockContent, parts: Vec<Part>) -> Result<Shard, Refusal> {
        let planes = content.planes().len();
        if parts.iter().any(|part| part.plane >= planes) {
            return Err(Refusal::Zero { what: "planes of a part" });
        }
        let parts = joined(&content, parts);
        let mut pieces: Vec<Piece> = Vec::with_capacity(parts.len());
        let mut offset = 0u64;
        let mut rest = parts.as_slice();
        while let Some(first) = rest.first() {
            let of = |part: &Part| (content.bundle_of(part.plane), part.heads.clone(), part.layers.clone());
            let beside = rest.iter().take_while(|part| of(part) == of(first)).count();
            let (bundle, others) = rest.split_at(beside);
            rest = others;
            let row = bundle.iter().map(|part| u64::from(content.planes()[part.plane].bytes)).sum();
            offset = place_bundle(&mut pieces, bundle, &content, row, offset)?;
        }
        pieces.iter_mut().for_each(|piece| piece.blocks = offset);
        Shard::new(content, vec![Extent { start: 0, bytes: offset }], 1, pieces)
    }

    /// What a rank of some tensor-parallel size holds of this, where it lies here.
    pub fn held_by(&self, rank: Rank) -> Result<Shard, Refusal> {
        let mut pieces = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            let (ours, theirs) = (&piece.part.heads, self.content.planes()[piece.part.plane].heads_of(rank)?);
            let heads = ours.start.max(theirs.start)..ours.end.min(theirs.end);
            if !heads.is_empty() {
                let mut piece = piece.clone();
                piece.offset += u64::from(heads.start - ours.start) * piece.heads;
                piece.part.heads = heads;
                pieces.push(piece);
            }
        }
        if pieces.is_empty() {
            let what = "records of a rank that holds no heads of this one";
            return Err(Refusal::NotServed { what, why: "there is nothing in them to load" });
        }
        Shard::new(self.content.clone(), self.memory.clone(), self.num_blocks, pieces)
    }

    /// What is held.
    pub fn content(&self) -> &BlockContent {
        &self.content
    }

    /// Number of blocks; block ids are below it.
    pub fn num_blocks(&self) -> u64 {
        self.num_blocks
    }

    /// Where it is held.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The memory that addresses refer to.
    pub fn memory(&self) -> &[Extent] {
        &self.memory
    }

    /// Bytes of a block that belong to the content; padding does not.
    pub fn block_bytes(&self) -> u64 {
        let bytes = |piece: &Piece| {
            let plane = &self.content.planes()[piece.part.plane];
            let cells = piece.part.layers.len() as u64 * piece.part.heads.len() as u64;
            cells * u64::from(plane.states) * u64::from(plane.bytes)
        };
        self.pieces.iter().map(bytes).sum()
    }

    /// The address of a logical element's bytes; `None` if this shard does not hold it. For checks
    /// and explanations: copies come from [`crate::plan_between`].
    pub fn address(&self, plane: usize, block: u64, layer: u32, head: u32, state: u32) -> Option<u64> {
        let planes = self.content.planes();
        if block >= self.num_blocks || state >= planes.get(plane)?.states {
            return None;
        }
        let holds = |piece: &&Piece| {
            let part = &piece.part;
            part.plane == plane && part.heads.contains(&head) && part.layers.contains(&layer)
        };
        let piece = self.pieces.iter().find(holds)?;
        let position = piece.part.layers.iter().position(|held| *held == layer)? as u64;
        let mut rest = u64::from(state);
        let mut at = piece.offset + block * piece.blocks + position * piece.layers;
        at += u64::from(head - piece.part.heads.start) * piece.heads;
        for digit in piece.states.iter().rev() {
            at += rest % digit.len * digit.stride;
            rest /= digit.len;
        }
        Some(at)
    }
}

/// One part per plane and range of heads, in the order of a record.
fn joined(content: &BlockContent, mut parts: Vec<Part>) -> Vec<Part> {
    let key = |part: &Part| (content.bundle_of(part.plane), part.heads.start, part.heads.end, part.plane);
    parts.sort_by_key(key);
    let mut out: Vec<Part> = Vec::with_capacity(parts.len());
    for part in parts {
        match out.last_mut() {
            Some(last) if (last.plane, &last.heads) == (part.plane, &part.heads) => {
                last.layers.extend(part.layers);
            }
            _ => out.push(part),
        }
    }
    out.iter_mut().for_each(|part| part.layers.sort_unstable());
    out
}

/// Places parts side by side, `row` bytes a state; returns where they end.
fn place_bundle(
    pieces: &mut Vec<Piece>,
    bundle: &[Part],
    content: &BlockContent,
    row: u64,
    offset: u64,
) -> Result<u64, Refusal> {
    let Some(first) = bundle.first() else { return Ok(offset) };
    let overflow = Refusal::Overflow { what: "bytes of a record" };
    let plane = content.planes().get(first.plane).ok_or(Refusal::Zero { what: "planes" })?;
    let (states, heads) = (u64::from(plane.states), first.heads.len() as u64);
    // A plane is at most 2^40 bytes, and its bundle has nine at the most.
    let page = row * states * heads;
    let (head, state) = match plane.is_state_major() {
        true => (row, row * heads),
        false => (row * states, row),
    };
    let end = page.checked_mul(first.layers.len() as u64).and_then(|all| all.checked_add(offset));
    let mut at = offset;
    for part in bundle {
        pieces.push(Piece {
            part: part.clone(),
            offset: at,
            blocks: 0,
            layers: page,
            heads: head,
            states: vec![Dim { len: states, stride: state }],
        });
        at += content.planes().get(part.plane).map_or(0, |plane| u64::from(plane.bytes));
    }
    end.ok_or(overflow)
}
