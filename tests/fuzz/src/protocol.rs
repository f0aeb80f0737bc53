//! Frames and messages, as either side decodes them.

use pillion_protocol::{
    FrameError, Frames, HEADER_BYTES, MAX_PAYLOAD_BYTES, Message,
    frame::{Frame, encode},
};

use crate::{cursor::Cursor, messages};

/// Payloads up to this length are encoded again: more bytes can be shared into strings that no frame holds.
const AGAIN_BYTES_MAX: usize = 2048;

/// What a message says survives encoding, and the frame is within the protocol's bounds.
fn survives(message: &Message) {
    let bytes = encode(message, 0);
    assert!(bytes.len() <= HEADER_BYTES + MAX_PAYLOAD_BYTES);
    let again = Message::decode(message.kind(), &bytes[HEADER_BYTES..]);
    assert_eq!(again.as_ref(), Ok(message), "encoded and decoded again it says something else");
}

/// All frames of a stream that comes in these parts, up to the one that loses it.
fn frames_of<'a>(parts: impl Iterator<Item = &'a [u8]>) -> (Vec<Result<Frame, FrameError>>, usize) {
    let (mut frames, mut seen) = (Frames::default(), Vec::new());
    for part in parts {
        frames.push(part);
        while let Some(next) = frames.next_frame() {
            let lost = next.as_ref().is_err_and(FrameError::is_fatal);
            seen.push(next);
            if lost {
                return (seen, 0);
            }
        }
        assert!(frames.pending_bytes() < HEADER_BYTES + MAX_PAYLOAD_BYTES, "more is held than one frame");
    }
    (seen, frames.pending_bytes())
}

/// A byte stream gives the same frames wherever it is cut, and what decodes survives encoding.
pub fn frames(data: &[u8]) {
    let mut c = Cursor::new(data, 16 << 10);
    let mut cuts: Vec<usize> = (0..4).map(|_| usize::from(c.byte())).collect();
    cuts.retain(|cut| *cut > 0);
    let stream = c.rest();
    let (whole, pending) = frames_of(std::iter::once(stream));
    let mut left = stream;
    let mut turn = 0;
    let parts = std::iter::from_fn(|| {
        let cut = if cuts.is_empty() { 1 } else { cuts[turn % cuts.len()] };
        turn += 1;
        let (head, tail) = left.split_at(cut.min(left.len()));
        left = tail;
        (!head.is_empty()).then_some(head)
    });
    let (cut, cut_pending) = frames_of(parts);
    assert_eq!(whole, cut, "the frames depend on how their bytes came");
    assert_eq!(pending, cut_pending);
    if stream.len() <= AGAIN_BYTES_MAX {
        whole.iter().filter_map(|frame| frame.as_ref().ok()).for_each(|frame| survives(&frame.message));
    }
}

/// A payload of any kind is refused, or is a message that survives encoding. Any message survives it, too, and one
/// whose bytes change is another message or an error.
pub fn message(data: &[u8]) {
    let mut c = Cursor::new(data, AGAIN_BYTES_MAX);
    if c.flag() {
        let kind = u16::from(c.byte());
        let Ok(kind) = kind.try_into() else { return };
        if let Ok(message) = Message::decode(kind, c.rest()) {
            survives(&message);
        }
        return;
    }
    let message = messages::message(&mut c);
    survives(&message);
    let mut payload = encode(&message, 0).split_off(HEADER_BYTES);
    while !c.is_empty() {
        let at = usize::from(c.u16()) % payload.len();
        payload[at] ^= c.byte();
    }
    if payload.len() <= AGAIN_BYTES_MAX
        && let Ok(other) = Message::decode(message.kind(), &payload)
    {
        survives(&other);
    }
}
