//! Attention as engines other than vLLM describe it: keys and values apart, or one latent row.

use crate::axes::Strides;
use crate::content::{BlockContent, Plane, Rank, Role};
use crate::refusal::Refusal;
use crate::shape::{Dim, Dtype, Sharding};
use crate::shard::{Part, Piece};

/// The content of an attention layer, over all ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attention {
    /// Keys and values of equally long heads, divided between ranks.
    KeyValue {
        /// KV heads over all ranks.
        total_heads: u32,
        /// Bytes of a key, and of a value.
        head_bytes: u32,
        /// The cache dtype.
        dtype: Dtype,
    },
    /// One latent row per token, the same on all ranks (MLA).
    Latent {
        /// Bytes of a row.
        row_bytes: u32,
        /// The cache dtype by name.
        format: String,
    },
}

impl Attention {
    /// Keys and values, or one row.
    pub(crate) fn sides(&self) -> u64 {
        match self {
            Attention::KeyValue { .. } => 2,
            Attention::Latent { .. } => 1,
        }
    }

    /// Bytes of one side of one head of a token.
    pub(crate) fn row_bytes(&self) -> u64 {
        match self {
            Attention::KeyValue { head_bytes, .. } => (*head_bytes).into(),
            Attention::Latent { row_bytes, .. } => (*row_bytes).into(),
        }
    }

    /// The planes of a block.
    pub(crate) fn planes(&self, tokens: u32) -> Vec<Plane> {
        match self {
            Attention::KeyValue { total_heads, head_bytes, dtype } => {
                let plane = |role| Plane {
                    role,
                    heads: *total_heads,
                    states: tokens,
                    bytes: *head_bytes,
                    format: dtype.to_string(),
                    sharding: Sharding::SplitHeads,
                };
                vec![plane(Role::Key), plane(Role::Value)]
            }
            Attention::Latent { row_bytes, format } => vec![Plane {
                role: Role::Latent,
                heads: 1,
                states: tokens,
                bytes: *row_bytes,
                format: format.clone(),
                sharding: Sharding::Replicated,
            }],
        }
    }

    /// The content of a block, with the dtype checked against the row.
    pub(crate) fn content(&self, tokens: u32) -> Result<BlockContent, Refusal> {
        if let Attention::KeyValue { head_bytes, dtype, .. } = self
            && !head_bytes.is_multiple_of(dtype.element_bytes())
        {
            let (element_bytes, dtype) = (dtype.element_bytes(), dtype.to_string());
            return Err(Refusal::ElementSize { content_bytes: *head_bytes, element_bytes, dtype });
        }
        BlockContent::new(tokens, self.planes(tokens))
    }

    /// Heads that a rank holds.
    pub(crate) fn local_heads(&self, rank: Rank) -> Result<u64, Refusal> {
        if let Attention::KeyValue { total_heads: 0, .. } = self {
            return Err(Refusal::Zero { what: "heads" });
        }
        let planes = self.planes(1);
        let first = planes.first().ok_or(Refusal::Zero { what: "planes" })?;
        Ok(first.heads_of(rank)?.len() as u64)
    }
}

/// Every plane of an attention content at the strides of one dense array: planes are its sides.
pub(crate) fn pieces(
    content: &BlockContent,
    rank: Rank,
    layers: &[u32],
    offset: u64,
    strides: Strides,
) -> Result<Vec<Piece>, Refusal> {
    let place = |(index, plane): (usize, &Plane)| {
        let side = (index as u64).checked_mul(strides.side).and_then(|at| at.checked_add(offset));
        Ok(Piece {
            part: Part { plane: index, layers: layers.to_vec(), heads: plane.heads_of(rank)? },
            offset: side.ok_or(Refusal::Overflow { what: "offset" })?,
            blocks: strides.block,
            layers: strides.layer,
            heads: strides.head,
            states: vec![Dim { len: plane.states.into(), stride: strides.state }],
        })
    };
    content.planes().iter().enumerate().map(place).collect()
}
