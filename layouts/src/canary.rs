//! The layout canary: bytes that name their place.
//!
//! The engine's shim writes them into one scratch block with the engine's own indexing; the sidecar
//! reads that block by its layout. Any difference of opinion shows up as a wrong byte at a known
//! coordinate, and the registration is refused.
//!
//! Word `i` of the canary, little endian, is `splitmix64(seed + i)`. Which byte of it belongs where:
//! [`crate::CheckedGroup::canary_check`] for a worker's groups, the order of the record for a [`Shard`].

use crate::content::Role;
use crate::shard::Shard;

/// What the canary says about a block that was read.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CanaryMismatch {
    /// The bytes are not those of one block of this shape.
    #[error("layout canary: expected a block of {expected} bytes, got {got}; read it by its plan")]
    Length {
        /// Bytes of a block.
        expected: u64,
        /// Bytes that came.
        got: u64,
    },
    /// A byte is not where the layout says.
    #[error(
        "layout canary: expected {expected:#04x} in layer `{layer}`, head {head}, state {state}, byte {byte}, \
         got {got:#04x}; the engine stores this cache in another way than it says, run it without pillion \
         and report its version"
    )]
    Byte {
        /// Name of the layer, shortened.
        layer: String,
        /// Head slot of its page.
        head: u64,
        /// State of its page.
        state: u64,
        /// Byte of the content.
        byte: u64,
        /// What the canary has there.
        expected: u8,
        /// What was read.
        got: u8,
    },
    /// A byte that is moved lies in no page.
    #[error("layout canary: expected every byte of block 0 in a page, byte {at} of the memory is in none")]
    Outside {
        /// Which.
        at: u64,
    },
    /// A byte of a shard is not where its description says.
    #[error(
        "layout canary: expected {expected:#04x} in {role} of layer {layer}, head {head}, state {state}, byte {byte}, \
         got {got:#04x}; the engine stores this cache in another way than it says, run it without pillion \
         and report its version"
    )]
    Element {
        /// Plane.
        role: Role,
        /// Layer of the model.
        layer: u32,
        /// Head of the model.
        head: u32,
        /// State.
        state: u32,
        /// Byte of the (head, state).
        byte: u32,
        /// What the canary has there.
        expected: u8,
        /// What was read.
        got: u8,
    },
}

fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Byte `index` of the canary.
pub fn canary_byte(seed: u64, index: u64) -> u8 {
    word(seed, index / 8).to_le_bytes()[(index % 8) as usize]
}

/// Fills `out` with the canary from its start.
pub fn canary_fill(seed: u64, out: &mut [u8]) {
    canary_fill_from(seed, 0, out);
}

/// Fills `out` with the canary from byte `first` on.
pub fn canary_fill_from(seed: u64, first: u64, out: &mut [u8]) {
    let skipped = (first % 8) as usize;
    let (head, rest) = out.split_at_mut(((8 - skipped) % 8).min(out.len()));
    let mut index = first / 8;
    if !head.is_empty() {
        head.copy_from_slice(&word(seed, index).to_le_bytes()[skipped..skipped + head.len()]);
        index += 1;
    }
    for (index, chunk) in (index..).zip(rest.chunks_mut(8)) {
        chunk.copy_from_slice(&word(seed, index).to_le_bytes()[..chunk.len()]);
    }
}

/// Compares a block that was read into the form of `record` (see [`Shard::record`]) with the canary.
///
/// Of layouts whose block stride is only declared, check the first and the last block, with
/// different seeds.
pub fn canary_check_record(seed: u64, record: &Shard, bytes: &[u8]) -> Result<(), CanaryMismatch> {
    let (expected, got) = (record.block_bytes(), bytes.len() as u64);
    if expected != got {
        return Err(CanaryMismatch::Length { expected, got });
    }
    let differs = (0u64..).zip(bytes).find(|(index, got)| canary_byte(seed, *index) != **got);
    let Some((index, got)) = differs else { return Ok(()) };
    let expected = canary_byte(seed, index);
    for piece in record.pieces() {
        let plane = &record.content().planes()[piece.part.plane];
        for layer in piece.part.layers.iter().copied() {
            for (head, state) in
                piece.part.heads.clone().flat_map(|head| (0..plane.states).map(move |state| (head, state)))
            {
                let Some(at) = record.address(piece.part.plane, 0, layer, head, state) else { continue };
                if (at..at + u64::from(plane.bytes)).contains(&index) {
                    let (role, byte, got) = (plane.role, (index - at) as u32, *got);
                    return Err(CanaryMismatch::Element { role, layer, head, state, byte, expected, got });
                }
            }
        }
    }
    // A record has no gaps, so this is not reached.
    Err(CanaryMismatch::Length { expected: record.block_bytes(), got: index })
}
