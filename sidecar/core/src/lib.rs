#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod core;
mod event;
mod ids;
mod jobs;
pub mod key;
mod lease;
mod pool;
mod ssd;
mod store;

pub use crate::core::{Core, Counters, Limits, SessionView};
pub use event::{
    Action, BlockOutcome, CopyItem, Direction, Event, Group, LeaseRun, LoadRun, Outcome, Registration, Role,
    SaveRun, TIER_HOST, TIER_SSD,
};
pub use ids::{JobId, LeaseId, NamespaceId, SessionId};
pub use key::{BlockKey, Tenant, TenantKey};
pub use pool::{CHUNK_BYTES, Extent};
pub use ssd::{CacheMode, GetEnding, PutEnding, SsdLimits, SsdRecord};
