#![doc = include_str!("../README.md")]

pub mod clock;
pub mod fds;
#[cfg_attr(loom, path = "mapping_model.rs")]
mod mapping;
mod memfd;
#[cfg(all(test, loom))]
mod models;
pub mod pidfd;
pub mod presence;
pub mod ring;
mod sync;
pub mod words;

pub use mapping::Mapping;
pub use memfd::{Access, Memfd, Seal, ShmError};
