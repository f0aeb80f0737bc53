//! Sizes as people write them: `512MiB`, or a share of memory, `20%`.

use std::fmt;
use std::str::FromStr;

const UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

/// Why a text is no size; the caller adds key and origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Neither digits nor digits with a unit.
    #[error("not a number with a unit")]
    Syntax,
    /// More than fits in 64 bits.
    #[error("larger than 16 EiB")]
    TooLarge,
    /// A share outside 1 % to 90 %.
    #[error("outside 1% to 90%")]
    Share,
}

/// A number of bytes, written exactly: `"512MiB"`, `"1GB"`, `"4096"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(SizeError::Syntax);
        }
        let number: u64 = number.parse().map_err(|_| SizeError::TooLarge)?;
        let unit = unit.trim_start();
        let factor = if unit.is_empty() { Some(1) } else { unit_bytes(unit) };
        number.checked_mul(factor.ok_or(SizeError::Syntax)?).map(Self).ok_or(SizeError::TooLarge)
    }
}

/// Units in any case: nobody means milli-bytes, and `512mib` has one reading.
fn unit_bytes(unit: &str) -> Option<u64> {
    UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|(_, bytes)| *bytes)
}

impl fmt::Display for ByteSize {
    /// The largest unit that says it exactly, so that printing and parsing are inverse.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact =
            |unit: &&(&str, u64)| unit.0.ends_with("iB") && self.0 != 0 && self.0.is_multiple_of(unit.1);
        match UNITS.iter().find(exact) {
            Some((name, bytes)) => write!(f, "{}{name}", self.0 / bytes),
            None => write!(f, "{}B", self.0),
        }
    }
}

/// How large a pool is to be: bytes, or a share of the memory available at start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolSize {
    /// Exactly this.
    Bytes(ByteSize),
    /// This many per cent (1 to 90) of the available memory.
    Percent(u8),
}

impl PoolSize {
    /// Bytes for a machine that has `available` bytes; the caller rounds to pages.
    pub fn resolve(self, available: u64) -> u64 {
        match self {
            Self::Bytes(size) => size.0,
            Self::Percent(percent) => (u128::from(available) * u128::from(percent) / 100) as u64,
        }
    }
}

impl FromStr for PoolSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let Some(share) = text.trim().strip_suffix('%') else {
            return text.parse().map(Self::Bytes);
        };
        let share = share.trim_end();
        if share.is_empty() || !share.bytes().all(|b| b.is_ascii_digit()) {
            return Err(SizeError::Syntax);
        }
        match share.parse::<u8>() {
            Ok(percent @ 1..=90) => Ok(Self::Percent(percent)),
            _ => Err(SizeError::Share),
        }
    }
}

impl fmt::Display for PoolSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(size) => size.fmt(f),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512MiB", 512 << 20),
            (" 512 mib ", 512 << 20),
            ("1GB", 1_000_000_000),
            ("3TiB", 3 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(text.parse::<ByteSize>(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "MiB", "-1", "1.5GiB", "12 parsecs", "1e9", "0x10", "٣MiB", "1MiB 2"] {
            assert_eq!(text.parse::<ByteSize>(), Err(SizeError::Syntax), "{text}");
        }
        for text in ["18446744073709551616", "16777216TiB"] {
            assert_eq!(text.parse::<ByteSize>(), Err(SizeError::TooLarge), "{text}");
        }
        assert_eq!("16777215TiB".parse::<ByteSize>(), Ok(ByteSize(16_777_215 << 40)));
    }

    #[test]
    fn shares_just_pass_and_just_fail() {
        assert_eq!("1%".parse(), Ok(PoolSize::Percent(1)));
        assert_eq!("90 %".parse(), Ok(PoolSize::Percent(90)));
        for text in ["0%", "91%", "300%"] {
            assert_eq!(text.parse::<PoolSize>(), Err(SizeError::Share), "{text}");
        }
        for text in ["%", "-5%", "+5%", "2.5%"] {
            assert_eq!(text.parse::<PoolSize>(), Err(SizeError::Syntax), "{text}");
        }
    }

    #[test]
    fn a_share_resolves_against_what_is_available() {
        assert_eq!(PoolSize::Percent(20).resolve(1000), 200);
        assert_eq!(PoolSize::Percent(90).resolve(u64::MAX), u64::MAX / 10 * 9 + 4);
        assert_eq!(PoolSize::Bytes(ByteSize(7)).resolve(0), 7);
    }

    proptest! {
        #[test]
        fn printed_sizes_parse_back(bytes in any::<u64>(), shift in 0u32..64) {
            let size = ByteSize(bytes >> shift << (shift / 2));
            prop_assert_eq!(size.to_string().parse::<ByteSize>(), Ok(size));
        }

        #[test]
        fn every_unit_multiplies(number in 0u64..1 << 20, unit in 0..UNITS.len(), spaces in 0usize..3) {
            let (name, bytes) = UNITS[unit];
            let text = format!("{number}{}{name}", " ".repeat(spaces));
            prop_assert_eq!(text.parse::<ByteSize>(), Ok(ByteSize(number * bytes)));
        }

        #[test]
        fn any_text_is_answered_without_a_panic(text in ".{0,40}") {
            let _ = text.parse::<ByteSize>();
            if let Ok(size) = text.parse::<PoolSize>() {
                prop_assert_eq!(size.to_string().parse::<PoolSize>(), Ok(size));
            }
        }
    }
}
