//! The cluster secret and the tenant keys that come from it (I9).
//!
//! Without the secret no tenant key can be made, and without a tenant key no
//! digest. Neither type shows its bytes when printed.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};

use crate::config::TenantName;

/// Bytes of the secret.
pub const SECRET_BYTES: usize = 32;

/// Separates tenant keys from every other use of BLAKE3; changing it forgets all records.
const TENANT_KEY_CONTEXT: &str = "pillion 2026 tenant key v1";
const NEIGHBOUR_KEY_CONTEXT: &str = "pillion 2026 neighbours v1";

/// The secret that all sidecars of a cluster share.
pub struct ClusterSecret([u8; SECRET_BYTES]);

/// The key of one tenant's digests.
#[derive(Clone, PartialEq, Eq)]
pub struct TenantKey([u8; 32]);

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file or its folder failed us.
    #[error(
        "expected to read or make the cluster secret {}, came: {error}: check the state folder and its file system",
        path.display()
    )]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// The name is a link, a folder or a device.
    #[error(
        "expected the cluster secret {} to be a plain file, came a link or another kind: put the file itself there",
        path.display()
    )]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else's file.
    #[error(
        "expected the cluster secret {} to belong to uid {expected}, came uid {came}: chown it, or set another state_dir",
        path.display()
    )]
    Owner {
        /// The file.
        path: PathBuf,
        /// Our user.
        expected: u32,
        /// Its user.
        came: u32,
    },
    /// Others can read or write it.
    #[error(
        "expected the cluster secret {} to have mode 0600, came {mode:04o}: if nobody has read it chmod 0600, else remove it (stored blocks are then lost, never wrong)",
        path.display()
    )]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Not 32 bytes, or 32 zeros, as a crash of the file system leaves them.
    #[error(
        "expected {SECRET_BYTES} random bytes in the cluster secret {}, came {came}: restore it from another sidecar of the cluster, or remove it and a new one is made (stored blocks are then lost, never wrong)",
        path.display()
    )]
    Content {
        /// The file.
        path: PathBuf,
        /// What is in it, without its bytes.
        came: String,
    },
}

impl ClusterSecret {
    /// Reads the secret; makes it if there is none. Two sidecars that start at
    /// once end up with the same one.
    pub fn open_or_create(path: &Path) -> Result<Self, SecretError> {
        match Self::open(path) {
            Err(SecretError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        create(path).map_err(|error| SecretError::Io { path: path.to_owned(), error })?;
        Self::open(path)
    }

    /// Reads the secret and checks that it is ours alone.
    pub fn open(path: &Path) -> Result<Self, SecretError> {
        open_as(path, rustix::process::geteuid().as_raw())
    }

    /// The key of a tenant.
    pub fn tenant_key(&self, tenant: &TenantName) -> TenantKey {
        let mut hasher = blake3::Hasher::new_derive_key(TENANT_KEY_CONTEXT);
        // The secret's length is fixed, so that no other pair makes the same input.
        hasher.update(&self.0).update(tenant.as_str().as_bytes());
        TenantKey(*hasher.finalize().as_bytes())
    }

    /// What sidecars of one secret know each other by. No tenant has this key, and nothing is stored under it.
    pub fn neighbour_key(&self) -> pillion_core::TenantKey {
        let mut hasher = blake3::Hasher::new_derive_key(NEIGHBOUR_KEY_CONTEXT);
        hasher.update(&self.0);
        pillion_core::TenantKey::new(*hasher.finalize().as_bytes())
    }
}

impl TenantKey {
    /// The bytes, for keyed hashing and for the attach reply.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterSecret(hidden)")
    }
}

impl fmt::Debug for TenantKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TenantKey(hidden)")
    }
}

/// Written whole under a name of our own, then linked: the secret's name appears
/// at once, complete and durable, and never replaces one that is there. (A file
/// made under its final name would be half written for whoever starts second, and
/// after a crash for everyone.)
fn create(path: &Path) -> io::Result<()> {
    let mut bytes = [0; SECRET_BYTES];
    let mut suffix = [0; 8];
    for buffer in [&mut bytes[..], &mut suffix[..]] {
        getrandom::fill(buffer).map_err(|error| io::Error::other(error.to_string()))?;
    }
    let own = path.with_file_name(format!("secret.{:016x}.new", u64::from_le_bytes(suffix)));
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(CWD, &own, flags, Mode::from_raw_mode(0o600))?);
    let linked = file
        .write_all(&bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| Ok(rustix::fs::linkat(CWD, &own, CWD, path, AtFlags::empty())?));
    std::fs::remove_file(&own)?;
    match linked {
        // Another starter was first; its secret counts.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

fn open_as(path: &Path, uid: u32) -> Result<ClusterSecret, SecretError> {
    let path_owned = || path.to_owned();
    let failed = |error: io::Error| SecretError::Io { path: path_owned(), error };
    // Not blocking: a planted pipe must not hang the start.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
        Ok(file) => file,
        Err(rustix::io::Errno::LOOP) => return Err(SecretError::NotAFile { path: path_owned() }),
        Err(error) => return Err(failed(error.into())),
    };
    let found = rustix::fs::fstat(&file).map_err(|error| failed(error.into()))?;
    if !rustix::fs::FileType::from_raw_mode(found.st_mode).is_file() {
        return Err(SecretError::NotAFile { path: path_owned() });
    }
    if found.st_uid != uid {
        return Err(SecretError::Owner { path: path_owned(), expected: uid, came: found.st_uid });
    }
    let mode = found.st_mode & 0o7777;
    if mode & 0o077 != 0 {
        return Err(SecretError::Mode { path: path_owned(), mode });
    }
    let mut bytes = Vec::with_capacity(SECRET_BYTES + 1);
    let limit = SECRET_BYTES as u64 + 1;
    File::from(file).take(limit).read_to_end(&mut bytes).map_err(failed)?;
    let content = |came: String| SecretError::Content { path: path_owned(), came };
    let size = found.st_size;
    let bytes: [u8; SECRET_BYTES] = bytes.try_into().map_err(|_| content(format!("{size} bytes")))?;
    if bytes == [0; SECRET_BYTES] {
        return Err(content("only zeros".to_owned()));
    }
    Ok(ClusterSecret(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        (folder, path)
    }

    fn write(path: &Path, bytes: &[u8], mode: u32) {
        std::fs::write(path, bytes).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn name(text: &str) -> TenantName {
        text.parse().unwrap()
    }

    #[test]
    fn made_once_private_and_read_back() {
        let (folder, path) = folder();
        let made = ClusterSecret::open_or_create(&path).unwrap();
        let read = ClusterSecret::open_or_create(&path).unwrap();
        assert_eq!(made.0, read.0);
        let found = std::fs::metadata(&path).unwrap();
        assert_eq!((found.mode() & 0o7777, found.len(), found.nlink()), (0o600, 32, 1));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn racing_starters_agree() {
        for _ in 0..20 {
            let (folder, path) = folder();
            let secrets: Vec<_> = std::thread::scope(|scope| {
                let starters: Vec<_> =
                    (0..8).map(|_| scope.spawn(|| ClusterSecret::open_or_create(&path).unwrap().0)).collect();
                starters.into_iter().map(|starter| starter.join().unwrap()).collect()
            });
            assert!(secrets.iter().all(|secret| *secret == secrets[0]));
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_wrong_file_is_refused_and_left_alone() {
        let (_folder, path) = folder();
        for (bytes, mode, words) in [
            (&[7; 31][..], 0o600, "came 31 bytes"),
            (&[7; 33], 0o600, "came 33 bytes"),
            (&[], 0o600, "came 0 bytes"),
            (&[0; 32], 0o600, "came only zeros"),
            (&[7; 32], 0o640, "came 0640"),
            (&[7; 32], 0o602, "came 0602"),
        ] {
            write(&path, bytes, mode);
            let error = ClusterSecret::open_or_create(&path).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
        write(&path, &[7; 32], 0o400);
        ClusterSecret::open(&path).unwrap();
        let stranger = rustix::process::geteuid().as_raw() + 1;
        assert!(matches!(open_as(&path, stranger), Err(SecretError::Owner { .. })));
    }

    #[test]
    fn links_folders_and_pipes_are_no_secret() {
        let (folder, path) = folder();
        let real = folder.path().join("real");
        write(&real, &[7; 32], 0o600);
        symlink(&real, &path).unwrap();
        assert!(matches!(ClusterSecret::open_or_create(&path), Err(SecretError::NotAFile { .. })));
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(ClusterSecret::open_or_create(&path), Err(SecretError::NotAFile { .. })));
        std::fs::remove_dir(&path).unwrap();
        rustix::fs::mknodat(CWD, &path, rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert!(matches!(ClusterSecret::open_or_create(&path), Err(SecretError::NotAFile { .. })));
    }

    #[test]
    fn keys_differ_by_tenant_and_by_secret_and_stay_the_same() {
        let secret = ClusterSecret(std::array::from_fn(|i| i as u8));
        let key = secret.tenant_key(&name("default"));
        let material: Vec<u8> = secret.0.iter().copied().chain(*b"default").collect();
        assert_eq!(key.0, blake3::derive_key("pillion 2026 tenant key v1", &material));
        assert_ne!(key, secret.tenant_key(&name("defaul")));
        assert_ne!(key, ClusterSecret([1; 32]).tenant_key(&name("default")));
    }

    #[test]
    fn nothing_prints_the_bytes() {
        let secret = ClusterSecret([0xab; 32]);
        let key = secret.tenant_key(&name("default"));
        let printed = format!("{secret:?} {secret:#?} {key:?} {key:#?}");
        assert!(!printed.contains("ab,") && !printed.contains("171"), "{printed}");
        assert_eq!(printed.matches("hidden").count(), 4);
    }
}
