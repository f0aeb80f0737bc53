//! The simulated clock, what is to happen when, and messages on their way.

use std::{
    cell::RefCell,
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    rc::Rc,
    sync::Arc,
};

use pillion_core::{Event, LeaseId, Lent, NamespaceId, Registration, Role};
use pillion_shm::{
    presence::{IndexKey, TableReader, TableWriter},
    ring::RingReader,
    words::JobWords,
};

use crate::{
    dice::{Dice, mix},
    plan::{Fault, MS, Plan},
};

/// A presence table that was not stamped for so long counts as empty.
const STALE_NS: u64 = 100 * MS;

/// A presence table: the shipped one, whose stamp is of the simulated clock. It outlives its sidecar.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) writer: TableWriter,
    reader: TableReader,
    pub(crate) stamp_ns: u64,
}

/// One that several processes have mapped.
pub(crate) type SharedTable = Rc<RefCell<Table>>;
/// A sidecar's tables, by tenant.
pub(crate) type Tables = Rc<RefCell<BTreeMap<Arc<str>, SharedTable>>>;

impl Table {
    pub(crate) fn new(slots: u64, now: u64) -> SharedTable {
        let writer = TableWriter::create(slots).expect("a memfd");
        let fd = writer.memfd().fd().try_clone_to_owned().expect("a descriptor");
        let reader = TableReader::open(fd, 0).expect("our own table");
        Rc::new(RefCell::new(Self { writer, reader, stamp_ns: now }))
    }

    pub(crate) fn is_fresh(&self, now: u64) -> bool {
        self.stamp_ns > 0 && now.saturating_sub(self.stamp_ns) <= STALE_NS
    }

    pub(crate) fn has(&self, key: IndexKey) -> bool {
        self.reader.get(key) != 0
    }
}

/// Whose end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum End {
    /// An engine's: its number and life, the rank, and which of its two processes.
    Engine { engine: usize, life: u64, rank: usize, half: Half },
    /// A sidecar that borrows: which, its boot, and the number that it gave the neighbour.
    Sidecar { sidecar: usize, boot: u64, number: u32 },
}

/// An engine's processes of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Half {
    Scheduler,
    Worker,
}

/// Where a connection leads: a boot of a sidecar. In both directions nothing overtakes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Conn {
    pub(crate) id: u64,
    pub(crate) sidecar: usize,
    pub(crate) boot: u64,
}

/// What a client says.
#[derive(Debug, Clone)]
pub(crate) enum Up {
    Hello {
        role: Role,
        from: End,
        engine: Arc<str>,
        tenant: usize,
    },
    /// What the core is told as it is; deadlines count from the arrival.
    Core(Event),
    Register(Registration),
    Unregister(u64),
    TenantServed(usize),
    Ping(u64),
    /// The end of the stream.
    End,
}

/// The shared memory of a connection.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) words: Option<Arc<JobWords>>,
    pub(crate) ring: Option<RingReader>,
    pub(crate) table: Option<SharedTable>,
    /// Of the other sidecars, as ours knows them.
    pub(crate) neighbours: Rc<RefCell<BTreeMap<u32, Tables>>>,
}

/// What a sidecar says.
#[derive(Debug)]
pub(crate) enum Down {
    Welcome(Box<Shared>),
    Opened {
        request: u64,
        id: NamespaceId,
    },
    Leased {
        request: u64,
        lease: LeaseId,
        blocks: Vec<u32>,
    },
    Registered,
    Unregistered(u64),
    Pong(u64),
    Lent {
        request: u64,
        lease: LeaseId,
        records: Vec<Option<Lent>>,
    },
    /// The end of the stream. In order: the sidecar said that nothing of it touches our memory any more.
    End {
        in_order: bool,
    },
}

/// What is to happen.
#[derive(Debug)]
pub(crate) enum Next {
    Up(Conn, Up),
    Down(End, u64, Down),
    /// A sidecar's clock.
    Tick {
        sidecar: usize,
        boot: u64,
    },
    /// The next half of a block.
    Copy {
        sidecar: usize,
        boot: u64,
        copy: u64,
    },
    /// The SSD's threads do something.
    Disk {
        sidecar: usize,
        boot: u64,
    },
    /// They tell the core.
    Told {
        sidecar: usize,
        boot: u64,
        event: Box<Event>,
    },
    /// Recovery has ended.
    Recovered {
        sidecar: usize,
        boot: u64,
    },
    Start {
        sidecar: usize,
    },
    Step {
        engine: usize,
        life: u64,
    },
    Beat {
        engine: usize,
        life: u64,
    },
    /// A process goes on after it was stopped: 0 to n are sidecars, then engines.
    Resume {
        process: usize,
    },
    Trouble,
}

#[derive(Debug)]
struct Due {
    at: u64,
    order: u64,
    next: Next,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// What was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which promise.
    pub invariant: &'static str,
    /// How.
    pub text: String,
}

/// See the module; and what everybody writes to: counts, the trace, the first violation.
#[derive(Debug)]
pub(crate) struct Net {
    pub(crate) now: u64,
    queue: BinaryHeap<Reverse<Due>>,
    order: u64,
    delays: Dice,
    net_ns: u64,
    slow_until: u64,
    /// Last arrival per connection and direction.
    last: BTreeMap<(u64, bool), u64>,
    conns: u64,
    /// Boots of the sidecars that run.
    pub(crate) boots: Vec<Option<u64>>,
    pub(crate) events: u64,
    pub(crate) faults: Vec<u64>,
    pub(crate) seen: BTreeMap<&'static str, u64>,
    hash: u64,
    trace: Option<Vec<(u64, String)>>,
    pub(crate) violation: Option<Violation>,
}

impl Net {
    pub(crate) fn new(dice: &Dice, plan: &Plan, traced: bool) -> Self {
        Self {
            // Not 0: a stamp of 0 is a retired table.
            now: MS,
            queue: BinaryHeap::new(),
            order: 0,
            delays: dice.fork(2),
            net_ns: plan.net_ns,
            slow_until: 0,
            last: BTreeMap::new(),
            conns: 0,
            boots: vec![None; plan.sidecars],
            events: 0,
            faults: vec![0; Fault::ALL.len()],
            seen: BTreeMap::new(),
            hash: 0,
            trace: traced.then(Vec::new),
            violation: None,
        }
    }

    pub(crate) fn after(&mut self, ns: u64, next: Next) {
        self.at(self.now + ns, next);
    }

    pub(crate) fn at(&mut self, at: u64, next: Next) {
        self.order += 1;
        self.queue.push(Reverse(Due { at, order: self.order, next }));
    }

    /// Between a tenth of it and all of it.
    pub(crate) fn jitter(&mut self, ns: u64) -> u64 {
        self.delays.within(ns / 10, ns)
    }

    /// The next thing, if it is due until then.
    pub(crate) fn pop(&mut self, until: u64) -> Option<Next> {
        if self.queue.peek().is_none_or(|due| due.0.at > until) {
            self.now = self.now.max(until);
            return None;
        }
        let Reverse(due) = self.queue.pop()?;
        self.now = due.at;
        self.events += 1;
        self.note(due.order);
        Some(due.next)
    }

    pub(crate) fn is_up(&self, sidecar: usize, boot: u64) -> bool {
        self.boots[sidecar] == Some(boot)
    }

    pub(crate) fn connect(&mut self, sidecar: usize, boot: u64) -> Conn {
        self.conns += 1;
        Conn { id: self.conns, sidecar, boot }
    }

    pub(crate) fn slow_down(&mut self, ns: u64) {
        self.slow_until = self.now + ns;
    }

    fn arrival(&mut self, conn: u64, up: bool) -> u64 {
        let mut delay = self.jitter(self.net_ns);
        if self.now < self.slow_until {
            delay += self.delays.within(MS, 30 * MS);
        }
        let at = self.now + delay;
        let last = self.last.entry((conn, up)).or_default();
        *last = at.max(*last);
        *last
    }

    pub(crate) fn up(&mut self, conn: Conn, message: Up) {
        let at = self.arrival(conn.id, true);
        self.at(at, Next::Up(conn, message));
    }

    pub(crate) fn down(&mut self, to: End, conn: u64, message: Down) {
        let at = self.arrival(conn, false);
        self.at(at, Next::Down(to, conn, message));
    }

    /// Counts something that happened: coverage.
    pub(crate) fn saw(&mut self, what: &'static str, times: u64) {
        *self.seen.entry(what).or_default() += times;
    }

    pub(crate) fn injected(&mut self, fault: Fault) {
        self.faults[fault as usize] += 1;
        self.say(|| format!("FAULT {}", fault.name()));
        self.note(fault as u64);
    }

    /// A part of the trace's hash.
    pub(crate) fn note(&mut self, what: u64) {
        self.hash = mix(self.hash ^ mix(what ^ self.now.rotate_left(20)));
    }

    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    /// A line of the trace, where one is wanted.
    pub(crate) fn say(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push((self.now, line()));
        }
    }

    pub(crate) fn take_trace(&mut self) -> Vec<(u64, String)> {
        self.trace.take().unwrap_or_default()
    }

    /// Something is not as promised. The first one counts.
    pub(crate) fn broken(&mut self, invariant: &'static str, text: impl FnOnce() -> String) {
        if self.violation.is_none() {
            let text = text();
            self.say(|| format!("BROKEN {invariant}: {text}"));
            self.violation = Some(Violation { invariant, text });
        }
    }
}
