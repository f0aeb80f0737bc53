#![doc = include_str!("../README.md")]

mod cursor;
mod layout;
mod messages;
mod protocol;
mod recovery;
mod register;
mod ssd;

pub use layout::{layout, packing};
pub use protocol::{frames, message};
pub use recovery::ssd_recovery;
pub use register::registration;
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
pub const TARGETS: &[Target] =
    targets! { frames message ssd_format ssd_recovery packing layout registration };
