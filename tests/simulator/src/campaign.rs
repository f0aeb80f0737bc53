//! Many scenarios from one seed, a report of what happened in them, and the smallest scenario that still fails.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
};

use serde_json::{Value, json};

use crate::{
    net::Violation,
    plan::{Budget, Fault, Sabotage},
    world::{Outcome, run},
};

/// Scenarios of one campaign, at most: the seeds of another begin behind them.
const SCENARIOS_MAX: u64 = 1_000_000_000;

/// A scenario in which something was broken.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Its seed.
    pub seed: u64,
    /// What was broken.
    pub violation: Violation,
}

/// What came of many scenarios.
#[derive(Debug, Clone, Default)]
pub struct Campaign {
    /// Scenarios that were played.
    pub scenarios: u64,
    /// Things that happened in them.
    pub events: u64,
    /// Faults by kind, in the order of [`Fault::ALL`].
    pub faults: Vec<u64>,
    /// What else was seen.
    pub seen: BTreeMap<&'static str, u64>,
    /// What was broken.
    pub failures: Vec<Failure>,
}

/// Runs one scenario; a panic of the shipped code is a failure like any other.
fn outcome(seed: u64, budget: &Budget, sabotage: Option<Sabotage>, traced: bool) -> Outcome {
    let played = catch_unwind(AssertUnwindSafe(|| run(seed, budget, sabotage, traced)));
    played.unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let violation =
            Violation { invariant: "panic", text: text.unwrap_or_else(|| "without a text".into()) };
        Outcome {
            violation: Some(violation),
            events: 0,
            faults: vec![0; Fault::ALL.len()],
            seen: BTreeMap::new(),
            hash: 0,
            trace: Vec::new(),
        }
    })
}

impl Campaign {
    /// The seed of the n-th scenario of a campaign.
    pub fn seed_of(seed: u64, scenario: u64) -> u64 {
        seed.wrapping_mul(SCENARIOS_MAX).wrapping_add(scenario)
    }

    /// Plays so many scenarios, or until so many have failed, or as long as `goes_on` says after each.
    pub fn play(
        seed: u64,
        scenarios: u64,
        budget: &Budget,
        sabotage: Option<Sabotage>,
        failures_max: usize,
        mut goes_on: impl FnMut(u64) -> bool,
    ) -> Self {
        let mut campaign = Self { faults: vec![0; Fault::ALL.len()], ..Self::default() };
        for scenario in 0..scenarios {
            campaign.add(Self::seed_of(seed, scenario), budget, sabotage);
            if campaign.failures.len() >= failures_max || !goes_on(campaign.scenarios) {
                break;
            }
        }
        campaign
    }

    fn add(&mut self, seed: u64, budget: &Budget, sabotage: Option<Sabotage>) {
        let played = outcome(seed, budget, sabotage, false);
        self.scenarios += 1;
        self.events += played.events;
        self.faults.iter_mut().zip(played.faults).for_each(|(sum, more)| *sum += more);
        for (what, times) in played.seen {
            *self.seen.entry(what).or_default() += times;
        }
        self.failures.extend(played.violation.map(|violation| Failure { seed, violation }));
    }

    /// For a report.
    pub fn json(&self) -> Value {
        let faults: BTreeMap<&str, u64> =
            Fault::ALL.iter().zip(&self.faults).map(|(fault, count)| (fault.name(), *count)).collect();
        let failure = |failure: &Failure| {
            let Violation { invariant, text } = &failure.violation;
            json!({ "seed": failure.seed, "invariant": invariant, "text": text })
        };
        json!({
            "scenarios": self.scenarios,
            "events": self.events,
            "faults": faults,
            "seen": self.seen,
            "failures": self.failures.iter().map(failure).collect::<Vec<_>>(),
        })
    }
}

/// The smallest budget with which a seed still breaks the same promise, and how that goes. `None`: it breaks nothing.
pub fn shrink(seed: u64, budget: &Budget, sabotage: Option<Sabotage>) -> Option<(Budget, Outcome)> {
    let mut best = budget.clone();
    let invariant = outcome(seed, &best, sabotage, false).violation?.invariant;
    let fails = |budget: &Budget| {
        outcome(seed, budget, sabotage, false)
            .violation
            .is_some_and(|violation| violation.invariant == invariant)
    };
    loop {
        let before = best.clone();
        for fault in Fault::ALL {
            if !best.without.contains(fault) {
                let mut less = best.clone();
                less.without.push(*fault);
                best = if fails(&less) { less } else { best };
            }
        }
        for (engines, sidecars) in [(1, usize::MAX), (2, usize::MAX), (usize::MAX, 1), (usize::MAX, 2)] {
            let less = Budget {
                engines: best.engines.min(engines),
                sidecars: best.sidecars.min(sidecars),
                ..best.clone()
            };
            best = if less != best && fails(&less) { less } else { best };
        }
        for steps in (0..100).take_while(|steps| *steps < best.steps) {
            let less = Budget { steps, ..best.clone() };
            if fails(&less) {
                best = less;
                break;
            }
        }
        if best == before {
            break;
        }
    }
    let smallest = outcome(seed, &best, sabotage, true);
    Some((best, smallest))
}
