//! Dense arrays by their axes, outermost first: what most engines' pools are.

use crate::refusal::Refusal;

/// An axis of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Axis {
    Block,
    Layer,
    /// Keys, then values.
    Side,
    State,
    Head,
}

/// Bytes from one index to the next of every axis, and of the whole.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Strides {
    pub(crate) block: u64,
    pub(crate) layer: u64,
    pub(crate) side: u64,
    pub(crate) state: u64,
    pub(crate) head: u64,
    pub(crate) total: u64,
}

/// Strides of a dense array whose innermost elements are `bytes` long. An axis may occur twice (a
/// page-wise and a token-wise part); the inner one is its stride.
pub(crate) fn dense(axes: &[(Axis, u64)], bytes: u64) -> Result<Strides, Refusal> {
    let mut strides = Strides { total: bytes, ..Strides::default() };
    for (axis, len) in axes.iter().rev() {
        if *len == 0 {
            return Err(Refusal::Zero { what: "axis of a pool" });
        }
        let at = match axis {
            Axis::Block => &mut strides.block,
            Axis::Layer => &mut strides.layer,
            Axis::Side => &mut strides.side,
            Axis::State => &mut strides.state,
            Axis::Head => &mut strides.head,
        };
        *at = strides.total;
        strides.total =
            strides.total.checked_mul(*len).ok_or(Refusal::Overflow { what: "bytes of a pool" })?;
    }
    Ok(strides)
}

/// `Inconsistent`, unless both are equal.
pub(crate) fn expect(what: &'static str, expected: u64, got: u64) -> Result<(), Refusal> {
    if expected == got { Ok(()) } else { Err(Refusal::Inconsistent { what, expected, got }) }
}
