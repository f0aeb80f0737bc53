//! Simulated bytes: a sidecar's host pool, and what stands for the content of a block.
#![expect(unsafe_code, reason = "the pool is shared with the SSD store by address, as the daemon's is")]

use std::{ptr::NonNull, sync::Arc};

use pillion_ssd::{Aligned, Memory};

use crate::dice::mix;

/// Content of an engine's block: one word for each half. A half is what is copied at once, so that a copy can be torn.
pub(crate) type Cell = [u64; 2];

/// A host pool, whose mapping outlives the process that made it as long as somebody has it.
#[derive(Debug)]
pub(crate) struct Pool {
    /// As the SSD store has it.
    pub(crate) memory: Arc<Memory>,
    base: NonNull<u8>,
    bytes: u64,
}

impl Pool {
    /// Zeros.
    pub(crate) fn new(bytes: u64) -> Self {
        let mut buffer = Aligned::zeroed(bytes as usize);
        let base = NonNull::from(buffer.bytes_mut()).cast();
        // SAFETY: the buffer's heap block stays where it is while the `Arc` lives, and is touched through this pointer
        // alone. A scenario has one thread; the core gives out extents, and that none is used twice is what the
        // simulation checks: a store that broke the rule would race with nobody.
        let memory = Arc::new(unsafe { Memory::from_raw(base, bytes, Arc::new(buffer)) });
        Self { memory, base, bytes }
    }

    /// Its length.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Copies out. False: there is no such place.
    pub(crate) fn read(&self, at: u64, into: &mut [u8]) -> bool {
        let is_inside = at.checked_add(into.len() as u64).is_some_and(|end| end <= self.bytes);
        if is_inside {
            // SAFETY: inside the buffer, which `memory` keeps; nobody else touches it at this moment: one thread.
            unsafe {
                self.base.as_ptr().add(at as usize).copy_to_nonoverlapping(into.as_mut_ptr(), into.len())
            };
        }
        is_inside
    }

    /// Copies in. False: there is no such place.
    pub(crate) fn write(&self, at: u64, from: &[u8]) -> bool {
        let is_inside = at.checked_add(from.len() as u64).is_some_and(|end| end <= self.bytes);
        if is_inside {
            // SAFETY: as in `read`.
            unsafe {
                self.base.as_ptr().add(at as usize).copy_from_nonoverlapping(from.as_ptr(), from.len())
            };
        }
        is_inside
    }
}

/// Where the second half of a record of so many bytes begins.
pub(crate) fn middle(bytes: usize) -> usize {
    bytes / 16 * 8
}

/// The bytes of a half whose content is this word.
pub(crate) fn fill(half: &mut [u8], word: u64) {
    let (words, rest) = half.as_chunks_mut::<8>();
    words.fill(word.to_le_bytes());
    rest.copy_from_slice(&word.to_le_bytes()[..rest.len()]);
}

/// The word whose bytes these are; another one if they are not the bytes of one word.
pub(crate) fn word_of(half: &[u8]) -> u64 {
    let (words, rest) = half.as_chunks::<8>();
    let Some(first) = words.first() else { return 0 };
    if words.iter().all(|word| word == first) && rest == &first[..rest.len()] {
        return u64::from_le_bytes(*first);
    }
    half.iter().fold(1, |sum, byte| mix(sum ^ u64::from(*byte)))
}
