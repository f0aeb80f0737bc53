//! What a block holds, and the names that engines use for it.

use std::fmt;
use std::str::FromStr;

use crate::refusal::{Refusal, shown};

/// One axis of an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dim {
    /// How many steps.
    pub len: u64,
    /// Bytes from one to the next.
    pub stride: u64,
}

/// The physical order of `[L, B, H, N, C]` in memory, outermost first, by vLLM's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Order {
    /// Layers, blocks, states, heads ("NHD"): vLLM's default without a connector.
    Lbnhc,
    /// Layers, blocks, heads, states ("HND"): the only order of CPU attention.
    Lbhnc,
    /// Layers, heads, blocks, states: a page is in H pieces.
    Lhbnc,
    /// Blocks, layers, heads, states: a block is one run. What we ask vLLM for.
    Blhnc,
    /// Blocks, layers, states, heads.
    Blnhc,
    /// Blocks, heads, layers, states: a block is one run, its pages are in H pieces.
    Bhlnc,
}

impl Order {
    /// All of them.
    pub const ALL: [Order; 6] =
        [Order::Lbnhc, Order::Lbhnc, Order::Lhbnc, Order::Blhnc, Order::Blnhc, Order::Bhlnc];

    /// vLLM's name.
    pub fn name(self) -> &'static str {
        match self {
            Order::Lbnhc => "LBNHC",
            Order::Lbhnc => "LBHNC",
            Order::Lhbnc => "LHBNC",
            Order::Blhnc => "BLHNC",
            Order::Blnhc => "BLNHC",
            Order::Bhlnc => "BHLNC",
        }
    }

    /// Whether the block is the outermost axis, so that all of a block lies together.
    pub fn is_block_outermost(self) -> bool {
        matches!(self, Order::Blhnc | Order::Blnhc | Order::Bhlnc)
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Order {
    type Err = Refusal;

    /// Takes vLLM's names exactly, and its older `NHD` and `HND`.
    fn from_str(name: &str) -> Result<Order, Refusal> {
        match name {
            "NHD" => Ok(Order::Lbnhc),
            "HND" => Ok(Order::Lbhnc),
            _ => {
                let known = Order::ALL.into_iter().find(|order| order.name() == name);
                known.ok_or_else(|| Refusal::UnknownOrder { got: shown(name) })
            }
        }
    }
}

/// The element format of a cache.
///
/// Storage types such as `uint8` are left out on purpose: vLLM stores several
/// incompatible formats in them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 4 bytes.
    Float32,
    /// 2 bytes.
    Float16,
    /// 2 bytes.
    Bfloat16,
    /// 1 byte; which format it is depends on the platform, so it equals no other.
    Fp8,
    /// 1 byte.
    Fp8E4m3,
    /// 1 byte.
    Fp8E5m2,
}

impl Dtype {
    /// Bytes of one element.
    pub fn element_bytes(self) -> u32 {
        match self {
            Dtype::Float32 => 4,
            Dtype::Float16 | Dtype::Bfloat16 => 2,
            Dtype::Fp8 | Dtype::Fp8E4m3 | Dtype::Fp8E5m2 => 1,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::Float32 => "float32",
            Dtype::Float16 => "float16",
            Dtype::Bfloat16 => "bfloat16",
            Dtype::Fp8 => "fp8",
            Dtype::Fp8E4m3 => "fp8_e4m3",
            Dtype::Fp8E5m2 => "fp8_e5m2",
        })
    }
}

impl FromStr for Dtype {
    type Err = Refusal;

    /// Takes vLLM's names and torch's (`torch.float32`), with their synonyms.
    fn from_str(name: &str) -> Result<Dtype, Refusal> {
        match name.strip_prefix("torch.").unwrap_or(name) {
            "float32" | "float" => Ok(Dtype::Float32),
            "float16" | "half" => Ok(Dtype::Float16),
            "bfloat16" => Ok(Dtype::Bfloat16),
            "fp8" => Ok(Dtype::Fp8),
            "fp8_e4m3" => Ok(Dtype::Fp8E4m3),
            "fp8_e5m2" => Ok(Dtype::Fp8E5m2),
            _ => Err(Refusal::UnknownDtype { got: shown(name) }),
        }
    }
}

/// How a plane divides between the ranks of a tensor-parallel engine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Sharding {
    /// Each rank holds a range of heads.
    SplitHeads,
    /// Every rank holds the same bytes (MLA, more ranks than heads).
    Replicated,
    /// Each rank holds a slice of each of these runs of channels (convolution states: q, k, v).
    SplitChannels {
        /// Channels of the parts, in order.
        parts: Vec<u32>,
    },
    /// The content is one opaque state that cannot be divided.
    WholeState,
}

impl fmt::Display for Sharding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sharding::SplitHeads => f.write_str("split_heads"),
            Sharding::Replicated => f.write_str("replicated"),
            Sharding::SplitChannels { parts } => write!(f, "split_channels{parts:?}"),
            Sharding::WholeState => f.write_str("whole_state"),
        }
    }
}
