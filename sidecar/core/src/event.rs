//! What the core is told and what it wants done.

use std::sync::Arc;

use pillion_shm::presence::IndexKey;

use crate::{
    ids::{JobId, LeaseId, NamespaceId, NeighbourId, SessionId},
    key::{Namespace, Tenant},
    neighbours::{Lent, Question},
    ssd::{CacheMode, GetEnding, PutEnding, SsdRecord},
};

/// Tier bit of the presence table: in the host pool.
pub const TIER_HOST: u8 = 1;
/// Tier bit of the presence table: on the SSD.
pub const TIER_SSD: u8 = 2;

/// Who attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The engine's scheduler process: lookups and leases.
    Scheduler,
    /// An engine's worker process: memory and jobs.
    Worker,
    /// `pillion status` and the like.
    Observer,
    /// Another sidecar of this node, which borrows.
    Neighbour,
}

/// What the daemon found out about a worker's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// Blocks of the engine, which all groups share.
    pub num_blocks: u64,
    /// The engine's KV cache groups. Their index is this registration's own business.
    pub groups: Vec<Group>,
    /// How this engine's blocks are to be kept on the SSD; `None`: as the sidecar's others.
    pub cache_mode: Option<CacheMode>,
}

/// One KV cache group of a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Identity without tenant and epoch.
    pub namespace: Namespace,
    /// Bytes of one stored block.
    pub record_bytes: u64,
    /// Canonical description of a record; only equal ones are exchanged.
    pub format: Arc<str>,
    /// Records that ranks of another tensor-parallel size wrote: this worker holds a part of them, and cannot save them.
    pub load_only: bool,
}

/// Part of a lease: the next hashes are consecutive blocks of one group, granted up to the first that is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseRun {
    /// The group's namespace.
    pub space: NamespaceId,
    /// How many hashes.
    pub count: u32,
}

/// Part of a save: the next blocks are consecutive blocks of one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveRun {
    /// The group's namespace.
    pub space: NamespaceId,
    /// Hash of the block before the first one, where there is one that it must not outlive.
    pub parent: Option<[u8; 32]>,
    /// How many blocks.
    pub count: u32,
}

/// Part of a load: the next blocks are some of one run of the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadRun {
    /// Which run of the lease.
    pub run: u32,
    /// Its first block that is loaded.
    pub first: u32,
    /// The run's namespace: compared again.
    pub space: NamespaceId,
    /// How many blocks.
    pub count: u32,
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the engine into the pool.
    Save,
    /// From the pool into the engine.
    Load,
}

/// One block of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyItem {
    /// Index of the block's group in the worker's registration.
    pub group: u16,
    /// The engine's block id.
    pub block: u64,
    /// Whose pool: 0 for our own, else the number of the neighbour. Only loads have another's.
    pub pool: u32,
    /// Offset in the pool.
    pub offset: u64,
    /// Checksum that a load must find; unused for saves.
    pub checksum: u64,
}

/// How the copy of one block ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockOutcome {
    /// Copied; the checksum of the bytes in the pool.
    Copied(u64),
    /// The bytes in the pool are not those that were stored.
    Corrupt,
    /// The engine's memory could not be reached.
    Unreachable,
    /// Not tried: the job was cancelled before.
    Skipped,
}

/// How a job ended, for its worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Said before; this is about quiescence.
    AlreadyReported,
    /// Done.
    Done,
    /// Nothing of it may be used.
    Failed,
    /// Given up by its worker, or at the sidecar's drain.
    Cancelled,
}

/// Something that happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A client attached and was let in.
    Attached {
        /// Its session.
        session: SessionId,
        /// What it is.
        role: Role,
        /// The engine instance it belongs to.
        engine: Arc<str>,
        /// The user it runs as.
        uid: u32,
        /// The tenant that it may act for.
        tenant: Tenant,
    },
    /// Engines of this tenant are attached to a neighbour: what we have of it is lent.
    TenantServed {
        /// Which.
        tenant: Tenant,
    },
    /// Its connection ended, or it is to be dropped.
    Detached {
        /// Which.
        session: SessionId,
    },
    /// A scheduler named its namespace.
    OpenNamespace {
        /// Who.
        session: SessionId,
        /// Echoed in the answer.
        request: u64,
        /// Identity without tenant and epoch.
        namespace: Namespace,
        /// Empty or 16 bytes.
        epoch: Vec<u8>,
    },
    /// A worker's memory is mapped and its canary was right. Jobs of memory that it presented before are given up.
    Registered {
        /// Who.
        session: SessionId,
        /// What was registered.
        registration: Registration,
    },
    /// A worker's memory is about to go away: its jobs are given up.
    Unregister {
        /// Who.
        session: SessionId,
        /// Echoed in the answer.
        request: u64,
    },
    /// A scheduler asks for a lease of the leading blocks of every run.
    Lease {
        /// Who.
        session: SessionId,
        /// Echoed in the answer.
        request: u64,
        /// Which groups, and how the hashes divide between them.
        runs: Vec<LeaseRun>,
        /// Block hashes, run after run, in the prompt's order.
        hashes: Vec<[u8; 32]>,
    },
    /// Keeps a lease for another term.
    Renew {
        /// Who.
        session: SessionId,
        /// Which.
        lease: LeaseId,
    },
    /// Ends a lease, once no job runs under it.
    Release {
        /// Who.
        session: SessionId,
        /// Which.
        lease: LeaseId,
    },
    /// A worker asks to save blocks.
    Save {
        /// Who.
        session: SessionId,
        /// Job id.
        job: JobId,
        /// Which groups, and how the blocks divide between them.
        runs: Vec<SaveRun>,
        /// Hashes, run after run, in the prompt's order.
        hashes: Vec<[u8; 32]>,
        /// The engine's blocks, one per hash.
        blocks: Vec<u32>,
        /// Slot of the job word.
        word: u32,
        /// Tag of the job word.
        tag: u64,
        /// Deadline, ns of the core's clock.
        deadline_ns: u64,
        /// The worker's event that the copy must wait for on the device.
        event: Option<u32>,
    },
    /// A worker asks to load blocks under a lease.
    Load {
        /// Who.
        session: SessionId,
        /// Job id.
        job: JobId,
        /// The lease that its scheduler was granted.
        lease: LeaseId,
        /// Which parts of the lease, and how the blocks divide between them.
        runs: Vec<LoadRun>,
        /// Hashes, run after run: compared again.
        hashes: Vec<[u8; 32]>,
        /// The engine's blocks, one per hash.
        blocks: Vec<u32>,
        /// Deadline, ns of the core's clock.
        deadline_ns: u64,
        /// The worker's event that the copy must wait for on the device.
        event: Option<u32>,
    },
    /// A worker gives a job up.
    Cancel {
        /// Who.
        session: SessionId,
        /// Which.
        job: JobId,
    },
    /// A copy ended; nothing of it touches memory any more.
    CopyDone {
        /// Whose.
        session: SessionId,
        /// Which.
        job: JobId,
        /// One per item of the copy.
        blocks: Vec<BlockOutcome>,
    },
    /// The answer to [`Action::TryPublish`].
    PublishTried {
        /// Whose.
        session: SessionId,
        /// Which.
        job: JobId,
        /// Whether the word was won.
        won: bool,
    },
    /// Records that recovery found on the SSD.
    SsdFound {
        /// Those.
        records: Vec<SsdRecord>,
    },
    /// The end of an [`Action::SsdPut`].
    SsdPutEnded {
        /// The action's.
        token: u64,
        /// How.
        ending: PutEnding,
    },
    /// The end of an [`Action::SsdGet`]; nothing of it touches the pool any more.
    SsdGetEnded {
        /// The action's.
        token: u64,
        /// How.
        ending: GetEnding,
    },
    /// A record is not on the SSD any more.
    SsdDropped {
        /// Its key's bytes.
        key: [u8; 32],
    },
    /// Another sidecar of this node lends to us from now on.
    NeighbourCame {
        /// Which.
        neighbour: NeighbourId,
        /// How long its leases last.
        lease_ns: u64,
    },
    /// It does not any more; what it lent may change.
    NeighbourWent {
        /// Which.
        neighbour: NeighbourId,
    },
    /// An answer to some of the questions of [`Action::AskNeighbours`]. Each is answered once.
    NeighbourAnswered {
        /// The keys that are answered.
        keys: Vec<[u8; 32]>,
        /// Who lends, under which lease of its own, and what, key by key. `None`: nobody does.
        lent: Option<(NeighbourId, LeaseId, Vec<Option<Lent>>)>,
    },
    /// Another sidecar wants to borrow.
    Borrow {
        /// Who.
        session: SessionId,
        /// Echoed in the answer.
        request: u64,
        /// Block keys' bytes.
        keys: Vec<[u8; 32]>,
    },
    /// Another sidecar found a borrowed record to be damaged.
    Damaged {
        /// Who.
        session: SessionId,
        /// Its key's bytes.
        key: [u8; 32],
        /// Where it was read.
        offset: u64,
    },
    /// Time passes.
    Tick,
    /// Stop taking work.
    Drain,
}

/// Something to do. Actions are carried out in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Answer to [`Event::OpenNamespace`].
    NamespaceOpened {
        /// To whom.
        session: SessionId,
        /// Its request.
        request: u64,
        /// The id.
        id: NamespaceId,
    },
    /// Answer to [`Event::Lease`]; where no block was granted it comes without a lease.
    Leased {
        /// To whom.
        session: SessionId,
        /// Its request.
        request: u64,
        /// The lease.
        lease: LeaseId,
        /// Leading blocks of each run that it covers.
        blocks: Vec<u32>,
    },
    /// Copy these blocks and answer with [`Event::CopyDone`].
    Copy {
        /// Whose memory.
        session: SessionId,
        /// For which job.
        job: JobId,
        /// Which way.
        direction: Direction,
        /// The blocks.
        items: Vec<CopyItem>,
        /// As the job said.
        event: Option<u32>,
    },
    /// Answer to [`Event::Unregister`]: no copy of this session runs any more, its memory may be unmapped.
    Unregistered {
        /// Who.
        session: SessionId,
        /// Its request.
        request: u64,
    },
    /// Stop a copy at the next block; [`Event::CopyDone`] still follows.
    CancelCopy {
        /// Whose.
        session: SessionId,
        /// Which.
        job: JobId,
    },
    /// Try to win a save's word and answer with [`Event::PublishTried`] before anything else.
    TryPublish {
        /// Whose.
        session: SessionId,
        /// Which.
        job: JobId,
        /// Slot of the word.
        word: u32,
        /// Its tag.
        tag: u64,
    },
    /// Report into the worker's ring.
    Complete {
        /// To whom.
        session: SessionId,
        /// Which job.
        job: JobId,
        /// How it ended.
        outcome: Outcome,
        /// Nothing of it touches the engine's memory any more.
        quiesced: bool,
        /// Blocks loaded or newly stored.
        blocks: u32,
    },
    /// A block can be found from now on, or lies elsewhere.
    TableSet {
        /// In whose table.
        tenant: Arc<str>,
        /// Its key.
        key: IndexKey,
        /// [`TIER_HOST`], [`TIER_SSD`] or both.
        tiers: u8,
    },
    /// A block is gone.
    TableRemove {
        /// From whose table.
        tenant: Arc<str>,
        /// Its key.
        key: IndexKey,
    },
    /// Write a record to the SSD from where it lies in the pool, and answer with [`Event::SsdPutEnded`].
    SsdPut {
        /// Names it.
        token: u64,
        /// What it is.
        record: Box<SsdRecord>,
        /// Where it lies in the pool.
        offset: u64,
        /// Whether it is to be on stable storage when it has ended.
        durable: bool,
    },
    /// Read a record from the SSD into the pool, and answer with [`Event::SsdGetEnded`].
    SsdGet {
        /// Names it.
        token: u64,
        /// The key's bytes.
        key: [u8; 32],
        /// Where it is to lie in the pool; what it lacks to whole sectors may be written, too.
        offset: u64,
        /// Its length.
        bytes: u64,
    },
    /// Look these up in the neighbours' tables, ask those that have them, and answer each one with
    /// [`Event::NeighbourAnswered`].
    AskNeighbours {
        /// What is wanted.
        questions: Vec<Question>,
    },
    /// Keep a lease at a neighbour for another term.
    RenewAt {
        /// Whose.
        neighbour: NeighbourId,
        /// Which.
        lease: LeaseId,
    },
    /// End a lease at a neighbour.
    Return {
        /// Whose.
        neighbour: NeighbourId,
        /// Which.
        lease: LeaseId,
    },
    /// Tell a neighbour that a record's bytes are not those that were stored.
    SayDamaged {
        /// Whose.
        neighbour: NeighbourId,
        /// Its key's bytes.
        key: [u8; 32],
        /// Where it was read.
        offset: u64,
    },
    /// Answer to [`Event::Borrow`]; where nothing is lent it comes without a lease.
    Lent {
        /// To whom.
        session: SessionId,
        /// Its request.
        request: u64,
        /// The lease.
        lease: LeaseId,
        /// Key by key.
        records: Vec<Option<Lent>>,
    },
    /// No copy of this session runs any more and none will: its memory may be unmapped.
    SessionEnded {
        /// Which.
        session: SessionId,
    },
    /// The client did what no correct client does; say so and count it.
    ProtocolError {
        /// Who.
        session: SessionId,
        /// What was expected and what came.
        text: String,
    },
    /// Everything has ended: the process may exit.
    Drained,
}
