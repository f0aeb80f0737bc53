//! SGLang's host pools (HiCache, 0.5.21), by `--hicache-mem-layout`.
//!
//! Keys are at `[0]`, values at `[1]` of the first axis; MLA has neither that axis nor heads.
//!
//! | name | axes |
//! |---|---|
//! | `layer_first` | `[2, layers, tokens, heads, dim]` |
//! | `page_first` | `[2, tokens, layers, heads, dim]` |
//! | `page_first_direct` | `[2, pages, layers, page_size, heads, dim]` |
//! | `page_head` | `[2, pages, heads, page_size, layers, dim]` |

use crate::attention::{Attention, pieces};
use crate::axes::{Axis, dense, expect};
use crate::content::Rank;
use crate::refusal::Refusal;
use crate::shard::{Extent, Shard};

/// The order of a host pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PoolOrder {
    /// A layer's tokens together.
    LayerFirst,
    /// A token's layers together.
    PageFirst,
    /// A page's layers together, each with its tokens.
    PageFirstDirect,
    /// A page's heads together.
    PageHead,
}

impl PoolOrder {
    /// All of them.
    pub const ALL: [PoolOrder; 4] =
        [PoolOrder::LayerFirst, PoolOrder::PageFirst, PoolOrder::PageFirstDirect, PoolOrder::PageHead];

    /// SGLang's name.
    pub fn name(self) -> &'static str {
        match self {
            PoolOrder::LayerFirst => "layer_first",
            PoolOrder::PageFirst => "page_first",
            PoolOrder::PageFirstDirect => "page_first_direct",
            PoolOrder::PageHead => "page_head",
        }
    }
}

/// A host pool of one rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPool {
    /// Its order.
    pub order: PoolOrder,
    /// Pages that fit: tokens / page size.
    pub pages: u64,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// The layers that this rank holds, in order.
    pub layers: Vec<u32>,
    /// What a token holds.
    pub attention: Attention,
    /// The rank.
    pub rank: Rank,
    /// Bytes of the pool.
    pub memory_bytes: u64,
}

/// Checks a pool and gives its shard; a block is a page.
pub fn shard(pool: &HostPool) -> Result<Shard, Refusal> {
    let content = pool.attention.content(pool.page_tokens)?;
    let (pages, tokens) = ((Axis::Block, pool.pages), (Axis::State, u64::from(pool.page_tokens)));
    let layers = (Axis::Layer, pool.layers.len() as u64);
    let heads = (Axis::Head, pool.attention.local_heads(pool.rank)?);
    let side = (Axis::Side, pool.attention.sides());
    let axes = match pool.order {
        PoolOrder::LayerFirst => [side, layers, pages, tokens, heads],
        PoolOrder::PageFirst => [side, pages, tokens, layers, heads],
        PoolOrder::PageFirstDirect => [side, pages, layers, tokens, heads],
        PoolOrder::PageHead if pool.attention.sides() == 1 => {
            let why = "MLA has no heads to put first; choose page_first with --hicache-mem-layout";
            return Err(Refusal::NotServed { what: "page_head of MLA", why });
        }
        PoolOrder::PageHead => [side, pages, heads, tokens, layers],
    };
    let strides = dense(&axes, pool.attention.row_bytes())?;
    expect("bytes of a host pool", strides.total, pool.memory_bytes)?;
    let pieces = pieces(&content, pool.rank, &pool.layers, 0, strides)?;
    Shard::new(content, vec![Extent { start: 0, bytes: pool.memory_bytes }], pool.pages, pieces)
}
