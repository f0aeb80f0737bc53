//! Copies.

use std::{
    ffi::{c_uchar, c_void},
    thread,
    time::{Duration, Instant},
};

use cudarc::driver::sys::{CUdeviceptr, CUresult, CUstream};

use crate::{
    call::current,
    context::Context,
    errors::Outcome,
    faults,
    memory::{self, Memory, Side},
    object::pointer,
    stats,
    stream::{self, Work},
};

/// Where the bytes come from.
#[derive(Debug)]
pub(crate) enum Source {
    Address(u64),
    /// They were read when the call was made; with whether they lay in pageable memory.
    Taken(Vec<u8>, bool),
}

/// One contiguous copy.
#[derive(Debug)]
pub(crate) struct Copy {
    pub(crate) to: u64,
    pub(crate) from: Source,
    pub(crate) bytes: usize,
    /// The call said that this side is the device.
    pub(crate) to_device: bool,
    pub(crate) from_device: bool,
}

/// Sets bytes of device memory.
#[derive(Debug)]
pub(crate) struct Fill {
    pub(crate) address: u64,
    pub(crate) byte: c_uchar,
    pub(crate) bytes: usize,
}

/// An address inside of what was expected to be there, or not.
fn at(memory: &Memory, address: u64, bytes: usize, device: bool) -> Outcome<Side> {
    match memory.side(address, bytes)? {
        Side::Pinned | Side::Pageable if device => Err(CUresult::CUDA_ERROR_INVALID_VALUE),
        side => Ok(side),
    }
}

impl Copy {
    /// Fails if one end is not what the call says.
    pub(crate) fn check(&self) -> Outcome {
        let memory = memory::read();
        at(&memory, self.to, self.bytes, self.to_device)?;
        if let Source::Address(from) = self.from {
            at(&memory, from, self.bytes, self.from_device)?;
        }
        Ok(())
    }

    /// Reads the source now, whatever the stream may still have to do before.
    pub(crate) fn take(&mut self) -> Outcome {
        let Source::Address(from) = self.from else { return Ok(()) };
        let memory = memory::read();
        let pageable = at(&memory, from, self.bytes, self.from_device)? == Side::Pageable;
        let mut taken = vec![0; self.bytes];
        move_bytes(taken.as_mut_ptr().expose_provenance() as u64, from, self.bytes, pageable, false)?;
        self.from = Source::Taken(taken, pageable);
        Ok(())
    }

    fn perform(&self) -> Outcome {
        if self.bytes == 0 {
            return Ok(());
        }
        // Nothing is unmapped as long as this is held.
        let memory = memory::read();
        let to_pageable = at(&memory, self.to, self.bytes, self.to_device)? == Side::Pageable;
        let (from, from_pageable, taken) = match &self.from {
            Source::Address(from) => {
                (*from, at(&memory, *from, self.bytes, self.from_device)? == Side::Pageable, false)
            }
            Source::Taken(bytes, pageable) => (bytes.as_ptr().expose_provenance() as u64, *pageable, true),
        };
        move_bytes(self.to, from, self.bytes, from_pageable && !taken, to_pageable)?;
        stats::copied(self.bytes as u64, to_pageable || from_pageable);
        Ok(())
    }
}

/// Copies. Pageable memory, of which nobody has told us that it exists, goes through the kernel, which has an
/// error for what is not there.
fn move_bytes(to: u64, from: u64, bytes: usize, from_pageable: bool, to_pageable: bool) -> Outcome {
    if !from_pageable && !to_pageable {
        // SAFETY: both ranges are in the books, whose lock the caller holds (or are the caller's own).
        // Whether others write there meanwhile is their business, as on a real device.
        unsafe { std::ptr::copy(pointer::<u8>(from).cast_const(), pointer::<u8>(to), bytes) };
        return Ok(());
    }
    let mut done = 0;
    while done < bytes {
        let piece = |address: u64| libc::iovec {
            iov_base: pointer::<c_void>(address + done as u64),
            iov_len: bytes - done,
        };
        let (own, other) = if to_pageable { (piece(from), piece(to)) } else { (piece(to), piece(from)) };
        let call = if to_pageable { libc::process_vm_writev } else { libc::process_vm_readv };
        // SAFETY: the kernel checks all addresses; what it writes is what the caller asked to be written.
        let moved = unsafe { call(libc::getpid(), &raw const own, 1, &raw const other, 1, 0) };
        match usize::try_from(moved) {
            Ok(moved @ 1..) => done += moved,
            _ => return Err(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS),
        }
    }
    Ok(())
}

impl Fill {
    pub(crate) fn perform(&self) -> Outcome {
        let memory = memory::read();
        memory.device(self.address, self.bytes).or(Err(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS))?;
        // SAFETY: the range is accessible device memory, and stays as long as the lock is held.
        unsafe { pointer::<u8>(self.address).write_bytes(self.byte, self.bytes) };
        Ok(())
    }
}

/// Does one call's copies, on a stream's thread. What fails here fails the context.
pub(crate) fn perform(copies: Vec<Copy>, unwanted: &dyn Fn() -> bool) -> Outcome {
    let start = Instant::now();
    faults::meet_unless("copy", unwanted)?;
    let bytes: usize = copies.iter().map(|copy| copy.bytes).sum();
    for copy in copies {
        if unwanted() {
            return Ok(());
        }
        copy.perform().or(Err(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS))?;
    }
    if let Some(rate) = faults::rate() {
        let end = start + Duration::from_secs_f64(bytes as f64 / rate as f64);
        // In pieces: the context may end meanwhile.
        while !unwanted() && Instant::now() < end {
            thread::sleep(end.saturating_duration_since(Instant::now()).min(Duration::from_millis(20)));
        }
    }
    Ok(())
}

/// Does something in the context's default stream and waits for it.
pub(crate) fn now(context: &'static Context, work: Work) -> Outcome {
    let stream = stream::find(context, std::ptr::null_mut())?;
    stream.push(work)?;
    stream.synchronize();
    context.failure()
}

fn later(context: &'static Context, stream: CUstream, copy: Copy) -> Outcome {
    stream::find(context, stream)?.push(Work::Copy(vec![copy]))
}

fn to_device(to: CUdeviceptr, from: *const c_void, bytes: usize) -> Copy {
    let from = Source::Address(from.expose_provenance() as u64);
    Copy { to, from, bytes, to_device: true, from_device: false }
}

fn to_host(to: *mut c_void, from: CUdeviceptr, bytes: usize) -> Copy {
    let (to, from) = (to.expose_provenance() as u64, Source::Address(from));
    Copy { to, from, bytes, to_device: false, from_device: true }
}

fn within(to: CUdeviceptr, from: CUdeviceptr, bytes: usize) -> Copy {
    Copy { to, from: Source::Address(from), bytes, to_device: true, from_device: true }
}

fn any(to: CUdeviceptr, from: CUdeviceptr, bytes: usize) -> Copy {
    Copy { to, from: Source::Address(from), bytes, to_device: false, from_device: false }
}

fn checked(context: &'static Context, copy: Copy) -> Outcome {
    copy.check()?;
    now(context, Work::Copy(vec![copy]))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemcpy(to: CUdeviceptr, from: CUdeviceptr, bytes: usize) -> CUresult {
    current("cuMemcpy", |context| checked(context, any(to, from, bytes)))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemcpyHtoD_v2(
    to: CUdeviceptr,
    from: *const c_void,
    bytes: usize,
) -> CUresult {
    current("cuMemcpyHtoD_v2", |context| checked(context, to_device(to, from, bytes)))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemcpyDtoH_v2(
    to: *mut c_void,
    from: CUdeviceptr,
    bytes: usize,
) -> CUresult {
    current("cuMemcpyDtoH_v2", |context| checked(context, to_host(to, from, bytes)))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemcpyDtoD_v2(
    to: CUdeviceptr,
    from: CUdeviceptr,
    bytes: usize,
) -> CUresult {
    current("cuMemcpyDtoD_v2", |context| checked(context, within(to, from, bytes)))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemcpyAsync(
    to: CUdeviceptr,
    from: CUdeviceptr,
    bytes: usize,
    stream: CUstream,
) -> CUresult {
    current("cuMemcpyAsync", |context| later(context, stream, any(to, from, bytes)))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: CUdeviceptr,
    from: *const c_void,
    bytes: usize,
    stream: CUstream,
) -> CUresult {
    current("cuMemcpyHtoDAsync_v2", |context| later(context, stream, to_device(to, from, bytes)))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: CUdeviceptr,
    bytes: usize,
    stream: CUstream,
) -> CUresult {
    current("cuMemcpyDtoHAsync_v2", |context| later(context, stream, to_host(to, from, bytes)))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemcpyDtoDAsync_v2(
    to: CUdeviceptr,
    from: CUdeviceptr,
    bytes: usize,
    stream: CUstream,
) -> CUresult {
    current("cuMemcpyDtoDAsync_v2", |context| later(context, stream, within(to, from, bytes)))
}
