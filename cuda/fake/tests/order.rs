//! Streams and events of one process.

mod common;

use std::{
    ffi::c_void,
    ptr::null_mut,
    sync::{Condvar, Mutex},
    time::{Duration, Instant},
};

use common::*;
use cudarc::driver::sys::{CUresult, CUstream};

/// Holds up a stream until it is opened.
struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn new(stream: CUstream) -> &'static Self {
        let gate: &'static Self =
            Box::leak(Box::new(Self { open: Mutex::new(false), changed: Condvar::new() }));
        let argument = std::ptr::from_ref(gate).cast_mut().cast();
        assert_eq!(cu!(cuLaunchHostFunc(stream, Some(pass), argument)), OK);
        gate
    }

    fn open(&self) {
        *self.open.lock().expect("no panic") = true;
        self.changed.notify_all();
    }
}

extern "C" fn pass(gate: *mut c_void) {
    // SAFETY: a leaked gate.
    let gate = unsafe { &*gate.cast::<Gate>() };
    let closed = |open: &mut bool| !*open;
    drop(gate.changed.wait_while(gate.open.lock().expect("no panic"), closed).expect("no panic"));
}

#[test]
fn streams_keep_their_order_and_overlap() {
    let faults = start();
    let (slow, fast, device) = (stream(), stream(), allocate(100));
    let gate = Gate::new(slow);
    assert_eq!(cu!(cuMemsetD8Async(device, 1, 100, slow)), OK);
    assert_eq!(cu!(cuMemsetD8Async(device, 2, 50, slow)), OK);
    assert_eq!(cu!(cuMemsetD8Async(device, 3, 100, fast)), OK);
    assert_eq!(cu!(cuStreamSynchronize(fast)), OK);
    assert_eq!(look(device, 1), [3]);
    assert_eq!(cu!(cuStreamQuery(slow)), NOT_READY);
    // The default stream is one more.
    assert_eq!(cu!(cuMemsetD8Async(device, 4, 100, null_mut())), OK);
    for default in [0, 1, 2] {
        assert_eq!(cu!(cuStreamSynchronize(default as CUstream)), OK);
    }
    assert_eq!(look(device, 1), [4]);
    gate.open();
    assert_eq!(cu!(cuStreamSynchronize(slow)), OK);
    assert_eq!(cu!(cuStreamQuery(slow)), OK);
    assert_eq!(look(device, 100), [[2; 50], [1; 50]].concat());
    end(faults);
}

#[test]
fn a_destroyed_stream_ends_its_work() {
    let faults = start();
    let (stream, device) = (stream(), allocate(100));
    let gate = Gate::new(stream);
    assert_eq!(cu!(cuMemsetD8Async(device, 1, 100, stream)), OK);
    assert_eq!(cu!(cuStreamDestroy_v2(stream)), OK);
    assert_eq!(cu!(cuStreamQuery(stream)), CUresult::CUDA_ERROR_INVALID_HANDLE);
    assert_eq!(cu!(cuStreamDestroy_v2(stream)), CUresult::CUDA_ERROR_INVALID_HANDLE);
    assert_eq!(cu!(cuStreamDestroy_v2(null_mut())), CUresult::CUDA_ERROR_INVALID_HANDLE);
    gate.open();
    until("the last work of the stream", || look(device, 1) == [1]);
    end(faults);
}

#[test]
fn freeing_waits() {
    let faults = start();
    let (stream, device, other) = (stream(), allocate(100), allocate(100));
    let gate = Gate::new(stream);
    assert_eq!(cu!(cuMemsetD8Async(device, 1, 100, stream)), OK);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            soon();
            gate.open();
        });
        let start = Instant::now();
        assert_eq!(cu!(cuMemFree_v2(other)), OK);
        assert!(start.elapsed() > Duration::from_millis(30));
    });
    assert_eq!(look(device, 1), [1]);
    end(faults);
}

#[test]
fn priorities() {
    let faults = start();
    let (mut least, mut greatest, mut stream, mut priority) = (1, 1, null_mut(), 1);
    assert_eq!(cu!(cuCtxGetStreamPriorityRange(&mut least, &mut greatest)), OK);
    assert_eq!((least, greatest), (0, -5));
    assert_eq!(cu!(cuStreamCreateWithPriority(&mut stream, 1, -9)), OK);
    assert_eq!(cu!(cuStreamGetPriority(stream, &mut priority)), OK);
    assert_eq!(priority, -5);
    assert_eq!(cu!(cuStreamCreate(&mut stream, 2)), INVALID);
    end(faults);
}

#[test]
fn a_wait_is_for_the_record_that_was_latest_when_it_was_called() {
    let faults = start();
    for flags in [PLAIN, SHARED] {
        let (first, second, waiter, event) = (stream(), stream(), stream(), event(flags));
        assert_eq!(cu!(cuEventQuery(event)), OK);
        assert_eq!(cu!(cuEventSynchronize(event)), OK);
        // Before the first record there is nothing to wait for, even if one comes later.
        let gate = Gate::new(first);
        let late = Gate::new(second);
        assert_eq!(cu!(cuStreamWaitEvent(waiter, event, 0)), OK);
        assert_eq!(cu!(cuEventRecord(event, first)), OK);
        assert_eq!(cu!(cuStreamSynchronize(waiter)), OK);
        // Now there is.
        assert_eq!(cu!(cuStreamWaitEvent(waiter, event, 0)), OK);
        assert_eq!(cu!(cuEventRecord(event, second)), OK);
        assert_eq!(cu!(cuStreamQuery(waiter)), NOT_READY);
        assert_eq!(cu!(cuEventQuery(event)), NOT_READY);
        gate.open();
        // The second record does not concern the wait, but it does concern a query.
        assert_eq!(cu!(cuStreamSynchronize(waiter)), OK);
        assert_eq!(cu!(cuEventQuery(event)), NOT_READY);
        late.open();
        assert_eq!(cu!(cuEventSynchronize(event)), OK);
        assert_eq!(cu!(cuEventQuery(event)), OK);
        assert_eq!(cu!(cuEventDestroy_v2(event)), OK);
        assert_eq!(cu!(cuEventQuery(event)), CUresult::CUDA_ERROR_INVALID_HANDLE);
    }
    end(faults);
}

#[test]
fn an_event_may_be_destroyed_while_it_is_waited_for() {
    let faults = start();
    let (first, second, event) = (stream(), stream(), event(SHARED));
    let gate = Gate::new(first);
    assert_eq!(cu!(cuEventRecord(event, first)), OK);
    assert_eq!(cu!(cuStreamWaitEvent(second, event, 0)), OK);
    assert_eq!(cu!(cuEventDestroy_v2(event)), OK);
    soon();
    assert_eq!(cu!(cuStreamQuery(second)), NOT_READY);
    gate.open();
    assert_eq!(cu!(cuStreamSynchronize(second)), OK);
    until("the event's end", || faults.count("live_events") == 0);
    end(faults);
}

#[test]
fn kinds_of_events() {
    let faults = start();
    let mut event = null_mut();
    assert_eq!(cu!(cuEventCreate(&mut event, 4)), INVALID);
    assert_eq!(cu!(cuEventCreate(&mut event, 8)), INVALID);
    let (stream, start, end_, plain) = (stream(), self::event(TIMING), self::event(1), self::event(PLAIN));
    let mut time = 0.0;
    let bad = CUresult::CUDA_ERROR_INVALID_HANDLE;
    assert_eq!(cu!(cuEventElapsedTime(&mut time, start, end_)), bad);
    assert_eq!(cu!(cuEventRecord(start, stream)), OK);
    let gate = Gate::new(stream);
    assert_eq!(cu!(cuEventRecord(end_, stream)), OK);
    assert_eq!(cu!(cuEventElapsedTime(&mut time, start, end_)), NOT_READY);
    soon();
    gate.open();
    assert_eq!(cu!(cuEventSynchronize(end_)), OK);
    assert_eq!(cu!(cuEventElapsedTime(&mut time, start, end_)), OK);
    assert!(time > 30.0, "{time}");
    assert_eq!(cu!(cuEventElapsedTime_v2(&mut time, start, end_)), OK);
    assert_eq!(cu!(cuEventElapsedTime(&mut time, start, plain)), bad);
    let mut handle = cudarc::driver::sys::CUipcEventHandle { reserved: [0; 64] };
    assert_eq!(cu!(cuIpcGetEventHandle(&mut handle, plain)), INVALID);
    end(faults);
}
