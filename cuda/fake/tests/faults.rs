//! Every kind of fault.

mod common;

use std::time::{Duration, Instant};

use common::*;
use cudarc::driver::sys::CUresult;

fn timed<T>(body: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    (body(), start.elapsed())
}

fn count() -> CUresult {
    cu!(cuDeviceGetCount(&mut 0))
}

#[test]
fn errors_of_functions() {
    let faults = start();
    faults.set("cuMemAlloc_v2 error 2 after 1 times 2 # after the first\n");
    let mut address = 0;
    let outcomes: Vec<u32> = (0..4).map(|_| cu!(cuMemAlloc_v2(&mut address, 8)) as u32).collect();
    assert_eq!(outcomes, [0, 2, 2, 0]);
    assert_eq!(faults.count("live_allocations"), 2);
    // Such an error is not sticky.
    faults.set("cuStreamSynchronize error 719");
    let stream = stream();
    assert_eq!(cu!(cuStreamSynchronize(stream)), CUresult::CUDA_ERROR_LAUNCH_FAILED);
    faults.clear();
    assert_eq!(cu!(cuStreamSynchronize(stream)), OK);
    end(faults);
}

#[test]
fn delays_and_hangs_of_functions() {
    let faults = start();
    faults.set("cuDeviceGetCount delay 50");
    let (outcome, time) = timed(count);
    assert_eq!(outcome, OK);
    assert!(time >= Duration::from_millis(50), "{time:?}");
    faults.set("cuDeviceGetCount hang\ncuDeviceGetCount error 46");
    std::thread::scope(|scope| {
        let call = scope.spawn(count);
        soon();
        assert!(!call.is_finished());
        // Others go on.
        assert_eq!(cu!(cuCtxSynchronize()), OK);
        faults.clear();
        // The line for the error was there when the call began.
        assert_eq!(call.join().expect("no panic"), CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE);
    });
    end(faults);
}

#[test]
fn delays_hangs_and_rates_of_copies() {
    let faults = start();
    let (device, host, stream) = (allocate(1 << 20), pinned(1 << 20), stream());
    let copy = || {
        assert_eq!(cu!(cuMemcpyHtoDAsync_v2(device, host.as_ptr().cast(), 1 << 20, stream)), OK);
        cu!(cuStreamSynchronize(stream))
    };
    faults.set("copy delay 50");
    let (outcome, time) = timed(copy);
    assert_eq!(outcome, OK);
    assert!(time >= Duration::from_millis(50), "{time:?}");
    faults.set("copy rate 10");
    let (outcome, time) = timed(copy);
    assert_eq!(outcome, OK);
    assert!(time >= Duration::from_millis(100) && time < Duration::from_millis(400), "{time:?}");
    faults.set("copy hang");
    assert_eq!(cu!(cuMemcpyHtoDAsync_v2(device, host.as_ptr().cast(), 1, stream)), OK);
    soon();
    assert_eq!(cu!(cuStreamQuery(stream)), NOT_READY);
    faults.clear();
    assert_eq!(cu!(cuStreamSynchronize(stream)), OK);
    end(faults);
}

#[test]
fn errors_of_copies_are_sticky() {
    let faults = start();
    let failed = CUresult::CUDA_ERROR_LAUNCH_FAILED;
    let (device, host, stream, other) = (allocate(100), pinned(4096), stream(), stream());
    let event = event(SHARED);
    faults.set("copy error 719 after 1");
    let copy = || cu!(cuMemcpyHtoDAsync_v2(device, host.as_ptr().cast(), 100, stream));
    assert_eq!(copy(), OK);
    assert_eq!(cu!(cuStreamSynchronize(stream)), OK);
    assert_eq!(copy(), OK);
    // Before the copy fails or after it.
    assert!([OK, failed].contains(&cu!(cuEventRecord(event, stream))));
    assert_eq!(cu!(cuStreamSynchronize(stream)), failed);
    faults.clear();
    assert_eq!(copy(), failed);
    assert_eq!(cu!(cuEventQuery(event)), failed);
    assert_eq!(cu!(cuEventSynchronize(event)), failed);
    assert_eq!(cu!(cuStreamSynchronize(other)), failed);
    assert_eq!(cu!(cuMemHostUnregister(host.as_ptr().cast_mut().cast())), failed);
    faults.revive();
    assert_eq!(copy(), OK);
    assert_eq!(cu!(cuStreamSynchronize(stream)), OK);
    end(faults);
}

#[test]
fn records_hang() {
    let faults = start();
    let (stream, event, device) = (stream(), event(PLAIN), allocate(1));
    faults.set("record hang");
    assert_eq!(cu!(cuEventRecord(event, stream)), OK);
    assert_eq!(cu!(cuMemsetD8Async(device, 1, 1, stream)), OK);
    soon();
    assert_eq!(cu!(cuEventQuery(event)), NOT_READY);
    assert_eq!(look(device, 1), [0], "the stream has stopped there");
    faults.clear();
    assert_eq!(cu!(cuEventSynchronize(event)), OK);
    assert_eq!(cu!(cuStreamSynchronize(stream)), OK);
    assert_eq!(look(device, 1), [1]);
    end(faults);
}

#[test]
fn a_context_may_end_while_its_streams_hang() {
    let faults = start();
    let (stream, event, device) = (stream(), event(PLAIN), allocate(1));
    faults.set("copy hang");
    assert_eq!(cu!(cuMemcpyHtoDAsync_v2(device, [7_u8].as_ptr().cast(), 1, stream)), OK);
    assert_eq!(cu!(cuEventRecord(event, stream)), OK);
    assert_eq!(cu!(cuDevicePrimaryCtxRelease_v2(0)), OK);
    drop(faults);
}

#[test]
fn a_process_may_end_while_calls_and_streams_hang() {
    if !pillion_fake_cuda::testing::alone("a_process_may_end_while_calls_and_streams_hang") {
        return;
    }
    let faults = start();
    let (stream, device, host) = (stream(), allocate(1), pinned(4096));
    faults.set("copy hang\ncuDeviceGetCount hang");
    assert_eq!(cu!(cuMemcpyHtoDAsync_v2(device, host.as_ptr().cast(), 1, stream)), OK);
    std::thread::spawn(count);
    soon();
    std::mem::forget(faults);
}

#[test]
#[should_panic(expected = "full name")]
fn a_misspelt_name_is_noticed() {
    pillion_fake_cuda::testing::alone("no_such_test");
}

#[test]
fn faults_for_one_process() {
    if role().is_some() {
        let _faults = pillion_fake_cuda::testing::load();
        say(&format!("{}", cu!(cuInit(0)) as u32));
        return;
    }
    let faults = start();
    let child = |text: &str| {
        faults.set(text);
        let mut other = Other::start("faults_for_one_process", "child");
        let said = other.hear();
        assert!(other.join());
        said
    };
    assert_eq!(child("process=faults_for_one_process cuInit error 46"), "46");
    assert_eq!(child("process=somebody-else cuInit error 46"), "0");
    assert_eq!(child("devices 0"), "100");
    faults.set("process=somebody-else cuInit error 46");
    assert_eq!(cu!(cuInit(0)), OK);
    end(faults);
}
