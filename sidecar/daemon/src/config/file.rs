//! The TOML file: keys with the line that each stands on.

use std::io::Read;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::error::{Origin, Problem};
use super::keys::Key;
use super::value::Raw;
use super::{Found, unknown_key};

/// A configuration is a page; more is a mistake such as a device file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Adds what the file says to `found`, and what is wrong with it to `problems`.
pub(super) fn read(path: &Path, found: &mut Vec<Found>, problems: &mut Vec<Problem>) {
    let text = match read_text(path) {
        Ok(text) => text,
        Err(message) => {
            problems.push(Problem::File { path: path.to_owned(), message });
            return;
        }
    };
    let line = |offset: usize| {
        let before = text.as_bytes().iter().take(offset);
        Origin::File { path: path.to_owned(), line: 1 + before.filter(|byte| **byte == b'\n').count() }
    };
    let table = match DeTable::parse(&text) {
        Ok(table) => table.into_inner(),
        Err(error) => {
            let origin = line(error.span().map_or(0, |span| span.start));
            problems.push(Problem::Syntax { origin, message: error.message().to_owned() });
            return;
        }
    };
    for (name, value) in &table {
        match Key::named(name.get_ref()) {
            Some(key) => {
                found.push(Found { key, origin: line(value.span().start), raw: raw(value.get_ref()) })
            }
            None => problems.push(unknown_key(name.get_ref(), line(name.span().start))),
        }
    }
}

fn read_text(path: &Path) -> Result<String, String> {
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("more than {FILE_BYTES_MAX} bytes"));
    }
    String::from_utf8(bytes).map_err(|_| "bytes that are not UTF-8".to_owned())
}

fn raw(value: &DeValue<'_>) -> Raw {
    match value {
        DeValue::String(text) => Raw::Text(text.to_string()),
        DeValue::Integer(number) => {
            match i64::from_str_radix(&number.as_str().replace('_', ""), number.radix()) {
                Ok(number) => Raw::Whole(number),
                Err(_) => Raw::Other("the number", number.as_str().to_owned()),
            }
        }
        DeValue::Array(items) => Raw::List(items.iter().map(|item| raw(item.get_ref())).collect()),
        DeValue::Table(entries) => Raw::Table(
            entries.iter().map(|(name, item)| (name.get_ref().to_string(), raw(item.get_ref()))).collect(),
        ),
        DeValue::Float(number) => Raw::Other("the fraction", number.as_str().to_owned()),
        DeValue::Boolean(truth) => Raw::Other("the truth value", truth.to_string()),
        DeValue::Datetime(moment) => Raw::Other("the date", moment.to_string()),
    }
}
