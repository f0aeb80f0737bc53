//! Configuration: one typed [`Config`], one table of [`KEYS`].
//!
//! A value comes from, in rising order: the default, the TOML file, the
//! environment (`PILLION_<KEY>`), the command line (`--<key>`). All that is
//! wrong is reported at once, each with its origin and what to do.

mod docs;
mod error;
mod file;
mod keys;
mod size;
mod ssd;
mod tenants;
mod value;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

pub use error::{ConfigError, Origin, Problem};
pub use keys::{KEYS, Key};
pub use size::{ByteSize, PoolSize, SizeError};
pub use ssd::{CACHE_MODES, SsdDirectory, cache_mode};
pub use tenants::{BadTenantName, DEFAULT_TENANT, Denied, Tenant, TenantName, Tenants};
pub use value::{DEVICE_BYTES_MAX, HttpListen, Kind};

use value::Raw;

/// Where the configuration lies if nobody says otherwise.
pub const DEFAULT_FILE: &str = "/etc/pillion/pillion.toml";

/// Names the configuration file; no key of its own.
pub const FILE_VARIABLE: &str = "PILLION_CONFIG";

/// Everything that a sidecar can be told. Fields are named after their keys.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "each field is a key, and the table of keys says what it is")]
pub struct Config {
    pub device: String,
    pub runtime_dir: Option<PathBuf>,
    pub state_dir: Option<PathBuf>,
    pub socket: Option<PathBuf>,
    pub host_pool: PoolSize,
    pub sidecars: u64,
    pub ssd: Vec<SsdDirectory>,
    pub ssd_cache_mode: String,
    pub ssd_segment: ByteSize,
    pub ssd_engine: String,
    pub ssd_wait_ms: u64,
    pub ssd_ahead_ms: u64,
    pub lease_seconds: u64,
    pub heartbeat_ms: u64,
    pub table_stamp_ms: u64,
    pub grace_seconds: u64,
    pub drain_seconds: u64,
    pub idle_exit_seconds: u64,
    pub http: HttpListen,
    pub allow_uids: Vec<u32>,
    pub tenants: Tenants,
    pub max_sessions: u64,
    pub max_leases: u64,
    pub copy_threads: u64,
    pub neighbours: bool,
    pub cuda_batch_copy: bool,
    pub cuda_call_seconds: u64,
    pub presence_slots: u64,
    pub log_level: String,
    /// The sidecar's own user, who may always attach. No key: taken from the process.
    pub own_uid: u32,
}

/// Where to look for values. Tests fill it; [`Sources::of_process`] is the real one.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// `--config`.
    pub file: Option<PathBuf>,
    /// The environment.
    pub variables: BTreeMap<String, String>,
    /// Flags as (key, text).
    pub flags: Vec<(String, String)>,
    /// Read if it exists and nothing else is named.
    pub default_file: Option<PathBuf>,
}

/// A configuration and how it came about.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The values.
    pub config: Config,
    /// The file that was read.
    pub file: Option<PathBuf>,
    /// Where each value that is not a default came from, by key.
    pub origins: BTreeMap<&'static str, Origin>,
    /// Worth a line in the log, but no reason not to start.
    pub warnings: Vec<String>,
}

impl Sources {
    /// This process's environment, with the given `--config` and flags.
    pub fn of_process(file: Option<PathBuf>, flags: Vec<(String, String)>) -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
        };
        Self {
            file,
            variables: std::env::vars_os().filter_map(text).collect(),
            flags,
            default_file: Some(DEFAULT_FILE.into()),
        }
    }

    /// The file to read: a named one must exist, the default one may.
    fn chosen_file(&self) -> Option<PathBuf> {
        let named = self.variables.get(FILE_VARIABLE).filter(|path| !path.is_empty());
        self.file
            .clone()
            .or_else(|| named.map(PathBuf::from))
            .or_else(|| self.default_file.clone().filter(|path| path.exists()))
    }
}

/// One value that was found, before it is judged.
struct Found {
    key: &'static Key,
    origin: Origin,
    raw: Raw,
}

impl Config {
    /// Reads and judges all sources; either everything is right or everything wrong is told.
    pub fn load(sources: &Sources) -> Result<Loaded, ConfigError> {
        let file = sources.chosen_file();
        let mut problems = Vec::new();
        let mut found = Vec::new();
        if let Some(path) = &file {
            file::read(path, &mut found, &mut problems);
        }
        let warnings = from_variables(&sources.variables, &mut found);
        from_flags(&sources.flags, &mut found, &mut problems);

        let mut config = Self::default();
        let mut origins = BTreeMap::new();
        for Found { key, origin, raw } in found {
            match key.kind.read(&raw) {
                Ok(value) => {
                    (key.put)(&mut config, value);
                    origins.insert(key.name, origin);
                }
                Err(refusal) => problems.push(Problem::Value {
                    key: key.name.to_owned(),
                    origin,
                    expected: with_unit(refusal.expected, key),
                    came: refusal.came,
                    advice: refusal.advice.unwrap_or_else(|| advice_for(key)),
                }),
            }
        }
        if problems.is_empty() {
            Ok(Loaded { config, file, origins, warnings })
        } else {
            Err(ConfigError(problems))
        }
    }

    /// Whether a peer with this user may attach at all.
    pub fn uid_allowed(&self, uid: u32) -> Result<(), Denied> {
        let known = self.is_trusted(uid) || self.allow_uids.contains(&uid) || self.tenants.has_member(uid);
        if known { Ok(()) } else { Err(Denied::Uid { uid }) }
    }

    /// Whether a peer with this user may be this tenant; the name is proved to be one.
    pub fn tenant_allowed(&self, tenant: &str, uid: u32) -> Result<TenantName, Denied> {
        self.tenants.check(tenant, uid, self.is_trusted(uid), self.allow_uids.contains(&uid))
    }

    /// Whether a process of this user may be another sidecar that borrows, or lends.
    pub fn is_neighbour(&self, uid: u32) -> bool {
        self.neighbours && uid == self.own_uid
    }

    /// Whether users other than our own and root may attach: then the runtime
    /// folder must let them through to the socket.
    pub fn admits_other_users(&self) -> bool {
        let other = |uid: &u32| !self.is_trusted(*uid);
        self.allow_uids.iter().any(other) || self.tenants.iter().any(|(_, t)| t.uids.iter().any(other))
    }

    fn is_trusted(&self, uid: u32) -> bool {
        uid == 0 || uid == self.own_uid
    }

    /// `lease_seconds` as a duration.
    pub fn lease(&self) -> Duration {
        Duration::from_secs(self.lease_seconds)
    }

    /// `heartbeat_ms` as a duration.
    pub fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms)
    }

    /// `table_stamp_ms` as a duration.
    pub fn table_stamp(&self) -> Duration {
        Duration::from_millis(self.table_stamp_ms)
    }

    /// `grace_seconds` as a duration.
    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.grace_seconds)
    }

    /// `drain_seconds` as a duration.
    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }

    /// `idle_exit_seconds` as a duration; `None`: stay forever.
    pub fn idle_exit(&self) -> Option<Duration> {
        (self.idle_exit_seconds > 0).then(|| Duration::from_secs(self.idle_exit_seconds))
    }
}

impl Default for Config {
    fn default() -> Self {
        let mut config = Self {
            device: String::new(),
            runtime_dir: None,
            state_dir: None,
            socket: None,
            host_pool: PoolSize::Percent(1),
            sidecars: 0,
            ssd: Vec::new(),
            ssd_cache_mode: String::new(),
            ssd_segment: ByteSize(0),
            ssd_engine: String::new(),
            ssd_wait_ms: 0,
            ssd_ahead_ms: 0,
            lease_seconds: 0,
            heartbeat_ms: 0,
            table_stamp_ms: 0,
            grace_seconds: 0,
            drain_seconds: 0,
            idle_exit_seconds: 0,
            http: HttpListen::Off,
            allow_uids: Vec::new(),
            tenants: Tenants::default(),
            max_sessions: 0,
            max_leases: 0,
            copy_threads: 0,
            neighbours: false,
            cuda_batch_copy: false,
            cuda_call_seconds: 0,
            presence_slots: 0,
            log_level: String::new(),
            own_uid: rustix::process::geteuid().as_raw(),
        };
        for key in KEYS.iter().filter(|key| key.kind.fits_on_a_line()) {
            let value = key.kind.read(&key.kind.raw_from_text(key.default));
            (key.put)(
                &mut config,
                value.unwrap_or_else(|_| panic!("the default of {} is refused", key.name)),
            );
        }
        config
    }
}

impl Loaded {
    /// The whole configuration as a TOML file, each line with its origin.
    pub fn to_toml(&self) -> String {
        let mut text = match &self.file {
            Some(path) => format!("# file: {}\n", path.display()),
            None => format!("# file: none ({DEFAULT_FILE} does not exist)\n"),
        };
        for key in KEYS {
            let origin = self.origins.get(key.name).unwrap_or(&Origin::Default);
            let value = (key.get)(&self.config).toml();
            text.push_str(&format!("{} = {value}  # {origin}\n", key.name));
        }
        text
    }
}

/// Unknown `PILLION_…` variables only warn: Kubernetes sets `PILLION_SERVICE_HOST`
/// and its like in every pod beside a service of that name.
fn from_variables(variables: &BTreeMap<String, String>, found: &mut Vec<Found>) -> Vec<String> {
    let mut warnings = Vec::new();
    for (name, text) in variables {
        let Some(upper) = name.strip_prefix("PILLION_") else { continue };
        let known = KEYS.iter().find(|key| key.variable() == *name);
        if let Some(key) = known {
            let origin = Origin::Variable(name.clone());
            found.push(Found { key, origin, raw: key.kind.raw_from_text(text) });
            continue;
        }
        if name == FILE_VARIABLE {
            continue;
        }
        let names = KEYS.iter().filter(|key| key.kind.fits_on_a_line()).map(|key| key.name);
        if let Some(near) = error::closest(upper, names) {
            let meant = Key::named(near).map(Key::variable).unwrap_or_default();
            warnings.push(format!("variable {name} is no key of pillion: did you mean {meant}?"));
        }
    }
    warnings
}

fn from_flags(flags: &[(String, String)], found: &mut Vec<Found>, problems: &mut Vec<Problem>) {
    for (name, text) in flags {
        let origin = Origin::Flag(format!("--{}", name.replace('_', "-")));
        match Key::named(name) {
            Some(key) => found.push(Found { key, origin, raw: key.kind.raw_from_text(text) }),
            None => problems.push(unknown_key(name, origin)),
        }
    }
}

fn unknown_key(key: &str, origin: Origin) -> Problem {
    Problem::UnknownKey {
        key: key.to_owned(),
        origin,
        closest: error::closest(key, KEYS.iter().map(|key| key.name)),
    }
}

fn with_unit(expected: String, key: &Key) -> String {
    match (key.kind, key.unit) {
        (Kind::Whole(..), unit) if !unit.is_empty() => format!("{expected} ({unit})"),
        _ => expected,
    }
}

fn advice_for(key: &Key) -> String {
    let place = if key.kind.fits_on_a_line() { "" } else { " in the file" };
    format!("write for example {} = {}{place}", key.name, key.example)
}

#[cfg(test)]
mod tests;
