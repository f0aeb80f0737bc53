//! Batched copies and `cuGetProcAddress`.

mod common;

use std::{
    ffi::{CStr, c_void},
    ptr::null_mut,
};

use common::*;
use cudarc::driver::sys::{
    self, CUdeviceptr, CUmemcpyAttributes, CUmemcpySrcAccessOrder, CUresult, CUstream,
};

/// `cuMemcpyBatchAsync` as of CUDA 13, which the bindings for 12.8 do not know.
type Second = unsafe extern "C" fn(
    *mut CUdeviceptr,
    *mut CUdeviceptr,
    *mut usize,
    usize,
    *mut CUmemcpyAttributes,
    *mut usize,
    usize,
    CUstream,
) -> CUresult;

const STREAM: CUmemcpySrcAccessOrder = CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
const CALL: CUmemcpySrcAccessOrder = CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_DURING_API_CALL;
const ANY: CUmemcpySrcAccessOrder = CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_ANY;

fn attributes(order: CUmemcpySrcAccessOrder) -> CUmemcpyAttributes {
    let nowhere = sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
    CUmemcpyAttributes { srcAccessOrder: order, srcLocHint: nowhere, dstLocHint: nowhere, flags: 0 }
}

fn address(name: &CStr, version: i32) -> (*mut c_void, u32) {
    let (mut found, mut status) =
        (null_mut(), sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SUCCESS);
    assert_eq!(cu!(cuGetProcAddress_v2(name.as_ptr(), &mut found, version, 0, &mut status)), OK);
    (found, status as u32)
}

struct Batch {
    to: Vec<u64>,
    from: Vec<u64>,
    sizes: Vec<usize>,
    attributes: Vec<CUmemcpyAttributes>,
    starts: Vec<usize>,
    stream: CUstream,
}

impl Batch {
    /// The older signature; with the index that it says has failed.
    fn first(&mut self) -> (CUresult, usize) {
        let mut failed = 77;
        let outcome = cu!(cuMemcpyBatchAsync(
            self.to.as_mut_ptr(),
            self.from.as_mut_ptr(),
            self.sizes.as_mut_ptr(),
            self.sizes.len(),
            self.attributes.as_mut_ptr(),
            self.starts.as_mut_ptr(),
            self.attributes.len(),
            &mut failed,
            self.stream,
        ));
        (outcome, failed)
    }

    fn second(&mut self) -> CUresult {
        let (found, status) = address(c"cuMemcpyBatchAsync", 13000);
        assert_eq!(status, 0);
        // SAFETY: this version of the function has that type.
        let function: Second = unsafe { std::mem::transmute(found) };
        // SAFETY: the arrays have the lengths that are given.
        unsafe {
            function(
                self.to.as_mut_ptr(),
                self.from.as_mut_ptr(),
                self.sizes.as_mut_ptr(),
                self.sizes.len(),
                self.attributes.as_mut_ptr(),
                self.starts.as_mut_ptr(),
                self.attributes.len(),
                self.stream,
            )
        }
    }
}

/// `count` pieces of 64 bytes from host memory into device memory, in reverse.
fn batch(count: usize) -> (Batch, CUdeviceptr, &'static mut [u8]) {
    let (device, host) = (allocate(count * 64), pinned((count * 64).next_multiple_of(4096)));
    let batch = Batch {
        to: (0..count as u64).rev().map(|at| device + at * 64).collect(),
        from: (0..count as u64).map(|at| host.as_ptr() as u64 + at * 64).collect(),
        sizes: vec![64; count],
        attributes: vec![attributes(STREAM)],
        starts: vec![0],
        stream: stream(),
    };
    (batch, device, host)
}

fn reversed(host: &[u8], count: usize) -> Vec<u8> {
    host[..count * 64].chunks(64).rev().flatten().copied().collect()
}

fn fill(host: &mut [u8], seed: usize) {
    for (at, byte) in host.iter_mut().enumerate() {
        *byte = (at / 64 + at + seed) as u8;
    }
}

#[test]
fn both_versions_copy() {
    let faults = start();
    let pageable = faults.count("pageable");
    for count in [1, 3, 5000, 8192] {
        let (mut batch, device, host) = batch(count);
        fill(host, 1);
        let copies = faults.count("copies");
        assert_eq!(batch.first(), (OK, 77));
        assert_eq!(cu!(cuStreamSynchronize(batch.stream)), OK);
        assert!(look(device, count * 64) == reversed(host, count));
        assert_eq!(faults.count("copies") - copies, count as u64);
        fill(host, 2);
        assert_eq!(batch.second(), OK);
        assert_eq!(cu!(cuStreamSynchronize(batch.stream)), OK);
        assert!(look(device, count * 64) == reversed(host, count));
        // And back.
        std::mem::swap(&mut batch.to, &mut batch.from);
        host.fill(0);
        assert_eq!(batch.second(), OK);
        assert_eq!(cu!(cuStreamSynchronize(batch.stream)), OK);
        assert!(look(device, count * 64) == reversed(host, count));
        assert!(host.iter().any(|byte| *byte != 0));
    }
    assert_eq!(faults.count("pageable"), pageable);
    end(faults);
}

#[test]
fn bad_arguments_are_refused() {
    let faults = start();
    const NONE: usize = usize::MAX;
    let refused = |change: fn(&mut Batch), index: usize| {
        let (mut batch, device, host) = batch(4);
        fill(host, 1);
        change(&mut batch);
        assert_eq!(batch.first(), (INVALID, index));
        assert_eq!(batch.second(), INVALID);
        assert_eq!(cu!(cuCtxSynchronize()), OK);
        assert_eq!(look(device, 256), vec![0; 256], "nothing is copied");
    };
    refused(|batch| batch.stream = null_mut(), NONE);
    refused(|batch| batch.stream = 1 as CUstream, NONE);
    refused(|batch| batch.sizes.clear(), NONE);
    refused(|batch| batch.attributes.clear(), NONE);
    refused(|batch| batch.starts[0] = 1, NONE);
    refused(|batch| batch.attributes = vec![attributes(STREAM); 5], NONE);
    refused(
        |batch| {
            batch.attributes = vec![attributes(STREAM); 2];
            batch.starts = vec![0, 0];
        },
        NONE,
    );
    refused(
        |batch| {
            batch.attributes = vec![attributes(STREAM); 2];
            batch.starts = vec![0, 4];
        },
        NONE,
    );
    let invalid = CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_INVALID;
    assert_eq!(invalid as u32, 0);
    refused(
        |batch| {
            batch.attributes[0].srcAccessOrder = CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_INVALID
        },
        NONE,
    );
    refused(|batch| batch.sizes[2] = 0, 2);
    refused(|batch| batch.sizes[3] = 1 << 20, 3);
    refused(|batch| batch.to[1] += 250, 1);
    end(faults);
}

#[test]
fn only_stream_order_waits_for_the_source() {
    let faults = start();
    for (order, seen) in [(STREAM, 2), (CALL, 1), (ANY, 1)] {
        let (mut batch, device, host) = batch(2);
        host.fill(1);
        batch.attributes = vec![attributes(STREAM), attributes(order)];
        batch.starts = vec![0, 1];
        faults.set("copy hang");
        assert_eq!(batch.second(), OK);
        host.fill(2);
        faults.clear();
        assert_eq!(cu!(cuStreamSynchronize(batch.stream)), OK);
        assert_eq!(look(device + 64, 1), [2]);
        assert_eq!(look(device, 1), [seen], "{order:?}");
    }
    end(faults);
}

#[test]
fn too_many_copies_crash() {
    if role().is_some() {
        let faults = start();
        let (mut batch, ..) = batch(8193);
        batch.second();
        return end(faults);
    }
    let _faults = start();
    assert!(!Other::start("too_many_copies_crash", "crash").join());
    assert_eq!(cu!(cuDevicePrimaryCtxRelease_v2(0)), OK);
}

#[test]
fn functions_by_name_and_version() {
    let faults = start();
    let (second, first) = (faults.symbol(c"cuMemcpyBatchAsync_v2"), faults.symbol(c"cuMemcpyBatchAsync"));
    let name = c"cuMemcpyBatchAsync";
    assert_eq!(address(name, 13000), (second, 0));
    assert_eq!(address(name, 12080), (first, 0));
    assert_eq!(address(name, 12090), (first, 0));
    assert_eq!(address(name, 12040), (null_mut(), 2));
    assert_eq!(address(c"cuMemAlloc", 12080), (faults.symbol(c"cuMemAlloc_v2"), 0));
    assert_eq!(address(c"cuMemAlloc_v2", 12080), (null_mut(), 1));
    assert_eq!(address(c"cuNothing", 12080), (null_mut(), 1));

    faults.set("driver 12080");
    let mut version = 0;
    assert_eq!(cu!(cuDriverGetVersion(&mut version)), OK);
    assert_eq!(version, 12080);
    assert_eq!(address(name, 13000), (first, 0), "an old driver gives what it has");
    faults.set("driver 12040");
    assert_eq!(address(name, 13000), (null_mut(), 1));
    faults.set("cuMemcpyBatchAsync_v2 missing");
    assert_eq!(address(name, 13000), (null_mut(), 1));
    assert_eq!(address(name, 12080), (first, 0));
    end(faults);
}
