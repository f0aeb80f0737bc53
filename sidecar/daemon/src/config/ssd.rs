//! SSD directories in the configuration, and what else is said of the SSD.

use std::path::{Path, PathBuf};

use pillion_core::{CacheMode, SsdLimits};
use pillion_ssd::{
    format::{SECTOR, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN},
    tier::Engine,
};

use super::Config;
use super::size::ByteSize;
use super::value::{Raw, Refusal, quoted};

/// Directories that one sidecar may have.
const DIRECTORIES_MAX: usize = 16;
/// Records that may be known of the SSD, for each slot of the presence table.
const RECORDS_PER_SLOT: u64 = 4;

/// What may be said of the SSD's cache mode.
pub const CACHE_MODES: &[&str] = &["write_back", "write_through", "write_around", "read_only"];
pub(super) const ENGINES: &[&str] = &["auto", "uring", "threads"];
pub(super) const EXPECTED: &str =
    "a list of directories, each as \"path=capacity\", such as [\"/var/lib/pillion/ssd=100GiB\"]";
pub(super) const SEGMENT_EXPECTED: &str = "a size from 64KiB to 4GiB in steps of 4KiB, or 0";

/// A directory that the SSD tier may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SsdDirectory {
    /// Where.
    pub path: PathBuf,
    /// Bytes that it may take.
    pub capacity: ByteSize,
}

impl Config {
    /// `ssd_engine` as the tier knows it.
    pub fn ssd_engine(&self) -> Engine {
        match self.ssd_engine.as_str() {
            "uring" => Engine::Uring,
            "threads" => Engine::Threads,
            _ => Engine::Auto,
        }
    }

    /// `ssd_cache_mode` as the core knows it.
    pub fn ssd_cache_mode(&self) -> CacheMode {
        cache_mode(&self.ssd_cache_mode).unwrap_or_default()
    }

    /// Bounds of the SSD's part for a pool of this size; `None` without a directory.
    pub fn ssd_limits(&self, pool_bytes: u64) -> Option<SsdLimits> {
        let records_max = (RECORDS_PER_SLOT * self.presence_slots) as usize;
        let limits = || SsdLimits {
            mode: self.ssd_cache_mode(),
            wait_ns: self.ssd_wait_ms * 1_000_000,
            ahead_ns: self.ssd_ahead_ms * 1_000_000,
            records_max,
            ..SsdLimits::for_pool(pool_bytes)
        };
        (!self.ssd.is_empty()).then(limits)
    }
}

/// A cache mode by its name.
pub fn cache_mode(name: &str) -> Option<CacheMode> {
    Some(match name {
        "write_back" => CacheMode::WriteBack,
        "write_through" => CacheMode::WriteThrough,
        "write_around" => CacheMode::WriteAround,
        "read_only" => CacheMode::ReadOnly,
        _ => return None,
    })
}

/// A variable's or flag's text: separated by commas, in brackets or not.
pub(super) fn raw_from_text(text: &str) -> Raw {
    let text = text.trim();
    let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let items = inner.split(',').map(|item| item.trim().trim_matches('"'));
    Raw::List(items.filter(|item| !item.is_empty()).map(|item| Raw::Text(item.to_owned())).collect())
}

pub(super) fn read(raw: &Raw) -> Result<Vec<SsdDirectory>, Refusal> {
    let refused = |came: &Raw, expected: &str| Refusal {
        expected: expected.to_owned(),
        came: came.shown(),
        advice: None,
    };
    let items = match raw {
        Raw::List(items) => items.as_slice(),
        // One is a list, too.
        Raw::Text(_) => std::slice::from_ref(raw),
        _ => return Err(refused(raw, EXPECTED)),
    };
    if items.len() > DIRECTORIES_MAX {
        return Err(refused(raw, &format!("at most {DIRECTORIES_MAX} directories")));
    }
    let mut directories: Vec<SsdDirectory> = Vec::new();
    for item in items {
        let directory = directory(item).ok_or_else(|| refused(item, EXPECTED))?;
        if directories.iter().any(|known| known.path == directory.path) {
            return Err(refused(item, "each directory once"));
        }
        directories.push(directory);
    }
    Ok(directories)
}

fn directory(item: &Raw) -> Option<SsdDirectory> {
    let Raw::Text(text) = item else { return None };
    // A path may have a "=", a size has none.
    let (path, capacity) = text.rsplit_once('=')?;
    let (path, capacity): (_, ByteSize) = (Path::new(path.trim_end()), capacity.parse().ok()?);
    let fits = path.is_absolute() && !text.contains('\0') && capacity.0 >= 3 * SEGMENT_BYTES_MIN;
    // Of two spellings of one path there is to be one.
    fits.then(|| SsdDirectory { path: path.components().collect(), capacity })
}

pub(super) fn read_segment(raw: &Raw) -> Option<ByteSize> {
    let size: ByteSize = match raw {
        Raw::Text(text) => text.parse().ok()?,
        Raw::Whole(bytes) => ByteSize(u64::try_from(*bytes).ok()?),
        _ => return None,
    };
    let fits = (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&size.0);
    (size.0 == 0 || (fits && size.0.is_multiple_of(SECTOR as u64))).then_some(size)
}

pub(super) fn toml(directories: &[SsdDirectory]) -> String {
    let one = |it: &SsdDirectory| quoted(&format!("{}={}", it.path.display(), it.capacity));
    format!("[{}]", directories.iter().map(one).collect::<Vec<_>>().join(", "))
}
