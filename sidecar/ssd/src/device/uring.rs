//! io_uring, with the host pool and the segment files registered. One ring, owned by the thread that made it.
//!
//! Registering pins the pool's pages, and the first touch of a page takes its time: seconds for some GiB. Nobody waits
//! for it. The pool is registered piece by piece, each once its pages are there (see [`Memory::populate`]); until then
//! the same requests go to the same memory by its address.
//!
//! Memory in flight belongs to this module: operations are kept here until all of their completions have come,
//! also when the engine is dropped.
#![expect(unsafe_code, reason = "the kernel reads and writes memory by its address")]

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
    time::Duration,
};

use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::EventfdFlags;

use super::{Completion, Device, Op, Part, Registered, Wake, What, directory::Directory, threads::PARTS_MAX};
use crate::{
    format::Superblock,
    memory::{Extent, Memory},
};

const ENTRIES: u32 = 256;
const COMPLETIONS: u32 = 4096;
/// Operations in flight: beyond it a device only queues.
const DEPTH: usize = 64;
/// One registered buffer, unless the pool has too many of these: to pin as much takes a few milliseconds.
const BUFFER_BYTES_MIN: u64 = 64 << 20;
/// The kernel's bounds.
const BUFFER_BYTES_MAX: u64 = 1 << 30;
const BUFFERS_MAX: u64 = 1 << 14;
/// Registered files; a slot beyond is used by its descriptor.
const FILES: u32 = 1024;
/// Shorter parts are gathered into one vectored write; from here on a part goes alone, from the registered
/// buffer.
const ALONE_BYTES: u64 = 128 << 10;
const WAKE: u64 = u64::MAX;
const EIO: i32 = 5;

/// An operation that the kernel works on.
#[derive(Debug)]
struct Flight {
    op: Op,
    /// What each piece has to move.
    expected: Vec<u64>,
    left: usize,
    moved: u64,
    error: Option<i32>,
    /// What vectored pieces point to.
    _vectors: Vec<Box<[libc::iovec]>>,
}

/// The engine over a directory.
pub struct Uring {
    ring: IoUring,
    directory: Directory,
    memory: Arc<Memory>,
    buffers: Buffers,
    flights: Vec<Option<Flight>>,
    vacant: Vec<usize>,
    /// Ended, and not told yet. Entries that the submission queue had no room for are never kept: it is submitted
    /// instead.
    failed: Vec<Completion>,
    event: Arc<OwnedFd>,
    /// What the eventfd is read into.
    word: Box<u64>,
    is_listening: bool,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("directory", &self.directory).finish_non_exhaustive()
    }
}

impl Uring {
    /// Makes a ring and registers the files. Only the calling thread may use it then; the pool is registered while it
    /// waits.
    ///
    /// # Errors
    /// The directory back, and why io_uring is refused: seccomp, `io_uring_disabled`.
    pub fn new(directory: Directory, memory: &Arc<Memory>) -> Result<Self, (Directory, io::Error)> {
        let made = make_ring().and_then(|ring| {
            register_files(&ring, &directory)?;
            let event = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?);
            let buffers = Buffers::new(&ring, memory);
            memory.populate(buffers.bytes_each, Arc::new(Waker(Arc::clone(&event))))?;
            Ok((ring, event, buffers))
        });
        match made {
            Ok((ring, event, buffers)) => Ok(Self {
                ring,
                directory,
                memory: Arc::clone(memory),
                buffers,
                flights: Vec::new(),
                vacant: Vec::new(),
                failed: Vec::new(),
                event,
                word: Box::new(0),
                is_listening: false,
            }),
            Err(error) => Err((directory, error)),
        }
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: what the entry points to lives in `flights` (or is `word`) until its completion came.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            match self.ring.submit() {
                Err(error) if !is_transient(&error) => return Err(error),
                // The kernel may have no place for completions: take those that are there.
                Err(_) => {
                    let mut done = std::mem::take(&mut self.failed);
                    self.reap(&mut done);
                    self.failed = done;
                }
                Ok(_) => {}
            }
        }
    }

    fn listen(&mut self) {
        if self.is_listening {
            return;
        }
        let word: *mut u64 = &raw mut *self.word;
        let entry =
            opcode::Read::new(types::Fd(self.event.as_raw_fd()), word.cast(), 8).build().user_data(WAKE);
        self.is_listening = self.push(&entry).is_ok();
    }

    /// Cuts an operation into entries.
    fn entries(
        &self,
        op: &mut Op,
        vectors: &mut Vec<Box<[libc::iovec]>>,
    ) -> Option<Vec<(squeue::Entry, u64)>> {
        let fd = self.directory.file(op.slot)?.as_raw_fd();
        let file = File { slot: op.slot, fd };
        if op.what == What::Sync {
            return Some(vec![(file.sync(), 0)]);
        }
        let is_read = op.what == What::Read;
        let (mut entries, mut at, mut run) = (Vec::new(), op.at, Vec::new());
        for part in &mut op.parts {
            match part {
                Part::Pool(extent) if extent.bytes >= ALONE_BYTES => {
                    self.close_run(&mut run, &mut at, file, is_read, vectors, &mut entries);
                    for piece in pieces(*extent, self.buffers.bytes_each) {
                        let address = self.memory.address(piece)?;
                        let buffer = self.buffers.holding(piece);
                        entries.push((file.alone(is_read, address, piece.bytes, buffer, at), piece.bytes));
                        at += piece.bytes;
                    }
                }
                Part::Pool(extent) => run.push(iovec(self.memory.address(*extent)?, extent.bytes)),
                Part::Owned(buffer) => run.push(iovec(buffer.address(), buffer.len() as u64)),
            }
            if run.len() == PARTS_MAX {
                self.close_run(&mut run, &mut at, file, is_read, vectors, &mut entries);
            }
        }
        self.close_run(&mut run, &mut at, file, is_read, vectors, &mut entries);
        Some(entries)
    }

    fn close_run(
        &self,
        run: &mut Vec<libc::iovec>,
        at: &mut u64,
        file: File,
        is_read: bool,
        vectors: &mut Vec<Box<[libc::iovec]>>,
        entries: &mut Vec<(squeue::Entry, u64)>,
    ) {
        let bytes: u64 = run.iter().map(|part| part.iov_len as u64).sum();
        if bytes == 0 {
            run.clear();
            return;
        }
        let vector: Box<[libc::iovec]> = std::mem::take(run).into();
        entries.push((file.vectored(is_read, &vector, *at), bytes));
        *at += bytes;
        // A box's content stays where it is when the box moves.
        vectors.push(vector);
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let Self { ring, flights, vacant, is_listening, .. } = self;
        for entry in ring.completion() {
            if entry.user_data() == WAKE {
                *is_listening = false;
                continue;
            }
            let (index, piece) = ((entry.user_data() >> 16) as usize, (entry.user_data() & 0xffff) as usize);
            let Some(flight) = flights.get_mut(index).and_then(Option::as_mut) else { continue };
            match u64::try_from(entry.result()) {
                Err(_) => flight.error = Some(-entry.result()),
                Ok(moved) => {
                    flight.moved += moved;
                    // Exactly its length, each piece by itself: two wrongs make no right.
                    if flight.expected.get(piece) != Some(&moved) && flight.error.is_none() {
                        flight.error = Some(0);
                    }
                }
            }
            flight.left -= 1;
            if flight.left > 0 {
                continue;
            }
            if let Some(flight) = flights[index].take() {
                vacant.push(index);
                let moved = match flight.error {
                    Some(0) if flight.moved == flight.op.bytes() => Err(EIO),
                    Some(0) | None => Ok(flight.moved),
                    Some(errno) => Err(errno),
                };
                done.push(Completion::judge(flight.op, moved));
            }
        }
    }

    /// Only the first `pushed` pieces of an operation got to the kernel: it fails when these have ended.
    fn cut_short(&mut self, index: usize, pushed: usize) {
        let Some(flight) = self.flights[index].as_mut() else { return };
        flight.left -= flight.expected.len() - pushed;
        flight.error = Some(EIO);
        if flight.left == 0
            && let Some(flight) = self.flights[index].take()
        {
            self.vacant.push(index);
            self.failed.push(Completion::judge(flight.op, Err(EIO)));
        }
    }

    fn in_flight(&self) -> usize {
        self.flights.len() - self.vacant.len()
    }

    /// Anything but an interruption, a timeout or a shortage is an error: a ring that is no ring any more.
    fn enter(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let entered = match timeout {
            None => self.ring.submit_and_wait(1),
            Some(time) => {
                let time = types::Timespec::new().sec(time.as_secs()).nsec(time.subsec_nanos());
                let args = types::SubmitArgs::new().timespec(&time);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        match entered {
            Err(error) if !is_transient(&error) => Err(error),
            // The caller comes again.
            _ => Ok(()),
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY))
}

fn make_ring() -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_cqsize(COMPLETIONS).setup_submit_all().setup_single_issuer().setup_defer_taskrun();
    match builder.build(ENTRIES) {
        // Kernels before 6.1 do not know these.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().setup_cqsize(COMPLETIONS).build(ENTRIES)
        }
        other => other,
    }
}

fn register_files(ring: &IoUring, directory: &Directory) -> io::Result<()> {
    ring.submitter().register_files_sparse(FILES + 1)?;
    // What is in flight outlives a killed process, and its descriptors. The ring ends after it: a lock that hangs
    // on the ring, too, keeps the next owner from writing where a last write of this one may still land.
    ring.submitter().register_files_update(FILES, &[directory.lock().as_raw_fd()])?;
    directory.slots().into_iter().try_for_each(|slot| register_file(ring, directory, slot))
}

fn register_file(ring: &IoUring, directory: &Directory, slot: u32) -> io::Result<()> {
    match directory.file(slot) {
        Some(file) if slot < FILES => {
            ring.submitter().register_files_update(slot, &[file.as_raw_fd()]).map(drop)
        }
        _ => Ok(()),
    }
}

/// The pool, registered from its start on.
#[derive(Debug)]
struct Buffers {
    bytes_each: u64,
    /// Of them.
    registered: u64,
    shown: Arc<Registered>,
}

impl Buffers {
    /// A table that is empty yet.
    fn new(ring: &IoUring, memory: &Memory) -> Self {
        let least = memory.bytes().div_ceil(BUFFERS_MAX);
        let bytes_each = least.next_power_of_two().max(BUFFER_BYTES_MIN);
        let shown = Arc::new(Registered::default());
        let made = match memory.bytes().div_ceil(bytes_each) {
            0 => Ok(()),
            // Kernels before 5.19 have no table that is empty.
            buffers if bytes_each <= BUFFER_BYTES_MAX => {
                ring.submitter().register_buffers_sparse(buffers as u32)
            }
            _ => Err(io::Error::from_raw_os_error(libc::E2BIG)),
        };
        if let Err(error) = made {
            shown.refuse(&error);
        }
        Self { bytes_each, registered: 0, shown }
    }

    /// The next one to register: its pages are there.
    fn next(&self, memory: &Memory) -> Option<Extent> {
        let offset = self.registered * self.bytes_each;
        let bytes = self.bytes_each.min(memory.bytes().saturating_sub(offset));
        let due = bytes > 0 && offset + bytes <= memory.populated() && !self.shown.is_refused();
        due.then_some(Extent { offset, bytes })
    }

    fn register(&mut self, ring: &IoUring, memory: &Memory, next: Extent) {
        let buffer = memory.address(next).map(|address| [iovec(address, next.bytes)]);
        let made = buffer.ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT)).and_then(|buffer| {
            // SAFETY: the pool's mapping lives as long as `memory`, which the engine keeps beside its ring.
            unsafe { ring.submitter().register_buffers_update(self.registered as u32, &buffer, None) }
        });
        match made {
            Ok(()) => {
                self.registered += 1;
                self.shown.add(next.bytes);
            }
            Err(error) => self.shown.refuse(&error),
        }
    }

    /// The number of the buffer that holds a piece, if it is registered.
    fn holding(&self, piece: Extent) -> Option<u16> {
        let buffer = piece.offset / self.bytes_each;
        // A pool has at most BUFFERS_MAX.
        (buffer < self.registered).then_some(buffer as u16)
    }
}

/// An extent, cut where one registered buffer ends and the next begins.
fn pieces(extent: Extent, bytes_each: u64) -> Vec<Extent> {
    let (mut pieces, mut at, end) = (Vec::new(), extent.offset, extent.offset + extent.bytes);
    while at < end {
        let to = end.min((at / bytes_each + 1) * bytes_each);
        pieces.push(Extent { offset: at, bytes: to - at });
        at = to;
    }
    pieces
}

fn iovec(address: *mut u8, bytes: u64) -> libc::iovec {
    libc::iovec { iov_base: address.cast(), iov_len: bytes as usize }
}

#[derive(Clone, Copy)]
struct File {
    slot: u32,
    fd: RawFd,
}

/// Registered files and plain ones are two types with the same use.
macro_rules! build {
    ($file:expr, |$target:ident| $entry:expr) => {
        if $file.slot < FILES {
            let $target = types::Fixed($file.slot);
            $entry.build()
        } else {
            let $target = types::Fd($file.fd);
            $entry.build()
        }
    };
}

impl File {
    fn sync(self) -> squeue::Entry {
        build!(self, |file| opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC))
    }

    /// Memory in one piece, from its registered buffer if it has one.
    fn alone(
        self,
        is_read: bool,
        address: *mut u8,
        bytes: u64,
        buffer: Option<u16>,
        at: u64,
    ) -> squeue::Entry {
        // A piece is at most a record, 64 MiB.
        let bytes = bytes as u32;
        match (is_read, buffer) {
            (true, Some(buffer)) => {
                build!(self, |file| opcode::ReadFixed::new(file, address, bytes, buffer).offset(at))
            }
            (false, Some(buffer)) => {
                build!(self, |file| opcode::WriteFixed::new(file, address, bytes, buffer).offset(at))
            }
            (true, None) => build!(self, |file| opcode::Read::new(file, address, bytes).offset(at)),
            (false, None) => build!(self, |file| opcode::Write::new(file, address, bytes).offset(at)),
        }
    }

    fn vectored(self, is_read: bool, vector: &[libc::iovec], at: u64) -> squeue::Entry {
        if is_read {
            build!(self, |file| opcode::Readv::new(file, vector.as_ptr(), vector.len() as u32).offset(at))
        } else {
            build!(self, |file| opcode::Writev::new(file, vector.as_ptr(), vector.len() as u32).offset(at))
        }
    }
}

struct Waker(Arc<OwnedFd>);

impl Wake for Waker {
    fn wake(&self) {
        // Full means that it is signalled.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }
}

impl Device for Uring {
    fn engine(&self) -> &'static str {
        "io_uring"
    }
    fn superblock(&self) -> Superblock {
        self.directory.superblock()
    }
    fn slots(&self) -> Vec<u32> {
        self.directory.slots()
    }
    fn depth(&self) -> usize {
        DEPTH
    }

    fn submit(&mut self, mut op: Op) {
        if op.what == What::Prepare {
            let made = self.directory.prepare(op.slot).map_err(|errno| errno.raw_os_error());
            let made = made.and_then(|()| {
                register_file(&self.ring, &self.directory, op.slot)
                    .map_err(|error| error.raw_os_error().unwrap_or(EIO))
            });
            self.failed.push(Completion::judge(op, made.map(|()| 0)));
            return;
        }
        let mut vectors = Vec::new();
        let entries = match self.entries(&mut op, &mut vectors) {
            Some(entries) if (1..=usize::from(u16::MAX)).contains(&entries.len()) => entries,
            _ => {
                self.failed.push(Completion::judge(op, Err(libc::EINVAL)));
                return;
            }
        };
        let expected: Vec<u64> = entries.iter().map(|(_, bytes)| *bytes).collect();
        let flight = Flight { op, left: expected.len(), expected, moved: 0, error: None, _vectors: vectors };
        let index = self.vacant.pop().unwrap_or(self.flights.len());
        if index == self.flights.len() {
            self.flights.push(None);
        }
        self.flights[index] = Some(flight);
        for (piece, (entry, _)) in entries.into_iter().enumerate() {
            let entry = entry.user_data((index as u64) << 16 | piece as u64);
            if self.push(&entry).is_err() {
                self.cut_short(index, piece);
                return;
            }
        }
    }

    fn start(&mut self) {
        // What fails here fails again in `wait`.
        let _ = self.ring.submit();
    }

    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Completion>) {
        self.listen();
        done.append(&mut self.failed);
        let is_more = self.buffers.next(&self.memory).is_some_and(|next| {
            self.start();
            self.buffers.register(&self.ring, &self.memory, next);
            true
        });
        let wanted = if done.is_empty() && !is_more { timeout } else { Some(Duration::ZERO) };
        // Every operation would wait for ever.
        self.enter(wanted).expect("io_uring_enter");
        self.reap(done);
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(Waker(Arc::clone(&self.event)))
    }
    fn registered(&self) -> Option<Arc<Registered>> {
        Some(Arc::clone(&self.buffers.shown))
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel may still write into buffers and the pool: they are freed after its last word.
        let mut done = Vec::new();
        Waker(Arc::clone(&self.event)).wake();
        while self.in_flight() > 0 || self.is_listening {
            if self.enter(None).is_err() {
                // Nothing tells when the kernel is done with this memory: not even unwinding may free it.
                std::process::abort();
            }
            self.reap(&mut done);
        }
        // The ring itself ends some time later; the lock should not.
        let _ = self.ring.submitter().unregister_files();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{device::directory::Use, memory::Aligned};

    /// Writes the extent and reads the file's first bytes back.
    fn there_and_back(ring: &mut Uring, extent: Extent) -> Aligned {
        let parts = [Part::Pool(extent), Part::Owned(Aligned::zeroed(extent.bytes as usize))];
        let mut done = Vec::new();
        for (what, part) in [What::Write, What::Read].into_iter().zip(parts) {
            ring.submit(Op { ticket: 7, slot: 0, what, at: 0, parts: vec![part] });
            while done.is_empty() {
                ring.wait(None, &mut done);
            }
            let ended: Completion = done.remove(0);
            assert_eq!((ended.ticket, ended.result), (7, Ok(())));
            if let Some(Part::Owned(buffer)) = ended.parts.into_iter().next() {
                return buffer;
            }
        }
        panic!("what was read comes back");
    }

    #[test]
    fn records_lie_across_buffers_that_are_registered_and_that_are_not() {
        // On the disk that builds: O_DIRECT needs a real one.
        let here = std::env::current_exe().unwrap();
        let home = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
        let memory = Arc::new(Memory::owned(2 * BUFFER_BYTES_MIN + 4096));
        let segment_bytes = 1 << 20;
        let mut directory = Directory::open(home.path(), Use::Own { segment_bytes }).unwrap();
        directory.prepare(0).unwrap();
        let Ok(mut ring) = Uring::new(directory, &memory) else {
            // Where the kernel refuses it, `tests/tier.rs` shows that threads do the same.
            return;
        };
        let across = Extent { offset: BUFFER_BYTES_MIN - (256 << 10), bytes: 512 << 10 };
        let wanted: Vec<u8> = (0..across.bytes).map(|at| (at % 251) as u8).collect();
        memory.with_mut(across, |bytes| bytes.copy_from_slice(&wanted)).unwrap();
        let holding = |ring: &Uring| {
            pieces(across, BUFFER_BYTES_MIN)
                .into_iter()
                .map(|it| ring.buffers.holding(it))
                .collect::<Vec<_>>()
        };
        // One more buffer is registered with each wait, once its pages are there.
        let mut met = vec![holding(&ring)];
        while ring.buffers.shown.bytes() < memory.bytes() {
            assert!(ring.buffers.shown.refused().is_none());
            ring.wait(Some(Duration::from_secs(10)), &mut Vec::new());
            assert!(there_and_back(&mut ring, across).bytes() == wanted);
            met.push(holding(&ring));
        }
        assert_eq!(met.first(), Some(&vec![None, None]));
        assert_eq!(met.last(), Some(&vec![Some(0), Some(1)]));
        assert!(there_and_back(&mut ring, across).bytes() == wanted);
    }
}
