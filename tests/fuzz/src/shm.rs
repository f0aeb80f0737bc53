//! Shared memory that a hostile peer made, or writes.

use std::sync::{Arc, atomic::Ordering};

use pillion_shm::{
    Access, Memfd, Seal,
    presence::{IndexKey, TableReader, table_bytes},
    ring::{Completion, Outcome, RingReader, RingWriter, ring_bytes},
    words::JobWords,
};

use crate::cursor::Cursor;

const BYTES_MAX: u64 = 64 << 10;

/// Memory as a peer may pass it: of any size, with any content, sealed as it should be or not.
fn passed(c: &mut Cursor<'_>, bytes: u64, seal: Seal, content: &[(u64, u64)]) -> std::os::fd::OwnedFd {
    let (odd, by) = (c.rarely(), c.number());
    let bytes = if odd { bytes.wrapping_add(by) } else { bytes };
    let memory = Memfd::create("fuzz", bytes.min(BYTES_MAX)).expect("memory");
    if memory.bytes() >= 8 {
        let map = memory.map(Access::ReadWrite).expect("a mapping");
        for (at, value) in content {
            if let Some(word) = map.words().get(*at as usize) {
                word.store(*value, Ordering::Relaxed);
            }
        }
    }
    match c.byte() {
        255 => {}
        254 => memory.seal(Seal::Size).expect("seals"),
        _ => memory.seal(seal).expect("seals"),
    }
    memory.fd().try_clone_to_owned().expect("a descriptor")
}

fn content(c: &mut Cursor<'_>, words: u64) -> Vec<(u64, u64)> {
    c.some(24, |c| (c.number() % words.max(1), c.number()))
}

/// A presence table, a completion ring and job words of any content are refused, or are read within their bounds; a ring
/// brings no more completions than it has entries; a save's word is won once.
pub fn shm(data: &[u8]) {
    let mut c = Cursor::new(data, 1024);
    match c.below(3) {
        0 => table(&mut c),
        1 => completions(&mut c),
        _ => words(&mut c),
    }
}

fn table(c: &mut Cursor<'_>) {
    const MAGIC: u64 = 0x3130_4c42_5450_4c50;
    let slots = if c.rarely() { c.number() } else { 8 << c.below(6) };
    let honest = if slots <= BYTES_MAX / 16 { table_bytes(slots) } else { 64 };
    let mut words = content(c, honest / 8);
    words.extend([(0, if c.rarely() { c.number() } else { MAGIC }), (1, slots), (2, c.number())]);
    let fd = passed(c, honest, Seal::SizeAndFutureWrites, &words);
    let Ok(reader) = TableReader::open(fd, c.number32()) else { return };
    assert!(slots.is_power_of_two() && table_bytes(slots) == honest);
    let _ = reader.is_fresh();
    for _ in 0..8 {
        let key = IndexKey::new(c.number(), &[c.byte(); 16], &[c.byte(); 32]);
        let _ = reader.get(key);
    }
}

fn completions(c: &mut Cursor<'_>) {
    let (mut slots, mut word_slots) = (1 << c.below(7), 1 + c.below(64) as u32);
    if c.rarely() {
        (slots, word_slots) = (c.number32(), c.number32());
    }
    let honest = |slots: u32| if slots <= 1 << 9 { ring_bytes(slots) } else { 64 };
    let theirs = passed(c, (8 + u64::from(word_slots)) * 8, Seal::Size, &[]);
    let Ok(words) = JobWords::open(theirs, word_slots) else { return };
    assert_eq!(words.slots(), word_slots);
    let mut entries = content(c, honest(slots) / 8);
    // Entries that look like completions.
    entries.extend((0..c.below(8) as u64).map(|n| (n * 8, n + 1)));
    let fd = passed(c, honest(slots), Seal::SizeAndFutureWrites, &entries);
    let Ok(mut reader) = RingReader::open(fd, slots, Arc::new(words)) else { return };
    let mut came = 0u64;
    while reader.pop().is_some() {
        came += 1;
        assert!(came <= u64::from(slots.next_power_of_two()), "more completions than entries");
    }
}

fn words(c: &mut Cursor<'_>) {
    let slots = 1 + c.below(8) as u32;
    let ours = Arc::new(JobWords::create(slots).expect("words"));
    let memory = ours.memfd().expect("made here").fd().try_clone_to_owned().expect("a descriptor");
    let map = Memfd::adopt(memory, Seal::Size, (8 + u64::from(slots)) * 8).expect("ours");
    let map = map.map(Access::ReadWrite).expect("a mapping");
    let mut ring = RingWriter::create(1 << c.below(4), Arc::clone(&ours)).expect("a ring");
    let mut held = vec![None; slots as usize];
    while !c.is_empty() {
        let (slot, tag) = (c.number32() % (slots + 2), c.number());
        match c.below(5) {
            0 => {
                ours.hold(slot, tag);
                if let Some(held) = held.get_mut(slot as usize) {
                    *held = Some(tag);
                }
            }
            1 | 2 => {
                // Both at a time: one of them at most.
                let (published, revoked) = (ours.publish(slot, tag), ours.revoke(slot, tag));
                assert!(!(published && revoked), "won twice");
                assert!(!published || (slot < slots.max(slot + 1) && held.len() > slot as usize));
            }
            3 => {
                // Whatever the client writes over its own progress and words.
                let word = &map.words()[c.below(map.words().len())];
                word.store(c.number(), Ordering::Relaxed);
            }
            _ => {
                let completion =
                    Completion { job: [c.byte(); 16], outcome: Outcome::Done, quiesced: c.flag(), blocks: 1 };
                assert!(
                    ring.push(completion).is_ok_and(|()| true) || ring.push(completion) == Err(completion)
                );
            }
        }
    }
}
