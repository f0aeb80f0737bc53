//! Loop nests over contiguous runs, and how many of them become few.

use crate::plan::StridedCopy;
use crate::refusal::Refusal;

/// An axis as both sides see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Axis {
    pub(crate) len: u64,
    pub(crate) src: u64,
    pub(crate) dst: u64,
}

/// Runs of `len` bytes at `src` and `dst`, repeated along the axes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Nest {
    pub(crate) src: u64,
    pub(crate) dst: u64,
    pub(crate) len: u64,
    pub(crate) axes: Vec<Axis>,
}

const ONCE: Axis = Axis { len: 1, src: 0, dst: 0 };

impl Nest {
    /// Axes innermost first in the destination, those that continue each other joined.
    fn normalise(&mut self) {
        self.axes.retain(|axis| axis.len > 1);
        self.axes.sort_by_key(|axis| (axis.dst, axis.src));
        let mut joined: Vec<Axis> = Vec::with_capacity(self.axes.len());
        for axis in std::mem::take(&mut self.axes) {
            match joined.last_mut() {
                None if axis.src == self.len && axis.dst == self.len => self.len *= axis.len,
                Some(last) if axis.src == last.src * last.len && axis.dst == last.dst * last.len => {
                    last.len *= axis.len;
                }
                _ => joined.push(axis),
            }
        }
        self.axes = joined;
    }

    /// Its axes as levels of a copy, two at most, and those that must be written out: the shortest.
    fn levels(&self) -> (Vec<Axis>, Vec<Axis>) {
        let mut axes = self.axes.clone();
        axes.sort_by_key(|axis| std::cmp::Reverse(axis.len));
        let written = axes.split_off(axes.len().min(2));
        axes.sort_by_key(|axis| axis.dst);
        (axes, written)
    }

    /// How many copies say it; saturates.
    fn count(&self) -> u64 {
        self.levels().1.iter().fold(1, |all, axis| axis.len.saturating_mul(all))
    }

    /// The copies that say it.
    fn copies(&self, out: &mut Vec<StridedCopy>) {
        let (axes, written) = self.levels();
        let mut level = axes.into_iter();
        let mut level = || level.next().unwrap_or(ONCE);
        let (inner, outer) = (level(), level());
        let total: u64 = written.iter().map(|axis| axis.len).product();
        out.extend((0..total).map(|index| {
            let (mut rest, mut src, mut dst) = (index, self.src, self.dst);
            for axis in &written {
                src += rest % axis.len * axis.src;
                dst += rest % axis.len * axis.dst;
                rest /= axis.len;
            }
            StridedCopy {
                src,
                dst,
                len: self.len,
                count: inner.len,
                src_stride: inner.src,
                dst_stride: inner.dst,
                count2: outer.len,
                src_stride2: outer.src,
                dst_stride2: outer.dst,
            }
        }));
    }
}

/// Copies of one plan, at most. What engines describe takes some hundreds; only a hostile description
/// has so many axes that go in different directions.
const COPIES_MAX: u64 = 1 << 20;

/// As few copies as joining nests of equal form finds.
pub(crate) fn copies(mut nests: Vec<Nest>) -> Result<Vec<StridedCopy>, Refusal> {
    loop {
        let before = nests.len();
        nests.iter_mut().for_each(Nest::normalise);
        nests = stack(glue(nests));
        if nests.len() == before {
            break;
        }
    }
    let mut out = Vec::new();
    nests.sort_by_key(|nest| nest.dst);
    nests.iter_mut().for_each(Nest::normalise);
    let got = nests.iter().fold(0, |all: u64, nest| all.saturating_add(nest.count()));
    if got > COPIES_MAX {
        return Err(Refusal::TooMuch { what: "strided copies of a block", limit: COPIES_MAX, got });
    }
    nests.iter().for_each(|nest| nest.copies(&mut out));
    Ok(out)
}

/// Joins nests whose runs touch on both sides: keys and values of a token.
fn glue(mut nests: Vec<Nest>) -> Vec<Nest> {
    nests.sort_by(|a, b| (&a.axes, a.dst).cmp(&(&b.axes, b.dst)));
    let mut out: Vec<Nest> = Vec::with_capacity(nests.len());
    for nest in nests {
        match out.last_mut() {
            Some(last)
                if last.axes == nest.axes
                    && last.src + last.len == nest.src
                    && last.dst + last.len == nest.dst =>
            {
                last.len += nest.len;
            }
            _ => out.push(nest),
        }
    }
    out
}

/// Makes nests of one form at regular distances one more axis.
fn stack(mut nests: Vec<Nest>) -> Vec<Nest> {
    nests.sort_by(|a, b| (&a.axes, a.len, a.dst).cmp(&(&b.axes, b.len, b.dst)));
    let mut out: Vec<Nest> = Vec::with_capacity(nests.len());
    let mut rest = nests.as_slice();
    while let Some(first) = rest.first() {
        let alike = rest.iter().take_while(|nest| (&nest.axes, nest.len) == (&first.axes, first.len)).count();
        let (group, others) = rest.split_at(alike);
        rest = others;
        stack_alike(group, &mut out);
    }
    out
}

/// The nests of one form, in order of destination.
fn stack_alike(mut group: &[Nest], out: &mut Vec<Nest>) {
    while let Some(first) = group.first() {
        let steps = |a: &Nest, b: &Nest| b.src.checked_sub(a.src).map(|src| (src, b.dst - a.dst));
        let step = group.get(1).and_then(|second| steps(first, second)).filter(|(src, _)| *src > 0);
        let regular = group.windows(2).take_while(|pair| step.is_some() && steps(&pair[0], &pair[1]) == step);
        let count = regular.count() + 1;
        let mut whole = first.clone();
        if let Some((src, dst)) = step
            && count > 1
        {
            whole.axes.push(Axis { len: count as u64, src, dst });
        }
        out.push(whole);
        group = &group[count..];
    }
}
