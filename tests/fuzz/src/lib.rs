#![doc = include_str!("../README.md")]

mod attach;
mod client;
mod config;
mod cursor;
mod events;
mod http;
mod layout;
mod messages;
mod protocol;
mod recovery;
mod register;
mod shm;
mod ssd;

pub use attach::attach;
pub use client::client;
pub use config::config;
pub use events::core_events;
pub use http::http;
pub use layout::{layout, packing};
pub use protocol::{frames, message};
pub use recovery::ssd_recovery;
pub use register::registration;
pub use shm::shm;
pub use ssd::ssd_format;

/// One thing that takes hostile bytes.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Names it, its corpus and its binary.
    pub name: &'static str,
    /// Panics where what must hold does not.
    pub run: fn(&[u8]),
}

macro_rules! targets {
    ($($name:ident)*) => { &[$(Target { name: stringify!($name), run: $name },)*] };
}

/// All of them.
pub const TARGETS: &[Target] = targets! {
    frames message ssd_format ssd_recovery packing layout registration core_events shm config http client attach
};
