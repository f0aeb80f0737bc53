//! Mappings of shared memory.

use std::{ffi::c_void, ptr::NonNull, sync::atomic::AtomicU64};

use rustix::{
    io::Errno,
    mm::{MapFlags, ProtFlags},
};

use crate::{Access, Memfd, ShmError, memfd::system};

/// A shared mapping, unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<c_void>,
    bytes: usize,
    access: Access,
}

// SAFETY: the mapping is plain memory owned by this value; all access goes through atomics or
// through the raw pointer of `as_ptr`, whose users state their own synchronisation.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn new(memfd: &Memfd, access: Access) -> Result<Self, ShmError> {
        let prot = match access {
            Access::Read => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        let bytes = memfd.bytes() as usize;
        // SAFETY: a fresh address is asked for (null hint), the fd is valid and as long as `bytes`,
        // and the kernel checks the rest.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, prot, MapFlags::SHARED, memfd.fd(), 0) }
                .map_err(system("mmap"))?;
        let start = NonNull::new(start).ok_or(ShmError::System { call: "mmap", errno: Errno::INVAL })?;
        Ok(Self { start, bytes, access })
    }

    /// Maps all pages at once, for reading. Only advice: a kernel before 5.14 maps each when it is looked at.
    pub fn populate(&self) {
        // SAFETY: the range is this mapping; its content stays as it is.
        let _ = unsafe {
            rustix::mm::madvise(self.start.as_ptr(), self.bytes, rustix::mm::Advice::LinuxPopulateRead)
        };
    }

    /// First byte. Valid for [`Mapping::bytes`] as long as the mapping lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr().cast()
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it may be written through.
    pub fn access(&self) -> Access {
        self.access
    }

    /// All of it as 64-bit atomics. Stores through a read-only mapping would fault:
    /// the tables of this crate store only through mappings that they made writable.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: mmap is page aligned, `bytes / 8` whole words lie inside the mapping, which lives as
        // long as the borrow; AtomicU64 allows concurrent change by other processes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast::<AtomicU64>(), self.bytes / 8) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: start and bytes are those of the mmap above, and nobody borrows from us any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr(), self.bytes) };
    }
}
