//! Legacy IPC of memory, and the handles that events share with it.

use std::{
    ffi::{c_char, c_uint},
    os::fd::AsRawFd,
    sync::Arc,
};

use cudarc::driver::sys::{CUdeviceptr, CUipcMemHandle, CUresult};

use crate::{
    call::{current, put},
    errors::Outcome,
    memory::{self, Kind, Memory},
    object::{Name, Object},
    stats::Live,
    stream,
};

/// What the 64 bytes of a handle say: where another process finds an [`Object`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Handle {
    pid: u32,
    fd: i32,
    name: Name,
    /// As the exporter asked for them.
    bytes: usize,
}

/// Starts every handle; its last letter is the version of what follows.
const MAGIC: &[u8; 5] = b"pfc-1";

impl Handle {
    pub(crate) fn of(object: &Object, bytes: usize) -> Self {
        let (pid, fd) = (std::process::id(), object.fd().as_raw_fd());
        Self { pid, fd, name: object.name.clone(), bytes }
    }

    pub(crate) fn encode(&self) -> [c_char; 64] {
        let mut bytes = [0; 64];
        bytes[..5].copy_from_slice(MAGIC);
        bytes[5..8].copy_from_slice(&self.name.kind.as_bytes()[..3]);
        bytes[8..12].copy_from_slice(&self.pid.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.fd.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.name.nonce.to_le_bytes());
        bytes[24..32].copy_from_slice(&(self.bytes as u64).to_le_bytes());
        bytes[32..40].copy_from_slice(&(self.name.device as u64).to_le_bytes());
        bytes.map(|byte| byte as c_char)
    }

    /// None: not a handle of this kind.
    pub(crate) fn decode(handle: &[c_char; 64], kind: &str) -> Option<Self> {
        let bytes = handle.map(|byte| byte as u8);
        if &bytes[..5] != MAGIC || &bytes[5..8] != kind.as_bytes() {
            return None;
        }
        let long = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let device = usize::try_from(long(32)?).ok()?;
        Some(Self {
            pid: u32::from_le_bytes(bytes[8..12].try_into().ok()?),
            fd: i32::from_le_bytes(bytes[12..16].try_into().ok()?),
            name: Name { kind: kind.to_owned(), device, nonce: long(16)? },
            bytes: usize::try_from(long(24)?).ok()?,
        })
    }

    /// The object, if its process is still there and still has it. A process cannot open its own.
    pub(crate) fn open(&self, gone: CUresult) -> Outcome<Object> {
        if self.pid == std::process::id() {
            return Err(CUresult::CUDA_ERROR_INVALID_CONTEXT);
        }
        Object::open(self.pid, self.fd, &self.name).ok_or(gone)
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuIpcGetMemHandle(to: *mut CUipcMemHandle, address: CUdeviceptr) -> CUresult {
    current("cuIpcGetMemHandle", |_| {
        let memory = memory::read();
        let region = memory.region(address).map(|(_, region)| region);
        let region = region.filter(|region| matches!(region.kind, Kind::Allocated(_)));
        let region = region.ok_or(CUresult::CUDA_ERROR_INVALID_VALUE)?;
        put(to, CUipcMemHandle { reserved: Handle::of(&region.object, region.bytes).encode() })
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuIpcOpenMemHandle_v2(
    to: *mut CUdeviceptr,
    handle: CUipcMemHandle,
    flags: c_uint,
) -> CUresult {
    current("cuIpcOpenMemHandle_v2", |context| {
        // CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS is the only flag there is.
        if to.is_null() || flags & !1 != 0 {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        let handle = Handle::decode(&handle.reserved, "mem").ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?;
        let object = handle.open(CUresult::CUDA_ERROR_INVALID_VALUE)?;
        if object.name.device != context.device() {
            return Err(CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED);
        }
        if handle.bytes > object.bytes {
            return Err(CUresult::CUDA_ERROR_INVALID_HANDLE);
        }
        let mut memory = memory::write();
        let open = memory.regions.iter_mut().find(|(_, region)| region.object.name == object.name);
        if let Some((base, region)) = open
            && let Kind::Imported(count, _) = &mut region.kind
        {
            *count += 1;
            return put(to, *base);
        }
        let base = memory.enter(Arc::new(object), handle.bytes, Kind::Imported(1, Live::import()))?;
        put(to, base)
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuIpcCloseMemHandle(base: CUdeviceptr) -> CUresult {
    current("cuIpcCloseMemHandle", |context| {
        let imported = |memory: &Memory| {
            memory.regions.get(&base).is_some_and(|region| matches!(region.kind, Kind::Imported(..)))
        };
        if !imported(&memory::read()) {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        // As on the real device, this waits for all that is under way.
        stream::synchronize_all(context);
        let mut memory = memory::write();
        if let Some(region) = memory.regions.get_mut(&base)
            && let Kind::Imported(count, _) = &mut region.kind
        {
            *count -= 1;
            if *count == 0 {
                memory.leave(base);
            }
        }
        context.failure()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_round_trip() {
        let name = Name { kind: "mem".into(), device: 3, nonce: u64::MAX - 5 };
        let handle = Handle { pid: 77, fd: 12, name, bytes: 1 << 33 };
        assert_eq!(Handle::decode(&handle.encode(), "mem"), Some(handle));
    }

    #[test]
    fn foreign_handles_are_refused() {
        let name = Name { kind: "evt".into(), device: 0, nonce: 1 };
        let handle = Handle { pid: 1, fd: 1, name, bytes: 1 }.encode();
        assert_eq!(Handle::decode(&handle, "mem"), None);
        assert_eq!(Handle::decode(&[0; 64], "mem"), None);
    }
}
