//! The sidecar's folders, its secret, and the sidecar itself.

use std::io;
use std::path::Path;

use super::{Ask, Check};
use crate::places::Places;
use crate::secret::{ClusterSecret, SecretError};
use crate::status::StatusReport;

pub(super) fn folders(places: &Places) -> Check {
    const NAME: &str = "folders";
    let found = format!("{}, {}", places.runtime_dir.display(), places.state_dir.display());
    match places.inspect() {
        Ok(()) => Check::ok(NAME, found),
        Err(error) => Check::fail(NAME, found, error.to_string()),
    }
}

pub(super) fn secret(path: &Path) -> Check {
    const NAME: &str = "cluster secret";
    match ClusterSecret::open(path) {
        Ok(_) => Check::ok(NAME, path.display().to_string()),
        Err(SecretError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
            Check::ok(NAME, format!("{}: not there yet, made at the first start", path.display()))
        }
        Err(error) => Check::fail(NAME, path.display().to_string(), error.to_string()),
    }
}

/// A sidecar need not run: the connector starts one.
pub(super) fn reachable(socket: &Path, ask: &Ask<'_>) -> (Check, Option<StatusReport>) {
    const NAME: &str = "sidecar";
    let at = socket.display();
    if !socket.exists() {
        return (Check::ok(NAME, format!("none at {at}; the connector starts one")), None);
    }
    let report = match ask(socket) {
        Ok(report) => report,
        Err(error) => {
            let advice =
                "if no sidecar runs, ignore this: the next one replaces the socket; else see its log";
            return (Check::warn(NAME, format!("no answer at {at}: {error}"), advice), None);
        }
    };
    let (theirs, ours) = (&report.sidecar.version, env!("CARGO_PKG_VERSION"));
    // We are attached ourselves, as an observer.
    let sessions = report.sessions.iter().filter(|session| session.role != "observer").count();
    let found = format!("{theirs} at {at}, {sessions} sessions of engines");
    let check = if theirs == ours {
        Check::ok(NAME, found)
    } else {
        let advice = format!("this command is {ours}: restart the sidecar to have one version everywhere");
        Check::warn(NAME, found, advice)
    };
    (check, Some(report))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;
    use crate::status::SidecarStatus;

    #[test]
    fn absent_mute_other_and_same_sidecars() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("cpu0.sock");
        let version = |version: &str| {
            let sidecar = SidecarStatus { version: version.to_owned(), ..SidecarStatus::default() };
            StatusReport { sidecar, ..StatusReport::default() }
        };
        let mute = |_: &Path| Err("connection refused".to_owned());
        let (check, report) = reachable(&socket, &mute);
        assert_eq!((check.verdict, report), (Verdict::Ok, None));
        std::fs::write(&socket, "").unwrap();
        let (check, report) = reachable(&socket, &mute);
        assert_eq!((check.verdict, report), (Verdict::Warn, None));
        assert!(check.found.ends_with("connection refused"));
        let (check, _) = reachable(&socket, &|_| Ok(version("0.0.1")));
        assert_eq!(check.verdict, Verdict::Warn);
        let (check, report) = reachable(&socket, &|_| Ok(version(env!("CARGO_PKG_VERSION"))));
        assert_eq!((check.verdict, report.is_some()), (Verdict::Ok, true));
    }

    #[test]
    fn secrets_that_are_absent_right_and_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        assert!(secret(&path).found.contains("made at the first start"));
        ClusterSecret::open_or_create(&path).unwrap();
        assert_eq!(secret(&path).verdict, Verdict::Ok);
        std::fs::write(&path, "short").unwrap();
        let check = secret(&path);
        assert_eq!(check.verdict, Verdict::Fail);
        assert!(check.advice.unwrap().contains("came 5 bytes"));
    }
}
