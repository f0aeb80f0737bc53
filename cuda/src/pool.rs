//! The host pool: one mapping that all records lie in.

use std::{
    fs,
    num::NonZero,
    os::fd::OwnedFd,
    ptr,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use pillion_shm::{Access, Mapping, Memfd, Seal, ShmError};

const HUGE_PAGE: u64 = 2 << 20;
const PAGE: usize = 4096;
/// Threads that touch: more only wait for the kernel's zeroing.
const TOUCHERS_MAX: usize = 16;

/// How a pool is made.
#[derive(Debug, Clone, Copy, Default)]
pub struct PoolOptions {
    /// Its size.
    pub bytes: u64,
    /// Take every page now, with all processors: device pools are pinned, and pinning one page at a time
    /// that is not there yet takes twenty times longer.
    pub touch: bool,
    /// Prefer this node's memory: the one next to the device.
    pub numa_node: Option<u32>,
}

/// The memory of the host tier. Which part belongs to whom is decided elsewhere
/// (the core's allocator); this type only turns extents into slices.
#[derive(Debug)]
pub struct HostPool {
    map: Mapping,
    memfd: Memfd,
    huge_pages: bool,
    /// One bit for each 2 MiB whose pages are there, as far as we know.
    taken: Vec<AtomicU64>,
}

impl HostPool {
    /// A pool of so many bytes. Pages are taken when they are first written.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(bytes: u64) -> Result<Self, ShmError> {
        Self::with(PoolOptions { bytes, ..PoolOptions::default() })
    }

    /// A pool made in this way. Huge pages are used where enough are set aside.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn with(options: PoolOptions) -> Result<Self, ShmError> {
        const NAME: &str = "pillion-pool";
        let PoolOptions { bytes, touch, numa_node } = options;
        let set_aside = bytes > 0 && bytes.is_multiple_of(HUGE_PAGE) && free_huge_bytes() >= bytes;
        // Set aside means: meant for such as us. Another may have been quicker.
        let huge = if set_aside { Memfd::create_huge(NAME, bytes).ok() } else { None };
        let mapped = huge.and_then(|memfd| Some((memfd.map(Access::ReadWrite).ok()?, memfd)));
        // Taken at once: where a container's limit on them is lower, the first touch of a page would be SIGBUS.
        let mapped = mapped.filter(|(map, _)| touch_all(map, populate));
        let huge_pages = mapped.is_some();
        let (map, memfd) = match mapped {
            Some(both) => both,
            None => {
                let memfd = Memfd::create(NAME, bytes)?;
                (memfd.map(Access::ReadWrite)?, memfd)
            }
        };
        // Others of this node may read it, and nobody but us ever writes it.
        memfd.seal(Seal::SizeAndFutureWrites)?;
        let all = if touch || huge_pages { u64::MAX } else { 0 };
        let words = map.bytes().div_ceil(64 * HUGE_PAGE as usize);
        let taken = (0..words).map(|_| AtomicU64::new(all)).collect();
        let pool = Self { map, memfd, huge_pages, taken };
        pool.advise(numa_node);
        if touch && !pool.huge_pages {
            touch_all(&pool.map, |start, length| populate(start, length) || touch_each(start, length));
        }
        Ok(pool)
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.memfd.bytes()
    }

    /// For neighbours, who can only read it.
    pub fn memfd(&self) -> &Memfd {
        &self.memfd
    }

    /// First byte, for the device.
    pub fn address(&self) -> *mut u8 {
        self.map.as_ptr()
    }

    /// Whether it lies in huge pages that were set aside.
    pub fn has_huge_pages(&self) -> bool {
        self.huge_pages
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
        self.take(offset, bytes);
        // SAFETY: as in `record`; the caller owns the extent alone.
        Some(unsafe {
            std::slice::from_raw_parts_mut(self.map.as_ptr().add(offset as usize), bytes as usize)
        })
    }

    /// Takes the pages of an extent that is written for the first time, and those around it, by one call
    /// instead of a fault for each page of 4 KiB.
    fn take(&self, offset: u64, bytes: u64) {
        for chunk in offset / HUGE_PAGE..(offset + bytes).div_ceil(HUGE_PAGE) {
            let (word, bit) = (&self.taken[(chunk / 64) as usize], 1 << (chunk % 64));
            if word.load(Ordering::Relaxed) & bit != 0 {
                continue;
            }
            let from = chunk * HUGE_PAGE;
            let length = HUGE_PAGE.min(self.bytes() - from);
            // Where the kernel cannot, the faults come as they did.
            populate(self.map.as_ptr() as usize + from as usize, length as usize);
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    fn check(&self, offset: u64, bytes: u64) -> Option<()> {
        (offset.checked_add(bytes)? <= self.bytes()).then_some(())
    }

    /// All of it is advice: a kernel that does not take it costs speed, not correctness.
    fn advise(&self, numa_node: Option<u32>) {
        let (start, length) = (self.map.as_ptr().cast::<libc::c_void>(), self.map.bytes());
        if length == 0 {
            return;
        }
        // SAFETY: the range is our mapping; none of these calls changes its content.
        unsafe {
            // A crash must not write gigabytes of other people's prompts into a core file.
            libc::madvise(start, length, libc::MADV_DONTDUMP);
            if !self.huge_pages {
                libc::madvise(start, length, libc::MADV_HUGEPAGE);
            }
            if let Some(node) = numa_node.filter(|node| *node < 64) {
                let mask = 1u64 << node;
                let (mask, bits) = (&raw const mask, 65 as libc::c_ulong);
                // Preferred, not bound: a node that is full must not end the process.
                libc::syscall(libc::SYS_mbind, start, length, libc::MPOL_PREFERRED, mask, bits, 0);
            }
        }
    }
}

/// Another sidecar's pool, mapped for reading. Its owner goes on writing it: what is read counts for nothing before
/// the bytes *that were read* have been compared with their checksum.
#[derive(Debug)]
pub struct ForeignPool {
    map: Mapping,
    bytes: u64,
}

impl ForeignPool {
    /// Maps the memory behind a descriptor that a neighbour sent.
    ///
    /// # Errors
    /// Where it is not sealed, or has another size.
    pub fn open(fd: OwnedFd, bytes: u64) -> Result<Self, ShmError> {
        let map = Memfd::adopt(fd, Seal::SizeAndFutureWrites, bytes)?.map(Access::Read)?;
        Ok(Self { map, bytes })
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads a record; false outside of the pool.
    #[must_use]
    pub fn read(&self, offset: u64, into: &mut [u8]) -> bool {
        if offset.checked_add(into.len() as u64).is_none_or(|end| end > self.bytes) {
            return false;
        }
        // SAFETY: the range lies inside the mapping, whose size is sealed; `into` is ours alone. The owner may write
        // meanwhile, so that any bytes may come out: the caller compares them.
        unsafe {
            ptr::copy_nonoverlapping(self.map.as_ptr().add(offset as usize), into.as_mut_ptr(), into.len())
        };
        true
    }
}

/// Has all processors take the pages of a mapping that nobody uses yet; false where one of them could not.
fn touch_all(map: &Mapping, touch: impl Fn(usize, usize) -> bool + Sync) -> bool {
    let cores = thread::available_parallelism().map_or(1, NonZero::get).min(TOUCHERS_MAX);
    let step = map.bytes().div_ceil(cores).next_multiple_of(HUGE_PAGE as usize).max(1);
    let (start, touch) = (map.as_ptr() as usize, &touch);
    thread::scope(|scope| {
        let ranges = (0..map.bytes()).step_by(step);
        let touchers: Vec<_> = ranges
            .map(|from| scope.spawn(move || touch(start + from, step.min(map.bytes() - from))))
            .collect();
        touchers.into_iter().all(|toucher| toucher.join().unwrap_or(false))
    })
}

/// Takes the pages of a range; false where the kernel cannot: no memory, or older than 5.14.
fn populate(start: usize, length: usize) -> bool {
    // SAFETY: the range lies in the mapping of a pool; populating keeps its content, whoever writes it.
    let done = unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_POPULATE_WRITE) };
    done == 0
}

/// The same for older kernels: one byte of each page.
fn touch_each(start: usize, length: usize) -> bool {
    for at in (start..start + length).step_by(PAGE) {
        // SAFETY: the range lies in the mapping of a pool that is being made; the page is zero and stays so.
        unsafe { std::ptr::write_volatile(at as *mut u8, 0) };
    }
    true
}

fn free_huge_bytes() -> u64 {
    let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    free.ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0) * HUGE_PAGE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resident(pool: &HostPool) -> usize {
        let mut pages = vec![0u8; pool.map.bytes() / PAGE];
        // SAFETY: the vector has one byte for each page of the mapping.
        let asked = unsafe { libc::mincore(pool.address().cast(), pool.map.bytes(), pages.as_mut_ptr()) };
        assert_eq!(asked, 0);
        pages.iter().filter(|page| **page & 1 == 1).count()
    }

    #[test]
    fn a_record_that_is_written_has_all_its_pages_before() {
        let pool = HostPool::create(5 * HUGE_PAGE + 3 * PAGE as u64).unwrap();
        let pages = (HUGE_PAGE / PAGE as u64) as usize;
        // SAFETY: nobody else has the pool.
        unsafe {
            pool.record_mut(HUGE_PAGE - 1, 2).unwrap();
            assert_eq!(resident(&pool), 2 * pages);
            pool.record_mut(5 * HUGE_PAGE, 3 * PAGE as u64).unwrap();
            assert_eq!(resident(&pool), 2 * pages + 3);
            assert!(pool.record_mut(5 * HUGE_PAGE, 4 * PAGE as u64).is_none());
        }
    }

    #[test]
    fn a_touched_pool_has_all_its_pages_and_another_takes_them_when_they_are_used() {
        let bytes = 5 * HUGE_PAGE + 3 * PAGE as u64;
        let lazy = HostPool::create(bytes).unwrap();
        assert_eq!(resident(&lazy), 0);
        let touched = HostPool::with(PoolOptions { bytes, touch: true, numa_node: Some(0) }).unwrap();
        assert_eq!(resident(&touched) * PAGE, bytes as usize);
        // SAFETY: nobody else has the pool.
        let record = unsafe { touched.record(0, bytes) }.unwrap();
        assert!(record.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn extents_outside_of_the_pool_are_none() {
        let pool = HostPool::create(HUGE_PAGE).unwrap();
        for (offset, bytes) in [(HUGE_PAGE, 1), (1, HUGE_PAGE), (u64::MAX, 2)] {
            // SAFETY: nobody else has the pool.
            assert!(unsafe { pool.record(offset, bytes) }.is_none());
        }
    }
}
