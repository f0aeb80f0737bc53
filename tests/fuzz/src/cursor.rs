//! Structured inputs from plain bytes.

/// Reads values from the front of an input. Where the input has ended, everything is zero: every input means something,
/// and a shorter one means something simpler, which is what minimisers need.
#[derive(Debug, Clone)]
pub(crate) struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    /// Over an input, of which not more than `max` bytes count.
    pub(crate) fn new(data: &'a [u8], max: usize) -> Self {
        Self(&data[..data.len().min(max)])
    }

    /// Whether nothing is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// The next bytes, fewer at the end.
    pub(crate) fn take(&mut self, count: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(count.min(self.0.len()));
        self.0 = tail;
        head
    }

    /// So many bytes, zeros at the end.
    pub(crate) fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let head = self.take(N);
        out[..head.len()].copy_from_slice(head);
        out
    }

    /// One byte.
    pub(crate) fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Two bytes.
    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// One bit of a byte.
    pub(crate) fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// True for one byte in sixteen, never at the end: for what spoils an input.
    pub(crate) fn rarely(&mut self) -> bool {
        self.byte() & 15 == 15
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        if bound <= 256 { usize::from(self.byte()) % bound.max(1) } else { self.u16() as usize % bound }
    }

    /// One of some.
    pub(crate) fn pick<'b, T>(&mut self, from: &'b [T]) -> &'b T {
        &from[self.below(from.len())]
    }

    /// A number of any size: most are small, some lie around a power of two, the rest is what eight bytes say.
    pub(crate) fn number(&mut self) -> u64 {
        match self.byte() {
            small @ 0..=199 => u64::from(small),
            power @ 200..=239 => {
                let around = i64::from(self.byte() % 5) - 2;
                (1u64 << ((power - 200) as u32 * 64 / 40)).wrapping_add_signed(around)
            }
            240..=247 => u64::from(self.u16()),
            248..=251 => u64::MAX - u64::from(self.byte()),
            _ => u64::from_le_bytes(self.array()),
        }
    }

    /// The same as 32 bits.
    pub(crate) fn number32(&mut self) -> u32 {
        let number = self.number();
        u32::try_from(number).unwrap_or(number as u32 | 1 << 31)
    }

    /// Some bytes: their length comes first.
    pub(crate) fn blob(&mut self, max: usize) -> &'a [u8] {
        let length = self.below(max + 1);
        self.take(length)
    }

    /// Some text: what is not UTF-8 is replaced.
    pub(crate) fn text(&mut self, max: usize) -> String {
        String::from_utf8_lossy(self.blob(max)).into_owned()
    }

    /// Some of what `each` makes.
    pub(crate) fn some<T>(&mut self, max: usize, mut each: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(max + 1)).map(|_| each(self)).collect()
    }
}
