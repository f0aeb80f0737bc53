//! Frames: an 8-byte header and one FlatBuffer.
//!
//! ```text
//! 0        4      6      8
//! | length | kind | fds  | payload (length bytes) …
//! ```
//!
//! Integers are little endian; `length` counts the payload; `fds` is the number
//! of file descriptors that travel with the frame's bytes (SCM_RIGHTS).

use crate::message::{Kind, Message};

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 8;
/// The largest payload that is accepted: a job of [`crate::MAX_BLOCKS`] blocks takes 2.3 MiB.
pub const MAX_PAYLOAD_BYTES: usize = 4 << 20;
/// File descriptors that one frame may carry.
pub const MAX_FDS: u16 = 4;

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The length field is beyond the cap; the stream cannot be resynchronised.
    #[error("expected a frame of at most {MAX_PAYLOAD_BYTES} bytes, got {0}: close the connection")]
    Oversize(u64),
    /// More file descriptors than a frame may carry.
    #[error("expected at most {MAX_FDS} file descriptors with a frame, got {0}: close the connection")]
    TooManyFds(u16),
    /// The kind is not one of this protocol version.
    #[error("unknown message kind {0}: the peer speaks another version")]
    UnknownKind(u16),
    /// The payload is not a valid FlatBuffer of its kind.
    #[error("malformed {kind:?} message: {text}")]
    Malformed {
        /// The kind that the header named.
        kind: Kind,
        /// What the verifier said.
        text: String,
    },
}

impl FrameError {
    /// Whether the stream is lost: the end of the frame is unknown or cannot be trusted.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Oversize(_) | Self::TooManyFds(_))
    }
}

/// One frame's message and the number of fds that belong to it.
#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    /// The decoded payload.
    pub message: Message,
    /// File descriptors that came with it, to be taken from the receive queue.
    pub fds: u16,
}

/// Cuts a byte stream into frames. Holds at most one frame and one read's worth of bytes.
#[derive(Debug, Default)]
pub struct Frames {
    buffer: Vec<u8>,
    start: usize,
}

impl Frames {
    /// Appends bytes that were received.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 && self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        } else if self.start > 64 * 1024 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame; `None` until more bytes come.
    ///
    /// # Errors
    /// A malformed or unknown frame is skipped, and the next call goes on behind
    /// it; after an error that [`FrameError::is_fatal`], the stream is lost.
    pub fn next_frame(&mut self) -> Option<Result<Frame, FrameError>> {
        let pending = &self.buffer[self.start..];
        let header: &[u8; HEADER_BYTES] = pending.first_chunk()?;
        let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_le_bytes([header[4], header[5]]);
        let fds = u16::from_le_bytes([header[6], header[7]]);
        if length > MAX_PAYLOAD_BYTES {
            return Some(Err(FrameError::Oversize(length as u64)));
        }
        if fds > MAX_FDS {
            return Some(Err(FrameError::TooManyFds(fds)));
        }
        let payload = pending.get(HEADER_BYTES..HEADER_BYTES + length)?;
        let message = Kind::try_from(kind)
            .map_err(|()| FrameError::UnknownKind(kind))
            .and_then(|kind| Message::decode(kind, payload));
        self.start += HEADER_BYTES + length;
        Some(message.map(|message| Frame { message, fds }))
    }

    /// Bytes received that are not yet a whole frame.
    pub fn pending_bytes(&self) -> usize {
        self.buffer.len() - self.start
    }
}

/// Encodes a message as a frame that announces `fds` file descriptors.
pub fn encode(message: &Message, fds: u16) -> Vec<u8> {
    let mut encoder = Encoder::default();
    encoder.encode(message, fds);
    encoder.frame
}

/// Encodes one message after the other in memory that it keeps: new memory for thousands of hashes is page faults, which
/// take longer than their encoding.
#[derive(Debug)]
pub struct Encoder {
    builder: planus::Builder,
    frame: Vec<u8>,
}

/// What an encoder keeps: the hashes of some ten thousand blocks.
const KEPT_BYTES_MAX: usize = 1 << 20;

impl Default for Encoder {
    fn default() -> Self {
        // Most messages are short.
        Self { builder: planus::Builder::with_capacity(256), frame: Vec::new() }
    }
}

impl Encoder {
    /// As [`encode`]; the frame is there until the next one.
    pub fn encode(&mut self, message: &Message, fds: u16) -> &[u8] {
        if self.frame.capacity() > KEPT_BYTES_MAX {
            *self = Self::default();
        }
        let Self { builder, frame } = self;
        builder.clear();
        frame.clear();
        let payload = message.write(builder);
        debug_assert!(payload.len() <= MAX_PAYLOAD_BYTES && fds <= MAX_FDS);
        frame.reserve(HEADER_BYTES + payload.len());
        frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        frame.extend_from_slice(&(message.kind() as u16).to_le_bytes());
        frame.extend_from_slice(&fds.to_le_bytes());
        frame.extend_from_slice(payload);
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire;
    use proptest::prelude::*;

    fn ping(sequence: u64) -> Message {
        Message::Ping(wire::Ping { sequence })
    }

    #[test]
    fn a_frame_survives_any_split() {
        let bytes: Vec<u8> = (0..3).flat_map(|n| encode(&ping(n), 0)).collect();
        for cut in 0..bytes.len() {
            let mut frames = Frames::default();
            let mut seen = Vec::new();
            for part in [&bytes[..cut], &bytes[cut..]] {
                frames.push(part);
                while let Some(frame) = frames.next_frame() {
                    seen.push(frame.expect("valid").message);
                }
            }
            assert_eq!(seen, (0..3).map(ping).collect::<Vec<_>>());
            assert_eq!(frames.pending_bytes(), 0);
        }
    }

    #[test]
    fn an_encoder_says_the_same_whatever_it_encoded_before() {
        let mut encoder = Encoder::default();
        for count in [3, 40_000, 0, 100, 65_536] {
            let hashes = vec![count as u8; 32 * count];
            let lease = wire::Lease { request: 1, spaces: vec![7; 16], counts: vec![count as u32], hashes };
            for message in [Message::Lease(lease), ping(count as u64)] {
                assert_eq!(encoder.encode(&message, 1), encode(&message, 1));
            }
        }
        assert!(encoder.frame.capacity() <= KEPT_BYTES_MAX, "a long one is not kept for good");
    }

    #[test]
    fn an_oversize_length_is_refused_before_its_bytes_come() {
        let mut frames = Frames::default();
        frames.push(&(MAX_PAYLOAD_BYTES as u32 + 1).to_le_bytes());
        frames.push(&[1, 0, 0, 0]);
        let error = frames.next_frame().expect("decided by the header").expect_err("oversize");
        assert!(error.is_fatal(), "{error}");
    }

    #[test]
    fn an_unknown_kind_is_skipped_and_the_stream_goes_on() {
        let mut frames = Frames::default();
        frames.push(&[2, 0, 0, 0, 0xff, 0x7f, 0, 0, 9, 9]);
        frames.push(&encode(&ping(7), 0));
        assert_eq!(frames.next_frame(), Some(Err(FrameError::UnknownKind(0x7fff))));
        assert_eq!(frames.next_frame().unwrap().unwrap().message, ping(7));
    }

    #[test]
    fn strings_that_decode_to_gigabytes_are_refused() {
        // A vector of 40,000 offsets to one string of 60,000 bytes: a frame of 220 KB, 2.4 GB when decoded.
        let mut shared = planus::Builder::new();
        let text = shared.create_string("x".repeat(60_000));
        let keys = shared.create_vector::<planus::Offset<str>>(vec![text; 40_000]);
        let values = shared.create_vector::<planus::Offset<str>>(vec![text; 1]);
        let epoch = shared.create_vector::<u8>(vec![0u8; 16]);
        let table = wire::OpenNamespace::create(&mut shared, 1u64, keys, values, epoch);
        let payload = shared.finish(table, None);
        let error = Message::decode(Kind::OpenNamespace, payload).expect_err("refused").to_string();
        assert!(error.contains("share"), "{error}");
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut frames = Frames::default();
            frames.push(&bytes);
            for _ in 0..100 {
                match frames.next_frame() {
                    None => break,
                    Some(Err(error)) if error.is_fatal() => break,
                    Some(_) => {}
                }
            }
        }

        #[test]
        fn hostile_payloads_of_every_kind_never_panic(
            kind in 1u16..30, bytes in proptest::collection::vec(any::<u8>(), 0..400)
        ) {
            if let Ok(kind) = Kind::try_from(kind) {
                let _ = Message::decode(kind, &bytes);
            }
        }

        #[test]
        fn a_flipped_bit_is_a_message_or_an_error(bit in 0usize..8 * 120) {
            let message = Message::Save(wire::Save {
                job: vec![1; 16], spaces: vec![2; 16], counts: vec![2], parents: vec![0; 33], hashes: vec![3; 64],
                blocks: vec![4, 5], word: 6, tag: 7, deadline_ms: 8,
                event: 0,
            });
            let mut bytes = encode(&message, 0)[HEADER_BYTES..].to_vec();
            let bit = bit % (bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let _ = Message::decode(Kind::Save, &bytes);
        }
    }
}
