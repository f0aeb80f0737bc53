//! Jobs: each ends once and quiesces once.

use crate::{
    event::{CopyItem, Direction},
    ids::{JobId, LeaseId, SessionId},
    ssd::CacheMode,
    store::RecordId,
};

#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) direction: Direction,
    /// Saves: records being written. Loads: records being read, pinned by the lease.
    pub(crate) records: Vec<RecordId>,
    pub(crate) lease: Option<LeaseId>,
    pub(crate) word: u32,
    pub(crate) tag: u64,
    pub(crate) deadline_ns: u64,
    /// The outcome was reported before the copy ended (deadline), or nobody is left to tell.
    pub(crate) reported: bool,
    /// Given up: nothing of it is published or counted as loaded.
    pub(crate) cancelled: bool,
    /// Of its worker's registrations: whose memory it touches.
    pub(crate) registration: u64,
    /// Checksums of a finished save, waiting for its word.
    pub(crate) checksums: Vec<u64>,
    /// Writes to stable storage that its acknowledgement waits for, and whether one has failed.
    pub(crate) writes_left: usize,
    /// See `writes_left`.
    pub(crate) writes_failed: bool,
    /// How a save's blocks are kept on the SSD.
    pub(crate) mode: CacheMode,
    /// How a load gets on.
    pub(crate) progress: Progress,
}

/// A load whose records come from the SSD is copied piece by piece, one at a time, as they come.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Tells it from others of its id.
    pub(crate) serial: u64,
    /// The engine's event that each piece waits for.
    pub(crate) event: Option<u32>,
    /// Blocks whose records have not come yet.
    pub(crate) awaited: usize,
    /// Blocks whose records are there, to be copied next.
    pub(crate) ready: Vec<(RecordId, CopyItem)>,
    /// What is being copied.
    pub(crate) piece: Vec<RecordId>,
    /// Blocks that have been copied.
    pub(crate) loaded: u32,
    /// A block will not come: nothing more is copied.
    pub(crate) failed: bool,
}

impl Job {
    /// One that has just begun, without lease or word.
    pub(crate) fn new(direction: Direction, records: Vec<RecordId>, deadline_ns: u64) -> Self {
        Self {
            direction,
            records,
            lease: None,
            word: 0,
            tag: 0,
            deadline_ns,
            reported: false,
            cancelled: false,
            registration: 0,
            checksums: Vec::new(),
            writes_left: 0,
            writes_failed: false,
            mode: CacheMode::default(),
            progress: Progress::default(),
        }
    }
}

/// A job is known by its session and its id.
pub(crate) type JobKey = (SessionId, JobId);
