//! What an address is.

use std::ffi::{c_int, c_uint, c_void};

use cudarc::driver::sys::{CUdeviceptr, CUmemorytype, CUpointer_attribute, CUresult};

use crate::{
    call::{initialized, put},
    context, device,
    errors::Outcome,
    memory::{self, Kind, around},
};

/// One entry of the books, seen from an address in it.
struct Found {
    base: u64,
    bytes: usize,
    id: u64,
    /// Physical.
    device: usize,
    kind: CUmemorytype,
    legacy: bool,
}

fn find(address: u64) -> Option<Found> {
    let memory = memory::read();
    if let Some((base, region)) = memory.region(address) {
        let (bytes, id, device) = (region.bytes, region.id, region.object.name.device);
        let legacy = matches!(region.kind, Kind::Allocated(_));
        return Some(Found { base, bytes, id, device, kind: CUmemorytype::CU_MEMORYTYPE_DEVICE, legacy });
    }
    let (base, pinned) = around(&memory.pinned, address, |pinned| pinned.bytes)?;
    let (bytes, device) = (pinned.bytes, pinned.device);
    Some(Found { base, bytes, id: base, device, kind: CUmemorytype::CU_MEMORYTYPE_HOST, legacy: false })
}

fn tell(to: *mut c_void, attribute: c_uint, address: u64, found: &Found) -> Outcome {
    const CONTEXT: c_uint = CUpointer_attribute::CU_POINTER_ATTRIBUTE_CONTEXT as c_uint;
    const KIND: c_uint = CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE as c_uint;
    const DEVICE_POINTER: c_uint = CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_POINTER as c_uint;
    const HOST_POINTER: c_uint = CUpointer_attribute::CU_POINTER_ATTRIBUTE_HOST_POINTER as c_uint;
    const BUFFER: c_uint = CUpointer_attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID as c_uint;
    const MANAGED: c_uint = CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED as c_uint;
    const ORDINAL: c_uint = CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL as c_uint;
    const LEGACY: c_uint = CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE as c_uint;
    const START: c_uint = CUpointer_attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR as c_uint;
    const SIZE: c_uint = CUpointer_attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE as c_uint;
    const MAPPED: c_uint = CUpointer_attribute::CU_POINTER_ATTRIBUTE_MAPPED as c_uint;
    match attribute {
        CONTEXT => put(to.cast(), context::handle_of(found.device)),
        KIND => put(to.cast(), found.kind as c_uint),
        DEVICE_POINTER => put(to.cast(), address),
        HOST_POINTER if found.kind == CUmemorytype::CU_MEMORYTYPE_HOST => put(to.cast(), address),
        BUFFER => put(to.cast(), found.id),
        MANAGED => put(to.cast(), 0_u8),
        ORDINAL => put(to.cast(), device::ordinal(found.device) as c_int),
        LEGACY => put(to.cast(), u8::from(found.legacy)),
        START => put(to.cast(), found.base),
        SIZE => put(to.cast(), found.bytes),
        MAPPED => put(to.cast(), 1_u8),
        _ => Err(CUresult::CUDA_ERROR_INVALID_VALUE),
    }
}

// Needs no current context: callers ask from threads that have none which device they should make current.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuPointerGetAttribute(
    to: *mut c_void,
    attribute: c_uint,
    address: CUdeviceptr,
) -> CUresult {
    initialized("cuPointerGetAttribute", || {
        let found = find(address).ok_or(CUresult::CUDA_ERROR_INVALID_VALUE)?;
        tell(to, attribute, address, &found)
    })
}
