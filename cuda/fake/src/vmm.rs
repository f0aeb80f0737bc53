//! Virtual memory management: reservations, physical memory, and what is mapped where.

use std::{
    ffi::{c_int, c_uint, c_ulonglong, c_void},
    os::fd::{BorrowedFd, IntoRawFd},
    sync::Arc,
};

use cudarc::driver::sys::{CUdeviceptr, CUmemGenericAllocationHandle, CUresult};
use rustix::mm::{MprotectFlags, ProtFlags};

use crate::{
    call::{array, get, initialized, put},
    device,
    errors::Outcome,
    memory::{self, Kind, Memory, Region, around, fresh, touched},
    object::{self, Object, pointer},
    stats::Live,
};

/// Sizes and addresses are multiples of this.
const GRANULE: usize = 2 << 20;
/// `CU_MEM_ALLOCATION_TYPE_PINNED`.
const TYPE_PINNED: c_uint = 1;
/// `CU_MEM_LOCATION_TYPE_DEVICE`.
const LOCATION_DEVICE: c_uint = 1;
/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
const HANDLE_FD: c_uint = 1;
/// `CU_MEM_HANDLE_TYPE_FABRIC`.
const HANDLE_FABRIC: c_uint = 8;
/// `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`.
const ACCESS_READ_WRITE: c_uint = 3;

/// `CUmemLocation`, with numbers where the bindings have enums: a caller may pass any.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Location {
    kind: c_uint,
    id: c_int,
}

/// `CUmemAllocationProp`, likewise.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Properties {
    kind: c_uint,
    handles: c_uint,
    location: Location,
    windows: usize,
    flags: [u8; 8],
}

/// `CUmemAccessDesc`, likewise.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Access {
    location: Location,
    flags: c_uint,
}

const _: () = {
    use cudarc::driver::sys;
    assert!(size_of::<Location>() == size_of::<sys::CUmemLocation>());
    assert!(size_of::<Properties>() == size_of::<sys::CUmemAllocationProp>());
    assert!(size_of::<Access>() == size_of::<sys::CUmemAccessDesc>());
};

/// Addresses that belong to the caller.
#[derive(Debug)]
pub(crate) struct Reservation {
    pub(crate) bytes: usize,
}

/// Memory without an address.
#[derive(Debug)]
pub(crate) struct Physical {
    pub(crate) object: Arc<Object>,
    pub(crate) imported: bool,
    exportable: bool,
    #[expect(dead_code, reason = "counts while it lives")]
    live: Live,
}

/// What `cuMemCreate` and its kin hand out. The memory lives on where it is mapped.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) physical: Arc<Physical>,
    count: u32,
}

/// Memory that has got an address.
#[derive(Debug)]
pub(crate) struct Mapped {
    pub(crate) reservation: u64,
    pub(crate) accessible: bool,
    physical: Arc<Physical>,
    handle: u64,
}

fn invalid<T>() -> Outcome<T> {
    Err(CUresult::CUDA_ERROR_INVALID_VALUE)
}

fn whole(bytes: usize) -> bool {
    bytes != 0 && bytes.is_multiple_of(GRANULE)
}

impl Location {
    fn physical(self) -> Outcome<usize> {
        if self.kind == LOCATION_DEVICE { device::physical(self.id) } else { invalid() }
    }
}

impl Properties {
    fn check(&self) -> Outcome<usize> {
        if self.kind != TYPE_PINNED || self.handles & !(HANDLE_FD | HANDLE_FABRIC) != 0 {
            return invalid();
        }
        if self.handles & HANDLE_FABRIC != 0 {
            return Err(CUresult::CUDA_ERROR_NOT_PERMITTED);
        }
        self.location.physical()
    }
}

impl Memory {
    fn handle(&mut self, handle: u64) -> Outcome<&mut Handle> {
        self.handles.get_mut(&handle).ok_or(CUresult::CUDA_ERROR_INVALID_VALUE)
    }

    /// First addresses of the mappings that make up exactly this range.
    fn mappings(&self, start: u64, bytes: usize) -> Outcome<Vec<u64>> {
        let end = start.checked_add(bytes as u64).ok_or(CUresult::CUDA_ERROR_INVALID_VALUE)?;
        let mut found = Vec::new();
        let mut next = start;
        while next < end {
            match self.regions.get(&next) {
                Some(Region { bytes, kind: Kind::Mapped(_), .. }) => {
                    found.push(next);
                    next += *bytes as u64;
                }
                _ => return invalid(),
            }
        }
        if next == end && bytes != 0 { Ok(found) } else { invalid() }
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemGetAllocationGranularity(
    to: *mut usize,
    properties: *const Properties,
    _option: c_uint,
) -> CUresult {
    initialized("cuMemGetAllocationGranularity", || {
        get(properties)?.check()?;
        put(to, GRANULE)
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemCreate(
    to: *mut CUmemGenericAllocationHandle,
    bytes: usize,
    properties: *const Properties,
    flags: c_ulonglong,
) -> CUresult {
    initialized("cuMemCreate", || {
        let properties = get(properties)?;
        let device = properties.check()?;
        if !whole(bytes) || flags != 0 || to.is_null() {
            return invalid();
        }
        let mut memory = memory::write();
        memory.check_room(device, bytes)?;
        let object = Arc::new(Object::new("vmm", device, bytes)?);
        let exportable = properties.handles & HANDLE_FD != 0;
        let physical = Physical { object, exportable, imported: false, live: Live::allocation() };
        put(to, memory.hand_out(physical))
    })
}

impl Memory {
    fn hand_out(&mut self, physical: Physical) -> u64 {
        let handle = fresh();
        self.handles.insert(handle, Handle { physical: Arc::new(physical), count: 1 });
        handle
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemRelease(handle: CUmemGenericAllocationHandle) -> CUresult {
    initialized("cuMemRelease", || {
        let mut memory = memory::write();
        let entry = memory.handle(handle)?;
        entry.count -= 1;
        if entry.count == 0 {
            memory.handles.remove(&handle);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemRetainAllocationHandle(
    to: *mut CUmemGenericAllocationHandle,
    address: *mut c_void,
) -> CUresult {
    initialized("cuMemRetainAllocationHandle", || {
        let mut memory = memory::write();
        let Some((_, Region { kind: Kind::Mapped(mapped), .. })) = memory.region(address.addr() as u64)
        else {
            return invalid();
        };
        let (handle, physical) = (mapped.handle, mapped.physical.clone());
        put(to, handle)?;
        memory.handles.entry(handle).or_insert(Handle { physical, count: 0 }).count += 1;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemGetAllocationPropertiesFromHandle(
    to: *mut Properties,
    handle: CUmemGenericAllocationHandle,
) -> CUresult {
    initialized("cuMemGetAllocationPropertiesFromHandle", || {
        let mut memory = memory::write();
        let physical = &memory.handle(handle)?.physical;
        let location = Location { kind: LOCATION_DEVICE, id: device::ordinal(physical.object.name.device) };
        let handles = if physical.exportable { HANDLE_FD } else { 0 };
        put(to, Properties { kind: TYPE_PINNED, handles, location, windows: 0, flags: [0; 8] })
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemExportToShareableHandle(
    to: *mut c_void,
    handle: CUmemGenericAllocationHandle,
    kind: c_uint,
    flags: c_ulonglong,
) -> CUresult {
    initialized("cuMemExportToShareableHandle", || {
        let mut memory = memory::write();
        let physical = &memory.handle(handle)?.physical;
        if kind != HANDLE_FD || flags != 0 || to.is_null() {
            return invalid();
        }
        if !physical.exportable {
            return Err(CUresult::CUDA_ERROR_NOT_PERMITTED);
        }
        let fd = physical.object.fd().try_clone_to_owned();
        // From here on it is the caller's to close.
        let fd: c_int = fd.map_err(|_| CUresult::CUDA_ERROR_OPERATING_SYSTEM)?.into_raw_fd();
        put(to.cast(), fd)
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemImportFromShareableHandle(
    to: *mut CUmemGenericAllocationHandle,
    shared: *mut c_void,
    kind: c_uint,
) -> CUresult {
    initialized("cuMemImportFromShareableHandle", || {
        let fd = c_int::try_from(shared.addr()).or(invalid())?;
        if kind != HANDLE_FD || to.is_null() || rustix::fs::stat(format!("/proc/self/fd/{fd}")).is_err() {
            return invalid();
        }
        // SAFETY: there is such a descriptor, and by the driver's contract it stays open during the call.
        let object = Object::adopt(unsafe { BorrowedFd::borrow_raw(fd) })?;
        if object.name.kind != "vmm" {
            return invalid();
        }
        let object = Arc::new(object);
        let physical = Physical { object, exportable: true, imported: true, live: Live::import() };
        put(to, memory::write().hand_out(physical))
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemAddressReserve(
    to: *mut CUdeviceptr,
    bytes: usize,
    alignment: usize,
    _hint: CUdeviceptr,
    flags: c_ulonglong,
) -> CUresult {
    initialized("cuMemAddressReserve", || {
        if !whole(bytes) || flags != 0 || to.is_null() || (alignment != 0 && !alignment.is_power_of_two()) {
            return invalid();
        }
        let alignment = alignment.max(GRANULE);
        let more = bytes.checked_add(alignment).ok_or(CUresult::CUDA_ERROR_OUT_OF_MEMORY)?;
        let mut memory = memory::write();
        let got = object::reserve(None, more)?;
        let base = got.next_multiple_of(alignment as u64);
        let before = (base - got) as usize;
        if before > 0 {
            object::unmap(got, before);
        }
        object::unmap(base + bytes as u64, alignment - before);
        memory.reservations.insert(base, Reservation { bytes });
        put(to, base)
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemAddressFree(base: CUdeviceptr, bytes: usize) -> CUresult {
    initialized("cuMemAddressFree", || {
        let mut memory = memory::write();
        let known = memory.reservations.get(&base).is_some_and(|reservation| reservation.bytes == bytes);
        if !known || touched(&memory.regions, base, bytes, |region| region.bytes) {
            return invalid();
        }
        memory.reservations.remove(&base);
        object::unmap(base, bytes);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemMap(
    base: CUdeviceptr,
    bytes: usize,
    offset: usize,
    handle: CUmemGenericAllocationHandle,
    flags: c_ulonglong,
) -> CUresult {
    initialized("cuMemMap", || {
        let mut memory = memory::write();
        let physical = memory.handle(handle)?.physical.clone();
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= physical.object.bytes);
        let placed = base.is_multiple_of(GRANULE as u64) && offset.is_multiple_of(GRANULE);
        if !whole(bytes) || !fits || !placed || flags != 0 {
            return invalid();
        }
        let room = around(&memory.reservations, base, |reservation| reservation.bytes);
        let Some((start, room)) = room else { return invalid() };
        let inside = base - start + bytes as u64 <= room.bytes as u64;
        if !inside || touched(&memory.regions, base, bytes, |region| region.bytes) {
            return invalid();
        }
        physical.object.map_over(base, bytes, offset, ProtFlags::empty())?;
        let object = physical.object.clone();
        let mapped = Mapped { reservation: start, accessible: false, physical, handle };
        memory.regions.insert(base, Region { bytes, object, id: fresh(), kind: Kind::Mapped(mapped) });
        Ok(())
    })
}

// Does not wait for copies that are under way: neither does the real one. Those that come later fail.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemUnmap(base: CUdeviceptr, bytes: usize) -> CUresult {
    initialized("cuMemUnmap", || {
        let mut memory = memory::write();
        let found = memory.mappings(base, bytes)?;
        object::reserve(Some(base), bytes)?;
        for start in found {
            memory.regions.remove(&start);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemSetAccess(
    base: CUdeviceptr,
    bytes: usize,
    wanted: *const Access,
    count: usize,
) -> CUresult {
    initialized("cuMemSetAccess", || {
        let wanted = array(wanted, count)?;
        let mut memory = memory::write();
        let found = memory.mappings(base, bytes)?;
        for access in wanted {
            let device = access.location.physical()?;
            // Reading alone is not told apart: nobody here asks for it.
            let accessible = match access.flags {
                0 => false,
                1 | ACCESS_READ_WRITE => true,
                _ => return invalid(),
            };
            for start in &found {
                let Some(region) = memory.regions.get_mut(start) else { continue };
                // No device of ours reaches another one's memory.
                if region.object.name.device != device {
                    return Err(CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED);
                }
                let Kind::Mapped(mapped) = &mut region.kind else { continue };
                let flags = if accessible {
                    MprotectFlags::READ | MprotectFlags::WRITE
                } else {
                    MprotectFlags::empty()
                };
                // SAFETY: the books say that this is one of our mappings.
                unsafe { rustix::mm::mprotect(pointer(*start), region.bytes, flags) }.or(invalid())?;
                mapped.accessible = accessible;
            }
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemGetAccess(
    to: *mut c_ulonglong,
    location: *const Location,
    address: CUdeviceptr,
) -> CUresult {
    initialized("cuMemGetAccess", || {
        let device = get(location)?.physical()?;
        let memory = memory::read();
        let Some((_, Region { kind: Kind::Mapped(mapped), object, .. })) = memory.region(address) else {
            return invalid();
        };
        let reachable = mapped.accessible && object.name.device == device;
        put(to, if reachable { c_ulonglong::from(ACCESS_READ_WRITE) } else { 0 })
    })
}
