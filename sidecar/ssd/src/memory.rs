//! Memory that I/O reads and writes: aligned buffers, and the host pool's extents.
#![expect(unsafe_code, reason = "turns extents of the host pool's mapping into slices")]

use std::{
    any::Any,
    fmt, io,
    ptr::NonNull,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use crate::{
    device::{Part, Wake},
    format::{SECTOR, padded},
};

/// Pages are made so many bytes at a time: up to a few milliseconds, which a kernel without preemption gives to nobody
/// else.
const POPULATE_STEP: u64 = 2 << 20;
/// And then nothing is done for so many times as long.
const POPULATE_PAUSE: u32 = 4;

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Sector([u8; SECTOR]);

/// A buffer of whole sectors at an address that O_DIRECT takes.
#[derive(Clone)]
pub struct Aligned(Vec<Sector>);

impl Aligned {
    /// Zeros. The length is rounded up to whole sectors.
    pub fn zeroed(bytes: usize) -> Self {
        Self(vec![Sector([0; SECTOR]); bytes.div_ceil(SECTOR)])
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.len() * SECTOR
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Leaves out what comes after so many bytes; these are rounded up to whole sectors.
    pub(crate) fn truncate(&mut self, bytes: usize) {
        self.0.truncate(bytes.div_ceil(SECTOR));
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `Sector` is `repr(C)` around bytes and as long as its alignment: a slice of them is a
        // slice of bytes without padding.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.len()) }
    }

    /// The bytes, for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let bytes = self.len();
        // SAFETY: as in `bytes`; every byte pattern is a `Sector`.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), bytes) }
    }

    /// The first byte, for the kernel.
    pub(crate) fn address(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }
}

impl fmt::Debug for Aligned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Aligned({} bytes)", self.len())
    }
}

/// A part of the host pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte, from the pool's start.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
}

impl Extent {
    /// With what it lacks to whole sectors.
    pub(crate) fn padded(self) -> Self {
        Self { bytes: padded(self.bytes), ..self }
    }

    /// Its whole sectors.
    pub(crate) fn whole(self) -> Self {
        Self { bytes: self.bytes / SECTOR as u64 * SECTOR as u64, ..self }
    }
}

/// The host pool as this crate sees it: one mapping, addressed by extents.
///
/// Whoever makes one vouches for the rule of all extents (see [`Memory::from_raw`]); with it everything else
/// in this crate is safe.
pub struct Memory {
    base: NonNull<u8>,
    bytes: u64,
    /// From the start on, so many bytes have their pages.
    populated: AtomicU64,
    /// Who is woken when there are more. `None`: nobody populates it.
    waiting: Mutex<Option<Vec<Arc<dyn Wake>>>>,
    _keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the mapping may be used by any thread (contract of `from_raw`).
unsafe impl Send for Memory {}
// SAFETY: as above; who may touch which extent when is the contract of `from_raw`.
unsafe impl Sync for Memory {}

impl Memory {
    /// Wraps a mapping.
    ///
    /// # Safety
    /// The range is valid for reads and writes by any thread for as long as `keep` lives. An extent given to
    /// a put is written by nobody, and one given to a get, with what it lacks to whole sectors, is touched by
    /// nobody else, until its outcome was reported.
    ///
    /// # Panics
    /// If it does not start on a page.
    pub unsafe fn from_raw(base: NonNull<u8>, bytes: u64, keep: Arc<dyn Any + Send + Sync>) -> Self {
        assert!(base.addr().get().is_multiple_of(SECTOR), "a mapping starts on a page");
        Self { base, bytes, populated: AtomicU64::new(0), waiting: Mutex::new(None), _keep: keep }
    }

    /// Memory of its own.
    #[cfg(test)]
    pub(crate) fn owned(bytes: u64) -> Self {
        let mut buffer = Aligned::zeroed(bytes as usize);
        let base = NonNull::new(buffer.address()).expect("a vector's address");
        // SAFETY: the buffer's heap block neither moves nor is touched through `buffer`; tests keep the rule.
        unsafe { Self::from_raw(base, bytes, Arc::new(buffer)) }
    }

    /// No memory at all: for who only looks, with buffers of the operations' own.
    pub(crate) fn none() -> Self {
        let base = NonNull::without_provenance(std::num::NonZero::new(SECTOR).expect("it is not 0"));
        // SAFETY: a range without bytes is valid everywhere.
        unsafe { Self::from_raw(base, 0, Arc::new(())) }
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Has every page made, step by step, on a thread of its own: a first touch takes far longer than a copy. It leaves
    /// most of a core's time to whoever computes meanwhile. `wake` is called whenever there are `each` bytes more, and
    /// at the end. Once for all who ask.
    ///
    /// # Errors
    /// Where no thread can be had.
    pub(crate) fn populate(self: &Arc<Self>, each: u64, wake: Arc<dyn Wake>) -> io::Result<()> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waiting) = &mut *waiting {
            waiting.push(wake);
            return Ok(());
        }
        let memory = Arc::downgrade(self);
        let run = move || {
            loop {
                let began = Instant::now();
                // Whoever drops the last other handle need not wait for the pause.
                if !memory.upgrade().is_some_and(|memory| memory.populate_step(each)) {
                    return;
                }
                thread::sleep(began.elapsed() * POPULATE_PAUSE);
            }
        };
        thread::Builder::new().name("pillion-populate".into()).spawn(run)?;
        *waiting = Some(vec![wake]);
        Ok(())
    }

    /// Whether there is more to do.
    fn populate_step(&self, each: u64) -> bool {
        let from = self.populated();
        let to = (from + POPULATE_STEP).min(self.bytes);
        let (at, bytes) = (self.base.as_ptr().wrapping_add(from as usize), (to - from) as usize);
        // Only advice: before Linux 5.14, or without memory, whoever touches the page makes it, or fails.
        // SAFETY: inside the mapping, whose content stays as it is.
        let _ = unsafe { rustix::mm::madvise(at.cast(), bytes, rustix::mm::Advice::LinuxPopulateWrite) };
        self.populated.store(to, Ordering::Release);
        let is_over = to == self.bytes;
        if from / each == to / each && !is_over {
            return true;
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.iter().flatten().for_each(|one| one.wake());
        if is_over {
            // Who asks from now on finds all of it.
            *waiting = Some(Vec::new());
        }
        !is_over
    }

    /// From the start on, so many bytes have their pages.
    pub(crate) fn populated(&self) -> u64 {
        self.populated.load(Ordering::Acquire)
    }

    /// Whether an extent lies inside, on whole sectors.
    pub fn holds(&self, extent: Extent) -> bool {
        let aligned = [extent.offset, extent.bytes].iter().all(|n| n.is_multiple_of(SECTOR as u64));
        aligned && extent.offset.checked_add(extent.bytes).is_some_and(|end| end <= self.bytes)
    }

    /// Its first byte, for the kernel.
    pub(crate) fn address(&self, extent: Extent) -> Option<*mut u8> {
        // The offset was checked: it stays inside the mapping.
        self.holds(extent).then(|| self.base.as_ptr().wrapping_add(extent.offset as usize))
    }

    /// Reads an extent.
    pub(crate) fn with<R>(&self, extent: Extent, read: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let at = self.address(extent)?;
        // SAFETY: inside the mapping; nobody writes the extent of an operation in flight (`from_raw`).
        Some(read(unsafe { std::slice::from_raw_parts(at, extent.bytes as usize) }))
    }

    /// What an extent has beyond its whole sectors, in a sector that ends with zeros; nothing if it has no more.
    pub(crate) fn tail(&self, extent: Extent) -> Option<Aligned> {
        let (whole, length) = (extent.whole().bytes, (extent.bytes % SECTOR as u64) as usize);
        if length == 0 {
            return Some(Aligned::zeroed(0));
        }
        let mut sector = Aligned::zeroed(SECTOR);
        // The pool ends on a whole sector.
        let last = Extent { offset: extent.offset + whole, bytes: SECTOR as u64 };
        let at = self.address(last)?;
        // SAFETY: inside the mapping; nobody writes the extent of a put in flight (`from_raw`), and not a byte
        // beyond it is looked at.
        let bytes = unsafe { std::slice::from_raw_parts(at, length) };
        sector.bytes_mut()[..length].copy_from_slice(bytes);
        Some(sector)
    }

    /// The bytes of an operation's parts, to be written to the disk.
    pub(crate) fn slices<'a>(&'a self, parts: &'a [Part]) -> Option<Vec<&'a [u8]>> {
        let slice = |part: &'a Part| match part {
            Part::Owned(buffer) => Some(buffer.bytes()),
            Part::Pool(extent) => {
                let at = self.address(*extent)?;
                // SAFETY: inside the mapping; nobody writes the extent of a put in flight (`from_raw`).
                Some(unsafe { std::slice::from_raw_parts(at, extent.bytes as usize) })
            }
        };
        parts.iter().map(slice).collect()
    }

    /// The same, to be read into.
    pub(crate) fn slices_mut<'a>(&'a self, parts: &'a mut [Part]) -> Option<Vec<&'a mut [u8]>> {
        let slice = |part: &'a mut Part| match part {
            Part::Owned(buffer) => Some(buffer.bytes_mut()),
            Part::Pool(extent) => {
                let at = self.address(*extent)?;
                // SAFETY: inside the mapping; nobody else touches the extent of a get in flight (`from_raw`),
                // and an operation's parts are one extent and buffers of its own.
                Some(unsafe { std::slice::from_raw_parts_mut(at, extent.bytes as usize) })
            }
        };
        parts.iter_mut().map(slice).collect()
    }

    /// Writes an extent.
    #[cfg(any(test, feature = "faulty"))]
    pub(crate) fn with_mut<R>(&self, extent: Extent, write: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let at = self.address(extent)?;
        // SAFETY: inside the mapping; nobody else touches the extent of a get in flight (`from_raw`).
        Some(write(unsafe { std::slice::from_raw_parts_mut(at, extent.bytes as usize) }))
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({} bytes)", self.bytes)
    }
}
