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

mod grammar;
pub mod groups;
mod packing;

pub(crate) use grammar::Escaped;
pub(crate) use packing::Cells;
pub use packing::{Packing, StatePart};

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
