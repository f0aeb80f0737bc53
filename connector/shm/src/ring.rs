//! The completion ring: one producer (the sidecar), one consumer (a worker's shim).
//!
//! The ring is read-only for the consumer; its progress lives in the job words,
//! which both may write. An entry's sequence number is stored last, so that the
//! consumer needs no shared head: it knows which number it waits for, and an entry
//! that holds another one is not there yet.

use std::sync::Arc;

use crate::{
    Access, Mapping, Memfd, Seal, ShmError,
    sync::{AtomicU64, Ordering},
    words::JobWords,
};

const ENTRY_WORDS: usize = 8;
/// Entries of a ring that is taken from a peer, at most.
const SLOTS_MAX: u32 = 1 << 20;

/// How a job, or a part of it, ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Only quiescence is reported: the outcome came before.
    None = 0,
    /// All blocks are loaded, or what could be stored is stored.
    Done = 1,
    /// Nothing of it may be used.
    Failed = 2,
    /// Given up by request, or with its session.
    Cancelled = 3,
}

impl Outcome {
    fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::None,
            1 => Self::Done,
            3 => Self::Cancelled,
            _ => Self::Failed,
        }
    }
}

/// One entry of the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The job's id.
    pub job: [u8; 16],
    /// Its outcome, or [`Outcome::None`].
    pub outcome: Outcome,
    /// Nothing of the job touches the engine's memory any more.
    pub quiesced: bool,
    /// Blocks loaded or newly stored.
    pub blocks: u32,
}

/// Bytes of a ring of `slots` entries.
pub fn ring_bytes(slots: u32) -> u64 {
    u64::from(slots.next_power_of_two()) * (ENTRY_WORDS as u64) * 8
}

/// The producer's end.
#[derive(Debug)]
pub struct RingWriter {
    memfd: Memfd,
    map: Mapping,
    slots: u64,
    next: u64,
    words: Arc<JobWords>,
}

impl RingWriter {
    /// A new ring whose consumer reports progress in `words`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(slots: u32, words: Arc<JobWords>) -> Result<Self, ShmError> {
        let slots = slots.next_power_of_two();
        let memfd = Memfd::create("pillion-ring", ring_bytes(slots))?;
        let map = memfd.map(Access::ReadWrite)?;
        memfd.seal(Seal::SizeAndFutureWrites)?;
        Ok(Self { memfd, map, slots: u64::from(slots), next: 0, words })
    }

    /// The consumer's end of it.
    #[cfg(all(test, loom))]
    pub(crate) fn other_end(&self, words: Arc<JobWords>) -> RingReader {
        RingReader { map: self.map.clone(), slots: self.slots, next: 0, words }
    }

    /// What is passed to the consumer.
    pub fn memfd(&self) -> &Memfd {
        &self.memfd
    }

    /// Appends an entry, or gives it back while the consumer lags a whole ring behind.
    ///
    /// # Errors
    /// The completion itself, to be tried again later.
    pub fn push(&mut self, completion: Completion) -> Result<(), Completion> {
        let consumed = self.words.consumed();
        // A consumer that claims to be ahead of us is broken: it may lose entries, nothing else.
        if self.next.saturating_sub(consumed) >= self.slots {
            return Err(completion);
        }
        let entry = self.entry(self.next);
        let (low, high) = split(completion.job);
        let packed = u64::from(completion.outcome as u8)
            | u64::from(completion.quiesced) << 8
            | u64::from(completion.blocks) << 32;
        entry[1].store(low, Ordering::Relaxed);
        entry[2].store(high, Ordering::Relaxed);
        entry[3].store(packed, Ordering::Relaxed);
        entry[0].store(self.next + 1, Ordering::Release);
        self.next += 1;
        Ok(())
    }

    fn entry(&self, index: u64) -> &[AtomicU64] {
        let at = (index & (self.slots - 1)) as usize * ENTRY_WORDS;
        &self.map.words()[at..at + ENTRY_WORDS]
    }
}

fn split(job: [u8; 16]) -> (u64, u64) {
    let value = u128::from_le_bytes(job);
    (value as u64, (value >> 64) as u64)
}

/// The consumer's end.
#[derive(Debug)]
pub struct RingReader {
    map: Mapping,
    slots: u64,
    next: u64,
    words: Arc<JobWords>,
}

impl RingReader {
    /// Maps a ring that the sidecar passed.
    ///
    /// # Errors
    /// Where it is not sealed or not of the size that `slots` needs, or these are more than any sidecar makes.
    pub fn open(fd: std::os::fd::OwnedFd, slots: u32, words: Arc<JobWords>) -> Result<Self, ShmError> {
        // Beyond 2^31 there is no next power of two.
        if !(1..=SLOTS_MAX).contains(&slots) {
            return Err(ShmError::Slots { what: "ring", limit: SLOTS_MAX, got: slots });
        }
        let slots = slots.next_power_of_two();
        let memfd = Memfd::adopt(fd, Seal::SizeAndFutureWrites, ring_bytes(slots))?;
        Ok(Self { map: memfd.map(Access::Read)?, slots: u64::from(slots), next: 0, words })
    }

    /// The next completion, if there is one. Costs one load when there is none.
    pub fn pop(&mut self) -> Option<Completion> {
        let at = (self.next & (self.slots - 1)) as usize * ENTRY_WORDS;
        let entry = &self.map.words()[at..at + ENTRY_WORDS];
        if entry[0].load(Ordering::Acquire) != self.next + 1 {
            return None;
        }
        let job =
            u128::from(entry[1].load(Ordering::Relaxed)) | u128::from(entry[2].load(Ordering::Relaxed)) << 64;
        let packed = entry[3].load(Ordering::Relaxed);
        self.next += 1;
        self.words.set_consumed(self.next);
        Some(Completion {
            job: job.to_le_bytes(),
            outcome: Outcome::from_byte(packed as u8),
            quiesced: packed >> 8 & 1 == 1,
            blocks: (packed >> 32) as u32,
        })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn pair(slots: u32) -> (RingWriter, RingReader) {
        let words = Arc::new(JobWords::create(8).unwrap());
        let theirs = words.memfd().unwrap().fd().try_clone_to_owned().unwrap();
        let writer = RingWriter::create(slots, words).unwrap();
        let fd = writer.memfd().fd().try_clone_to_owned().unwrap();
        let words = Arc::new(JobWords::open(theirs, 8).unwrap());
        (writer, RingReader::open(fd, slots, words).unwrap())
    }

    fn completion(n: u32) -> Completion {
        let mut job = [0; 16];
        job[..4].copy_from_slice(&n.to_le_bytes());
        Completion { job, outcome: Outcome::Done, quiesced: n.is_multiple_of(2), blocks: n }
    }

    #[test]
    fn entries_come_out_as_they_went_in_over_many_laps() {
        let (mut writer, mut reader) = pair(4);
        for n in 0..1000 {
            assert_eq!(reader.pop(), None);
            writer.push(completion(n)).unwrap();
            assert_eq!(reader.pop(), Some(completion(n)));
        }
    }

    #[test]
    fn a_full_ring_gives_the_entry_back_and_one_less_just_fits() {
        let (mut writer, mut reader) = pair(4);
        for n in 0..4 {
            writer.push(completion(n)).unwrap();
        }
        assert_eq!(writer.push(completion(4)), Err(completion(4)));
        assert_eq!(reader.pop(), Some(completion(0)));
        writer.push(completion(4)).unwrap();
        assert_eq!(writer.push(completion(5)), Err(completion(5)));
    }

    #[test]
    fn a_ring_of_more_entries_than_anybody_makes_is_refused() {
        let words = Arc::new(JobWords::create(1).unwrap());
        for slots in [0, SLOTS_MAX + 1, 1 << 31, (1 << 31) + 1, u32::MAX] {
            let memfd = Memfd::create("t", 64).unwrap();
            memfd.seal(Seal::SizeAndFutureWrites).unwrap();
            let fd = memfd.fd().try_clone_to_owned().unwrap();
            let opened = RingReader::open(fd, slots, Arc::clone(&words));
            assert!(matches!(opened, Err(ShmError::Slots { got, .. }) if got == slots), "{opened:?}");
        }
    }

    #[test]
    fn two_threads_agree() {
        let (mut writer, mut reader) = pair(64);
        let producer = std::thread::spawn(move || {
            for n in 0..20_000 {
                while writer.push(completion(n)).is_err() {
                    std::thread::yield_now();
                }
            }
        });
        for n in 0..20_000 {
            loop {
                match reader.pop() {
                    Some(seen) => break assert_eq!(seen, completion(n)),
                    None => std::thread::yield_now(),
                }
            }
        }
        producer.join().unwrap();
    }
}
