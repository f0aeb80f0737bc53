#![doc = include_str!("../README.md")]

pub mod clock;
pub mod fds;
mod memfd;
pub mod pidfd;
pub mod presence;
pub mod ring;
pub mod words;

pub use memfd::{Access, Mapping, Memfd, Seal, ShmError};
