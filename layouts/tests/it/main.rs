//! The layouts as a user of the crate sees them.

mod blade_golden;
mod golden;
mod mutations;
mod oracle;
mod pairs;
mod properties;
mod refusals;
mod vllm_golden;
mod worked_sizes;
mod worker;
mod worlds;
