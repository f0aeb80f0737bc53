//! The scheduler's half: lookups in the presence table, leases, epochs.

use std::{
    collections::{HashMap, VecDeque},
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use pillion_protocol::{HASH_BYTES, MAX_BLOCKS, MAX_RUNS, Message, wire};
use pillion_shm::{
    pidfd::Process,
    presence::{IndexKey, TableReader},
};

use crate::{
    link::{Attached, Half, Health, Link, Options},
    outbox::Outbox,
};

/// Tables of neighbours that are looked at (I8).
const NEIGHBOURS_MAX: usize = 64;
/// Tickets that one scheduler may have open: beyond it lookups are misses (I8).
const TICKETS_MAX: usize = 16_384;

/// A lease as it was granted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Grant {
    /// Names it towards the sidecar.
    pub lease: [u8; 16],
    /// Leading blocks of each run that was asked for; none or all 0: nothing was granted.
    pub blocks: Vec<u32>,
}

impl Grant {
    /// Whether there is nothing to load or to give back.
    pub fn is_nothing(&self) -> bool {
        self.blocks.iter().all(|blocks| *blocks == 0)
    }
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

/// Another sidecar of the node, and what it has for our tenant.
#[derive(Debug)]
struct Neighbour {
    number: u64,
    device: String,
    table: TableReader,
}

#[derive(Debug)]
struct State {
    /// One per KV cache group.
    namespaces: Vec<Vec<(String, String)>>,
    epoch: Vec<u8>,
    request: u64,
    /// The request that opened the first group's namespace; the others follow it. 0: none was made.
    opening: u64,
    /// Ids of the namespaces, as far as they are open in the current epoch.
    opened: Vec<Option<[u8; 16]>>,
    /// The same once all are.
    spaces: Vec<[u8; 16]>,
    seed: u64,
    table: Option<TableReader>,
    /// Of other sidecars of the node, by their number: what they have, ours lends.
    neighbours: Vec<Neighbour>,
    /// The device of ours.
    device: String,
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
        let state = State {
            namespaces: options.namespaces.clone(),
            epoch: Vec::new(),
            request: 0,
            opening: 0,
            opened: vec![None; options.namespaces.len()],
            spaces: Vec::new(),
            seed: 0,
            table: None,
            neighbours: Vec::new(),
            device: String::new(),
            lease_ms: 30_000,
            tickets: HashMap::new(),
            counts: Counts::default(),
        };
        Arc::new(Shared { state: Mutex::new(state), answered: Condvar::new(), health: Arc::default() })
    }

    /// Whether lookups can hit.
    pub fn ready(&self) -> bool {
        self.link.health.alive.load(Ordering::Acquire) && !self.shared.state().spaces.is_empty()
    }

    /// "ready", or why not.
    pub fn status(&self) -> String {
        if self.ready() { "ready".into() } else { self.link.health.text() }
    }

    /// The ids of the groups' namespaces in their current epoch, once all are open.
    pub fn namespace_ids(&self) -> Option<Vec<[u8; 16]>> {
        let state = self.shared.state();
        (!state.spaces.is_empty()).then(|| state.spaces.clone())
    }

    /// Leading blocks of a group that the table has. 32 bytes per block.
    pub fn lookup(&self, group: usize, hashes: &[u8]) -> usize {
        let alive = self.link.health.alive.load(Ordering::Acquire);
        let mut state = self.shared.state();
        if alive { state.lookup(group, hashes) } else { 0 }
    }

    /// Which blocks of a group the table has: none where it cannot be trusted.
    pub fn present(&self, group: usize, hashes: &[u8]) -> Vec<bool> {
        let alive = self.link.health.alive.load(Ordering::Acquire);
        let mut state = self.shared.state();
        state.present(alive, group, hashes)
    }

    /// Indices of the blocks of a group that the table lacks: all where it cannot be trusted, none where
    /// there is nobody to save to.
    pub fn absent(&self, group: usize, hashes: &[u8]) -> Vec<u32> {
        let alive = self.link.health.alive.load(Ordering::Acquire);
        let state = self.shared.state();
        let (true, Some(space), Some(table)) = (alive, state.spaces.get(group), &state.table) else {
            return Vec::new();
        };
        if !table.is_fresh() {
            return (0..(hashes.len() / HASH_BYTES) as u32).collect();
        }
        state
            .whether(*space, table, hashes)
            .zip(0..)
            .filter(|(there, _)| !there)
            .map(|(_, index)| index)
            .collect()
    }

    /// Asks for a lease over runs of (group, hashes): a ticket, or 0 where there is nothing to ask for.
    ///
    /// A single run is looked up first, and only its leading hits are asked for. Who asks for several has
    /// chosen them by what the table has.
    ///
    /// A stale table promises nothing, but on a machine without a free core even a healthy sidecar may
    /// stamp late. So long as it answers heartbeats it is asked anyway: the grant is the promise.
    pub fn lease(&self, runs: &[(usize, &[u8])]) -> u64 {
        let alive = self.link.health.alive.load(Ordering::Acquire);
        let mut state = self.shared.state();
        if !alive || state.spaces.is_empty() || state.tickets.len() >= TICKETS_MAX || runs.len() > MAX_RUNS {
            return 0;
        }
        let (mut spaces, mut counts, mut hashes) = (Vec::new(), Vec::with_capacity(runs.len()), Vec::new());
        for (group, of_run) in runs {
            let Some(space) = state.spaces.get(*group).copied() else { return 0 };
            let count = if let [_] = runs {
                let stale = state.table.as_ref().is_some_and(|table| !table.is_fresh());
                match state.lookup(*group, of_run) {
                    0 if stale => blocks(of_run).count(),
                    count => count,
                }
            } else {
                of_run.len() / HASH_BYTES
            };
            spaces.extend(space);
            counts.push(count as u32);
            hashes.extend_from_slice(&of_run[..count * HASH_BYTES]);
        }
        if hashes.is_empty() || hashes.len() > MAX_BLOCKS * HASH_BYTES {
            return 0;
        }
        state.request += 1;
        state.counts.leases_asked += 1;
        let request = state.request;
        state.tickets.insert(request, Ticket::Asked);
        let ask = Message::Lease(wire::Lease { request, spaces, counts, hashes });
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
                None => return Some(Grant::default()),
                Some(Ticket::Granted { grant, .. }) => return Some(grant.clone()),
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
            && !grant.is_nothing()
        {
            let lease = grant.lease.to_vec();
            let _ = self.link.outbox.send(&Message::Release(wire::Release { lease }));
        }
    }

    /// Devices of the other sidecars of the node whose tables are fresh: what they have can be leased here.
    pub fn neighbours(&self) -> Vec<String> {
        let state = self.shared.state();
        let fresh = state.neighbours.iter().filter(|neighbour| neighbour.table.is_fresh());
        fresh.map(|neighbour| neighbour.device.clone()).collect()
    }

    /// The device that our sidecar serves; empty before the first attachment.
    pub fn device(&self) -> String {
        self.shared.state().device.clone()
    }

    /// From now on, nothing that was saved before is found. Only the first `groups` have a namespace in the new epoch:
    /// what others stored never is of it.
    pub fn new_epoch(&self, groups: usize) {
        let mut epoch = [0u8; 16];
        // Without randomness there is no new epoch, and without a namespace nothing is found at all.
        let random = getrandom::fill(&mut epoch).is_ok();
        let mut state = self.shared.state();
        state.close_namespaces();
        let groups = groups.min(state.namespaces.len());
        state.namespaces.truncate(groups);
        state.opened.truncate(groups);
        if random {
            state.epoch = epoch.to_vec();
            state.open_namespaces(&self.link.outbox);
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
            ("neighbours", state.neighbours.len() as u64),
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

/// Whether this sidecar or a neighbour has a block.
fn has(table: &TableReader, neighbours: &[&TableReader], key: IndexKey) -> bool {
    table.get(key) != 0 || neighbours.iter().any(|table| table.get(key) != 0)
}

impl State {
    /// A group's namespace and the table to look it up in, where that can be trusted.
    fn fresh(&mut self, group: usize) -> Option<([u8; 16], &TableReader)> {
        self.counts.lookups += 1;
        let (space, table) = (self.spaces.get(group)?, self.table.as_ref()?);
        if !table.is_fresh() {
            self.counts.stale += 1;
            return None;
        }
        Some((*space, table))
    }

    fn fresh_neighbours(&self) -> Vec<&TableReader> {
        self.neighbours.iter().map(|neighbour| &neighbour.table).filter(|table| table.is_fresh()).collect()
    }

    /// Of each block, whether somebody has it.
    fn whether(&self, space: [u8; 16], table: &TableReader, hashes: &[u8]) -> impl Iterator<Item = bool> {
        let (seed, neighbours) = (self.seed, self.fresh_neighbours());
        let keys = blocks(hashes).map(move |hash| IndexKey::new(seed, &space, hash));
        table.ahead(keys).map(move |key| has(table, &neighbours, key))
    }

    /// The same of a group's blocks, where the table can be trusted.
    fn finds(&mut self, group: usize, hashes: &[u8]) -> Option<impl Iterator<Item = bool>> {
        let space = self.fresh(group)?.0;
        Some(self.whether(space, self.table.as_ref()?, hashes))
    }

    fn lookup(&mut self, group: usize, hashes: &[u8]) -> usize {
        let Some(finds) = self.finds(group, hashes) else { return 0 };
        let present = finds.take_while(|there| *there).count();
        self.counts.blocks_looked_up += (hashes.len() / HASH_BYTES) as u64;
        self.counts.blocks_present += present as u64;
        present
    }

    fn present(&mut self, alive: bool, group: usize, hashes: &[u8]) -> Vec<bool> {
        let found: Vec<bool> = match self.finds(group, hashes).filter(|_| alive) {
            Some(finds) => finds.collect(),
            None => vec![false; hashes.len() / HASH_BYTES],
        };
        self.counts.blocks_looked_up += found.len() as u64;
        self.counts.blocks_present += found.iter().filter(|there| **there).count() as u64;
        found
    }

    fn open_namespaces(&mut self, outbox: &Outbox) {
        self.opening = self.request + 1;
        for namespace in &self.namespaces {
            self.request += 1;
            let (keys, values) = namespace.iter().cloned().unzip();
            let open = Message::OpenNamespace(wire::OpenNamespace {
                request: self.request,
                keys,
                values,
                epoch: self.epoch.clone(),
            });
            let _ = outbox.send(&open);
        }
    }

    fn namespace_opened(&mut self, opened: wire::NamespaceOpened) {
        let group = opened.request.checked_sub(self.opening).filter(|_| self.opening > 0);
        let place = group.and_then(|group| self.opened.get_mut(group as usize));
        if let (Some(place), Ok(id)) = (place, opened.id.try_into()) {
            *place = Some(id);
            self.spaces = self.opened.iter().copied().collect::<Option<_>>().unwrap_or_default();
        }
    }

    fn close_namespaces(&mut self) {
        self.opened.fill(None);
        self.spaces.clear();
        self.opening = 0;
    }

    fn forget_connection(&mut self) {
        self.close_namespaces();
        self.table = None;
        self.neighbours.clear();
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
        state.device.clone_from(&attached.welcome.device);
        state.lease_ms = attached.welcome.lease_ms;
        state.open_namespaces(outbox);
        Ok(())
    }

    fn message(&self, message: Message, mut fds: VecDeque<OwnedFd>, outbox: &Outbox) {
        let mut state = self.state();
        match message {
            Message::NamespaceOpened(opened) => state.namespace_opened(opened),
            Message::Leased(leased) => {
                let lease = leased.lease.try_into().unwrap_or([0; 16]);
                let grant = Grant { lease, blocks: leased.blocks };
                if let Some(ticket) = state.tickets.get_mut(&leased.request) {
                    let nothing = grant.is_nothing();
                    *ticket = Ticket::Granted { grant, renewed: Instant::now() };
                    let counts = &mut state.counts;
                    *(if nothing { &mut counts.leases_empty } else { &mut counts.leases_granted }) += 1;
                } else if !grant.is_nothing() {
                    // Its ticket was released before the grant came.
                    let _ = outbox.send(&Message::Release(wire::Release { lease: grant.lease.to_vec() }));
                }
                drop(state);
                self.answered.notify_all();
            }
            Message::NeighbourTable(table) => {
                // One that cannot be opened is as good as none.
                let opened = fds.pop_front().and_then(|fd| TableReader::open(fd, table.stale_ms).ok());
                let wire::NeighbourTable { neighbour: number, device, .. } = table;
                state.neighbours.retain(|known| known.number != number);
                if let Some(table) = opened.filter(|_| state.neighbours.len() < NEIGHBOURS_MAX) {
                    state.neighbours.push(Neighbour { number, device, table });
                }
            }
            Message::NeighbourGone(gone) => {
                state.neighbours.retain(|neighbour| neighbour.number != gone.neighbour);
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
                && !grant.is_nothing()
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
