#![cfg(test)]

//! The table of docs/CONFIGURATION.md, from the table of keys.

use super::keys::{KEYS, Key};
use super::value::Kind;

/// The Markdown table of all keys.
pub(super) fn markdown_table() -> String {
    let mut text = String::from(
        "| key | type | default | unit | variable | flag | what |\n|---|---|---|---|---|---|---|\n",
    );
    for key in KEYS {
        text.push_str(&row(key));
    }
    text
}

fn row(key: &Key) -> String {
    let kind = match key.kind {
        Kind::Whole(min, max) | Kind::PowerOfTwo(min, max) => format!("{}, {min} to {max}", key.kind.name()),
        kind => kind.name().to_owned(),
    };
    let default = if key.default.is_empty() { "–".to_owned() } else { format!("`{}`", key.default) };
    let unit = if key.unit.is_empty() { "–" } else { key.unit };
    let (variable, flag) = if key.kind.fits_on_a_line() {
        (format!("`{}`", key.variable()), format!("`--{}`", key.flag()))
    } else {
        ("–".to_owned(), "–".to_owned())
    };
    format!("| `{}` | {kind} | {default} | {unit} | {variable} | {flag} | {} |\n", key.name, key.doc)
}
