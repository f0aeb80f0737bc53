//! Scenarios on the core, and a random walk against a slow oracle.

use std::collections::{HashMap, VecDeque};

use proptest::prelude::*;

use pillion_shm::presence::IndexKey;

use super::*;
use crate::{
    event::{BlockOutcome, CopyItem, Direction, Group, LeaseRun, LoadRun, Outcome, SaveRun},
    ids::{JobId, LeaseId},
    key::{BlockKey, TenantKey},
    ssd::{CacheMode, GetEnding, PutEnding, SsdRecord},
};

mod groups;
mod neighbours;
mod ssd;
mod ssd_walk;

const RECORD: u64 = 512 << 10;
const SECOND: u64 = 1_000_000_000;

fn hash(n: u32) -> [u8; 32] {
    let mut hash = [0; 32];
    hash[..4].copy_from_slice(&n.to_le_bytes());
    hash
}

fn namespace(model: &str) -> Namespace {
    Namespace::new(vec![("model".into(), model.into())]).unwrap()
}

fn group(model: &str, record_bytes: u64) -> Group {
    Group { namespace: namespace(model), record_bytes, format: "format".into(), load_only: false }
}

fn registration(model: &str) -> Registration {
    Registration { num_blocks: 64, groups: vec![group(model, RECORD)], cache_mode: None }
}

fn tenant(n: u8) -> Tenant {
    Tenant { name: format!("tenant{n}").into(), key: TenantKey::new([n; 32]) }
}

#[derive(Debug, Clone)]
struct PutAsked {
    token: u64,
    record: SsdRecord,
    offset: u64,
    durable: bool,
}

#[derive(Debug, Clone)]
struct GetAsked {
    token: u64,
    key: [u8; 32],
    offset: u64,
}

/// The core with everything around it that a test needs.
struct Rig {
    core: Core,
    now: u64,
    sessions: u64,
    jobs: u64,
    copies: Vec<(SessionId, JobId, Direction, Vec<CopyItem>)>,
    words: HashMap<(SessionId, JobId), bool>,
    done: Vec<(SessionId, JobId, Outcome, bool, u32)>,
    leased: HashMap<u64, (LeaseId, u32)>,
    /// Of the last lease, run by run.
    runs: Vec<u32>,
    /// With the tiers.
    present: HashMap<(Arc<str>, IndexKey), u8>,
    puts: VecDeque<PutAsked>,
    gets: VecDeque<GetAsked>,
    /// What the SSD has.
    disk: HashMap<[u8; 32], SsdRecord>,
    ended: Vec<SessionId>,
    unregistered: Vec<u64>,
    errors: Vec<String>,
    drained: bool,
    /// What is meant for neighbours.
    abroad: Vec<Action>,
}

impl Rig {
    fn new(pool_records: u64) -> Self {
        Self::with(pool_records, None)
    }

    fn with(pool_records: u64, ssd: Option<SsdLimits>) -> Self {
        let pool_bytes = pool_records * RECORD;
        let core = Core::new(Limits {
            pool_bytes,
            pinned_bytes_max: pool_bytes,
            leases_max: 8,
            session_jobs_max: 8,
            lease_ns: 30 * SECOND,
            lease_seed: [1; 32],
            borrow_wait_ns: SECOND / 5,
            ssd,
        });
        Self {
            core,
            now: 0,
            sessions: 0,
            jobs: 0,
            copies: Vec::new(),
            words: HashMap::new(),
            done: Vec::new(),
            leased: HashMap::new(),
            runs: Vec::new(),
            present: HashMap::new(),
            puts: VecDeque::new(),
            gets: VecDeque::new(),
            disk: HashMap::new(),
            ended: Vec::new(),
            unregistered: Vec::new(),
            errors: Vec::new(),
            drained: false,
            abroad: Vec::new(),
        }
    }

    fn apply(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.core.apply(event, self.now, &mut actions);
        for action in actions {
            match action {
                Action::Copy { session, job, direction, items, event } => {
                    assert_eq!(event.is_some(), direction == Direction::Load, "as the rig submits them");
                    self.copies.push((session, job, direction, items));
                }
                Action::TryPublish { session, job, .. } => {
                    let won = self.words.get(&(session, job)).copied().unwrap_or(true);
                    self.apply(Event::PublishTried { session, job, won });
                }
                Action::Complete { session, job, outcome, quiesced, blocks } => {
                    self.done.push((session, job, outcome, quiesced, blocks));
                }
                Action::Leased { request, lease, blocks, .. } => {
                    self.runs = blocks;
                    self.leased.insert(request, (lease, self.runs.iter().sum()));
                }
                Action::TableSet { tenant, key, tiers } => {
                    let before = self.present.insert((tenant, key), tiers);
                    assert!(before.is_none() || self.core.ssd.is_some(), "set twice");
                }
                Action::TableRemove { tenant, key } => {
                    assert!(self.present.remove(&(tenant, key)).is_some(), "not there")
                }
                Action::SessionEnded { session } => self.ended.push(session),
                Action::Unregistered { request, .. } => self.unregistered.push(request),
                Action::ProtocolError { text, .. } => self.errors.push(text),
                Action::Drained => self.drained = true,
                Action::SsdPut { token, record, offset, durable } => {
                    self.puts.push_back(PutAsked { token, record: *record, offset, durable });
                }
                Action::SsdGet { token, key, offset, bytes } => {
                    assert_eq!(bytes, self.disk.get(&key).map_or(bytes, |record| record.bytes));
                    assert!(self.gets.iter().all(|get| get.key != key), "two reads of one record");
                    self.gets.push_back(GetAsked { token, key, offset });
                }
                Action::NamespaceOpened { .. } | Action::CancelCopy { .. } => {}
                abroad @ (Action::AskNeighbours { .. }
                | Action::RenewAt { .. }
                | Action::Return { .. }
                | Action::SayDamaged { .. }
                | Action::Lent { .. }) => self.abroad.push(abroad),
            }
        }
        self.core.check_invariants();
    }

    /// A scheduler and a worker of one engine.
    fn engine(&mut self, name: &str, tenant: &Tenant, model: &str) -> Engine {
        let mut attach = |role| {
            self.sessions += 1;
            let session = SessionId(self.sessions);
            self.apply(Event::Attached {
                session,
                role,
                engine: name.into(),
                uid: 7,
                tenant: tenant.clone(),
            });
            session
        };
        let (scheduler, worker) = (attach(Role::Scheduler), attach(Role::Worker));
        let namespace = namespace(model);
        let space = namespace.id(tenant, b"");
        self.apply(Event::Registered { session: worker, registration: registration(model) });
        self.apply(Event::OpenNamespace { session: scheduler, request: 0, namespace, epoch: Vec::new() });
        Engine { scheduler, worker, space }
    }

    fn save(&mut self, engine: &Engine, parent: Option<u32>, blocks: std::ops::Range<u32>) -> JobId {
        self.jobs += 1;
        let job = JobId(u128::from(self.jobs).to_le_bytes());
        self.apply(Event::Save {
            session: engine.worker,
            job,
            runs: vec![SaveRun {
                space: engine.space,
                parent: parent.map(hash),
                count: blocks.clone().count() as u32,
            }],
            hashes: blocks.clone().map(hash).collect(),
            blocks: blocks.map(|n| n % 64).collect(),
            word: 0,
            tag: self.jobs,
            deadline_ns: self.now + 30 * SECOND,
            event: None,
        });
        job
    }

    fn lease(&mut self, engine: &Engine, hashes: impl Iterator<Item = u32>) -> (LeaseId, u32) {
        let request = self.ask(engine, hashes);
        self.leased[&request]
    }

    /// Asks for a lease; the answer may come later.
    fn ask(&mut self, engine: &Engine, hashes: impl IntoIterator<Item = u32>) -> u64 {
        self.jobs += 1;
        let request = self.jobs;
        let hashes: Vec<_> = hashes.into_iter().map(hash).collect();
        let runs = vec![LeaseRun { space: engine.space, count: hashes.len() as u32 }];
        self.apply(Event::Lease { session: engine.scheduler, request, runs, hashes });
        request
    }

    /// Ends the oldest write to the SSD.
    fn put(&mut self, ending: PutEnding) {
        let PutAsked { token, record, .. } = self.puts.pop_front().expect("a write");
        if ending == PutEnding::Stored {
            self.disk.insert(record.key, record);
        }
        self.apply(Event::SsdPutEnded { token, ending });
    }

    fn put_all(&mut self) {
        while !self.puts.is_empty() {
            self.put(PutEnding::Stored);
        }
    }

    /// Ends the oldest read from the SSD: well, or as said.
    fn get(&mut self, bad: Option<GetEnding>) {
        let GetAsked { token, key, .. } = self.gets.pop_front().expect("a read");
        let there = self.disk.get(&key).map(|record| GetEnding::Loaded(record.checksum));
        let ending = bad.or(there).unwrap_or(GetEnding::Gone);
        if matches!(ending, GetEnding::Corrupt | GetEnding::Gone) {
            self.disk.remove(&key);
        }
        self.apply(Event::SsdGetEnded { token, ending });
    }

    fn get_all(&mut self) {
        while !self.gets.is_empty() {
            self.get(None);
        }
    }

    fn load(&mut self, engine: &Engine, lease: LeaseId, first: u32, hashes: std::ops::Range<u32>) -> JobId {
        self.jobs += 1;
        let job = JobId(u128::from(self.jobs).to_le_bytes());
        self.apply(Event::Load {
            session: engine.worker,
            job,
            lease,
            runs: vec![LoadRun { run: 0, first, space: engine.space, count: hashes.clone().count() as u32 }],
            blocks: hashes.clone().map(|n| n % 64).collect(),
            hashes: hashes.map(hash).collect(),
            deadline_ns: self.now + 2 * SECOND,
            event: Some(3),
        });
        job
    }

    /// Ends the oldest copy; every block as `outcome` says.
    fn copy(&mut self, outcome: impl Fn(&CopyItem) -> BlockOutcome) {
        let (session, job, _, items) = self.copies.remove(0);
        let blocks = items.iter().map(outcome).collect();
        self.apply(Event::CopyDone { session, job, blocks });
    }

    fn copied(&mut self) {
        self.copy(|item| BlockOutcome::Copied(item.offset));
    }

    fn last(&self) -> (JobId, Outcome, bool, u32) {
        let (_, job, outcome, quiesced, blocks) = *self.done.last().expect("a completion");
        (job, outcome, quiesced, blocks)
    }
}

#[derive(Debug, Clone, Copy)]
struct Engine {
    scheduler: SessionId,
    worker: SessionId,
    space: NamespaceId,
}

#[test]
fn the_same_events_come_to_the_same_actions() {
    let course = || {
        let mut rig = Rig::new(64);
        let engine = rig.engine("e", &tenant(1), "m");
        for n in 0..8 {
            rig.save(&engine, None, 4 * n..4 * n + 2);
        }
        rig.now += 31 * SECOND;
        rig.apply(Event::Tick);
        (0..8).for_each(|_| rig.copied());
        rig.done
    };
    let first = course();
    assert_eq!(first.len(), 16, "each is late, and quiesces");
    // The standard map has another order each time it is made.
    assert!((0..4).all(|_| course() == first));
}

#[test]
fn what_was_saved_is_leased_and_loaded_with_its_checksum() {
    let mut rig = Rig::new(16);
    let engine = rig.engine("e", &tenant(1), "m");
    let save = rig.save(&engine, None, 0..4);
    assert!(rig.present.is_empty(), "nothing can be found before it is published");
    assert_eq!(rig.lease(&engine, 0..4).1, 0);
    rig.copied();
    assert_eq!(rig.last(), (save, Outcome::Done, true, 4));
    assert_eq!(rig.present.len(), 4);
    let (lease, blocks) = rig.lease(&engine, 0..6);
    assert_eq!(blocks, 4);
    let load = rig.load(&engine, lease, 1, 1..4);
    assert!(rig.copies[0].3.iter().all(|item| item.checksum == item.offset));
    rig.copied();
    assert_eq!(rig.last(), (load, Outcome::Done, true, 3));
}

#[test]
fn a_revoked_save_is_never_found() {
    let mut rig = Rig::new(16);
    let engine = rig.engine("e", &tenant(1), "m");
    let save = rig.save(&engine, None, 0..2);
    rig.words.insert((engine.worker, save), false);
    rig.copied();
    assert_eq!(rig.last(), (save, Outcome::Cancelled, true, 0));
    assert_eq!((rig.lease(&engine, 0..2).1, rig.present.len()), (0, 0));
    assert_eq!(rig.core.counters().record_bytes, 0);
}

#[test]
fn a_save_with_one_unreachable_block_publishes_nothing() {
    let mut rig = Rig::new(16);
    let engine = rig.engine("e", &tenant(1), "m");
    let save = rig.save(&engine, None, 0..3);
    rig.copy(|item| if item.block == 1 { BlockOutcome::Unreachable } else { BlockOutcome::Copied(1) });
    assert_eq!(rig.last(), (save, Outcome::Failed, true, 0));
    assert_eq!(rig.core.counters().records, 0);
}

#[test]
fn a_corrupt_record_fails_its_load_and_is_gone_at_once() {
    let mut rig = Rig::new(16);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.save(&engine, None, 0..3);
    rig.copied();
    let (lease, _) = rig.lease(&engine, 0..3);
    let load = rig.load(&engine, lease, 0, 0..3);
    rig.copy(|item| if item.block == 1 { BlockOutcome::Corrupt } else { BlockOutcome::Copied(0) });
    assert_eq!(rig.last(), (load, Outcome::Failed, true, 0));
    assert_eq!(rig.present.len(), 2);
    assert_eq!(rig.lease(&engine, 0..3).1, 1, "the prefix ends before the retired block");
    rig.apply(Event::Release { session: engine.scheduler, lease });
    assert_eq!(rig.core.counters().records, 2);
}

#[test]
fn tenants_models_and_epochs_never_meet() {
    let mut rig = Rig::new(16);
    let first = rig.engine("a", &tenant(1), "m");
    rig.save(&first, None, 0..2);
    rig.copied();
    for (tenant, model) in [(tenant(2), "m"), (tenant(1), "other")] {
        let engine = rig.engine("b", &tenant, model);
        assert_eq!(rig.lease(&engine, 0..2).1, 0);
        // Not even with the other's namespace id in hand.
        let stranger = Engine { space: first.space, ..engine };
        let expected = if model == "m" { 0 } else { 2 };
        let (lease, blocks) = rig.lease(&stranger, 0..2);
        assert_eq!(blocks, expected, "a lease needs the tenant, a load the whole namespace");
        rig.load(&stranger, lease, 0, 0..2);
        assert_eq!(rig.last().1, Outcome::Failed);
    }
    rig.apply(Event::OpenNamespace {
        session: first.scheduler,
        request: 9,
        namespace: namespace("m"),
        epoch: vec![5; 16],
    });
    let later = Engine { space: namespace("m").id(&tenant(1), &[5; 16]), ..first };
    assert_eq!(rig.lease(&later, 0..2).1, 0);
    assert_eq!(rig.lease(&first, 0..2).1, 2);
}

#[test]
fn another_engine_cannot_use_a_lease_nor_other_hashes_under_it() {
    let mut rig = Rig::new(16);
    let owner = rig.engine("a", &tenant(1), "m");
    let other = rig.engine("b", &tenant(1), "m");
    rig.save(&owner, None, 0..4);
    rig.copied();
    let (lease, _) = rig.lease(&owner, 0..4);
    for job in [
        rig.load(&other, lease, 0, 0..4),
        rig.load(&owner, lease, 1, 0..3),
        rig.load(&owner, lease, 2, 2..5),
        rig.load(&owner, lease, u32::MAX, 0..1),
        rig.load(&owner, LeaseId([9; 16]), 0, 0..1),
    ] {
        let ended = rig.done.iter().find(|done| done.1 == job).expect("answered at once");
        assert_eq!((ended.2, ended.3), (Outcome::Failed, true));
    }
    assert!(rig.copies.is_empty());
}

#[test]
fn children_go_before_parents_and_the_oldest_prefix_first() {
    let mut rig = Rig::new(8);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.save(&engine, None, 0..4);
    rig.copied();
    rig.save(&engine, None, 10..14);
    rig.copied();
    let (lease, _) = rig.lease(&engine, 0..4);
    rig.apply(Event::Release { session: engine.scheduler, lease });
    // Room for three more: the tail of the prefix that was not used lately goes.
    rig.save(&engine, None, 20..23);
    rig.copied();
    assert_eq!(rig.lease(&engine, 10..14).1, 1);
    assert_eq!(rig.lease(&engine, 0..4).1, 4);
    assert_eq!(rig.core.counters().evictions, 3);
}

#[test]
fn what_is_leased_is_not_evicted_and_a_save_without_room_keeps_a_prefix() {
    let mut rig = Rig::new(4);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.save(&engine, None, 0..3);
    rig.copied();
    let (lease, blocks) = rig.lease(&engine, 0..3);
    assert_eq!(blocks, 3);
    let save = rig.save(&engine, None, 10..13);
    rig.copied();
    assert_eq!(rig.last(), (save, Outcome::Done, true, 1), "one block fitted");
    assert_eq!(rig.core.counters().blocks_without_room, 2);
    let nothing = rig.save(&engine, Some(10), 11..13);
    assert_eq!(rig.last(), (nothing, Outcome::Done, true, 0), "its own parent is not evicted for it");
    rig.apply(Event::Release { session: engine.scheduler, lease });
    let (_, blocks) = rig.lease(&engine, 0..3);
    assert_eq!(blocks, 3);
}

#[test]
fn a_deadline_is_reported_once_and_quiescence_follows() {
    let mut rig = Rig::new(16);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.save(&engine, None, 0..2);
    rig.copied();
    let (lease, _) = rig.lease(&engine, 0..2);
    let load = rig.load(&engine, lease, 0, 0..2);
    rig.now += 2 * SECOND - 1;
    rig.apply(Event::Tick);
    assert_ne!(rig.last().0, load);
    rig.now += 1;
    rig.apply(Event::Tick);
    assert_eq!(rig.last(), (load, Outcome::Failed, false, 0));
    rig.apply(Event::Tick);
    rig.copied();
    assert_eq!(rig.last(), (load, Outcome::AlreadyReported, true, 0));
    assert_eq!(rig.done.iter().filter(|done| done.1 == load).count(), 2);
}

#[test]
fn a_lease_ends_with_its_time_but_not_under_a_job() {
    let mut rig = Rig::new(16);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.save(&engine, None, 0..2);
    rig.copied();
    let (lease, _) = rig.lease(&engine, 0..2);
    rig.load(&engine, lease, 0, 0..2);
    rig.now += 31 * SECOND;
    rig.apply(Event::Tick);
    assert_eq!(rig.core.counters().leases, 1);
    rig.copied();
    rig.apply(Event::Tick);
    assert_eq!((rig.core.counters().leases, rig.core.counters().pinned_bytes), (0, 0));
}

#[test]
fn an_engine_that_dies_leaves_nothing_behind() {
    let mut rig = Rig::new(16);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.save(&engine, None, 0..2);
    rig.copied();
    let (lease, _) = rig.lease(&engine, 0..2);
    rig.load(&engine, lease, 0, 0..2);
    rig.save(&engine, Some(1), 2..4);
    let before = rig.done.len();
    rig.apply(Event::Detached { session: engine.worker });
    rig.apply(Event::Detached { session: engine.scheduler });
    assert_eq!(rig.ended, [engine.scheduler], "the worker's memory is still being copied");
    rig.copied();
    rig.copied();
    assert_eq!(rig.ended, [engine.scheduler, engine.worker]);
    assert_eq!(rig.done.len(), before, "nobody is left to tell");
    let counters = rig.core.counters();
    assert_eq!((counters.leases, counters.jobs, counters.pinned_bytes, counters.records), (0, 0, 0, 2));
}

#[test]
fn a_drain_waits_for_jobs_and_takes_no_more() {
    let mut rig = Rig::new(16);
    let engine = rig.engine("e", &tenant(1), "m");
    let save = rig.save(&engine, None, 0..2);
    rig.apply(Event::Drain);
    assert!(!rig.drained);
    rig.save(&engine, None, 5..6);
    assert_eq!(rig.last().1, Outcome::Cancelled);
    rig.copied();
    assert!(rig.drained);
    assert!(rig.done.iter().any(|done| done.1 == save && done.2 == Outcome::Done));
}

#[test]
fn memory_that_goes_away_is_let_go_when_its_last_copy_has_ended() {
    let mut rig = Rig::new(16);
    let engine = rig.engine("e", &tenant(1), "m");
    rig.save(&engine, None, 0..2);
    rig.copy(|_| BlockOutcome::Copied(1));
    let (lease, _) = rig.lease(&engine, 0..2);
    let load = rig.load(&engine, lease, 0, 0..2);
    let save = rig.save(&engine, Some(1), 2..4);
    rig.apply(Event::Unregister { session: engine.worker, request: 77 });
    assert!(rig.unregistered.is_empty(), "two copies may still touch it");
    // Nothing new is begun.
    rig.load(&engine, lease, 0, 0..1);
    assert_eq!(rig.copies.len(), 2);
    assert_eq!((rig.last().1, rig.last().2), (Outcome::Failed, true));
    rig.copy(|_| BlockOutcome::Skipped);
    assert_eq!(rig.last(), (load, Outcome::Cancelled, true, 0));
    assert!(rig.unregistered.is_empty());
    rig.copy(|_| BlockOutcome::Copied(1));
    assert_eq!(rig.last(), (save, Outcome::Cancelled, true, 0));
    assert_eq!(rig.unregistered, [77]);
    assert_eq!(rig.lease(&engine, 0..4).1, 2, "a save that was given up is not found");
    // Woken up.
    rig.apply(Event::Registered { session: engine.worker, registration: registration("m") });
    let load = rig.load(&engine, lease, 0, 0..2);
    rig.copy(|_| BlockOutcome::Copied(1));
    assert_eq!(rig.last(), (load, Outcome::Done, true, 2));
    rig.apply(Event::Unregister { session: engine.worker, request: 78 });
    assert_eq!(rig.unregistered, [77, 78], "nothing ran");
    // Jobs of new memory do not keep the old.
    rig.apply(Event::Registered { session: engine.worker, registration: registration("m") });
    rig.load(&engine, lease, 0, 0..2);
    rig.apply(Event::Unregister { session: engine.worker, request: 79 });
    rig.apply(Event::Registered { session: engine.worker, registration: registration("m") });
    rig.load(&engine, lease, 0, 0..2);
    rig.copy(|_| BlockOutcome::Skipped);
    assert_eq!(rig.unregistered, [77, 78, 79]);
    rig.copy(|_| BlockOutcome::Copied(1));
    assert_eq!(rig.last().1, Outcome::Done);
}

#[test]
fn jobs_that_no_correct_client_submits_are_answered_and_counted() {
    let mut rig = Rig::new(16);
    let engine = rig.engine("e", &tenant(1), "m");
    let save = |rig: &mut Rig, hashes: usize, blocks: Vec<u32>| {
        rig.jobs += 1;
        let job = JobId(u128::from(rig.jobs).to_le_bytes());
        let (session, space) = (engine.worker, engine.space);
        let runs = vec![SaveRun { space, parent: None, count: hashes as u32 }];
        let hashes = vec![hash(1); hashes];
        let save =
            Event::Save { session, job, runs, hashes, blocks, word: 0, tag: 0, deadline_ns: 1, event: None };
        rig.apply(save);
        assert_eq!(rig.last(), (job, Outcome::Failed, true, 0));
    };
    save(&mut rig, 1, vec![64]);
    save(&mut rig, 2, vec![1]);
    save(&mut rig, 0, vec![]);
    assert_eq!(rig.errors.len(), 3);
    assert!(rig.errors[0].contains("below 64, got 64"), "{}", rig.errors[0]);
}

#[derive(Debug, Clone)]
enum Step {
    Save { engine: usize, start: u32, count: u32, revoked: bool },
    Lease { engine: usize, start: u32, count: u32 },
    Load { pick: usize, skip: u32 },
    Release { pick: usize },
    Copy { bad: bool },
    Cancel { pick: usize },
    Pass { seconds: u64 },
    Replace { engine: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let (engine, start, count) = (0usize..3, 0u32..3, 1u32..6);
    prop_oneof![
        (engine.clone(), start.clone(), count.clone(), proptest::bool::weighted(0.2)).prop_map(
            |(engine, start, count, revoked)| Step::Save { engine, start: start * 10, count, revoked }
        ),
        (engine.clone(), start, count).prop_map(|(engine, start, count)| Step::Lease {
            engine,
            start: start * 10,
            count
        }),
        (0usize..16, 0u32..3).prop_map(|(pick, skip)| Step::Load { pick, skip }),
        (0usize..16).prop_map(|pick| Step::Release { pick }),
        proptest::bool::weighted(0.2).prop_map(|bad| Step::Copy { bad }),
        proptest::bool::weighted(0.2).prop_map(|bad| Step::Copy { bad }),
        (0usize..16).prop_map(|pick| Step::Cancel { pick }),
        (0u64..40).prop_map(|seconds| Step::Pass { seconds }),
        engine.prop_map(|engine| Step::Replace { engine }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever engines do: jobs end once and quiesce once, what is found is what was stored under that
    /// very key, and when all engines are gone nothing is pinned.
    #[test]
    fn a_random_walk_keeps_every_promise(steps in proptest::collection::vec(step(), 1..120)) {
        let mut rig = Rig::new(8);
        let mut engines: Vec<Engine> =
            (0..3).map(|n| rig.engine(&format!("e{n}"), &tenant(n % 2), "m")).collect();
        let mut leases: Vec<(Engine, LeaseId, u32, u32)> = Vec::new();
        // Which block's bytes lie where, by what was copied: the oracle of identity.
        let mut lies: HashMap<u64, (NamespaceId, [u8; 32])> = HashMap::new();
        let mut meant: HashMap<JobId, Vec<(NamespaceId, [u8; 32])>> = HashMap::new();
        let mut names = 3;
        for step in steps {
            match step {
                Step::Save { engine, start, count, revoked } => {
                    let engine = engines[engine];
                    let before = rig.copies.len();
                    let job = rig.save(&engine, None, start..start + count);
                    rig.words.insert((engine.worker, job), !revoked);
                    if let Some((_, _, _, items)) = rig.copies.get(before) {
                        for item in items {
                            let block = (start..start + count).find(|n| u64::from(n % 64) == item.block);
                            lies.insert(item.offset, (engine.space, hash(block.unwrap())));
                        }
                    }
                }
                Step::Lease { engine, start, count } => {
                    let engine = engines[engine];
                    let (lease, blocks) = rig.lease(&engine, start..start + count);
                    if blocks > 0 {
                        leases.push((engine, lease, start, blocks));
                    }
                }
                Step::Load { pick, skip } if !leases.is_empty() => {
                    let (engine, lease, start, blocks) = leases[pick % leases.len()];
                    if skip < blocks {
                        let before = rig.copies.len();
                        let job = rig.load(&engine, lease, skip, start + skip..start + blocks);
                        if let Some((_, _, _, items)) = rig.copies.get(before) {
                            let wanted: Vec<_> =
                                (start + skip..start + blocks).map(|n| (engine.space, hash(n))).collect();
                            for (item, wanted) in items.iter().zip(&wanted) {
                                prop_assert_eq!(&lies[&item.offset], wanted, "a load reads another block");
                            }
                            meant.insert(job, wanted);
                        }
                    }
                }
                Step::Release { pick } if !leases.is_empty() => {
                    let (engine, lease, ..) = leases.swap_remove(pick % leases.len());
                    rig.apply(Event::Release { session: engine.scheduler, lease });
                }
                Step::Copy { bad } if !rig.copies.is_empty() => {
                    // Until the copy ends, its record must not have been given to another block.
                    let (_, job, direction, items) = rig.copies[0].clone();
                    if let Some(wanted) = meant.get(&job).filter(|_| direction == Direction::Load) {
                        for (item, wanted) in items.iter().zip(wanted) {
                            prop_assert_eq!(&lies[&item.offset], wanted, "overwritten while being read");
                        }
                    }
                    let fault = if direction == Direction::Load { BlockOutcome::Corrupt } else { BlockOutcome::Unreachable };
                    rig.copy(|item| if bad { fault } else { BlockOutcome::Copied(item.checksum) });
                }
                Step::Cancel { pick } if !rig.copies.is_empty() => {
                    let (session, job, ..) = rig.copies[pick % rig.copies.len()];
                    rig.apply(Event::Cancel { session, job });
                }
                Step::Pass { seconds } => {
                    rig.now += seconds * SECOND;
                    rig.apply(Event::Tick);
                }
                Step::Replace { engine } => {
                    let old = engines[engine];
                    rig.apply(Event::Detached { session: old.worker });
                    rig.apply(Event::Detached { session: old.scheduler });
                    leases.retain(|(owner, ..)| owner.worker != old.worker);
                    engines[engine] = rig.engine(&format!("e{names}"), &tenant(engine as u8 % 2), "m");
                    names += 1;
                }
                Step::Load { .. } | Step::Release { .. } | Step::Copy { .. } | Step::Cancel { .. } => {}
            }
        }
        for engine in engines {
            rig.apply(Event::Detached { session: engine.worker });
            rig.apply(Event::Detached { session: engine.scheduler });
        }
        while !rig.copies.is_empty() {
            rig.copied();
        }
        let counters = rig.core.counters();
        prop_assert_eq!((counters.jobs, counters.leases, counters.pinned_bytes), (0, 0, 0));
        prop_assert_eq!(rig.core.sessions().count(), 0);
        prop_assert_eq!(counters.records as usize, rig.present.len());
        let mut outcomes: HashMap<JobId, (u32, u32)> = HashMap::new();
        for (_, job, outcome, quiesced, _) in &rig.done {
            let count = outcomes.entry(*job).or_default();
            count.0 += u32::from(*outcome != Outcome::AlreadyReported);
            count.1 += u32::from(*quiesced);
        }
        prop_assert!(outcomes.values().all(|(ended, quiesced)| *ended == 1 && *quiesced <= 1), "{:?}", outcomes);
    }
}
