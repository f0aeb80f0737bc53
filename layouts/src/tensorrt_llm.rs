//! TensorRT-LLM's pools: V1's one tensor, V2's regions of slots.
//!
//! V1 (`get_unique_primary_pool`): `[blocks, layers, kv, heads, tokens, dim]`, or tokens before heads
//! for backends that ask for it; MLA has one side and one head. NVFP4 and DSA keep part of a block in
//! pools that a connector does not see, so they are refused.
//!
//! V2 (`register_kv_cache_layout`): page slot `i` of a region is `size` bytes at `base + stride × i`,
//! its buffers one behind the other. Addresses are absolute.

use crate::attention::{Attention, pieces};
use crate::axes::{Axis, Strides, dense, expect};
use crate::content::{BlockContent, Plane, Rank, Role};
use crate::refusal::{Refusal, shown};
use crate::shape::{Dim, Sharding};
use crate::shard::{Extent, Part, Piece, Shard};

/// The order inside a layer's page; it depends on the attention backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PageOrder {
    /// Heads, then tokens: the TRTLLM backend.
    Hnd,
    /// Tokens, then heads.
    Nhd,
}

impl PageOrder {
    /// A page's axes, for `heads` heads of `tokens` tokens.
    fn axes(self, heads: u64, tokens: u64) -> [(Axis, u64); 2] {
        match self {
            PageOrder::Hnd => [(Axis::Head, heads), (Axis::State, tokens)],
            PageOrder::Nhd => [(Axis::State, tokens), (Axis::Head, heads)],
        }
    }
}

/// The V1 manager's primary pool on one rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrimaryPool {
    /// Rows of the tensor.
    pub num_blocks: u64,
    /// The layers that this rank holds, in order.
    pub layers: Vec<u32>,
    /// Tokens of a block.
    pub tokens_per_block: u32,
    /// What a token holds.
    pub attention: Attention,
    /// The order inside a page.
    pub order: PageOrder,
    /// The rank.
    pub rank: Rank,
    /// Pools that the manager has; a connector sees one.
    pub pools: u32,
    /// Bytes of the tensor.
    pub memory_bytes: u64,
}

/// Checks a V1 pool and gives its shard.
pub fn primary(pool: &PrimaryPool) -> Result<Shard, Refusal> {
    if pool.pools != 1 {
        let why = "part of a block lies in pools that a connector does not see (block scales, indexer, \
                   other window sizes); use the V2 manager";
        return Err(Refusal::NotServed { what: "a V1 manager with several pools", why });
    }
    let content = pool.attention.content(pool.tokens_per_block)?;
    let heads = pool.attention.local_heads(pool.rank)?;
    let [outer, inner] = pool.order.axes(heads, pool.tokens_per_block.into());
    let axes = [
        (Axis::Block, pool.num_blocks),
        (Axis::Layer, pool.layers.len() as u64),
        (Axis::Side, pool.attention.sides()),
        outer,
        inner,
    ];
    let strides = dense(&axes, pool.attention.row_bytes())?;
    expect("bytes of the primary pool", strides.total, pool.memory_bytes)?;
    let pieces = pieces(&content, pool.rank, &pool.layers, 0, strides)?;
    Shard::new(content, vec![Extent { start: 0, bytes: pool.memory_bytes }], pool.num_blocks, pieces)
}

/// A buffer of a V2 region: one role of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buffer {
    /// The layer.
    pub layer: u32,
    /// `key`, `value` or `index_key`.
    pub role: String,
    /// How many pages of the kernel a slot holds; 1 is served.
    pub expansion: u32,
}

/// A V2 region: equally long slots at regular distances.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Address of slot 0.
    pub base: u64,
    /// Bytes of a slot's buffers.
    pub size: u64,
    /// From slot to slot.
    pub stride: u64,
    /// Number of slots.
    pub num_slots: u64,
    /// The buffers, one behind the other.
    pub buffers: Vec<Buffer>,
}

/// A V2 layer group on one rank. Page indices count within the group; -1 must be left out by who
/// reads them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerGroup {
    /// Tokens of a block.
    pub tokens_per_block: u32,
    /// What a token holds.
    pub attention: Attention,
    /// Bytes of an indexer's page, if the group has one: rows and scales in the kernel's own order.
    pub index_page_bytes: Option<u32>,
    /// The order inside a page.
    pub order: PageOrder,
    /// The rank.
    pub rank: Rank,
    /// Its regions, replicated ones included.
    pub regions: Vec<Region>,
}

/// Checks a V2 layer group and gives its shard.
pub fn layer_group(group: &LayerGroup) -> Result<Shard, Refusal> {
    let tokens = group.tokens_per_block;
    let mut planes = group.attention.content(tokens)?.planes().to_vec();
    if let Some(bytes) = group.index_page_bytes {
        let (role, format) = (Role::IndexKey, "tensorrt_llm index page".to_owned());
        planes.push(Plane { role, heads: 1, states: 1, bytes, format, sharding: Sharding::Replicated });
    }
    let content = BlockContent::new(tokens, planes)?;
    let heads = group.attention.local_heads(group.rank)?;
    let page = dense(&group.order.axes(heads, tokens.into()), group.attention.row_bytes())?;
    let num_blocks = group.regions.iter().map(|region| region.num_slots).min();
    let num_blocks = num_blocks.ok_or(Refusal::Zero { what: "regions" })?;
    let (mut pieces, mut memory) = (Vec::new(), Vec::with_capacity(group.regions.len()));
    for region in &group.regions {
        let mut at = 0u64;
        for buffer in &region.buffers {
            let (plane, bytes) = buffer_plane(&content, group, buffer, page.total)?;
            pieces.push(piece(&content, group.rank, plane, buffer, region, at, page)?);
            // Fits: a page is a plane's bytes at the most, and the size is compared below.
            at = at.checked_add(bytes).ok_or(Refusal::Overflow { what: "bytes of a slot" })?;
        }
        expect("bytes of a slot", at, region.size)?;
        let span = region.stride.checked_mul(region.num_slots - region.num_slots.min(1));
        let bytes = span.and_then(|span| span.checked_add(region.size));
        let bytes = bytes.ok_or(Refusal::Overflow { what: "bytes of a region" })?;
        memory.push(Extent { start: region.base, bytes });
    }
    Shard::new(content, memory, num_blocks, pieces)
}

/// Index of a buffer's plane, and its bytes in a slot.
fn buffer_plane(
    content: &BlockContent,
    group: &LayerGroup,
    buffer: &Buffer,
    page: u64,
) -> Result<(usize, u64), Refusal> {
    if buffer.expansion != 1 {
        let why = "how the kernel's pages lie in a slot is not declared";
        return Err(Refusal::NotServed { what: "a V2 buffer with expansion", why });
    }
    let latent = matches!(group.attention, Attention::Latent { .. });
    let role = match buffer.role.as_str() {
        "key" if latent => Role::Latent,
        "key" => Role::Key,
        "value" => Role::Value,
        "index_key" => Role::IndexKey,
        other => return Err(Refusal::UnknownRole { got: shown(other) }),
    };
    let plane = content.planes().iter().position(|plane| plane.role == role);
    let plane = plane.ok_or_else(|| Refusal::UnknownRole { got: shown(&buffer.role) })?;
    let index = group.index_page_bytes.unwrap_or(0).into();
    Ok((plane, if role == Role::IndexKey { index } else { page }))
}

fn piece(
    content: &BlockContent,
    rank: Rank,
    index: usize,
    buffer: &Buffer,
    region: &Region,
    at: u64,
    page: Strides,
) -> Result<Piece, Refusal> {
    let plane = content.planes().get(index).ok_or(Refusal::Zero { what: "planes" })?;
    let stride = if plane.states == 1 { 0 } else { page.state };
    Ok(Piece {
        part: Part { plane: index, layers: vec![buffer.layer], heads: plane.heads_of(rank)? },
        offset: region.base.checked_add(at).ok_or(Refusal::Overflow { what: "address of a buffer" })?,
        blocks: region.stride,
        layers: 0,
        heads: page.head,
        states: vec![Dim { len: plane.states.into(), stride }],
    })
}
