//! `cuGetProcAddress`: functions by name and version.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void},
    sync::LazyLock,
};

use cudarc::driver::sys::CUresult;

use crate::{
    batch, call, context, copy, device, errors, event, faults, host, ipc, memory, pointer, stream, vmm,
};

/// `CU_GET_PROC_ADDRESS_SUCCESS` and the two ways to fail.
const FOUND: c_uint = 0;
const NOT_FOUND: c_uint = 1;
const TOO_OLD: c_uint = 2;

/// One exported function.
#[derive(Debug)]
pub(crate) struct Symbol {
    name: &'static str,
    /// The CUDA version that brought it; 0: older than all that we meet.
    version: i32,
    address: usize,
}

macro_rules! symbols {
    ($($module:ident: $($name:ident)*;)*) => {
        vec![$($(Symbol {
            name: stringify!($name),
            version: 0,
            address: ($module::$name as *const c_void).expose_provenance(),
        }),*),*]
    };
}

/// By name, the newest of each first.
static SYMBOLS: LazyLock<Vec<Symbol>> = LazyLock::new(|| {
    let mut symbols: Vec<Symbol> = symbols! {
        batch: cuMemcpyBatchAsync_v2 cuMemcpyBatchAsync;
        context: cuInit cuDevicePrimaryCtxRetain cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxGetState
            cuCtxSetCurrent cuCtxGetCurrent cuCtxPushCurrent_v2 cuCtxPopCurrent_v2 cuCtxGetDevice
            cuCtxSynchronize cuCtxGetStreamPriorityRange;
        copy: cuMemcpy cuMemcpyHtoD_v2 cuMemcpyDtoH_v2 cuMemcpyDtoD_v2 cuMemcpyAsync cuMemcpyHtoDAsync_v2
            cuMemcpyDtoHAsync_v2 cuMemcpyDtoDAsync_v2;
        device: cuDriverGetVersion cuDeviceGetCount cuDeviceGet cuDeviceGetName cuDeviceGetUuid_v2
            cuDeviceGetUuid cuDeviceGetAttribute cuDeviceGetPCIBusId cuDeviceTotalMem_v2;
        errors: cuGetErrorName cuGetErrorString;
        event: cuEventCreate cuEventDestroy_v2 cuEventRecord cuEventQuery cuEventSynchronize
            cuEventElapsedTime_v2 cuEventElapsedTime cuIpcGetEventHandle cuIpcOpenEventHandle
            cuStreamWaitEvent;
        host: cuMemHostRegister_v2 cuMemHostUnregister cuMemHostGetDevicePointer_v2 cuMemAllocHost_v2
            cuMemHostAlloc cuMemFreeHost;
        ipc: cuIpcGetMemHandle cuIpcOpenMemHandle_v2 cuIpcCloseMemHandle;
        memory: cuMemAlloc_v2 cuMemFree_v2 cuMemGetAddressRange_v2 cuMemGetInfo_v2 cuMemsetD8_v2
            cuMemsetD8Async;
        pointer: cuPointerGetAttribute;
        stream: cuStreamCreate cuStreamCreateWithPriority cuStreamDestroy_v2 cuStreamSynchronize
            cuStreamQuery cuStreamGetPriority cuStreamGetFlags cuStreamGetCtx cuLaunchHostFunc;
        vmm: cuMemGetAllocationGranularity cuMemCreate cuMemRelease cuMemRetainAllocationHandle
            cuMemGetAllocationPropertiesFromHandle cuMemExportToShareableHandle
            cuMemImportFromShareableHandle cuMemAddressReserve cuMemAddressFree cuMemMap cuMemUnmap
            cuMemSetAccess cuMemGetAccess;
    };
    let own = cuGetProcAddress_v2 as *const c_void;
    symbols.push(Symbol { name: "cuGetProcAddress_v2", version: 0, address: own.expose_provenance() });
    for symbol in &mut symbols {
        symbol.version = match symbol.name {
            "cuMemcpyBatchAsync" => batch::VERSION_FIRST,
            "cuMemcpyBatchAsync_v2" => batch::VERSION_SECOND,
            "cuEventElapsedTime_v2" => 12080,
            _ => 0,
        };
    }
    symbols
});

impl Symbol {
    /// As callers name it: the version says which one they mean.
    fn stem(&self) -> &'static str {
        self.name.strip_suffix("_v2").unwrap_or(self.name)
    }
}

/// The function that is exported by this name.
pub(crate) fn find(name: &str) -> Option<&'static Symbol> {
    SYMBOLS.iter().find(|symbol| symbol.name == name)
}

/// As in the driver, `version` is the version that the caller was written for: a newer one than the driver's
/// finds the newest that the driver has, be its signature another one.
fn choose(stem: &str, version: c_int, driver: i32) -> Result<&'static Symbol, c_uint> {
    let mut versions =
        SYMBOLS.iter().filter(|symbol| symbol.stem() == stem && symbol.version <= driver).peekable();
    if versions.peek().is_none() {
        return Err(NOT_FOUND);
    }
    versions.find(|symbol| symbol.version <= version).ok_or(TOO_OLD)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuGetProcAddress_v2(
    symbol: *const c_char,
    to: *mut *mut c_void,
    version: c_int,
    _flags: c_ulonglong,
    status: *mut c_uint,
) -> CUresult {
    call::always("cuGetProcAddress_v2", || {
        if symbol.is_null() {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        // SAFETY: not null, and by the driver's contract a text with a final zero.
        let stem = unsafe { CStr::from_ptr(symbol) }.to_str().unwrap_or_default();
        let found = choose(stem, version, faults::rules().driver)
            .and_then(|symbol| if faults::missing(symbol.name) { Err(NOT_FOUND) } else { Ok(symbol) });
        call::put_optional(status, found.as_ref().map_or_else(|status| *status, |_| FOUND));
        let address = found.map_or(0, |symbol| symbol.address);
        call::put(to, std::ptr::with_exposed_provenance_mut(address))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(stem: &str, version: c_int, driver: i32) -> Result<&'static str, c_uint> {
        choose(stem, version, driver).map(|symbol| symbol.name)
    }

    #[test]
    fn versions() {
        assert_eq!(chosen("cuMemcpyBatchAsync", 13000, 13000), Ok("cuMemcpyBatchAsync_v2"));
        assert_eq!(chosen("cuMemcpyBatchAsync", 12080, 13000), Ok("cuMemcpyBatchAsync"));
        assert_eq!(chosen("cuMemcpyBatchAsync", 12000, 13000), Err(TOO_OLD));
        assert_eq!(chosen("cuMemcpyBatchAsync", 13000, 12080), Ok("cuMemcpyBatchAsync"));
        assert_eq!(chosen("cuMemcpyBatchAsync", 13000, 12040), Err(NOT_FOUND));
        assert_eq!(chosen("cuMemAlloc", 12000, 12080), Ok("cuMemAlloc_v2"));
        assert_eq!(chosen("cuMemAllocate", 12000, 12080), Err(NOT_FOUND));
    }
}
