//! Events. Those of several processes keep their state in a page that all of them map.

use std::{
    collections::BTreeMap,
    ffi::c_uint,
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicU32, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
};

use cudarc::driver::sys::{CUevent, CUipcEventHandle, CUresult, CUstream};
use rustix::{
    thread::futex::{self, Flags},
    time::{ClockId, Timespec, clock_gettime},
};

use crate::{
    call::{current, put},
    context::Context,
    errors::Outcome,
    faults::lock,
    ipc::Handle,
    memory::fresh,
    object::{self, Object, PAGE},
    stats::Live,
    stream::{self, Work},
};

const BLOCKING_SYNC: c_uint = 1;
const DISABLE_TIMING: c_uint = 2;
const INTERPROCESS: c_uint = 4;

/// How often who waits looks whether the wait has lost its sense.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// An event's state. All zero: never recorded, which counts as complete.
#[repr(C)]
#[derive(Debug, Default)]
struct State {
    /// Calls of `cuEventRecord`.
    recorded: AtomicU64,
    /// The latest of them that a stream has come to.
    completed: AtomicU64,
    /// When that was, in nanoseconds.
    time: AtomicU64,
    /// A futex, also between processes: changes with every completion.
    bell: AtomicU32,
}

/// Where the state is.
#[derive(Debug)]
enum Place {
    Own(Box<State>),
    /// The address of a page that is mapped until this is dropped.
    Shared {
        base: u64,
        object: Object,
        own: bool,
    },
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Self::Shared { base, object, .. } = self {
            object.unmap(*base);
        }
    }
}

#[derive(Debug)]
pub(crate) struct Event {
    place: Place,
    timing: bool,
    /// Physical.
    device: usize,
    #[expect(dead_code, reason = "counts while it lives")]
    live: Live,
}

/// All events, by handle.
static EVENTS: Mutex<BTreeMap<usize, Arc<Event>>> = Mutex::new(BTreeMap::new());

impl Event {
    fn state(&self) -> &State {
        match &self.place {
            Place::Own(state) => state,
            // SAFETY: the page is mapped as long as the event lives, holds a `State` (all zero is one) at its
            // start, and everybody who maps it changes it by atomics only.
            Place::Shared { base, .. } => unsafe { &*object::pointer::<State>(*base) },
        }
    }

    /// The latest record: what a wait that is called now waits for.
    pub(crate) fn latest(&self) -> u64 {
        self.state().recorded.load(SeqCst)
    }

    fn complete(&self, record: u64) -> bool {
        self.state().completed.load(SeqCst) >= record
    }

    /// A stream has come to this record.
    pub(crate) fn reach(&self, record: u64) {
        let state = self.state();
        let now = clock_gettime(ClockId::Monotonic);
        state.time.store(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64, Relaxed);
        state.completed.fetch_max(record, SeqCst);
        state.bell.fetch_add(1, SeqCst);
        // Nobody may be waiting, or the page may be one that futexes do not work on: those look by themselves.
        let _ = futex::wake(&state.bell, Flags::empty(), i32::MAX as u32);
    }

    /// Waits until a stream has come to this record; gives up when `unwanted` says so.
    pub(crate) fn wait(&self, record: u64, unwanted: impl Fn() -> bool) {
        let state = self.state();
        loop {
            let bell = state.bell.load(SeqCst);
            if self.complete(record) || unwanted() {
                return;
            }
            // All of its errors mean: look again.
            let _ = futex::wait(&state.bell, Flags::empty(), bell, Some(&LOOK));
        }
    }
}

fn find(event: CUevent) -> Outcome<Arc<Event>> {
    lock(&EVENTS).get(&event.addr()).cloned().ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)
}

fn enter(event: Event) -> CUevent {
    // Looks like an address, and is never one.
    let handle = 0xe7e0_0000_0000_0000_u64 as usize + fresh() as usize * 16;
    lock(&EVENTS).insert(handle, Arc::new(event));
    std::ptr::without_provenance_mut(handle)
}

/// The context ends.
pub(crate) fn destroy_all(context: &Context) {
    lock(&EVENTS).retain(|_, event| event.device != context.device());
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuEventCreate(to: *mut CUevent, flags: c_uint) -> CUresult {
    current("cuEventCreate", |context| {
        let shared = flags & INTERPROCESS != 0;
        let timing = flags & DISABLE_TIMING == 0;
        if to.is_null() || flags & !(BLOCKING_SYNC | DISABLE_TIMING | INTERPROCESS) != 0 || (shared && timing)
        {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        let place = if shared {
            let object = Object::new("evt", context.device(), PAGE)?;
            Place::Shared { base: object.map()?, object, own: true }
        } else {
            Place::Own(Box::default())
        };
        put(to, enter(Event { place, timing, device: context.device(), live: Live::event() }))
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuEventDestroy_v2(event: CUevent) -> CUresult {
    // Streams that still have to come to it keep it until then.
    current("cuEventDestroy_v2", |_| {
        lock(&EVENTS).remove(&event.addr()).map(drop).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuEventRecord(event: CUevent, stream: CUstream) -> CUresult {
    current("cuEventRecord", |context| {
        let (event, stream) = (find(event)?, stream::find(context, stream)?);
        if event.device != stream.device() {
            return Err(CUresult::CUDA_ERROR_INVALID_HANDLE);
        }
        let record = event.state().recorded.fetch_add(1, SeqCst) + 1;
        stream.push(Work::Record(event, record))
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuEventQuery(event: CUevent) -> CUresult {
    current("cuEventQuery", |_| {
        let event = find(event)?;
        if event.complete(event.latest()) { Ok(()) } else { Err(CUresult::CUDA_ERROR_NOT_READY) }
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuEventSynchronize(event: CUevent) -> CUresult {
    current("cuEventSynchronize", |context| {
        let event = find(event)?;
        event.wait(event.latest(), || context.check().is_err());
        context.failure()
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuEventElapsedTime(to: *mut f32, start: CUevent, end: CUevent) -> CUresult {
    current("cuEventElapsedTime", |_| elapsed(to, start, end))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuEventElapsedTime_v2(
    to: *mut f32,
    start: CUevent,
    end: CUevent,
) -> CUresult {
    current("cuEventElapsedTime_v2", |_| elapsed(to, start, end))
}

fn elapsed(to: *mut f32, start: CUevent, end: CUevent) -> Outcome {
    let events = [find(start)?, find(end)?];
    if events.iter().any(|event| !event.timing || event.latest() == 0) {
        return Err(CUresult::CUDA_ERROR_INVALID_HANDLE);
    }
    if events.iter().any(|event| !event.complete(event.latest())) {
        return Err(CUresult::CUDA_ERROR_NOT_READY);
    }
    let [start, end] = events.map(|event| event.state().time.load(Relaxed) as i64);
    put(to, (end - start) as f32 / 1e6)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuIpcGetEventHandle(to: *mut CUipcEventHandle, event: CUevent) -> CUresult {
    current("cuIpcGetEventHandle", |_| match &find(event)?.place {
        Place::Shared { object, own: true, .. } => {
            put(to, CUipcEventHandle { reserved: Handle::of(object, PAGE).encode() })
        }
        _ => Err(CUresult::CUDA_ERROR_INVALID_VALUE),
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuIpcOpenEventHandle(to: *mut CUevent, handle: CUipcEventHandle) -> CUresult {
    current("cuIpcOpenEventHandle", |context| {
        let bad = CUresult::CUDA_ERROR_INVALID_HANDLE;
        if to.is_null() {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        let object = Handle::decode(&handle.reserved, "evt").ok_or(bad)?.open(bad)?;
        let device = object.name.device;
        if device != context.device() {
            return Err(CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED);
        }
        let place = Place::Shared { base: object.map()?, object, own: false };
        put(to, enter(Event { place, timing: false, device, live: Live::event() }))
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuStreamWaitEvent(
    stream: CUstream,
    event: CUevent,
    flags: c_uint,
) -> CUresult {
    current("cuStreamWaitEvent", |context| {
        if flags != 0 {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        let (event, stream) = (find(event)?, stream::find(context, stream)?);
        let record = event.latest();
        stream.push(Work::Wait(event, record))
    })
}
