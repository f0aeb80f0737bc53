#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

pub mod device;
mod error;
pub mod format;
mod memory;
pub mod recover;
pub mod store;
pub mod tier;
pub mod verify;

pub use error::{GetError, OpenError, PutError};
pub use memory::{Aligned, Extent, Memory};
