//! The connection to one sidecar: attach, heartbeats, loss, attach again.
//!
//! One thread per client. It owns the socket's reading end and all waiting; the
//! engine's threads only put frames into the outbox and look at shared memory.

use std::{
    collections::VecDeque,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use pillion_protocol::{FrameError, Frames, MAJOR, MINOR, Message, wire};
use pillion_shm::{
    fds::{self, Received},
    pidfd::{self, Peer, Process},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

use crate::{
    affinity,
    launch::Launcher,
    outbox::{NotSent, Outbox},
};

/// How long a sidecar may take to answer the attach.
const ATTACH_MAX: Duration = Duration::from_secs(2);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Heartbeats without an answer after which the sidecar counts as mute: nothing new is asked of it.
const MUTE_BEATS: u32 = 4;

/// What a client needs to know.
#[derive(Debug, Clone)]
pub struct Options {
    /// The sidecar's socket.
    pub socket: PathBuf,
    /// The same string in the scheduler and the workers of one engine instance.
    pub engine_id: String,
    /// The tenant to act for; the sidecar decides whether we may.
    pub tenant: String,
    /// What must agree before bytes may be reused, without tenant and epoch: one namespace per KV cache group.
    pub namespaces: Vec<Vec<(String, String)>>,
    /// Starts a sidecar that detaches; empty: never start one.
    pub launch: Vec<String>,
    /// How long a mute sidecar that holds our blocks is waited for before it is killed (I3).
    pub grace: Duration,
}

/// What the sidecar said when it let us in.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) welcome: wire::Welcome,
    pub(crate) fds: VecDeque<OwnedFd>,
    pub(crate) peer: Peer,
}

/// A half of a client: what differs between schedulers and workers.
pub(crate) trait Half: Send + Sync + 'static {
    fn role(&self) -> wire::Role;
    /// Let in: take over the tables, send what comes first. An error text ends the connection.
    fn attached(&self, attached: Attached, outbox: &Outbox) -> Result<(), String>;
    fn message(&self, message: Message, fds: VecDeque<OwnedFd>, outbox: &Outbox);
    /// The connection is gone. `ended`: the sidecar closed it in order, so nothing of ours runs there.
    fn lost(&self, ended: bool, process: Option<Process>);
    /// Every heartbeat, and when woken.
    fn beat(&self, outbox: &Outbox);
    /// Whether blocks of the engine are held by jobs that have not quiesced and are overdue.
    fn has_overdue_holds(&self) -> bool;
}

/// What is known about the connection, for both sides of the thread border.
#[derive(Debug, Default)]
pub(crate) struct Health {
    /// Answers lately: new work may be asked of it.
    pub(crate) alive: AtomicBool,
    pub(crate) stop: AtomicBool,
    pub(crate) attaches: AtomicU64,
    pub(crate) losses: AtomicU64,
    pub(crate) launches: AtomicU64,
    pub(crate) kills: AtomicU64,
    engines: AtomicU32,
    /// Attached, but without answers.
    mute: AtomicBool,
    text: Mutex<String>,
}

impl Health {
    pub(crate) fn say(&self, text: impl Into<String>) {
        *self.text.lock().unwrap_or_else(PoisonError::into_inner) = text.into();
    }

    pub(crate) fn text(&self) -> String {
        if self.mute.load(Ordering::Relaxed) {
            return "connecting: attached, but the sidecar does not answer heartbeats: it is stopped, hangs, or \
                    gets no processor"
                .into();
        }
        self.text.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The thread and what it shares.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) health: Arc<Health>,
}

impl Link {
    /// Starts the thread.
    pub(crate) fn start(
        options: Options,
        half: Arc<dyn Half>,
        outbox: Arc<Outbox>,
        health: Arc<Health>,
    ) -> Self {
        health.say("connecting: not tried yet");
        let (thread_outbox, thread_health) = (Arc::clone(&outbox), Arc::clone(&health));
        let spawned = thread::Builder::new().name("pillion-link".into()).spawn(move || {
            let launcher = Launcher::new(options.launch.clone());
            Runner { options, half, outbox: thread_outbox, health: thread_health, launcher }.run();
        });
        if let Err(error) = spawned {
            health.say(format!("connecting: cannot start a thread: {error}"));
        }
        Self { outbox, health }
    }

    /// One connection on this very thread, from the hello to the end of what the peer has sent; `look` comes before the
    /// loss of it is told.
    #[cfg(feature = "hostile")]
    pub(crate) fn once(
        &self,
        options: Options,
        half: Arc<dyn Half>,
        socket: OwnedFd,
        look: impl FnOnce(),
    ) -> String {
        let (outbox, health) = (Arc::clone(&self.outbox), Arc::clone(&self.health));
        let launcher = Launcher::new(Vec::new());
        let mut runner = Runner { options, half, outbox, health, launcher };
        let (mut connection, heartbeat) = match runner.introduce(socket) {
            Ok(attached) => attached,
            Err(text) => return text,
        };
        let why = runner.serve(&mut connection, heartbeat);
        look();
        runner.outbox.close();
        runner.half.lost(connection.bye, connection.process.take());
        why
    }

    pub(crate) fn close(&self) {
        self.health.stop.store(true, Ordering::Release);
        self.health.alive.store(false, Ordering::Release);
        self.outbox.wake();
    }
}

struct Runner {
    options: Options,
    half: Arc<dyn Half>,
    outbox: Arc<Outbox>,
    health: Arc<Health>,
    launcher: Launcher,
}

/// One living connection, inside the thread.
struct Connection {
    socket: Arc<OwnedFd>,
    frames: Frames,
    fds: VecDeque<OwnedFd>,
    peer: Peer,
    process: Option<Process>,
    bye: bool,
}

impl Runner {
    fn stopped(&self) -> bool {
        self.health.stop.load(Ordering::Acquire)
    }

    fn run(mut self) {
        affinity::widen();
        let mut backoff = BACKOFF_MIN;
        while !self.stopped() {
            match self.attach() {
                Ok((mut connection, heartbeat)) => {
                    backoff = BACKOFF_MIN;
                    self.health.attaches.fetch_add(1, Ordering::Relaxed);
                    self.health.say("connecting: attached, waiting for what comes after");
                    let why = self.serve(&mut connection, heartbeat);
                    self.health.alive.store(false, Ordering::Release);
                    self.health.mute.store(false, Ordering::Relaxed);
                    self.outbox.close();
                    self.health.losses.fetch_add(1, Ordering::Relaxed);
                    self.health.say(format!("connecting: {why}"));
                    self.half.lost(connection.bye, connection.process.take());
                }
                Err(text) => self.health.say(format!("connecting: {text}")),
            }
            let pause = jittered(backoff);
            backoff = (backoff * 2).min(BACKOFF_MAX);
            self.pause(pause);
        }
        self.outbox.close();
    }

    /// Waits, but goes on looking after orphaned jobs.
    fn pause(&self, length: Duration) {
        let until = Instant::now() + length;
        while !self.stopped() {
            self.half.beat(&self.outbox);
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            thread::sleep(left.min(Duration::from_millis(50)));
        }
    }

    fn attach(&mut self) -> Result<(Connection, Duration), String> {
        let socket = match connect(&self.options.socket) {
            Ok(socket) => socket,
            Err(error) => {
                if self.launcher.launch()? {
                    self.health.launches.fetch_add(1, Ordering::Relaxed);
                }
                return Err(format!("{}: {error}", self.options.socket.display()));
            }
        };
        self.introduce(socket)
    }

    /// Says hello over a connected socket and takes in the answer.
    fn introduce(&mut self, socket: OwnedFd) -> Result<(Connection, Duration), String> {
        let peer = pidfd::peer(&socket).map_err(|errno| format!("cannot tell who listens: {errno}"))?;
        let process = Process::open(peer.pid).ok();
        let socket = Arc::new(socket);
        self.outbox.open(Arc::clone(&socket));
        let mut connection =
            Connection { socket, frames: Frames::default(), fds: VecDeque::new(), peer, process, bye: false };
        let hello = Message::Hello(wire::Hello {
            major: MAJOR,
            minor: MINOR,
            role: self.half.role(),
            engine_id: self.options.engine_id.clone(),
            tenant: self.options.tenant.clone(),
            client_version: env!("CARGO_PKG_VERSION").into(),
        });
        let _ = self.outbox.send(&hello);
        let attached = self.await_welcome(&mut connection)?;
        // Leases are renewed with heartbeats: several must fit into one, whatever is configured.
        let beat = attached.welcome.heartbeat_ms.min(attached.welcome.lease_ms / 4).clamp(10, 10_000);
        let heartbeat = Duration::from_millis(u64::from(beat));
        self.half.attached(attached, &self.outbox)?;
        Ok((connection, heartbeat))
    }

    fn await_welcome(&self, connection: &mut Connection) -> Result<Attached, String> {
        let until = Instant::now() + ATTACH_MAX;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.stopped() {
                return Err(format!("no answer to the attach within {} s", ATTACH_MAX.as_secs()));
            }
            poll(&mut [PollFd::new(&*connection.socket, PollFlags::IN)], left);
            // Its last words may have come together with the end: they say why.
            let open = connection.receive()?;
            match connection.next()? {
                None if !open => return Err("the sidecar closed the connection during the attach".into()),
                None => {}
                Some((Message::Welcome(welcome), fds)) => {
                    if welcome.major != MAJOR {
                        return Err(format!(
                            "expected protocol {MAJOR}, the sidecar speaks {}",
                            welcome.major
                        ));
                    }
                    return Ok(Attached { welcome, fds, peer: connection.peer });
                }
                Some((Message::Refused(refused), _)) => return Err(format!("refused: {}", refused.text)),
                Some((other, _)) => return Err(format!("expected a welcome, got {:?}", other.kind())),
            }
        }
    }

    /// Until the connection ends; says why it did.
    fn serve(&self, connection: &mut Connection, heartbeat: Duration) -> String {
        let mut sequence = 0u64;
        let mut answered = 0u64;
        let mut heard = Instant::now();
        let mut next_beat = Instant::now();
        loop {
            if self.stopped() {
                return "closed".into();
            }
            let now = Instant::now();
            if now >= next_beat {
                next_beat = now + heartbeat;
                sequence += 1;
                if self.outbox.send(&Message::Ping(wire::Ping { sequence })).is_err() {
                    return "the sidecar does not read".into();
                }
                self.half.beat(&self.outbox);
                let mute = sequence - answered > u64::from(MUTE_BEATS);
                self.health.alive.store(!mute, Ordering::Release);
                self.health.mute.store(mute, Ordering::Relaxed);
                if mute {
                    self.kill_if_overdue(connection, heard);
                }
            }
            let more = match self.outbox.flush() {
                Ok(more) => more,
                Err(NotSent) => return "the connection broke".into(),
            };
            let mut interest = PollFlags::IN;
            interest.set(PollFlags::OUT, more);
            let mut polled = [
                PollFd::new(&*connection.socket, interest),
                PollFd::new(self.outbox.wake_fd(), PollFlags::IN),
            ];
            poll(&mut polled, next_beat.saturating_duration_since(Instant::now()));
            let woken = polled[1].revents().contains(PollFlags::IN);
            if woken {
                let _ = rustix::io::read(self.outbox.wake_fd(), &mut [0u8; 8]);
            }
            let open = match connection.receive() {
                Ok(open) => open,
                Err(text) => return text,
            };
            loop {
                match connection.next() {
                    Ok(None) => break,
                    Err(text) => return text,
                    Ok(Some((Message::Pong(pong), _))) => {
                        answered = answered.max(pong.sequence.min(sequence));
                        heard = Instant::now();
                        self.health.engines.store(pong.engines, Ordering::Relaxed);
                        self.health.alive.store(true, Ordering::Release);
                        self.health.mute.store(false, Ordering::Relaxed);
                    }
                    Ok(Some((Message::Bye(bye), _))) => {
                        connection.bye = true;
                        return format!("the sidecar ended the session: {}", bye.text);
                    }
                    Ok(Some((message, fds))) => self.half.message(message, fds, &self.outbox),
                }
            }
            if !open {
                return "the sidecar closed the connection".into();
            }
        }
    }

    /// I3: blocks that a mute sidecar may still write cannot be reused. Its supervisor kills it; where
    /// that does not happen we do, if no other engine would lose it.
    fn kill_if_overdue(&self, connection: &Connection, heard: Instant) {
        let only_ours = self.health.engines.load(Ordering::Relaxed) <= 1;
        // Twice the grace: the supervisor comes first.
        if heard.elapsed() > self.options.grace * 2
            && only_ours
            && self.half.has_overdue_holds()
            && let Some(process) = &connection.process
            && process.kill().is_ok()
        {
            self.health.kills.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Connection {
    /// Reads what is there; false at the end of the stream.
    fn receive(&mut self) -> Result<bool, String> {
        let mut buffer = [0u8; 16384];
        loop {
            match fds::receive(self.socket.as_fd(), &mut buffer, &mut self.fds) {
                Ok(Received::Bytes(count)) => self.frames.push(&buffer[..count]),
                Ok(Received::Nothing) => return Ok(true),
                Ok(Received::End) => return Ok(false),
                Err(errno) => return Err(format!("the connection broke: {errno}")),
            }
        }
    }

    fn next(&mut self) -> Result<Option<(Message, VecDeque<OwnedFd>)>, String> {
        let frame = loop {
            match self.frames.next_frame() {
                None => return Ok(None),
                // Of a newer sidecar of the same major version: what is appended may be ignored.
                Some(Err(FrameError::UnknownKind(_))) => {}
                Some(Err(error)) => return Err(format!("the sidecar sent what is no frame: {error}")),
                Some(Ok(frame)) => break frame,
            }
        };
        let count = usize::from(frame.fds);
        if self.fds.len() < count {
            return Err(format!("expected {count} file descriptors, got {}", self.fds.len()));
        }
        Ok(Some((frame.message, self.fds.drain(..count).collect())))
    }
}

pub(crate) fn connect(path: &std::path::Path) -> Result<OwnedFd, rustix::io::Errno> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn poll(fds: &mut [PollFd<'_>], timeout: Duration) {
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    // An interrupted poll is looked at again in the next round.
    let _ = rustix::event::poll(fds, Some(&timeout));
}

fn jittered(backoff: Duration) -> Duration {
    let random = getrandom::u32().unwrap_or(u32::MAX / 2);
    // Between half and one and a half of it.
    backoff / 2 + backoff.mul_f64(f64::from(random) / f64::from(u32::MAX))
}
