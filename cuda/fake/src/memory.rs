//! The books about memory, and device memory from `cuMemAlloc`.
//!
//! One lock covers everything. Whoever touches memory holds it shared for as long as that takes, so that
//! nothing is unmapped under a copy.

use std::{
    collections::BTreeMap,
    ffi::c_uchar,
    sync::{
        Arc, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use cudarc::driver::sys::{CUdeviceptr, CUresult, CUstream};

use crate::{
    call::{current, put, put_optional},
    context::Context,
    copy::{self, Fill},
    device::MEMORY_BYTES,
    errors::Outcome,
    host::Pinned,
    object::{self, Object},
    stats::Live,
    stream::{self, Work},
    vmm::{Handle, Mapped, Reservation},
};

/// Device memory at some addresses.
#[derive(Debug)]
pub(crate) struct Region {
    /// As asked for; the mapping ends with the page.
    pub(crate) bytes: usize,
    pub(crate) object: Arc<Object>,
    /// What `CU_POINTER_ATTRIBUTE_BUFFER_ID` says: never the same twice.
    pub(crate) id: u64,
    pub(crate) kind: Kind,
}

/// Where device memory comes from.
#[derive(Debug)]
pub(crate) enum Kind {
    /// `cuMemAlloc`.
    Allocated(#[expect(dead_code, reason = "counts while it lives")] Live),
    /// `cuIpcOpenMemHandle`, so many times.
    Imported(u32, #[expect(dead_code, reason = "counts while it lives")] Live),
    /// `cuMemMap`.
    Mapped(Mapped),
}

/// What lies at a range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// Live device memory of this physical device.
    Device(usize),
    /// Registered host memory.
    Pinned,
    /// Other host memory, or nothing at all.
    Pageable,
}

/// All that this process knows about memory, by first address or handle.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) regions: BTreeMap<u64, Region>,
    pub(crate) pinned: BTreeMap<u64, Pinned>,
    pub(crate) reservations: BTreeMap<u64, Reservation>,
    pub(crate) handles: BTreeMap<u64, Handle>,
}

static MEMORY: RwLock<Memory> = RwLock::new(Memory {
    regions: BTreeMap::new(),
    pinned: BTreeMap::new(),
    reservations: BTreeMap::new(),
    handles: BTreeMap::new(),
});

/// For looking and for touching memory.
pub(crate) fn read() -> RwLockReadGuard<'static, Memory> {
    MEMORY.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// For changing what there is.
pub(crate) fn write() -> RwLockWriteGuard<'static, Memory> {
    MEMORY.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A number that was never used before.
pub(crate) fn fresh() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Relaxed)
}

/// The entry that holds `address`.
pub(crate) fn around<T>(
    entries: &BTreeMap<u64, T>,
    address: u64,
    bytes: impl Fn(&T) -> usize,
) -> Option<(u64, &T)> {
    let (base, entry) = entries.range(..=address).next_back()?;
    (address - base < bytes(entry) as u64).then_some((*base, entry))
}

/// Whether an entry lies in `bytes` from `address` on, if only in part.
pub(crate) fn touched<T>(
    entries: &BTreeMap<u64, T>,
    address: u64,
    length: usize,
    bytes: impl Fn(&T) -> usize,
) -> bool {
    let end = address.saturating_add(length as u64);
    around(entries, address, bytes).is_some() || entries.range(address..end).next().is_some()
}

impl Memory {
    /// The device memory that holds `address`.
    pub(crate) fn region(&self, address: u64) -> Option<(u64, &Region)> {
        around(&self.regions, address, |region| region.bytes)
    }

    /// Whether `bytes` from `address` on are device memory that may be touched, and of which device.
    pub(crate) fn device(&self, address: u64, bytes: usize) -> Outcome<usize> {
        let bad = CUresult::CUDA_ERROR_INVALID_VALUE;
        let end = address.checked_add(bytes as u64).ok_or(bad)?;
        let (mut base, mut region) = self.region(address).ok_or(bad)?;
        let device = region.object.name.device;
        loop {
            if !region.accessible() {
                return Err(bad);
            }
            base += region.bytes as u64;
            if end <= base {
                return Ok(device);
            }
            // Only mappings that lie side by side in one reservation make one range.
            let Kind::Mapped(first) = &region.kind else { return Err(bad) };
            let next = self.regions.get(&base).ok_or(bad)?;
            match &next.kind {
                Kind::Mapped(second) if second.reservation == first.reservation => region = next,
                _ => return Err(bad),
            }
        }
    }

    /// What lies at a range. Fails where it is partly something and partly not.
    pub(crate) fn side(&self, address: u64, bytes: usize) -> Outcome<Side> {
        if self.region(address).is_some() {
            return self.device(address, bytes).map(Side::Device);
        }
        if let Some((base, pinned)) = around(&self.pinned, address, |pinned| pinned.bytes) {
            let inside = address - base + bytes as u64 <= pinned.bytes as u64;
            return if inside { Ok(Side::Pinned) } else { Err(CUresult::CUDA_ERROR_INVALID_VALUE) };
        }
        let partly = touched(&self.pinned, address, bytes, |pinned| pinned.bytes)
            || touched(&self.regions, address, bytes, Region::extent)
            || touched(&self.reservations, address, bytes, |reservation| reservation.bytes);
        if partly { Err(CUresult::CUDA_ERROR_INVALID_VALUE) } else { Ok(Side::Pageable) }
    }

    /// Bytes of a device that this process has allocated.
    fn used(&self, device: usize) -> usize {
        let allocated = self.regions.values().filter(|region| matches!(region.kind, Kind::Allocated(_)));
        let created = self.handles.values().filter(|handle| !handle.physical.imported);
        allocated
            .map(|region| &region.object)
            .chain(created.map(|handle| &handle.physical.object))
            .filter(|object| object.name.device == device)
            .map(|object| object.bytes)
            .sum()
    }

    /// Fails if a device has no `bytes` left.
    pub(crate) fn check_room(&self, device: usize, bytes: usize) -> Outcome {
        if bytes > MEMORY_BYTES.saturating_sub(self.used(device)) {
            return Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        }
        Ok(())
    }

    /// Maps all of an object and enters it.
    pub(crate) fn enter(&mut self, object: Arc<Object>, bytes: usize, kind: Kind) -> Outcome<u64> {
        let base = object.map()?;
        self.regions.insert(base, Region { bytes, object, id: fresh(), kind });
        Ok(base)
    }

    /// Takes a region that is a mapping of its own out of the books and out of the address space.
    pub(crate) fn leave(&mut self, base: u64) {
        if let Some(region) = self.regions.remove(&base) {
            region.object.unmap(base);
        }
    }
}

impl Region {
    /// As far as its last page goes: what was not asked for is nobody else's either.
    fn extent(&self) -> usize {
        if let Kind::Mapped(_) = self.kind { self.bytes } else { self.object.bytes }
    }

    /// `cuMemMap` maps, but only `cuMemSetAccess` lets anybody in.
    fn accessible(&self) -> bool {
        !matches!(&self.kind, Kind::Mapped(mapped) if !mapped.accessible)
    }
}

/// The context ends, and with it all that was allocated in it. What was made with the functions for virtual
/// memory belongs to the process and stays.
pub(crate) fn release_all(context: &Context) {
    let mut memory = write();
    let of_context = |region: &Region| {
        region.object.name.device == context.device() && !matches!(region.kind, Kind::Mapped(_))
    };
    let regions: Vec<u64> =
        memory.regions.iter().filter(|(_, region)| of_context(region)).map(|(base, _)| *base).collect();
    regions.into_iter().for_each(|base| memory.leave(base));
    let of_context = |pinned: &Pinned| pinned.device == context.device();
    let pinned: Vec<u64> =
        memory.pinned.iter().filter(|(_, pinned)| of_context(pinned)).map(|(base, _)| *base).collect();
    for base in pinned {
        if let Some(Pinned { allocated: true, bytes, .. }) = memory.pinned.remove(&base) {
            object::unmap(base, bytes);
        }
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemAlloc_v2(to: *mut CUdeviceptr, bytes: usize) -> CUresult {
    current("cuMemAlloc_v2", |context| {
        if bytes == 0 || to.is_null() {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        let mut memory = write();
        memory.check_room(context.device(), bytes)?;
        let object = Arc::new(Object::new("mem", context.device(), bytes)?);
        put(to, memory.enter(object, bytes, Kind::Allocated(Live::allocation()))?)
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemFree_v2(address: CUdeviceptr) -> CUresult {
    current("cuMemFree_v2", |context| {
        let allocated = |memory: &Memory| {
            memory.regions.get(&address).is_some_and(|region| matches!(region.kind, Kind::Allocated(_)))
        };
        if !allocated(&read()) {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        // As on the real device, this waits for all that is under way.
        stream::synchronize_all(context);
        write().leave(address);
        context.failure()
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemGetAddressRange_v2(
    base: *mut CUdeviceptr,
    bytes: *mut usize,
    address: CUdeviceptr,
) -> CUresult {
    current("cuMemGetAddressRange_v2", |_| {
        let memory = read();
        let (start, region) = memory.region(address).ok_or(CUresult::CUDA_ERROR_NOT_FOUND)?;
        put_optional(base, start);
        put_optional(bytes, region.bytes);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> CUresult {
    current("cuMemGetInfo_v2", |context| {
        put(free, MEMORY_BYTES.saturating_sub(read().used(context.device())))?;
        put(total, MEMORY_BYTES)
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemsetD8_v2(address: CUdeviceptr, byte: c_uchar, bytes: usize) -> CUresult {
    current("cuMemsetD8_v2", |context| {
        read().device(address, bytes)?;
        copy::now(context, Work::Fill(Fill { address, byte, bytes }))
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemsetD8Async(
    address: CUdeviceptr,
    byte: c_uchar,
    bytes: usize,
    stream: CUstream,
) -> CUresult {
    current("cuMemsetD8Async", |context| {
        stream::find(context, stream)?.push(Work::Fill(Fill { address, byte, bytes }))
    })
}
