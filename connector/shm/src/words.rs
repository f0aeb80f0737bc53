//! Job words: who ends a save (I4).
//!
//! A save's word goes from *held* to exactly one of *published* (by the sidecar,
//! after copy and checksum) and *revoked* (by the worker's shim, which then may
//! report the source blocks free). Both change it by compare-and-swap, and the
//! word carries the save's tag, so that a late swap for an earlier save of the
//! same slot changes nothing.
//!
//! Word 0 of the memory is the consumer's progress in the completion ring.

use std::os::fd::OwnedFd;

use crate::{
    Access, Mapping, Memfd, Seal, ShmError,
    sync::{AtomicU64, Ordering},
};

const FIRST: usize = 8;
/// Words that are taken from a peer, at most: what is kept for each of them is bounded with it.
const SLOTS_MAX: u32 = 1 << 20;
const HELD: u64 = 1;
const REVOKED: u64 = 2;
const PUBLISHED: u64 = 3;

/// Largest tag: two bits of the word are the state.
pub const TAG_MAX: u64 = (1 << 62) - 1;

/// Words shared by one worker and the sidecar, writable by both.
#[derive(Debug)]
pub struct JobWords {
    memfd: Option<Memfd>,
    map: Mapping,
    slots: u32,
}

fn bytes(slots: u32) -> u64 {
    (FIRST as u64 + u64::from(slots)) * 8
}

impl JobWords {
    /// New words, all free.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(slots: u32) -> Result<Self, ShmError> {
        let memfd = Memfd::create("pillion-words", bytes(slots))?;
        memfd.seal(Seal::Size)?;
        let map = memfd.map(Access::ReadWrite)?;
        Ok(Self { memfd: Some(memfd), map, slots })
    }

    /// Maps words that the sidecar passed.
    ///
    /// # Errors
    /// Where they are not sealed or not of the size that `slots` needs, or more than any sidecar makes.
    pub fn open(fd: OwnedFd, slots: u32) -> Result<Self, ShmError> {
        if slots > SLOTS_MAX {
            return Err(ShmError::Slots { what: "job words", limit: SLOTS_MAX, got: slots });
        }
        let memfd = Memfd::adopt(fd, Seal::Size, bytes(slots))?;
        Ok(Self { map: memfd.map(Access::ReadWrite)?, memfd: None, slots })
    }

    /// The other end of these words.
    #[cfg(all(test, loom))]
    pub(crate) fn other_end(&self) -> Self {
        Self { memfd: None, map: self.map.clone(), slots: self.slots }
    }

    /// What is passed on, where we made it.
    pub fn memfd(&self) -> Option<&Memfd> {
        self.memfd.as_ref()
    }

    /// Number of words.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    fn word(&self, slot: u32) -> Option<&AtomicU64> {
        (slot < self.slots).then(|| &self.map.words()[FIRST + slot as usize])
    }

    /// Begins a save: the slot is held under `tag`.
    pub fn hold(&self, slot: u32, tag: u64) {
        if let Some(word) = self.word(slot) {
            word.store((tag & TAG_MAX) << 2 | HELD, Ordering::Release);
        }
    }

    /// The sidecar's step: true if the save may be published now.
    pub fn publish(&self, slot: u32, tag: u64) -> bool {
        self.swap(slot, tag, PUBLISHED)
    }

    /// The shim's step: true if the source blocks may be reused now.
    pub fn revoke(&self, slot: u32, tag: u64) -> bool {
        self.swap(slot, tag, REVOKED)
    }

    fn swap(&self, slot: u32, tag: u64, to: u64) -> bool {
        let tag = (tag & TAG_MAX) << 2;
        self.word(slot).is_some_and(|word| {
            word.compare_exchange(tag | HELD, tag | to, Ordering::AcqRel, Ordering::Acquire).is_ok()
        })
    }

    pub(crate) fn consumed(&self) -> u64 {
        self.map.words()[0].load(Ordering::Acquire)
    }

    pub(crate) fn set_consumed(&self, count: u64) {
        self.map.words()[0].store(count, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn exactly_one_side_wins() {
        let words = Arc::new(JobWords::create(1).unwrap());
        for tag in 0..2_000 {
            words.hold(0, tag);
            let other = Arc::clone(&words);
            let publisher = std::thread::spawn(move || other.publish(0, tag));
            let revoked = words.revoke(0, tag);
            assert_ne!(publisher.join().unwrap(), revoked);
        }
    }

    #[test]
    fn a_late_swap_for_an_earlier_save_changes_nothing() {
        let words = JobWords::create(2).unwrap();
        words.hold(1, 7);
        assert!(words.revoke(1, 7));
        words.hold(1, 8);
        assert!(!words.publish(1, 7));
        assert!(words.publish(1, 8));
        assert!(!words.revoke(1, 8));
    }

    #[test]
    fn more_words_than_anybody_makes_are_refused() {
        // Sparse: it costs its maker nothing, and its reader a list of free slots.
        let memfd = Memfd::create("t", bytes(SLOTS_MAX + 1)).unwrap();
        memfd.seal(Seal::Size).unwrap();
        let fd = memfd.fd().try_clone_to_owned().unwrap();
        assert!(matches!(JobWords::open(fd, SLOTS_MAX + 1), Err(ShmError::Slots { .. })));
    }

    #[test]
    fn a_slot_out_of_range_never_wins() {
        let words = JobWords::create(2).unwrap();
        words.hold(2, 1);
        assert!(!words.publish(2, 1));
        assert!(!words.revoke(u32::MAX, 1));
    }
}
