//! The eight cache shapes that Blade-KVT parses (`BLLM_KVTRANS_CACHE_SHAPE`).
//!
//! Every layer, or pack of layers, is a tensor of `num_blocks` blocks; `block_bytes` and
//! `token_bytes` count keys and values together, `ntpb = block_bytes / token_bytes`.
//!
//! | # | name | a tensor |
//! |---|---|---|
//! | 1 | RAGGED_FLASH | `[nb, bs, 2, H, hd]`, or MLA `[nb, bs, row]` |
//! | 2 | FLASH | `[2, nb, bs, H, hd]` |
//! | 3 | QWEN3_NEXT_FLASH | pages of kernel blocks `[2, kbs, H, hd]`; GDN states `[conv, ssm, pad]` |
//! | 4 | DPSK_V32_SPARSE_MLA | two tensors a layer: indexer rows, MLA rows |
//! | 5 | FLASHINFER | `[nb, 2, H, bs, hd]` |
//! | 6 | TURBOQUANT | as 3, a head's packed bytes |
//! | 7 | QWEN3_NEXT_FLASHINFER | pages of kernel blocks `[2, H, kbs, hd]` |
//! | 8 | KIMI_K3_MLA | pages hold a KDA state; MLA uses the start of one |
//!
//! With `pack > 1` a page holds several layers, kernel block `k` of layer `s` at `(k × pack + s) × kb`.

use crate::attention::Attention;
use crate::axes::expect;
use crate::content::{BlockContent, Plane, Rank, Role};
use crate::refusal::Refusal;
use crate::shape::{Dim, Order, Sharding};
use crate::shard::{Extent, Part, Piece, Shard};
use crate::vllm::{Cells, Packing, StatePart};

/// The order inside a page of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shape {
    /// 1: keys and values of a token together. The only one that MLA can have.
    Ragged,
    /// 2: all keys of a layer, then all its values.
    Flash,
    /// 3 and 6: keys of a kernel block, then its values, token by token.
    KernelFlash,
    /// 5 and 7: keys of a kernel block, then its values, head by head.
    KernelHnd,
}

/// A tensor with the layers that are packed into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Address.
    pub base: u64,
    /// The layers: as many as the pack size.
    pub layers: Vec<u32>,
}

/// The tensors of one worker, all of one geometry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensors {
    /// The worker.
    pub rank: Rank,
    /// The tensors.
    pub tensors: Vec<Tensor>,
    /// `layer_num_blocks`.
    pub num_blocks: u64,
    /// From block to block; a page may end in padding.
    pub block_bytes: u64,
    /// Bytes of a tensor: all its blocks.
    pub tensor_bytes: u64,
}

/// Keys and values, or latent rows, in such tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pages {
    /// Order inside a page.
    pub shape: Shape,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Tokens of a kernel block (`attn_kernel_blk_ntpb`); the block's where it is not cut.
    pub kernel_tokens: u32,
    /// `attn_pack_size`.
    pub pack: u32,
    /// Bytes of a token, keys and values together, on this rank.
    pub token_bytes: u64,
    /// What a token holds.
    pub attention: Attention,
}

impl Tensors {
    fn memory(&self) -> Result<Vec<Extent>, Refusal> {
        let bytes = self.block_bytes.checked_mul(self.num_blocks);
        let bytes = bytes.ok_or(Refusal::Overflow { what: "bytes of a tensor" })?;
        expect("bytes of a tensor", bytes, self.tensor_bytes)?;
        Ok(self.tensors.iter().map(|tensor| Extent { start: tensor.base, bytes }).collect())
    }
}

/// Strides of one page, all in bytes.
struct Inside {
    block: u64,
    kernel_block: u64,
    layer: u64,
    value: u64,
    head: u64,
    state: u64,
}

/// Shapes 1, 2, 3, 5, 6 and 7, and 8's MLA: the shard of the attention.
pub fn attention(tensors: &Tensors, pages: &Pages) -> Result<Shard, Refusal> {
    let content = pages.attention.content(pages.block_tokens)?;
    let inside = inside(tensors, pages)?;
    let kernel_blocks = pages.block_tokens / pages.kernel_tokens;
    let mut pieces = Vec::new();
    for tensor in &tensors.tensors {
        expect("layers of a tensor", pages.pack.into(), tensor.layers.len() as u64)?;
        for (side, plane) in (0u64..).zip(content.planes()) {
            let offset = tensor.base.checked_add(side * inside.value);
            pieces.push(Piece {
                part: Part {
                    plane: side as usize,
                    layers: tensor.layers.clone(),
                    heads: plane.heads_of(tensors.rank)?,
                },
                offset: offset.ok_or(Refusal::Overflow { what: "address of a tensor" })?,
                blocks: inside.block,
                layers: inside.layer,
                heads: inside.head,
                states: vec![
                    Dim { len: kernel_blocks.into(), stride: inside.kernel_block },
                    Dim { len: pages.kernel_tokens.into(), stride: inside.state },
                ],
            });
        }
    }
    Shard::new(content, tensors.memory()?, tensors.num_blocks, pieces)
}

fn inside(tensors: &Tensors, pages: &Pages) -> Result<Inside, Refusal> {
    let (tokens, kernel, pack) = (pages.block_tokens, pages.kernel_tokens, u64::from(pages.pack));
    if kernel == 0 || pack == 0 || tokens == 0 {
        return Err(Refusal::Zero { what: "tokens of a kernel block, or layers of a pack" });
    }
    if !tokens.is_multiple_of(kernel) {
        let expected = u64::from(tokens / kernel * kernel);
        return Err(Refusal::Inconsistent { what: "block tokens", expected, got: tokens.into() });
    }
    let heads = pages.attention.local_heads(tensors.rank)?;
    let (row, sides) = (pages.attention.row_bytes(), pages.attention.sides());
    expect("bytes of a token", sides.saturating_mul(heads).saturating_mul(row), pages.token_bytes)?;
    let overflow = || Refusal::Overflow { what: "bytes of a page" };
    let tok = pages.token_bytes;
    let kb = tok.checked_mul(kernel.into()).ok_or_else(overflow)?;
    let used = tok.checked_mul(tokens.into()).and_then(|page| page.checked_mul(pack)).ok_or_else(overflow)?;
    let block = tensors.block_bytes;
    if used > block {
        return Err(Refusal::Inconsistent { what: "bytes of a block, at least", expected: used, got: block });
    }
    if sides == 1 && pages.shape != Shape::Ragged {
        let why = "a latent row has no values to keep apart";
        return Err(Refusal::NotServed { what: "MLA in a shape with two sides", why });
    }
    let inside = Inside { block, kernel_block: kb * pack, layer: kb, value: tok / 2, head: row, state: tok };
    Ok(match pages.shape {
        Shape::Ragged => inside,
        Shape::KernelFlash => Inside { value: kb / 2, state: tok / 2, ..inside },
        Shape::KernelHnd => Inside { value: kb / 2, head: row * u64::from(kernel), state: row, ..inside },
        Shape::Flash => {
            expect("bytes of a block", used, block)?;
            expect("layers of a pack", 1, pack)?;
            let value = (block / 2).checked_mul(tensors.num_blocks).ok_or_else(overflow)?;
            Inside { block: block / 2, kernel_block: kb / 2, value, state: tok / 2, ..inside }
        }
    })
}

/// Shape 4: rows of an indexer and of MLA, each in its own tensors, under the same block ids.
pub fn sparse_mla(
    indexer: (&Tensors, u32),
    mla: (&Tensors, u32),
    block_tokens: u32,
    format: &str,
) -> Result<Shard, Refusal> {
    let mut planes = Vec::with_capacity(2);
    let (mut pieces, mut memory) = (Vec::new(), Vec::new());
    for ((tensors, bytes), role) in [(mla, Role::Latent), (indexer, Role::IndexKey)] {
        let tokens = u64::from(bytes) * u64::from(block_tokens);
        expect("bytes of a block", tokens, tensors.block_bytes)?;
        let (format, sharding) = (format.to_owned(), Sharding::Replicated);
        let plane = planes.len();
        planes.push(Plane { role, heads: 1, states: block_tokens, bytes, format, sharding });
        memory.extend(tensors.memory()?);
        pieces.extend(tensors.tensors.iter().map(|tensor| Piece {
            part: Part { plane, layers: tensor.layers.clone(), heads: 0..1 },
            offset: tensor.base,
            blocks: tensors.block_bytes,
            layers: 0,
            heads: 0,
            states: vec![Dim { len: block_tokens.into(), stride: bytes.into() }],
        }));
    }
    expect("blocks of the indexer", mla.0.num_blocks, indexer.0.num_blocks)?;
    Shard::new(BlockContent::new(block_tokens, planes)?, memory, mla.0.num_blocks, pieces)
}

/// The indexer group of shapes 3, 6 and 7: rows at the start of a page, the same on all ranks.
pub fn indexer(tensors: &Tensors, row_bytes: u32, block_tokens: u32, format: &str) -> Result<Shard, Refusal> {
    let latent = Attention::Latent { row_bytes, format: format.to_owned() };
    let mut planes = latent.planes(block_tokens);
    planes.iter_mut().for_each(|plane| plane.role = Role::IndexKey);
    let content = BlockContent::new(block_tokens, planes)?;
    let pieces = tensors.tensors.iter().map(|tensor| Piece {
        part: Part { plane: 0, layers: tensor.layers.clone(), heads: 0..1 },
        offset: tensor.base,
        blocks: tensors.block_bytes,
        layers: 0,
        heads: 0,
        states: vec![Dim { len: block_tokens.into(), stride: row_bytes.into() }],
    });
    Shard::new(content, tensors.memory()?, tensors.num_blocks, pieces.collect())
}

/// The state groups of shapes 3, 6, 7 and 8: GDN's and KDA's `[conv, recurrent, pad]`, or a short
/// convolution that every rank holds whole.
pub fn state(
    tensors: &Tensors,
    block_tokens: u32,
    parts: &[StatePart],
    replicated: bool,
) -> Result<Shard, Refusal> {
    let packing = Packing::States { parts: parts.to_vec(), replicated };
    let bytes = packing.state_bytes(tensors.rank)?;
    let content = u32::try_from(bytes).map_err(|_| Refusal::Overflow { what: "bytes of a state" })?;
    if bytes > tensors.block_bytes {
        let (expected, got) = (bytes, tensors.block_bytes);
        return Err(Refusal::Inconsistent { what: "bytes of a page, at least", expected, got });
    }
    let cells = Cells {
        order: Order::Lbhnc,
        rank: tensors.rank,
        kernel_blocks: 1,
        heads: 1,
        states: 1,
        content,
        head_stride: 0,
        state_stride: 0,
    };
    let placed = packing.place(cells)?;
    let planes = placed.iter().map(|placed| placed.plane.clone()).collect();
    let mut pieces = Vec::new();
    for tensor in &tensors.tensors {
        for (plane, placed) in placed.iter().enumerate() {
            let offset = tensor.base.checked_add(placed.at);
            pieces.push(Piece {
                part: Part {
                    plane,
                    layers: tensor.layers.clone(),
                    heads: placed.plane.heads_of(tensors.rank)?,
                },
                offset: offset.ok_or(Refusal::Overflow { what: "address of a state" })?,
                blocks: tensors.block_bytes,
                layers: 0,
                heads: placed.heads,
                states: vec![placed.states],
            });
        }
    }
    Shard::new(BlockContent::new(block_tokens, planes)?, tensors.memory()?, tensors.num_blocks, pieces)
}
