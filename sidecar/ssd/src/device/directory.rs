//! A directory on a file system: whose it is, its lock, its files.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{CWD, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags},
    io::Errno,
    process::{Resource, Rlimit},
};

use crate::{
    error::OpenError,
    format::{DirectoryId, Refused, SECTOR, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN, Superblock},
    memory::Aligned,
};

/// The file that says that a directory is ours.
pub const SUPERBLOCK: &str = "pillion-ssd";
const NEW: &str = "pillion-ssd.new";
/// How often the superblock is read before it counts as damaged.
const SUPERBLOCK_TRIES: u32 = 3;

/// Why a directory is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// To write. A new directory gets segments of this length; one that is there keeps its own.
    Own {
        /// A multiple of 4096.
        segment_bytes: u64,
    },
    /// To look: nothing is written.
    Inspect,
}

/// An opened, locked directory.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    /// The directory itself; the lock lives as long as this.
    lock: OwnedFd,
    block: Superblock,
    writable: bool,
    files: Vec<Option<OwnedFd>>,
    others: Box<Others>,
}

/// Files that are no segments in use.
#[derive(Debug, Default)]
struct Others {
    /// Made and not filled when the power went: they never had a record.
    unfilled: Vec<PathBuf>,
    misfits: Vec<(u32, u64)>,
    strangers: Vec<String>,
}

impl Directory {
    /// Opens a directory of this tier, or makes an empty one ours.
    ///
    /// # Errors
    /// Whatever is not ours is refused and left as it is.
    pub fn open(path: &Path, purpose: Use) -> Result<Self, OpenError> {
        if let Use::Own { segment_bytes } = purpose {
            let in_range = (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&segment_bytes);
            if !in_range || !segment_bytes.is_multiple_of(SECTOR as u64) {
                let expected =
                    format!("a multiple of {SECTOR}, {SEGMENT_BYTES_MIN} to {SEGMENT_BYTES_MAX} bytes");
                return Err(OpenError::Setting { what: "segment length", expected, got: segment_bytes });
            }
        }
        let marker = path.join(SUPERBLOCK);
        // Before anything is looked at: of two that find it empty one makes it its own.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let lock = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|errno| failed(path, "open", errno.into()))?;
        take_lock(&lock, path)?;
        if !marker.exists() {
            match purpose {
                Use::Own { segment_bytes } => make_ours(path, segment_bytes)?,
                Use::Inspect => return Err(not_ours(path)),
            }
        }
        let block = read_superblock(&marker)?;
        allow_many_files();
        let writable = purpose != Use::Inspect;
        let mut directory =
            Self { path: path.to_owned(), lock, block, writable, files: Vec::new(), others: Box::default() };
        directory.open_files()?;
        Ok(directory)
    }

    /// Whose directory.
    pub fn superblock(&self) -> Superblock {
        self.block
    }

    /// Numbers of the segment files.
    pub fn slots(&self) -> Vec<u32> {
        let there = self.files.iter().enumerate().filter(|(_, file)| file.is_some());
        there.map(|(slot, _)| slot as u32).collect()
    }

    /// Segment files of another length than they should have, each with its length, that may have held records.
    /// Only who inspects gets to know them: to an owner they are an error.
    pub fn misfits(&self) -> &[(u32, u64)] {
        &self.others.misfits
    }

    /// Names of files that are not the tier's. They are never touched.
    pub fn strangers(&self) -> &[String] {
        &self.others.strangers
    }

    /// Removes segment files from this number on (the capacity was lowered), and those that were never filled.
    /// Nothing was removed before: all settings can be looked at first.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn shrink(&mut self, slots: u32) -> Result<(), OpenError> {
        for path in std::mem::take(&mut self.others.unfilled) {
            fs::remove_file(&path).map_err(|source| failed(&path, "remove", source))?;
        }
        for slot in self.slots().into_iter().filter(|slot| *slot >= slots) {
            let path = self.segment_path(slot);
            self.files[slot as usize] = None;
            fs::remove_file(&path).map_err(|source| failed(&path, "remove", source))?;
        }
        Ok(())
    }

    /// What the lock hangs on.
    pub(super) fn lock(&self) -> &OwnedFd {
        &self.lock
    }

    pub(super) fn file(&self, slot: u32) -> Option<&OwnedFd> {
        self.files.get(slot as usize)?.as_ref()
    }

    /// Makes a segment file with all its blocks, durably: its records may be acknowledged as such.
    pub(super) fn prepare(&mut self, slot: u32) -> Result<(), Errno> {
        if self.file(slot).is_some() {
            return Ok(());
        }
        let path = self.segment_path(slot);
        let flags = OFlags::RDWR
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::DIRECT
            | OFlags::CLOEXEC
            | OFlags::NOFOLLOW;
        let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)?;
        let filled = match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, self.block.segment_bytes)
        {
            // No preallocation here: room can run out while writing, which retires the segment.
            Err(Errno::OPNOTSUPP) => rustix::fs::ftruncate(&file, self.block.segment_bytes),
            other => other,
        };
        let synced = filled.and_then(|()| rustix::fs::fsync(&file)).and_then(|()| {
            let directory = rustix::fs::open(&self.path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
            rustix::fs::fsync(directory)
        });
        if let Err(errno) = synced {
            // It is new and ours: half a file would be in the way.
            let _ = rustix::fs::unlink(&path);
            return Err(errno);
        }
        self.keep(slot, file);
        Ok(())
    }

    fn keep(&mut self, slot: u32, file: OwnedFd) {
        let slot = slot as usize;
        if self.files.len() <= slot {
            self.files.resize_with(slot + 1, || None);
        }
        self.files[slot] = Some(file);
    }

    fn segment_path(&self, slot: u32) -> PathBuf {
        self.path.join(format!("{slot:08}.segment"))
    }

    /// Files of another name are not touched.
    fn open_files(&mut self) -> Result<(), OpenError> {
        let mode = if self.writable { OFlags::RDWR } else { OFlags::RDONLY };
        for name in names(&self.path)? {
            let number = name.strip_suffix(".segment").filter(|digits| digits.len() == 8);
            // `parse` would take a sign.
            let number = number.filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()));
            let Some(slot) =
                number.and_then(|digits| digits.parse::<u32>().ok()).filter(|slot| *slot < SLOTS_MAX)
            else {
                if ![SUPERBLOCK, NEW, "lost+found"].contains(&name.as_str()) {
                    self.others.strangers.push(name);
                }
                continue;
            };
            let path = self.path.join(&name);
            let flags = mode | OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let file = rustix::fs::open(&path, flags, Mode::empty()).map_err(|errno| match errno {
                Errno::INVAL => OpenError::NoDirectIo { path: path.clone() },
                errno => failed(&path, "open", errno.into()),
            })?;
            let stat = rustix::fs::fstat(&file).map_err(|errno| failed(&path, "look at", errno.into()))?;
            let whole = stat.st_size as u64 == self.block.segment_bytes;
            if whole {
                self.keep(slot, file);
                continue;
            }
            let is_shorter = (stat.st_size as u64) < self.block.segment_bytes;
            if is_shorter && starts_with_zeros(&path)? {
                self.others.unfilled.push(path);
            } else if self.writable {
                return Err(OpenError::Refused { path, source: Refused::Other("segment length") });
            } else {
                self.others.misfits.push((slot, stat.st_size as u64));
            }
        }
        Ok(())
    }
}

/// Segment files of one directory.
pub const SLOTS_MAX: u32 = 1 << 20;

/// The kernel keeps a killed process's lock until its last write has ended: a moment, on a disk that is well.
const LOCK_WAIT: Duration = Duration::from_secs(2);
const LOCK_LOOK: Duration = Duration::from_millis(10);

fn take_lock(lock: &OwnedFd, path: &Path) -> Result<(), OpenError> {
    let mut left = LOCK_WAIT;
    loop {
        match rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if left.is_zero() => {
                return Err(OpenError::Busy { path: path.to_owned() });
            }
            Err(Errno::WOULDBLOCK) => {
                std::thread::sleep(LOCK_LOOK);
                left = left.saturating_sub(LOCK_LOOK);
            }
            Err(errno) => return Err(failed(path, "lock", errno.into())),
        }
    }
}

/// Read again where it makes no sense: a bit that changed on its way does not change every time.
fn read_superblock(marker: &Path) -> Result<Superblock, OpenError> {
    let mut tries = 0;
    loop {
        tries += 1;
        let file = File::open(marker).map_err(|source| failed(marker, "open", source))?;
        // One byte more than it has; in as few reads as can be.
        let mut bytes = Vec::with_capacity(SECTOR + 1);
        file.take(SECTOR as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|source| failed(marker, "read", source))?;
        match Superblock::decode(&bytes) {
            Ok(block) => return Ok(block),
            Err(source) if tries == SUPERBLOCK_TRIES => {
                return Err(OpenError::Refused { path: marker.to_owned(), source });
            }
            Err(_) => {}
        }
    }
}

fn failed(path: &Path, doing: &'static str, source: io::Error) -> OpenError {
    OpenError::Io { path: path.to_owned(), doing, source }
}

/// Whether a file's first sector, as far as it is there, is zero.
fn starts_with_zeros(path: &Path) -> Result<bool, OpenError> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|source| failed(path, "open", source))?;
    file.take(SECTOR as u64).read_to_end(&mut bytes).map_err(|source| failed(path, "read", source))?;
    Ok(bytes.iter().all(|byte| *byte == 0))
}

fn names(path: &Path) -> Result<Vec<String>, OpenError> {
    let entries = fs::read_dir(path).map_err(|source| failed(path, "list", source))?;
    let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    entries.map(name).collect::<io::Result<_>>().map_err(|source| failed(path, "list", source))
}

fn foreign(path: &Path) -> Result<Option<String>, OpenError> {
    // `lost+found` is the file system's; NEW is what a crash left of `make_ours`.
    Ok(names(path)?.into_iter().find(|name| name != "lost+found" && name != NEW))
}

fn not_ours(path: &Path) -> OpenError {
    match foreign(path) {
        Ok(found) => {
            OpenError::NotOurs { path: path.to_owned(), found: found.unwrap_or_else(|| "nothing".into()) }
        }
        Err(error) => error,
    }
}

/// Puts a superblock into an empty directory: whole, or not at all.
fn make_ours(path: &Path, segment_bytes: u64) -> Result<(), OpenError> {
    if foreign(path)?.is_some() {
        return Err(not_ours(path));
    }
    let new = path.join(NEW);
    check_direct_io(&new)?;
    let directory = DirectoryId(random().map_err(|source| failed(path, "draw a random id for", source))?);
    let mut sector = Aligned::zeroed(SECTOR);
    Superblock { directory, segment_bytes }.encode(sector.bytes_mut());
    let write = || {
        fs::write(&new, sector.bytes())?;
        File::open(&new)?.sync_all()?;
        // Never in the place of another one.
        rustix::fs::renameat_with(CWD, &new, CWD, path.join(SUPERBLOCK), RenameFlags::NOREPLACE)?;
        File::open(path)?.sync_all()
    };
    write().map_err(|source| failed(&new, "write", source))
}

/// A terabyte of segments is thousands of open files; the soft limit is often 1,024.
fn allow_many_files() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    // Best effort: opening a file says what is wrong, if anything is.
    let _ = rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit { current: limit.maximum, maximum: limit.maximum },
    );
}

/// Before the directory is ours: a file system without direct I/O is no home.
fn check_direct_io(new: &Path) -> Result<(), OpenError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    match rustix::fs::open(new, flags, Mode::RUSR | Mode::WUSR) {
        Ok(_) => Ok(()),
        Err(Errno::INVAL) => {
            let _ = fs::remove_file(new);
            Err(OpenError::NoDirectIo { path: new.to_owned() })
        }
        Err(errno) => Err(failed(new, "create", errno.into())),
    }
}

/// Sixteen random bytes.
///
/// # Errors
/// The kernel has none.
pub fn random() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(bytes)
}
