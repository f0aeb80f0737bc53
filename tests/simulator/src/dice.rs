//! The one source of chance: the same seed, the same course.

/// A generator (splitmix64). Streams that are forked from one seed do not disturb each other: a fault that is switched
/// off changes what it did, and not what everybody else draws.
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    /// From a seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed ^ 0x7069_6c6c_696f_6e21))
    }

    /// Another stream of the same seed.
    pub(crate) fn fork(&self, stream: u64) -> Self {
        Self(mix(self.0 ^ mix(stream)))
    }

    /// The next number.
    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`; 0 where there is none.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        // The bias of a modulus is nothing to a simulation.
        self.roll() % bound.max(1)
    }

    /// A number from `least` to `most`.
    pub(crate) fn within(&mut self, least: u64, most: u64) -> u64 {
        least + self.below(most.saturating_sub(least) + 1)
    }

    /// True so many times in a thousand.
    pub(crate) fn permille(&mut self, chance: u32) -> bool {
        self.below(1000) < u64::from(chance)
    }

    /// One of them.
    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// Spreads every bit over all.
pub(crate) fn mix(mut n: u64) -> u64 {
    n = (n ^ n >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    n = (n ^ n >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ n >> 31
}
