//! Memory and events between processes.

mod common;

use std::{ffi::c_void, os::fd::AsRawFd, ptr::null_mut};

use common::*;
use cudarc::driver::sys::{self, CUdeviceptr, CUevent, CUresult, CUstream};

const BYTES: usize = 1 << 20;

fn open_memory(handle: &str) -> (CUresult, CUdeviceptr) {
    let (mut address, handle) = (0, sys::CUipcMemHandle { reserved: unhex(handle) });
    (cu!(cuIpcOpenMemHandle_v2(&mut address, handle, 1)), address)
}

fn open_event(handle: &str) -> (CUresult, CUevent) {
    let (mut event, handle) = (null_mut(), sys::CUipcEventHandle { reserved: unhex(handle) });
    (cu!(cuIpcOpenEventHandle(&mut event, handle)), event)
}

/// A child that exports memory and an event and does with them what it is told.
fn exporter() {
    let faults = start();
    let (memory, event, stream) = (allocate(BYTES), event(SHARED), stream());
    say(&hex(&memory_handle(memory + 100).reserved));
    say(&hex(&event_handle(event).reserved));
    loop {
        match listen().as_str() {
            "fill" => assert_eq!(cu!(cuMemsetD8_v2(memory, 7, BYTES)), OK),
            "look" => {
                say(&format!("{:?}", look(memory + 10, 4)));
                continue;
            }
            "record behind a delay" => {
                assert_eq!(cu!(cuLaunchHostFunc(stream, Some(pause), null_mut())), OK);
                assert_eq!(cu!(cuMemsetD8Async(memory, 9, BYTES, stream)), OK);
                assert_eq!(cu!(cuEventRecord(event, stream)), OK);
            }
            "record for ever" => {
                assert_eq!(cu!(cuLaunchHostFunc(stream, Some(stop), null_mut())), OK);
                assert_eq!(cu!(cuEventRecord(event, stream)), OK);
            }
            "free" => assert_eq!(cu!(cuMemFree_v2(memory)), OK),
            "own" => {
                let handle = hex(&memory_handle(memory).reserved);
                assert_eq!(open_memory(&handle).0, CUresult::CUDA_ERROR_INVALID_CONTEXT);
                let handle = hex(&event_handle(event).reserved);
                assert_eq!(open_event(&handle).0, CUresult::CUDA_ERROR_INVALID_CONTEXT);
            }
            _ => break,
        }
        say("done");
    }
    end(faults);
}

extern "C" fn pause(_: *mut c_void) {
    std::thread::sleep(std::time::Duration::from_millis(80));
}

extern "C" fn stop(_: *mut c_void) {
    loop {
        std::thread::park();
    }
}

fn tell(other: &mut Other, text: &str) {
    other.tell(text);
    assert_eq!(other.hear(), "done");
}

fn wait(stream: CUstream, event: CUevent) {
    assert_eq!(cu!(cuStreamWaitEvent(stream, event, 0)), OK);
}

#[test]
fn memory_of_another_process() {
    if role().is_some() {
        return exporter();
    }
    let faults = start();
    let mut other = Other::start("memory_of_another_process", "exporter");
    let handle = other.hear();
    other.hear();
    let (outcome, address) = open_memory(&handle);
    assert_eq!(outcome, OK);
    let (mut base, mut bytes) = (0, 0);
    // The handle is that of the whole allocation, whatever address in it was named.
    assert_eq!(cu!(cuMemGetAddressRange_v2(&mut base, &mut bytes, address)), OK);
    assert_eq!((base, bytes), (address, BYTES));
    tell(&mut other, "fill");
    assert_eq!(look(address, BYTES), vec![7; BYTES]);
    assert_eq!(cu!(cuMemcpyHtoD_v2(address + 10, void(&mut [1_u8, 2, 3, 4]), 4)), OK);
    other.tell("look");
    assert_eq!(other.hear(), "[1, 2, 3, 4]");

    // Twice is the same place; it ends with the second close.
    assert_eq!(faults.count("live_imports"), 1);
    assert_eq!(open_memory(&handle), (OK, address));
    assert_eq!(faults.count("live_imports"), 1);
    assert_eq!(cu!(cuMemFree_v2(address)), INVALID);
    let mut again = sys::CUipcMemHandle { reserved: [0; 64] };
    assert_eq!(cu!(cuIpcGetMemHandle(&mut again, address)), INVALID);
    assert_eq!(cu!(cuIpcCloseMemHandle(address)), OK);
    assert_eq!(look(address + 10, 1), [1]);
    assert_eq!(cu!(cuIpcCloseMemHandle(address)), OK);
    assert_eq!(faults.count("live_imports"), 0);
    assert_eq!(cu!(cuIpcCloseMemHandle(address)), INVALID);
    assert_eq!(cu!(cuMemcpyDtoH_v2(void(&mut [0_u8]), address, 1)), INVALID);

    tell(&mut other, "own");
    until("statistics of the exporter", || {
        let theirs = faults.statistics_of(other.pid());
        pillion_fake_cuda::testing::count(&theirs, "live_events") == 1
            && pillion_fake_cuda::testing::count(&theirs, "live_allocations") == 1
    });
    tell(&mut other, "free");
    // The descriptor is closed, and its number may be something else by now.
    assert_eq!(open_memory(&handle).0, INVALID);
    let pid = other.pid();
    assert!(other.join());
    // Written at its end.
    assert_eq!(pillion_fake_cuda::testing::count(&faults.statistics_of(pid), "cuMemFree_v2"), 1);
    end(faults);
}

#[test]
fn the_exporter_is_killed() {
    if role().is_some() {
        return exporter();
    }
    let faults = start();
    let mut other = Other::start("the_exporter_is_killed", "exporter");
    let (memory, event) = (other.hear(), other.hear());
    let (outcome, address) = open_memory(&memory);
    assert_eq!(outcome, OK);
    let (outcome, theirs) = open_event(&event);
    assert_eq!(outcome, OK);
    tell(&mut other, "fill");
    tell(&mut other, "record for ever");
    let stream = stream();
    wait(stream, theirs);
    other.kill();
    // What is open stays.
    assert_eq!(look(address, BYTES), vec![7; BYTES]);
    // What is waited for never comes.
    soon();
    assert_eq!(cu!(cuStreamQuery(stream)), NOT_READY);
    assert_eq!(cu!(cuEventQuery(theirs)), NOT_READY);
    // What is not open cannot be opened any more.
    assert_eq!(open_memory(&memory).0, INVALID);
    assert_eq!(open_event(&event).0, CUresult::CUDA_ERROR_INVALID_HANDLE);
    end(faults);
}

#[test]
fn events_of_another_process() {
    if role().is_some() {
        return exporter();
    }
    let faults = start();
    let mut other = Other::start("events_of_another_process", "exporter");
    let (memory, event) = (other.hear(), other.hear());
    let ((_, address), (outcome, theirs)) = (open_memory(&memory), open_event(&event));
    assert_eq!(outcome, OK);
    let stream = stream();
    // Never recorded: complete.
    assert_eq!(cu!(cuEventQuery(theirs)), OK);
    wait(stream, theirs);
    assert_eq!(cu!(cuStreamSynchronize(stream)), OK);

    tell(&mut other, "record behind a delay");
    assert_eq!(cu!(cuEventQuery(theirs)), NOT_READY);
    wait(stream, theirs);
    let mut seen = vec![0_u8; BYTES];
    assert_eq!(cu!(cuMemcpyDtoHAsync_v2(void(&mut seen), address, BYTES, stream)), OK);
    assert_eq!(cu!(cuStreamQuery(stream)), NOT_READY);
    assert_eq!(cu!(cuStreamSynchronize(stream)), OK);
    assert_eq!(seen, vec![9; BYTES]);
    assert_eq!(cu!(cuEventQuery(theirs)), OK);
    let mut handle = sys::CUipcEventHandle { reserved: [0; 64] };
    assert_eq!(cu!(cuIpcGetEventHandle(&mut handle, theirs)), INVALID);

    tell(&mut other, "record behind a delay");
    assert_eq!(cu!(cuEventSynchronize(theirs)), OK);
    assert_eq!(cu!(cuEventDestroy_v2(theirs)), OK);
    assert!(other.join());
    end(faults);
}

#[test]
fn a_reused_descriptor_is_not_mistaken() {
    if role().is_some() {
        let faults = start();
        let first = allocate(BYTES);
        say(&hex(&memory_handle(first).reserved));
        assert_eq!(listen(), "again");
        assert_eq!(cu!(cuMemFree_v2(first)), OK);
        let second = allocate(BYTES);
        say(&hex(&memory_handle(second).reserved));
        listen();
        return end(faults);
    }
    let faults = start();
    let mut other = Other::start("a_reused_descriptor_is_not_mistaken", "exporter");
    let first = other.hear();
    other.tell("again");
    let second = other.hear();
    // Bytes 12 to 16 are the descriptor's number: the lowest free one, so the same.
    assert_eq!(first[24..32], second[24..32]);
    assert_eq!(open_memory(&first).0, INVALID);
    assert_eq!(open_memory(&second).0, OK);
    assert!(other.join());
    end(faults);
}

fn properties(handles: u32) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: sys::CUmemAllocationHandleType_enum(handles),
        location: device_zero(),
        win32HandleMetaData: null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

fn device_zero() -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: 0 }
}

const FD: sys::CUmemAllocationHandleType = sys::CUmemAllocationHandleType_enum(1);
const GRANULE: usize = 2 << 20;

fn create(bytes: usize, handles: u32) -> u64 {
    let mut handle = 0;
    assert_eq!(cu!(cuMemCreate(&mut handle, bytes, &properties(handles), 0)), OK);
    handle
}

fn allow(address: CUdeviceptr, bytes: usize) -> CUresult {
    let access = sys::CUmemAccessDesc {
        location: device_zero(),
        flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    cu!(cuMemSetAccess(address, bytes, &access, 1))
}

fn reserve(bytes: usize) -> CUdeviceptr {
    let mut address = 0;
    assert_eq!(cu!(cuMemAddressReserve(&mut address, bytes, 0, 0, 0)), OK);
    assert!(address.is_multiple_of(GRANULE as u64));
    address
}

#[test]
fn virtual_memory_of_another_process() {
    if let Some(file) = role() {
        let faults = start();
        // A second way to the same memfd; in real life the descriptor comes over a socket.
        let file = std::fs::File::options().read(true).write(true).open(file).expect("the descriptor");
        let mut handle = 0;
        let fd = std::ptr::without_provenance_mut(file.as_raw_fd() as usize);
        assert_eq!(cu!(cuMemImportFromShareableHandle(&mut handle, fd, FD)), OK);
        drop(file);
        assert_eq!(faults.count("live_imports"), 1);
        let address = reserve(GRANULE);
        assert_eq!(cu!(cuMemMap(address, GRANULE, 0, handle, 0)), OK);
        assert_eq!(allow(address, GRANULE), OK);
        assert_eq!(cu!(cuMemRelease(handle)), OK);
        assert_eq!(look(address, 3), [5; 3]);
        assert_eq!(cu!(cuMemsetD8_v2(address, 6, GRANULE)), OK);
        assert_eq!(faults.count("live_imports"), 1);
        assert_eq!(cu!(cuMemUnmap(address, GRANULE)), OK);
        assert_eq!(faults.count("live_imports"), 0);
        assert_eq!(cu!(cuMemAddressFree(address, GRANULE)), OK);
        return end(faults);
    }
    let faults = start();
    let (handle, address) = (create(GRANULE, 1), reserve(GRANULE));
    assert_eq!(cu!(cuMemMap(address, GRANULE, 0, handle, 0)), OK);
    assert_eq!(allow(address, GRANULE), OK);
    assert_eq!(cu!(cuMemsetD8_v2(address, 5, GRANULE)), OK);
    let mut fd = -1;
    assert_eq!(cu!(cuMemExportToShareableHandle((&raw mut fd).cast(), handle, FD, 0)), OK);
    let file = format!("/proc/{}/fd/{fd}", std::process::id());
    assert!(Other::start("virtual_memory_of_another_process", &file).join());
    assert_eq!(look(address, GRANULE), vec![6; GRANULE]);
    end(faults);
}

#[test]
fn virtual_memory_rules() {
    let faults = start();
    let live = faults.count("live_allocations");
    let mut value = 0;
    let granularity = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    assert_eq!(cu!(cuMemGetAllocationGranularity(&mut value, &properties(1), granularity)), OK);
    assert_eq!(value, GRANULE);
    let mut handle = 0;
    assert_eq!(cu!(cuMemCreate(&mut handle, GRANULE + 4096, &properties(1), 0)), INVALID);
    let (private, shared, address) = (create(GRANULE, 0), create(2 * GRANULE, 1), reserve(4 * GRANULE));
    let at = |n: usize| address + (n * GRANULE) as u64;
    let mut fd = 0;
    assert_eq!(
        cu!(cuMemExportToShareableHandle((&raw mut fd).cast(), private, FD, 0)),
        CUresult::CUDA_ERROR_NOT_PERMITTED
    );

    assert_eq!(cu!(cuMemMap(address, GRANULE, 0, private, 0)), OK);
    assert_eq!(cu!(cuMemMap(at(1), 2 * GRANULE, 0, shared, 0)), OK);
    assert_eq!(cu!(cuMemMap(at(2), GRANULE, 0, private, 0)), INVALID);
    assert_eq!(cu!(cuMemMap(at(3), 2 * GRANULE, 0, shared, 0)), INVALID);
    // Mapped is not accessible yet.
    assert_eq!(cu!(cuMemsetD8_v2(address, 1, 1)), INVALID);
    assert_eq!(allow(address, GRANULE), OK);
    assert_eq!(cu!(cuMemsetD8_v2(address, 1, GRANULE)), OK);
    assert_eq!(cu!(cuMemsetD8_v2(address, 1, GRANULE + 1)), INVALID);
    assert_eq!(allow(at(1), 2 * GRANULE), OK);
    assert_eq!(allow(at(2), 2 * GRANULE), INVALID);
    // Mappings side by side are one range.
    assert_eq!(cu!(cuMemsetD8_v2(address, 1, 3 * GRANULE)), OK);
    assert_eq!(cu!(cuMemsetD8_v2(address, 1, 3 * GRANULE + 1)), INVALID);
    assert_eq!(cu!(cuMemcpyHtoD_v2(at(3), void(&mut [0_u8]), 1)), INVALID);
    let mut access = 0;
    assert_eq!(cu!(cuMemGetAccess(&mut access, &device_zero(), address)), OK);
    assert_eq!(access, 3);

    // No legacy handles for this memory, and no allocation handles for the other.
    let mut legacy = sys::CUipcMemHandle { reserved: [0; 64] };
    assert_eq!(cu!(cuIpcGetMemHandle(&mut legacy, address)), INVALID);
    let mut found = 0;
    assert_eq!(cu!(cuMemRetainAllocationHandle(&mut found, allocate(10) as *mut c_void)), INVALID);
    assert_eq!(cu!(cuMemRetainAllocationHandle(&mut found, (at(2) + 5) as *mut c_void)), OK);
    assert_eq!(found, shared);
    let mut told = properties(0);
    assert_eq!(cu!(cuMemGetAllocationPropertiesFromHandle(&mut told, found)), OK);
    assert_eq!(told, properties(1));

    // A handle lives as long as it is held, the memory as long as it is mapped.
    assert_eq!(faults.count("live_allocations"), live + 3);
    for _ in 0..2 {
        assert_eq!(cu!(cuMemRelease(shared)), OK);
    }
    assert_eq!(cu!(cuMemRelease(shared)), INVALID);
    assert_eq!(faults.count("live_allocations"), live + 3);
    assert_eq!(cu!(cuMemUnmap(at(1), GRANULE)), INVALID);
    assert_eq!(cu!(cuMemAddressFree(address, 4 * GRANULE)), INVALID);
    assert_eq!(cu!(cuMemUnmap(address, 3 * GRANULE)), OK);
    assert_eq!(faults.count("live_allocations"), live + 2);
    assert_eq!(cu!(cuMemsetD8_v2(address, 1, 1)), INVALID);

    // The handle is still good for another place.
    assert_eq!(cu!(cuMemMap(at(3), GRANULE, 0, private, 0)), OK);
    assert_eq!(allow(at(3), GRANULE), OK);
    assert_eq!(look(at(3), 2), [1, 1]);
    assert_eq!(cu!(cuMemUnmap(at(3), GRANULE)), OK);
    assert_eq!(cu!(cuMemRelease(private)), OK);
    assert_eq!(cu!(cuMemAddressFree(address, GRANULE)), INVALID);
    assert_eq!(cu!(cuMemAddressFree(address, 4 * GRANULE)), OK);
    // Access before it is allowed, from a stream.
    let (handle, address, stream) = (create(GRANULE, 1), reserve(GRANULE), stream());
    assert_eq!(cu!(cuMemMap(address, GRANULE, 0, handle, 0)), OK);
    assert_eq!(cu!(cuMemsetD8Async(address, 1, 1, stream)), OK);
    assert_eq!(cu!(cuStreamSynchronize(stream)), ILLEGAL);
    faults.revive();
    end(faults);
}
