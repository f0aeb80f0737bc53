//! vLLM's groups: every spec, padding, kernel blocks, and groups that alias one pool.
//!
//! A [`Group`] is a `KVCacheGroupSpec` with its tensors; [`shards`] takes all groups of a worker,
//! because only all of them account for the allocation. Each becomes a [`Shard`] of its own: a block
//! id belongs to one group at a time, so groups may lie on the same bytes.
//!
//! Declared strides are compared with those of vLLM's `compute_layout_strides` (the table in
//! [`super`]); a number that could only be trusted is refused.

use super::KvCacheTensor;
use super::packing::{Cells, Packing, Placed};
use crate::content::{BlockContent, Rank, Role};
use crate::refusal::{Refusal, shown};
use crate::shape::{Dim, Order};
use crate::shard::{Extent, Part, Piece, Shard};

/// The memory that all groups of a worker share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// The physical order.
    pub order: Order,
    /// Number of blocks.
    pub num_blocks: u64,
    /// Bytes of the memory handed over; at least the tensors' `size`.
    pub memory_bytes: u64,
    /// The worker's place in its tensor-parallel group.
    pub rank: Rank,
}

/// A tensor with the spec of its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pages {
    /// Where the pages are.
    pub tensor: KvCacheTensor,
    /// H: head slots of a page (`num_heads`).
    pub heads: u32,
    /// N: states of a page (`num_states`).
    pub states: u32,
    /// C: bytes of one (head, state) (`state_content_size_bytes`).
    pub content_bytes: u32,
    /// What vLLM says that a page takes, padding included (`page_size_bytes`).
    pub page_bytes: u64,
    /// Kernel blocks in a block: `block_size / kernel_block_size`.
    pub kernel_blocks: u32,
    /// What the bytes mean.
    pub packing: Packing,
}

/// One KV-cache group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Its tensors; at most one for each role of plane.
    pub pages: Vec<Pages>,
}

/// The number of a layer, from the one number in its name (vLLM's `extract_layer_index`).
pub fn layer_number(name: &str) -> Result<u32, Refusal> {
    let mut numbers = name.split('.').filter_map(|word| word.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(number), None) => Ok(number),
        _ => Err(Refusal::LayerNumber { name: shown(name) }),
    }
}

/// Checks all groups of a worker and gives the shard of each, layers by the numbers in their names.
pub fn shards(pool: Pool, groups: &[Group]) -> Result<Vec<Shard>, Refusal> {
    check(pool, groups)?;
    groups.iter().map(|group| shard(pool, group, &mut layer_number)).collect()
}

/// Every declared number follows from the others, and the allocation is accounted for.
pub(crate) fn check(pool: Pool, groups: &[Group]) -> Result<(), Refusal> {
    if pool.num_blocks == 0 {
        return Err(Refusal::Zero { what: "blocks" });
    }
    let tensors = || groups.iter().flat_map(|group| &group.pages).map(|pages| &pages.tensor);
    let first = tensors().next().ok_or(Refusal::Zero { what: "tensors" })?;
    for (tensor, other) in tensors().enumerate() {
        if other.size != first.size {
            return Err(Refusal::Allocation { tensor, expected: first.size, got: other.size });
        }
    }
    if first.size > pool.memory_bytes {
        let (end, memory_bytes) = (first.size, pool.memory_bytes);
        return Err(Refusal::OutsideMemory { region: 0, end, memory_bytes });
    }
    // Where layers are outermost, block b owns the bytes from b × its stride on in each run of blocks. Strides that
    // differ would give a byte to different blocks of different groups. (Where blocks are outermost, they are equal.)
    let differs = tensors().any(|tensor| tensor.block_stride != first.block_stride);
    if groups.len() > 1 && !pool.order.is_block_outermost() && differs {
        let what = "KV cache groups with pages of different sizes, in an order that keeps layers apart";
        let why = "blocks of one would share bytes with other blocks of another; choose a block-first order";
        return Err(Refusal::NotServed { what, why });
    }
    let mut longest = 0;
    let mut page = u64::MAX;
    for group in groups {
        longest = longest.max(group_end(pool, group, first)?);
        page = group.pages.iter().map(|pages| pages.page_bytes).min().unwrap_or(0).min(page);
    }
    check_size(pool, first, longest, page)
}

/// Compares the group's strides and offsets; returns where it ends: in a block, or in the memory.
fn group_end(pool: Pool, group: &Group, first: &KvCacheTensor) -> Result<u64, Refusal> {
    let order = pool.order;
    let mut offset = 0u64;
    for (index, pages) in group.pages.iter().enumerate() {
        let tensor = &pages.tensor;
        let layers = tensor.layers.len() as u64;
        if layers == 0 {
            return Err(Refusal::Zero { what: "layers of a tensor" });
        }
        let stride = |what, expected, got| match expected == got {
            true => Ok(()),
            false => Err(Refusal::Stride { tensor: index, what, order, expected, got }),
        };
        if order.is_block_outermost() {
            stride("block stride beside the first tensor's", first.block_stride, tensor.block_stride)?;
        } else if !matches!(order, Order::Lhbnc) && tensor.block_stride < pages.page_bytes {
            let (least, got) = (pages.page_bytes, tensor.block_stride);
            return Err(Refusal::BlockStride { tensor: index, order, least, got });
        }
        let natural = strides(pool, pages, 1, tensor.block_stride)?;
        stride("layer stride", natural.layer, tensor.layer_stride)?;
        stride("block stride", natural.block, tensor.block_stride)?;
        stride("offset", offset, tensor.offset)?;
        let each = if order.is_block_outermost() { pages.page_bytes } else { natural.layer };
        let overflow = Refusal::Overflow { what: "bytes of the tensors" };
        offset = each.checked_mul(layers).and_then(|all| all.checked_add(offset)).ok_or(overflow)?;
    }
    Ok(offset)
}

/// The allocation is accounted for: the largest group fills it, up to alignment.
fn check_size(pool: Pool, first: &KvCacheTensor, longest: u64, page: u64) -> Result<(), Refusal> {
    let (order, num_blocks, got) = (pool.order, pool.num_blocks, first.size);
    let expected = match order.is_block_outermost() {
        true => {
            let (tensor, stride) = (0, first.block_stride);
            if stride < longest {
                return Err(Refusal::BlockStride { tensor, order, least: longest, got: stride });
            }
            if stride - longest >= page {
                let unclaimed = stride - longest;
                return Err(Refusal::UnclaimedPage { order, page_bytes: page, unclaimed });
            }
            let overflow = Refusal::Overflow { what: "bytes of all blocks" };
            stride.checked_mul(num_blocks).ok_or(overflow)?
        }
        false => longest,
    };
    match got == expected {
        true => Ok(()),
        false => Err(Refusal::AllocationSize { order, num_blocks, expected, got }),
    }
}

#[derive(Debug, Clone, Copy)]
struct Strides {
    layer: u64,
    block: u64,
    head: u64,
    state: u64,
}

/// vLLM's `compute_layout_strides` with a given block stride, for pages cut into kernel blocks.
fn strides(pool: Pool, pages: &Pages, kernel_blocks: u64, block_stride: u64) -> Result<Strides, Refusal> {
    let (heads, layers) = (u64::from(pages.heads), pages.tensor.layers.len() as u64);
    let states = u64::from(pages.states) / kernel_blocks;
    let blocks =
        pool.num_blocks.checked_mul(kernel_blocks).ok_or(Refusal::Overflow { what: "kernel blocks" })?;
    let padded = pages.page_bytes != dense(pages)?;
    // Axes innermost first, as (which, length).
    let (l, b, h, n) = ((0, layers), (1, blocks), (2, heads), (3, states));
    let order = match pool.order {
        Order::Lbhnc => [n, h, b, l],
        Order::Lbnhc => [h, n, b, l],
        Order::Lhbnc => [n, b, h, l],
        Order::Blhnc => [n, h, l, b],
        Order::Blnhc => [h, n, l, b],
        Order::Bhlnc => [n, l, h, b],
    };
    // Padding goes to the inner one of layers and blocks; a longer axis between them and the page's
    // tail would be torn.
    let grid = order.iter().position(|axis| axis.0 < 2).unwrap_or(0);
    if padded && order[grid..].iter().any(|axis| axis.0 >= 2 && axis.1 > 1) {
        let expected = dense(pages)?;
        return Err(Refusal::PaddedPage { page_bytes: pages.page_bytes, expected });
    }
    let overflow = Refusal::Overflow { what: "strides of a tensor" };
    let mut out = [0u64; 4];
    let mut current = u64::from(pages.content_bytes);
    for (index, (axis, len)) in order.into_iter().enumerate() {
        if padded && index == grid {
            current = current.max(pages.page_bytes);
        }
        // Only layer-first orders leave the blocks' stride to the page; the rest declare it.
        let fixed = axis == 1 && (pool.order != Order::Lhbnc);
        out[axis] = if fixed { block_stride / kernel_blocks } else { current };
        current = out[axis].checked_mul(len).ok_or(overflow.clone())?;
    }
    let [layer, block, head, state] = out;
    Ok(Strides { layer, block, head, state })
}

/// H × N × C.
fn dense(pages: &Pages) -> Result<u64, Refusal> {
    let extents = [("heads", pages.heads), ("states", pages.states), ("content bytes", pages.content_bytes)];
    if let Some((what, _)) = extents.into_iter().find(|(_, extent)| *extent == 0) {
        return Err(Refusal::Zero { what });
    }
    let cells = u64::from(pages.heads) * u64::from(pages.states);
    let dense = cells.checked_mul(pages.content_bytes.into());
    let dense = dense.ok_or(Refusal::Overflow { what: "heads × states × content" })?;
    match dense <= pages.page_bytes {
        true => Ok(dense),
        false => Err(Refusal::PaddedPage { page_bytes: pages.page_bytes, expected: dense }),
    }
}

fn check_kernel_blocks(pages: &Pages) -> Result<(), Refusal> {
    let (ratio, dense) = (pages.kernel_blocks, dense(pages)?);
    if ratio == 0 {
        return Err(Refusal::Zero { what: "kernel blocks of a block" });
    }
    if ratio == 1 {
        return Ok(());
    }
    if !pages.states.is_multiple_of(ratio) {
        let (expected, got) = (u64::from(pages.states / ratio * ratio), pages.states.into());
        return Err(Refusal::Inconsistent { what: "states in whole kernel blocks", expected, got });
    }
    let got = pages.tensor.block_stride;
    if got != dense {
        let what = "block stride, the dense page that kernel blocks need";
        return Err(Refusal::Inconsistent { what, expected: dense, got });
    }
    Ok(())
}

/// Where a cell of a page lies: `kernel block × block + head × head + state × state`, from its start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Inside {
    /// States of a kernel block.
    pub(crate) states: u32,
    /// From kernel block to kernel block.
    pub(crate) block: u64,
    pub(crate) head: u64,
    pub(crate) state: u64,
}

/// The inside of a page, by the order alone: what vLLM's own views say, whatever a backend packs there.
pub(crate) fn inside(pool: Pool, pages: &Pages) -> Result<Inside, Refusal> {
    check_kernel_blocks(pages)?;
    let strides = strides(pool, pages, pages.kernel_blocks.into(), pages.tensor.block_stride)?;
    let Strides { block, head, state, .. } = strides;
    Ok(Inside { states: pages.states / pages.kernel_blocks, block, head, state })
}

/// The shard of one group, its strides having been checked.
pub(crate) fn shard(
    pool: Pool,
    group: &Group,
    number: &mut dyn FnMut(&str) -> Result<u32, Refusal>,
) -> Result<Shard, Refusal> {
    let (mut planes, mut pieces) = (Vec::new(), Vec::new());
    for pages in &group.pages {
        let inner = inside(pool, pages)?;
        let cells = Cells {
            order: pool.order,
            rank: pool.rank,
            kernel_blocks: pages.kernel_blocks,
            heads: pages.heads,
            states: inner.states,
            content: pages.content_bytes,
            head_stride: inner.head,
            state_stride: inner.state,
        };
        let layers = pages.tensor.layers.iter().map(|name| number(name));
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        for Placed { plane, at, heads, states } in pages.packing.place(cells)? {
            let held = plane.heads_of(pool.rank)?;
            // Several tensors may hold layers of one plane: Gemma-like models with mixed page sizes.
            let known = planes.iter().position(|other| *other == plane);
            let index = known.unwrap_or(planes.len());
            if known.is_none() {
                planes.push(plane);
            }
            pieces.push(Piece {
                part: Part { plane: index, layers: layers.clone(), heads: held },
                offset: pages.tensor.offset.checked_add(at).ok_or(Refusal::Overflow { what: "offset" })?,
                blocks: pages.tensor.block_stride,
                layers: pages.tensor.layer_stride,
                heads,
                states: vec![Dim { len: pages.kernel_blocks.into(), stride: inner.block }, states],
            });
        }
    }
    planes_in_order(&mut planes, &mut pieces);
    if planes.windows(2).any(|pair| pair[0].role == pair[1].role) {
        let what = "layers of one KV cache group that differ in heads, head size or format";
        let why = "a record holds one shape of each role";
        return Err(Refusal::NotServed { what, why });
    }
    let content = BlockContent::new(group.block_tokens, planes)?;
    Shard::new(content, vec![Extent { start: 0, bytes: pool.memory_bytes }], pool.num_blocks, pieces)
}

/// Sorts planes by role, so that the order of tensors does not tell contents apart.
fn planes_in_order(planes: &mut Vec<crate::Plane>, pieces: &mut [Piece]) {
    let mut order: Vec<usize> = (0..planes.len()).collect();
    // A token's scales stay behind its keys, its values behind those: see `Role`.
    order.sort_by_key(|index| planes.get(*index).map_or(Role::Opaque, |plane| plane.role));
    for piece in pieces {
        piece.part.plane = order.iter().position(|index| *index == piece.part.plane).unwrap_or(0);
    }
    *planes = order.into_iter().filter_map(|index| planes.get(index).cloned()).collect();
}
