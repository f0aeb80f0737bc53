//! One value of the configuration: its kinds, and how each is read and written.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use super::size::{ByteSize, PoolSize};
use super::ssd::{self, SsdDirectory};
use super::tenants::{Tenant, TenantName, Tenants};

/// Longest device name; it becomes part of a socket path of at most 107 bytes.
pub const DEVICE_BYTES_MAX: usize = 48;

/// Where metrics and health are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpListen {
    /// Nowhere.
    Off,
    /// On this loopback address, or one of the next 100 ports.
    On(SocketAddr),
}

/// What kind of value a key takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A device name such as `cpu0`.
    Device,
    /// An absolute path, or nothing.
    Path,
    /// A size or a share of memory.
    PoolSize,
    /// A whole number, both ends included.
    Whole(u64, u64),
    /// A power of two, both ends included.
    PowerOfTwo(u64, u64),
    /// A loopback address with port, or `off`.
    Http,
    /// User ids.
    Uids,
    /// Tenants and who may be one; in the file only.
    Tenants,
    /// A log level.
    Level,
    /// `on` or `off`.
    Switch,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// SSD directories with their capacities.
    Ssd,
    /// The length of a segment file, or 0.
    Segment,
}

/// A value before its kind has judged it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Raw {
    Text(String),
    Whole(i64),
    List(Vec<Raw>),
    Table(Vec<(String, Raw)>),
    /// A TOML type that no key takes, with its text.
    Other(&'static str, String),
}

/// A value that its kind has accepted.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Text(String),
    Path(Option<PathBuf>),
    PoolSize(PoolSize),
    Whole(u64),
    Http(HttpListen),
    Uids(Vec<u32>),
    Tenants(Tenants),
    Switch(bool),
    Ssd(Vec<SsdDirectory>),
    Size(ByteSize),
}

/// Why a value is refused; the caller knows key and origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) expected: String,
    pub(super) came: String,
    /// Says more than the example of the key does, where there is more to say.
    pub(super) advice: Option<String>,
}

impl Raw {
    /// How to quote it in an error, cut to a length that fits on a line.
    pub(super) fn shown(&self) -> String {
        let full = match self {
            Self::Text(text) => format!("{text:?}"),
            Self::Whole(number) => number.to_string(),
            Self::List(items) => {
                format!("[{}]", items.iter().take(8).map(Self::shown).collect::<Vec<_>>().join(", "))
            }
            Self::Table(_) => "a table".to_owned(),
            Self::Other(kind, text) => format!("{kind} {text}"),
        };
        if full.chars().count() <= 80 { full } else { full.chars().take(79).chain(['…']).collect() }
    }
}

impl Kind {
    /// The type as the documentation names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Device => "device name",
            Self::Path => "path",
            Self::PoolSize => "size or share",
            Self::Whole(..) => "whole number",
            Self::PowerOfTwo(..) => "power of two",
            Self::Http => "loopback address or off",
            Self::Uids => "list of uids",
            Self::Tenants => "table",
            Self::Level => "level",
            Self::Switch => "on or off",
            Self::Choice(_) => "word",
            Self::Ssd => "list of path=size",
            Self::Segment => "size",
        }
    }

    /// What the kind takes, for errors and documentation.
    pub fn expected(self) -> String {
        match self {
            Self::Device => {
                format!("a device name of 1 to {DEVICE_BYTES_MAX} characters from a-z, 0-9, '.', '_' and '-'")
            }
            Self::Path => "an absolute path".to_owned(),
            Self::PoolSize => "a size from 1MiB, such as \"512MiB\", or a share from 1% to 90%".to_owned(),
            Self::Whole(min, max) => format!("a whole number from {min} to {max}"),
            Self::PowerOfTwo(min, max) => format!("a power of two from {min} to {max}"),
            Self::Http => "a loopback address with a port, such as \"127.0.0.1:9470\", or \"off\"".to_owned(),
            Self::Uids => "a list of user ids, such as [1000, 1001]".to_owned(),
            Self::Tenants => "a table of tenants, such as team-a = { uids = [1000] }".to_owned(),
            Self::Level => "one of error, warn, info, debug, trace".to_owned(),
            Self::Switch => "\"on\" or \"off\"".to_owned(),
            Self::Choice(words) => format!("one of {}", words.join(", ")),
            Self::Ssd => ssd::EXPECTED.to_owned(),
            Self::Segment => ssd::SEGMENT_EXPECTED.to_owned(),
        }
    }

    /// Whether the value can stand in a variable or flag.
    pub fn fits_on_a_line(self) -> bool {
        self != Self::Tenants
    }

    /// A variable's or flag's text in the form that a file would have it.
    pub(super) fn raw_from_text(self, text: &str) -> Raw {
        let whole = |text: &str| match text.trim().parse() {
            Ok(number) => Raw::Whole(number),
            Err(_) => Raw::Text(text.to_owned()),
        };
        match self {
            Self::Whole(..) | Self::PowerOfTwo(..) => whole(text),
            Self::Uids if text.trim().is_empty() => Raw::List(Vec::new()),
            Self::Uids => {
                let inner = text.trim().trim_start_matches('[').trim_end_matches(']');
                Raw::List(inner.split(',').filter(|item| !item.trim().is_empty()).map(whole).collect())
            }
            Self::Ssd => ssd::raw_from_text(text),
            Self::Segment => whole(text),
            _ => Raw::Text(text.to_owned()),
        }
    }

    /// Judges a value.
    pub(super) fn read(self, raw: &Raw) -> Result<Value, Refusal> {
        let refused = |advice| Refusal { expected: self.expected(), came: raw.shown(), advice };
        let read = match (self, raw) {
            (Self::Device, Raw::Text(name)) if is_device(name) => Some(Value::Text(name.clone())),
            (Self::Path, Raw::Text(text)) => read_path(text).map(Value::Path),
            (Self::PoolSize, Raw::Text(text)) => {
                text.parse().ok().filter(at_least_1_mib).map(Value::PoolSize)
            }
            (Self::PoolSize, Raw::Whole(bytes)) => u64::try_from(*bytes)
                .ok()
                .map(|bytes| PoolSize::Bytes(ByteSize(bytes)))
                .filter(at_least_1_mib)
                .map(Value::PoolSize),
            (Self::Whole(min, max), Raw::Whole(number)) => {
                u64::try_from(*number).ok().filter(|n| (min..=max).contains(n)).map(Value::Whole)
            }
            (Self::PowerOfTwo(min, max), Raw::Whole(number)) => u64::try_from(*number)
                .ok()
                .filter(|n| (min..=max).contains(n) && n.is_power_of_two())
                .map(Value::Whole),
            (Self::Http, Raw::Text(text)) => {
                return read_http(text).map(Value::Http).map_err(refused);
            }
            (Self::Uids, Raw::List(items)) => read_uids(items).map(Value::Uids),
            (Self::Tenants, Raw::Table(entries)) => return read_tenants(entries).map(Value::Tenants),
            (Self::Level, Raw::Text(text)) => read_level(text).map(Value::Text),
            (Self::Switch, Raw::Text(text)) if text == "on" || text == "off" => {
                Some(Value::Switch(text == "on"))
            }
            (Self::Choice(words), Raw::Text(text)) => {
                words.contains(&text.as_str()).then(|| Value::Text(text.clone()))
            }
            (Self::Ssd, raw) => return ssd::read(raw).map(Value::Ssd),
            (Self::Segment, raw) => ssd::read_segment(raw).map(Value::Size),
            _ => None,
        };
        read.ok_or_else(|| refused(None))
    }
}

impl Value {
    /// As it would stand in the file.
    pub(super) fn toml(&self) -> String {
        match self {
            Self::Text(text) => quoted(text),
            Self::Path(path) => quoted(&path.as_deref().map(|p| p.to_string_lossy()).unwrap_or_default()),
            Self::PoolSize(size) => quoted(&size.to_string()),
            Self::Whole(number) => number.to_string(),
            Self::Ssd(directories) => ssd::toml(directories),
            Self::Size(size) => quoted(&size.to_string()),
            Self::Switch(on) => quoted(if *on { "on" } else { "off" }),
            Self::Http(HttpListen::Off) => quoted("off"),
            Self::Http(HttpListen::On(address)) => quoted(&address.to_string()),
            Self::Uids(uids) => uid_list(uids),
            Self::Tenants(tenants) => {
                let entry = |(name, tenant): (&TenantName, &Tenant)| {
                    format!("{} = {{ uids = {} }}", quoted(name.as_str()), uid_list(&tenant.uids))
                };
                let entries: Vec<_> = tenants.iter().map(entry).collect();
                if entries.is_empty() { "{}".to_owned() } else { format!("{{ {} }}", entries.join(", ")) }
            }
        }
    }
}

pub(super) fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn uid_list(uids: &[u32]) -> String {
    format!("[{}]", uids.iter().map(u32::to_string).collect::<Vec<_>>().join(", "))
}

fn is_device(name: &str) -> bool {
    // A leading dot would hide the socket and let ".." through.
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
    (1..=DEVICE_BYTES_MAX).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with('.')
}

/// `Some(None)` for the empty text, which means "where the rules say".
fn read_path(text: &str) -> Option<Option<PathBuf>> {
    if text.is_empty() {
        return Some(None);
    }
    let path = PathBuf::from(text);
    (path.is_absolute() && !text.contains('\0')).then_some(Some(path))
}

fn at_least_1_mib(size: &PoolSize) -> bool {
    match size {
        PoolSize::Bytes(size) => size.0 >= 1 << 20,
        PoolSize::Percent(_) => true,
    }
}

fn read_level(text: &str) -> Option<String> {
    let level = text.trim().to_ascii_lowercase();
    ["error", "warn", "info", "debug", "trace"].contains(&level.as_str()).then_some(level)
}

fn read_http(text: &str) -> Result<HttpListen, Option<String>> {
    let text = text.trim();
    if text == "off" {
        return Ok(HttpListen::Off);
    }
    let numeric = match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => text.to_owned(),
    };
    match numeric.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_loopback() => Ok(HttpListen::On(address)),
        Ok(address) => Err(Some(format!(
            "metrics carry no password, so they stay on this host: use 127.0.0.1:{}, and a proxy to reach them from elsewhere",
            address.port()
        ))),
        Err(_) => Err(None),
    }
}

fn read_uids(items: &[Raw]) -> Option<Vec<u32>> {
    let uid = |item: &Raw| match item {
        // The largest 32-bit value is the kernel's "no user".
        Raw::Whole(number) => u32::try_from(*number).ok().filter(|uid| *uid != u32::MAX),
        _ => None,
    };
    let mut uids = items.iter().map(uid).collect::<Option<Vec<u32>>>()?;
    uids.sort_unstable();
    uids.dedup();
    Some(uids)
}

fn read_tenants(entries: &[(String, Raw)]) -> Result<Tenants, Refusal> {
    let mut tenants = BTreeMap::new();
    for (name, raw) in entries {
        let named: TenantName = name.parse().map_err(|_| Refusal {
            expected: TenantName::EXPECTED.to_owned(),
            came: format!("{name:?}"),
            advice: Some("rename the tenant, here and in the engines that use it".to_owned()),
        })?;
        let uids = match raw {
            // The short form, `team-a = [1000]`.
            Raw::List(items) => read_uids(items),
            Raw::Table(fields) => match fields.as_slice() {
                [(field, Raw::List(items))] if field == "uids" => read_uids(items),
                _ => None,
            },
            _ => None,
        };
        let uids = uids.ok_or_else(|| Refusal {
            expected: format!("{name} = {{ uids = [user ids] }}"),
            came: raw.shown(),
            advice: Some(format!("write {name} = {{ uids = [1000] }} with the ids of its users")),
        })?;
        tenants.insert(named, Tenant { uids });
    }
    Ok(Tenants::new(tenants))
}
