#![doc = include_str!("../README.md")]

mod batch;
mod call;
mod context;
mod copy;
mod device;
mod errors;
mod event;
mod faults;
mod host;
mod ipc;
mod memory;
mod object;
mod pointer;
mod stats;
mod stream;
mod symbols;
pub mod testing;
mod vmm;
