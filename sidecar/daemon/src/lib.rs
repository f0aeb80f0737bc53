//! The sidecar: everything of `pillion` except `main`.
//!
//! What people touch lives here (configuration, places, command line, status,
//! doctor, metrics, HTTP) beside the parts that serve engines. Decisions are
//! not made here but in `pillion-core`.

pub mod cli;
pub mod config;
pub mod copier;
pub mod device;
pub mod doctor;
pub mod driver;
pub mod http;
pub mod lanes;
pub mod logging;
pub mod machine;
pub mod metrics;
pub mod places;
pub mod register;
pub mod report;
pub mod secret;
pub mod serve;
pub mod session;
pub mod ssd;
pub mod status;
pub mod supervisor;
pub mod worker;
