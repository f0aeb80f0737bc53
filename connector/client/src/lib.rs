//! connector/client
