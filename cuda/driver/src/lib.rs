#![doc = include_str!("../README.md")]

mod batch;
mod device;
mod error;
mod event;
mod library;
mod memory;
mod stream;

pub use batch::{BatchApi, Direction, Piece};
pub use device::{Context, Device, Uuid, device_of, devices};
pub use error::CudaError;
pub use event::{EVENT_HANDLE_BYTES, Event, ForeignStream};
pub use library::{driver_version, init};
pub use memory::{
    Allocation, Exported, ExportedHandle, HostRegistration, IPC_HANDLE_BYTES, Imported, export, read,
};
pub use stream::{Priority, Stream};
