//! `pillion doctor`: what this machine is fit for, in plain verdicts.
//!
//! Works without a sidecar, without Python and with a broken configuration: each
//! check stands alone and says what to do.

mod disks;
mod kernel;
mod python;
mod sidecar;
pub mod ssd;

use std::io;
use std::path::Path;

use serde::Serialize;

use crate::config::{Config, ConfigError, Loaded};
use crate::device;
use crate::machine::available_memory_bytes;
use crate::places::{Machine, Places};
use crate::status::StatusReport;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Nothing to do.
    Ok,
    /// Works, but less well or not for everyone.
    Warn,
    /// Does not work.
    Fail,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable name.
    pub name: &'static str,
    /// How it ended.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do, if there is something to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// All checks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DoctorReport {
    /// Our version.
    pub version: &'static str,
    /// In the order of their printing.
    pub checks: Vec<Check>,
}

/// Asks the sidecar behind a socket for its status; bounded by whoever asks.
pub type Ask<'a> = dyn Fn(&Path) -> Result<StatusReport, String> + 'a;

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), advice: None }
    }

    fn warn(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Warn, found: found.into(), advice: Some(advice.into()) }
    }

    fn fail(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Fail, found: found.into(), advice: Some(advice.into()) }
    }
}

/// Runs every check. Takes up to half a minute where Python is slow to start.
pub fn examine(loaded: &Result<Loaded, ConfigError>, ask: &Ask<'_>) -> DoctorReport {
    let mut checks = vec![configuration(loaded)];
    let config = loaded.as_ref().map(|loaded| loaded.config.clone()).unwrap_or_default();
    checks.extend([kernel::shared_memory(), kernel::pidfd(), kernel::process_vm()]);
    let gpu = kernel::gpu();
    let has_gpu = gpu.present;
    checks.push(gpu.check);
    match device::running(config.clone()).and_then(|config| Ok(Places::choose(&config, &Machine)?)) {
        Ok(places) => {
            let (check, report) = sidecar::reachable(&places.socket, ask);
            checks.push(memory(&config, report.as_ref(), available_memory_bytes()));
            checks.push(kernel::locked_memory(has_gpu));
            checks.push(sidecar::folders(&places));
            checks.push(sidecar::secret(&places.secret()));
            checks.extend(disks::directories(&config, report.as_ref()));
            checks.push(check);
        }
        Err(error) => checks.push(Check::fail("folders", "no usable place", error.to_string())),
    }
    checks.extend(python::checks());
    DoctorReport { version: env!("CARGO_PKG_VERSION"), checks }
}

fn configuration(loaded: &Result<Loaded, ConfigError>) -> Check {
    const NAME: &str = "configuration";
    match loaded {
        Ok(Loaded { warnings, .. }) if !warnings.is_empty() => {
            Check::warn(NAME, warnings.join("; "), "correct or unset the variable")
        }
        Ok(Loaded { file: Some(path), .. }) => Check::ok(NAME, path.display().to_string()),
        Ok(_) => Check::ok(NAME, "no file; defaults, environment and flags"),
        Err(error) => {
            Check::fail(NAME, error.to_string(), "correct it; the checks below assume the defaults")
        }
    }
}

/// A pool that a running sidecar has already is not asked for a second time.
fn memory(config: &Config, running: Option<&StatusReport>, available: Option<u64>) -> Check {
    const NAME: &str = "memory";
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    if let Some(report) = running {
        return Check::ok(NAME, format!("the running sidecar's pool has {}", mib(report.pool.bytes)));
    }
    let Some(available) = available else {
        return Check::warn(
            NAME,
            "the available memory cannot be read",
            "mount /proc, or set host_pool to a size",
        );
    };
    let pool = config.host_pool.resolve(available);
    let found = format!("host_pool {} is {} of {} available", config.host_pool, mib(pool), mib(available));
    if pool > available {
        Check::fail(NAME, found, "set host_pool to less, or leave it at 20%")
    } else if pool > available / 10 * 9 {
        Check::warn(NAME, found, "leave more for the engine: it takes its memory from the same machine")
    } else {
        Check::ok(NAME, found)
    }
}

impl DoctorReport {
    /// The worst of all verdicts.
    pub fn verdict(&self) -> Verdict {
        self.checks.iter().map(|check| check.verdict).max().unwrap_or(Verdict::Ok)
    }

    /// 1 where something does not work, else 0: a warning stops nobody's script.
    pub fn exit_code(&self) -> u8 {
        u8::from(self.verdict() == Verdict::Fail)
    }

    /// For `pillion doctor`.
    pub fn print(&self, out: &mut impl io::Write) -> io::Result<()> {
        writeln!(out, "pillion {}", self.version)?;
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        for check in &self.checks {
            let word = match check.verdict {
                Verdict::Ok => "ok  ",
                Verdict::Warn => "warn",
                Verdict::Fail => "FAIL",
            };
            let found = check.found.replace('\n', &format!("\n      {:width$}  ", ""));
            writeln!(out, "{word}  {:width$}  {found}", check.name)?;
            if let Some(advice) = &check.advice {
                writeln!(out, "      {:width$}  → {advice}", "")?;
            }
        }
        let count = |verdict| self.checks.iter().filter(|check| check.verdict == verdict).count();
        writeln!(out, "{} failed, {} to look at", count(Verdict::Fail), count(Verdict::Warn))
    }

    /// For `pillion doctor --json`.
    pub fn write_json(&self, out: &mut impl io::Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut *out, self)?;
        out.write_all(b"\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ByteSize, PoolSize, Sources};

    fn nobody(_: &Path) -> Result<StatusReport, String> {
        Err("should not be asked".to_owned())
    }

    #[test]
    fn works_without_a_sidecar_and_with_a_broken_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let mut sources = Sources {
            flags: vec![("runtime_dir".to_owned(), path("run")), ("state_dir".to_owned(), path("state"))],
            ..Sources::default()
        };
        let report = examine(&Config::load(&sources), &nobody);
        let names: Vec<_> = report.checks.iter().map(|check| check.name).collect();
        let expected = [
            "configuration",
            "shared memory",
            "process handles",
            "process_vm",
            "gpu",
            "memory",
            "locked memory",
            "folders",
            "cluster secret",
            "sidecar",
        ];
        assert_eq!(&names[..expected.len()], expected);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the doctor makes nothing");

        sources.flags.push(("lease_seconds".to_owned(), "no".to_owned()));
        let report = examine(&Config::load(&sources), &nobody);
        assert_eq!(report.exit_code(), 1);
        assert!(report.checks[0].found.contains("--lease-seconds"));
        assert!(report.checks.len() >= names.len());
    }

    #[test]
    fn pools_just_fit_and_just_do_not() {
        let check =
            |pool: PoolSize| memory(&Config { host_pool: pool, ..Config::default() }, None, Some(1000 << 20));
        let bytes = |mib: u64| PoolSize::Bytes(ByteSize(mib << 20));
        assert_eq!(check(PoolSize::Percent(20)).found, "host_pool 20% is 200 MiB of 1000 MiB available");
        assert_eq!(check(PoolSize::Percent(90)).verdict, Verdict::Ok);
        assert_eq!(check(bytes(900)).verdict, Verdict::Ok);
        assert_eq!(check(bytes(901)).verdict, Verdict::Warn);
        assert_eq!(check(bytes(1000)).verdict, Verdict::Warn);
        assert_eq!(check(bytes(1001)).verdict, Verdict::Fail);
        assert_eq!(memory(&Config::default(), None, None).verdict, Verdict::Warn);
        let running = StatusReport::default();
        assert_eq!(memory(&Config::default(), Some(&running), Some(0)).verdict, Verdict::Ok);
    }

    #[test]
    fn the_report_for_people_and_machines() {
        let report = DoctorReport {
            version: "1.2.3",
            checks: vec![
                Check::ok("gpu", "none"),
                Check::warn("sidecar", "one\ntwo", "restart it"),
                Check::fail("folders", "gone", "make them"),
            ],
        };
        let mut out = Vec::new();
        report.print(&mut out).unwrap();
        let expected = "\
pillion 1.2.3
ok    gpu      none
warn  sidecar  one
               two
               → restart it
FAIL  folders  gone
               → make them
1 failed, 1 to look at
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
        assert_eq!((report.verdict(), report.exit_code()), (Verdict::Fail, 1));
        let mut json = Vec::new();
        report.write_json(&mut json).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["checks"][1]["verdict"], "warn");
        assert_eq!(json["checks"][0].get("advice"), None);
        let fine = DoctorReport { version: "1", checks: vec![Check::warn("a", "b", "c")] };
        assert_eq!(fine.exit_code(), 0);
    }
}
