//! Whether strided sets of bytes share one, decided without counting them.

use crate::shape::Dim;

/// The bytes `start + Σ index × stride + 0..len`.
#[derive(Debug, Clone)]
pub(crate) struct Comb {
    pub(crate) start: u64,
    pub(crate) axes: Vec<Dim>,
    pub(crate) len: u64,
}

/// More combs than that are not looked at; no engine's description comes near.
const COMBS_MAX: usize = 1 << 16;

impl Comb {
    /// One past the last byte; `None` if that leaves 64 bits.
    pub(crate) fn end(&self) -> Option<u64> {
        self.axes.iter().try_fold(self.start.checked_add(self.len)?, |end, axis| {
            end.checked_add(axis.stride.checked_mul(axis.len - 1)?)
        })
    }

    fn reach(&self) -> u64 {
        self.end().unwrap_or(u64::MAX)
    }

    /// Whether its own axes nest: no two of its coordinates share a byte.
    fn nests(&self) -> bool {
        let mut axes = self.axes.clone();
        axes.sort_by_key(|axis| axis.stride);
        let mut extent = self.len;
        axes.iter().all(|axis| {
            let apart = axis.stride >= extent;
            extent = extent.saturating_add(axis.stride.saturating_mul(axis.len - 1));
            apart
        })
    }
}

/// True only if no byte belongs to two coordinates. Arrangements that are neither apart, nor beside
/// each other within a common stride, nor can be unrolled into such, count as sharing.
///
/// Ends of combs must not overflow.
pub(crate) fn disjoint(mut combs: Vec<Comb>) -> bool {
    for comb in &mut combs {
        comb.axes.retain(|axis| axis.len > 1);
    }
    let mut work = vec![combs];
    while let Some(combs) = work.pop() {
        for cluster in clusters(combs) {
            if let [single] = cluster.as_slice() {
                if !single.nests() {
                    return false;
                }
                continue;
            }
            match reduce(cluster) {
                Some(smaller) => work.push(smaller),
                None => return false,
            }
        }
    }
    true
}

/// Groups whose spans do not meet.
fn clusters(mut combs: Vec<Comb>) -> Vec<Vec<Comb>> {
    combs.sort_by_key(|comb| comb.start);
    let mut out: Vec<Vec<Comb>> = Vec::new();
    let mut end = 0;
    for comb in combs {
        let reach = comb.reach();
        match out.last_mut() {
            Some(cluster) if comb.start < end => cluster.push(comb),
            _ => out.push(vec![comb]),
        }
        end = end.max(reach);
    }
    out
}

/// Takes away an axis that all share and none outgrows, or unrolls the longest one.
fn reduce(mut combs: Vec<Comb>) -> Option<Vec<Comb>> {
    let largest = combs.iter().flat_map(|comb| &comb.axes).max_by_key(|axis| axis.stride).copied()?;
    if combs.iter().all(|comb| comb.axes.contains(&largest)) {
        let mut inner = combs.clone();
        for comb in &mut inner {
            let at = comb.axes.iter().position(|axis| *axis == largest)?;
            comb.axes.remove(at);
        }
        let first = inner.iter().map(|comb| comb.start).min()?;
        let last = inner.iter().map(Comb::reach).max()?;
        if last - first <= largest.stride {
            return Some(inner);
        }
    }
    // Unroll where that axis is: the pieces fall into clusters of their own.
    let at = combs.iter().position(|comb| comb.axes.contains(&largest))?;
    let mut comb = combs.swap_remove(at);
    comb.axes.retain({
        let mut first = true;
        move |axis| *axis != largest || !std::mem::replace(&mut first, false)
    });
    if combs.len() as u64 + largest.len > COMBS_MAX as u64 {
        return None;
    }
    combs.extend(
        (0..largest.len).map(|step| Comb { start: comb.start + step * largest.stride, ..comb.clone() }),
    );
    Some(combs)
}
