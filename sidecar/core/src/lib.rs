//! sidecar/core
