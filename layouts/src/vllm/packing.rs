//! What vLLM's backends pack into a page, as planes and their places in it.
//!
//! A page is `[H, N, C]` to vLLM; what the bytes mean is the backend's. Each packing says which planes
//! it holds and where they start, relative to a kernel page, and refuses the orders in which its
//! bytes would not be where it thinks.

use crate::axes::expect;
use crate::content::{Plane, Rank, Role};
use crate::refusal::Refusal;
use crate::shape::{Dim, Dtype, Order, Sharding};

/// Part of a recurrent state page, in the order in which the page holds them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StatePart {
    /// A convolution's window: `rows` × channels, the channels of every part (q, k, v) divided
    /// between ranks on their own.
    Channels {
        /// Rows of the window.
        rows: u32,
        /// Channels of each part, over all ranks.
        parts: Vec<u32>,
        /// Bytes of an element.
        element_bytes: u32,
        /// `[channels, rows]` ("DS") rather than `[rows, channels]` ("SD").
        channels_first: bool,
        /// Name of the element's dtype.
        format: String,
    },
    /// One state per head: Mamba's ssm, GDN's and KDA's recurrent state.
    Heads {
        /// Heads over all ranks.
        total: u32,
        /// Bytes of a head.
        bytes: u32,
        /// Name of the element's dtype.
        format: String,
    },
    /// Bytes that only this rank can use.
    Whole {
        /// How many.
        bytes: u32,
        /// Name of the format.
        format: String,
    },
}

/// What a backend packs into the pages of a layer.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packing {
    /// `C = [K | V]` per head: FlashAttention, Triton, FlashInfer, in any dtype, fp8 included.
    KeyValue {
        /// KV heads over all ranks.
        total_heads: u32,
        /// Bytes of a key.
        key_bytes: u32,
        /// Bytes of a value.
        value_bytes: u32,
        /// The cache dtype.
        dtype: Dtype,
    },
    /// `C = [K | K scale | V | V scale]`, scales of 4 bytes: `*_per_token_head`.
    ScaledKeyValue {
        /// KV heads over all ranks.
        total_heads: u32,
        /// Bytes of a key without its scale.
        key_bytes: u32,
        /// Bytes of a value without its scale.
        value_bytes: u32,
        /// The cache dtype by name (`int8_per_token_head`).
        format: String,
    },
    /// Two head slots, the plane of keys and that of values, `C` = all heads of a token (ROCm, B12X).
    KeyValuePlanes {
        /// KV heads over all ranks.
        total_heads: u32,
        /// Bytes of a head, in either plane.
        head_bytes: u32,
        /// The cache dtype.
        dtype: Dtype,
    },
    /// Pages `[K data | K scales | V data | V scales]`, twice the KV heads as head slots. Scales may
    /// be permuted inside a head, and travel as they are.
    Nvfp4 {
        /// KV heads over all ranks.
        total_heads: u32,
        /// Bytes of a head's data, in either half.
        data_bytes: u32,
        /// Bytes of a head's scales, in either half.
        scale_bytes: u32,
    },
    /// One latent row per state, the same on all ranks: MLA in bf16 or fp8, `fp8_ds_mla`.
    Latent {
        /// The cache dtype by name.
        format: String,
    },
    /// Rows of keys first, then their scales: DSA's indexer.
    Index {
        /// Bytes of a key.
        key_bytes: u32,
        /// Bytes of its scale.
        scale_bytes: u32,
        /// The cache dtype by name.
        format: String,
    },
    /// Every (head, kernel block) is one run that only its writer can read: CPU attention.
    OpaqueHeads {
        /// KV heads over all ranks.
        total_heads: u32,
        /// Who packed it: backend, instruction set, dtype.
        format: String,
    },
    /// Every kernel page is one run that only its writer can read, the same on all ranks:
    /// `nvfp4_ds_mla`, DSv4's padded states.
    OpaquePage {
        /// Who packed it.
        format: String,
    },
    /// Recurrent states, one after the other: Mamba, GDN, KDA, short convolutions.
    States {
        /// The parts.
        parts: Vec<StatePart>,
        /// Every rank holds all of them.
        replicated: bool,
    },
}

/// The page that a packing fills: H, N of a kernel block, C, and the strides inside.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cells {
    pub(crate) order: Order,
    pub(crate) rank: Rank,
    /// Kernel blocks in a block.
    pub(crate) kernel_blocks: u32,
    pub(crate) heads: u32,
    /// States of a kernel block.
    pub(crate) states: u32,
    pub(crate) content: u32,
    pub(crate) head_stride: u64,
    pub(crate) state_stride: u64,
}

/// A plane, and where it lies in a kernel page.
#[derive(Debug, Clone)]
pub(crate) struct Placed {
    pub(crate) plane: Plane,
    pub(crate) at: u64,
    pub(crate) heads: u64,
    /// States of a kernel page; kernel blocks are an outer digit.
    pub(crate) states: Dim,
}

impl Cells {
    fn kernel_page(&self) -> u64 {
        u64::from(self.heads) * u64::from(self.states) * u64::from(self.content)
    }

    /// Refuses orders that tear a kernel page.
    fn whole_pages(&self) -> Result<(), Refusal> {
        let torn = matches!(self.order, Order::Lhbnc | Order::Bhlnc) && self.heads > 1;
        let why = "the order tears its pages; choose LBHNC or BLHNC with VLLM_KV_CACHE_LAYOUT";
        if torn {
            Err(Refusal::NotServed { what: "a page with an inner layout of its own", why })
        } else {
            Ok(())
        }
    }

    /// Refuses orders in which heads of a token lie between the tokens of a head.
    fn whole_heads(&self) -> Result<(), Refusal> {
        let mixed = matches!(self.order, Order::Lbnhc | Order::Blnhc) && self.heads > 1;
        let why = "the order mixes heads; choose LBHNC or BLHNC with VLLM_KV_CACHE_LAYOUT";
        if mixed {
            Err(Refusal::NotServed { what: "heads with an inner layout of their own", why })
        } else {
            Ok(())
        }
    }

    /// A plane of one row per (head, state), in the page's own strides.
    fn rows(&self, role: Role, total: u32, bytes: u32, format: String, at: u64) -> Placed {
        let states = self.states * self.kernel_blocks;
        let plane = Plane { role, heads: total, states, bytes, format, sharding: Sharding::SplitHeads };
        let digit = Dim { len: self.states.into(), stride: self.state_stride };
        Placed { plane, at, heads: self.head_stride, states: digit }
    }

    /// A plane in which a (head, kernel block) is one run.
    fn opaque(&self, role: Role, total: u32, bytes: u64, format: &str, at: u64) -> Result<Placed, Refusal> {
        let heads = bytes;
        let bytes = u32::try_from(bytes).map_err(|_| Refusal::Overflow { what: "bytes of an opaque run" })?;
        let (states, format) = (self.kernel_blocks, format.to_owned());
        let plane = Plane { role, heads: total, states, bytes, format, sharding: Sharding::SplitHeads };
        Ok(Placed { plane, at, heads, states: Dim { len: 1, stride: 0 } })
    }

    fn local(&self, total: u32) -> Result<u64, Refusal> {
        let what = Plane {
            role: Role::Key,
            heads: total,
            states: 1,
            bytes: 1,
            format: String::new(),
            sharding: Sharding::SplitHeads,
        };
        if total == 0 {
            return Err(Refusal::Zero { what: "heads of the model" });
        }
        Ok(what.heads_of(self.rank)?.len() as u64)
    }
}

impl Packing {
    /// The planes and their places; every byte count is compared with the page's.
    pub(crate) fn place(&self, cells: Cells) -> Result<Vec<Placed>, Refusal> {
        let (heads, content) = (u64::from(cells.heads), u64::from(cells.content));
        match self {
            Packing::KeyValue { total_heads, key_bytes, value_bytes, dtype } => {
                expect("heads of a page", cells.local(*total_heads)?, heads)?;
                expect("bytes of a key and a value", sum([*key_bytes, *value_bytes]), content)?;
                let parts = [(Role::Key, *key_bytes), (Role::Value, *value_bytes)];
                for (_, bytes) in parts {
                    let (element_bytes, dtype) = (dtype.element_bytes(), dtype.to_string());
                    if !bytes.is_multiple_of(element_bytes) {
                        return Err(Refusal::ElementSize { content_bytes: bytes, element_bytes, dtype });
                    }
                }
                Ok(in_a_row(&cells, *total_heads, &parts, &dtype.to_string()))
            }
            Packing::ScaledKeyValue { total_heads, key_bytes, value_bytes, format } => {
                expect("heads of a page", cells.local(*total_heads)?, heads)?;
                expect("bytes of keys, values and scales", sum([*key_bytes, *value_bytes, 8]), content)?;
                let parts = [
                    (Role::Key, *key_bytes),
                    (Role::KeyScale, 4),
                    (Role::Value, *value_bytes),
                    (Role::ValueScale, 4),
                ];
                Ok(in_a_row(&cells, *total_heads, &parts, format))
            }
            Packing::KeyValuePlanes { total_heads, head_bytes, dtype } => {
                expect("head slots of a page", 2, heads)?;
                let local = cells.local(*total_heads)?;
                expect("bytes of a token's heads", local * u64::from(*head_bytes), content)?;
                let plane = |role, slot| {
                    let at = slot * cells.head_stride;
                    let mut placed = cells.rows(role, *total_heads, *head_bytes, dtype.to_string(), at);
                    placed.heads = u64::from(*head_bytes);
                    placed
                };
                Ok(vec![plane(Role::Key, 0), plane(Role::Value, 1)])
            }
            Packing::Nvfp4 { total_heads, data_bytes, scale_bytes } => {
                nvfp4(&cells, *total_heads, *data_bytes, *scale_bytes)
            }
            Packing::Latent { format } => {
                expect("heads of a latent page", 1, heads)?;
                let mut placed = cells.rows(Role::Latent, 1, cells.content, format.clone(), 0);
                placed.plane.sharding = Sharding::Replicated;
                Ok(vec![placed])
            }
            Packing::Index { key_bytes, scale_bytes, format } => {
                index(&cells, *key_bytes, *scale_bytes, format)
            }
            Packing::OpaqueHeads { total_heads, format } => {
                expect("heads of a page", cells.local(*total_heads)?, heads)?;
                cells.whole_heads()?;
                let run = content * u64::from(cells.states);
                let mut placed = cells.opaque(Role::Opaque, *total_heads, run, format, 0)?;
                placed.heads = cells.head_stride;
                Ok(vec![placed])
            }
            Packing::OpaquePage { format } => {
                cells.whole_pages()?;
                let mut placed = cells.opaque(Role::Opaque, 1, cells.kernel_page(), format, 0)?;
                placed.plane.sharding = Sharding::Replicated;
                Ok(vec![placed])
            }
            Packing::States { parts, replicated } => states(&cells, parts, *replicated),
        }
    }
}

impl Packing {
    /// Bytes of a rank's states, padding left out; 0 for other packings.
    pub(crate) fn state_bytes(&self, rank: Rank) -> Result<u64, Refusal> {
        let Packing::States { parts, replicated } = self else { return Ok(0) };
        let rank = if *replicated { Rank::ALONE } else { rank };
        let overflow = || Refusal::Overflow { what: "bytes of a state" };
        let mut bytes = 0u64;
        for part in parts {
            let more = match part {
                StatePart::Channels { rows, parts, element_bytes, .. } => {
                    let channels: u64 = parts.iter().map(|part| u64::from(*part)).sum();
                    let row = (channels / u64::from(rank.size.max(1))).checked_mul((*element_bytes).into());
                    row.and_then(|row| row.checked_mul((*rows).into())).ok_or_else(overflow)?
                }
                StatePart::Heads { total, bytes, .. } => {
                    u64::from(total / rank.size.max(1)) * u64::from(*bytes)
                }
                StatePart::Whole { bytes, .. } => (*bytes).into(),
            };
            bytes = bytes.checked_add(more).ok_or_else(overflow)?;
        }
        Ok(bytes)
    }
}

fn sum<const N: usize>(bytes: [u32; N]) -> u64 {
    bytes.into_iter().map(u64::from).sum()
}

/// Planes one behind the other in the content of a (head, state).
fn in_a_row(cells: &Cells, total: u32, parts: &[(Role, u32)], format: &str) -> Vec<Placed> {
    let mut at = 0;
    let place = |(role, bytes): &(Role, u32)| {
        let placed = cells.rows(*role, total, *bytes, format.to_owned(), at);
        at += u64::from(*bytes);
        placed
    };
    parts.iter().map(place).collect()
}

/// Rows of keys, then their scales, kernel page by kernel page.
fn index(cells: &Cells, key: u32, scale: u32, format: &str) -> Result<Vec<Placed>, Refusal> {
    expect("heads of an indexer's page", 1, cells.heads.into())?;
    expect("bytes of a key and its scale", sum([key, scale]), cells.content.into())?;
    let scales = u64::from(key) * u64::from(cells.states);
    let plane = |role, bytes: u32, at| {
        let mut placed = cells.rows(role, 1, bytes, format.to_owned(), at);
        placed.states.stride = bytes.into();
        placed.plane.sharding = Sharding::Replicated;
        placed
    };
    Ok(vec![plane(Role::IndexKey, key, 0), plane(Role::IndexScale, scale, scales)])
}

fn nvfp4(cells: &Cells, total: u32, data: u32, scale: u32) -> Result<Vec<Placed>, Refusal> {
    let local = cells.local(total)?;
    expect("head slots of a page", 2 * local, cells.heads.into())?;
    expect("bytes of data and scales", sum([data, scale]), cells.content.into())?;
    cells.whole_pages()?;
    cells.whole_heads()?;
    let states = u64::from(cells.states);
    let (data_bytes, scale_bytes) = (states * u64::from(data), states * u64::from(scale));
    let mut out = Vec::with_capacity(4);
    for (side, roles) in (0u64..).zip([(Role::Key, Role::KeyScale), (Role::Value, Role::ValueScale)]) {
        let at = side * local * (data_bytes + scale_bytes);
        let mut rows = cells.rows(roles.0, total, data, "nvfp4".into(), at);
        (rows.heads, rows.states.stride) = (data_bytes, data.into());
        out.push(rows);
        out.push(cells.opaque(roles.1, total, scale_bytes, "nvfp4", at + local * data_bytes)?);
    }
    Ok(out)
}

/// Collects the parts of a state page, one behind the other.
struct StatePage {
    rank: Rank,
    replicated: bool,
    at: u64,
    out: Vec<Placed>,
}

impl StatePage {
    /// A plane at a place of the page, with the next number.
    fn add(&mut self, plane: Plane, at: u64, heads: u64, stride: u64) -> Result<(), Refusal> {
        let number =
            u8::try_from(self.out.len()).map_err(|_| Refusal::Overflow { what: "parts of a state" })?;
        let states = Dim { len: plane.states.into(), stride };
        let sharding = if self.replicated { Sharding::Replicated } else { plane.sharding.clone() };
        let plane = Plane { role: Role::State(number), sharding, ..plane };
        self.out.push(Placed { plane, at, heads, states });
        Ok(())
    }

    fn local(&self, plane: &Plane) -> Result<u64, Refusal> {
        Ok(plane.heads_of(self.rank)?.len() as u64)
    }

    /// A convolution: one plane for each of its `planes`, whose channels divide on their own.
    fn channels(&mut self, planes: Vec<Plane>, channels_first: bool) -> Result<(), Refusal> {
        let mut row = 0u64;
        for plane in &planes {
            row = self.local(plane)?.saturating_mul(plane.bytes.into()).saturating_add(row);
        }
        let mut start = 0u64;
        let rows = planes.first().map_or(0, |plane| u64::from(plane.states));
        for plane in planes {
            let element = u64::from(plane.bytes);
            let width = self.local(&plane)?.saturating_mul(element);
            let (from, head, state) = match channels_first {
                true => (start.saturating_mul(rows), element * rows, element),
                false => (start, element, row),
            };
            self.add(plane, self.at.saturating_add(from), head, state)?;
            start = start.saturating_add(width);
        }
        self.at = row.saturating_mul(rows).saturating_add(self.at);
        Ok(())
    }
}

fn states(cells: &Cells, parts: &[StatePart], replicated: bool) -> Result<Vec<Placed>, Refusal> {
    expect("heads of a state page", 1, cells.heads.into())?;
    expect("states of a state page", 1, cells.states.into())?;
    expect("kernel blocks of a state page", 1, cells.kernel_blocks.into())?;
    let rank = if replicated { Rank::ALONE } else { cells.rank };
    let mut page = StatePage { rank, replicated, at: 0, out: Vec::new() };
    let plane = |heads, states, bytes, format: &str, sharding| {
        let (role, format) = (Role::Opaque, format.to_owned());
        Plane { role, heads, states, bytes, format, sharding }
    };
    for part in parts {
        match part {
            StatePart::Channels { rows, parts, element_bytes, channels_first, format } => {
                let sharding = Sharding::SplitChannels { parts: parts.clone() };
                let of = |channels: &u32| plane(*channels, *rows, *element_bytes, format, sharding.clone());
                page.channels(parts.iter().map(of).collect(), *channels_first)?;
            }
            StatePart::Heads { total, bytes, format } => {
                if rank.size > *total {
                    return Err(Refusal::Uneven { role: "state".into(), heads: *total, ranks: rank.size });
                }
                let plane = plane(*total, 1, *bytes, format, Sharding::SplitHeads);
                let all = page.local(&plane)?.saturating_mul((*bytes).into());
                page.add(plane, page.at, (*bytes).into(), 0)?;
                page.at = page.at.saturating_add(all);
            }
            StatePart::Whole { bytes, format } => {
                let plane = plane(rank.size, 1, *bytes, format, Sharding::WholeState);
                page.add(plane, page.at, 0, 0)?;
                page.at = page.at.saturating_add((*bytes).into());
            }
        }
    }
    expect("bytes of all states", page.at, cells.content.into())?;
    Ok(page.out)
}
