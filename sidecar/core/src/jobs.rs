//! Jobs: each ends once and quiesces once.

use crate::{
    event::Direction,
    ids::{JobId, LeaseId, SessionId},
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
        }
    }
}

/// A job is known by its session and its id.
pub(crate) type JobKey = (SessionId, JobId);
