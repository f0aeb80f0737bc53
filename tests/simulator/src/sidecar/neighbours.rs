//! Sidecars that borrow from each other, as `sidecar/daemon`'s `neighbours.rs` has it.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    sync::Arc,
};

use pillion_core::{Event, LeaseId, Lent, NeighbourId, Question, Role, SessionId};

use crate::{
    net::{Conn, Down, End, Tables, Up},
    oracle,
    plan::{Fault, MS},
    pool::Pool,
    world::World,
};

/// How often others are looked for.
const LOOK_NS: u64 = 60 * MS;
/// How long an answer may take before a neighbour is given up.
const ANSWER_NS: u64 = 400 * MS;

/// One that lends to us.
#[derive(Debug)]
pub(super) struct Neighbour {
    pub(super) conn: Conn,
    pub(super) pool: Rc<Pool>,
    tables: Tables,
    /// Keys of requests that are not answered yet, and since when.
    asked: BTreeMap<u64, (u64, Vec<[u8; 32]>)>,
    requests: u64,
}

impl World {
    /// Connects to those that it is not connected to, and gives up those that do not answer.
    pub(super) fn look_around(&mut self, sidecar: usize) {
        let (now, running) = (self.net.now, self.plan.neighbours);
        let Some(boot) = self.boot(sidecar).filter(|boot| running && boot.next_look <= now) else { return };
        boot.next_look = now + LOOK_NS;
        let is_mute = |neighbour: &Neighbour| {
            neighbour.asked.values().next().is_some_and(|(since, _)| now - since > ANSWER_NS)
        };
        let mute: Vec<u32> =
            boot.neighbours.iter().filter(|(_, one)| is_mute(one)).map(|(number, _)| *number).collect();
        let known: BTreeSet<usize> = boot.neighbours.values().map(|one| one.conn.sidecar).collect();
        let draining = boot.draining;
        mute.into_iter().for_each(|number| self.part(sidecar, number));
        for other in (0..self.sidecars.len()).filter(|other| *other != sidecar && !known.contains(other)) {
            let is_open = self.sidecars[other].as_ref().is_some_and(|boot| !boot.draining);
            if is_open && !draining && !self.is_paused(other) {
                self.meet(sidecar, other);
            }
        }
    }

    fn meet(&mut self, sidecar: usize, other: usize) {
        let Some((boot, pool, tables)) = self.sidecars[other]
            .as_ref()
            .map(|boot| (boot.id, Rc::clone(&boot.pool), Rc::clone(&boot.tables)))
        else {
            return;
        };
        let conn = self.net.connect(other, boot);
        let Some(own) = self.boot(sidecar) else { return };
        own.next_neighbour += 1;
        let (number, own_boot) = (own.next_neighbour, own.id);
        own.their_tables.borrow_mut().insert(number, Rc::clone(&tables));
        let served: Vec<usize> = own.served.iter().copied().collect();
        let new = Neighbour { conn, pool, tables, asked: BTreeMap::new(), requests: 0 };
        own.neighbours.insert(number, new);
        let end = End::Sidecar { sidecar, boot: own_boot, number };
        let engine: Arc<str> = format!("sidecar {sidecar}").into();
        self.net.up(conn, Up::Hello { role: Role::Neighbour, from: end, engine, tenant: 0 });
        served.into_iter().for_each(|tenant| self.net.up(conn, Up::TenantServed(tenant)));
        let (neighbour, lease_ns) = (NeighbourId(number), self.plan.lease_ns);
        self.apply(sidecar, Event::NeighbourCame { neighbour, lease_ns });
    }

    /// The connection by which a sidecar borrows from another ends.
    pub(crate) fn part(&mut self, sidecar: usize, number: u32) {
        let Some(boot) = self.boot(sidecar) else { return };
        let Some(gone) = boot.neighbours.remove(&number) else { return };
        boot.their_tables.borrow_mut().remove(&number);
        self.net.up(gone.conn, Up::End);
        self.apply(sidecar, Event::NeighbourWent { neighbour: NeighbourId(number) });
        let keys: Vec<[u8; 32]> = gone.asked.into_values().flat_map(|(_, keys)| keys).collect();
        if !keys.is_empty() {
            self.apply(sidecar, Event::NeighbourAnswered { keys, lent: None });
        }
    }

    /// Those who borrow from a boot that ended learn of it.
    pub(super) fn part_all(&mut self, gone: usize, gone_boot: u64) {
        for sidecar in 0..self.sidecars.len() {
            let Some(boot) = self.sidecars[sidecar].as_ref() else { continue };
            let of_it = |one: &&Neighbour| (one.conn.sidecar, one.conn.boot) == (gone, gone_boot);
            let numbers = boot.neighbours.iter().filter(|(_, one)| of_it(one));
            let ends: Vec<_> = numbers.map(|(number, one)| (*number, one.conn.id)).collect();
            for (number, conn) in ends {
                let end = End::Sidecar { sidecar, boot: boot.id, number };
                self.net.down(end, conn, Down::End { in_order: false });
            }
        }
    }

    /// Some connection between two sidecars breaks.
    pub(crate) fn part_some(&mut self, sidecar: usize) {
        let numbers: Vec<u32> =
            self.boot(sidecar).map(|boot| boot.neighbours.keys().copied().collect()).unwrap_or_default();
        if !numbers.is_empty() {
            let number = self.trouble_dice.pick(&numbers);
            self.net.injected(Fault::NeighboursPart);
            self.part(sidecar, number);
        }
    }

    /// Engines of a tenant are here: others may lend us what they have of it.
    pub(super) fn say_served(&mut self, sidecar: usize, tenant: usize) {
        let Some(boot) = self.sidecars[sidecar].as_mut() else { return };
        if boot.served.insert(tenant) {
            for neighbour in boot.neighbours.values() {
                self.net.up(neighbour.conn, Up::TenantServed(tenant));
            }
        }
    }

    pub(super) fn tenant_served(&mut self, sidecar: usize, tenant: usize) {
        let (tenant, now) = (oracle::tenant(tenant), self.net.now);
        if self.make_table(sidecar, &tenant.name, now) {
            self.apply(sidecar, Event::TenantServed { tenant });
        }
    }

    /// Asks whoever has them. What nobody has is answered at once.
    pub(super) fn ask_neighbours(&mut self, sidecar: usize, questions: Vec<Question>) -> Option<Event> {
        let now = self.net.now;
        let boot = self.sidecars[sidecar].as_mut()?;
        let (mut nobody, mut ended) = (Vec::new(), None);
        let mut asked: BTreeMap<u32, Vec<[u8; 32]>> = BTreeMap::new();
        for Question { tenant, index, key, run } in questions {
            let has = |neighbour: &Neighbour| {
                let tables = neighbour.tables.borrow();
                let table = tables.get(&tenant).map(|table| table.borrow());
                table.is_some_and(|table| table.is_fresh(now) && table.has(index))
            };
            // What comes behind a gap is of no use.
            let found = boot.neighbours.iter().find(|(_, one)| ended != Some(run) && has(one));
            match found {
                Some((number, _)) => asked.entry(*number).or_default().push(key),
                None => {
                    ended = Some(run);
                    nobody.push(key);
                }
            }
        }
        for (number, keys) in asked {
            let Some(neighbour) = boot.neighbours.get_mut(&number) else { continue };
            neighbour.requests += 1;
            let request = neighbour.requests;
            neighbour.asked.insert(request, (now, keys.clone()));
            let session = SessionId(neighbour.conn.id);
            self.net.up(neighbour.conn, Up::Core(Event::Borrow { session, request, keys }));
        }
        (!nobody.is_empty()).then_some(Event::NeighbourAnswered { keys: nobody, lent: None })
    }

    pub(super) fn tell_neighbour(
        &mut self,
        sidecar: usize,
        neighbour: NeighbourId,
        event: impl FnOnce(SessionId) -> Event,
    ) {
        let conn = self.boot(sidecar).and_then(|boot| boot.neighbours.get(&neighbour.0)).map(|one| one.conn);
        if let Some(conn) = conn {
            self.net.up(conn, Up::Core(event(SessionId(conn.id))));
        }
    }

    /// A neighbour says something.
    pub(crate) fn neighbour_says(
        &mut self,
        sidecar: usize,
        boot: u64,
        number: u32,
        conn: u64,
        message: Down,
    ) {
        let Some(own) = self.boot(sidecar).filter(|own| own.id == boot) else { return };
        let Some(neighbour) = own.neighbours.get_mut(&number).filter(|one| one.conn.id == conn) else {
            return;
        };
        match message {
            Down::Lent { request, lease, records } => {
                let Some((_, keys)) = neighbour.asked.remove(&request) else { return };
                self.lent(sidecar, number, keys, lease, records);
            }
            Down::End { .. } => self.part(sidecar, number),
            _ => {}
        }
    }

    fn lent(
        &mut self,
        sidecar: usize,
        number: u32,
        keys: Vec<[u8; 32]>,
        lease: LeaseId,
        records: Vec<Option<Lent>>,
    ) {
        self.net.saw("blocks lent", records.iter().flatten().count() as u64);
        let lent = Some((NeighbourId(number), lease, records));
        self.apply(sidecar, Event::NeighbourAnswered { keys, lent });
    }
}
