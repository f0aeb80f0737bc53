//! vLLM ≥ 0.30: `KVCacheTensor`s and the name of an order.
//!
//! Page of layer `l`, block `b`: `offset + l × layer_stride + b × block_stride`. The strides inside
//! a page are not declared; they follow from the order, as in vLLM's `compute_layout_strides`. With
//! P = H × N × C, `L` the layers of the tensor and `B` the blocks:
//!
//! | order | layer stride | block stride | head stride | state stride | allocation |
//! |---|---|---|---|---|---|
//! | LBNHC | B × block stride | ≥ P | C | H C | = Σ layers |
//! | LBHNC | B × block stride | ≥ P | N C | C | = Σ layers |
//! | LHBNC | B P | = N C | B N C | C | = Σ layers |
//! | BLHNC | P | ≥ all layers' P | N C | C | = B × block stride |
//! | BLNHC | P | ≥ all layers' P | C | H C | = B × block stride |
//! | BHLNC | N C | ≥ all layers' P | L N C | C | = B × block stride |
//!
//! So in LHBNC a "block stride" is the distance between pieces of blocks, and in BHLNC a "layer
//! stride" the distance between pieces of layers. Block strides exceed the least where a backend
//! wants blocks aligned, but never by a page or more where blocks are outermost. Every declared
//! number is compared with this table; a number that could only be trusted is refused.
//!
//! The allocation must be accounted for to the byte, because a layer that the registration forgot
//! would be served with whatever lies in its blocks, and no canary covers it. (0.31 leaves the end
//! of a layer-first cache unused where a backend aligns its blocks; that is refused, too.)

pub mod groups;
mod packing;

pub(crate) use packing::Cells;
pub use packing::{Packing, StatePart};

use crate::layout::{Content, Dim, Layout, Region};
use crate::refusal::Refusal;
use crate::shape::{LogicalShape, Order, Sharding};

/// vLLM's `KVCacheTensor`: where the pages of some layers are. All in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvCacheTensor {
    /// Size of the whole allocation, the same in every tensor.
    pub size: u64,
    /// Where the first layer's block 0 starts.
    pub offset: u64,
    /// From one layer to the next.
    pub layer_stride: u64,
    /// From one block to the next.
    pub block_stride: u64,
    /// Names, in order.
    pub layers: Vec<String>,
}

/// What a worker registers: vLLM's `KVCacheConfig`, one group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvCache {
    /// Name of the physical order.
    pub order: String,
    /// Number of blocks.
    pub num_blocks: u64,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// The cache dtype by name (`bfloat16`, `fp8_e4m3`), not the type it is stored in.
    pub dtype: String,
    /// Class name of the group's spec.
    pub kind: String,
    /// H: head slots of a page on this rank.
    pub heads: u32,
    /// N: states of a page.
    pub states: u32,
    /// C: bytes of one (head, state).
    pub content_bytes: u32,
    /// What vLLM says that a page takes.
    pub page_bytes: u64,
    /// Bytes of the memory handed over; at least the tensors' `size`.
    pub memory_bytes: u64,
    /// The tensors, in vLLM's order.
    pub tensors: Vec<KvCacheTensor>,
}

/// Checks a registration and gives its layout. Layers are in the order of the tensors.
pub fn layout(cache: &KvCache) -> Result<Layout, Refusal> {
    let order: Order = cache.order.parse()?;
    let content = content(cache)?;
    if cache.num_blocks == 0 {
        return Err(Refusal::Zero { what: "blocks" });
    }
    if cache.memory_bytes == 0 {
        return Err(Refusal::Zero { what: "memory bytes" });
    }
    let expected =
        content.shape.page_bytes().ok_or(Refusal::Overflow { what: "heads × states × content" })?;
    if cache.page_bytes != expected {
        return Err(Refusal::PaddedPage { page_bytes: cache.page_bytes, expected });
    }
    if cache.states != cache.block_tokens {
        let (states, block_tokens) = (cache.states, cache.block_tokens);
        return Err(Refusal::StatesPerBlock { states, block_tokens });
    }
    let regions = regions(cache, order, &content)?;
    Layout::new(content, cache.memory_bytes, regions)
}

fn content(cache: &KvCache) -> Result<Content, Refusal> {
    let layers: Vec<String> = cache.tensors.iter().flat_map(|tensor| tensor.layers.iter().cloned()).collect();
    if cache.tensors.is_empty() {
        return Err(Refusal::Zero { what: "tensors" });
    }
    if cache.tensors.iter().any(|tensor| tensor.layers.is_empty()) {
        return Err(Refusal::Zero { what: "layers of a tensor" });
    }
    let count = u32::try_from(layers.len()).map_err(|_| Refusal::Overflow { what: "layers" })?;
    let (heads, states, content_bytes) = (cache.heads, cache.states, cache.content_bytes);
    let extents = [("heads", heads), ("states", states), ("content bytes", content_bytes)];
    if let Some((what, _)) = extents.into_iter().find(|(_, extent)| *extent == 0) {
        return Err(Refusal::Zero { what });
    }
    Ok(Content {
        shape: LogicalShape { layers: count, heads, states, content_bytes },
        block_tokens: cache.block_tokens,
        dtype: cache.dtype.parse()?,
        kind: cache.kind.parse()?,
        sharding: Sharding::SplitHeads,
        layers,
    })
}

/// Checked products, with the name of what overflowed.
fn times(what: &'static str, a: u64, b: u64) -> Result<u64, Refusal> {
    a.checked_mul(b).ok_or(Refusal::Overflow { what })
}

/// The declared tensors as regions, each number compared with the table above.
fn regions(cache: &KvCache, order: Order, content: &Content) -> Result<Vec<Region>, Refusal> {
    let page = cache.page_bytes;
    let all_pages = times("bytes of a block", page, content.layers.len() as u64)?;
    let Some(head) = cache.tensors.first() else { return Ok(Vec::new()) };
    let mut regions = Vec::with_capacity(cache.tensors.len());
    let (mut offset, mut first_layer) = (0u64, 0u32);
    for (index, tensor) in cache.tensors.iter().enumerate() {
        if tensor.size != head.size {
            return Err(Refusal::Allocation { tensor: index, expected: head.size, got: tensor.size });
        }
        let stride = |what, expected, got| match expected == got {
            true => Ok(()),
            false => Err(Refusal::Stride { tensor: index, what, order, expected, got }),
        };
        let layers = tensor.layers.len() as u64;
        check_block_stride(cache, order, all_pages, index)?;
        stride("block stride beside tensor 0's", head.block_stride, tensor.block_stride)?;
        let strides = strides(cache, order, tensor)?;
        stride("layer stride", strides.layer, tensor.layer_stride)?;
        stride("offset", offset, tensor.offset)?;
        regions.push(Region {
            first_layer,
            offset,
            layers: Dim { len: layers, stride: strides.layer },
            blocks: Dim { len: cache.num_blocks, stride: tensor.block_stride },
            heads: Dim { len: cache.heads.into(), stride: strides.head },
            states: Dim { len: cache.states.into(), stride: strides.state },
            content_bytes: cache.content_bytes.into(),
            element_bytes: content.dtype.element_bytes(),
            sharding: content.sharding.clone(),
        });
        // Inside a block the next tensor follows this one's pages; layer-first, its layers.
        let taken = if order.is_block_outermost() { page } else { strides.layer };
        let taken = times("bytes of a tensor", taken, layers)?;
        offset = offset.checked_add(taken).ok_or(Refusal::Overflow { what: "bytes of the tensors" })?;
        // Fits: the sum of all layers did.
        first_layer += layers as u32;
    }
    check_size(cache, order, offset, head)?;
    Ok(regions)
}

struct Strides {
    layer: u64,
    head: u64,
    state: u64,
}

/// The strides that the order asks for, given the declared block stride.
fn strides(cache: &KvCache, order: Order, tensor: &KvCacheTensor) -> Result<Strides, Refusal> {
    let (content, page) = (u64::from(cache.content_bytes), cache.page_bytes);
    // Parts of a page, which did not overflow.
    let head_run = content * u64::from(cache.states);
    let state_run = content * u64::from(cache.heads);
    let blocks = |bytes| times("blocks of a layer", cache.num_blocks, bytes);
    Ok(match order {
        Order::Lbnhc => Strides { layer: blocks(tensor.block_stride)?, head: content, state: state_run },
        Order::Lbhnc => Strides { layer: blocks(tensor.block_stride)?, head: head_run, state: content },
        Order::Lhbnc => Strides { layer: blocks(page)?, head: blocks(head_run)?, state: content },
        Order::Blhnc => Strides { layer: page, head: head_run, state: content },
        Order::Blnhc => Strides { layer: page, head: content, state: state_run },
        Order::Bhlnc => {
            let head = times("layers of a head", head_run, tensor.layers.len() as u64)?;
            Strides { layer: head_run, head, state: content }
        }
    })
}

fn check_block_stride(cache: &KvCache, order: Order, all_pages: u64, index: usize) -> Result<(), Refusal> {
    let Some(tensor) = cache.tensors.get(index) else { return Ok(()) };
    let got = tensor.block_stride;
    let least = match order {
        Order::Lbnhc | Order::Lbhnc => cache.page_bytes,
        Order::Lhbnc => {
            let expected = u64::from(cache.content_bytes) * u64::from(cache.states);
            if got != expected {
                return Err(Refusal::Stride { tensor: index, what: "block stride", order, expected, got });
            }
            expected
        }
        Order::Blhnc | Order::Blnhc | Order::Bhlnc => all_pages,
    };
    if got < least {
        return Err(Refusal::BlockStride { tensor: index, order, least, got });
    }
    if order.is_block_outermost() && got - least >= cache.page_bytes {
        return Err(Refusal::UnclaimedPage { order, page_bytes: cache.page_bytes, unclaimed: got - least });
    }
    Ok(())
}

/// vLLM's allocation is exactly the strided blocks where they are outermost, else all layers.
fn check_size(cache: &KvCache, order: Order, layers_end: u64, head: &KvCacheTensor) -> Result<(), Refusal> {
    let (got, num_blocks) = (head.size, cache.num_blocks);
    let expected = match order.is_block_outermost() {
        true => times("bytes of all blocks", head.block_stride, num_blocks)?,
        false => layers_end,
    };
    if got != expected {
        return Err(Refusal::AllocationSize { order, num_blocks, expected, got });
    }
    if got > cache.memory_bytes {
        return Err(Refusal::OutsideMemory { region: 0, end: got, memory_bytes: cache.memory_bytes });
    }
    Ok(())
}
