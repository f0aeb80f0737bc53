//! Engine KV-cache layouts as data, and copy plans between them.
//!
//! Lives here: what an engine says about its memory ([`vllm`]), turned into regions of strided axes
//! ([`Layout`]), and the merged copies between a block and its stored record ([`plan`]).
//!
//! May touch: nothing. No I/O, no threads, no `unsafe`; it computes on numbers and byte slices.
//!
//! Promises:
//! - A [`Layout`] that exists was checked: every byte of every block lies inside the memory, and no
//!   two coordinates share a byte. All arithmetic on what came from outside is checked.
//! - What is not understood is a [`Refusal`] with its reason (invariant I10), never a guess.
//! - A [`BlockPlan`] covers the record exactly once and moves bytes without looking at them; the same
//!   plan saves and loads.
//! - Records are block-contiguous and head-contiguous, `[L, H, N, C]`, whatever the engine's order.
//!
//! Two models live side by side. [`Layout`], [`plan()`] and [`vllm::layout`] serve one group of full
//! attention on one rank. [`BlockContent`], [`Shard`] and [`plan_between`] serve everything else: any
//! covered layout ([`vllm::groups`], [`tensorrt_llm`], [`sglang`], [`blade_kvt`]) and any set of ranks,
//! to any other of equal content.
//!
//! ```
//! use pillion_layouts::{plan, vllm};
//!
//! let cache = vllm::KvCache {
//!     order: "LBHNC".into(),
//!     num_blocks: 8,
//!     block_tokens: 32,
//!     dtype: "float32".into(),
//!     kind: "FullAttentionSpec".into(),
//!     heads: 2,
//!     states: 32,
//!     content_bytes: 512,
//!     page_bytes: 32768,
//!     memory_bytes: 524288,
//!     tensors: vec![vllm::KvCacheTensor {
//!         size: 524288,
//!         offset: 0,
//!         layer_stride: 262144,
//!         block_stride: 32768,
//!         layers: vec!["model.layers.0".into(), "model.layers.1".into()],
//!     }],
//! };
//! let layout = vllm::layout(&cache)?;
//! let block_three: Vec<_> = plan(&layout)?.segments(3).map(|s| (s.engine, s.record, s.len)).collect();
//! assert_eq!(block_three, [(98304, 0, 32768), (360448, 32768, 32768)]);
//! # Ok::<(), pillion_layouts::Refusal>(())
//! ```
#![forbid(unsafe_code)]

mod attention;
mod axes;
pub mod blade_kvt;
mod canary;
mod content;
mod disjoint;
mod layout;
mod nest;
mod plan;
mod refusal;
pub mod sglang;
mod shape;
mod shard;
#[cfg(test)]
mod simulation;
pub mod tensorrt_llm;
mod transfer;
pub mod vllm;

pub use attention::Attention;
pub use canary::{CanaryMismatch, canary_byte, canary_check, canary_check_record, canary_fill};
pub use content::{BlockContent, Plane, Rank, Role};
pub use layout::{Content, Dim, Layout, Region};
pub use plan::{BlockPlan, Segment, Segments, StridedCopy, plan};
pub use refusal::Refusal;
pub use shape::{Dtype, Kind, LogicalShape, Order, Sharding};
pub use shard::{Extent, Part, Piece, Shard};
pub use transfer::{Plan, Run, ShardCopy, plan_between};
