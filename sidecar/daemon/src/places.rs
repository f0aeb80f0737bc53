//! Where the sidecar's files lie, and that nobody else can put them there.
//!
//! Choosing is a pure function over [`Surroundings`]; [`Places::prepare`] then
//! makes the folders and refuses those that another user could have planted.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};

use crate::config::Config;

/// Longest path that fits in a socket address, without the final zero.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What the choice depends on.
pub trait Surroundings {
    /// The user whose sidecar this is.
    fn uid(&self) -> u32;
    /// A variable that holds a path.
    fn variable(&self, name: &str) -> Option<PathBuf>;
    /// Whether there is a folder of that name.
    fn is_dir(&self, path: &Path) -> bool;
    /// Whether we may write in the folder, or could make it.
    fn usable(&self, path: &Path) -> bool;
}

/// The machine we run on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Machine;

impl Surroundings for Machine {
    fn uid(&self) -> u32 {
        rustix::process::geteuid().as_raw()
    }

    fn variable(&self, name: &str) -> Option<PathBuf> {
        std::env::var_os(name).map(PathBuf::from)
    }

    fn is_dir(&self, path: &Path) -> bool {
        path.is_dir()
    }

    fn usable(&self, path: &Path) -> bool {
        use rustix::fs::Access;
        let open = |path: &Path| rustix::fs::access(path, Access::WRITE_OK | Access::EXEC_OK).is_ok();
        // Who owns it is no question here but of `prepare`: the client asks the same and must
        // come to the same place.
        if path.exists() { open(path) } else { path.parent().is_some_and(open) }
    }
}

/// Why a place cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlacesError {
    /// Nowhere to keep state.
    #[error(
        "expected $HOME or a writable /var/lib for the state folder, came neither: set state_dir or PILLION_STATE_DIR"
    )]
    NoStateDir,
    /// The socket's address would not fit.
    #[error(
        "expected a socket path of at most {SOCKET_PATH_BYTES_MAX} bytes, came {bytes} ({}): set a shorter socket or runtime_dir",
        path.display()
    )]
    SocketPath {
        /// The path.
        path: PathBuf,
        /// Its length.
        bytes: usize,
    },
    /// The folder could not be made or opened.
    #[error(
        "expected to make or open the folder {}, came: {error}: make it for this user, or set runtime_dir or state_dir to another",
        path.display()
    )]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// The name is a link, or no folder.
    #[error(
        "expected {} to be a folder, came a link or another file: remove it, or set runtime_dir or state_dir to the real folder",
        path.display()
    )]
    NotAFolder {
        /// The name.
        path: PathBuf,
    },
    /// It belongs to someone else.
    #[error(
        "expected {} to belong to uid {expected}, came uid {came}: someone else made it; set runtime_dir or state_dir to another folder",
        path.display()
    )]
    Owner {
        /// The folder or file.
        path: PathBuf,
        /// Our user.
        expected: u32,
        /// Its user.
        came: u32,
    },
    /// Others could have written there.
    #[error(
        "expected that only its owner can write {}, came mode {mode:04o}: look what others put there, then chmod 0700",
        path.display()
    )]
    Writable {
        /// The folder or file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
}

/// The chosen places of one sidecar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// Folder of socket, lock and pid files.
    pub runtime_dir: PathBuf,
    /// Folder of secret and log.
    pub state_dir: PathBuf,
    /// The socket that engines attach to.
    pub socket: PathBuf,
    device: String,
}

impl Places {
    /// Follows the rules of docs/CONFIGURATION.md; touches nothing.
    pub fn choose(config: &Config, around: &impl Surroundings) -> Result<Self, PlacesError> {
        let runtime_dir = config.runtime_dir.clone().unwrap_or_else(|| default_runtime_dir(around));
        let state_dir = match &config.state_dir {
            Some(path) => path.clone(),
            None => default_state_dir(around).ok_or(PlacesError::NoStateDir)?,
        };
        let device = config.device.clone();
        let socket = config.socket.clone().unwrap_or_else(|| runtime_dir.join(format!("{device}.sock")));
        let bytes = socket.as_os_str().len();
        if bytes > SOCKET_PATH_BYTES_MAX {
            return Err(PlacesError::SocketPath { path: socket, bytes });
        }
        Ok(Self { runtime_dir, state_dir, socket, device })
    }

    /// Locked by the one supervisor of this device.
    pub fn lock(&self) -> PathBuf {
        self.runtime_dir.join(format!("{}.lock", self.device))
    }

    /// Process id of the worker.
    pub fn worker_pid(&self) -> PathBuf {
        self.runtime_dir.join(format!("{}.pid", self.device))
    }

    /// Process id of the supervisor.
    pub fn supervisor_pid(&self) -> PathBuf {
        self.runtime_dir.join(format!("{}.supervisor.pid", self.device))
    }

    /// Log of a detached sidecar.
    pub fn log(&self) -> PathBuf {
        self.state_dir.join(format!("{}.log", self.device))
    }

    /// The cluster secret.
    pub fn secret(&self) -> PathBuf {
        self.state_dir.join("secret")
    }

    /// Makes both folders, or proves that they are ours alone. With
    /// `admits_others` other users may pass through the runtime folder to the
    /// socket (mode 0711), but neither list nor write it.
    pub fn prepare(&self, admits_others: bool) -> Result<(), PlacesError> {
        let uid = rustix::process::geteuid().as_raw();
        ensure_dir(&self.runtime_dir, if admits_others { 0o711 } else { 0o700 }, uid)?;
        ensure_dir(&self.state_dir, 0o700, uid)
    }

    /// Like [`Self::prepare`] without making anything; absent folders are fine. For `doctor`.
    pub fn inspect(&self) -> Result<(), PlacesError> {
        let uid = rustix::process::geteuid().as_raw();
        [&self.runtime_dir, &self.state_dir].into_iter().try_for_each(|path| match inspect_dir(path, uid) {
            Err(PlacesError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map(drop),
        })
    }
}

fn default_runtime_dir(around: &impl Surroundings) -> PathBuf {
    // A session's folder that is gone (su, containers) is no place to start in.
    let session = around.variable("XDG_RUNTIME_DIR").filter(|path| path.is_absolute() && around.is_dir(path));
    if let Some(session) = session {
        return session.join("pillion");
    }
    let system = PathBuf::from("/run/pillion");
    if around.usable(&system) { system } else { format!("/tmp/pillion-{}", around.uid()).into() }
}

fn default_state_dir(around: &impl Surroundings) -> Option<PathBuf> {
    let absolute = |name| around.variable(name).filter(|path| path.is_absolute());
    if let Some(state) = absolute("XDG_STATE_HOME") {
        return Some(state.join("pillion"));
    }
    let system = PathBuf::from("/var/lib/pillion");
    if around.usable(&system) {
        return Some(system);
    }
    absolute("HOME").map(|home| home.join(".local/state/pillion"))
}

/// Makes the folder if it is absent, then checks whatever is there: two
/// starters may race, and only the check decides.
fn ensure_dir(path: &Path, mode: u32, uid: u32) -> Result<(), PlacesError> {
    let failed = |error: io::Error| PlacesError::Io { path: path.to_owned(), error };
    if let Some(parent) = path.parent() {
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.recursive(true).create(parent).map_err(failed)?;
    }
    match rustix::fs::mkdir(path, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(error) => return Err(failed(error.into())),
    }
    let (folder, found) = inspect_dir(path, uid)?;
    // Ours and only too open to look at (or a umask cut the mode): set it right.
    if found != mode {
        rustix::fs::fchmod(&folder, Mode::from_raw_mode(mode)).map_err(|error| failed(error.into()))?;
    }
    Ok(())
}

fn inspect_dir(path: &Path, uid: u32) -> Result<(OwnedFd, u32), PlacesError> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    let folder = match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
        Ok(folder) => folder,
        Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {
            return Err(PlacesError::NotAFolder { path: path.to_owned() });
        }
        Err(error) => return Err(PlacesError::Io { path: path.to_owned(), error: error.into() }),
    };
    let mode = check_owner(&folder, path, uid)?;
    Ok((folder, mode))
}

/// Permission bits of what is ours and writable by nobody else.
fn check_owner(file: &OwnedFd, path: &Path, uid: u32) -> Result<u32, PlacesError> {
    let found = rustix::fs::fstat(file)
        .map_err(|error| PlacesError::Io { path: path.to_owned(), error: error.into() })?;
    if found.st_uid != uid {
        return Err(PlacesError::Owner { path: path.to_owned(), expected: uid, came: found.st_uid });
    }
    let mode = found.st_mode & 0o7777;
    if mode & 0o022 != 0 {
        return Err(PlacesError::Writable { path: path.to_owned(), mode });
    }
    Ok(mode)
}

/// Opens or makes a file of ours (lock, pid, log) with mode 0600, never through a link.
pub fn open_private(path: &Path, append: bool) -> Result<File, PlacesError> {
    let mut flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
    if append {
        flags |= OFlags::APPEND;
    }
    let file = rustix::fs::openat(CWD, path, flags, Mode::from_raw_mode(0o600))
        .map_err(|error| PlacesError::Io { path: path.to_owned(), error: error.into() })?;
    check_owner(&file, path, rustix::process::geteuid().as_raw())?;
    Ok(File::from(file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[derive(Default)]
    struct Fake {
        variables: BTreeMap<&'static str, &'static str>,
        usable: Vec<&'static str>,
        folders: Vec<&'static str>,
    }

    impl Surroundings for Fake {
        fn uid(&self) -> u32 {
            1000
        }
        fn variable(&self, name: &str) -> Option<PathBuf> {
            self.variables.get(name).map(PathBuf::from)
        }
        fn is_dir(&self, path: &Path) -> bool {
            self.folders.iter().any(|folder| Path::new(folder) == path)
        }
        fn usable(&self, path: &Path) -> bool {
            self.usable.iter().any(|folder| Path::new(folder) == path)
        }
    }

    fn chosen(config: &Config, around: &Fake) -> (String, String) {
        let places = Places::choose(config, around).unwrap();
        (places.runtime_dir.display().to_string(), places.state_dir.display().to_string())
    }

    fn pair(a: &str, b: &str) -> (String, String) {
        (a.to_owned(), b.to_owned())
    }

    #[test]
    fn the_rules_in_their_order() {
        let mut config = Config::default();
        let mut around = Fake {
            variables: BTreeMap::from([
                ("XDG_RUNTIME_DIR", "/run/user/1000"),
                ("XDG_STATE_HOME", "/x/state"),
                ("HOME", "/home/a"),
            ]),
            usable: vec!["/run/pillion", "/var/lib/pillion"],
            folders: vec!["/run/user/1000"],
        };
        config.runtime_dir = Some("/r".into());
        config.state_dir = Some("/s".into());
        assert_eq!(chosen(&config, &around), pair("/r", "/s"));
        config = Config::default();
        assert_eq!(chosen(&config, &around), pair("/run/user/1000/pillion", "/x/state/pillion"));
        around.folders.clear();
        around.variables.remove("XDG_STATE_HOME");
        assert_eq!(chosen(&config, &around), pair("/run/pillion", "/var/lib/pillion"));
        around.usable.clear();
        assert_eq!(chosen(&config, &around), pair("/tmp/pillion-1000", "/home/a/.local/state/pillion"));
        around.variables = BTreeMap::from([("HOME", "relative")]);
        assert!(matches!(Places::choose(&config, &around), Err(PlacesError::NoStateDir)));
    }

    #[test]
    fn files_are_named_after_the_device() {
        let config = Config {
            device: "cpu7".to_owned(),
            runtime_dir: Some("/r".into()),
            state_dir: Some("/s".into()),
            ..Config::default()
        };
        let places = Places::choose(&config, &Fake::default()).unwrap();
        let files = [
            places.socket.clone(),
            places.lock(),
            places.worker_pid(),
            places.supervisor_pid(),
            places.log(),
        ];
        let expected =
            ["/r/cpu7.sock", "/r/cpu7.lock", "/r/cpu7.pid", "/r/cpu7.supervisor.pid", "/s/cpu7.log"];
        assert_eq!(files.map(|path| path.display().to_string()), expected);
        assert_eq!(places.secret(), Path::new("/s/secret"));
    }

    #[test]
    fn a_socket_path_just_fits() {
        let with = |bytes: usize| {
            let socket = format!("/{}", "s".repeat(bytes - 1)).into();
            Config { socket: Some(socket), state_dir: Some("/s".into()), ..Config::default() }
        };
        assert!(Places::choose(&with(107), &Fake::default()).is_ok());
        let error = Places::choose(&with(108), &Fake::default()).unwrap_err();
        assert!(error.to_string().contains("at most 107 bytes, came 108"), "{error}");
    }

    fn in_folder(folder: &Path) -> Places {
        let config = Config {
            runtime_dir: Some(folder.join("run/pillion")),
            state_dir: Some(folder.join("state/pillion")),
            socket: Some("/s".into()),
            ..Config::default()
        };
        Places::choose(&config, &Fake::default()).unwrap()
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn folders_are_made_private_and_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let places = in_folder(folder.path());
        places.inspect().unwrap();
        places.prepare(false).unwrap();
        places.prepare(false).unwrap();
        places.inspect().unwrap();
        assert_eq!((mode(&places.runtime_dir), mode(&places.state_dir)), (0o700, 0o700));
        set_mode(&places.runtime_dir, 0o755);
        places.prepare(false).unwrap();
        assert_eq!(mode(&places.runtime_dir), 0o700, "only too open to look at: closed");
        places.prepare(true).unwrap();
        assert_eq!((mode(&places.runtime_dir), mode(&places.state_dir)), (0o711, 0o700));
    }

    #[test]
    fn what_others_could_have_planted_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let places = in_folder(folder.path());
        places.prepare(false).unwrap();

        set_mode(&places.runtime_dir, 0o770);
        let error = places.prepare(false).unwrap_err();
        assert!(matches!(error, PlacesError::Writable { mode: 0o770, .. }), "{error}");
        set_mode(&places.runtime_dir, 0o700);

        let uid = rustix::process::geteuid().as_raw();
        let error = ensure_dir(&places.runtime_dir, 0o700, uid + 1).unwrap_err();
        assert!(matches!(error, PlacesError::Owner { .. }), "{error}");

        std::fs::remove_dir(&places.runtime_dir).unwrap();
        symlink(&places.state_dir, &places.runtime_dir).unwrap();
        let error = places.prepare(false).unwrap_err();
        assert!(matches!(error, PlacesError::NotAFolder { .. }), "{error}");

        std::fs::remove_file(&places.runtime_dir).unwrap();
        std::fs::write(&places.runtime_dir, "").unwrap();
        let error = places.inspect().unwrap_err();
        assert!(matches!(error, PlacesError::NotAFolder { .. }), "{error}");
    }

    /// The client must look where the sidecar listens.
    #[test]
    fn client_and_sidecar_agree() {
        let mut sources = crate::config::Sources::of_process(None, Vec::new());
        // What the tester's own machine says of other sidecars does not count.
        for name in ["PILLION_SOCKET", crate::config::FILE_VARIABLE] {
            sources.variables.remove(name);
        }
        sources.default_file = None;
        let config = Config::load(&sources).unwrap().config;
        let places = Places::choose(&config, &Machine).unwrap();
        assert_eq!(places.socket, pillion_client::default_socket(&config.device));
    }

    /// The environment of a process is its own: each runs the test above in a new one.
    #[test]
    fn client_and_sidecar_agree_whatever_is_set() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path().to_str().unwrap();
        for variables in [
            vec![],
            vec![("XDG_RUNTIME_DIR", here)],
            vec![("XDG_RUNTIME_DIR", "/nonexistent")],
            vec![("XDG_RUNTIME_DIR", "relative")],
            vec![("XDG_RUNTIME_DIR", "")],
            vec![("XDG_RUNTIME_DIR", here), ("PILLION_RUNTIME_DIR", "/elsewhere")],
            vec![("PILLION_RUNTIME_DIR", "")],
            vec![("PILLION_DEVICE", "cpu9")],
        ] {
            let again = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "places::tests::client_and_sidecar_agree"])
                .env_clear()
                .env("HOME", "/root")
                .envs(variables.clone())
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&again.stdout);
            assert!(again.status.success() && said.contains("1 passed"), "{variables:?}: {said}");
        }
    }

    #[test]
    fn private_files_follow_no_link_and_keep_their_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cpu0.log");
        io::Write::write_all(&mut open_private(&path, true).unwrap(), b"one").unwrap();
        io::Write::write_all(&mut open_private(&path, true).unwrap(), b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"onetwo");
        assert_eq!(mode(&path), 0o600);
        let link = folder.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(open_private(&link, false).is_err());
        set_mode(&path, 0o622);
        assert!(matches!(open_private(&path, false), Err(PlacesError::Writable { .. })));
    }
}
