//! What can go wrong, by kind.

use std::{io, path::PathBuf};

use crate::{device::IoError, format::Refused};

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The kernel says no.
    #[error("{path}: cannot {doing}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It has files and none of them says that it is ours. Nothing was touched.
    #[error(
        "{path}: holds `{found}` and no `pillion-ssd` file: not a directory of this tier, left as it is; give an empty one"
    )]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// One of the files there.
        found: String,
    },
    /// Its superblock is damaged or of another version. Nothing was touched.
    #[error("{path}: {source}; left as it is")]
    Refused {
        /// The superblock.
        path: PathBuf,
        /// Why.
        source: Refused,
    },
    /// Another process uses it.
    #[error("{path}: in use by another process: one directory serves one sidecar")]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// The file system does no direct I/O.
    #[error(
        "{path}: the file system refuses direct I/O (O_DIRECT): use one on a local disk (ext4, xfs), not an overlay or network one"
    )]
    NoDirectIo {
        /// A file of it.
        path: PathBuf,
    },
    /// A setting cannot be met.
    #[error("{what}: expected {expected}, got {got}")]
    Setting {
        /// Which.
        what: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        got: u64,
    },
    /// Reading a segment failed while recovering.
    #[error("recovery: {0}")]
    Recovery(#[from] IoError),
}

/// Why a put was not taken, or did not end well. The record is not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PutError {
    /// Too many are waiting: try later, or not at all.
    #[error("the write queue is full")]
    Busy,
    /// A put of the same key is being written.
    #[error("a record with this key is being written")]
    BeingWritten,
    /// The record cannot be stored at all.
    #[error("{0}")]
    Record(Refused),
    /// Longer than what a segment holds.
    #[error("record of {bytes} bytes, a segment holds {max}: raise the segment length")]
    TooLong {
        /// Its length on the disk.
        bytes: u64,
        /// What fits.
        max: u64,
    },
    /// The extent is not inside the pool, or not on whole sectors.
    #[error("the extent is not a part of the pool, or not aligned to 4096 bytes")]
    Extent,
    /// All directories are read-only after too many errors.
    #[error("no directory takes writes any more: see the errors before")]
    ReadOnly,
    /// No segment could be freed.
    #[error("no room: no segment could be freed")]
    NoRoom,
    /// The write, or the sync that was to make it durable, failed.
    #[error("not stored: {0}")]
    Io(IoError),
}

/// Why a get gave nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GetError {
    /// Not here.
    #[error("no such record")]
    Missing,
    /// Too many are waiting.
    #[error("the read queue is full")]
    Busy,
    /// The extent is not inside the pool, not aligned, or not as long as the record.
    #[error("the extent is not the record's length ({expected} bytes) inside the pool")]
    Extent {
        /// The record's length.
        expected: u64,
    },
    /// The read failed. The record is dropped.
    #[error("cannot be read: {0}")]
    Io(IoError),
    /// What was read is not the record. It is dropped.
    #[error("not proved: {0}")]
    Corrupt(Refused),
}
