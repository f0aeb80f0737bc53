//! What the client of an engine makes of a hostile sidecar.

use std::{
    collections::HashMap,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
    time::Duration,
};

use pillion_client::{LoadJob, LoadRun, Options, Outcome, SaveJob, SaveRun, SchedulerClient, WorkerClient};
use pillion_protocol::{MAJOR, Message, frame::encode, wire};
use pillion_shm::{Memfd, Seal, fds, presence::TableWriter, ring::RingWriter, words::JobWords};

use crate::{cursor::Cursor, messages};

fn options() -> Options {
    let fields = vec![("model".to_owned(), "m".to_owned())];
    Options {
        socket: "/nowhere".into(),
        engine_id: "e".into(),
        tenant: "default".into(),
        namespaces: vec![fields],
        launch: Vec::new(),
        // The peer is this very process, which nobody is to kill.
        grace: Duration::from_secs(1 << 20),
    }
}

fn welcome(c: &mut Cursor<'_>, slots: u32) -> wire::Welcome {
    wire::Welcome {
        major: MAJOR,
        minor: c.u16(),
        session: 1,
        generation: vec![1; 16],
        index_seed: 0,
        heartbeat_ms: c.number32(),
        lease_ms: c.number32(),
        stale_ms: 1000,
        ring_slots: if c.rarely() { c.number32() } else { slots },
        word_slots: if c.rarely() { c.number32() } else { slots },
        server_version: "x".into(),
        device: "d".into(),
        pool_bytes: 0,
    }
}

/// The tables that belong to a welcome, in their order, now and then others.
struct Tables {
    table: TableWriter,
    ring: RingWriter,
    words: Arc<JobWords>,
    odd: Memfd,
}

impl Tables {
    fn new(slots: u32) -> Self {
        let words = Arc::new(JobWords::create(slots).expect("words"));
        let odd = Memfd::create("odd", 64).expect("memory");
        odd.seal(Seal::SizeAndFutureWrites).expect("seals");
        Self {
            table: TableWriter::create(8).expect("a table"),
            ring: RingWriter::create(slots, Arc::clone(&words)).expect("a ring"),
            words,
            odd,
        }
    }

    fn passed(&self, c: &mut Cursor<'_>, worker: bool) -> Vec<OwnedFd> {
        let words = self.words.memfd().expect("made here");
        let mut all = vec![self.table.memfd()];
        if worker {
            all.extend([self.ring.memfd(), words]);
        }
        for one in &mut all {
            if c.rarely() {
                *one = &self.odd;
            }
        }
        if c.rarely() {
            all.pop();
        }
        all.iter().map(|one| one.fd().try_clone_to_owned().expect("a descriptor")).collect()
    }
}

/// The stream of a sidecar: what it answers to the hello, then anything.
fn stream(c: &mut Cursor<'_>, tables: &Tables, slots: u32, worker: bool) -> Vec<(Vec<u8>, Vec<OwnedFd>)> {
    let mut out = Vec::new();
    if !c.rarely() {
        let fds = tables.passed(c, worker);
        let announced = if c.rarely() { c.below(5) as u16 } else { fds.len() as u16 };
        out.push((encode(&Message::Welcome(welcome(c, slots)), announced), fds));
    }
    for _ in 0..c.below(12) {
        let fds = if c.rarely() { tables.passed(c, true) } else { Vec::new() };
        let message = match c.below(6) {
            0 => Message::NamespaceOpened(wire::NamespaceOpened {
                request: c.below(3) as u64,
                id: vec![c.byte(); 16],
            }),
            1 => Message::Registered(wire::Registered { request: c.below(3) as u64, record_bytes: vec![64] }),
            2 => {
                let blocks = c.some(3, |c| c.number32());
                Message::Leased(wire::Leased {
                    request: c.below(3) as u64,
                    lease: vec![c.byte(); 16],
                    blocks,
                })
            }
            3 => Message::NeighbourTable(wire::NeighbourTable {
                neighbour: c.below(3) as u64,
                tenant: "default".into(),
                stale_ms: 1000,
                device: "n".into(),
            }),
            4 => {
                out.push((c.blob(40).to_vec(), fds));
                continue;
            }
            _ => messages::message(c),
        };
        out.push((encode(&message, fds.len() as u16), fds));
    }
    out
}

/// A connected pair: ours is nonblocking, theirs has said all of it, and goes on listening.
fn said(c: &mut Cursor<'_>, parts: Vec<(Vec<u8>, Vec<OwnedFd>)>) -> (OwnedFd, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    ours.set_nonblocking(true).expect("a flag");
    let cut = if c.flag() { 1 + c.below(64) } else { usize::MAX };
    for (bytes, passed) in parts {
        let mut passed: Vec<_> = passed.iter().map(AsFd::as_fd).collect();
        for piece in bytes.chunks(cut) {
            let sent = fds::send(&theirs, piece, &passed);
            passed.clear();
            // The rest of a long stream is cut off, as by a sidecar that dies.
            if sent != Ok(piece.len()) {
                break;
            }
        }
    }
    theirs.shutdown(std::net::Shutdown::Write).expect("a shutdown");
    (ours.into(), theirs)
}

/// An engine's client reads any stream to its end. Its answers to the engine stay within what was asked, and each job
/// that was submitted ends once, whatever the sidecar has said.
pub fn client(data: &[u8]) {
    let mut c = Cursor::new(data, 4096);
    let (worker, slots) = (c.flag(), 1 << c.below(5));
    let mut tables = Tables::new(slots);
    let parts = stream(&mut c, &tables, slots, worker);
    let (socket, _theirs) = said(&mut c, parts);
    let hashes: Vec<u8> = (0..4u8).flat_map(|n| [n; 32]).collect();
    if worker {
        return jobs(&mut c, &mut tables, socket, &hashes);
    }
    let look = |client: &SchedulerClient| {
        assert!(client.lookup(0, &hashes) <= 4 && client.lookup(1, &hashes) == 0);
        assert_eq!(client.present(0, &hashes).len(), 4);
        assert!(client.absent(0, &hashes).iter().all(|index| *index < 4));
        let ticket = client.lease(&[(0, &hashes), (0, &hashes[..32])]);
        let _ = client.lease_poll(ticket, Duration::ZERO);
        client.new_epoch(1);
        assert!(client.namespace_ids().is_none(), "an epoch begins without a namespace");
        client.release(ticket);
        let _ = (client.status(), client.counters(), client.neighbours(), client.device());
    };
    let (client, why) = SchedulerClient::once(options(), socket, look).expect("descriptors");
    assert!(!why.is_empty());
    assert_eq!(client.lookup(0, &hashes), 0, "a connection that is gone has no hits");
}

fn jobs(c: &mut Cursor<'_>, tables: &mut Tables, socket: OwnedFd, hashes: &[u8]) {
    let mut submitted: HashMap<[u8; 16], (u32, u32)> = HashMap::new();
    let mut ended = Vec::new();
    let look = |client: &WorkerClient| {
        for n in 0..c.below(6) as u8 {
            let (job, space) = ([n; 16], [1; 16]);
            submitted.insert(job, (0, 0));
            let (hashes, blocks, deadline) =
                (hashes.to_vec(), vec![0, 1, 2, 3], Duration::from_secs(u64::from(c.byte() % 2)));
            if c.flag() {
                let runs = vec![SaveRun { space, parent: None, count: 4 }];
                client.submit_save(SaveJob { job, runs, hashes, blocks, deadline, stream: None });
            } else {
                let runs = vec![LoadRun { space, run: 0, first: 0, count: 4 }];
                let lease = [2; 16];
                client.submit_load(LoadJob { job, lease, runs, hashes, blocks, deadline, stream: None });
            }
            // What the ring says: of this job, of another, whatever outcome, as often as it likes.
            for _ in 0..c.below(4) {
                let outcome = *c.pick(&[Outcome::None, Outcome::Done, Outcome::Failed, Outcome::Cancelled]);
                let job = [c.byte() % 6; 16];
                let completion =
                    pillion_shm::ring::Completion { job, outcome, quiesced: c.flag(), blocks: c.number32() };
                let _ = tables.ring.push(completion);
            }
            if c.flag() {
                ended.extend(client.poll());
            }
        }
        ended.extend(client.poll());
        let _ = (client.status(), client.counters());
    };
    let (client, why) = WorkerClient::once(options(), socket, look).expect("descriptors");
    assert!(!why.is_empty());
    ended.extend(client.poll());
    for event in ended {
        let (outcomes, quiesced) = submitted.get_mut(&event.job).expect("a job that was submitted");
        *outcomes += u32::from(event.outcome != Outcome::None);
        *quiesced += u32::from(event.quiesced);
    }
    for (job, (outcomes, quiesced)) in &submitted {
        assert_eq!(*outcomes, 1, "job {job:?} ended {outcomes} times");
        assert!(*quiesced <= 1, "job {job:?} was quiet {quiesced} times");
    }
    let open = submitted.values().filter(|(_, quiesced)| *quiesced == 0).count();
    assert_eq!(client.unquiesced(), open, "jobs that are not quiet are known");
}
