//! Memory that several processes can map: a memfd whose name says what it is.

use std::{
    fs,
    hash::{BuildHasher, Hasher, RandomState},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use cudarc::driver::sys::CUresult;
use rustix::{
    fs::{MemfdFlags, Mode, OFlags},
    mm::{MapFlags, ProtFlags},
};

use crate::errors::Outcome;

/// Pages of the host.
pub(crate) const PAGE: usize = 4096;

/// Free addresses before and after a mapping.
const GUARD: usize = 1 << 20;

/// What the name of a memfd says: `pfc-<kind>-<device>-<nonce>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    /// `mem` (cuMemAlloc), `vmm` (cuMemCreate) or `evt`.
    pub(crate) kind: String,
    /// Physical device.
    pub(crate) device: usize,
    /// Tells it from another object that has been given the same descriptor number.
    pub(crate) nonce: u64,
}

impl Name {
    fn parse(link: &Path) -> Option<Self> {
        let name = link.to_str()?.strip_prefix("/memfd:pfc-")?.strip_suffix(" (deleted)")?;
        let mut parts = name.split('-');
        let (kind, device, nonce) = (parts.next()?, parts.next()?, parts.next()?);
        let (device, nonce) = (device.parse().ok()?, u64::from_str_radix(nonce, 16).ok()?);
        Some(Self { kind: kind.to_owned(), device, nonce })
    }
}

/// A memfd.
#[derive(Debug)]
pub(crate) struct Object {
    file: OwnedFd,
    pub(crate) name: Name,
    /// A whole number of pages.
    pub(crate) bytes: usize,
}

impl Object {
    /// New memory of at least `bytes`, all zero.
    pub(crate) fn new(kind: &str, device: usize, bytes: usize) -> Outcome<Self> {
        let nonce = RandomState::new().build_hasher().finish();
        let bytes = bytes.checked_next_multiple_of(PAGE).ok_or(CUresult::CUDA_ERROR_OUT_OF_MEMORY)?;
        let file = rustix::fs::memfd_create(format!("pfc-{kind}-{device}-{nonce:016x}"), MemfdFlags::CLOEXEC)
            .and_then(|file| rustix::fs::ftruncate(&file, bytes as u64).map(|()| file))
            .map_err(|_| CUresult::CUDA_ERROR_OUT_OF_MEMORY)?;
        Ok(Self { file, name: Name { kind: kind.to_owned(), device, nonce }, bytes })
    }

    /// The object behind a descriptor of this process, which stays the caller's.
    pub(crate) fn adopt(fd: BorrowedFd<'_>) -> Outcome<Self> {
        let file = fd.try_clone_to_owned().map_err(|_| CUresult::CUDA_ERROR_INVALID_VALUE)?;
        Self::of(file).ok_or(CUresult::CUDA_ERROR_INVALID_VALUE)
    }

    /// The object behind a descriptor of another process. None: that process is gone, has closed it, has
    /// reused the number, or is not ours to look into.
    pub(crate) fn open(pid: u32, fd: i32, name: &Name) -> Option<Self> {
        let path = format!("/proc/{pid}/fd/{fd}");
        // Looked at first: opening a pipe that has been given the number could block.
        if Name::parse(&fs::read_link(&path).ok()?).as_ref() != Some(name) {
            return None;
        }
        let file = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).ok()?;
        Self::of(file).filter(|object| object.name == *name)
    }

    fn of(file: OwnedFd) -> Option<Self> {
        let name = Name::parse(&fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?)?;
        let bytes = usize::try_from(rustix::fs::fstat(&file).ok()?.st_size).ok()?;
        Some(Self { file, name, bytes })
    }

    /// Its descriptor in this process.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Maps all of it, anywhere, between two guards that nothing can be found at: who runs over the end
    /// shall not hit what happens to lie there.
    pub(crate) fn map(&self) -> Outcome<u64> {
        let base = reserve(None, self.bytes + 2 * GUARD)? + GUARD as u64;
        self.map_over(base, self.bytes, 0, ProtFlags::READ | ProtFlags::WRITE)?;
        Ok(base)
    }

    /// Ends what [`Object::map`] began.
    pub(crate) fn unmap(&self, base: u64) {
        unmap(base - GUARD as u64, self.bytes + 2 * GUARD);
    }

    /// Maps a part of it over addresses that belong to a reservation.
    pub(crate) fn map_over(&self, base: u64, bytes: usize, offset: usize, access: ProtFlags) -> Outcome {
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the caller owns the addresses, and nothing but its reservation is there.
        let done =
            unsafe { rustix::mm::mmap(pointer(base), bytes, access, flags, &self.file, offset as u64) };
        done.map(drop).map_err(|_| CUresult::CUDA_ERROR_MAP_FAILED)
    }
}

/// An address of this process.
pub(crate) fn pointer<T>(address: u64) -> *mut T {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

/// Takes addresses that nothing can be found at: a reservation, or a hole in one.
pub(crate) fn reserve(base: Option<u64>, bytes: usize) -> Outcome<u64> {
    let fixed = if base.is_some() { MapFlags::FIXED } else { MapFlags::empty() };
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | fixed;
    // SAFETY: without a base the kernel picks a free place; with one the caller owns the addresses.
    let base =
        unsafe { rustix::mm::mmap_anonymous(pointer(base.unwrap_or(0)), bytes, ProtFlags::empty(), flags) };
    base.map(|base| base.addr() as u64).map_err(|_| CUresult::CUDA_ERROR_OUT_OF_MEMORY)
}

/// Gives addresses back.
pub(crate) fn unmap(base: u64, bytes: usize) {
    // SAFETY: the caller mapped them and has taken them out of the books, under the books' lock, which
    // every copy holds while it touches memory.
    let done = unsafe { rustix::mm::munmap(pointer(base), bytes) };
    debug_assert!(done.is_ok(), "expected to unmap what was mapped");
}
