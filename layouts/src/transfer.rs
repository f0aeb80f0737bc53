//! From the shards of one engine to those of another: merged strided copies per pair of blocks.

use std::collections::{BTreeMap, HashMap};

use crate::content::BlockContent;
use crate::nest::{Axis, Nest, copies};
use crate::plan::StridedCopy;
use crate::refusal::Refusal;
use crate::shape::Dim;
use crate::shard::{Piece, Shard};

/// A copy between one source and one destination shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardCopy {
    /// Index of the source shard.
    pub from: usize,
    /// Index of the destination shard.
    pub to: usize,
    /// From block to block, in the source.
    pub src_block_stride: u64,
    /// From block to block, in the destination.
    pub dst_block_stride: u64,
    /// The runs of block 0 on both sides.
    pub copy: StridedCopy,
}

/// One contiguous run between two shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// Index of the source shard.
    pub from: usize,
    /// Index of the destination shard.
    pub to: usize,
    /// First byte in the source's memory.
    pub src: u64,
    /// First byte in the destination's memory.
    pub dst: u64,
    /// Bytes.
    pub len: u64,
}

/// How any block of a set of shards becomes a block of another set. Every byte of the destination's
/// content is written exactly once; nothing else is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    copies: Vec<ShardCopy>,
    src_blocks: u64,
    dst_blocks: u64,
    bytes: u64,
}

impl Plan {
    /// The copies of block 0 to block 0: descriptors.
    pub fn copies(&self) -> &[ShardCopy] {
        &self.copies
    }

    /// Bytes that one pair of blocks moves.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether both sides have such blocks. Ids come from other processes: ask where they enter.
    pub fn contains(&self, src_block: u64, dst_block: u64) -> bool {
        src_block < self.src_blocks && dst_block < self.dst_blocks
    }

    /// The runs of one pair of blocks, copy after copy.
    ///
    /// # Panics
    /// If a side has no such block: an address outside must never be computed.
    pub fn runs(&self, src_block: u64, dst_block: u64) -> impl Iterator<Item = Run> + '_ {
        assert!(
            self.contains(src_block, dst_block),
            "blocks {src_block} and {dst_block}: the sides have {} and {}",
            self.src_blocks,
            self.dst_blocks
        );
        self.copies.iter().flat_map(move |shard| {
            let src_shift = src_block * shard.src_block_stride;
            let dst_shift = dst_block * shard.dst_block_stride;
            shard.copy.each().map(move |(src, dst, len)| Run {
                from: shard.from,
                to: shard.to,
                src: src + src_shift,
                dst: dst + dst_shift,
                len,
            })
        })
    }
}

/// A piece that holds a layer of a plane.
#[derive(Clone, Copy)]
struct Holder<'a> {
    shard: usize,
    piece: &'a Piece,
    /// Position of the layer in the piece.
    position: u64,
}

type Holders<'a> = HashMap<(usize, u32), Vec<Holder<'a>>>;

/// Who copies to whom, at which block strides.
type Route = (usize, usize, u64, u64);

/// Plans the copies that fill the destination's shards from the source's.
///
/// Both sides hold the same content; the source covers what the destination holds. Where several
/// sources hold the same bytes (replicas), destinations take turns.
pub fn plan_between(source: &[Shard], destination: &[Shard]) -> Result<Plan, Refusal> {
    let content = same_content(source, destination)?;
    let mut holders = Holders::new();
    for (shard, held) in source.iter().enumerate() {
        for piece in held.pieces() {
            for (position, layer) in (0..).zip(&piece.part.layers) {
                let places = holders.entry((piece.part.plane, *layer)).or_default();
                places.push(Holder { shard, piece, position });
            }
        }
    }
    let mut nests: BTreeMap<Route, Vec<Nest>> = BTreeMap::new();
    for (to, wanted) in destination.iter().enumerate() {
        for piece in wanted.pieces() {
            fill(content, &holders, to, piece, &mut nests)?;
        }
    }
    let mut all = Vec::new();
    for ((from, to, src_block_stride, dst_block_stride), nests) in nests {
        let with = |copy| ShardCopy { from, to, src_block_stride, dst_block_stride, copy };
        all.extend(copies(nests)?.into_iter().map(with));
    }
    let blocks = |shards: &[Shard]| shards.iter().map(Shard::num_blocks).min().unwrap_or(0);
    let bytes = destination.iter().map(Shard::block_bytes).sum();
    debug_assert_eq!(all.iter().map(|shard| shard.copy.bytes()).sum::<u64>(), bytes);
    Ok(Plan { copies: all, src_blocks: blocks(source), dst_blocks: blocks(destination), bytes })
}

fn same_content<'a>(source: &'a [Shard], destination: &[Shard]) -> Result<&'a BlockContent, Refusal> {
    let first = source.first().ok_or(Refusal::Zero { what: "source shards" })?;
    if destination.is_empty() {
        return Err(Refusal::Zero { what: "destination shards" });
    }
    for shard in source.iter().chain(destination) {
        first.content().expect(shard.content())?;
    }
    Ok(first.content())
}

/// The nests that write one piece.
fn fill(
    content: &BlockContent,
    holders: &Holders<'_>,
    to: usize,
    wanted: &Piece,
    nests: &mut BTreeMap<Route, Vec<Nest>>,
) -> Result<(), Refusal> {
    let part = &wanted.part;
    let plane = &content.planes()[part.plane];
    let none = Vec::new();
    let of_layer = |layer: u32| holders.get(&(part.plane, layer)).unwrap_or(&none);
    // Between cuts, every source has all heads or none.
    let mut cuts = vec![part.heads.start, part.heads.end];
    for holder in part.layers.iter().flat_map(|layer| of_layer(*layer)) {
        let heads = &holder.piece.part.heads;
        cuts.extend([heads.start, heads.end].into_iter().filter(|cut| part.heads.contains(cut)));
    }
    cuts.sort_unstable();
    cuts.dedup();
    for cut in cuts.windows(2) {
        let (head, end) = (cut[0], cut[1]);
        let mut chosen = Vec::with_capacity(part.layers.len());
        for layer in &part.layers {
            let having = |holder: &&Holder<'_>| holder.piece.part.heads.contains(&head);
            let having: Vec<_> = of_layer(*layer).iter().filter(having).collect();
            let Some(holder) = having.get(to % having.len().max(1)) else {
                return Err(Refusal::NoSource { role: plane.role.to_string(), layer: *layer, head });
            };
            chosen.push(**holder);
        }
        for (route, nest) in layer_runs(&chosen, wanted, (head, end), plane.bytes, to)
            .ok_or_else(|| Refusal::KernelBlocks { role: plane.role.to_string() })?
        {
            nests.entry(route).or_default().push(nest);
        }
    }
    Ok(())
}

/// Groups neighbouring layers that come from one piece at a regular distance.
fn layer_runs(
    chosen: &[Holder<'_>],
    wanted: &Piece,
    (head, end): (u32, u32),
    bytes: u32,
    to: usize,
) -> Option<Vec<(Route, Nest)>> {
    let mut out = Vec::new();
    let mut at = 0;
    while let Some(first) = chosen.get(at) {
        let same = |other: &Holder<'_>| other.shard == first.shard && std::ptr::eq(other.piece, first.piece);
        let step = |a: &Holder<'_>, b: &Holder<'_>| b.position.checked_sub(a.position);
        let stride = chosen.get(at + 1).filter(|next| same(next)).and_then(|next| step(first, next));
        let regular = chosen[at..]
            .windows(2)
            .take_while(|pair| stride.is_some() && same(&pair[1]) && step(&pair[0], &pair[1]) == stride);
        let count = regular.count() + 1;
        let source = first.piece;
        let head_of = |piece: &Piece| u64::from(head - piece.part.heads.start) * piece.heads;
        let mut axes = digits(&source.states, &wanted.states)?;
        axes.push(Axis { len: u64::from(end - head), src: source.heads, dst: wanted.heads });
        let (layer_src, layer_dst) = (source.layers * stride.unwrap_or(0), wanted.layers);
        axes.push(Axis { len: count as u64, src: layer_src, dst: layer_dst });
        let nest = Nest {
            src: source.offset + first.position * source.layers + head_of(source),
            dst: wanted.offset + at as u64 * wanted.layers + head_of(wanted),
            len: bytes.into(),
            axes,
        };
        out.push(((first.shard, to, source.blocks, wanted.blocks), nest));
        at += count;
    }
    Some(out)
}

/// The common refinement of two ways to count states; `None` if there is none.
fn digits(source: &[Dim], wanted: &[Dim]) -> Option<Vec<Axis>> {
    let mut axes = Vec::with_capacity(source.len() + wanted.len());
    let (mut sources, mut wanteds) = (source.iter().rev().copied(), wanted.iter().rev().copied());
    let done = Dim { len: 1, stride: 0 };
    let (mut src, mut dst) = (done, done);
    loop {
        while src.len == 1 {
            match sources.next() {
                Some(dim) => src = dim,
                None => break,
            }
        }
        while dst.len == 1 {
            match wanteds.next() {
                Some(dim) => dst = dim,
                None => break,
            }
        }
        if src.len == 1 || dst.len == 1 {
            return (src.len == dst.len).then_some(axes);
        }
        let len = src.len.min(dst.len);
        if !src.len.is_multiple_of(len) || !dst.len.is_multiple_of(len) {
            return None;
        }
        axes.push(Axis { len, src: src.stride, dst: dst.stride });
        src = Dim { len: src.len / len, stride: src.stride * len };
        dst = Dim { len: dst.len / len, stride: dst.stride * len };
    }
}
