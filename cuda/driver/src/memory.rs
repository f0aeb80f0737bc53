//! Device memory across processes, and host memory that the device can reach.

use std::{
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::Arc,
};

use cudarc::driver::sys::{
    self, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags, CUmemAllocationHandleType,
    CUmemAllocationProp, CUmemAllocationType, CUmemLocation, CUmemLocationType, CUresult,
};

use crate::{Context, CudaError, error::check, error::cuda};

/// Bytes of a legacy IPC handle.
pub const IPC_HANDLE_BYTES: usize = 64;
const POSIX_FD: CUmemAllocationHandleType =
    CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// How another process gets at an allocation.
#[derive(Debug)]
pub enum ExportedHandle {
    /// For memory of `cuMemAlloc` (torch's allocator by default, TensorRT-LLM's first pools).
    Ipc([u8; IPC_HANDLE_BYTES]),
    /// For memory of `cuMemCreate` (sleep mode's allocators, and ours).
    Vmm(OwnedFd),
}

/// A range of device memory for another process: the handle names a whole allocation.
#[derive(Debug)]
pub struct Exported {
    /// Of the allocation.
    pub handle: ExportedHandle,
    /// Where the range begins in the allocation.
    pub offset: u64,
    /// Bytes of the allocation.
    pub allocation_bytes: u64,
}

/// Makes `address .. address + bytes` reachable for another process. The context of the memory must be current.
///
/// # Errors
/// Where the range is no single allocation, or its allocator did not make it exportable.
pub fn export(address: u64, bytes: u64) -> Result<Exported, CudaError> {
    let (mut base, mut size) = (0, 0);
    // Results are locals of the driver's types.
    cuda!(cuMemGetAddressRange_v2(&raw mut base, &raw mut size, address))?;
    let offset = address - base;
    let allocation_bytes = size as u64;
    if offset.checked_add(bytes).is_none_or(|end| end > allocation_bytes) {
        return Err(CudaError::Unfit(format!(
            "expected {bytes} bytes in one allocation of device memory, came one of {allocation_bytes} that begins \
             {offset} bytes before: an allocator with expandable segments, most likely; switch those off"
        )));
    }
    let mut handle = sys::CUipcMemHandle { reserved: [0; IPC_HANDLE_BYTES] };
    let legacy = cuda!(cuIpcGetMemHandle(&raw mut handle, base));
    let handle = match legacy {
        Ok(()) => ExportedHandle::Ipc(handle.reserved.map(|byte| byte as u8)),
        Err(legacy) => match export_vmm(base) {
            Ok(fd) => ExportedHandle::Vmm(fd),
            Err(vmm) => {
                let text = format!("device memory cannot be shared: {legacy}; and as a VMM handle: {vmm}");
                return Err(CudaError::Unfit(text));
            }
        },
    };
    Ok(Exported { handle, offset, allocation_bytes })
}

fn export_vmm(base: u64) -> Result<OwnedFd, CudaError> {
    let mut handle = 0;
    cuda!(cuMemRetainAllocationHandle(&raw mut handle, base as *mut core::ffi::c_void))?;
    let mut fd = -1i32;
    // For this type the driver writes an int.
    let exported = cuda!(cuMemExportToShareableHandle((&raw mut fd).cast(), handle, POSIX_FD, 0));
    let released = cuda!(cuMemRelease(handle));
    exported?;
    // SAFETY: the driver made the descriptor for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // A child of the engine (a sidecar that it starts) must not keep the memory alive.
    // SAFETY: the descriptor is ours and open.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    released.map(|()| fd)
}

/// Another process's memory, mapped here. Closing it may hang where the driver does: drop it on a thread that
/// may be given up.
#[derive(Debug)]
pub struct Imported {
    base: u64,
    bytes: u64,
    way: Way,
    // Closing needs the context.
    context: Arc<Context>,
}

#[derive(Debug)]
enum Way {
    Ipc,
    Vmm { handle: u64 },
}

impl Imported {
    /// Opens a legacy IPC handle of an allocation of `bytes`. The context must be current. May wait for the driver.
    ///
    /// # Errors
    /// What the driver says: the exporter is gone, is this very process, or may not be reached from here; or the
    /// allocation has another size.
    pub fn open_ipc(
        context: &Arc<Context>,
        handle: &[u8; IPC_HANDLE_BYTES],
        bytes: u64,
    ) -> Result<Self, CudaError> {
        let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as core::ffi::c_char) };
        let lazily = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut base = 0;
        cuda!(cuIpcOpenMemHandle_v2(&raw mut base, handle, lazily))?;
        let imported = Self { base, bytes, way: Way::Ipc, context: Arc::clone(context) };
        // What a driver says of imported memory is not documented: a refusal to say is no reason, too small is.
        let (mut start, mut size) = (0, 0);
        let said = cuda!(cuMemGetAddressRange_v2(&raw mut start, &raw mut size, base));
        if said.is_ok() && (start > base || base + bytes > start + size as u64) {
            return Err(CudaError::Unfit(format!(
                "expected an allocation of {bytes} bytes at {base:#x} behind the handle, came {size} at {start:#x}"
            )));
        }
        Ok(imported)
    }

    /// Maps a VMM allocation of `bytes` that came as a file descriptor. The context must be current.
    ///
    /// # Errors
    /// What the driver says.
    pub fn open_vmm(context: &Arc<Context>, fd: &OwnedFd, bytes: u64) -> Result<Self, CudaError> {
        let mut handle = 0;
        // For this type the driver takes the descriptor's number in place of a pointer.
        let number = fd.as_raw_fd() as usize as *mut core::ffi::c_void;
        cuda!(cuMemImportFromShareableHandle(&raw mut handle, number, POSIX_FD))?;
        let size = bytes as usize;
        let base = map(handle, size)?;
        // From here on dropping undoes it.
        let imported = Self { base, bytes, way: Way::Vmm { handle }, context: Arc::clone(context) };
        allow(base, size, context.device().ordinal)?;
        Ok(imported)
    }

    /// The device address of the allocation here.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Bytes of the allocation.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How it is reached, for logs and metrics.
    pub fn way(&self) -> &'static str {
        match self.way {
            Way::Ipc => "cuda_ipc",
            Way::Vmm { .. } => "cuda_vmm",
        }
    }
}

impl Drop for Imported {
    fn drop(&mut self) {
        // Nothing can be done where the driver refuses: the mapping ends with the process.
        let _ = self.context.enter();
        match self.way {
            Way::Ipc => drop(cuda!(cuIpcCloseMemHandle(self.base))),
            Way::Vmm { handle } => unmap(self.base, self.bytes as usize, handle),
        }
    }
}

/// Maps a VMM allocation at an address of its own. Where that fails, the handle is given back.
fn map(handle: u64, size: usize) -> Result<u64, CudaError> {
    let mut base = 0;
    if let Err(error) = cuda!(cuMemAddressReserve(&raw mut base, size, 0, 0, 0)) {
        let _ = cuda!(cuMemRelease(handle));
        return Err(error);
    }
    if let Err(error) = cuda!(cuMemMap(base, size, 0, handle, 0)) {
        let _ = cuda!(cuMemAddressFree(base, size));
        let _ = cuda!(cuMemRelease(handle));
        return Err(error);
    }
    Ok(base)
}

/// Undoes [`map`].
fn unmap(base: u64, size: usize, handle: u64) {
    let _ = cuda!(cuMemUnmap(base, size));
    let _ = cuda!(cuMemAddressFree(base, size));
    let _ = cuda!(cuMemRelease(handle));
}

fn allow(base: u64, size: usize, ordinal: i32) -> Result<(), CudaError> {
    let access = CUmemAccessDesc {
        location: on(ordinal),
        flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    cuda!(cuMemSetAccess(base, size, &raw const access, 1))
}

fn on(ordinal: i32) -> CUmemLocation {
    CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: ordinal }
}

/// Device memory of our own that other processes can map.
#[derive(Debug)]
pub struct Allocation {
    base: u64,
    bytes: u64,
    handle: Option<u64>,
    context: Arc<Context>,
}

impl Allocation {
    /// Memory that [`export`] gives out by a legacy IPC handle. The context must be current.
    ///
    /// # Errors
    /// What the driver says.
    pub fn ipc(context: &Arc<Context>, bytes: u64) -> Result<Self, CudaError> {
        let mut base = 0;
        cuda!(cuMemAlloc_v2(&raw mut base, bytes as usize))?;
        Ok(Self { base, bytes, handle: None, context: Arc::clone(context) })
    }

    /// Memory that [`export`] gives out as a file descriptor, rounded up to the driver's granularity, and where the
    /// device can, fit for GPUDirect RDMA. The context must be current.
    ///
    /// # Errors
    /// What the driver says.
    pub fn vmm(context: &Arc<Context>, bytes: u64) -> Result<Self, CudaError> {
        // SAFETY: a plain C struct of integers and a null pointer.
        let mut wanted: CUmemAllocationProp = unsafe { std::mem::zeroed() };
        wanted.type_ = CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        wanted.requestedHandleTypes = POSIX_FD;
        wanted.location = on(context.device().ordinal);
        wanted.allocFlags.gpuDirectRDMACapable = u8::from(rdma(context.device().ordinal));
        let mut grain = 0;
        let least = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        cuda!(cuMemGetAllocationGranularity(&raw mut grain, &raw const wanted, least))?;
        let size = (bytes as usize).next_multiple_of(grain.max(1));
        let mut handle = 0;
        cuda!(cuMemCreate(&raw mut handle, size, &raw const wanted, 0))?;
        let base = map(handle, size)?;
        let made = Self { base, bytes: size as u64, handle: Some(handle), context: Arc::clone(context) };
        allow(base, size, context.device().ordinal)?;
        Ok(made)
    }

    /// Device address.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let _ = self.context.enter();
        match self.handle {
            None => drop(cuda!(cuMemFree_v2(self.base))),
            Some(handle) => unmap(self.base, self.bytes as usize, handle),
        }
    }
}

fn rdma(ordinal: i32) -> bool {
    let mut can = 0;
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED;
    cuda!(cuDeviceGetAttribute(&raw mut can, attribute, ordinal)).is_ok() && can == 1
}

/// Copies device memory into `to` and waits for it. For a few bytes at start; the context must be current.
///
/// # Errors
/// What the driver says.
pub fn read(device: u64, to: &mut [u8]) -> Result<(), CudaError> {
    // The slice is as long as we say; the driver checks its side.
    cuda!(cuMemcpyDtoH_v2(to.as_mut_ptr().cast(), device, to.len()))
}

/// Host memory that the device may reach by DMA: as few registrations as the driver takes, each of which costs it a
/// lock and page tables.
#[derive(Debug)]
pub struct HostRegistration {
    parts: Vec<u64>,
    context: Arc<Context>,
}

impl HostRegistration {
    /// Pins `bytes` at `address`, in parts of at most `part` bytes: drivers refuse very large ones. No copy may reach
    /// over the border of two parts. Takes about 40 ms a GiB where the pages are there already, much longer where
    /// they are not. The context must be current.
    ///
    /// # Errors
    /// What the driver says; nothing is pinned then.
    ///
    /// # Safety
    /// The memory must stay mapped while this lives.
    pub unsafe fn new(
        context: &Arc<Context>,
        address: *mut u8,
        bytes: u64,
        part: u64,
    ) -> Result<Self, CudaError> {
        // For every context of this process; no device pointer of another value is wanted.
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE;
        let mut registered = Self { parts: Vec::new(), context: Arc::clone(context) };
        for from in (0..bytes).step_by(part.max(1) as usize) {
            let (at, length) = (address.wrapping_add(from as usize), part.min(bytes - from));
            // SAFETY: the caller vouches for the range.
            let result = unsafe { sys::cuMemHostRegister_v2(at.cast(), length as usize, flags) };
            // Where it fails, dropping undoes those before.
            check("cuMemHostRegister", result)?;
            registered.parts.push(at as u64);
        }
        Ok(registered)
    }
}

impl Drop for HostRegistration {
    fn drop(&mut self) {
        let _ = self.context.enter();
        for part in &self.parts {
            // SAFETY: registered in `new`, which is the only constructor.
            let _: CUresult = unsafe { sys::cuMemHostUnregister(*part as *mut core::ffi::c_void) };
        }
    }
}
