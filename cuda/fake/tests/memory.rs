//! Memory, copies, host registration, pointers, devices.

mod common;

use std::ptr::null_mut;

use common::*;
use cudarc::driver::sys::{self, CUpointer_attribute, CUresult};

const BYTES: usize = 3 << 20;

fn pattern(seed: u8) -> Vec<u8> {
    (0..BYTES).map(|at| (at as u8).wrapping_mul(7).wrapping_add((at >> 12) as u8) ^ seed).collect()
}

#[test]
fn copies_round_trip() {
    let faults = start();
    let pageable = faults.count("pageable");
    let (device, second, stream) = (allocate(BYTES), allocate(BYTES), stream());
    let (from, to) = (pinned(BYTES), pinned(BYTES));

    from.copy_from_slice(&pattern(1));
    assert_eq!(cu!(cuMemcpyHtoD_v2(device, void(from), BYTES)), OK);
    assert_eq!(cu!(cuMemcpyDtoD_v2(second, device, BYTES)), OK);
    assert_eq!(cu!(cuMemcpyDtoH_v2(void(to), second, BYTES)), OK);
    assert!(to == pattern(1));
    assert!(look(device, BYTES) == pattern(1));

    from.copy_from_slice(&pattern(2));
    assert_eq!(cu!(cuMemcpyHtoDAsync_v2(device, void(from), BYTES, stream)), OK);
    assert_eq!(cu!(cuMemcpyDtoDAsync_v2(second, device, BYTES, stream)), OK);
    assert_eq!(cu!(cuMemcpyDtoHAsync_v2(void(to), second, BYTES, stream)), OK);
    assert_eq!(cu!(cuStreamSynchronize(stream)), OK);
    assert!(to == pattern(2));

    from.copy_from_slice(&pattern(3));
    assert_eq!(cu!(cuMemcpyAsync(device, from.as_ptr() as u64, BYTES, stream)), OK);
    assert_eq!(cu!(cuMemcpyAsync(to.as_mut_ptr() as u64, device, BYTES, stream)), OK);
    assert_eq!(cu!(cuCtxSynchronize()), OK);
    assert!(to == pattern(3));

    assert_eq!(cu!(cuMemsetD8_v2(device + 5, 0xab, 10)), OK);
    assert_eq!(look(device + 4, 12)[..], [&pattern(3)[4..5], &[0xab; 10], &pattern(3)[15..16]].concat());
    assert_eq!(faults.count("pageable"), pageable);
    end(faults);
}

#[test]
fn pageable_copies_are_counted() {
    let faults = start();
    let (device, stream) = (allocate(BYTES), stream());
    let (mut plain, known) = (pattern(4), pinned(BYTES));
    let (copies, bytes, pageable) = (faults.count("copies"), faults.count("bytes"), faults.count("pageable"));
    assert_eq!(cu!(cuMemcpyHtoDAsync_v2(device, void(&mut plain), BYTES, stream)), OK);
    assert_eq!(cu!(cuMemcpyDtoHAsync_v2(void(known), device, BYTES, stream)), OK);
    assert_eq!(cu!(cuStreamSynchronize(stream)), OK);
    assert!(known == plain);
    assert_eq!(faults.count("copies") - copies, 2);
    assert_eq!(faults.count("bytes") - bytes, 2 * BYTES as u64);
    assert_eq!(faults.count("pageable") - pageable, 1);
    end(faults);
}

#[test]
fn synchronous_copies_stay_inside() {
    let faults = start();
    let (device, host) = (allocate(5000), pages(8192));
    assert_eq!(cu!(cuMemcpyHtoD_v2(device, void(host), 5000)), OK);
    assert_eq!(cu!(cuMemcpyHtoD_v2(device + 1, void(host), 5000)), INVALID);
    assert_eq!(cu!(cuMemcpyDtoH_v2(void(host), device - 1, 2)), INVALID);
    assert_eq!(cu!(cuMemcpyDtoD_v2(device, host.as_ptr() as u64, 1)), INVALID);
    assert_eq!(cu!(cuMemsetD8_v2(device, 0, 5001)), INVALID);
    assert_eq!(cu!(cuMemFree_v2(device + 1)), INVALID);
    assert_eq!(cu!(cuMemFree_v2(device)), OK);
    assert_eq!(cu!(cuMemFree_v2(device)), INVALID);
    assert_eq!(cu!(cuMemcpyHtoD_v2(device, void(host), 1)), INVALID);
    assert_eq!(cu!(cuMemcpyDtoH_v2(null_mut(), device, 1)), INVALID);
    end(faults);
}

#[test]
fn asynchronous_copies_outside_are_sticky() {
    let faults = start();
    let (device, host, stream) = (allocate(4096), pages(8192), stream());
    assert_eq!(cu!(cuMemcpyHtoDAsync_v2(device, void(host), 4097, stream)), OK);
    assert_eq!(cu!(cuStreamSynchronize(stream)), ILLEGAL);
    let (mut address, mut free, mut event) = (0, 0, null_mut());
    assert_eq!(cu!(cuMemAlloc_v2(&mut address, 1)), ILLEGAL);
    assert_eq!(cu!(cuMemGetInfo_v2(&mut free, &mut 0)), ILLEGAL);
    assert_eq!(cu!(cuEventCreate(&mut event, PLAIN)), ILLEGAL);
    assert_eq!(cu!(cuStreamQuery(stream)), ILLEGAL);
    assert_eq!(cu!(cuCtxSynchronize()), ILLEGAL);
    assert_eq!(cu!(cuMemFree_v2(device)), ILLEGAL);
    // What needs no context goes on.
    assert_eq!(cu!(cuDeviceGetCount(&mut 0)), OK);
    faults.revive();
    // Running over the end hits nothing else, even where the call does not say which side is the device.
    assert_eq!(cu!(cuMemcpyAsync(device + 8192, device, 1, stream)), OK);
    assert_eq!(cu!(cuStreamSynchronize(stream)), ILLEGAL);
    faults.revive();
    // So is host memory that is not there: no crash.
    assert_eq!(cu!(cuMemcpyHtoDAsync_v2(device, 4096 as *const _, 10, stream)), OK);
    assert_eq!(cu!(cuStreamSynchronize(stream)), ILLEGAL);
    faults.revive();
    end(faults);
}

#[test]
fn ranges_and_attributes() {
    let faults = start();
    let device = allocate(10_000);
    let (mut base, mut bytes) = (0, 0);
    assert_eq!(cu!(cuMemGetAddressRange_v2(&mut base, &mut bytes, device + 9_999)), OK);
    assert_eq!((base, bytes), (device, 10_000));
    assert_eq!(
        cu!(cuMemGetAddressRange_v2(&mut base, &mut bytes, device + 10_000)),
        CUresult::CUDA_ERROR_NOT_FOUND
    );
    let attribute = |attribute, address| {
        let mut value = 0_u64;
        let outcome = cu!(cuPointerGetAttribute((&raw mut value).cast(), attribute, address));
        (outcome, value)
    };
    let mut context = null_mut();
    assert_eq!(cu!(cuCtxGetCurrent(&mut context)), OK);
    let inside = device + 77;
    type A = CUpointer_attribute;
    assert_eq!(attribute(A::CU_POINTER_ATTRIBUTE_CONTEXT, inside), (OK, context as u64));
    assert_eq!(attribute(A::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, inside), (OK, 2));
    assert_eq!(attribute(A::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, inside), (OK, 0));
    assert_eq!(attribute(A::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, inside), (OK, 1));
    assert_eq!(attribute(A::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, inside), (OK, device));
    assert_eq!(attribute(A::CU_POINTER_ATTRIBUTE_RANGE_SIZE, inside), (OK, 10_000));
    assert_eq!(attribute(A::CU_POINTER_ATTRIBUTE_DEVICE_POINTER, inside), (OK, inside));
    let (_, id) = attribute(A::CU_POINTER_ATTRIBUTE_BUFFER_ID, inside);
    assert_ne!(attribute(A::CU_POINTER_ATTRIBUTE_BUFFER_ID, allocate(1)), (OK, id));
    let host = pages(4096).as_ptr() as u64;
    assert_eq!(attribute(A::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, host).0, INVALID);
    let host = pinned(4096).as_ptr() as u64;
    assert_eq!(attribute(A::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, host), (OK, 1));

    let (mut free, mut total) = (0, 0);
    assert_eq!(cu!(cuMemGetInfo_v2(&mut free, &mut total)), OK);
    assert!(free < total);
    assert_eq!(cu!(cuMemAlloc_v2(&mut base, free + 1)), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    end(faults);
}

#[test]
fn host_registration() {
    let faults = start();
    let host = pages(4 * 4096);
    let start = void(host);
    let page = |n: usize| start.wrapping_byte_add(n * 4096);
    let live = faults.count("live_registrations");
    assert_eq!(cu!(cuMemHostRegister_v2(page(1).wrapping_byte_add(1), 4096, 0)), INVALID);
    assert_eq!(cu!(cuMemHostRegister_v2(page(1), 100, 0)), INVALID);
    assert_eq!(cu!(cuMemHostRegister_v2(page(1), 0, 0)), INVALID);
    assert_eq!(cu!(cuMemHostRegister_v2(4096 as *mut _, 4096, 0)), INVALID);
    assert_eq!(cu!(cuMemHostRegister_v2(page(1), 2 * 4096, 1)), OK);
    assert_eq!(faults.count("live_registrations"), live + 1);
    let twice = CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    assert_eq!(cu!(cuMemHostRegister_v2(page(2), 4096, 0)), twice);
    assert_eq!(cu!(cuMemHostRegister_v2(start, 4 * 4096, 0)), twice);
    let mut address = 0;
    assert_eq!(cu!(cuMemHostGetDevicePointer_v2(&mut address, page(2), 0)), OK);
    assert_eq!(address, page(2) as u64);
    assert_eq!(cu!(cuMemHostGetDevicePointer_v2(&mut address, page(3), 0)), INVALID);
    // With one end in and one out, the driver does not know what to do with it.
    let device = allocate(4 * 4096);
    assert_eq!(cu!(cuMemcpyHtoD_v2(device, start, 2 * 4096)), INVALID);
    assert_eq!(cu!(cuMemcpyHtoD_v2(device, page(2), 2 * 4096)), INVALID);
    assert_eq!(cu!(cuMemcpyHtoD_v2(device, page(1), 2 * 4096)), OK);
    let unknown = CUresult::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    assert_eq!(cu!(cuMemHostUnregister(page(2))), unknown);
    assert_eq!(cu!(cuMemHostUnregister(page(1))), OK);
    assert_eq!(cu!(cuMemHostUnregister(page(1))), unknown);

    let mut own = null_mut();
    assert_eq!(cu!(cuMemAllocHost_v2(&mut own, 5000)), OK);
    let pageable = faults.count("pageable");
    assert_eq!(cu!(cuMemcpyHtoD_v2(device, own, 5000)), OK);
    assert_eq!(faults.count("pageable"), pageable);
    assert_eq!(cu!(cuMemHostUnregister(own)), unknown);
    assert_eq!(cu!(cuMemFreeHost(own)), OK);
    assert_eq!(cu!(cuMemFreeHost(own)), INVALID);
    assert_eq!(faults.count("live_registrations"), live);
    end(faults);
}

#[test]
fn devices() {
    let faults = start();
    faults.set("devices 3");
    let (mut count, mut device, mut value) = (0, 0, 0);
    assert_eq!(cu!(cuDeviceGetCount(&mut count)), OK);
    assert_eq!(count, 3);
    assert_eq!(cu!(cuDeviceGet(&mut device, 3)), CUresult::CUDA_ERROR_INVALID_DEVICE);
    assert_eq!(cu!(cuDeviceGet(&mut device, 2)), OK);
    let mut text = [0; 64];
    let read = |text: &[std::ffi::c_char]| {
        text.iter().take_while(|byte| **byte != 0).map(|byte| *byte as u8 as char).collect::<String>()
    };
    assert_eq!(cu!(cuDeviceGetName(text.as_mut_ptr(), 64, device)), OK);
    assert_eq!(read(&text), "Pillion fake device 2");
    assert_eq!(cu!(cuDeviceGetPCIBusId(text.as_mut_ptr(), 64, device)), OK);
    assert_eq!(read(&text), "0000:E2:1E.0");
    let mut uuids = [sys::CUuuid { bytes: [0; 16] }; 2];
    assert_eq!(cu!(cuDeviceGetUuid_v2(&mut uuids[0], 1)), OK);
    assert_eq!(cu!(cuDeviceGetUuid(&mut uuids[1], 2)), OK);
    assert_ne!(uuids[0], uuids[1]);
    type A = sys::CUdevice_attribute;
    for (attribute, expected) in [
        (A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9),
        (A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132),
        (A::CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 3),
        (A::CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, -1),
        (A::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 1),
        (A::CU_DEVICE_ATTRIBUTE_INTEGRATED, 0),
    ] {
        assert_eq!(cu!(cuDeviceGetAttribute(&mut value, attribute, device)), OK);
        assert_eq!(value, expected, "{attribute:?}");
    }
    // Memory and streams of one device are not those of another.
    let (other, mut second) = (allocate(100), null_mut());
    assert_eq!(cu!(cuDevicePrimaryCtxRetain(&mut second, 2)), OK);
    assert_eq!(cu!(cuCtxPushCurrent_v2(second)), OK);
    assert_eq!(cu!(cuCtxGetDevice(&mut device)), OK);
    assert_eq!(device, 2);
    let first = {
        let event = event(PLAIN);
        assert_eq!(cu!(cuCtxPopCurrent_v2(&mut second)), OK);
        let outcome = cu!(cuEventRecord(event, stream()));
        assert_eq!(cu!(cuCtxGetDevice(&mut device)), OK);
        (outcome, device)
    };
    assert_eq!(first, (CUresult::CUDA_ERROR_INVALID_HANDLE, 0));
    assert_eq!(cu!(cuDevicePrimaryCtxRelease_v2(2)), OK);
    assert_eq!(cu!(cuMemFree_v2(other)), OK);
    end(faults);
}

#[test]
fn context_rules() {
    let faults = start();
    let (device, mut address) = (allocate(10), 0);
    let live = faults.count("live_allocations");
    assert_eq!(live, 1);
    assert_eq!(cu!(cuCtxSetCurrent(null_mut())), OK);
    assert_eq!(cu!(cuMemAlloc_v2(&mut address, 1)), CUresult::CUDA_ERROR_INVALID_CONTEXT);
    assert_eq!(cu!(cuCtxSetCurrent(8 as *mut _)), CUresult::CUDA_ERROR_INVALID_CONTEXT);
    let mut context = null_mut();
    assert_eq!(cu!(cuDevicePrimaryCtxRetain(&mut context, 0)), OK);
    assert_eq!(cu!(cuDevicePrimaryCtxRelease_v2(0)), OK);
    assert_eq!(cu!(cuCtxSetCurrent(context)), OK);
    // Other threads have contexts of their own.
    std::thread::scope(|scope| {
        let other = scope.spawn(|| cu!(cuCtxSynchronize()));
        assert_eq!(other.join().expect("no panic"), CUresult::CUDA_ERROR_INVALID_CONTEXT);
    });
    let stream = stream();
    // The last release ends all that is in the context.
    assert_eq!(cu!(cuDevicePrimaryCtxRelease_v2(0)), OK);
    assert_eq!(cu!(cuDevicePrimaryCtxRelease_v2(0)), CUresult::CUDA_ERROR_INVALID_CONTEXT);
    assert_eq!(cu!(cuMemFree_v2(device)), CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED);
    assert_eq!(faults.count("live_allocations"), 0);
    assert_eq!(cu!(cuDevicePrimaryCtxRetain(&mut context, 0)), OK);
    assert_eq!(cu!(cuMemFree_v2(device)), INVALID);
    assert_eq!(cu!(cuStreamQuery(stream)), CUresult::CUDA_ERROR_INVALID_HANDLE);
    end(faults);
}

#[test]
fn error_texts() {
    let faults = start();
    let mut text = std::ptr::null();
    let read = |text| {
        // SAFETY: the driver gave a text.
        unsafe { std::ffi::CStr::from_ptr(text) }.to_str().expect("text").to_owned()
    };
    assert_eq!(cu!(cuGetErrorName(ILLEGAL, &mut text)), OK);
    assert_eq!(read(text), "CUDA_ERROR_ILLEGAL_ADDRESS");
    assert_eq!(cu!(cuGetErrorString(ILLEGAL, &mut text)), OK);
    assert_eq!(read(text), "an illegal memory access was encountered");
    end(faults);
}

#[test]
fn without_the_variable_there_is_no_device() {
    if role().is_some() {
        // In this process the fake is the first libcuda.so too, but it is not turned on.
        let file = std::ffi::CString::new(
            pillion_fake_cuda::testing::library().into_os_string().into_encoded_bytes(),
        );
        // SAFETY: loads the library under test.
        let library =
            unsafe { libc::dlopen(file.expect("a path").as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        assert!(!library.is_null());
        assert_eq!(cu!(cuDeviceGetCount(&mut 0)), CUresult::CUDA_ERROR_NOT_INITIALIZED);
        assert_eq!(cu!(cuInit(0)), CUresult::CUDA_ERROR_NO_DEVICE);
        assert_eq!(cu!(cuDeviceGetCount(&mut 0)), CUresult::CUDA_ERROR_NOT_INITIALIZED);
        return;
    }
    let child = Other::with("without_the_variable_there_is_no_device", "bare", |command| {
        command.env_remove("PILLION_FAKE_CUDA");
    });
    assert!(child.join());
}

#[test]
fn links_on_the_library_path() {
    if role().is_some() {
        // Nobody has loaded anything here: the bindings find the links.
        assert_eq!(cu!(cuInit(0)), OK);
        let mut count = 0;
        assert_eq!(cu!(cuDeviceGetCount(&mut count)), OK);
        assert_eq!(count, 2);
        return;
    }
    let faults = start();
    let folder = faults.folder().join("links");
    std::fs::create_dir(&folder).expect("a folder");
    pillion_fake_cuda::testing::links(&folder).expect("links");
    pillion_fake_cuda::testing::links(&folder).expect("links a second time");
    assert!(folder.join("libcuda.so.1").exists());
    faults.set("devices 2");
    let child = Other::with("links_on_the_library_path", "linked", |command| {
        command.env("LD_LIBRARY_PATH", &folder);
    });
    assert!(child.join());
    end(faults);
}

#[test]
fn a_forked_child_has_no_driver() {
    let faults = start();
    let device = allocate(10);
    // SAFETY: the child only calls what needs no lock, and leaves without cleaning up.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let wanted = CUresult::CUDA_ERROR_NOT_INITIALIZED;
        let right = cu!(cuInit(0)) == wanted && cu!(cuMemFree_v2(device)) == wanted;
        // SAFETY: as above.
        unsafe { libc::_exit(i32::from(!right)) };
    }
    let mut status = 0;
    // SAFETY: a child of ours, a place for its status.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0);
    end(faults);
}
