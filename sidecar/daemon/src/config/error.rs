//! What is wrong with a configuration, said so that it can be put right.

use std::fmt;
use std::path::PathBuf;

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Built in.
    Default,
    /// A configuration file, at a line (from 1).
    File {
        /// The file as it was named.
        path: PathBuf,
        /// The line of the value.
        line: usize,
    },
    /// An environment variable.
    Variable(String),
    /// A command-line flag, with its dashes.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => write!(f, "variable {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// A key that Pillion does not have.
    UnknownKey {
        /// The key as it was written.
        key: String,
        /// Where it stands.
        origin: Origin,
        /// The key that looks most like it.
        closest: Option<&'static str>,
    },
    /// A value of the wrong type, form or range.
    Value {
        /// The key.
        key: String,
        /// Where the value stands.
        origin: Origin,
        /// What would have been right.
        expected: String,
        /// What is there.
        came: String,
        /// What to write.
        advice: String,
    },
    /// The file is no TOML.
    Syntax {
        /// Where the parser stopped.
        origin: Origin,
        /// What it said.
        message: String,
    },
    /// The file could not be read.
    File {
        /// Its path.
        path: PathBuf,
        /// Why.
        message: String,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKey { key, origin, closest } => {
                write!(f, "{key} ({origin}): expected a key that pillion has, came an unknown one: ")?;
                match closest {
                    Some(name) => write!(f, "did you mean {name}?"),
                    None => f.write_str("remove it; `pillion config show` lists all keys"),
                }
            }
            Self::Value { key, origin, expected, came, advice } => {
                write!(f, "{key} ({origin}): expected {expected}, came {came}: {advice}")
            }
            Self::Syntax { origin, message } => {
                write!(f, "{origin}: expected TOML, came something else ({message}): correct that line")
            }
            Self::File { path, message } => write!(
                f,
                "{}: expected a readable configuration file, came: {message}: correct the path or leave it out",
                path.display()
            ),
        }
    }
}

/// Everything that is wrong with a configuration, at once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError(pub Vec<Problem>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            let gap = if index == 0 { "" } else { "\n" };
            write!(f, "{gap}{problem}")?;
        }
        Ok(())
    }
}

/// The name that looks most like `wanted`, if one is near enough to be a slip of the hand.
pub(super) fn closest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let wanted = wanted.to_ascii_lowercase().replace('-', "_");
    let near = 1 + wanted.len() / 4;
    names.map(|name| (distance(&wanted, name), name)).filter(|(d, _)| *d <= near).min().map(|(_, name)| name)
}

/// Levenshtein distance in bytes; keys are short ASCII.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_of_the_hand_find_their_key() {
        let names = || ["lease_seconds", "grace_seconds", "http", "host_pool"].into_iter();
        assert_eq!(closest("lease_second", names()), Some("lease_seconds"));
        assert_eq!(closest("Lease-Seconds", names()), Some("lease_seconds"));
        assert_eq!(closest("htpp", names()), Some("http"));
        assert_eq!(closest("hostpool", names()), Some("host_pool"));
        assert_eq!(closest("redis_url", names()), None);
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
