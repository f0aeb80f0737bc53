//! One Unix socket of frames, both ways, with file descriptors.

use std::{
    collections::VecDeque,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use pillion_protocol::{FrameError, Frames, Message, frame};
use pillion_shm::fds::{self, Received};
use rustix::io::Errno;
use tokio::{io::Interest, net::UnixStream, time::timeout};

/// Descriptors that may wait for the frame that announces them (I8).
const LOOSE_FDS_MAX: usize = 16;

/// A frame to be sent.
#[derive(Debug)]
pub struct Outgoing {
    /// Header and payload.
    pub bytes: Vec<u8>,
    /// What goes with the first byte.
    pub fds: Vec<OwnedFd>,
}

impl Outgoing {
    /// A message with the descriptors that belong to it.
    pub fn new(message: &Message, fds: Vec<OwnedFd>) -> Self {
        Self { bytes: frame::encode(message, fds.len() as u16), fds }
    }
}

/// What reading brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// Bytes, or nothing.
    Open,
    /// The end of the stream.
    End,
    /// The peer does what no correct peer does, or the kernel says so.
    Broken(String),
}

/// See the module.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    frames: Frames,
    passed: VecDeque<OwnedFd>,
    queue: VecDeque<Outgoing>,
    /// Of the first frame in the queue.
    sent: usize,
}

impl Channel {
    /// Over a connected socket.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, frames: Frames::default(), passed: VecDeque::new(), queue: VecDeque::new(), sent: 0 }
    }

    /// The next message and its descriptors, from what was read. The outer error ends the connection; the inner one
    /// is a frame that was skipped.
    ///
    /// # Errors
    /// Where the stream is lost.
    #[expect(clippy::type_complexity, reason = "a frame may be bad in two ways")]
    pub fn next_message(&mut self) -> Result<Option<Result<(Message, Vec<OwnedFd>), FrameError>>, String> {
        let frame = match self.frames.next_frame() {
            None => return Ok(None),
            Some(Ok(frame)) => frame,
            Some(Err(error)) if error.is_fatal() => return Err(error.to_string()),
            Some(Err(error)) => return Ok(Some(Err(error))),
        };
        let count = usize::from(frame.fds);
        if self.passed.len() < count {
            return Err(format!("expected {count} file descriptors, got {}", self.passed.len()));
        }
        Ok(Some(Ok((frame.message, self.passed.drain(..count).collect()))))
    }

    /// Until there is something to read.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn readable(&self) -> std::io::Result<()> {
        self.stream.readable().await
    }

    /// Until something can be written.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn writable(&self) -> std::io::Result<()> {
        self.stream.writable().await
    }

    /// Reads what is there.
    pub fn receive(&mut self) -> Read {
        let mut buffer = [0u8; 65536];
        let Self { stream, passed, frames, .. } = self;
        let received =
            stream.try_io(Interest::READABLE, || match fds::receive(&*stream, &mut buffer, passed)? {
                Received::Nothing => Err(std::io::ErrorKind::WouldBlock.into()),
                other => Ok(other),
            });
        match received {
            Ok(Received::Bytes(count)) => frames.push(&buffer[..count]),
            Ok(_) => return Read::End,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                return Read::Broken(format!("the connection broke: {errno}"));
            }
        }
        // Before the frame is whole: one that never ends could bring any number of them.
        if passed.len() > LOOSE_FDS_MAX {
            return Read::Broken("expected file descriptors only with the frames that announce them".into());
        }
        Read::Open
    }

    /// Queues a frame.
    pub fn push(&mut self, frame: Outgoing) {
        self.queue.push_back(frame);
    }

    /// Whether something waits to be written.
    pub fn has_more(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Writes what the socket takes now; the number of bytes.
    ///
    /// # Errors
    /// What the kernel says: the connection is over.
    pub fn write(&mut self) -> Result<usize, Errno> {
        let mut written = 0;
        while let Some(first) = self.queue.front() {
            let bytes = &first.bytes[self.sent..];
            let of_frame = if self.sent == 0 { &*first.fds } else { &[] };
            let borrowed: Vec<_> = of_frame.iter().map(AsFd::as_fd).collect();
            let taken = self.stream.try_io(Interest::WRITABLE, || {
                fds::send(&self.stream, bytes, &borrowed).map_err(std::io::Error::from)
            });
            match taken {
                Ok(count) => {
                    written += count;
                    self.sent += count;
                    if self.sent == first.bytes.len() {
                        self.queue.pop_front();
                        self.sent = 0;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
            }
        }
        Ok(written)
    }

    /// Writes all that is queued, for a while.
    pub async fn flush(&mut self, limit: Duration) {
        let all = async {
            while self.has_more() && self.stream.writable().await.is_ok() && self.write().is_ok() {}
        };
        let _ = timeout(limit, all).await;
    }
}
