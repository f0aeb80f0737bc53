//! Packings as text, for wires and logs.
//!
//! ```text
//! kv total_heads=8 key=256 value=256 dtype=bfloat16
//! kv-scaled total_heads=8 key=128 value=128 format=int8_per_token_head
//! kv-planes total_heads=8 head=256 dtype=bfloat16
//! nvfp4 total_heads=8 data=64 scale=8
//! latent format=bfloat16
//! index key=128 scale=4 format=fp8
//! opaque-heads total_heads=2 format=CPU_ATTN/amx/bfloat16
//! opaque-page format=fp8_ds_mla/padded
//! states replicated=0 channels:rows=3,parts=32+32+64,element=2,first=0,format=bfloat16 heads:total=4,bytes=4096,format=float32
//! states replicated=0 whole:bytes=1152,format=gdn/3x128/bfloat16
//! ```
//!
//! Sizes are bytes, heads and channels count over all ranks. One packing has one text: fields stand in
//! this order, one space or comma apart, numbers are decimal. Bytes of a format outside of letters,
//! digits and `._-+/:[]()` are written `%XX`, so that any format survives.

use std::fmt;
use std::str::FromStr;

use super::packing::{Packing, StatePart};
use crate::refusal::{Refusal, shown};
use crate::shape::Dtype;

/// Longer texts are not looked at.
const TEXT_MAX: usize = 1 << 16;
/// Parts of a state page, and of a convolution's channels.
const PARTS_MAX: usize = 64;
/// Bytes of a format's name.
const FORMAT_MAX: usize = 1024;

const KINDS: &str = "kv, kv-scaled, kv-planes, nvfp4, latent, index, opaque-heads, opaque-page or states";

fn refuse<T>(expected: impl Into<String>, got: &str) -> Result<T, Refusal> {
    Err(Refusal::Packing { expected: expected.into(), got: shown(got) })
}

/// A format's name with everything that could be taken for grammar escaped.
pub(crate) struct Escaped<'a>(pub(crate) &'a str);

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._-+/:[]()".contains(&byte)
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.bytes() {
            match is_plain(byte) {
                true => write!(f, "{}", char::from(byte))?,
                false => write!(f, "%{byte:02X}")?,
            }
        }
        Ok(())
    }
}

fn unescaped(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let digit = |byte: u8| match byte {
                    b'0'..=b'9' => Some(byte - b'0'),
                    b'A'..=b'F' => Some(byte - b'A' + 10),
                    _ => None,
                };
                let escaped = digit(rest.next()?)? << 4 | digit(rest.next()?)?;
                // One text per packing.
                bytes.push(Some(escaped).filter(|byte| !is_plain(*byte))?);
            }
            plain if is_plain(plain) => bytes.push(plain),
            _ => return None,
        }
    }
    let text = String::from_utf8(bytes).ok()?;
    (!text.is_empty() && text.len() <= FORMAT_MAX).then_some(text)
}

fn number(text: &str) -> Option<u32> {
    let canonical = text == "0" || (!text.starts_with('0') && text.bytes().all(|byte| byte.is_ascii_digit()));
    text.parse().ok().filter(|_| canonical)
}

/// Fields of a packing or of one of its parts, read from the front.
struct Fields<'a> {
    rest: std::str::Split<'a, char>,
}

impl<'a> Fields<'a> {
    fn word(&mut self, name: &str, what: &str) -> Result<&'a str, Refusal> {
        let word = self.rest.next().unwrap_or_default();
        match word.strip_prefix(name).and_then(|value| value.strip_prefix('=')) {
            Some(value) => Ok(value),
            None => refuse(format!("`{name}=<{what}>`"), word),
        }
    }

    fn number(&mut self, name: &str) -> Result<u32, Refusal> {
        let value = self.word(name, "number")?;
        match number(value) {
            Some(number) => Ok(number),
            None => refuse(format!("`{name}=` and a decimal number below 2^32"), value),
        }
    }

    fn flag(&mut self, name: &str) -> Result<bool, Refusal> {
        match self.word(name, "0 or 1")? {
            "0" => Ok(false),
            "1" => Ok(true),
            other => refuse(format!("`{name}=0` or `{name}=1`"), other),
        }
    }

    fn format(&mut self) -> Result<String, Refusal> {
        let value = self.word("format", "name")?;
        match unescaped(value) {
            Some(format) => Ok(format),
            None => refuse("a format of 1 to 1024 bytes, escaped as `%XX` where it must be", value),
        }
    }

    fn dtype(&mut self) -> Result<Dtype, Refusal> {
        let name = self.word("dtype", "name")?;
        let dtype: Dtype = name.parse()?;
        if dtype.to_string() == name { Ok(dtype) } else { refuse(format!("`dtype={dtype}`"), name) }
    }

    /// A value of numbers with plus signs between them.
    fn numbers(&mut self, name: &str) -> Result<Vec<u32>, Refusal> {
        let value = self.word(name, "numbers")?;
        let numbers: Option<Vec<u32>> = value.split('+').take(PARTS_MAX + 1).map(number).collect();
        match numbers.filter(|numbers| numbers.len() <= PARTS_MAX) {
            Some(numbers) => Ok(numbers),
            None => refuse(format!("`{name}=` and 1 to {PARTS_MAX} numbers with `+` between"), value),
        }
    }

    fn end(mut self) -> Result<(), Refusal> {
        match self.rest.next() {
            None => Ok(()),
            Some(word) => refuse("nothing more", word),
        }
    }
}

impl FromStr for Packing {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Packing, Refusal> {
        if text.len() > TEXT_MAX {
            let (limit, got) = (TEXT_MAX as u64, text.len() as u64);
            return Err(Refusal::TooMuch { what: "bytes of a packing's text", limit, got });
        }
        let mut fields = Fields { rest: text.split(' ') };
        let kind = fields.rest.next().unwrap_or_default();
        let packing = match kind {
            "kv" => Packing::KeyValue {
                total_heads: fields.number("total_heads")?,
                key_bytes: fields.number("key")?,
                value_bytes: fields.number("value")?,
                dtype: fields.dtype()?,
            },
            "kv-scaled" => Packing::ScaledKeyValue {
                total_heads: fields.number("total_heads")?,
                key_bytes: fields.number("key")?,
                value_bytes: fields.number("value")?,
                format: fields.format()?,
            },
            "kv-planes" => Packing::KeyValuePlanes {
                total_heads: fields.number("total_heads")?,
                head_bytes: fields.number("head")?,
                dtype: fields.dtype()?,
            },
            "nvfp4" => Packing::Nvfp4 {
                total_heads: fields.number("total_heads")?,
                data_bytes: fields.number("data")?,
                scale_bytes: fields.number("scale")?,
            },
            "latent" => Packing::Latent { format: fields.format()? },
            "index" => Packing::Index {
                key_bytes: fields.number("key")?,
                scale_bytes: fields.number("scale")?,
                format: fields.format()?,
            },
            "opaque-heads" => {
                Packing::OpaqueHeads { total_heads: fields.number("total_heads")?, format: fields.format()? }
            }
            "opaque-page" => Packing::OpaquePage { format: fields.format()? },
            "states" => return states(fields),
            other => return refuse(KINDS, other),
        };
        fields.end()?;
        Ok(packing)
    }
}

fn states(mut fields: Fields<'_>) -> Result<Packing, Refusal> {
    let replicated = fields.flag("replicated")?;
    let mut parts = Vec::new();
    for word in fields.rest {
        if parts.len() == PARTS_MAX {
            return refuse(format!("at most {PARTS_MAX} parts of a state"), word);
        }
        parts.push(state_part(word)?);
    }
    match parts.is_empty() {
        true => refuse("the parts of a state", ""),
        false => Ok(Packing::States { parts, replicated }),
    }
}

fn state_part(word: &str) -> Result<StatePart, Refusal> {
    let (kind, fields) = word.split_once(':').unwrap_or((word, ""));
    let mut fields = Fields { rest: fields.split(',') };
    let part = match kind {
        "channels" => StatePart::Channels {
            rows: fields.number("rows")?,
            parts: fields.numbers("parts")?,
            element_bytes: fields.number("element")?,
            channels_first: fields.flag("first")?,
            format: fields.format()?,
        },
        "heads" => StatePart::Heads {
            total: fields.number("total")?,
            bytes: fields.number("bytes")?,
            format: fields.format()?,
        },
        "whole" => StatePart::Whole { bytes: fields.number("bytes")?, format: fields.format()? },
        _ => return refuse("`channels:…`, `heads:…` or `whole:…`", word),
    };
    fields.end()?;
    Ok(part)
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Packing::KeyValue { total_heads, key_bytes, value_bytes, dtype } => {
                write!(f, "kv total_heads={total_heads} key={key_bytes} value={value_bytes} dtype={dtype}")
            }
            Packing::ScaledKeyValue { total_heads, key_bytes, value_bytes, format } => {
                write!(f, "kv-scaled total_heads={total_heads} key={key_bytes} value={value_bytes}")?;
                write!(f, " format={}", Escaped(format))
            }
            Packing::KeyValuePlanes { total_heads, head_bytes, dtype } => {
                write!(f, "kv-planes total_heads={total_heads} head={head_bytes} dtype={dtype}")
            }
            Packing::Nvfp4 { total_heads, data_bytes, scale_bytes } => {
                write!(f, "nvfp4 total_heads={total_heads} data={data_bytes} scale={scale_bytes}")
            }
            Packing::Latent { format } => write!(f, "latent format={}", Escaped(format)),
            Packing::Index { key_bytes, scale_bytes, format } => {
                write!(f, "index key={key_bytes} scale={scale_bytes} format={}", Escaped(format))
            }
            Packing::OpaqueHeads { total_heads, format } => {
                write!(f, "opaque-heads total_heads={total_heads} format={}", Escaped(format))
            }
            Packing::OpaquePage { format } => write!(f, "opaque-page format={}", Escaped(format)),
            Packing::States { parts, replicated } => {
                write!(f, "states replicated={}", u8::from(*replicated))?;
                parts.iter().try_for_each(|part| write!(f, " {part}"))
            }
        }
    }
}

impl fmt::Display for StatePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StatePart::Channels { rows, parts, element_bytes, channels_first, format } => {
                let parts: Vec<String> = parts.iter().map(u32::to_string).collect();
                write!(f, "channels:rows={rows},parts={},element={element_bytes}", parts.join("+"))?;
                write!(f, ",first={},format={}", u8::from(*channels_first), Escaped(format))
            }
            StatePart::Heads { total, bytes, format } => {
                write!(f, "heads:total={total},bytes={bytes},format={}", Escaped(format))
            }
            StatePart::Whole { bytes, format } => write!(f, "whole:bytes={bytes},format={}", Escaped(format)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn any_dtype() -> impl Strategy<Value = Dtype> {
        proptest::sample::select(vec![
            Dtype::Float32,
            Dtype::Float16,
            Dtype::Bfloat16,
            Dtype::Fp8,
            Dtype::Fp8E4m3,
            Dtype::Fp8E5m2,
        ])
    }

    fn any_format() -> impl Strategy<Value = String> {
        prop_oneof!["[a-z0-9_./]{1,20}", "\\PC{1,20}", Just("%,= \n:+".to_owned())]
    }

    fn any_part() -> impl Strategy<Value = StatePart> {
        let channels = (any::<u32>(), vec(any::<u32>(), 1..5), any::<u32>(), any::<bool>(), any_format());
        prop_oneof![
            channels.prop_map(|(rows, parts, element_bytes, channels_first, format)| {
                StatePart::Channels { rows, parts, element_bytes, channels_first, format }
            }),
            (any::<u32>(), any::<u32>(), any_format()).prop_map(|(total, bytes, format)| StatePart::Heads {
                total,
                bytes,
                format
            }),
            (any::<u32>(), any_format()).prop_map(|(bytes, format)| StatePart::Whole { bytes, format }),
        ]
    }

    fn any_packing() -> impl Strategy<Value = Packing> {
        let two = || (any::<u32>(), any::<u32>());
        prop_oneof![
            (any::<u32>(), two(), any_dtype()).prop_map(|(total_heads, (key_bytes, value_bytes), dtype)| {
                Packing::KeyValue { total_heads, key_bytes, value_bytes, dtype }
            }),
            (any::<u32>(), two(), any_format()).prop_map(
                |(total_heads, (key_bytes, value_bytes), format)| {
                    Packing::ScaledKeyValue { total_heads, key_bytes, value_bytes, format }
                }
            ),
            (two(), any_dtype()).prop_map(|((total_heads, head_bytes), dtype)| Packing::KeyValuePlanes {
                total_heads,
                head_bytes,
                dtype
            }),
            (any::<u32>(), two()).prop_map(|(total_heads, (data_bytes, scale_bytes))| Packing::Nvfp4 {
                total_heads,
                data_bytes,
                scale_bytes
            }),
            any_format().prop_map(|format| Packing::Latent { format }),
            (two(), any_format()).prop_map(|((key_bytes, scale_bytes), format)| Packing::Index {
                key_bytes,
                scale_bytes,
                format
            }),
            (any::<u32>(), any_format())
                .prop_map(|(total_heads, format)| Packing::OpaqueHeads { total_heads, format }),
            any_format().prop_map(|format| Packing::OpaquePage { format }),
            (vec(any_part(), 1..4), any::<bool>())
                .prop_map(|(parts, replicated)| Packing::States { parts, replicated }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 5000, ..ProptestConfig::default() })]

        #[test]
        fn a_text_means_its_packing(packing in any_packing()) {
            let text = packing.to_string();
            prop_assert!(text.is_ascii() && !text.contains('\n'));
            prop_assert_eq!(text.parse(), Ok(packing));
        }

        /// One changed character: refused, or the one text of another packing.
        #[test]
        fn a_packing_has_one_text(packing in any_packing(), at in any::<prop::sample::Index>(), with in "[ -~é]") {
            let mut text: Vec<char> = packing.to_string().chars().collect();
            let at = at.index(text.len());
            text[at] = with.chars().next().expect("one");
            let text: String = text.into_iter().collect();
            if let Ok(packing) = text.parse::<Packing>() {
                prop_assert_eq!(packing.to_string(), text);
            }
        }

        #[test]
        fn hostile_text_is_answered(text in "\\PC{0,80}") {
            prop_assert!(text.parse::<Packing>().is_err());
        }
    }

    #[test]
    fn texts_as_documented() {
        for text in [
            "kv total_heads=8 key=256 value=256 dtype=bfloat16",
            "kv-scaled total_heads=8 key=128 value=128 format=int8_per_token_head",
            "kv-planes total_heads=8 head=256 dtype=bfloat16",
            "nvfp4 total_heads=8 data=64 scale=8",
            "latent format=bfloat16",
            "index key=128 scale=4 format=fp8",
            "opaque-heads total_heads=2 format=CPU_ATTN/amx/bfloat16",
            "opaque-page format=fp8_ds_mla/padded",
            "states replicated=0 channels:rows=3,parts=32+32+64,element=2,first=0,format=bfloat16 \
             heads:total=4,bytes=4096,format=float32",
            "states replicated=0 whole:bytes=1152,format=gdn/3x128/bfloat16",
        ] {
            assert_eq!(text.parse::<Packing>().expect(text).to_string(), text);
        }
    }

    #[test]
    fn refusals_say_what_was_expected() {
        for (text, expected) in [
            ("", "kv, kv-scaled"),
            ("kv", "`total_heads=<number>`, got ``"),
            ("kv total_heads=08 key=1 value=1 dtype=fp8", "decimal number below 2^32, got `08`"),
            ("kv total_heads=+8 key=1 value=1 dtype=fp8", "decimal number"),
            ("kv total_heads=4294967296 key=1 value=1 dtype=fp8", "decimal number"),
            ("kv key=1 total_heads=8 value=1 dtype=fp8", "`total_heads=<number>`, got `key=1`"),
            ("kv total_heads=8 key=1 value=1 dtype=torch.float32", "`dtype=float32`"),
            ("kv total_heads=8 key=1 value=1 dtype=uint8", "expected one of float32"),
            ("kv total_heads=8 key=1 value=1 dtype=fp8 ", "nothing more"),
            ("latent format=", "1 to 1024 bytes"),
            ("latent format=%41", "1 to 1024 bytes"),
            ("latent format=%2", "1 to 1024 bytes"),
            ("latent format=%FF", "1 to 1024 bytes"),
            ("states replicated=0", "the parts of a state"),
            ("states replicated=2 whole:bytes=1,format=x", "`replicated=0` or `replicated=1`"),
            ("states replicated=0 half:bytes=1,format=x", "`whole:…`"),
            ("states replicated=0 channels:rows=1,parts=,element=1,first=0,format=x", "1 to 64 numbers"),
        ] {
            let refusal = text.parse::<Packing>().expect_err(text).to_string();
            assert!(refusal.contains(expected), "{text}: {refusal}");
        }
        let many = format!("states replicated=0{}", " whole:bytes=1,format=x".repeat(65));
        assert!(many.parse::<Packing>().is_err());
        let long = format!("latent format={}", "x".repeat(TEXT_MAX));
        assert!(matches!(long.parse::<Packing>(), Err(Refusal::TooMuch { .. })));
        let long = format!("latent format={}", "x".repeat(FORMAT_MAX + 1));
        assert!(long.parse::<Packing>().is_err());
    }
}
