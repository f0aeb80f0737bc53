#![doc = include_str!("../README.md")]

pub mod frame;
mod message;

pub use frame::{Encoder, FrameError, Frames, HEADER_BYTES, MAX_PAYLOAD_BYTES};
pub use message::{Kind, Message};

/// Protocol version spoken by this build. Peers of another major version are refused.
pub const MAJOR: u16 = 2;
/// Raised when a field or message is appended that older peers may ignore.
pub const MINOR: u16 = 2;

/// Bytes of one engine block hash (sha256).
pub const HASH_BYTES: usize = 32;
/// Bytes of job ids, lease ids, namespace ids, generations and epochs.
pub const ID_BYTES: usize = 16;
/// Blocks that one lease or job may name.
pub const MAX_BLOCKS: usize = 65_536;
/// Shards of other tensor-parallel sizes that one worker may load parts of.
pub const MAX_OTHER_SHARDS: usize = 1024;
/// Runs of blocks that one lease or job may have.
pub const MAX_RUNS: usize = 1024;
/// Bytes of one run's parent in a save: whether there is one, and its hash.
pub const PARENT_BYTES: usize = 1 + HASH_BYTES;
/// Length in bytes that a string of the protocol (engine id, tenant, one namespace value) may have.
pub const MAX_STRING_BYTES: usize = 65_536;

/// The generated types. They contain the unsafe code that `planus` writes for
/// vectors, which is why this crate exists by itself.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    unsafe_op_in_unsafe_fn,
    dead_code,
    unused_imports
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/wire.rs"));
}

#[doc(inline)]
pub use generated::pillion::wire;
