//! Many copies in one call.

use std::ffi::{CStr, c_void};

use cudarc::driver::sys::{
    CUdeviceptr, CUdriverProcAddressQueryResult, CUmemLocation, CUmemLocationType, CUmemcpyAttributes,
    CUmemcpySrcAccessOrder, CUresult, CUstream,
};

use crate::{
    CudaError, Stream, driver_version,
    error::{check, cuda},
};

/// Copies in one call of the driver. More than 50,000 crashed driver 580.159.04 (vllm#49276), and AMD's
/// at 8,192: far below either, and no slower.
const PIECES_MAX: usize = 4096;
const NAME: &CStr = c"cuMemcpyBatchAsync";
/// `CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE`: copy engines, please; a hint.
const PREFER_OVERLAP: u32 = 1;

type Batch12 = unsafe extern "C" fn(
    *mut CUdeviceptr,
    *mut CUdeviceptr,
    *mut usize,
    usize,
    *mut CUmemcpyAttributes,
    *mut usize,
    usize,
    *mut usize,
    CUstream,
) -> CUresult;
type Batch13 = unsafe extern "C" fn(
    *mut CUdeviceptr,
    *mut CUdeviceptr,
    *mut usize,
    usize,
    *mut CUmemcpyAttributes,
    *mut usize,
    usize,
    CUstream,
) -> CUresult;

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the device to the host.
    Out,
    /// From the host to the device.
    In,
}

/// One contiguous copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Device address.
    pub device: u64,
    /// Host address.
    pub host: u64,
    /// Bytes.
    pub bytes: u64,
}

/// How this driver takes many copies at once. The function's signature changed between CUDA 12.8 and 13.0
/// under the same name: it is asked for by version.
#[derive(Debug, Clone, Copy)]
pub enum BatchApi {
    /// `cuMemcpyBatchAsync` of CUDA 13.0.
    V13(#[doc(hidden)] Opaque13),
    /// The same of CUDA 12.8, with an index of the failed copy.
    V12(#[doc(hidden)] Opaque12),
    /// One call per copy: older drivers, or switched off.
    Single,
}

/// Keeps the function types out of the interface.
#[derive(Debug, Clone, Copy)]
pub struct Opaque12(Batch12);
/// Keeps the function types out of the interface.
#[derive(Debug, Clone, Copy)]
pub struct Opaque13(Batch13);

impl BatchApi {
    /// The best that this driver has.
    ///
    /// # Errors
    /// Where there is no driver.
    pub fn of_driver() -> Result<Self, CudaError> {
        let version = driver_version()?;
        if version >= 13_000
            && let Some(function) = find(13_000)
        {
            // SAFETY: the driver gives the function of the version that was asked for; this is its type there.
            return Ok(Self::V13(Opaque13(unsafe { std::mem::transmute::<*mut c_void, Batch13>(function) })));
        }
        if version >= 12_080
            && let Some(function) = find(12_080)
        {
            // SAFETY: as above.
            return Ok(Self::V12(Opaque12(unsafe { std::mem::transmute::<*mut c_void, Batch12>(function) })));
        }
        Ok(Self::Single)
    }

    /// For logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::V13(_) => "batch (13.0)",
            Self::V12(_) => "batch (12.8)",
            Self::Single => "single",
        }
    }

    /// Queues copies on a stream, in no particular order among themselves.
    ///
    /// # Errors
    /// What the driver says; some of the pieces may be queued then.
    ///
    /// # Safety
    /// Every piece lies inside memory of the device that this process may use, and inside host memory that
    /// stays mapped until the copies have ended; both sides are nobody else's meanwhile, but for readers of
    /// the source.
    pub unsafe fn copy(
        self,
        stream: &Stream,
        direction: Direction,
        pieces: &[Piece],
    ) -> Result<(), CudaError> {
        if matches!(self, Self::Single) {
            for piece in pieces {
                let (to, from) = ends(direction, piece);
                // The caller vouches for the ranges. With unified addressing the driver tells the sides apart.
                cuda!(cuMemcpyAsync(to, from, piece.bytes as usize, stream.raw()))?;
            }
            return Ok(());
        }
        for part in pieces.chunks(PIECES_MAX) {
            let (mut to, mut from): (Vec<_>, Vec<_>) =
                part.iter().map(|piece| ends(direction, piece)).unzip();
            let mut sizes: Vec<usize> = part.iter().map(|piece| piece.bytes as usize).collect();
            let mut attributes = attributes(direction);
            let (mut first, mut failed) = (0usize, usize::MAX);
            let (to, from, sizes, count) =
                (to.as_mut_ptr(), from.as_mut_ptr(), sizes.as_mut_ptr(), part.len());
            let (attributes, first) = (&raw mut attributes, &raw mut first);
            // SAFETY: the arrays live until the call returns, which reads them before; the caller vouches for
            // the ranges.
            let result = unsafe {
                match self {
                    Self::V13(Opaque13(batch)) => {
                        batch(to, from, sizes, count, attributes, first, 1, stream.raw())
                    }
                    Self::V12(Opaque12(batch)) => {
                        batch(to, from, sizes, count, attributes, first, 1, &raw mut failed, stream.raw())
                    }
                    Self::Single => CUresult::CUDA_SUCCESS,
                }
            };
            check("cuMemcpyBatchAsync", result)?;
        }
        Ok(())
    }
}

fn ends(direction: Direction, piece: &Piece) -> (CUdeviceptr, CUdeviceptr) {
    match direction {
        Direction::Out => (piece.host, piece.device),
        Direction::In => (piece.device, piece.host),
    }
}

fn attributes(direction: Direction) -> CUmemcpyAttributes {
    // The driver ignores hints for pinned memory.
    let nowhere = CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
    let order = match direction {
        // The engine's forward pass writes the source in stream order.
        Direction::Out => CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
        // A published record does not change.
        Direction::In => CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_ANY,
    };
    CUmemcpyAttributes {
        srcAccessOrder: order,
        srcLocHint: nowhere,
        dstLocHint: nowhere,
        flags: PREFER_OVERLAP,
    }
}

fn find(version: i32) -> Option<*mut c_void> {
    let mut function = std::ptr::null_mut();
    let mut status = CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SUCCESS;
    // The name is zero-terminated; both results are locals.
    cuda!(cuGetProcAddress_v2(NAME.as_ptr(), &raw mut function, version, 0, &raw mut status)).ok()?;
    let found = status == CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SUCCESS && !function.is_null();
    found.then_some(function)
}
