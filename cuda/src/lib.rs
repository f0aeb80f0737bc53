#![doc = include_str!("../README.md")]

mod copy;
mod crew;
mod device_memory;
mod host;
mod lane;
mod pool;
mod watchdog;

pub use copy::{BlockCopier, CopyError};
pub use crew::{Crew, Extent};
pub use device_memory::{DeviceHandle, DeviceMemory, DeviceSource, Gpu, GpuParts};
pub use host::{MemfdMemory, ProcessMemory};
pub use lane::{Item, Lane, Moved};
pub use pillion_cuda_driver as driver;
pub use pool::{HostPool, PoolOptions};
pub use watchdog::{Pulse, Watchdog};

/// One contiguous piece of a block: where it lies in the engine and in the record.
pub use pillion_layouts::Segment;

/// An engine's KV memory, from its allocation's base on.
///
/// # Safety of use
/// Offsets are checked against the size that was registered. What the engine does
/// with the bytes meanwhile is the holds' business (I3, I4), not that of this trait.
pub trait EngineMemory: Send + Sync + std::fmt::Debug {
    /// How it is reached, for logs and metrics.
    fn way(&self) -> &'static str;

    /// Bytes that can be reached.
    fn bytes(&self) -> u64;

    /// Copies `segments` out of the engine, each to its place in `record`.
    ///
    /// # Errors
    /// [`CopyError::Unreachable`] or [`CopyError::OutOfBounds`]; `record` is then garbage.
    fn read(&self, segments: &[Segment], record: &mut [u8]) -> Result<(), CopyError>;

    /// Copies `segments` of `record` into the engine.
    ///
    /// # Errors
    /// As for [`EngineMemory::read`]; the engine's blocks are then garbage.
    fn write(&self, segments: &[Segment], record: &[u8]) -> Result<(), CopyError>;
}
