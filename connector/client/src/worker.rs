//! A worker's half: registration, save and load jobs, completions.
//!
//! # How a job ends
//!
//! | what happens | load | save |
//! |---|---|---|
//! | the sidecar completes it | its outcome, quiesced | its outcome, quiesced |
//! | its deadline passes | failed; quiesced when the sidecar says so or is gone | revoked if the word can be won: cancelled and quiesced; else it was published: done |
//! | the connection ends in order | failed, quiesced | as at the deadline |
//! | the connection ends otherwise | failed; quiesced when the process has ended | as at the deadline |
//! | there is no connection | failed, quiesced | cancelled, quiesced |

use std::{
    collections::{HashMap, VecDeque},
    os::fd::OwnedFd,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use pillion_cuda_driver::ForeignStream;
use pillion_protocol::{Message, PARENT_BYTES, wire};
use pillion_shm::{
    pidfd::Process,
    ring::{Completion, Outcome, RingReader},
    words::JobWords,
};

use crate::{
    events::Events,
    link::{Attached, Half, Health, Link, Options},
    outbox::Outbox,
    registration::{Registration, RegistrationError},
};

/// For how long after its registration block 0 is taken to hold the canary.
const CANARY_FRESH: Duration = Duration::from_secs(10);

/// What became of a job. See the module's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobEvent {
    /// Which.
    pub job: [u8; 16],
    /// [`Outcome::None`] if it was reported before.
    pub outcome: Outcome,
    /// Nothing touches its blocks any more.
    pub quiesced: bool,
    /// Blocks loaded or newly stored.
    pub blocks: u32,
}

/// Blocks of one group that are loaded from one run of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadRun {
    /// The group's namespace.
    pub space: [u8; 16],
    /// Which run of the lease.
    pub run: u32,
    /// Its first block that is loaded.
    pub first: u32,
    /// How many blocks.
    pub count: u32,
}

/// Consecutive blocks of one group that are saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveRun {
    /// The group's namespace.
    pub space: [u8; 16],
    /// Hash of the block before the first one, where there is one.
    pub parent: Option<[u8; 32]>,
    /// How many blocks.
    pub count: u32,
}

/// A load of leased blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadJob {
    /// Minted by the scheduler's shim.
    pub job: [u8; 16],
    /// Granted to the scheduler.
    pub lease: [u8; 16],
    /// How the blocks divide between the lease's runs.
    pub runs: Vec<LoadRun>,
    /// 32 bytes per block.
    pub hashes: Vec<u8>,
    /// The engine's blocks.
    pub blocks: Vec<u32>,
    /// When it is reported as failed at the latest.
    pub deadline: Duration,
    /// Device memory: the stream that zeroes blocks or may still write them.
    pub stream: Option<ForeignStream>,
}

/// A save of full blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveJob {
    /// Minted by the scheduler's shim.
    pub job: [u8; 16],
    /// How the blocks divide between groups.
    pub runs: Vec<SaveRun>,
    /// 32 bytes per block.
    pub hashes: Vec<u8>,
    /// The engine's blocks.
    pub blocks: Vec<u32>,
    /// When its source blocks are free at the latest.
    pub deadline: Duration,
    /// Device memory: the stream that computes the blocks.
    pub stream: Option<ForeignStream>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Load,
    Save { slot: u32, tag: u64 },
}

#[derive(Debug)]
struct Job {
    what: What,
    deadline: Instant,
    reported: bool,
    event: Option<u32>,
}

/// The shared memory of one connection.
#[derive(Debug)]
struct Tables {
    ring: RingReader,
    words: Arc<JobWords>,
    free: Vec<u32>,
}

/// Loads of a connection that broke: they quiesce with the process.
#[derive(Debug)]
struct Orphans {
    process: Option<Process>,
    jobs: Vec<[u8; 16]>,
    cuda_events: Vec<u32>,
}

#[derive(Debug, Default)]
struct State {
    registration: Option<Registration>,
    registered_at: Option<Instant>,
    /// Whether the registration that was sent last said that block 0 holds the canary.
    presented_fresh: bool,
    submitted: bool,
    request: u64,
    ready: bool,
    tables: Option<Tables>,
    tag: u64,
    jobs: HashMap<[u8; 16], Job>,
    orphans: Vec<Orphans>,
    events: VecDeque<JobEvent>,
    next_deadline: Option<Instant>,
    cuda_events: Events,
    /// Device memory was presented to this connection's sidecar, which has not said that it let go: it may have it
    /// mapped, jobs or none.
    mapped: bool,
    /// The request to let go of the memory that the sidecar answered last.
    let_go: u64,
}

#[derive(Debug, Default)]
struct Counts {
    loads: AtomicU64,
    saves: AtomicU64,
    not_taken: AtomicU64,
    deadlines: AtomicU64,
    revoked: AtomicU64,
    lost: AtomicU64,
    no_event: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Something came that `unregister` may wait for.
    news: Condvar,
    /// One per KV cache group.
    namespaces: Vec<Vec<(String, String)>>,
    canary_checked: AtomicBool,
    health: Arc<Health>,
    counts: Counts,
}

/// See the crate's documentation.
#[derive(Debug)]
pub struct WorkerClient {
    shared: Arc<Shared>,
    link: Link,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WorkerClient {
    /// Starts the thread that attaches; returns at once.
    ///
    /// # Errors
    /// Where the process has no file descriptors left.
    pub fn new(options: Options) -> std::io::Result<Self> {
        let outbox = Arc::new(Outbox::new()?);
        let shared = Self::shared(&options);
        let (half, health) = (Arc::clone(&shared) as _, Arc::clone(&shared.health));
        Ok(Self { shared, link: Link::start(options, half, outbox, health) })
    }

    /// One connection over this socket, on this thread: for tests of what a hostile sidecar can do. `look` is called
    /// when everything has been read; the text says why the connection ended.
    ///
    /// # Errors
    /// Where the process has no file descriptors left.
    #[cfg(feature = "hostile")]
    pub fn once(
        options: Options,
        socket: OwnedFd,
        look: impl FnOnce(&Self),
    ) -> std::io::Result<(Self, String)> {
        let shared = Self::shared(&options);
        let link = Link { outbox: Arc::new(Outbox::new()?), health: Arc::clone(&shared.health) };
        let client = Self { shared, link };
        let why = client.link.once(options, Arc::clone(&client.shared) as _, socket, || look(&client));
        Ok((client, why))
    }

    fn shared(options: &Options) -> Arc<Shared> {
        Arc::new(Shared {
            state: Mutex::default(),
            news: Condvar::new(),
            namespaces: options.namespaces.clone(),
            canary_checked: AtomicBool::new(false),
            health: Arc::default(),
            counts: Counts::default(),
        })
    }

    /// Presents the KV memory, now and at every later attachment. Block 0 must hold the canary that was compared
    /// last. Device memory gets a pool of `events` events: so many jobs may run at a time.
    ///
    /// # Errors
    /// Where a group's canary was not compared, or groups and namespaces do not go together (I10).
    pub fn register(&self, registration: Registration, events: usize) -> Result<(), RegistrationError> {
        registration.is_complete(self.shared.namespaces.len())?;
        let mut state = self.shared.state();
        if registration.is_device() {
            state.cuda_events.grow(events)?;
        }
        state.registration = Some(registration);
        // Until a sidecar has taken it. What one said of other memory is over.
        state.ready = false;
        if state.tables.is_some() {
            self.shared.health.say("connecting: attached, waiting for what comes after");
        }
        state.submitted = false;
        state.registered_at = Some(Instant::now());
        if state.tables.is_some()
            && let Err(text) = self.shared.present(&mut state, &self.link.outbox)
        {
            self.shared.health.say(text);
        }
        Ok(())
    }

    /// From now on block 0 may hold anything: a sidecar that comes later must believe this client's own look.
    pub fn canary_over(&self) {
        self.shared.state().registered_at = None;
    }

    /// The memory is about to go away: takes no new jobs, ends all, asks the sidecar to let go, and waits for its
    /// answer. True: nothing outside this process can touch the memory, or keeps it from being freed.
    pub fn unregister(&self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        let mut state = self.shared.state();
        state.registration = None;
        state.ready = false;
        // Completions that have come still count.
        state.drain_ring();
        state.give_up_all();
        if state.tables.is_some() {
            state.request += 1;
            let request = state.request;
            if self.link.outbox.send(&Message::Unregister(wire::Unregister { request })).is_ok() {
                while state.tables.is_some() && state.let_go < request {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    state =
                        self.shared.news.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                }
                state.drain_ring();
            }
        }
        // Without a connection: only a process that is gone reaches nothing.
        while !state.is_let_go() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let step = left.min(Duration::from_millis(20));
            state = self.shared.news.wait_timeout(state, step).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Whether jobs can be submitted.
    pub fn ready(&self) -> bool {
        self.link.health.alive.load(Ordering::Acquire) && self.shared.state().ready
    }

    /// "ready", or why not.
    pub fn status(&self) -> String {
        if self.ready() { "ready".into() } else { self.link.health.text() }
    }

    /// Whether a sidecar compared the canary through its own mapping.
    pub fn canary_checked(&self) -> bool {
        self.shared.canary_checked.load(Ordering::Acquire)
    }

    /// Submits a load. Its end comes by [`WorkerClient::poll`], whatever happens.
    pub fn submit_load(&self, load: LoadJob) {
        let LoadJob { job, lease, runs, hashes, blocks, deadline, stream } = load;
        let alive = self.link.health.alive.load(Ordering::Acquire);
        let mut state = self.shared.state();
        state.submitted = true;
        self.shared.counts.loads.fetch_add(1, Ordering::Relaxed);
        let Ok(event) = self.shared.mark(&mut state, alive, stream) else {
            return state.emit(job, Outcome::Failed, true, 0);
        };
        let message = Message::Load(wire::Load {
            job: job.to_vec(),
            lease: lease.to_vec(),
            runs: runs.iter().map(|run| run.run).collect(),
            firsts: runs.iter().map(|run| run.first).collect(),
            spaces: runs.iter().flat_map(|run| run.space).collect(),
            counts: runs.iter().map(|run| run.count).collect(),
            hashes,
            blocks,
            deadline_ms: millis(deadline),
            event: wire_event(event),
        });
        // Under the lock: a completion cannot be looked for before the job is known.
        if !(alive && state.ready) || self.link.outbox.send(&message).is_err() {
            self.shared.counts.not_taken.fetch_add(1, Ordering::Relaxed);
            state.cuda_events.give_back(event);
            return state.emit(job, Outcome::Failed, true, 0);
        }
        state.begin(job, What::Load, deadline, event);
    }

    /// Submits a save. Its end comes by [`WorkerClient::poll`], whatever happens.
    pub fn submit_save(&self, save: SaveJob) {
        let SaveJob { job, runs, hashes, blocks, deadline, stream } = save;
        let alive = self.link.health.alive.load(Ordering::Acquire);
        let mut state = self.shared.state();
        state.submitted = true;
        self.shared.counts.saves.fetch_add(1, Ordering::Relaxed);
        let Ok(event) = self.shared.mark(&mut state, alive, stream) else {
            return state.emit(job, Outcome::Cancelled, true, 0);
        };
        let slot = state.tables.as_mut().filter(|_| alive).and_then(|tables| tables.free.pop());
        let Some(slot) = slot.filter(|_| state.ready) else {
            self.shared.counts.not_taken.fetch_add(1, Ordering::Relaxed);
            state.give_back(slot);
            state.cuda_events.give_back(event);
            return state.emit(job, Outcome::Cancelled, true, 0);
        };
        state.tag += 1;
        let tag = state.tag;
        if let Some(tables) = &state.tables {
            tables.words.hold(slot, tag);
        }
        let message = Message::Save(wire::Save {
            job: job.to_vec(),
            spaces: runs.iter().flat_map(|run| run.space).collect(),
            counts: runs.iter().map(|run| run.count).collect(),
            parents: runs.iter().flat_map(SaveRun::parent_bytes).collect(),
            hashes,
            blocks,
            word: slot,
            tag,
            deadline_ms: millis(deadline),
            event: wire_event(event),
        });
        if self.link.outbox.send(&message).is_err() {
            self.shared.counts.not_taken.fetch_add(1, Ordering::Relaxed);
            // Part of the frame may be on its way: the word keeps it from being published.
            if let Some(tables) = &state.tables {
                tables.words.revoke(slot, tag);
            }
            state.cuda_events.give_back(event);
            return state.emit(job, Outcome::Cancelled, true, 0);
        }
        state.begin(job, What::Save { slot, tag }, deadline, event);
    }

    /// What has happened to jobs since the last call.
    pub fn poll(&self) -> Vec<JobEvent> {
        let mut state = self.shared.state();
        state.drain_ring();
        if state.next_deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            self.shared.expire(&mut state, &self.link.outbox);
        }
        state.events.drain(..).collect()
    }

    /// Jobs whose blocks something may still touch.
    pub fn unquiesced(&self) -> usize {
        let state = self.shared.state();
        state.jobs.len() + state.orphans.iter().map(|orphans| orphans.jobs.len()).sum::<usize>()
    }

    /// What has happened, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let (health, counts) = (&self.link.health, &self.shared.counts);
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("attaches", load(&health.attaches)),
            ("losses", load(&health.losses)),
            ("launches", load(&health.launches)),
            ("kills", load(&health.kills)),
            ("loads", load(&counts.loads)),
            ("saves", load(&counts.saves)),
            ("not_taken", load(&counts.not_taken)),
            ("deadlines", load(&counts.deadlines)),
            ("revoked", load(&counts.revoked)),
            ("lost", load(&counts.lost)),
            ("no_event", load(&counts.no_event)),
            ("unquiesced", self.unquiesced() as u64),
        ]
    }

    /// Ends the thread and the connection.
    pub fn close(&self) {
        self.link.close();
    }
}

impl Drop for WorkerClient {
    fn drop(&mut self) {
        self.close();
    }
}

impl SaveRun {
    /// As the protocol says it.
    fn parent_bytes(&self) -> [u8; PARENT_BYTES] {
        let mut bytes = [0; PARENT_BYTES];
        if let Some(parent) = &self.parent {
            bytes[0] = 1;
            bytes[1..].copy_from_slice(parent);
        }
        bytes
    }
}

/// As the protocol says it: 0 for none.
fn wire_event(event: Option<u32>) -> u32 {
    event.map_or(0, |index| index + 1)
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

impl State {
    fn emit(&mut self, job: [u8; 16], outcome: Outcome, quiesced: bool, blocks: u32) {
        self.events.push_back(JobEvent { job, outcome, quiesced, blocks });
    }

    fn begin(&mut self, job: [u8; 16], what: What, deadline: Duration, event: Option<u32>) {
        let deadline = Instant::now() + deadline;
        self.next_deadline = Some(self.next_deadline.map_or(deadline, |next| next.min(deadline)));
        self.jobs.insert(job, Job { what, deadline, reported: false, event });
    }

    /// Forgets a job of which nothing outside touches anything any more.
    fn end(&mut self, job: [u8; 16]) -> Option<Job> {
        let ended = self.jobs.remove(&job);
        self.cuda_events.give_back(ended.as_ref().and_then(|job| job.event));
        ended
    }

    /// Ends every job towards the engine; loads quiesce when the sidecar says so.
    fn give_up_all(&mut self) {
        let jobs: Vec<_> = self.jobs.iter().map(|(id, job)| (*id, job.what)).collect();
        for (job, what) in jobs {
            match what {
                What::Save { slot, tag } => drop(self.end_save(job, slot, tag)),
                What::Load => self.report_failed(job),
            }
        }
        self.next_deadline = None;
    }

    /// A load that will not be waited for. It still holds its blocks.
    fn report_failed(&mut self, job: [u8; 16]) {
        if let Some(running) = self.jobs.get_mut(&job)
            && !running.reported
        {
            running.reported = true;
            self.emit(job, Outcome::Failed, false, 0);
        }
    }

    /// Whether no sidecar, past or present, can reach our memory.
    fn is_let_go(&self) -> bool {
        self.jobs.is_empty() && self.orphans.is_empty() && !self.mapped
    }

    fn give_back(&mut self, slot: Option<u32>) {
        if let (Some(slot), Some(tables)) = (slot, &mut self.tables) {
            tables.free.push(slot);
        }
    }

    fn drain_ring(&mut self) {
        while let Some(completion) = self.tables.as_mut().and_then(|tables| tables.ring.pop()) {
            self.complete(completion);
        }
    }

    fn complete(&mut self, completion: Completion) {
        let Completion { job, outcome, quiesced, blocks } = completion;
        let Some(running) = self.jobs.get_mut(&job) else { return };
        if let (What::Save { slot, tag }, false) = (running.what, quiesced) {
            // The sidecar saw the deadline before we did: ours to end, as in `expire`. A copy that hangs
            // would otherwise hold the source blocks for good.
            self.end_save(job, slot, tag);
            return;
        }
        let outcome = match (running.reported, outcome) {
            (true, _) => Outcome::None,
            // Quiet, with the word that it was reported, which it was not: whoever waits for its end must have one.
            (false, Outcome::None) if quiesced => Outcome::Failed,
            (false, outcome) => outcome,
        };
        running.reported |= outcome != Outcome::None;
        if quiesced {
            let what = running.what;
            self.end(job);
            if let What::Save { slot, .. } = what {
                self.give_back(Some(slot));
            }
        }
        if outcome != Outcome::None || quiesced {
            self.emit(job, outcome, quiesced, blocks);
        }
    }

    /// Ends a save from our side (I4): whoever wins the word decides, and either way nothing reads
    /// the source blocks for a record that could still be published.
    fn end_save(&mut self, job: [u8; 16], slot: u32, tag: u64) -> bool {
        let revoked = self.tables.as_ref().is_some_and(|tables| tables.words.revoke(slot, tag));
        let reported = self.end(job).is_some_and(|running| running.reported);
        self.give_back(Some(slot));
        let outcome = match (reported, revoked) {
            (true, _) => Outcome::None,
            (false, true) => Outcome::Cancelled,
            (false, false) => Outcome::Done,
        };
        self.emit(job, outcome, true, 0);
        revoked
    }
}

impl Shared {
    /// Marks the point of a stream that the sidecar must wait for. An error: the job cannot be taken.
    fn mark(&self, state: &mut State, alive: bool, stream: Option<ForeignStream>) -> Result<Option<u32>, ()> {
        let Some(stream) = stream else { return Ok(None) };
        // Nobody would wait for it.
        if !(alive && state.ready) {
            return Ok(None);
        }
        let recorded = state.cuda_events.record(stream);
        if !matches!(recorded, Ok(Some(_))) {
            self.counts.no_event.fetch_add(1, Ordering::Relaxed);
        }
        match recorded {
            Ok(event) => event.map(Some).ok_or(()),
            Err(error) => {
                self.health.say(format!("no event can be recorded on the engine's stream: {error}"));
                Err(())
            }
        }
    }

    fn present(&self, state: &mut State, outbox: &Outbox) -> Result<(), String> {
        state.request += 1;
        let request = state.request;
        let fresh = !state.submitted && state.registered_at.is_some_and(|at| at.elapsed() < CANARY_FRESH);
        state.presented_fresh = fresh;
        let Some(registration) = &state.registration else { return Ok(()) };
        let mapped = registration.is_device();
        let fds = registration.fds().map_err(|error| error.to_string())?;
        let events = state.cuda_events.handles();
        let message = Message::Register(registration.message(request, &self.namespaces, fresh, events));
        state.mapped |= mapped;
        outbox.send_with_fds(&message, &fds).map_err(|_| "the registration could not be sent".to_owned())
    }

    fn expire(&self, state: &mut State, outbox: &Outbox) {
        let now = Instant::now();
        let late: Vec<_> = state
            .jobs
            .iter()
            .filter(|(_, job)| job.deadline <= now && !job.reported)
            .map(|(id, job)| (*id, job.what))
            .collect();
        for (job, what) in late {
            self.counts.deadlines.fetch_add(1, Ordering::Relaxed);
            let _ = outbox.send(&Message::Cancel(wire::Cancel { job: job.to_vec() }));
            match what {
                What::Load => state.report_failed(job),
                What::Save { slot, tag } => {
                    if state.end_save(job, slot, tag) {
                        self.counts.revoked.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        }
        state.next_deadline = state.jobs.values().filter(|job| !job.reported).map(|job| job.deadline).min();
    }
}

impl Half for Shared {
    fn role(&self) -> wire::Role {
        wire::Role::Worker
    }

    fn attached(&self, mut attached: Attached, outbox: &Outbox) -> Result<(), String> {
        let welcome = &attached.welcome;
        let mut next = |what: &str| {
            attached.fds.pop_front().ok_or_else(|| format!("expected the {what}'s file descriptor, got none"))
        };
        drop(next("presence table")?);
        let (ring, words) = (next("completion ring")?, next("job words")?);
        let words = JobWords::open(words, welcome.word_slots).map_err(|error| error.to_string())?;
        let words = Arc::new(words);
        let ring = RingReader::open(ring, welcome.ring_slots, Arc::clone(&words));
        let ring = ring.map_err(|error| error.to_string())?;
        // Where Yama restricts process_vm, the engine must name the sidecar. Elsewhere this fails, harmlessly.
        if let Some(pid) = rustix::process::Pid::from_raw(attached.peer.pid) {
            let _ = rustix::process::set_ptracer(rustix::process::PTracer::ProcessID(pid));
        }
        let mut state = self.state();
        let free = (0..words.slots()).rev().collect();
        state.tables = Some(Tables { ring, words, free });
        self.present(&mut state, outbox)
    }

    fn message(&self, message: Message, _: VecDeque<OwnedFd>, outbox: &Outbox) {
        let mut state = self.state();
        match message {
            Message::Registered(registered) if registered.request == state.request => {
                state.ready = true;
                self.canary_checked.store(true, Ordering::Release);
            }
            Message::Unregistered(answer) => {
                state.let_go = state.let_go.max(answer.request);
                // Nothing was presented since it was asked.
                state.mapped &= answer.request != state.request;
                self.news.notify_all();
            }
            // The engine used block 0 before the sidecar had looked there: our own look must do, as for a sidecar
            // that comes later.
            Message::Refused(refused)
                if refused.reason == wire::Reason::Canary
                    && refused.request == state.request
                    && state.presented_fresh
                    && state.registered_at.is_none() =>
            {
                if let Err(text) = self.present(&mut state, outbox) {
                    drop(state);
                    self.health.say(text);
                }
            }
            // Of memory that is no longer presented.
            Message::Refused(refused) if refused.request != 0 && refused.request != state.request => {}
            Message::Refused(refused) => {
                state.ready &= refused.request != state.request;
                drop(state);
                self.health.say(format!("refused: {}", refused.text));
            }
            _ => {}
        }
    }

    fn lost(&self, ended: bool, process: Option<Process>) {
        let mut state = self.state();
        // What the sidecar completed before it went still counts.
        state.drain_ring();
        state.ready = false;
        let gone = ended || process.as_ref().is_none_or(Process::has_ended);
        let (mut orphans, mut cuda_events) = (Vec::new(), Vec::new());
        let jobs: Vec<_> = state.jobs.iter().map(|(id, job)| (*id, job.what)).collect();
        self.counts.lost.fetch_add(jobs.len() as u64, Ordering::Relaxed);
        for (job, what) in jobs {
            match what {
                What::Save { slot, tag } => {
                    state.end_save(job, slot, tag);
                }
                What::Load => {
                    let (reported, event) =
                        state.jobs.remove(&job).map_or((false, None), |job| (job.reported, job.event));
                    let outcome = if reported { Outcome::None } else { Outcome::Failed };
                    if !reported || gone {
                        state.emit(job, outcome, gone, 0);
                    }
                    if gone {
                        state.cuda_events.give_back(event);
                    } else {
                        orphans.push(job);
                        cuda_events.extend(event);
                    }
                }
            }
        }
        let mapped = std::mem::take(&mut state.mapped);
        if !orphans.is_empty() || (mapped && !gone) {
            state.orphans.push(Orphans { process, jobs: orphans, cuda_events });
        }
        state.tables = None;
        state.next_deadline = None;
        self.news.notify_all();
    }

    fn beat(&self, _outbox: &Outbox) {
        let mut state = self.state();
        if state.orphans.is_empty() {
            return;
        }
        let all = std::mem::take(&mut state.orphans);
        for orphans in all {
            if orphans.process.as_ref().is_none_or(Process::has_ended) {
                for job in orphans.jobs {
                    state.emit(job, Outcome::None, true, 0);
                }
                for event in orphans.cuda_events {
                    state.cuda_events.give_back(Some(event));
                }
                self.news.notify_all();
            } else {
                state.orphans.push(orphans);
            }
        }
    }

    fn has_overdue_holds(&self) -> bool {
        let now = Instant::now();
        let state = self.state();
        state.orphans.iter().any(|orphans| !orphans.jobs.is_empty())
            || state.jobs.values().any(|job| job.what == What::Load && job.deadline <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_ends_even_where_the_sidecar_says_that_it_had_ended_before() {
        for what in [What::Load, What::Save { slot: 0, tag: 1 }] {
            let (mut state, job) = (State::default(), [7; 16]);
            state.begin(job, what, Duration::from_secs(9), None);
            state.complete(Completion { job, outcome: Outcome::None, quiesced: true, blocks: 3 });
            let events: Vec<JobEvent> = state.events.drain(..).collect();
            assert_eq!(events, [JobEvent { job, outcome: Outcome::Failed, quiesced: true, blocks: 3 }]);
            state.complete(Completion { job, outcome: Outcome::Done, quiesced: true, blocks: 3 });
            assert!(state.events.is_empty(), "and it ends once");
        }
    }
}
