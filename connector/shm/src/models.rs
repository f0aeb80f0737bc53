//! What two processes do at once with words that no lock protects, in every order that the memory model allows (loom).
//! Run by `RUSTFLAGS="--cfg loom" cargo test --release -p pillion-shm --lib models`, as `scripts/test` does.

use std::sync::Arc;

use loom::{model::Builder, thread};

use crate::{
    presence::{IndexKey, TableWriter},
    ring::{Completion, Outcome, RingWriter},
    words::JobWords,
};

/// Orders with more switches between threads than this are not looked at, where there would be millions.
const SWITCHES: usize = 3;

fn bounded(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(SWITCHES);
    builder.check(model);
}

#[test]
fn a_word_is_won_by_exactly_one_side() {
    loom::model(|| {
        let ours = JobWords::create(1).unwrap();
        let theirs = ours.other_end();
        ours.hold(0, 1);
        let sidecar = thread::spawn(move || theirs.publish(0, 1));
        let revoked = ours.revoke(0, 1);
        let published = sidecar.join().unwrap();
        assert!(published != revoked, "published: {published}, revoked: {revoked}");
    });
}

#[test]
fn a_late_publish_of_an_earlier_save_changes_nothing_for_the_next() {
    loom::model(|| {
        let ours = JobWords::create(1).unwrap();
        let theirs = ours.other_end();
        ours.hold(0, 1);
        let sidecar = thread::spawn(move || (theirs.publish(0, 1), theirs.publish(0, 2)));
        let first = ours.revoke(0, 1);
        // The slot is used again only after its save has ended.
        let second = if first {
            ours.hold(0, 2);
            Some(ours.revoke(0, 2))
        } else {
            None
        };
        let (late, next) = sidecar.join().unwrap();
        assert!(late != first);
        match second {
            Some(revoked) => assert!(revoked != next, "the second save has one winner"),
            None => assert!(!next, "it was never held"),
        }
    });
}

fn completion(n: u8) -> Completion {
    Completion { job: [n; 16], outcome: Outcome::Done, quiesced: true, blocks: u32::from(n) }
}

#[test]
fn completions_come_whole_in_order_and_once() {
    bounded(|| {
        let words = Arc::new(JobWords::create(1).unwrap());
        let theirs = Arc::new(words.other_end());
        let mut writer = RingWriter::create(2, words).unwrap();
        let mut reader = writer.other_end(theirs);
        let sidecar = thread::spawn(move || {
            // The third finds the ring full, unless the reader has been quick.
            (1..=3).take_while(|n| writer.push(completion(*n)).is_ok()).count()
        });
        let mut seen: Vec<Completion> = (0..3).filter_map(|_| reader.pop()).collect();
        let pushed = sidecar.join().unwrap();
        seen.extend(std::iter::from_fn(|| reader.pop()));
        let expected: Vec<Completion> = (1..=pushed as u8).map(completion).collect();
        assert_eq!(seen, expected);
        assert!(pushed >= 2, "there was room for two");
    });
}

/// Keys of one bucket, which share halves of their words: what a reader could mix up.
fn keys() -> [IndexKey; 4] {
    [IndexKey::of_words(2, 4), IndexKey::of_words(2, 6), IndexKey::of_words(4, 4), IndexKey::of_words(4, 6)]
}

#[test]
fn a_reader_finds_what_is_there_or_was_and_nothing_else() {
    bounded(|| {
        let mut table = TableWriter::create(8).unwrap();
        let reader = table.other_end();
        let [first, _, third, never] = keys();
        table.set(first, 1);
        let shim = thread::spawn(move || {
            let found = (reader.get(first), reader.get(never));
            assert!([0, 1, 2].contains(&found.0), "{found:?}");
            assert_eq!(found.1, 0, "half of one entry and half of another");
            reader
        });
        // Another entry in the same place: its halves are those of a key that is never there.
        table.remove(first);
        table.set(third, 1);
        table.set(first, 2);
        let reader = shim.join().unwrap();
        assert_eq!((reader.get(first), reader.get(third), reader.get(never)), (2, 1, 0));
    });
}
