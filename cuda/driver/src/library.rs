//! Loading the driver, once.

use std::{panic, sync::OnceLock};

use cudarc::driver::sys;

use crate::{CudaError, error::cuda};

/// Every symbol that this crate calls, as the driver names it. cudarc panics at the first use of one that
/// is not there: we look before.
const SYMBOLS: &[&str] = &[
    "cuCtxGetCurrent",
    "cuCtxGetStreamPriorityRange",
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetPCIBusId",
    "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGetProcAddress_v2",
    "cuInit",
    "cuIpcCloseMemHandle",
    "cuIpcGetEventHandle",
    "cuIpcGetMemHandle",
    "cuIpcOpenEventHandle",
    "cuIpcOpenMemHandle_v2",
    "cuMemAddressFree",
    "cuMemAddressReserve",
    "cuMemAlloc_v2",
    "cuMemCreate",
    "cuMemExportToShareableHandle",
    "cuMemFree_v2",
    "cuMemGetAddressRange_v2",
    "cuMemGetAllocationGranularity",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemImportFromShareableHandle",
    "cuMemMap",
    "cuMemRelease",
    "cuMemRetainAllocationHandle",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuMemcpyAsync",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoD_v2",
    "cuPointerGetAttribute",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
];

/// Loads the driver and initialises it; later calls give the first answer again.
///
/// # Errors
/// [`CudaError::Missing`] with the reason in a sentence.
pub fn init() -> Result<(), CudaError> {
    static LOADED: OnceLock<Result<(), CudaError>> = OnceLock::new();
    LOADED.get_or_init(load).clone()
}

fn load() -> Result<(), CudaError> {
    let missing = |text: String| Err(CudaError::Missing(text));
    // SAFETY: loading a library runs its initialisers; that is what users of a CUDA machine ask for.
    if !unsafe { sys::is_culib_present() } {
        return missing("the CUDA driver library (libcuda.so.1) cannot be loaded".into());
    }
    // The library can vanish between the two calls; cudarc would panic then.
    // SAFETY: as above.
    let Ok(library) = panic::catch_unwind(|| unsafe { sys::culib() }) else {
        return missing("the CUDA driver library cannot be loaded".into());
    };
    for symbol in SYMBOLS {
        // SAFETY: only looked for, not called.
        if unsafe { library.get::<unsafe extern "C" fn()>(symbol.as_bytes()) }.is_err() {
            return missing(format!(
                "the CUDA driver has no {symbol}: expected driver 525 (CUDA 12.0) or newer, update it"
            ));
        }
    }
    cuda!(cuInit(0)).or_else(|error| {
        let hint = match error.code() {
            // CUDA_ERROR_STUB_LIBRARY
            Some(34) => {
                "; this is the toolkit's stub of the library, not the driver's: put the driver's folder first"
            }
            _ => "",
        };
        missing(format!("no CUDA device can be used: {error}{hint}"))
    })
}

/// The CUDA version that the driver supports, e.g. 13000 for 13.0.
///
/// # Errors
/// Where there is no driver.
pub fn driver_version() -> Result<i32, CudaError> {
    init()?;
    let mut version = 0;
    // The pointer is to a local of the type that the driver writes.
    cuda!(cuDriverGetVersion(&raw mut version))?;
    Ok(version)
}
