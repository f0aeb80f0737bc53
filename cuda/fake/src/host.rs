//! Host memory that the device can reach.

use std::ffi::{c_uint, c_void};

use cudarc::driver::sys::{CUdeviceptr, CUresult};
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags};

use crate::{
    call::{current, put},
    context::Context,
    errors::Outcome,
    memory::{self, around, touched},
    object::{self, PAGE, pointer},
    stats::Live,
    stream,
};

/// Flags of `cuMemHostRegister` and `cuMemHostAlloc`: portable, mapped, I/O memory, read-only.
const FLAGS: c_uint = 1 | 2 | 4 | 8;

/// Page-locked host memory.
#[derive(Debug)]
pub(crate) struct Pinned {
    pub(crate) bytes: usize,
    /// The physical device in whose context it was registered.
    pub(crate) device: usize,
    /// Ours to unmap, from `cuMemAllocHost`.
    pub(crate) allocated: bool,
    #[expect(dead_code, reason = "counts while it lives")]
    live: Live,
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemHostRegister_v2(
    start: *mut c_void,
    bytes: usize,
    flags: c_uint,
) -> CUresult {
    current("cuMemHostRegister_v2", |context| {
        let base = start.expose_provenance() as u64;
        let paged = base != 0 && bytes != 0 && base.is_multiple_of(PAGE as u64) && bytes.is_multiple_of(PAGE);
        if !paged || flags & !FLAGS != 0 {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        // SAFETY: starts no write-back that anybody waits for, and changes nothing; it tells whether the
        // pages exist.
        if unsafe { rustix::mm::msync(start, bytes, MsyncFlags::ASYNC) }.is_err() {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        let mut memory = memory::write();
        if touched(&memory.pinned, base, bytes, |pinned| pinned.bytes) {
            return Err(CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
        }
        let (device, live) = (context.device(), Live::registration());
        memory.pinned.insert(base, Pinned { bytes, device, allocated: false, live });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemHostUnregister(start: *mut c_void) -> CUresult {
    current("cuMemHostUnregister", |context| {
        let missing = CUresult::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
        remove(context, start, false, missing).map(drop)
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemHostGetDevicePointer_v2(
    to: *mut CUdeviceptr,
    start: *mut c_void,
    flags: c_uint,
) -> CUresult {
    current("cuMemHostGetDevicePointer_v2", |_| {
        let address = start.addr() as u64;
        let known = around(&memory::read().pinned, address, |pinned| pinned.bytes).is_some();
        if !known || flags != 0 {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        put(to, address)
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemAllocHost_v2(to: *mut *mut c_void, bytes: usize) -> CUresult {
    current("cuMemAllocHost_v2", |context| allocate(context, to, bytes))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemHostAlloc(
    to: *mut *mut c_void,
    bytes: usize,
    flags: c_uint,
) -> CUresult {
    current("cuMemHostAlloc", |context| {
        if flags & !FLAGS != 0 {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        allocate(context, to, bytes)
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemFreeHost(start: *mut c_void) -> CUresult {
    current("cuMemFreeHost", |context| {
        let pinned = remove(context, start, true, CUresult::CUDA_ERROR_INVALID_VALUE)?;
        object::unmap(start.addr() as u64, pinned.bytes);
        Ok(())
    })
}

fn allocate(context: &Context, to: *mut *mut c_void, bytes: usize) -> Outcome {
    if to.is_null() || bytes == 0 {
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    let bytes = bytes.checked_next_multiple_of(PAGE).ok_or(CUresult::CUDA_ERROR_OUT_OF_MEMORY)?;
    // SAFETY: the kernel picks a free place.
    let start = unsafe {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE)
    };
    let start = start.map_err(|_| CUresult::CUDA_ERROR_OUT_OF_MEMORY)?;
    let base = start.expose_provenance() as u64;
    let (device, live) = (context.device(), Live::registration());
    memory::write().pinned.insert(base, Pinned { bytes, device, allocated: true, live });
    put(to, pointer(base))
}

/// Takes it out of the books, after all that may still touch it.
fn remove(context: &Context, start: *mut c_void, allocated: bool, missing: CUresult) -> Outcome<Pinned> {
    let base = start.addr() as u64;
    let known = |pinned: &Pinned| pinned.allocated == allocated;
    if !memory::read().pinned.get(&base).is_some_and(known) {
        return Err(missing);
    }
    stream::synchronize_all(context);
    memory::write().pinned.remove(&base).ok_or(missing)
}
