//! Asking a sidecar what it is doing, for `pillion status`.

use std::{
    collections::VecDeque,
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use pillion_protocol::{Frames, MAJOR, MINOR, Message, frame, wire};
use pillion_shm::fds::{self, Received};

use crate::link::connect;

/// The sidecar's status report, as JSON.
///
/// # Errors
/// A sentence that says what was expected and what came.
pub fn fetch_status(socket: &Path, timeout: Duration) -> Result<String, String> {
    let path = socket.display();
    let connection = connect(socket).map_err(|errno| format!("{path}: {errno}: is a sidecar running?"))?;
    let hello = Message::Hello(wire::Hello {
        major: MAJOR,
        minor: MINOR,
        role: wire::Role::Observer,
        engine_id: "status".into(),
        tenant: "default".into(),
        client_version: env!("CARGO_PKG_VERSION").into(),
    });
    let query = Message::StatusQuery(wire::StatusQuery { request: 1 });
    let bytes = [frame::encode(&hello, 0), frame::encode(&query, 0)].concat();
    fds::send(connection.as_fd(), &bytes, &[]).map_err(|errno| format!("{path}: {errno}"))?;
    let until = Instant::now() + timeout;
    let mut frames = Frames::default();
    let mut passed = VecDeque::new();
    let mut buffer = [0u8; 65536];
    while Instant::now() < until {
        match fds::receive(connection.as_fd(), &mut buffer, &mut passed) {
            Ok(Received::Bytes(count)) => frames.push(&buffer[..count]),
            Ok(Received::End) => return Err(format!("{path}: the sidecar closed the connection")),
            Ok(Received::Nothing) => std::thread::sleep(Duration::from_millis(2)),
            Err(errno) => return Err(format!("{path}: {errno}")),
        }
        while let Some(frame) = frames.next_frame() {
            match frame.map_err(|error| format!("{path}: {error}"))?.message {
                Message::Status(status) => return Ok(status.json),
                Message::Refused(refused) => return Err(format!("{path}: refused: {}", refused.text)),
                _ => {}
            }
        }
    }
    Err(format!("{path}: no answer within {} s: the sidecar hangs or is stopped", timeout.as_secs()))
}
