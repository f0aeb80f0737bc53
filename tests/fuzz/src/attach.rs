//! The attach sequence and everything after it: real sessions of the daemon over real sockets.
//!
//! The level: `session::run` as the daemon spawns it, with its driver, its core, its copy threads and a pool, on one
//! thread. What is left out is the listener, the supervisor, the SSD, the GPU and the neighbours' side that connects.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io::Read,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use pillion_core::{Core, Limits};
use pillion_cuda::HostPool;
use pillion_daemon::{
    config::Config,
    copier::Copiers,
    driver::{Driver, Parts, SESSION_JOBS_MAX, SharedDriver},
    metrics::Metrics,
    report,
    secret::ClusterSecret,
    session::{self, Greeting, Shared},
};
use pillion_layouts::{
    Worker,
    vllm::{
        KvCacheTensor, Packing,
        groups::{Group, Pages},
    },
};
use pillion_protocol::{Frames, MAJOR, MINOR, Message, frame::encode, wire};
use pillion_shm::fds::{self, Received};
use tokio::{net::UnixStream, runtime::Runtime, sync::mpsc, task::LocalSet};

use crate::{cursor::Cursor, layout, messages, register};

const POOL_BYTES: u64 = 1 << 20;
const STEPS_MAX: usize = 40;
const CONNECTIONS_MAX: usize = 10;
const END_MAX: Duration = Duration::from_secs(20);

thread_local! {
    static RUNTIME: Runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    static SECRET: PathBuf = {
        let folder = tempfile::tempdir().expect("a folder");
        folder.keep().join("secret")
    };
}

fn shared() -> Rc<Shared> {
    let pool = Arc::new(HostPool::create(POOL_BYTES).expect("a pool"));
    let (reports, mut copied) = mpsc::unbounded_channel();
    let (unmapped, _) = mpsc::unbounded_channel();
    let core = Core::new(Limits {
        pool_bytes: POOL_BYTES,
        pinned_bytes_max: POOL_BYTES / 8 * 7,
        leases_max: 8,
        session_jobs_max: SESSION_JOBS_MAX,
        lease_ns: 30_000_000_000,
        lease_seed: [1; 32],
        borrow_wait_ns: 1_000_000,
        ssd: None,
    });
    let driver: SharedDriver = Rc::new(RefCell::new(Driver::new(Parts {
        core,
        copiers: Copiers::start(1, Arc::clone(&pool), &reports).expect("a thread"),
        pool,
        stale_ms: 100,
        device: "fuzz".into(),
        ssd: None,
        gpu: None,
        metrics: Arc::new(Metrics::new("0", SystemTime::UNIX_EPOCH)),
        presence_slots: 64,
        pool_bytes: POOL_BYTES,
        generation: [1; 16],
        restarts: 0,
    })));
    let ready = Rc::downgrade(&driver);
    tokio::task::spawn_local(async move {
        while let Some(report) = copied.recv().await {
            let Some(driver) = ready.upgrade() else { return };
            driver.borrow_mut().copied(report);
        }
    });
    Rc::new(Shared {
        config: Config { max_sessions: 6, ..Config::default() },
        secret: SECRET.with(|path| ClusterSecret::open_or_create(path)).expect("a secret"),
        driver,
        status: report::json,
        http: None,
        socket: "/nowhere".into(),
        started: Instant::now(),
        greetings: Cell::new(0),
        reports,
        unmapped,
    })
}

/// A client's end of one connection.
struct Peer {
    stream: UnixStream,
    frames: Frames,
    fds: VecDeque<OwnedFd>,
    open: bool,
}

/// What clients have learnt.
#[derive(Default)]
struct Known {
    spaces: Vec<Vec<u8>>,
    leases: Vec<Vec<u8>>,
    welcomes: usize,
    jobs: u8,
}

struct World {
    shared: Rc<Shared>,
    peers: Vec<Peer>,
    began: usize,
    known: Known,
    /// Ends of pipes whose other ends were passed on: when all sessions have ended, nobody holds those.
    passed: Vec<std::io::PipeReader>,
}

impl World {
    fn connect(&mut self) {
        if self.began == CONNECTIONS_MAX {
            return;
        }
        self.began += 1;
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let greeting = Greeting::begin(&theirs, &self.shared).expect("a place for a newcomer");
        tokio::task::spawn_local(session::run(theirs, greeting, Rc::clone(&self.shared)));
        let peer = Peer { stream: ours, frames: Frames::default(), fds: VecDeque::new(), open: true };
        self.peers.push(peer);
    }

    /// Lets the sessions run and takes in what they say.
    async fn pump(&mut self, turns: usize) {
        for _ in 0..turns {
            tokio::task::yield_now().await;
            for peer in &mut self.peers {
                peer.listen(&mut self.known);
            }
        }
    }

    /// Until copies have ended.
    async fn copies(&mut self) {
        let begun = Instant::now();
        self.pump(3).await;
        while self.shared.driver.borrow().counters().jobs > 0 && begun.elapsed() < Duration::from_millis(20) {
            std::thread::sleep(Duration::from_micros(20));
            self.pump(1).await;
        }
    }

    fn pipe(&mut self) -> OwnedFd {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        self.passed.push(reader);
        writer.into()
    }

    async fn send(&mut self, which: usize, bytes: &[u8], passed: &[OwnedFd], cut: usize) {
        let mut borrowed: Vec<_> = passed.iter().map(AsFd::as_fd).collect();
        for piece in bytes.chunks(cut) {
            let Some(peer) = self.peers.get(which).filter(|peer| peer.open) else { return };
            // One that does not fit, or has no reader, is lost, and the stream with it: as with a client that dies.
            if fds::send(&peer.stream, piece, &borrowed) != Ok(piece.len()) {
                self.peers[which].open = false;
                return;
            }
            borrowed.clear();
            if cut < bytes.len() {
                self.pump(1).await;
            }
        }
    }
}

impl Peer {
    fn listen(&mut self, known: &mut Known) {
        let mut buffer = [0; 16 << 10];
        while let Ok(Received::Bytes(count)) = fds::receive(&self.stream, &mut buffer, &mut self.fds) {
            self.frames.push(&buffer[..count]);
        }
        while let Some(next) = self.frames.next_frame() {
            let frame = next.expect("the sidecar sends frames");
            assert!(usize::from(frame.fds) <= self.fds.len(), "announced and not passed");
            self.fds.drain(..usize::from(frame.fds));
            match frame.message {
                Message::Welcome(_) => known.welcomes += 1,
                Message::NamespaceOpened(opened) => known.spaces.push(opened.id),
                Message::Leased(leased) => known.leases.push(leased.lease),
                _ => {}
            }
        }
    }
}

fn hello(c: &mut Cursor<'_>, role: wire::Role) -> Message {
    Message::Hello(wire::Hello {
        major: if c.rarely() { c.u16() } else { MAJOR },
        minor: MINOR,
        role,
        engine_id: if c.rarely() { c.text(8) } else { "e".into() },
        tenant: if c.rarely() { c.text(8) } else { "default".into() },
        client_version: "0".into(),
    })
}

/// The least there is: four blocks of one layer, 64 bytes each.
fn small() -> Worker {
    let tensor =
        KvCacheTensor { size: 256, offset: 0, layer_stride: 64, block_stride: 64, layers: vec!["l".into()] };
    let packing = Packing::Latent { format: "x".into() };
    let pages =
        Pages { tensor, heads: 1, states: 4, content_bytes: 16, page_bytes: 64, kernel_blocks: 1, packing };
    let groups = vec![Group { block_tokens: 4, pages: vec![pages] }];
    Worker { order: "BLHNC".into(), num_blocks: 4, memory_bytes: 256, rank: 0, world: 1, groups }
}

/// Fields of the namespace that `register::message_of` gives a group.
fn open(c: &mut Cursor<'_>, group: usize) -> Message {
    Message::OpenNamespace(wire::OpenNamespace {
        request: c.number(),
        keys: vec!["group".into(), "shard".into()],
        values: vec![group.to_string(), "1/1".into()],
        epoch: if c.rarely() { vec![1; 16] } else { Vec::new() },
    })
}

fn last(of: &[Vec<u8>], c: &mut Cursor<'_>) -> Vec<u8> {
    match of.len() {
        0 => vec![c.byte(); 16],
        len => of[len - 1 - c.below(len)].clone(),
    }
}

fn hashes(c: &mut Cursor<'_>, count: u32) -> Vec<u8> {
    let first = c.byte() % 8;
    (0..count as u8).flat_map(|n| [first + n; 32]).collect()
}

/// A job or a lease that makes sense, or nearly.
fn request(c: &mut Cursor<'_>, known: &mut Known) -> Message {
    let count = 1 + c.below(4) as u32;
    let counts = vec![if c.rarely() { c.number32() } else { count }];
    let spaces = last(&known.spaces, c);
    let blocks = (0..count).map(|n| if c.rarely() { c.number32() } else { n }).collect();
    known.jobs = known.jobs.wrapping_add(1);
    let job = vec![if c.rarely() { c.byte() } else { known.jobs }; 16];
    let event = if c.rarely() { c.number32() } else { 0 };
    match c.below(7) {
        0 | 1 => Message::Save(wire::Save {
            job,
            spaces,
            counts,
            parents: if c.rarely() { vec![c.byte(); 33] } else { vec![0; 33] },
            hashes: hashes(c, count),
            blocks,
            // Nobody holds a word: what is saved here is never published, unless the client writes its words.
            word: c.number32(),
            tag: c.number(),
            deadline_ms: if c.rarely() { c.number32() } else { 1000 },
            event,
        }),
        2 => Message::Lease(wire::Lease { request: c.number(), spaces, counts, hashes: hashes(c, count) }),
        3 => Message::Load(wire::Load {
            job,
            lease: last(&known.leases, c),
            runs: vec![c.below(2) as u32],
            firsts: vec![c.below(2) as u32],
            spaces,
            counts,
            hashes: hashes(c, count),
            blocks,
            deadline_ms: if c.rarely() { c.number32() } else { 1000 },
            event,
        }),
        4 => Message::Renew(wire::Renew { lease: last(&known.leases, c) }),
        5 => Message::Release(wire::Release { lease: last(&known.leases, c) }),
        _ => Message::Cancel(wire::Cancel { job }),
    }
}

impl World {
    async fn prepare(&mut self, c: &mut Cursor<'_>) {
        for (which, role) in [(0, wire::Role::Scheduler), (1, wire::Role::Worker)] {
            self.connect();
            let hello = encode(&hello(c, role), 0);
            self.send(which, &hello, &[], usize::MAX).await;
        }
        let opened = encode(&open(c, 0), 0);
        self.send(0, &opened, &[], usize::MAX).await;
        self.register(c, 1, &small(), usize::MAX).await;
        self.pump(6).await;
    }

    async fn register(&mut self, c: &mut Cursor<'_>, which: usize, worker: &Worker, cut: usize) {
        let message = register::message_of(worker, c);
        let memory = register::memory(c, message.memory_bytes);
        let passed: Vec<OwnedFd> =
            memory.iter().map(|memory| memory.fd().try_clone_to_owned().expect("a descriptor")).collect();
        let announced = if c.rarely() { c.below(5) as u16 } else { passed.len() as u16 };
        self.send(which, &encode(&Message::Register(message), announced), &passed, cut).await;
    }

    async fn step(&mut self, c: &mut Cursor<'_>) {
        let which = c.below(self.peers.len().max(1));
        let cut = if c.rarely() { 1 + c.below(40) } else { usize::MAX };
        match c.below(14) {
            0 => self.connect(),
            1 => {
                let role = messages::role(c);
                let hello = encode(&hello(c, role), 0);
                self.send(which, &hello, &[], cut).await;
            }
            2 => {
                // Any message, with descriptors that are announced, or not.
                let message = messages::message(c);
                let passed: Vec<OwnedFd> = (0..c.below(4)).map(|_| self.pipe()).collect();
                let announced = if c.rarely() { c.below(7) as u16 } else { passed.len() as u16 };
                let mut bytes = encode(&message, 0);
                bytes[6..8].copy_from_slice(&announced.to_le_bytes());
                self.send(which, &bytes, &passed, cut).await;
            }
            3 => {
                let passed: Vec<OwnedFd> = (0..c.below(3)).map(|_| self.pipe()).collect();
                let bytes = c.blob(48);
                self.send(which, bytes, &passed, cut).await;
            }
            4 => {
                let worker = if c.flag() { small() } else { layout::worker(c) };
                if layout::is_small(&worker) {
                    self.register(c, which, &worker, cut).await;
                }
            }
            5 => {
                let group = c.below(3);
                let opened = encode(&open(c, group), 0);
                self.send(which, &opened, &[], cut).await;
            }
            6..=9 => {
                let message = encode(&request(c, &mut self.known), 0);
                self.send(which, &message, &[], cut).await;
                if c.flag() {
                    self.copies().await;
                }
            }
            10 => {
                let request = c.number();
                let message = if c.flag() {
                    Message::Unregister(wire::Unregister { request })
                } else {
                    Message::StatusQuery(wire::StatusQuery { request })
                };
                self.send(which, &encode(&message, 0), &[], cut).await;
            }
            11 => self.shared.driver.borrow_mut().tick(),
            12 if which < self.peers.len() => drop(self.peers.swap_remove(which)),
            _ => self.pump(2).await,
        }
    }

    /// All clients hang up, and their sessions end.
    async fn end(mut self) {
        self.pump(2).await;
        self.peers.clear();
        let begun = Instant::now();
        loop {
            tokio::task::yield_now().await;
            let sessions = self.shared.driver.borrow().session_count();
            if sessions == 0 && self.shared.greetings.get() == 0 && Rc::strong_count(&self.shared) == 1 {
                break;
            }
            assert!(begun.elapsed() < END_MAX, "{sessions} sessions do not end");
            if begun.elapsed() > Duration::from_millis(1) {
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
        }
        let counters = self.shared.driver.borrow().counters();
        assert_eq!(
            (counters.jobs, counters.leases, counters.leased_bytes),
            (0, 0, 0),
            "jobs, leases, leased bytes"
        );
        for mut reader in self.passed.drain(..) {
            // The end, and not a wait for one who still holds the other end.
            let flags = rustix::fs::fcntl_getfl(&reader).expect("flags");
            rustix::fs::fcntl_setfl(&reader, flags | rustix::fs::OFlags::NONBLOCK).expect("flags");
            assert_eq!(reader.read(&mut [0]).ok(), Some(0), "a descriptor that was passed is kept");
        }
        // Others go on.
        (self.began, self.known) = (0, Known::default());
        self.connect();
        let honest = encode(&hello(&mut Cursor::new(&[], 0), wire::Role::Scheduler), 0);
        self.send(0, &honest, &[], usize::MAX).await;
        while self.known.welcomes == 0 {
            assert!(begun.elapsed() < END_MAX, "a newcomer is not let in");
            self.pump(1).await;
        }
    }
}

/// Clients that send what they like, in pieces, with descriptors or without: the sidecar answers in frames, keeps no
/// descriptor, ends every session with nothing running, leased or pinned, and lets the next client in.
pub fn attach(data: &[u8]) {
    let mut c = Cursor::new(data, 4096);
    RUNTIME.with(|runtime| {
        let local = LocalSet::new();
        let story = async {
            let shared = shared();
            let (peers, passed) = (Vec::new(), Vec::new());
            let mut world = World { shared, peers, began: 0, known: Known::default(), passed };
            match c.flag() {
                true => world.prepare(&mut c).await,
                false => world.connect(),
            }
            for _ in 0..STEPS_MAX {
                if c.is_empty() {
                    break;
                }
                world.step(&mut c).await;
            }
            world.end().await;
        };
        runtime.block_on(local.run_until(story));
    });
}
