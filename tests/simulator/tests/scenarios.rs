//! Scenarios of fixed seeds, and that what is broken on purpose is seen.

use std::collections::BTreeMap;

use pillion_simulator::{Budget, Campaign, Fault, Sabotage, run, shrink};

/// A campaign of its own for each test, so that they run beside each other.
fn nothing_is_broken(seed: u64, scenarios: u64) -> Campaign {
    let campaign = Campaign::play(seed, scenarios, &Budget::default(), None, 1, |_| true);
    if let Some(failure) = campaign.failures.first() {
        panic!(
            "seed={}: {}: {}; cargo run --release -p pillion-simulator -- --replay {}",
            failure.seed, failure.violation.invariant, failure.violation.text, failure.seed
        );
    }
    assert_eq!(campaign.scenarios, scenarios);
    campaign
}

#[test]
fn nothing_is_broken_in_hundreds_of_scenarios() {
    let campaign = nothing_is_broken(7, 600);
    let never: Vec<_> = Fault::ALL.iter().zip(&campaign.faults).filter(|(_, count)| **count == 0).collect();
    assert!(never.is_empty(), "faults that never happened: {never:?}");
    let wanted = [
        "blocks loaded and compared",
        "blocks published and compared",
        "blocks loaded from neighbours",
        "blocks read from the SSD",
        "blocks acknowledged as durable",
        "promised blocks looked for",
        "blocks on disks compared",
        "damaged records refused",
        "damaged records of the SSD refused",
        "saves revoked",
        "loads orphaned",
        "mute sidecars killed",
        "presence table full",
    ];
    let unseen: Vec<_> = wanted.iter().filter(|what| !campaign.seen.contains_key(*what)).collect();
    assert!(unseen.is_empty(), "never seen: {unseen:?}");
}

#[test]
fn nothing_is_broken_in_hundreds_of_others() {
    nothing_is_broken(8, 400);
}

#[test]
fn the_same_seed_is_the_same_course() {
    let hashes = |from: u64| -> Vec<u64> {
        (from..from + 60).map(|seed| run(seed, &Budget::default(), None, false).hash).collect()
    };
    let first = hashes(5_000);
    // In a process of its own the standard maps have another order again; in another thread they have, too.
    let second = std::thread::spawn(move || hashes(5_000)).join().expect("it does not panic");
    assert_eq!(first, second);
    let traced: Vec<u64> =
        (5_000..5_060).map(|seed| run(seed, &Budget::default(), None, true).hash).collect();
    assert_eq!(first, traced, "looking on changes nothing");
    let different: BTreeMap<u64, u64> = first.iter().copied().zip(5_000..).collect();
    assert_eq!(different.len(), first.len());
}

/// Whatever is broken is seen within so many scenarios, and as what.
fn is_seen(sabotage: Sabotage, scenarios: u64, as_one_of: &[&str]) {
    let campaign = Campaign::play(3, scenarios, &Budget::default(), Some(sabotage), 1, |_| true);
    let failure = campaign.failures.first().unwrap_or_else(|| panic!("{sabotage:?} is not seen"));
    let invariant = failure.violation.invariant;
    assert!(
        as_one_of.contains(&invariant),
        "{sabotage:?} is seen as {invariant}: {}",
        failure.violation.text
    );
}

#[test]
fn copies_that_skip_checksums_are_seen() {
    is_seen(Sabotage::ChecksumsSkipped, 1000, &["I1"]);
    is_seen(Sabotage::LoansTrusted, 3000, &["I1"]);
}

#[test]
fn holds_that_end_before_their_job_has_quiesced_are_seen() {
    is_seen(Sabotage::HoldsEndEarly, 300, &["I3"]);
}

#[test]
fn saves_that_are_published_without_their_word_are_seen() {
    is_seen(Sabotage::WordIgnored, 500, &["I4"]);
}

#[test]
fn a_disk_whose_records_are_not_verified_is_seen() {
    is_seen(Sabotage::DiskTrusted, 3000, &["I1"]);
}

#[test]
fn acknowledgements_without_a_sync_are_seen() {
    is_seen(Sabotage::SyncsSkipped, 2000, &["I7"]);
}

#[test]
fn writes_that_end_before_their_bytes_were_taken_are_seen() {
    is_seen(Sabotage::PutsEndEarly, 1000, &["I7", "I1", "leak"]);
}

#[test]
fn completions_that_are_lost_are_seen() {
    is_seen(Sabotage::CompletionsLost, 300, &["I2"]);
}

#[test]
fn tenants_that_are_mixed_are_seen() {
    is_seen(Sabotage::TenantsMixed, 300, &["I1", "I4"]);
}

#[test]
fn an_epoch_that_is_kept_is_seen() {
    is_seen(Sabotage::EpochKept, 1000, &["I1", "I4"]);
}

#[test]
fn a_failure_shrinks_to_what_it_needs() {
    let campaign = Campaign::play(4, 1000, &Budget::default(), Some(Sabotage::WordIgnored), 1, |_| true);
    let seed = campaign.failures.first().expect("it is seen").seed;
    let whole = run(seed, &Budget::default(), Some(Sabotage::WordIgnored), false);
    let (budget, smallest) = shrink(seed, &Budget::default(), Some(Sabotage::WordIgnored)).expect("it fails");
    assert_eq!(smallest.violation.expect("it still fails").invariant, "I4");
    assert!(budget.without.len() > Fault::ALL.len() / 2, "{budget:?}");
    // Another course: it may go on for longer, and has no more in it that could be the cause.
    let kinds = |faults: &[u64]| faults.iter().filter(|count| **count > 0).count();
    assert!(kinds(&smallest.faults) <= kinds(&whole.faults).min(3));
    assert!(budget.steps < 100 && !smallest.trace.is_empty(), "{budget:?}");
}
