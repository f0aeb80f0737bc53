//! `preadv` and `pwritev` by a few threads: where io_uring is refused.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::OwnedFd,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use rustix::io::{Errno, retry_on_intr};

use super::{Completion, Device, Op, Part, Wake, What, directory::Directory};
use crate::{format::Superblock, memory::Memory};

/// Threads for one directory. More than that only wait for the same queue.
const THREADS: usize = 8;
/// Operations of one directory in flight: each thread's and as many that wait.
const DEPTH: usize = 2 * THREADS;

enum News {
    Done(Completion),
    Wake,
}

/// The engine over a directory.
#[derive(Debug)]
pub struct Threads {
    directory: Directory,
    work: Option<Sender<(Op, Arc<OwnedFd>)>>,
    news: Receiver<News>,
    tell: Sender<News>,
    /// Duplicates of the directory's descriptors: a thread may outlive an operation's wait.
    files: Vec<Option<Arc<OwnedFd>>>,
    crew: Vec<JoinHandle<()>>,
}

impl Threads {
    /// Starts the threads.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(directory: Directory, memory: &Arc<Memory>) -> std::io::Result<Self> {
        let (work, queue) = channel::<(Op, Arc<OwnedFd>)>();
        let queue = Arc::new(std::sync::Mutex::new(queue));
        let (tell, news) = channel();
        let mut crew = Vec::new();
        for number in 0..THREADS {
            let (queue, tell, memory) = (Arc::clone(&queue), tell.clone(), Arc::clone(memory));
            let run = move || {
                loop {
                    let next = queue.lock().ok().and_then(|queue| queue.recv().ok());
                    let Some((op, file)) = next else { return };
                    if tell.send(News::Done(run(op, &file, &memory))).is_err() {
                        return;
                    }
                }
            };
            crew.push(std::thread::Builder::new().name(format!("pillion-ssd-{number}")).spawn(run)?);
        }
        Ok(Self { directory, work: Some(work), news, tell, files: Vec::new(), crew })
    }

    fn file(&mut self, slot: u32) -> Result<Arc<OwnedFd>, Errno> {
        let index = slot as usize;
        if let Some(Some(file)) = self.files.get(index) {
            return Ok(Arc::clone(file));
        }
        let file = self.directory.file(slot).ok_or(Errno::NOENT)?;
        let file = Arc::new(rustix::io::fcntl_dupfd_cloexec(file, 3)?);
        if self.files.len() <= index {
            self.files.resize_with(index + 1, || None);
        }
        self.files[index] = Some(Arc::clone(&file));
        Ok(file)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.work = None;
        // Operations in flight use the pool: nobody may free it before they have ended.
        for thread in self.crew.drain(..) {
            let _ = thread.join();
        }
    }
}

/// One call moves all bytes, or the operation failed: no loop hides a short one.
fn run(mut op: Op, file: &OwnedFd, memory: &Memory) -> Completion {
    let moved = match op.what {
        What::Sync => retry_on_intr(|| rustix::fs::fdatasync(file)).map(|()| 0),
        What::Prepare => Ok(0),
        What::Write => memory.with_parts(&op.parts, |parts| {
            let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
            retry_on_intr(|| rustix::io::pwritev(file, &slices, op.at))
        }),
        What::Read => {
            let at = op.at;
            memory.with_parts_mut(&mut op.parts, |parts| {
                let mut slices: Vec<IoSliceMut<'_>> =
                    parts.iter_mut().map(|part| IoSliceMut::new(part)).collect();
                retry_on_intr(|| rustix::io::preadv(file, &mut slices, at))
            })
        }
    };
    Completion::judge(op, moved.map(|bytes| bytes as u64).map_err(Errno::raw_os_error))
}

struct Waker(Sender<News>);

impl Wake for Waker {
    fn wake(&self) {
        let _ = self.0.send(News::Wake);
    }
}

impl Device for Threads {
    fn engine(&self) -> &'static str {
        "threads"
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
    fn submit(&mut self, op: Op) {
        let ready = if op.what == What::Prepare { self.directory.prepare(op.slot) } else { Ok(()) };
        let sent = match ready.and_then(|()| self.file(op.slot)) {
            Ok(file) => match &self.work {
                Some(work) => work.send((op, file)).map_err(|refused| (refused.0.0, Errno::IO)),
                None => Err((op, Errno::IO)),
            },
            Err(errno) => Err((op, errno)),
        };
        if let Err((op, errno)) = sent {
            let _ = self.tell.send(News::Done(Completion::judge(op, Err(errno.raw_os_error()))));
        }
    }
    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Completion>) {
        let first = match timeout {
            Some(time) => self.news.recv_timeout(time),
            None => self.news.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        let others = std::iter::from_fn(|| self.news.try_recv().ok());
        for news in first.into_iter().chain(others) {
            if let News::Done(completion) = news {
                done.push(completion);
            }
        }
    }
    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(Waker(self.tell.clone()))
    }
}

/// Parts that one call takes (IOV_MAX).
pub(super) const PARTS_MAX: usize = 1024;

impl Memory {
    fn with_parts<R>(
        &self,
        parts: &[Part],
        call: impl FnOnce(&[&[u8]]) -> Result<R, Errno>,
    ) -> Result<R, Errno> {
        if parts.len() > PARTS_MAX {
            return Err(Errno::INVAL);
        }
        self.slices(parts).ok_or(Errno::FAULT).and_then(|slices| call(&slices))
    }

    fn with_parts_mut<R>(
        &self,
        parts: &mut [Part],
        call: impl FnOnce(&mut [&mut [u8]]) -> Result<R, Errno>,
    ) -> Result<R, Errno> {
        self.slices_mut(parts).ok_or(Errno::FAULT).and_then(|mut slices| call(&mut slices))
    }
}
