//! The scheduler's half: lookups in the presence table, leases, epochs.

use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use pillion_protocol::{HASH_BYTES, MAX_BLOCKS, Message, wire};
use pillion_shm::{
    pidfd::Process,
    presence::{IndexKey, TableReader},
};

use crate::{
    link::{Attached, Half, Health, Link, Options},
    outbox::Outbox,
};

/// Tickets that one scheduler may have open: beyond it lookups are misses (I8).
const TICKETS_MAX: usize = 16_384;

/// A lease as it was granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Names it towards the sidecar.
    pub lease: [u8; 16],
    /// Leading blocks of what was asked for; 0: nothing was granted.
    pub blocks: u32,
}

impl Grant {
    const NOTHING: Self = Self { lease: [0; 16], blocks: 0 };
}

#[derive(Debug)]
enum Ticket {
    Asked,
    Granted { grant: Grant, renewed: Instant },
}

#[derive(Debug, Default)]
struct Counts {
    lookups: u64,
    blocks_looked_up: u64,
    blocks_present: u64,
    stale: u64,
    leases_asked: u64,
    leases_granted: u64,
    leases_empty: u64,
    leases_lost: u64,
}

#[derive(Debug)]
struct State {
    namespace: Vec<(String, String)>,
    epoch: Vec<u8>,
    request: u64,
    opening: u64,
    space: Option<[u8; 16]>,
    seed: u64,
    table: Option<TableReader>,
    lease_ms: u32,
    tickets: HashMap<u64, Ticket>,
    counts: Counts,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    answered: Condvar,
    health: Arc<Health>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the crate's documentation.
#[derive(Debug)]
pub struct SchedulerClient {
    shared: Arc<Shared>,
    link: Link,
}

fn blocks(hashes: &[u8]) -> impl Iterator<Item = &[u8; HASH_BYTES]> {
    hashes.as_chunks::<HASH_BYTES>().0.iter().take(MAX_BLOCKS)
}

impl SchedulerClient {
    /// Starts the thread that attaches; returns at once.
    ///
    /// # Errors
    /// Where the process has no file descriptors left.
    pub fn new(options: Options) -> std::io::Result<Self> {
        let outbox = Arc::new(Outbox::new()?);
        let health = Arc::new(Health::default());
        let state = State {
            namespace: options.namespace.clone(),
            epoch: Vec::new(),
            request: 0,
            opening: 0,
            space: None,
            seed: 0,
            table: None,
            lease_ms: 30_000,
            tickets: HashMap::new(),
            counts: Counts::default(),
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            answered: Condvar::new(),
            health: Arc::clone(&health),
        });
        let half: Arc<dyn Half> = Arc::clone(&shared) as _;
        Ok(Self { shared, link: Link::start(options, half, outbox, health) })
    }

    /// Whether lookups can hit.
    pub fn ready(&self) -> bool {
        self.link.health.alive.load(Ordering::Acquire) && self.shared.state().space.is_some()
    }

    /// "ready", or why not.
    pub fn status(&self) -> String {
        if self.ready() { "ready".into() } else { self.link.health.text() }
    }

    /// The id of the namespace in its current epoch.
    pub fn namespace_id(&self) -> Option<[u8; 16]> {
        self.shared.state().space
    }

    /// Leading blocks that the table has. 32 bytes per block.
    pub fn lookup(&self, hashes: &[u8]) -> usize {
        let alive = self.link.health.alive.load(Ordering::Acquire);
        let mut state = self.shared.state();
        if alive { state.lookup(hashes) } else { 0 }
    }

    /// Indices of the blocks that the table lacks: all where it cannot be trusted, none where
    /// there is nobody to save to.
    pub fn absent(&self, hashes: &[u8]) -> Vec<u32> {
        let alive = self.link.health.alive.load(Ordering::Acquire);
        let state = self.shared.state();
        let (true, Some(space), Some(table)) = (alive, state.space, &state.table) else { return Vec::new() };
        let fresh = table.is_fresh();
        let seed = state.seed;
        blocks(hashes)
            .enumerate()
            .filter(|(_, hash)| !fresh || table.get(IndexKey::new(seed, &space, hash)) == 0)
            .map(|(index, _)| index as u32)
            .collect()
    }

    /// Looks up, and asks for a lease over the leading hits: a ticket, or 0 where there is nothing.
    ///
    /// A stale table promises nothing, but on a machine without a free core even a healthy sidecar may
    /// stamp late. So long as it answers heartbeats it is asked anyway: the grant is the promise.
    pub fn lease(&self, hashes: &[u8]) -> u64 {
        let alive = self.link.health.alive.load(Ordering::Acquire);
        let mut state = self.shared.state();
        let Some(space) = state.space.filter(|_| alive && state.tickets.len() < TICKETS_MAX) else {
            return 0;
        };
        let stale = state.table.as_ref().is_some_and(|table| !table.is_fresh());
        let count = match state.lookup(hashes) {
            0 if stale => blocks(hashes).count(),
            count => count,
        };
        if count == 0 {
            return 0;
        }
        state.request += 1;
        state.counts.leases_asked += 1;
        let request = state.request;
        state.tickets.insert(request, Ticket::Asked);
        let hashes = hashes[..count * HASH_BYTES].to_vec();
        let ask = Message::Lease(wire::Lease { request, space: space.to_vec(), hashes });
        if self.link.outbox.send(&ask).is_err() {
            state.tickets.remove(&request);
            return 0;
        }
        request
    }

    /// The answer to a lease, waiting at most `wait` for it. `None`: not yet.
    /// A ticket that was refused, lost or never given answers with no blocks.
    pub fn lease_poll(&self, ticket: u64, wait: Duration) -> Option<Grant> {
        let until = Instant::now() + wait;
        let mut state = self.shared.state();
        loop {
            match state.tickets.get(&ticket) {
                None => return Some(Grant::NOTHING),
                Some(Ticket::Granted { grant, .. }) => return Some(*grant),
                Some(Ticket::Asked) => {}
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            state = self.shared.answered.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Gives a lease back. A job that runs under it keeps it until the job ends. May be called twice.
    pub fn release(&self, ticket: u64) {
        let mut state = self.shared.state();
        if let Some(Ticket::Granted { grant, .. }) = state.tickets.remove(&ticket)
            && grant.blocks > 0
        {
            let lease = grant.lease.to_vec();
            let _ = self.link.outbox.send(&Message::Release(wire::Release { lease }));
        }
    }

    /// From now on, nothing that was saved before is found.
    pub fn new_epoch(&self) {
        let mut epoch = [0u8; 16];
        // Without randomness there is no new epoch, and without a namespace nothing is found at all.
        let random = getrandom::fill(&mut epoch).is_ok();
        let mut state = self.shared.state();
        state.space = None;
        state.opening = 0;
        if random {
            state.epoch = epoch.to_vec();
            state.open_namespace(&self.link.outbox);
        }
    }

    /// What has happened, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let state = self.shared.state();
        let health = &self.link.health;
        let counts = &state.counts;
        vec![
            ("attaches", health.attaches.load(Ordering::Relaxed)),
            ("losses", health.losses.load(Ordering::Relaxed)),
            ("launches", health.launches.load(Ordering::Relaxed)),
            ("lookups", counts.lookups),
            ("blocks_looked_up", counts.blocks_looked_up),
            ("blocks_present", counts.blocks_present),
            ("stale_lookups", counts.stale),
            ("leases_asked", counts.leases_asked),
            ("leases_granted", counts.leases_granted),
            ("leases_empty", counts.leases_empty),
            ("leases_lost", counts.leases_lost),
            ("tickets", state.tickets.len() as u64),
        ]
    }

    /// Ends the thread and the connection.
    pub fn close(&self) {
        self.link.close();
    }
}

impl Drop for SchedulerClient {
    fn drop(&mut self) {
        self.close();
    }
}

impl State {
    fn lookup(&mut self, hashes: &[u8]) -> usize {
        self.counts.lookups += 1;
        let (Some(space), Some(table)) = (self.space, &self.table) else { return 0 };
        if !table.is_fresh() {
            self.counts.stale += 1;
            return 0;
        }
        let seed = self.seed;
        let present =
            blocks(hashes).take_while(|hash| table.get(IndexKey::new(seed, &space, hash)) != 0).count();
        self.counts.blocks_looked_up += (hashes.len() / HASH_BYTES) as u64;
        self.counts.blocks_present += present as u64;
        present
    }

    fn open_namespace(&mut self, outbox: &Outbox) {
        self.request += 1;
        self.opening = self.request;
        let (keys, values) = self.namespace.iter().cloned().unzip();
        let open = Message::OpenNamespace(wire::OpenNamespace {
            request: self.request,
            keys,
            values,
            epoch: self.epoch.clone(),
        });
        let _ = outbox.send(&open);
    }

    fn forget_connection(&mut self) {
        self.space = None;
        self.table = None;
        self.opening = 0;
        self.counts.leases_lost += self.tickets.len() as u64;
        self.tickets.clear();
    }
}

impl Half for Shared {
    fn role(&self) -> wire::Role {
        wire::Role::Scheduler
    }

    fn attached(&self, mut attached: Attached, outbox: &Outbox) -> Result<(), String> {
        let table =
            attached.fds.pop_front().ok_or("expected the presence table's file descriptor, got none")?;
        let table = TableReader::open(table, attached.welcome.stale_ms).map_err(|error| error.to_string())?;
        let mut state = self.state();
        state.forget_connection();
        state.table = Some(table);
        state.seed = attached.welcome.index_seed;
        state.lease_ms = attached.welcome.lease_ms;
        state.open_namespace(outbox);
        Ok(())
    }

    fn message(&self, message: Message, outbox: &Outbox) {
        let mut state = self.state();
        match message {
            Message::NamespaceOpened(opened) if opened.request == state.opening => {
                state.space = opened.id.try_into().ok();
            }
            Message::Leased(leased) => {
                let lease = leased.lease.try_into().unwrap_or([0; 16]);
                let grant = Grant { lease, blocks: leased.blocks };
                if let Some(ticket) = state.tickets.get_mut(&leased.request) {
                    *ticket = Ticket::Granted { grant, renewed: Instant::now() };
                    let counts = &mut state.counts;
                    *(if grant.blocks > 0 {
                        &mut counts.leases_granted
                    } else {
                        &mut counts.leases_empty
                    }) += 1;
                } else if grant.blocks > 0 {
                    // Its ticket was released before the grant came.
                    let _ = outbox.send(&Message::Release(wire::Release { lease: grant.lease.to_vec() }));
                }
                drop(state);
                self.answered.notify_all();
            }
            Message::Refused(refused) => {
                drop(state);
                self.health.say(format!("refused: {}", refused.text));
            }
            _ => {}
        }
    }

    fn lost(&self, _ended: bool, _process: Option<Process>) {
        self.state().forget_connection();
        self.answered.notify_all();
    }

    fn beat(&self, outbox: &Outbox) {
        let mut state = self.state();
        let due = Duration::from_millis(u64::from(state.lease_ms)) / 3;
        for ticket in state.tickets.values_mut() {
            if let Ticket::Granted { grant, renewed } = ticket
                && grant.blocks > 0
                && renewed.elapsed() > due
            {
                *renewed = Instant::now();
                let _ = outbox.send(&Message::Renew(wire::Renew { lease: grant.lease.to_vec() }));
            }
        }
    }

    fn has_overdue_holds(&self) -> bool {
        false
    }
}
