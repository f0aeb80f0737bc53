//! One connection: attach, frames in, frames out, its end.

use std::{
    cell::Cell,
    os::fd::OwnedFd,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use pillion_core::{
    Event, JobId, LeaseId, LeaseRun, LoadRun, NamespaceId, Role, SaveRun, SessionId, Tenant, TenantKey,
};
use pillion_protocol::{FrameError, MAJOR, MAX_RUNS, MINOR, Message, PARENT_BYTES, frame, wire};
use pillion_shm::{
    clock,
    pidfd::{self, Peer, Process},
};
use tokio::{
    net::UnixStream,
    sync::{
        mpsc::{self, UnboundedReceiver, UnboundedSender},
        oneshot,
    },
    time::{MissedTickBehavior, error::Elapsed, interval, timeout},
};

use crate::{
    channel::{Channel, Outgoing, Read},
    config::Config,
    copier::CopyReport,
    driver::{RING_SLOTS, SharedDriver, WORD_SLOTS},
    metrics::{LabelValue, Refusal},
    register::{self, Begun, Refused, Registered},
    secret::ClusterSecret,
};

/// How long a client may take to introduce itself.
const HELLO_MAX: Duration = Duration::from_secs(2);
/// How long the last words may take to be written.
const BYE_MAX: Duration = Duration::from_secs(1);
/// How often a client's process is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Malformed messages after which a session is closed.
const STRIKES_MAX: u32 = 3;
/// Connections that may be introducing themselves at a time (I8): they are no sessions yet, but take descriptors.
const GREETINGS_MAX: usize = 256;

/// What all sessions share.
#[derive(Debug)]
pub struct Shared {
    /// The configuration.
    pub config: Config,
    /// Tenant keys derive from it.
    pub secret: ClusterSecret,
    /// Decisions and actions.
    pub driver: SharedDriver,
    /// Makes the status report.
    pub status: fn(&crate::driver::Driver, &Shared) -> String,
    /// Where HTTP listens.
    pub http: Option<std::net::SocketAddr>,
    /// The socket's path.
    pub socket: std::path::PathBuf,
    /// When this process started.
    pub started: std::time::Instant,
    /// Connections that have not introduced themselves.
    pub greetings: Cell<usize>,
    /// Where copy threads report.
    pub reports: UnboundedSender<CopyReport>,
    /// Where unmapped imports are told: session and number.
    pub unmapped: UnboundedSender<(SessionId, u64)>,
}

/// A place among the connections that have not introduced themselves.
#[derive(Debug)]
pub struct Greeting(Rc<Shared>);

impl Greeting {
    /// A place, if there is one; otherwise the client is told, as far as it listens.
    pub fn begin(stream: &UnixStream, shared: &Rc<Shared>) -> Option<Self> {
        let taken = shared.greetings.get();
        if taken < GREETINGS_MAX {
            shared.greetings.set(taken + 1);
            return Some(Self(Rc::clone(shared)));
        }
        let text = format!(
            "expected at most {GREETINGS_MAX} clients that introduce themselves at a time: try again"
        );
        let refused = Message::Refused(wire::Refused { request: 0, reason: wire::Reason::Busy, text });
        let _ = stream.try_write(&frame::encode(&refused, 0));
        shared.driver.borrow().metrics.refused(Refusal::Busy);
        None
    }
}

impl Drop for Greeting {
    fn drop(&mut self) {
        self.0.greetings.set(self.0.greetings.get() - 1);
    }
}

/// Serves one connection until it ends.
pub async fn run(stream: UnixStream, greeting: Greeting, shared: Rc<Shared>) {
    let peer = match pidfd::peer(&stream) {
        Ok(peer) => peer,
        Err(errno) => {
            return tracing::warn!("a client whose credentials cannot be read was dropped: {errno}");
        }
    };
    let mut connection = Connection { channel: Channel::new(stream), peer, shared, strikes: 0 };
    let greeted = connection.greet().await;
    drop(greeting);
    match greeted {
        Ok(Some((session, outgoing))) => connection.serve(session, outgoing).await,
        Ok(None) => {}
        Err(_) => tracing::info!(pid = peer.pid, "a client did not introduce itself in time and was dropped"),
    }
}

struct Connection {
    channel: Channel,
    peer: Peer,
    shared: Rc<Shared>,
    strikes: u32,
}

/// Why a session ends.
enum End {
    Closed,
    Dropped(String),
}

impl Connection {
    /// Users who may not come in are told before a byte of theirs is read; the others have a little time.
    async fn greet(&mut self) -> Result<Option<(SessionId, UnboundedReceiver<Outgoing>)>, Elapsed> {
        if let Err(denied) = self.shared.config.uid_allowed(self.peer.uid) {
            return Ok(self.turn_away(wire::Reason::Denied, denied.to_string()).await);
        }
        timeout(HELLO_MAX, self.hello()).await
    }

    /// The first frame must be a hello that may come in.
    async fn hello(&mut self) -> Option<(SessionId, UnboundedReceiver<Outgoing>)> {
        let hello = loop {
            match self.channel.next_message() {
                Ok(Some(Ok((Message::Hello(hello), _)))) => break hello,
                Ok(Some(Ok((other, _)))) => {
                    let text = format!("expected a hello first, got {:?}", other.kind());
                    return self.turn_away(wire::Reason::Malformed, text).await;
                }
                Ok(Some(Err(error))) => {
                    return self.turn_away(wire::Reason::Malformed, error.to_string()).await;
                }
                Err(text) => return self.turn_away(wire::Reason::Malformed, text).await,
                Ok(None) => {}
            }
            self.channel.readable().await.ok()?;
            match self.channel.receive() {
                Read::Open => {}
                Read::End => return None,
                Read::Broken(text) => return self.turn_away(wire::Reason::Malformed, text).await,
            }
        };
        match self.admit(&hello) {
            Ok((session, outgoing, welcome, fds)) => {
                self.channel.push(Outgoing::new(&Message::Welcome(welcome), fds));
                // The first bytes on a fresh connection: they fit.
                if self.channel.write().is_err() || self.channel.has_more() {
                    self.shared.driver.borrow_mut().apply(Event::Detached { session });
                    return None;
                }
                self.shared.driver.borrow_mut().introduce_neighbours(session);
                Some((session, outgoing))
            }
            Err((reason, text)) => self.turn_away(reason, text).await,
        }
    }

    async fn turn_away<T>(&mut self, reason: wire::Reason, text: String) -> Option<T> {
        tracing::warn!(pid = self.peer.pid, uid = self.peer.uid, "client refused: {text}");
        count(&self.shared, reason);
        let refused = Message::Refused(wire::Refused { request: 0, reason, text });
        self.channel.push(Outgoing::new(&refused, Vec::new()));
        self.channel.flush(BYE_MAX).await;
        None
    }

    #[expect(clippy::type_complexity, reason = "used once")]
    fn admit(
        &self,
        hello: &wire::Hello,
    ) -> Result<(SessionId, UnboundedReceiver<Outgoing>, wire::Welcome, Vec<OwnedFd>), (wire::Reason, String)>
    {
        let Shared { config, secret, driver, .. } = &*self.shared;
        if hello.major != MAJOR {
            let text = format!(
                "expected protocol version {MAJOR}, the client speaks {}: install the same version of pillion on both sides",
                hello.major
            );
            return Err((wire::Reason::Version, text));
        }
        let denied = |denied: crate::config::Denied| (wire::Reason::Denied, denied.to_string());
        let is_neighbour = hello.role == wire::Role::Neighbour;
        if is_neighbour && !config.is_neighbour(self.peer.uid) {
            let text = format!(
                "expected a sidecar of uid {} as neighbour, and `neighbours` on, came uid {}",
                config.own_uid, self.peer.uid
            );
            return Err((wire::Reason::Denied, text));
        }
        let role = match hello.role {
            wire::Role::Scheduler => Role::Scheduler,
            wire::Role::Worker => Role::Worker,
            wire::Role::Observer => Role::Observer,
            wire::Role::Neighbour => Role::Neighbour,
        };
        if hello.engine_id.is_empty() || hello.engine_id.len() > 256 {
            return Err((wire::Reason::Malformed, "expected an engine id of 1 to 256 bytes".into()));
        }
        let mut driver = driver.borrow_mut();
        if driver.session_count() as u64 >= config.max_sessions {
            let text = format!(
                "expected at most {} sessions (max_sessions): detach one or raise it",
                config.max_sessions
            );
            return Err((wire::Reason::Busy, text));
        }
        let tenant = if is_neighbour {
            // It speaks for no tenant: it asks by keys, which it can form only for those of its own clients.
            Tenant { name: "".into(), key: secret.neighbour_key() }
        } else {
            let name = config.tenant_allowed(&hello.tenant, self.peer.uid).map_err(denied)?;
            let key = TenantKey::new(*secret.tenant_key(&name).as_bytes());
            Tenant { name: name.as_str().into(), key }
        };
        let (out, outgoing) = mpsc::unbounded_channel();
        let engine = Arc::from(hello.engine_id.as_str());
        let (session, tables) = driver
            .admit(role, self.peer, engine, tenant, out)
            .map_err(|error| (wire::Reason::Busy, error.to_string()))?;
        tracing::info!(
            session = session.0,
            ?role,
            pid = self.peer.pid,
            uid = self.peer.uid,
            engine = hello.engine_id,
            version = hello.client_version,
            "attached"
        );
        let welcome = wire::Welcome {
            major: MAJOR,
            minor: MINOR,
            session: session.0,
            generation: driver.generation().to_vec(),
            index_seed: tables.index_seed,
            heartbeat_ms: config.heartbeat_ms as u32,
            lease_ms: (config.lease_seconds * 1000) as u32,
            stale_ms: (config.table_stamp_ms * 5) as u32,
            ring_slots: RING_SLOTS,
            word_slots: WORD_SLOTS,
            server_version: env!("CARGO_PKG_VERSION").into(),
            device: config.device.clone(),
            pool_bytes: driver.pool_bytes(),
        };
        Ok((session, outgoing, welcome, tables.fds))
    }

    async fn serve(&mut self, session: SessionId, mut outgoing: UnboundedReceiver<Outgoing>) {
        let unread = self.shared.driver.borrow_mut().live(session).map(|live| Rc::clone(&live.unread));
        let unread = unread.unwrap_or_default();
        let end = self.exchange(session, &mut outgoing, &unread).await;
        if let End::Dropped(text) = &end {
            tracing::warn!(session = session.0, pid = self.peer.pid, "session dropped: {text}");
        }
        self.shared.driver.borrow_mut().apply(Event::Detached { session });
        // The channel ends when the core has seen the last copy of this session end. Only then is the
        // connection closed: to the peer, its end means that nothing of ours touches its memory.
        while outgoing.recv().await.is_some() {}
        let text = match end {
            End::Closed => "the client detached".into(),
            End::Dropped(text) => text,
        };
        self.channel.push(Outgoing::new(&Message::Bye(wire::Bye { text }), Vec::new()));
        self.channel.flush(BYE_MAX).await;
        tracing::info!(session = session.0, "session ended");
    }

    async fn exchange(
        &mut self,
        session: SessionId,
        outgoing: &mut UnboundedReceiver<Outgoing>,
        unread: &Rc<Cell<usize>>,
    ) -> End {
        // EOF alone is not enough: another process may hold a copy of the socket.
        let Ok(process) = Process::open(self.peer.pid) else { return End::Closed };
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            loop {
                let taken = match self.channel.next_message() {
                    Ok(None) => break,
                    Ok(Some(next)) => self.take(session, next),
                    Err(text) => Err(text),
                };
                if let Err(text) = taken {
                    return End::Dropped(text);
                }
            }
            if self.shared.driver.borrow().does_not_read(session) {
                return End::Dropped("the client does not read its answers".into());
            }
            let writable = self.channel.has_more();
            tokio::select! {
                ready = self.channel.readable() => {
                    if ready.is_err() { return End::Closed; }
                    match self.channel.receive() {
                        Read::Open => {}
                        Read::End => return End::Closed,
                        Read::Broken(text) => return End::Dropped(text),
                    }
                }
                ready = self.channel.writable(), if writable => {
                    if ready.is_err() { return End::Closed; }
                }
                message = outgoing.recv() => {
                    let Some(frame) = message else { return End::Closed };
                    self.channel.push(frame);
                }
                _ = look.tick() => if process.has_ended() { return End::Closed },
            }
            match self.channel.write() {
                Ok(count) => unread.set(unread.get().saturating_sub(count)),
                Err(_) => return End::Closed,
            }
        }
    }

    /// One frame. An error ends the session.
    fn take(
        &mut self,
        session: SessionId,
        next: Result<(Message, Vec<OwnedFd>), FrameError>,
    ) -> Result<(), String> {
        let handled = match next {
            Ok((message, fds)) => self.handle(session, message, fds),
            Err(error) => Err(error.to_string()),
        };
        handled.or_else(|text| self.strike(session, text))
    }

    fn strike(&mut self, session: SessionId, text: String) -> Result<(), String> {
        self.strikes += 1;
        count(&self.shared, wire::Reason::Malformed);
        if self.strikes >= STRIKES_MAX {
            return Err(format!("{STRIKES_MAX} malformed messages, the last: {text}"));
        }
        let refused = wire::Refused { request: 0, reason: wire::Reason::Malformed, text };
        self.shared.driver.borrow_mut().send(session, &Message::Refused(refused));
        Ok(())
    }

    fn handle(&mut self, session: SessionId, message: Message, fds: Vec<OwnedFd>) -> Result<(), String> {
        let mut driver = self.shared.driver.borrow_mut();
        let of_neighbours = matches!(
            message,
            Message::Borrow(_)
                | Message::Renew(_)
                | Message::Release(_)
                | Message::Damaged(_)
                | Message::TenantServed(_)
                | Message::Ping(_)
        );
        // It speaks for no tenant: nothing is opened, registered or saved for it.
        if !of_neighbours && driver.live(session).is_some_and(|live| live.view.role == Role::Neighbour) {
            return Err(format!("expected a neighbour to borrow, got {:?}", message.kind()));
        }
        let event = match message {
            Message::Ping(ping) => {
                let engines = driver.engines() as u32;
                driver.send(session, &Message::Pong(wire::Pong { sequence: ping.sequence, engines }));
                return Ok(());
            }
            Message::StatusQuery(query) => {
                let json = (self.shared.status)(&driver, &self.shared);
                driver.send(session, &Message::Status(wire::Status { request: query.request, json }));
                return Ok(());
            }
            Message::Register(register) => {
                drop(driver);
                self.register(session, &register, fds.into_iter().next());
                return Ok(());
            }
            Message::Unregister(unregister) => {
                driver.unregister(session, unregister.request);
                return Ok(());
            }
            Message::OpenNamespace(open) => {
                let namespace = register::namespace(&open.keys, &open.values)
                    .ok_or("expected 1 to 256 namespace fields with different names")?;
                if ![0, 16].contains(&open.epoch.len()) {
                    return Err(format!("expected an epoch of 0 or 16 bytes, got {}", open.epoch.len()));
                }
                Event::OpenNamespace { session, request: open.request, namespace, epoch: open.epoch }
            }
            Message::Lease(lease) => {
                let (hashes, begun) = (hashes(&lease.hashes)?, Instant::now());
                let runs = runs(&lease.spaces, &lease.counts)?;
                let runs = runs.map(|(space, count)| LeaseRun { space, count }).collect();
                driver.lease(session, lease.request, runs, hashes, begun);
                return Ok(());
            }
            Message::Renew(renew) => Event::Renew { session, lease: self::lease(&renew.lease)? },
            Message::Release(release) => Event::Release { session, lease: self::lease(&release.lease)? },
            Message::Save(save) => Event::Save {
                session,
                job: job(&save.job)?,
                runs: save_runs(&save)?,
                hashes: hashes(&save.hashes)?,
                blocks: save.blocks,
                word: save.word,
                tag: save.tag,
                deadline_ns: deadline(save.deadline_ms),
                event: save.event.checked_sub(1),
            },
            Message::Load(load) => Event::Load {
                session,
                job: job(&load.job)?,
                lease: self::lease(&load.lease)?,
                runs: load_runs(&load)?,
                hashes: hashes(&load.hashes)?,
                blocks: load.blocks,
                deadline_ns: deadline(load.deadline_ms),
                event: load.event.checked_sub(1),
            },
            Message::Borrow(borrow) => {
                Event::Borrow { session, request: borrow.request, keys: hashes(&borrow.keys)? }
            }
            Message::TenantServed(served) => {
                let is_neighbour = driver.live(session).is_some_and(|live| live.view.role == Role::Neighbour);
                if !is_neighbour {
                    return Err("expected a neighbour to speak of tenants".into());
                }
                // A sidecar of our user, which may be any tenant; one that our configuration lacks has nothing here.
                let Shared { config, secret, .. } = &*self.shared;
                if let Ok(name) = config.tenant_allowed(&served.tenant, self.peer.uid) {
                    let key = TenantKey::new(*secret.tenant_key(&name).as_bytes());
                    let tenant = Tenant { name: name.as_str().into(), key };
                    driver.tenant_served(tenant).map_err(|error| error.to_string())?;
                }
                return Ok(());
            }
            Message::Damaged(damaged) => {
                let key = damaged.key.as_slice().try_into().map_err(|_| "expected a key of 32 bytes")?;
                Event::Damaged { session, key, offset: damaged.offset }
            }
            Message::Cancel(cancel) => Event::Cancel { session, job: job(&cancel.job)? },
            other => return Err(format!("expected a client's message, got {:?}", other.kind())),
        };
        driver.apply(event);
        Ok(())
    }

    fn register(&self, session: SessionId, message: &wire::Register, fd: Option<OwnedFd>) {
        let gpu = self.shared.driver.borrow().gpu().cloned();
        let request = message.request;
        match register::register(message, fd, self.peer, gpu.as_deref()) {
            Ok(Begun::Host(registered)) => {
                registered_or_refused(&self.shared, session, request, Ok(registered))
            }
            Err(refused) => registered_or_refused(&self.shared, session, request, Err(refused)),
            Ok(Begun::Device(import)) => {
                // Only with a device does one get here.
                let Some(gpu) = gpu else { return };
                let number = self.shared.driver.borrow_mut().importing(session, request);
                let Some(number) = number else {
                    let text = "too many registrations are under way: wait for their end".to_owned();
                    let busy = Err(Refused { reason: wire::Reason::Busy, text });
                    return registered_or_refused(&self.shared, session, request, busy);
                };
                let (unmapped, reports) = (self.shared.unmapped.clone(), self.shared.reports.clone());
                let (tell, told) = oneshot::channel();
                let work = move || {
                    let unmapped = move || {
                        let _ = unmapped.send((session, number));
                    };
                    let _ = tell.send(import.finish(&gpu, number, &reports, unmapped));
                };
                let spawned = std::thread::Builder::new().name("pillion-import".into()).spawn(work);
                if let Err(error) = spawned {
                    tracing::error!("cannot start a thread: {error}");
                    let _ = self.shared.unmapped.send((session, number));
                }
                let shared = Rc::clone(&self.shared);
                tokio::task::spawn_local(async move {
                    let result = told.await.unwrap_or_else(|_| {
                        let text = "the import ended without a result: try again".to_owned();
                        Err(Refused { reason: wire::Reason::Memory, text })
                    });
                    // Where it is not, dropping the result unmaps the memory.
                    let wanted = shared.driver.borrow_mut().imported(session, request);
                    if wanted {
                        registered_or_refused(&shared, session, request, result);
                        shared.driver.borrow_mut().unregister_if_asked(session);
                    }
                });
            }
        }
    }
}

/// Tells everybody how a registration ended.
fn registered_or_refused(
    shared: &Shared,
    session: SessionId,
    request: u64,
    result: Result<Registered, Refused>,
) {
    let mut driver = shared.driver.borrow_mut();
    match result {
        Ok(registered) => {
            let registration = &registered.registration;
            tracing::info!(
                session = session.0,
                layout = registered.layout,
                blocks = registration.num_blocks,
                record_bytes = ?registration.groups.iter().map(|group| group.record_bytes).collect::<Vec<_>>(),
                way = registered.mover.way(),
                canary = registered.canary,
                "registered"
            );
            driver.registered(session, request, registered);
        }
        Err(Refused { reason, text }) => {
            let pid = driver.live(session).map(|live| live.view.peer.pid);
            tracing::warn!(session = session.0, pid, "registration refused: {text}");
            if let Some(live) = driver.live(session) {
                live.view.refused = Some(text.clone());
            }
            driver.send(session, &Message::Refused(wire::Refused { request, reason, text }));
            drop(driver);
            count(shared, reason);
        }
    }
}

fn count(shared: &Shared, reason: wire::Reason) {
    let text = format!("{reason:?}").to_lowercase();
    let refusal = Refusal::ALL.iter().find(|refusal| refusal.text() == text);
    shared.driver.borrow().metrics.refused(refusal.copied().unwrap_or(Refusal::Unknown));
}

fn hashes(bytes: &[u8]) -> Result<Vec<[u8; 32]>, String> {
    let (hashes, rest) = bytes.as_chunks::<32>();
    if rest.is_empty() {
        Ok(hashes.to_vec())
    } else {
        Err(format!("expected hashes of 32 bytes, got {} bytes", bytes.len()))
    }
}

fn job(bytes: &[u8]) -> Result<JobId, String> {
    JobId::from_slice(bytes).ok_or_else(|| format!("expected a job id of 16 bytes, got {}", bytes.len()))
}

fn lease(bytes: &[u8]) -> Result<LeaseId, String> {
    LeaseId::from_slice(bytes).ok_or_else(|| format!("expected a lease id of 16 bytes, got {}", bytes.len()))
}

/// The columns that all runs have.
fn runs<'a>(
    spaces: &'a [u8],
    counts: &'a [u32],
) -> Result<impl ExactSizeIterator<Item = (NamespaceId, u32)> + 'a, String> {
    let (ids, rest) = spaces.as_chunks::<16>();
    if !rest.is_empty() || ids.len() != counts.len() || ids.len() > MAX_RUNS {
        return Err(format!(
            "expected at most {MAX_RUNS} runs with a namespace id of 16 bytes and a count each, got {} bytes and {} counts",
            spaces.len(),
            counts.len()
        ));
    }
    Ok(ids.iter().zip(counts).map(|(id, count)| (NamespaceId(*id), *count)))
}

fn save_runs(save: &wire::Save) -> Result<Vec<SaveRun>, String> {
    let runs = runs(&save.spaces, &save.counts)?;
    let (parents, rest) = save.parents.as_chunks::<PARENT_BYTES>();
    if !rest.is_empty() || parents.len() != runs.len() {
        return Err(format!(
            "expected a parent of {PARENT_BYTES} bytes for each of {} runs, got {} bytes",
            runs.len(),
            save.parents.len()
        ));
    }
    let run = |((space, count), [has, hash @ ..]): ((NamespaceId, u32), &[u8; PARENT_BYTES])| {
        let parent = (*has != 0).then_some(*hash);
        SaveRun { space, parent, count }
    };
    Ok(runs.zip(parents).map(run).collect())
}

fn load_runs(load: &wire::Load) -> Result<Vec<LoadRun>, String> {
    let runs = runs(&load.spaces, &load.counts)?;
    if [load.runs.len(), load.firsts.len()] != [runs.len(); 2] {
        return Err(format!(
            "expected columns of {} runs, got {} and {}",
            runs.len(),
            load.runs.len(),
            load.firsts.len()
        ));
    }
    let places = load.runs.iter().zip(&load.firsts);
    let run = |((space, count), (run, first)): ((NamespaceId, u32), (&u32, &u32))| LoadRun {
        run: *run,
        first: *first,
        space,
        count,
    };
    Ok(runs.zip(places).map(run).collect())
}

fn deadline(milliseconds: u32) -> u64 {
    clock::monotonic_ns() + u64::from(milliseconds) * 1_000_000
}
