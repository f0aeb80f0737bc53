//! One directory's files, as operations that are submitted and complete.

pub mod directory;
#[cfg(any(test, feature = "faulty"))]
pub mod faulty;
pub mod threads;
pub mod uring;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    format::Superblock,
    memory::{Aligned, Extent},
};

/// A piece of memory of an operation. Owned ones belong to the device until the completion.
#[derive(Debug)]
pub enum Part {
    /// Of the host pool.
    Pool(Extent),
    /// A buffer that comes back with the completion.
    Owned(Aligned),
}

impl Part {
    /// Its length.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Pool(extent) => extent.bytes,
            Self::Owned(buffer) => buffer.len() as u64,
        }
    }
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Make the segment file with its full length on the disk, durably. Waited for: rare.
    Prepare,
    /// Read into the parts.
    Read,
    /// Write the parts.
    Write,
    /// Everything that was written to this file and completed is on stable storage when this completes.
    Sync,
}

/// An operation on one segment file. Offsets and lengths are whole sectors.
#[derive(Debug)]
pub struct Op {
    /// Names it in its completion.
    pub ticket: u64,
    /// The file's number.
    pub slot: u32,
    /// What to do.
    pub what: What,
    /// Where in the file.
    pub at: u64,
    /// From or into which memory.
    pub parts: Vec<Part>,
}

impl Op {
    /// Bytes that have to be moved: not one less, not one more.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(Part::bytes).sum()
    }
}

/// What an operation came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// The kernel's answer.
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    Os(i32),
    /// Not as many bytes as were asked for: success is an exact length.
    #[error("expected {expected} bytes, the device moved {came}")]
    Length {
        /// Asked for.
        expected: u64,
        /// Came.
        came: u64,
    },
}

impl IoError {
    /// Whether the disk is full, or the process has too many files open: the disk is not to blame.
    pub fn is_no_space(self) -> bool {
        // ENOSPC, EDQUOT; EMFILE, ENFILE
        matches!(self, Self::Os(28 | 122 | 23 | 24))
    }
}

/// The end of an operation.
#[derive(Debug)]
pub struct Completion {
    /// The operation's.
    pub ticket: u64,
    /// Exactly all bytes, or not.
    pub result: Result<(), IoError>,
    /// The parts that it was given.
    pub parts: Vec<Part>,
}

impl Completion {
    /// Judges a byte count: the exact-length rule.
    pub fn judge(op: Op, moved: Result<u64, i32>) -> Self {
        let expected = op.bytes();
        let result = match moved {
            Ok(came) if came == expected => Ok(()),
            Ok(came) => Err(IoError::Length { expected, came }),
            Err(errno) => Err(IoError::Os(errno)),
        };
        Self { ticket: op.ticket, result, parts: op.parts }
    }
}

/// How much of the pool an engine has registered with the kernel. It grows for a while after the start; requests go
/// to the rest of the pool by its address.
#[derive(Debug, Default)]
pub struct Registered {
    bytes: AtomicU64,
    /// 0: nothing was refused.
    refused: AtomicI32,
}

impl Registered {
    /// From the pool's start on.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Why there will be no more: the kernel's answer. For users other than root that is most often ENOMEM: their
    /// RLIMIT_MEMLOCK is shorter than the pool.
    pub fn refused(&self) -> Option<io::Error> {
        let errno = self.refused.load(Ordering::Relaxed);
        (errno != 0).then(|| io::Error::from_raw_os_error(errno))
    }

    fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed) != 0
    }

    fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn refuse(&self, error: &io::Error) {
        // EIO
        self.refused.store(error.raw_os_error().unwrap_or(5), Ordering::Relaxed);
    }
}

/// Wakes a thread that waits for completions.
pub trait Wake: Send + Sync {
    /// Ends the current or the next wait.
    fn wake(&self);
}

/// A directory that does operations. One owner.
pub trait Device {
    /// Which engine this is, for logs and metrics.
    fn engine(&self) -> &'static str;
    /// Whose directory.
    fn superblock(&self) -> Superblock;
    /// Numbers of the segment files that are there.
    fn slots(&self) -> Vec<u32>;
    /// Operations that may be in flight at once. The caller keeps to it.
    fn depth(&self) -> usize;
    /// Takes an operation. It starts with the next `start` or `wait`, at the latest.
    fn submit(&mut self, op: Op);
    /// Starts what was taken: whoever has other things to do before it waits.
    fn start(&mut self) {}
    /// Waits for completions, at most so long; returns at once if there are some. Without operations in
    /// flight it waits for the time, or for `wake`.
    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Completion>);
    /// Something that ends a wait from another thread.
    fn waker(&self) -> Arc<dyn Wake>;
    /// What of the pool is registered, where the engine registers it.
    fn registered(&self) -> Option<Arc<Registered>> {
        None
    }
}
