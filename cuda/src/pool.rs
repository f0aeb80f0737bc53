//! The host pool: one mapping that all records lie in.

use pillion_shm::{Access, Mapping, Memfd, Seal, ShmError};

/// The memory of the host tier. Which part belongs to whom is decided elsewhere
/// (the core's allocator); this type only turns extents into slices.
#[derive(Debug)]
pub struct HostPool {
    map: Mapping,
    memfd: Memfd,
}

impl HostPool {
    /// A pool of so many bytes. Pages are taken when they are first written.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(bytes: u64) -> Result<Self, ShmError> {
        let memfd = Memfd::create("pillion-pool", bytes)?;
        memfd.seal(Seal::Size)?;
        Ok(Self { map: memfd.map(Access::ReadWrite)?, memfd })
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.memfd.bytes()
    }

    /// A record for reading; `None` outside of the pool.
    ///
    /// # Safety
    /// Nobody may write this extent while the slice lives: the record is published and pinned.
    pub unsafe fn record(&self, offset: u64, bytes: u64) -> Option<&[u8]> {
        self.check(offset, bytes)?;
        // SAFETY: the extent lies inside the mapping, which lives as long as `self`; the caller keeps
        // writers away.
        Some(unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(offset as usize), bytes as usize) })
    }

    /// A record for writing; `None` outside of the pool.
    ///
    /// # Safety
    /// Nobody else may touch this extent while the slice lives: the record is being written, by one job.
    #[expect(clippy::mut_from_ref, reason = "extents are disjoint; the caller owns this one")]
    pub unsafe fn record_mut(&self, offset: u64, bytes: u64) -> Option<&mut [u8]> {
        self.check(offset, bytes)?;
        // SAFETY: as in `record`; the caller owns the extent alone.
        Some(unsafe {
            std::slice::from_raw_parts_mut(self.map.as_ptr().add(offset as usize), bytes as usize)
        })
    }

    fn check(&self, offset: u64, bytes: u64) -> Option<()> {
        (offset.checked_add(bytes)? <= self.bytes()).then_some(())
    }
}
