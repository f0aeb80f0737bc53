#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod generate;
pub mod host;
pub mod plot;
pub mod report;
pub mod ssd;
pub mod study;
pub mod trace;
