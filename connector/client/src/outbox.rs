//! Frames on their way out. Engine threads put them here and never wait: what the
//! socket does not take at once is sent by the link's thread.

use std::{
    collections::VecDeque,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pillion_protocol::{Encoder, Message};
use pillion_shm::fds;
use rustix::io::Errno;

/// Bytes that may wait for a sidecar that does not read: beyond it the connection is given up.
const PENDING_BYTES_MAX: usize = 16 << 20;

/// The message was not taken: there is no connection, or it is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotSent;

#[derive(Debug, Default)]
struct State {
    socket: Option<Arc<OwnedFd>>,
    pending: VecDeque<u8>,
    broken: bool,
    encoder: Encoder,
}

impl State {
    fn reset(&mut self, socket: Option<Arc<OwnedFd>>) {
        (self.socket, self.broken) = (socket, false);
        self.pending.clear();
    }
}

#[derive(Debug)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    wake: OwnedFd,
}

impl Outbox {
    pub(crate) fn new() -> Result<Self, Errno> {
        use rustix::event::{EventfdFlags, eventfd};
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { state: Mutex::default(), wake })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn wake_fd(&self) -> &OwnedFd {
        &self.wake
    }

    /// Makes the link's thread look around.
    pub(crate) fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    pub(crate) fn open(&self, socket: Arc<OwnedFd>) {
        self.state().reset(Some(socket));
    }

    pub(crate) fn close(&self) {
        self.state().reset(None);
    }

    /// Queues a message; most are in the socket when this returns.
    pub(crate) fn send(&self, message: &Message) -> Result<(), NotSent> {
        let mut state = self.state();
        let State { socket: Some(socket), pending, broken, encoder } = &mut *state else {
            return Err(NotSent);
        };
        let bytes = encoder.encode(message, 0);
        if *broken || pending.len() + bytes.len() > PENDING_BYTES_MAX {
            *broken = true;
            self.wake();
            return Err(NotSent);
        }
        let mut sent = 0;
        if pending.is_empty() {
            match fds::send(socket.as_fd(), bytes, &[]) {
                Ok(count) => sent = count,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => {
                    *broken = true;
                    self.wake();
                    return Err(NotSent);
                }
            }
        }
        if sent < bytes.len() {
            pending.extend(&bytes[sent..]);
            self.wake();
        }
        Ok(())
    }

    /// Sends a message with fds. Where that cannot be done at once, the connection is given up.
    pub(crate) fn send_with_fds(&self, message: &Message, passed: &[OwnedFd]) -> Result<(), NotSent> {
        let borrowed: Vec<_> = passed.iter().map(AsFd::as_fd).collect();
        let mut state = self.state();
        let State { socket: Some(socket), pending, broken, encoder } = &mut *state else {
            return Err(NotSent);
        };
        let bytes = encoder.encode(message, passed.len() as u16);
        let sent = if pending.is_empty() && !*broken {
            fds::send(socket.as_fd(), bytes, &borrowed).ok()
        } else {
            None
        };
        let Some(sent) = sent else {
            // Descriptors cannot wait in the queue. A new connection presents everything again.
            *broken = true;
            self.wake();
            return Err(NotSent);
        };
        if sent < bytes.len() {
            pending.extend(&bytes[sent..]);
            self.wake();
        }
        Ok(())
    }

    /// Sends what is pending, as far as it goes. Says whether something is left.
    pub(crate) fn flush(&self) -> Result<bool, NotSent> {
        let mut state = self.state();
        let State { socket: Some(socket), pending, broken, .. } = &mut *state else { return Ok(false) };
        if *broken {
            return Err(NotSent);
        }
        while !pending.is_empty() {
            match fds::send(socket.as_fd(), pending.as_slices().0, &[]) {
                Ok(count) => drop(pending.drain(..count)),
                Err(Errno::AGAIN | Errno::INTR) => return Ok(true),
                Err(_) => return Err(NotSent),
            }
        }
        Ok(false)
    }
}
