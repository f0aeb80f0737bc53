//! Faults and settings that a test writes into a file. See the README for the language.

use std::{
    collections::HashSet,
    fs,
    os::unix::ffi::OsStrExt,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use crate::{
    errors::{self, Outcome},
    symbols,
};

/// Names the folder that turns the fake on.
pub(crate) const VARIABLE: &str = "PILLION_FAKE_CUDA";
/// Devices that there can be.
pub(crate) const DEVICES_MAX: usize = 16;
/// How often a hanging call looks whether it may go on.
const LOOK: Duration = Duration::from_millis(2);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    Error(cudarc::driver::sys::CUresult),
    Delay(Duration),
    Hang,
    Missing,
    /// Bytes per second.
    Rate(u64),
}

/// One line.
#[derive(Debug, Clone)]
struct Rule {
    text: String,
    /// An exported function, `copy` or `record`.
    target: String,
    effect: Effect,
    after: u64,
    times: u64,
    /// How often its target was met; survives a rewrite of the file that keeps the line.
    seen: Arc<AtomicU64>,
}

impl Rule {
    /// Counts a call that this rule concerns; true: the rule acts on it.
    fn fires(&self) -> bool {
        let seen = self.seen.fetch_add(1, Relaxed);
        seen >= self.after && seen - self.after < self.times
    }
}

#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) devices: usize,
    /// As `cuDriverGetVersion` says it: 13000.
    pub(crate) driver: i32,
    rules: Vec<Rule>,
}

impl Default for Rules {
    fn default() -> Self {
        Self { devices: 1, driver: 13000, rules: Vec::new() }
    }
}

/// The folder, once the variable has been seen.
pub(crate) fn folder() -> Option<&'static Path> {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    if FOLDER.get().is_none() {
        let _ = FOLDER.set(std::env::var_os(VARIABLE).filter(|folder| !folder.is_empty())?.into());
    }
    FOLDER.get().map(PathBuf::as_path)
}

/// What tells one state of the file from another: device, inode, length, times of change.
type Stamp = Option<[i64; 5]>;

/// The rules as the file has them now. Costs a `stat`.
pub(crate) fn rules() -> Arc<Rules> {
    static LAST: Mutex<Option<(Stamp, Arc<Rules>)>> = Mutex::new(None);
    let file = folder().map(|folder| folder.join("faults"));
    let mut last = lock(&LAST);
    let stamp = file.as_ref().and_then(|file| fs::metadata(file).ok()).map(|data| {
        let (modified, changed) = (data.mtime_nsec(), data.ctime_nsec());
        [data.ino() as i64, data.size() as i64, data.mtime(), modified, changed]
    });
    if let Some((known, rules)) = last.as_ref()
        && *known == stamp
    {
        return rules.clone();
    }
    let text = file.filter(|_| stamp.is_some()).and_then(|file| fs::read_to_string(file).ok());
    let old = last.as_ref().map(|(_, rules)| rules.rules.as_slice()).unwrap_or_default();
    let rules = Arc::new(parse(&text.unwrap_or_default(), old));
    *last = Some((stamp, rules.clone()));
    rules
}

/// The faults of a call: waits, and says how the call ends if the rules end it.
pub(crate) fn meet(target: &str) -> Outcome {
    meet_unless(target, &|| false)
}

/// The faults of something that stops waiting when nobody wants its result any more.
pub(crate) fn meet_unless(target: &str, unwanted: &dyn Fn() -> bool) -> Outcome {
    let rules = rules();
    let mut outcome = Ok(());
    for rule in rules.rules.iter().filter(|rule| rule.target == target) {
        match rule.effect {
            Effect::Missing | Effect::Rate(_) => {}
            _ if !rule.fires() => {}
            Effect::Hang => hang(&rule.text, unwanted),
            Effect::Delay(time) => thread::sleep(time),
            Effect::Error(code) => outcome = Err(code),
        }
    }
    outcome
}

fn hang(line: &str, unwanted: &dyn Fn() -> bool) {
    let there = || rules().rules.iter().any(|rule| rule.text == line);
    // Gone twice: a file that is being rewritten in place is empty for a moment.
    while !unwanted()
        && (there() || {
            thread::sleep(LOOK * 2);
            there()
        })
    {
        thread::sleep(LOOK);
    }
}

/// Whether `cuGetProcAddress` has to deny that this function exists.
pub(crate) fn missing(function: &str) -> bool {
    rules().rules.iter().any(|rule| rule.target == function && rule.effect == Effect::Missing)
}

/// At how many bytes per second copies are paced.
pub(crate) fn rate() -> Option<u64> {
    rules().rules.iter().find_map(|rule| match rule.effect {
        Effect::Rate(rate) if rule.target == "copy" => Some(rate),
        _ => None,
    })
}

/// A lock of ours is never left in a state that the next one could not use.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn parse(text: &str, old: &[Rule]) -> Rules {
    let mut rules = Rules::default();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let mut words: Vec<&str> = line.split_whitespace().collect();
        if let Some(process) = words[0].strip_prefix("process=") {
            if !command_line().contains(process) {
                continue;
            }
            words.remove(0);
        }
        if let Err(reason) = rules.add(line, &words, old) {
            complain(line, &reason);
        }
    }
    rules
}

impl Rules {
    fn add(&mut self, line: &str, words: &[&str], old: &[Rule]) -> Result<(), String> {
        match words {
            ["devices", count] => {
                self.devices = number(count)? as usize;
                if self.devices > DEVICES_MAX {
                    return Err(format!("expected at most {DEVICES_MAX} devices"));
                }
                return Ok(());
            }
            ["driver", version] => {
                self.driver = number(version)? as i32;
                return Ok(());
            }
            _ => {}
        }
        let [target, rest @ ..] = words else { return Err("expected a function's name".into()) };
        if !matches!(*target, "copy" | "record") && symbols::find(target).is_none() {
            return Err(format!("expected the name of an exported function, got {target}"));
        }
        let (effect, rest) = match rest {
            ["error", code, rest @ ..] => {
                let code = number(code)? as u32;
                let known = errors::from_code(code).filter(|_| code != 0);
                (Effect::Error(known.ok_or(format!("expected an error code, got {code}"))?), rest)
            }
            ["delay", time, rest @ ..] => (Effect::Delay(Duration::from_millis(number(time)?)), rest),
            ["rate", rate] if *target == "copy" => (Effect::Rate(number(rate)?.max(1) * 1_000_000), &[][..]),
            ["hang", rest @ ..] => (Effect::Hang, rest),
            ["missing"] => (Effect::Missing, &[][..]),
            _ => {
                return Err(
                    "expected error <code>, delay <ms>, hang, missing or (of copy) rate <MB/s>".into()
                );
            }
        };
        let (mut after, mut times) = (0, u64::MAX);
        for pair in rest.chunks(2) {
            match pair {
                ["after", n] => after = number(n)?,
                ["times", n] => times = number(n)?,
                _ => return Err(format!("expected after <n> or times <n>, got {}", pair.join(" "))),
            }
        }
        let seen =
            old.iter().find(|rule| rule.text == line).map(|rule| rule.seen.clone()).unwrap_or_default();
        let (text, target) = (line.to_owned(), (*target).to_owned());
        self.rules.push(Rule { text, target, effect, after, times, seen });
        Ok(())
    }
}

fn number(word: &str) -> Result<u64, String> {
    word.parse().map_err(|_| format!("expected a number, got {word}"))
}

/// Once per line: a test whose fault is misspelt should say so, not pass.
fn complain(line: &str, reason: &str) {
    static TOLD: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    if lock(&TOLD).get_or_insert_default().insert(line.to_owned()) {
        eprintln!("pillion-fake-cuda: the line `{line}` of the faults is ignored: {reason}");
    }
}

/// This process' command line, its words separated by spaces.
fn command_line() -> &'static str {
    static LINE: OnceLock<String> = OnceLock::new();
    LINE.get_or_init(|| {
        let bytes = fs::read("/proc/self/cmdline").unwrap_or_default();
        let text = String::from_utf8_lossy(std::ffi::OsStr::from_bytes(&bytes).as_bytes()).into_owned();
        text.replace('\0', " ")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn effects(text: &str) -> Vec<(String, Effect)> {
        parse(text, &[]).rules.into_iter().map(|rule| (rule.target, rule.effect)).collect()
    }

    #[test]
    fn the_language() {
        let rules = parse("devices 2 # two\n\n driver 12080\n", &[]);
        assert_eq!((rules.devices, rules.driver), (2, 12080));
        let launch_failed = Effect::Error(cudarc::driver::sys::CUresult::CUDA_ERROR_LAUNCH_FAILED);
        assert_eq!(
            effects(
                "copy error 719 after 2\ncopy rate 5\nrecord hang\ncuInit delay 7\ncuMemAlloc_v2 missing"
            ),
            [
                ("copy".into(), launch_failed),
                ("copy".into(), Effect::Rate(5_000_000)),
                ("record".into(), Effect::Hang),
                ("cuInit".into(), Effect::Delay(Duration::from_millis(7))),
                ("cuMemAlloc_v2".into(), Effect::Missing),
            ]
        );
    }

    #[test]
    fn misspelt_lines_are_ignored() {
        assert_eq!(
            effects(
                "cuMemAlloc hang\ncopy error 4711\ncopy error 0\ncuInit erro 1\ncuInit error 1 often 3\ncopy"
            ),
            []
        );
    }

    #[test]
    fn lines_of_other_processes_are_ignored() {
        assert_eq!(effects("process=no-such-process copy hang"), []);
        let own = std::env::current_exe().expect("own path");
        let own = own.file_name().expect("a file").to_string_lossy().into_owned();
        assert_eq!(effects(&format!("process={own} copy hang")), [("copy".into(), Effect::Hang)]);
    }

    #[test]
    fn after_and_times_count_through_a_rewrite() {
        let line = "cuInit error 1 after 1 times 2";
        let first = parse(line, &[]);
        let fires: Vec<bool> = (0..2).map(|_| first.rules[0].fires()).collect();
        assert_eq!(fires, [false, true]);
        let second = parse(&format!("copy hang\n{line}"), &first.rules);
        let fires: Vec<bool> = (0..2).map(|_| second.rules[1].fires()).collect();
        assert_eq!(fires, [true, false]);
    }
}
