//! Batched copies, with the signature of CUDA 12.8 and with that of 13.0.

use std::{
    ffi::c_uint,
    hash::{BuildHasher, Hasher, RandomState},
};

use cudarc::driver::sys::{CUdeviceptr, CUresult, CUstream};

use crate::{
    call::{array, current, put_optional},
    context::Context,
    copy::{Copy, Source},
    errors::Outcome,
    faults,
    stream::{self, Work},
};

/// Where the real driver starts to crash.
const COUNT_MAX: usize = 8192;
/// `CU_STREAM_LEGACY`; like the null stream not allowed here.
const LEGACY: usize = 1;
/// `CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`, `_DURING_API_CALL` and `_ANY`.
const ORDER_STREAM: c_uint = 1;
const ORDER_ANY: c_uint = 3;
/// The driver versions that brought the two signatures.
pub(crate) const VERSION_FIRST: i32 = 12080;
pub(crate) const VERSION_SECOND: i32 = 13000;

/// `CUmemcpyAttributes`, with numbers where the bindings have enums: a caller may pass any.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attributes {
    order: c_uint,
    hints: [c_uint; 4],
    flags: c_uint,
}

const _: () = assert!(size_of::<Attributes>() == size_of::<cudarc::driver::sys::CUmemcpyAttributes>());

/// The arrays of a call.
struct Batch {
    to: *const CUdeviceptr,
    from: *const CUdeviceptr,
    sizes: *const usize,
    count: usize,
    attributes: *const Attributes,
    starts: *const usize,
    attribute_count: usize,
}

/// Why a call is refused, and the copy that is at fault.
type Refusal = (CUresult, usize);

fn invalid<T>(index: usize) -> Result<T, Refusal> {
    Err((CUresult::CUDA_ERROR_INVALID_VALUE, index))
}

impl Batch {
    fn submit(self, context: &'static Context, stream: CUstream) -> Result<(), Refusal> {
        // Stands for "none of them".
        const NONE: usize = usize::MAX;
        let whole = |code| (code, NONE);
        if self.count == 0 || stream.addr() <= LEGACY {
            return invalid(NONE);
        }
        if self.count > COUNT_MAX {
            eprintln!(
                "pillion-fake-cuda: expected at most {COUNT_MAX} copies in a batch, got {}; the real driver \
                 crashes here, and so do we",
                self.count
            );
            std::process::abort();
        }
        let stream = stream::find(context, stream).map_err(whole)?;
        let orders = self.orders().map_err(whole)?;
        let to = array(self.to, self.count).map_err(whole)?;
        let from = array(self.from, self.count).map_err(whole)?;
        let sizes = array(self.sizes, self.count).map_err(whole)?;
        let mut copies = Vec::with_capacity(self.count);
        for index in 0..self.count {
            let (to, from, bytes) = (to[index], Source::Address(from[index]), sizes[index]);
            let mut copy = Copy { to, from, bytes, to_device: false, from_device: false };
            if bytes == 0 || copy.check().is_err() {
                return invalid(index);
            }
            // Anything but stream order allows the device to read the source at once. So that is what it
            // does: who depends on what the stream does before must not ask for it.
            if orders[index] != ORDER_STREAM {
                copy.take().map_err(|code| (code, index))?;
            }
            copies.push(copy);
        }
        shuffle(&mut copies);
        stream.push(Work::Copy(copies)).map_err(whole)
    }

    /// The source order of every copy.
    fn orders(&self) -> Outcome<Vec<c_uint>> {
        let bad = Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        if self.attribute_count == 0 || self.attribute_count > self.count {
            return bad;
        }
        let attributes = array(self.attributes, self.attribute_count)?;
        let starts = array(self.starts, self.attribute_count)?;
        let rising = starts.windows(2).all(|pair| pair[0] < pair[1]);
        if starts[0] != 0 || !rising || starts[starts.len() - 1] >= self.count {
            return bad;
        }
        let mut orders = Vec::with_capacity(self.count);
        for (index, attribute) in attributes.iter().enumerate() {
            if !(ORDER_STREAM..=ORDER_ANY).contains(&attribute.order) || attribute.flags > 1 {
                return bad;
            }
            let end = starts.get(index + 1).copied().unwrap_or(self.count);
            orders.resize(end, attribute.order);
        }
        Ok(orders)
    }
}

/// The order inside a batch is undefined: nobody shall get used to one.
fn shuffle<T>(items: &mut [T]) {
    let mut state = RandomState::new().build_hasher().finish() | 1;
    for index in (1..items.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        items.swap(index, (state % (index as u64 + 1)) as usize);
    }
}

/// A driver that is said to be older does not know the function.
fn check_version(version: i32) -> Outcome {
    if faults::rules().driver < version {
        return Err(CUresult::CUDA_ERROR_NOT_SUPPORTED);
    }
    Ok(())
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemcpyBatchAsync(
    to: *mut CUdeviceptr,
    from: *mut CUdeviceptr,
    sizes: *mut usize,
    count: usize,
    attributes: *mut Attributes,
    starts: *mut usize,
    attribute_count: usize,
    failed: *mut usize,
    stream: CUstream,
) -> CUresult {
    current("cuMemcpyBatchAsync", |context| {
        check_version(VERSION_FIRST)?;
        let batch = Batch { to, from, sizes, count, attributes, starts, attribute_count };
        batch.submit(context, stream).map_err(|(code, index)| {
            put_optional(failed, index);
            code
        })
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemcpyBatchAsync_v2(
    to: *mut CUdeviceptr,
    from: *mut CUdeviceptr,
    sizes: *mut usize,
    count: usize,
    attributes: *mut Attributes,
    starts: *mut usize,
    attribute_count: usize,
    stream: CUstream,
) -> CUresult {
    current("cuMemcpyBatchAsync_v2", |context| {
        check_version(VERSION_SECOND)?;
        let batch = Batch { to, from, sizes, count, attributes, starts, attribute_count };
        batch.submit(context, stream).map_err(|(code, _)| code)
    })
}
