//! The layouts as a user of the crate sees them.

mod golden;
mod oracle;
mod properties;
