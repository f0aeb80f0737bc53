//! Engine KV-cache layouts as data, and copy plans between them.
//!
//! Lives here: what a block holds ([`BlockContent`]), what a rank holds of it and where ([`Shard`]), the
//! engines' ways to say that ([`vllm::groups`], [`tensorrt_llm`], [`sglang`], [`blade_kvt`]), and the
//! merged copies from any shards to any others of equal content ([`plan_between`]). A worker that
//! registers its memory is a [`Worker`]; its blocks are moved by [`BlockPlan`]s.
//!
//! May touch: nothing. No I/O, no threads, no `unsafe`; it computes on numbers and byte slices.
//!
//! Promises:
//! - A [`Shard`] that exists was checked: every byte of every block lies inside the memory, and no
//!   two coordinates share a byte. All arithmetic on what came from outside is checked.
//! - What is not understood is a [`Refusal`] with its reason (invariant I10), never a guess.
//! - A [`BlockPlan`] covers the record exactly once and moves bytes without looking at them; the same
//!   plan saves and loads.
//! - Records are block-contiguous and head-contiguous, `[L, H, N, C]`, whatever the engine's order.
//!
//! ```
//! use pillion_layouts::vllm::groups::{Group, Pages};
//! use pillion_layouts::{Worker, vllm::KvCacheTensor};
//!
//! let pages = Pages {
//!     tensor: KvCacheTensor {
//!         size: 524288,
//!         offset: 0,
//!         layer_stride: 262144,
//!         block_stride: 32768,
//!         layers: vec!["model.layers.0".into(), "model.layers.1".into()],
//!     },
//!     heads: 2,
//!     states: 32,
//!     content_bytes: 512,
//!     page_bytes: 32768,
//!     kernel_blocks: 1,
//!     packing: "kv total_heads=2 key=256 value=256 dtype=float32".parse()?,
//! };
//! let worker = Worker {
//!     order: "LBHNC".into(),
//!     num_blocks: 8,
//!     memory_bytes: 524288,
//!     rank: 0,
//!     world: 1,
//!     groups: vec![Group { block_tokens: 32, pages: vec![pages] }],
//! };
//! let groups = worker.check()?;
//! let block_three: Vec<_> = groups[0].plan().segments(3).map(|s| (s.engine, s.record, s.len)).collect();
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
mod nest;
mod plan;
mod refusal;
pub mod sglang;
mod shape;
mod shard;
pub mod tensorrt_llm;
mod transfer;
pub mod vllm;
mod worker;

pub use attention::Attention;
pub use canary::{CanaryMismatch, canary_byte, canary_check_record, canary_fill, canary_fill_from};
pub use content::{BlockContent, Plane, Rank, Role};
pub use plan::{BlockPlan, RECORD_BYTES_MAX, RUNS_MAX, Segment, Segments, StridedCopy};
pub use refusal::Refusal;
pub use shape::{Dim, Dtype, Order, Sharding};
pub use shard::{Extent, Part, Piece, Shard};
pub use transfer::{Plan, Run, ShardCopy, plan_between};
pub use worker::{
    CheckedGroup, FORMAT_BYTES_MAX, GROUPS_MAX, LAYERS_MAX, NAME_BYTES_MAX, OtherShard, Worker,
};
