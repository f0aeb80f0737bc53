//! connector/protocol
