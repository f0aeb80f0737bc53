//! Memory as a model checker needs it: words of its own kind, which it can tell apart, instead of pages.

use std::sync::Arc;

use crate::{Access, Memfd, ShmError, sync::AtomicU64};

/// In place of a shared mapping. Copies share their words, as mappings of one memfd do.
#[derive(Debug, Clone)]
pub struct Mapping {
    words: Arc<[AtomicU64]>,
    access: Access,
}

impl Mapping {
    pub(crate) fn new(memfd: &Memfd, access: Access) -> Result<Self, ShmError> {
        let words = (0..memfd.bytes() / 8).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { words, access })
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.words.len() * 8
    }

    /// Whether it may be written through.
    pub fn access(&self) -> Access {
        self.access
    }

    /// It is there.
    pub fn populate(&self) {}

    /// All of it.
    pub fn words(&self) -> &[AtomicU64] {
        &self.words
    }
}
