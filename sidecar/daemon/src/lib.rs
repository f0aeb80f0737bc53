//! The sidecar: everything of `pillion` except `main`.
//!
//! What people touch lives here (configuration, places, command line, status,
//! doctor, metrics, HTTP) beside the parts that serve engines. Decisions are
//! not made here but in `pillion-core`.

pub mod config;
pub mod machine;
pub mod metrics;
pub mod places;
pub mod secret;
