#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod campaign;
mod dice;
mod engine;
mod net;
mod oracle;
mod plan;
mod pool;
mod sidecar;
mod trouble;
mod world;

pub use campaign::{Campaign, Failure, shrink};
pub use net::Violation;
pub use plan::{Budget, Fault, Sabotage};
pub use world::{Outcome, run};
