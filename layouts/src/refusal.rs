//! Why a description was refused.

use crate::shape::Order;

/// Why a layout is not served (invariant I10: say no early).
///
/// A refused engine runs on without a cache, so every message is written for the
/// person who wonders why: what was expected, what came, what to do.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The name of the physical order is not one of the six.
    #[error(
        "kv cache order: expected one of LBNHC, LBHNC, LHBNC, BLHNC, BLNHC, BHLNC, got `{got}`; \
         choose one of these with VLLM_KV_CACHE_LAYOUT, or use a pillion that knows this order"
    )]
    UnknownOrder {
        /// What came, shortened.
        got: String,
    },
    /// The dtype is not known, or is a storage type that hides the format.
    #[error(
        "kv cache dtype: expected one of float32, float16, bfloat16, fp8, fp8_e4m3, fp8_e5m2, got `{got}`; \
         report the cache dtype by name, not the type it is stored in, or choose one with --kv-cache-dtype"
    )]
    UnknownDtype {
        /// What came, shortened.
        got: String,
    },
    /// A size or count that must be positive is zero.
    #[error("{what}: expected at least 1, got 0; the engine's kv cache description is incomplete")]
    Zero {
        /// Which field.
        what: &'static str,
    },
    /// Arithmetic on the description leaves 64 bits.
    #[error(
        "{what}: expected a value below 2^64, the described sizes overflow it; \
         the engine's kv cache description is damaged"
    )]
    Overflow {
        /// Which product or sum.
        what: &'static str,
    },
    /// A page holds a number of states that does not go with the block's tokens.
    #[error(
        "states in a page: expected one per token ({block_tokens}), or of compressed rows one per so many, got \
         {states}; the engine's kv cache description is inconsistent"
    )]
    StatesPerBlock {
        /// N of the page.
        states: u32,
        /// Tokens of a block.
        block_tokens: u32,
    },
    /// The content of a state is not a whole number of elements.
    #[error(
        "content of one state: expected a multiple of the {element_bytes} bytes of {dtype}, got {content_bytes} \
         bytes; report C in bytes and the dtype the cache is stored in"
    )]
    ElementSize {
        /// C in bytes.
        content_bytes: u32,
        /// Bytes of an element.
        element_bytes: u32,
        /// Name of the dtype.
        dtype: String,
    },
    /// A page is larger or smaller than H × N × C.
    #[error(
        "page size: expected heads × states × content = {expected} bytes, got {page_bytes}; \
         padded pages are not served, run this model without pillion"
    )]
    PaddedPage {
        /// What the engine says that a page takes.
        page_bytes: u64,
        /// H × N × C.
        expected: u64,
    },
    /// A layer name occurs twice.
    #[error(
        "layer `{name}`: expected each layer once, got it again; the engine's registration is inconsistent"
    )]
    DuplicateLayer {
        /// The name, shortened.
        name: String,
    },
    /// A layer has no name, so its records could not be told apart.
    #[error("layer {index}: expected a name, got an empty one; the engine's registration is incomplete")]
    UnnamedLayer {
        /// Index in registration order.
        index: usize,
    },
    /// The tensors disagree about the allocation that they share.
    #[error(
        "tensor {tensor}, size: expected {expected} bytes as in tensor 0, got {got}; \
         all kv cache tensors must lie in one allocation"
    )]
    Allocation {
        /// Index of the tensor.
        tensor: usize,
        /// Size of the first tensor.
        expected: u64,
        /// Size of this one.
        got: u64,
    },
    /// The allocation's size does not follow from the strides.
    #[error(
        "allocation of {order}: expected {expected} bytes for {num_blocks} blocks, got {got}; \
         every byte must belong to a layer that is named, hand over all layers of the group"
    )]
    AllocationSize {
        /// The declared order.
        order: Order,
        /// The number of blocks declared.
        num_blocks: u64,
        /// What follows from the strides.
        expected: u64,
        /// What was declared.
        got: u64,
    },
    /// A declared stride or offset does not follow from the declared order.
    #[error(
        "tensor {tensor}, {what} of {order}: expected {expected} bytes, got {got}; this pillion does not know \
         this form of the layout, report it with the engine's version"
    )]
    Stride {
        /// Index of the tensor.
        tensor: usize,
        /// Which number.
        what: &'static str,
        /// The declared order.
        order: Order,
        /// What the order asks for.
        expected: u64,
        /// What was declared.
        got: u64,
    },
    /// Blocks lie closer together than they are long.
    #[error(
        "tensor {tensor}, block stride of {order}: expected at least {least} bytes, got {got}; \
         blocks would overlap, report it with the engine's version"
    )]
    BlockStride {
        /// Index of the tensor.
        tensor: usize,
        /// The declared order.
        order: Order,
        /// Bytes that one block takes at least.
        least: u64,
        /// What was declared.
        got: u64,
    },
    /// Between blocks there is room for a layer that nobody named.
    #[error(
        "unused bytes in a block of {order}: expected fewer than a page ({page_bytes}), got {unclaimed}; \
         a layer that was not registered may lie there, hand over all layers of the group"
    )]
    UnclaimedPage {
        /// The declared order.
        order: Order,
        /// Bytes of a page.
        page_bytes: u64,
        /// Bytes of a block that belong to no layer.
        unclaimed: u64,
    },
    /// A block reaches beyond the memory that was handed over.
    #[error(
        "region {region}: expected to end within the {memory_bytes} bytes of engine memory, it ends at {end}; \
         hand over the whole allocation"
    )]
    OutsideMemory {
        /// Index of the region.
        region: usize,
        /// One past its last byte.
        end: u64,
        /// Bytes of the allocation.
        memory_bytes: u64,
    },
    /// A rank that does not exist.
    #[error("rank: expected one below {size}, got {index}; the engine's parallel configuration is damaged")]
    Rank {
        /// What came.
        index: u32,
        /// Number of ranks.
        size: u32,
    },
    /// Heads do not divide between the ranks.
    #[error(
        "{role}, {heads} heads: expected them to divide between {ranks} ranks; this form of sharding is not \
         served, choose a tensor-parallel size that divides them"
    )]
    Uneven {
        /// What is divided.
        role: String,
        /// How many there are.
        heads: u32,
        /// Number of ranks.
        ranks: u32,
    },
    /// A plane has no format, so it could not be told from another.
    #[error("{role}: expected the name of a format, got an empty one; the description is incomplete")]
    NoFormat {
        /// Which plane.
        role: String,
    },
    /// A logical element is described twice.
    #[error(
        "{role} of layer {layer}, head {head}: expected it once, got it again; the description is inconsistent"
    )]
    HeldTwice {
        /// Which plane.
        role: String,
        /// Layer of the model.
        layer: u32,
        /// Head of the model.
        head: u32,
    },
    /// A range of heads is empty, beyond the model's, or part of what cannot be divided.
    #[error(
        "{role}: expected a range within {heads} heads, all of them if ranks hold copies, got {start} to {end}; \
         the description is damaged"
    )]
    HeadRange {
        /// Which plane.
        role: String,
        /// First head.
        start: u32,
        /// One past the last.
        end: u32,
        /// Heads of the plane.
        heads: u32,
    },
    /// The digits of the state axis do not make its length.
    #[error("{role}: expected {expected} states in a block, got {got}; the description is damaged")]
    States {
        /// Which plane.
        role: String,
        /// States of the plane.
        expected: u64,
        /// What is described.
        got: u64,
    },
    /// Two logical elements lie on one byte, or that cannot be excluded.
    #[error(
        "pieces of a shard: expected disjoint bytes, they overlap or interleave in a way that is not known; \
         report the layout with the engine's version"
    )]
    SharedBytes,
    /// Source and destination hold different things.
    #[error(
        "content: expected `{expected}`, got `{got}`; only caches of equal content are copied into each other, \
         use the same model, block size and cache dtype on both sides"
    )]
    ContentDiffers {
        /// What the first shard holds.
        expected: String,
        /// What another holds.
        got: String,
    },
    /// The destination wants what no source has.
    #[error(
        "{role} of layer {layer}, head {head}: expected a source that holds it, got none; \
         hand over the shards of all ranks"
    )]
    NoSource {
        /// Which plane.
        role: String,
        /// Layer of the model.
        layer: u32,
        /// Head of the model.
        head: u32,
    },
    /// Kernel blocks of two sides do not divide each other.
    #[error(
        "{role}: expected kernel blocks that divide each other, they do not; \
         set both engines to block sizes of which one divides the other"
    )]
    KernelBlocks {
        /// Which plane.
        role: String,
    },
    /// A layer's name does not say which layer of the model it is.
    #[error(
        "layer `{name}`: expected exactly one number in its name; it cannot be matched with other engines'"
    )]
    LayerNumber {
        /// The name, shortened.
        name: String,
    },
    /// A number of an engine's description does not follow from the others.
    #[error(
        "{what}: expected {expected}, got {got}; this form of the layout is not known, report it with the engine's version"
    )]
    Inconsistent {
        /// Which number.
        what: &'static str,
        /// What follows from the rest.
        expected: u64,
        /// What came.
        got: u64,
    },
    /// A buffer's role is not known, or not part of the described content.
    #[error(
        "role of a buffer: expected key, value or index_key as the group's content has them, got `{got}`"
    )]
    UnknownRole {
        /// What came, shortened.
        got: String,
    },
    /// A description beyond what is worth serving, or what a healthy peer sends.
    #[error("{what}: expected at most {limit}, got {got}; run this engine without pillion")]
    TooMuch {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: u64,
        /// What came.
        got: u64,
    },
    /// The text of a packing does not parse.
    #[error("packing of a page: expected {expected}, got `{got}`")]
    Packing {
        /// What could stand there.
        expected: String,
        /// What came, shortened.
        got: String,
    },
    /// A form that is known, and not served.
    #[error("{what}: not served, because {why}")]
    NotServed {
        /// What was asked for.
        what: &'static str,
        /// Why not.
        why: &'static str,
    },
}

/// Text from outside, made safe for one line of a log: escaped and at most 64 characters.
pub(crate) fn shown(text: &str) -> String {
    let mut out: String = text.chars().take(64).flat_map(char::escape_debug).collect();
    if text.chars().nth(64).is_some() {
        out.push('…');
    }
    out
}
