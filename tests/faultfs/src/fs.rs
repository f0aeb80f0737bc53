//! The disk as the kernel sees it: one directory of files, nothing cached.

use std::{
    ffi::OsStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, SystemTime},
};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use crate::disk::{Disk, Fault, UNIT, What};

const TTL: Duration = Duration::ZERO;
const BLOCK: u64 = 4096;
/// What a disk without a bound says of itself.
const ROOMY: u64 = 1 << 40;

/// Shared with whoever commands the faults.
pub(crate) type Shared = Arc<Mutex<Disk>>;

#[derive(Debug)]
pub(crate) struct Fs(pub(crate) Shared);

impl Fs {
    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn named(&self, name: &OsStr) -> Option<u64> {
        self.disk().names.get(name.to_str()?).copied()
    }

    fn attributes(&self, number: u64) -> Option<FileAttr> {
        let root = INodeNo::ROOT.0;
        let size = if number == root { 0 } else { self.disk().files.get(&number)?.now.len() as u64 };
        Some(FileAttr {
            ino: INodeNo(number),
            size,
            blocks: size.div_ceil(512),
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind: if number == root { FileType::Directory } else { FileType::RegularFile },
            perm: if number == root { 0o700 } else { 0o600 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK as u32,
            flags: 0,
        })
    }

    fn fault(&self, what: What) -> Option<Fault> {
        self.disk().fault(what)
    }
}

/// Answers now, or later from a thread of its own: others go on meanwhile.
fn after(fault: Option<Fault>, answer: impl FnOnce() + Send + 'static) {
    match fault {
        Some(Fault::Slow(time)) => {
            thread::spawn(move || {
                thread::sleep(time);
                answer();
            });
        }
        _ => answer(),
    }
}

fn flipped(data: &mut [u8], bit: u64) {
    let bits = data.len() as u64 * 8;
    if let Some(place) = bit.checked_rem(bits) {
        data[(place / 8) as usize] ^= 1 << (place % 8);
    }
}

impl Filesystem for Fs {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.named(name).and_then(|number| self.attributes(number)) {
            Some(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(number.0) {
            Some(attributes) => reply.attr(&TTL, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        number: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if size.is_some_and(|size| !self.disk().resize(number.0, size)) {
            return reply.error(Errno::ENOSPC);
        }
        match self.attributes(number.0) {
            Some(attributes) => reply.attr(&TTL, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn create(&self, _: &Request, _: INodeNo, name: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        let made = name.to_str().and_then(|name| self.disk().make(name));
        match made.and_then(|number| self.attributes(number)) {
            Some(attributes) => {
                let flags = FopenFlags::FOPEN_DIRECT_IO;
                reply.created(&TTL, &attributes, Generation(0), FileHandle(0), flags);
            }
            None => reply.error(Errno::EEXIST),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let mut disk = self.disk();
        match name.to_str().and_then(|name| disk.names.remove(name)) {
            // Who has it open keeps its number, and reads nothing.
            Some(number) => {
                disk.files.remove(&number);
                reply.ok();
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _: INodeNo,
        new: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut disk = self.disk();
        let (Some(name), Some(new)) = (name.to_str(), new.to_str()) else {
            return reply.error(Errno::EINVAL);
        };
        if flags.contains(RenameFlags::RENAME_NOREPLACE) && disk.names.contains_key(new) {
            return reply.error(Errno::EEXIST);
        }
        match disk.names.remove(name) {
            Some(number) => {
                if let Some(replaced) = disk.names.insert(new.to_owned(), number) {
                    disk.files.remove(&replaced);
                }
                reply.ok();
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let fault = self.fault(What::Read);
        if let Some(Fault::Errno(errno)) = fault {
            return reply.error(Errno::from_i32(errno));
        }
        let mut data = {
            let disk = self.disk();
            let Some(file) = disk.files.get(&number.0) else { return reply.error(Errno::EIO) };
            let start = (offset as usize).min(file.now.len());
            file.now[start..(start + size as usize).min(file.now.len())].to_vec()
        };
        if let Some(Fault::Flip(bit)) = fault {
            flipped(&mut data, bit);
        }
        after(fault, move || reply.data(&data));
    }

    fn write(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let fault = self.fault(What::Write);
        let mut data = data.to_vec();
        let size = data.len() as u32;
        let mut at = offset;
        match fault {
            Some(Fault::Errno(errno)) => return reply.error(Errno::from_i32(errno)),
            Some(Fault::Torn(units)) => {
                let done = (units * UNIT).min(data.len());
                self.disk().write(number.0, offset, &data[..done]);
                return reply.error(Errno::EIO);
            }
            Some(Fault::Lost) => return reply.written(size),
            Some(Fault::Misdirected(units)) => at += units * UNIT as u64,
            Some(Fault::Flip(bit)) => flipped(&mut data, bit),
            Some(Fault::Slow(_)) | None => {}
        }
        // What goes beyond the end of a device goes nowhere.
        let beyond = at != offset && {
            let disk = self.disk();
            disk.files.get(&number.0).is_none_or(|file| at + u64::from(size) > file.now.len() as u64)
        };
        if !beyond && !self.disk().write(number.0, at, &data) {
            return reply.error(Errno::ENOSPC);
        }
        after(fault, move || reply.written(size));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, number: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let fault = self.fault(What::Sync);
        if let Some(Fault::Errno(errno)) = fault {
            return reply.error(Errno::from_i32(errno));
        }
        if fault != Some(Fault::Lost) {
            self.disk().sync(number.0);
        }
        after(fault, move || reply.ok());
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(&self, _: &Request, number: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let mut entries = vec![(number.0, FileType::Directory, ".".to_owned())];
        entries.push((number.0, FileType::Directory, "..".to_owned()));
        let files = self.disk().names.clone();
        entries.extend(files.into_iter().map(|(name, number)| (number, FileType::RegularFile, name)));
        for (index, (number, kind, name)) in entries.into_iter().enumerate().skip(offset as usize) {
            if reply.add(INodeNo(number), index as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let disk = self.disk();
        let all = if disk.capacity == 0 { ROOMY } else { disk.capacity };
        let free = all.saturating_sub(disk.used()) / BLOCK;
        reply.statfs(all / BLOCK, free, free, 1 << 20, 1 << 20, BLOCK as u32, 255, BLOCK as u32);
    }

    fn fallocate(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        _: i32,
        reply: ReplyEmpty,
    ) {
        let mut disk = self.disk();
        let had = disk.files.get(&number.0).map_or(0, |file| file.now.len() as u64);
        if disk.resize(number.0, had.max(offset + length)) {
            reply.ok();
        } else {
            reply.error(Errno::ENOSPC);
        }
    }
}
