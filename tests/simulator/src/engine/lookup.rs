//! A scheduler's half of one rank, as `pillion-client`'s `scheduler.rs` is: lookups, leases, namespaces.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use pillion_core::{Event, LeaseId, LeaseRun, NamespaceId, SessionId};
use pillion_shm::presence::IndexKey;

use super::worker::Link;
use crate::{
    net::{Down, Net, SharedTable, Tables, Up},
    oracle::{self, Hash, Oracle, Space},
    plan::{MS, Plan, Sabotage},
};

#[derive(Debug, Clone)]
pub(crate) struct Grant {
    pub(crate) lease: LeaseId,
    pub(crate) blocks: Vec<u32>,
}

impl Grant {
    pub(crate) fn is_nothing(&self) -> bool {
        self.blocks.iter().all(|blocks| *blocks == 0)
    }
}

#[derive(Debug)]
enum Ticket {
    Asked,
    Granted { grant: Grant, renewed: u64 },
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Lookup {
    pub(crate) link: Link,
    /// One per group, in the current epoch.
    spaces: Vec<Space>,
    opened: Vec<Option<NamespaceId>>,
    opening: u64,
    request: u64,
    seed: u64,
    table: Option<SharedTable>,
    neighbours: Rc<RefCell<BTreeMap<u32, Tables>>>,
    tickets: BTreeMap<u64, Ticket>,
    lease_ns: u64,
}

impl Lookup {
    pub(crate) fn new(spaces: Vec<Space>, plan: &Plan) -> Self {
        let seed = oracle::tenant(spaces[0].tenant).key.index_seed();
        let opened = vec![None; spaces.len()];
        Self { spaces, opened, seed, lease_ns: plan.lease_ns, ..Self::default() }
    }

    /// The ids of all groups, once all are open.
    pub(crate) fn ids(&self) -> Option<Vec<NamespaceId>> {
        self.opened.iter().copied().collect()
    }

    /// A lease that somebody has: for who asks for what is not his.
    pub(crate) fn any_lease(&self) -> Option<LeaseId> {
        let granted = |ticket: &Ticket| match ticket {
            Ticket::Granted { grant, .. } if !grant.is_nothing() => Some(grant.lease),
            _ => None,
        };
        self.tickets.values().find_map(granted)
    }

    fn has(&self, group: usize, hash: &Hash, now: u64) -> bool {
        let (Some(id), Some(table)) = (self.opened[group], &self.table) else { return false };
        let key = IndexKey::new(self.seed, &id.0, hash);
        if table.borrow().has(key) {
            return true;
        }
        let Some(space) = self.spaces.first() else { return false };
        let name = oracle::tenant(space.tenant).name;
        let neighbours = self.neighbours.borrow();
        let theirs = |tables: &Tables| {
            let tables = tables.borrow();
            tables.get(&name).is_some_and(|table| table.borrow().is_fresh(now) && table.borrow().has(key))
        };
        neighbours.values().any(theirs)
    }

    fn is_stale(&self, now: u64) -> bool {
        self.table.as_ref().is_some_and(|table| !table.borrow().is_fresh(now))
    }

    /// Which of a group's blocks are to be saved: those that the table lacks, or all where it cannot be trusted.
    pub(crate) fn lacks(&self, group: usize, hash: &Hash, now: u64) -> bool {
        self.is_stale(now) || !self.has(group, hash, now)
    }

    /// Whether there is anybody to save to.
    pub(crate) fn ready(&self) -> bool {
        self.link.alive && self.table.is_some() && self.ids().is_some()
    }

    /// Asks for a lease over the longest prefix that the tables promise in every group: a ticket, or 0.
    pub(crate) fn lease(&mut self, net: &mut Net, hashes: &[Hash]) -> u64 {
        let (Some(conn), Some(ids)) = (self.link.to().filter(|_| self.link.alive), self.ids()) else {
            return 0;
        };
        let in_all = |hash: &&Hash| (0..ids.len()).all(|group| self.has(group, hash, net.now));
        let stale = self.is_stale(net.now);
        let mut count = if stale { 0 } else { hashes.iter().take_while(in_all).count() };
        if stale {
            // So long as it answers heartbeats it is asked anyway.
            count = hashes.len();
        }
        if count == 0 {
            return 0;
        }
        self.request += 1;
        let request = self.request;
        self.tickets.insert(request, Ticket::Asked);
        let runs = ids.iter().map(|space| LeaseRun { space: *space, count: count as u32 }).collect();
        let hashes = ids.iter().flat_map(|_| &hashes[..count]).copied().collect();
        net.up(conn, Up::Core(Event::Lease { session: SessionId(conn.id), request, runs, hashes }));
        request
    }

    /// The answer; none yet: `None`. A ticket that was lost is answered with nothing.
    pub(crate) fn poll(&self, ticket: u64) -> Option<Option<Grant>> {
        match self.tickets.get(&ticket) {
            None => Some(None),
            Some(Ticket::Asked) => None,
            Some(Ticket::Granted { grant, .. }) => Some(Some(grant.clone())),
        }
    }

    pub(crate) fn release(&mut self, net: &mut Net, ticket: u64) {
        if let Some(Ticket::Granted { grant, .. }) = self.tickets.remove(&ticket)
            && !grant.is_nothing()
        {
            self.say_release(net, grant.lease);
        }
    }

    fn say_release(&self, net: &mut Net, lease: LeaseId) {
        if let Some(conn) = self.link.to() {
            net.up(conn, Up::Core(Event::Release { session: SessionId(conn.id), lease }));
        }
    }

    pub(crate) fn new_epoch(&mut self, net: &mut Net, epoch: u64, sabotage: Option<Sabotage>) {
        let kept = self.spaces[0].epoch;
        self.spaces.iter_mut().for_each(|space| space.epoch = epoch);
        self.opened.fill(None);
        let named = if sabotage == Some(Sabotage::EpochKept) { kept } else { epoch };
        self.open(net, named);
    }

    fn open(&mut self, net: &mut Net, epoch: u64) {
        let Some(conn) = self.link.to() else { return };
        self.opening = self.request + 1;
        for space in &self.spaces {
            self.request += 1;
            // The namespace does not depend on a record's length.
            let namespace = oracle::group(space, &crate::plan::GroupPlan { bytes: 0 }, 0).namespace;
            net.up(
                conn,
                Up::Core(Event::OpenNamespace {
                    session: SessionId(conn.id),
                    request: self.request,
                    namespace,
                    epoch: oracle::epoch_bytes(epoch),
                }),
            );
        }
    }

    // ---- the connection

    pub(crate) fn heard(&mut self, net: &mut Net, oracle: &mut Oracle, message: Down) {
        match message {
            Down::Welcome(shared) => {
                self.forget();
                self.link.welcomed();
                (self.table, self.neighbours) = (shared.table, shared.neighbours);
                self.open(net, self.spaces[0].epoch);
            }
            Down::Opened { request, id } => {
                let group = request.checked_sub(self.opening).filter(|_| self.opening > 0);
                if let Some(group) =
                    group.map(|group| group as usize).filter(|group| *group < self.opened.len())
                {
                    self.opened[group] = Some(id);
                    oracle.opened(id, self.spaces[group]);
                }
            }
            Down::Leased { request, lease, blocks } => {
                let grant = Grant { lease, blocks };
                if let Some(ticket) = self.tickets.get_mut(&request) {
                    net.saw("leases granted", u64::from(!grant.is_nothing()));
                    *ticket = Ticket::Granted { grant, renewed: net.now };
                } else if !grant.is_nothing() {
                    self.say_release(net, grant.lease);
                }
            }
            Down::Pong(sequence) => self.link.answered(sequence),
            Down::End { .. } => {
                self.forget();
                self.link = Link::default();
            }
            _ => {}
        }
    }

    fn forget(&mut self) {
        self.opened.fill(None);
        self.opening = 0;
        self.table = None;
        self.neighbours = Rc::default();
        self.tickets.clear();
    }

    pub(crate) fn beat(&mut self, net: &mut Net) {
        self.link.beat(net);
        let Some(conn) = self.link.to() else { return };
        let due = (self.lease_ns / 3).max(MS);
        for ticket in self.tickets.values_mut() {
            if let Ticket::Granted { grant, renewed } = ticket
                && !grant.is_nothing()
                && net.now - *renewed > due
            {
                *renewed = net.now;
                net.up(conn, Up::Core(Event::Renew { session: SessionId(conn.id), lease: grant.lease }));
            }
        }
    }
}
