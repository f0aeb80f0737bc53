//! The other sidecars of this node and user: found by their sockets, borrowed from over one connection each.
//!
//! ```text
//! ours ── Hello(Neighbour) ──► theirs          ours ◄── Welcome + pool (read-only)
//!      ── TenantServed ──►                         for each tenant with engines here, also later
//!      ◄── NeighbourTable + presence table ──       one per tenant, also later
//!      ── Borrow(keys) ──►  ◄── Borrowed(places, checksums) ──  ── Renew, Release, Damaged ──►
//! ```
//!
//! The same happens the other way round over a connection of theirs. A neighbour that stops answering is told by its
//! tables, which go stale; one that ends, by its connection.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap, HashSet},
    os::fd::OwnedFd,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use pillion_core::{LeaseId, Lent, NeighbourId, Question};
use pillion_cuda::ForeignPool;
use pillion_protocol::{MAJOR, MINOR, Message, wire};
use pillion_shm::{pidfd::Process, presence::TableReader};
use tokio::{
    net::UnixStream,
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{
    channel::{Channel, Outgoing, Read},
    copier::Pools,
    device,
    session::Shared,
};

/// Neighbours at a time (I8).
const NEIGHBOURS_MAX: usize = 16;
/// Tenants of one neighbour whose tables are looked at (I8).
const TABLES_MAX: usize = 32;
/// How often new ones are looked for, and a process is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// How long one may take to let us in.
const ATTACH_MAX: Duration = Duration::from_secs(2);
/// How long an answer may take before a neighbour is given up: what it holds for us ends with the connection.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// How long one that could not be attached to is left alone, at most.
const ALONE_MAX: Duration = Duration::from_secs(30);
/// Blocks of one request: they are given back together.
const ASKED_AT_ONCE: usize = 256;
/// The minor version of the protocol from which on neighbours hear of tenants.
const MINOR_TENANT_SERVED: u16 = 1;
/// An offset that means: not lent.
const NOT_LENT: u64 = u64::MAX;

/// A neighbour's presence table for one tenant.
#[derive(Debug)]
struct Table {
    reader: TableReader,
    fd: OwnedFd,
    stale_ms: u32,
}

#[derive(Debug)]
struct Neighbour {
    device: String,
    out: UnboundedSender<Outgoing>,
    pool: Arc<ForeignPool>,
    tables: HashMap<Arc<str>, Table>,
    /// Keys of requests that are not answered yet.
    asked: BTreeMap<u64, (Instant, Vec<[u8; 32]>)>,
    requests: u64,
}

/// What is borrowed for one answer, or that nobody lends: what the core is told of some keys.
#[derive(Debug)]
pub struct Answer {
    /// Those.
    pub keys: Vec<[u8; 32]>,
    /// Who lends, under which of its leases, and what.
    pub lent: Option<(NeighbourId, LeaseId, Vec<Option<Lent>>)>,
}

/// A neighbour, for status reports.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct View {
    pub device: String,
    pub pool_bytes: u64,
    pub tenants: usize,
}

/// Those that lend to us.
#[derive(Debug, Default)]
pub struct Neighbours {
    known: BTreeMap<u32, Neighbour>,
    last: u32,
}

impl Neighbours {
    /// Takes in a new one.
    pub fn came(&mut self, device: String, pool: ForeignPool, out: UnboundedSender<Outgoing>) -> NeighbourId {
        self.last += 1;
        let pool = Arc::new(pool);
        let new =
            Neighbour { device, out, pool, tables: HashMap::new(), asked: BTreeMap::new(), requests: 0 };
        self.known.insert(self.last, new);
        NeighbourId(self.last)
    }

    /// It is gone: what was asked of it and will not be answered.
    pub fn went(&mut self, id: NeighbourId) -> Option<Answer> {
        let gone = self.known.remove(&id.0)?;
        let keys = gone.asked.into_values().flat_map(|(_, keys)| keys).collect();
        Some(Answer { keys, lent: None })
    }

    /// Keeps a neighbour's table.
    fn table(&mut self, id: NeighbourId, tenant: Arc<str>, stale_ms: u32, fd: OwnedFd) -> Result<(), String> {
        let neighbour = self.known.get_mut(&id.0).ok_or("expected a neighbour that is known")?;
        if neighbour.tables.len() >= TABLES_MAX && !neighbour.tables.contains_key(&tenant) {
            return Ok(());
        }
        let copy = fd.try_clone().map_err(|error| error.to_string())?;
        let reader = TableReader::open(copy, stale_ms).map_err(|error| error.to_string())?;
        neighbour.tables.insert(tenant, Table { reader, fd, stale_ms });
        Ok(())
    }

    /// A neighbour's table as our clients of that tenant get it.
    pub fn introduction(&self, id: NeighbourId, tenant: &Arc<str>) -> Option<Outgoing> {
        let neighbour = self.known.get(&id.0)?;
        let table = neighbour.tables.get(tenant)?;
        let message = Message::NeighbourTable(wire::NeighbourTable {
            neighbour: id.0.into(),
            tenant: tenant.to_string(),
            stale_ms: table.stale_ms,
            device: neighbour.device.clone(),
        });
        Some(Outgoing::new(&message, vec![table.fd.try_clone().ok()?]))
    }

    /// All that lend.
    pub fn ids(&self) -> impl Iterator<Item = NeighbourId> + '_ {
        self.known.keys().copied().map(NeighbourId)
    }

    /// Asks whoever has them. What nobody has is answered at once.
    pub fn ask(&mut self, questions: Vec<Question>) -> Answer {
        let mut nobody = Vec::new();
        let mut asked: BTreeMap<u32, Vec<[u8; 32]>> = BTreeMap::new();
        let (mut tables, mut of_tenant, mut ended) = (Vec::new(), None, None);
        for Question { tenant, index, key, run } in questions {
            if of_tenant.as_ref() != Some(&tenant) {
                let fresh = |neighbour: &'_ Neighbour| {
                    neighbour.tables.get(&tenant).is_some_and(|table| table.reader.is_fresh())
                };
                tables = self.known.iter().filter(|(_, neighbour)| fresh(neighbour)).collect();
                of_tenant = Some(Arc::clone(&tenant));
            }
            let has = |neighbour: &Neighbour| {
                neighbour.tables.get(&tenant).is_some_and(|table| table.reader.get(index) != 0)
            };
            // What comes behind a gap is of no use.
            let found = tables.iter().find(|(_, neighbour)| ended != Some(run) && has(neighbour));
            match found {
                Some((id, _)) => asked.entry(**id).or_default().push(key),
                None => {
                    ended = Some(run);
                    nobody.push(key);
                }
            }
        }
        for (id, keys) in asked {
            let Some(neighbour) = self.known.get_mut(&id) else { continue };
            for part in keys.chunks(ASKED_AT_ONCE) {
                neighbour.requests += 1;
                let request = neighbour.requests;
                let ask = wire::Borrow { request, keys: part.as_flattened().to_vec() };
                neighbour.asked.insert(request, (Instant::now(), part.to_vec()));
                neighbour.send(&Message::Borrow(ask));
            }
        }
        Answer { keys: nobody, lent: None }
    }

    /// What a neighbour said to a request of ours.
    fn answered(&mut self, id: NeighbourId, said: wire::Borrowed) -> Result<Option<Answer>, String> {
        let neighbour = self.known.get_mut(&id.0).ok_or("expected a neighbour that is known")?;
        // An answer that makes no sense leaves it asked: it is answered when the connection ends.
        let Some((_, keys)) = neighbour.asked.get(&said.request) else { return Ok(None) };
        let lease = LeaseId::from_slice(&said.lease).ok_or("expected a lease id of 16 bytes")?;
        let formats: Vec<Arc<str>> = said.formats.iter().map(|format| Arc::from(format.as_str())).collect();
        let columns = [said.offsets.len(), said.bytes.len(), said.checksums.len(), said.format_of.len()];
        if columns.iter().any(|length| *length != keys.len()) {
            // What it holds for us it will give up with the connection.
            return Err(format!(
                "expected an answer about {} records, got columns of {columns:?}",
                keys.len()
            ));
        }
        let record = |index: usize| {
            if said.offsets[index] == NOT_LENT {
                return None;
            }
            Some(Lent {
                offset: said.offsets[index],
                bytes: said.bytes[index],
                checksum: said.checksums[index],
                format: Arc::clone(formats.get(usize::from(said.format_of[index]))?),
            })
        };
        let records = (0..keys.len()).map(record).collect();
        let keys = neighbour.asked.remove(&said.request).map(|(_, keys)| keys).unwrap_or_default();
        Ok(Some(Answer { keys, lent: Some((id, lease, records)) }))
    }

    /// Whether a neighbour leaves a question of ours without an answer.
    fn is_mute(&self, id: NeighbourId) -> bool {
        let oldest = self.known.get(&id.0).and_then(|neighbour| neighbour.asked.values().next());
        oldest.is_some_and(|(asked, _)| asked.elapsed() > ANSWER_MAX)
    }

    /// Keeps a lease.
    pub fn renew(&self, id: NeighbourId, lease: LeaseId) {
        self.send(id, &Message::Renew(wire::Renew { lease: lease.0.to_vec() }));
    }

    /// Ends a lease.
    pub fn give_back(&self, id: NeighbourId, lease: LeaseId) {
        self.send(id, &Message::Release(wire::Release { lease: lease.0.to_vec() }));
    }

    /// Says to all that engines of a tenant are here.
    pub fn say_served(&self, tenant: &str) {
        self.ids().for_each(|id| self.say_served_to(id, tenant));
    }

    /// The same to one.
    pub fn say_served_to(&self, id: NeighbourId, tenant: &str) {
        self.send(id, &Message::TenantServed(wire::TenantServed { tenant: tenant.to_owned() }));
    }

    /// Says that a record is damaged.
    pub fn say_damaged(&self, id: NeighbourId, key: [u8; 32], offset: u64) {
        self.send(id, &Message::Damaged(wire::Damaged { key: key.to_vec(), offset }));
    }

    fn send(&self, id: NeighbourId, message: &Message) {
        if let Some(neighbour) = self.known.get(&id.0) {
            neighbour.send(message);
        }
    }

    /// The pools that a copy needs; one that is missing has gone.
    pub fn pools(&self, numbers: impl Iterator<Item = u32>) -> Pools {
        let pool = |number| Some((number, Arc::clone(&self.known.get(&number)?.pool)));
        numbers.collect::<HashSet<u32>>().into_iter().filter_map(pool).collect()
    }

    /// For status reports.
    pub fn views(&self) -> Vec<View> {
        let view = |neighbour: &Neighbour| View {
            device: neighbour.device.clone(),
            pool_bytes: neighbour.pool.bytes(),
            tenants: neighbour.tables.len(),
        };
        self.known.values().map(view).collect()
    }
}

impl Neighbour {
    fn send(&self, message: &Message) {
        // A closed channel means that the connection is ending already.
        let _ = self.out.send(Outgoing::new(message, Vec::new()));
    }
}

/// The answer to a neighbour that borrows, as the wire has it.
pub fn borrowed(request: u64, lease: LeaseId, records: &[Option<Lent>]) -> wire::Borrowed {
    let mut formats: Vec<String> = Vec::new();
    let mut format_of = |record: &Option<Lent>| {
        let Some(Lent { format, .. }) = record else { return 0 };
        let known = formats.iter().position(|known| **known == **format);
        known.unwrap_or_else(|| {
            formats.push(format.to_string());
            formats.len() - 1
        }) as u16
    };
    let format_of = records.iter().map(&mut format_of).collect();
    let column = |of: fn(&Lent) -> u64, none: u64| {
        records.iter().map(|record| record.as_ref().map_or(none, of)).collect()
    };
    wire::Borrowed {
        request,
        lease: lease.0.to_vec(),
        offsets: column(|lent| lent.offset, NOT_LENT),
        bytes: column(|lent| lent.bytes, 0),
        checksums: column(|lent| lent.checksum, 0),
        format_of,
        formats,
    }
}

/// Looks for neighbours as long as the process lives.
pub async fn look_around(shared: Rc<Shared>, runtime_dir: PathBuf) {
    let connected: Rc<RefCell<HashSet<String>>> = Rc::default();
    // Those that did not let us in: until when they are left alone, and how long that was.
    let alone: Rc<RefCell<HashMap<String, (Instant, Duration)>>> = Rc::default();
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        for device in device::sockets(&runtime_dir) {
            let path = runtime_dir.join(format!("{device}.sock"));
            let known = connected.borrow().contains(&device) || connected.borrow().len() >= NEIGHBOURS_MAX;
            let is_left_alone = alone.borrow().get(&device).is_some_and(|(until, _)| Instant::now() < *until);
            if known || is_left_alone || path == shared.socket || shared.driver.borrow().is_draining() {
                continue;
            }
            connected.borrow_mut().insert(device.clone());
            let (shared, connected, alone) = (Rc::clone(&shared), Rc::clone(&connected), Rc::clone(&alone));
            tokio::task::spawn_local(async move {
                match attach(&path, &device, &shared).await {
                    Ok(link) => {
                        alone.borrow_mut().remove(&device);
                        serve(link, &shared).await;
                    }
                    // An old socket file, another version, another user's, one that is just starting.
                    Err(text) => {
                        tracing::debug!(device, "no neighbour: {text}");
                        let before = alone.borrow().get(&device).map_or(LOOK, |(_, pause)| *pause);
                        let pause = (before * 2).min(ALONE_MAX);
                        alone.borrow_mut().insert(device.clone(), (Instant::now() + pause, pause));
                    }
                }
                connected.borrow_mut().remove(&device);
            });
        }
    }
}

/// A neighbour that has let us in.
struct Link {
    channel: Channel,
    process: Process,
    id: NeighbourId,
    device: String,
    outgoing: UnboundedReceiver<Outgoing>,
}

async fn attach(path: &std::path::Path, device: &str, shared: &Rc<Shared>) -> Result<Link, String> {
    let stream = UnixStream::connect(path).await.map_err(|error| error.to_string())?;
    let peer = pillion_shm::pidfd::peer(&stream).map_err(|errno| errno.to_string())?;
    if !shared.config.is_neighbour(peer.uid) {
        return Err(format!("it belongs to uid {}", peer.uid));
    }
    let process = Process::open(peer.pid).map_err(|errno| errno.to_string())?;
    let mut channel = Channel::new(stream);
    let hello = Message::Hello(wire::Hello {
        major: MAJOR,
        minor: MINOR,
        role: wire::Role::Neighbour,
        engine_id: format!("sidecar {}", shared.config.device),
        tenant: String::new(),
        client_version: env!("CARGO_PKG_VERSION").into(),
    });
    channel.push(Outgoing::new(&hello, Vec::new()));
    let welcomed = timeout(ATTACH_MAX, welcome(&mut channel)).await;
    let (welcome, mut fds) = welcomed.map_err(|_| "it does not answer".to_owned())??;
    if welcome.index_seed != shared.secret.neighbour_key().index_seed() {
        return Err("it has another cluster secret: no key of ours is one of its".into());
    }
    let fd = fds.pop().ok_or("expected its pool, got no descriptor")?;
    let pool = ForeignPool::open(fd, welcome.pool_bytes).map_err(|error| error.to_string())?;
    let (out, outgoing) = mpsc::unbounded_channel();
    let id = shared.driver.borrow_mut().neighbour_came(device.to_owned(), pool, welcome.lease_ms, out);
    if welcome.minor >= MINOR_TENANT_SERVED {
        shared.driver.borrow().say_served(id);
    }
    tracing::info!(device, pool_mib = welcome.pool_bytes >> 20, "borrowing from a neighbour");
    Ok(Link { channel, process, id, device: device.to_owned(), outgoing })
}

async fn welcome(channel: &mut Channel) -> Result<(wire::Welcome, Vec<OwnedFd>), String> {
    loop {
        channel.write().map_err(|errno| errno.to_string())?;
        match channel.next_message()? {
            Some(Ok((Message::Welcome(welcome), fds))) if welcome.major == MAJOR => {
                return Ok((welcome, fds));
            }
            Some(Ok((Message::Refused(refused), _))) => return Err(refused.text),
            Some(Ok((other, _))) => return Err(format!("expected a welcome, got {:?}", other.kind())),
            Some(Err(error)) => return Err(error.to_string()),
            None => {}
        }
        channel.readable().await.map_err(|error| error.to_string())?;
        match channel.receive() {
            Read::Open => {}
            Read::End => return Err("it closed the connection".into()),
            Read::Broken(text) => return Err(text),
        }
    }
}

/// Until the connection ends.
async fn serve(mut link: Link, shared: &Rc<Shared>) {
    let why = exchange(&mut link, shared).await;
    shared.driver.borrow_mut().neighbour_went(link.id);
    tracing::info!(device = link.device, "a neighbour is gone: {why}");
}

async fn exchange(link: &mut Link, shared: &Rc<Shared>) -> String {
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let Link { channel, process, id, outgoing, .. } = link;
    loop {
        loop {
            let taken = match channel.next_message() {
                Ok(None) => break,
                Ok(Some(Ok((message, fds)))) => take(*id, message, fds, shared),
                Ok(Some(Err(error))) => Err(error.to_string()),
                Err(text) => Err(text),
            };
            if let Err(text) = taken {
                return text;
            }
        }
        let writable = channel.has_more();
        tokio::select! {
            ready = channel.readable() => {
                if let Err(error) = ready { return error.to_string(); }
                match channel.receive() {
                    Read::Open => {}
                    Read::End => return "it closed the connection".into(),
                    Read::Broken(text) => return text,
                }
            }
            ready = channel.writable(), if writable => if let Err(error) = ready { return error.to_string() },
            frame = outgoing.recv() => match frame {
                Some(frame) => channel.push(frame),
                None => return "it was forgotten".into(),
            },
            _ = look.tick() => {
                if process.has_ended() { return "its process has ended".into(); }
                if shared.driver.borrow().neighbours.is_mute(*id) { return "it does not answer".into(); }
            }
        }
        if let Err(errno) = channel.write() {
            return errno.to_string();
        }
    }
}

fn take(id: NeighbourId, message: Message, fds: Vec<OwnedFd>, shared: &Rc<Shared>) -> Result<(), String> {
    let mut driver = shared.driver.borrow_mut();
    match message {
        Message::NeighbourTable(table) => {
            let fd = fds.into_iter().next().ok_or("expected a table's descriptor, got none")?;
            let tenant: Arc<str> = table.tenant.into();
            driver.neighbours.table(id, Arc::clone(&tenant), table.stale_ms, fd)?;
            driver.introduce(id, &tenant);
        }
        Message::Borrowed(said) => {
            let answer = driver.neighbours.answered(id, said)?;
            driver.neighbours_answer(answer);
        }
        Message::Refused(refused) => return Err(refused.text),
        Message::Bye(bye) => return Err(bye.text),
        other => return Err(format!("expected a neighbour's message, got {:?}", other.kind())),
    }
    Ok(())
}
