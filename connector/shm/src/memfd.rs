//! Sealed anonymous memory and its mappings.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::{
    fs::{MemfdFlags, SealFlags},
    io::Errno,
};

use crate::mapping::Mapping;

/// Why shared memory could not be made or mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShmError {
    /// A system call failed.
    #[error("{call} failed: {errno}")]
    System {
        /// Which call.
        call: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
    /// The peer could still change the size of what we would map.
    #[error("expected a memfd with seals {expected}, got {found}: seal it before passing it on")]
    NotSealed {
        /// Seals that were needed.
        expected: String,
        /// Seals that were there.
        found: String,
    },
    /// The size is not what both sides agreed on.
    #[error("expected {expected} bytes of shared memory, got {found}")]
    Size {
        /// Bytes that were needed.
        expected: u64,
        /// Bytes that were there.
        found: u64,
    },
    /// A table that no peer of ours makes.
    #[error("expected shared {what} of 1 to {limit} slots, got {got}")]
    Slots {
        /// Which table.
        what: &'static str,
        /// The most there may be.
        limit: u32,
        /// What the peer says.
        got: u32,
    },
    /// The content does not begin as it should.
    #[error("shared {what} is not one of ours: expected magic {expected:#x}, got {found:#x}")]
    Magic {
        /// Which table.
        what: &'static str,
        /// The magic of this version.
        expected: u64,
        /// What was there.
        found: u64,
    },
}

pub(crate) fn system(call: &'static str) -> impl Fn(Errno) -> ShmError {
    move |errno| ShmError::System { call, errno }
}

/// How strongly a memfd is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seal {
    /// Nobody can change the size any more.
    Size,
    /// Nor can anybody make a new writable mapping: existing ones (ours) stay writable.
    SizeAndFutureWrites,
}

impl Seal {
    fn flags(self) -> SealFlags {
        let size = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        match self {
            Self::Size => size,
            Self::SizeAndFutureWrites => size | SealFlags::FUTURE_WRITE,
        }
    }
}

/// Anonymous memory behind a file descriptor.
#[derive(Debug)]
pub struct Memfd {
    fd: OwnedFd,
    bytes: u64,
}

impl Memfd {
    /// New zeroed memory. `name` shows up in /proc only.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(name: &str, bytes: u64) -> Result<Self, ShmError> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(system("memfd_create"))?;
        rustix::fs::ftruncate(&fd, bytes).map_err(system("ftruncate"))?;
        Ok(Self { fd, bytes })
    }

    /// New zeroed memory of 2 MiB pages that the administrator set aside; `bytes` must be a multiple of that.
    ///
    /// # Errors
    /// What the kernel says: not enough such pages, most likely.
    pub fn create_huge(name: &str, bytes: u64) -> Result<Self, ShmError> {
        let huge = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | huge)
            .map_err(system("memfd_create"))?;
        rustix::fs::ftruncate(&fd, bytes).map_err(system("ftruncate"))?;
        Ok(Self { fd, bytes })
    }

    /// Takes over a memfd from a peer, if it carries at least these seals and exactly this size.
    ///
    /// # Errors
    /// [`ShmError::NotSealed`] or [`ShmError::Size`].
    pub fn adopt(fd: OwnedFd, seal: Seal, bytes: u64) -> Result<Self, ShmError> {
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(system("fcntl(F_GET_SEALS)"))?;
        if !seals.contains(seal.flags()) {
            return Err(ShmError::NotSealed {
                expected: format!("{:?}", seal.flags()),
                found: format!("{seals:?}"),
            });
        }
        let found = rustix::fs::fstat(&fd).map_err(system("fstat"))?.st_size as u64;
        if found != bytes {
            return Err(ShmError::Size { expected: bytes, found });
        }
        Ok(Self { fd, bytes })
    }

    /// Seals it. Make writable mappings first where future writes are sealed.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn seal(&self, seal: Seal) -> Result<(), ShmError> {
        rustix::fs::fcntl_add_seals(&self.fd, seal.flags()).map_err(system("fcntl(F_ADD_SEALS)"))
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The descriptor, to be passed on.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Maps all of it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn map(&self, access: Access) -> Result<Mapping, ShmError> {
        Mapping::new(self, access)
    }
}

/// What a mapping is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads only.
    Read,
    /// Reads and writes.
    ReadWrite,
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn unsealed_or_wrong_sized_memory_is_refused() {
        let open = Memfd::create("t", 4096).unwrap();
        let copy = open.fd().try_clone_to_owned().unwrap();
        assert!(matches!(Memfd::adopt(copy, Seal::Size, 4096), Err(ShmError::NotSealed { .. })));
        open.seal(Seal::Size).unwrap();
        let copy = open.fd().try_clone_to_owned().unwrap();
        assert!(matches!(Memfd::adopt(copy, Seal::Size, 8192), Err(ShmError::Size { found: 4096, .. })));
        let copy = open.fd().try_clone_to_owned().unwrap();
        assert!(Memfd::adopt(copy, Seal::Size, 4096).is_ok());
        assert!(rustix::fs::ftruncate(open.fd(), 0).is_err(), "a sealed memfd cannot shrink");
    }

    #[test]
    fn sealed_against_future_writes_a_new_writable_mapping_is_refused() {
        let memfd = Memfd::create("t", 4096).unwrap();
        let ours = memfd.map(Access::ReadWrite).unwrap();
        memfd.seal(Seal::SizeAndFutureWrites).unwrap();
        assert!(memfd.map(Access::ReadWrite).is_err());
        let theirs = memfd.map(Access::Read).unwrap();
        ours.words()[3].store(7, std::sync::atomic::Ordering::Release);
        assert_eq!(theirs.words()[3].load(std::sync::atomic::Ordering::Acquire), 7);
    }

    #[test]
    fn a_file_that_is_no_memfd_is_refused() {
        let file = std::fs::File::open("/dev/zero").unwrap();
        assert!(Memfd::adopt(file.into(), Seal::Size, 4096).is_err());
    }
}
