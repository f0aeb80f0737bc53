//! What a block holds, independent of engines: planes of logical elements.
//!
//! One logical byte is named by (role, layer, head, state, byte). A *plane* is all of them that have
//! one role: a tensor `[layers, heads, states, bytes]`, heads counted over the whole model. What an
//! engine packs into one run (`K | V`, a convolution's `q | k | v`) are several planes side by side,
//! so that engines which keep them apart hold the same content.

use std::fmt;
use std::ops::Range;

use crate::refusal::{Refusal, shown};
use crate::shape::Sharding;

/// What the elements of a plane are.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Keys.
    Key,
    /// Scales of the keys.
    KeyScale,
    /// Values.
    Value,
    /// Scales of the values.
    ValueScale,
    /// MLA's latent row, with its positional part.
    Latent,
    /// Keys of a sparse-attention indexer.
    IndexKey,
    /// Their scales.
    IndexScale,
    /// Part of a recurrent state, by its number within the block.
    State(u8),
    /// Bytes that only their writer can read.
    Opaque,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Role::Key => f.write_str("key"),
            Role::KeyScale => f.write_str("key_scale"),
            Role::Value => f.write_str("value"),
            Role::ValueScale => f.write_str("value_scale"),
            Role::Latent => f.write_str("latent"),
            Role::IndexKey => f.write_str("index_key"),
            Role::IndexScale => f.write_str("index_scale"),
            Role::State(part) => write!(f, "state{part}"),
            Role::Opaque => f.write_str("opaque"),
        }
    }
}

/// A rank of a tensor-parallel engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rank {
    /// Which one, below `size`.
    pub index: u32,
    /// How many there are.
    pub size: u32,
}

impl Rank {
    /// The only rank.
    pub const ALONE: Rank = Rank { index: 0, size: 1 };
}

/// All logical elements of one role.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Plane {
    /// What they are.
    pub role: Role,
    /// Heads of the whole model; channels, where a convolution's channels divide between ranks.
    pub heads: u32,
    /// States of a block: tokens, rows, or 1.
    pub states: u32,
    /// Contiguous bytes of one (head, state).
    pub bytes: u32,
    /// Name of the element format: a dtype, or who packed the bytes and how.
    pub format: String,
    /// How heads divide between ranks.
    pub sharding: Sharding,
}

impl Plane {
    /// The heads that a rank holds. With more ranks than heads, neighbours hold the same one.
    ///
    /// A [`Sharding::WholeState`] has one head per rank of the engine that wrote it.
    pub fn heads_of(&self, rank: Rank) -> Result<Range<u32>, Refusal> {
        let Rank { index, size } = rank;
        if index >= size {
            return Err(Refusal::Rank { index, size });
        }
        let uneven = Refusal::Uneven { role: self.role.to_string(), heads: self.heads, ranks: size };
        match self.sharding {
            Sharding::Replicated => Ok(0..self.heads),
            Sharding::WholeState if size == self.heads => Ok(index..index + 1),
            Sharding::SplitHeads | Sharding::SplitChannels { .. } if self.heads.is_multiple_of(size) => {
                let each = self.heads / size;
                Ok(index * each..(index + 1) * each)
            }
            Sharding::SplitHeads if size.is_multiple_of(self.heads) => {
                let head = index / (size / self.heads);
                Ok(head..head + 1)
            }
            _ => Err(uneven),
        }
    }

    /// Whether a record keeps the heads of a state together rather than the states of a head.
    ///
    /// True of channels: an element is a few bytes, and a row of them is what engines keep together.
    pub(crate) fn is_state_major(&self) -> bool {
        matches!(self.sharding, Sharding::SplitChannels { .. })
    }
}

impl fmt::Display for Plane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plane { role, heads, states, bytes, format, sharding } = self;
        let format = shown(format);
        write!(f, "{role}[heads={heads} states={states} bytes={bytes} format={format} {sharding}]")
    }
}

/// What a block holds: one plane per role. Only checked contents exist.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BlockContent {
    block_tokens: u32,
    planes: Vec<Plane>,
}

impl BlockContent {
    /// Checks and makes a content.
    pub fn new(block_tokens: u32, planes: Vec<Plane>) -> Result<BlockContent, Refusal> {
        if block_tokens == 0 {
            return Err(Refusal::Zero { what: "block tokens" });
        }
        if planes.is_empty() {
            return Err(Refusal::Zero { what: "planes" });
        }
        for (index, plane) in planes.iter().enumerate() {
            let extents = [("heads", plane.heads), ("states", plane.states), ("content bytes", plane.bytes)];
            if let Some((what, _)) = extents.into_iter().find(|(_, extent)| *extent == 0) {
                return Err(Refusal::Zero { what });
            }
            let cells = u64::from(plane.heads) * u64::from(plane.states);
            if cells.checked_mul(plane.bytes.into()).is_none_or(|bytes| bytes > 1 << 40) {
                return Err(Refusal::Overflow { what: "bytes of a plane" });
            }
            if plane.format.is_empty() {
                return Err(Refusal::NoFormat { role: plane.role.to_string() });
            }
            if planes[..index].iter().any(|other| other.role == plane.role) {
                return Err(Refusal::HeldTwice { role: plane.role.to_string(), layer: 0, head: 0 });
            }
        }
        Ok(BlockContent { block_tokens, planes })
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// The planes.
    pub fn planes(&self) -> &[Plane] {
        &self.planes
    }

    /// The first plane of those that a record keeps side by side with this one: what backends pack
    /// into one run per (head, state). Bundled planes follow each other and divide alike.
    pub(crate) fn bundle_of(&self, plane: usize) -> usize {
        let packs = |role| matches!(role, Role::Key | Role::KeyScale | Role::Value | Role::ValueScale);
        let alike = |a: &Plane, b: &Plane| {
            packs(a.role)
                && packs(b.role)
                && (a.heads, a.states, &a.sharding) == (b.heads, b.states, &b.sharding)
        };
        let Some(planes) = self.planes.get(..=plane) else { return plane };
        let touching = planes.windows(2).rev().take_while(|pair| alike(&pair[0], &pair[1]));
        plane - touching.count()
    }

    /// Equal, or the refusal that names the first difference.
    pub(crate) fn expect(&self, other: &BlockContent) -> Result<(), Refusal> {
        if self == other {
            return Ok(());
        }
        let differs = self.planes.iter().zip(&other.planes).find(|(a, b)| a != b);
        let (expected, got) = match differs {
            Some((a, b)) if self.planes.len() == other.planes.len() => (a.to_string(), b.to_string()),
            _ => (self.to_string(), other.to_string()),
        };
        Err(Refusal::ContentDiffers { expected, got })
    }
}

impl fmt::Display for BlockContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block_tokens={}", self.block_tokens)?;
        self.planes.iter().try_for_each(|plane| write!(f, " {plane}"))
    }
}
