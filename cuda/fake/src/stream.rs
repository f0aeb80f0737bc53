//! Streams: each a thread that does one thing after the other.

use std::{
    collections::{BTreeMap, VecDeque},
    ffi::{c_int, c_uint, c_void},
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use cudarc::driver::sys::{CUresult, CUstream};

use crate::{
    call::{current, put},
    context::{self, Context},
    copy::{self, Copy, Fill},
    errors::Outcome,
    event::Event,
    faults::{self, lock},
    memory::fresh,
};

/// Larger numbers are lower priorities.
pub(crate) const PRIORITY_LEAST: c_int = 0;
pub(crate) const PRIORITY_GREATEST: c_int = -5;

/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: c_uint = 1;
/// Handles up to this one mean the default stream: null, `CU_STREAM_LEGACY`, `CU_STREAM_PER_THREAD`.
const DEFAULT_MAX: usize = 2;

/// How often who waits looks whether the context has failed.
const LOOK: Duration = Duration::from_millis(20);

/// What a stream can be told to do.
#[derive(Debug)]
pub(crate) enum Work {
    /// One call's copies, in any order.
    Copy(Vec<Copy>),
    Fill(Fill),
    Record(Arc<Event>, u64),
    Wait(Arc<Event>, u64),
    Call(HostCall),
}

/// A function of the caller, with its argument.
#[derive(Debug)]
pub(crate) struct HostCall(unsafe extern "C" fn(*mut c_void), *mut c_void);

// SAFETY: `cuLaunchHostFunc` promises that the function is called on another thread.
unsafe impl Send for HostCall {}

#[derive(Debug, Default)]
struct Queue {
    work: VecDeque<Work>,
    /// Things ever told.
    told: u64,
    /// Things ever done.
    done: u64,
    /// No more will come.
    closed: bool,
}

#[derive(Debug)]
pub(crate) struct Stream {
    context: &'static Context,
    priority: c_int,
    flags: c_uint,
    queue: Mutex<Queue>,
    changed: Condvar,
    /// What is under way is not wanted any more.
    aborted: AtomicBool,
}

/// All streams, by handle. The contexts' own have one that nobody can name, see [`default_key`].
static STREAMS: Mutex<BTreeMap<usize, Arc<Stream>>> = Mutex::new(BTreeMap::new());

/// Where the default stream of a context is found.
fn default_key(context: &Context) -> usize {
    usize::MAX - context.device()
}

impl Stream {
    fn start(context: &'static Context, priority: c_int, flags: c_uint) -> Outcome<Arc<Self>> {
        let (queue, changed, aborted) = (Mutex::default(), Condvar::new(), AtomicBool::new(false));
        let stream = Arc::new(Self { context, priority, flags, queue, changed, aborted });
        let worker = stream.clone();
        thread::Builder::new()
            .name("fake-cuda".into())
            .spawn(move || worker.run())
            .map_err(|_| CUresult::CUDA_ERROR_OUT_OF_MEMORY)?;
        Ok(stream)
    }

    /// The physical device.
    pub(crate) fn device(&self) -> usize {
        self.context.device()
    }

    /// Tells it to do something after all that it was told before.
    pub(crate) fn push(&self, work: Work) -> Outcome {
        let mut queue = lock(&self.queue);
        if queue.closed {
            return Err(CUresult::CUDA_ERROR_INVALID_HANDLE);
        }
        queue.work.push_back(work);
        queue.told += 1;
        self.changed.notify_all();
        Ok(())
    }

    fn idle(&self) -> bool {
        let queue = lock(&self.queue);
        queue.done == queue.told
    }

    /// Waits until all is done that it has been told so far, or until the context has failed.
    pub(crate) fn synchronize(&self) {
        let mut queue = lock(&self.queue);
        let told = queue.told;
        while queue.done < told && self.context.failure().is_ok() {
            queue = self.wait(queue, Some(LOOK));
        }
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>, limit: Option<Duration>) -> MutexGuard<'a, Queue> {
        let poisoned = std::sync::PoisonError::into_inner;
        match limit {
            Some(limit) => {
                self.changed.wait_timeout(queue, limit).unwrap_or_else(|error| error.into_inner()).0
            }
            None => self.changed.wait(queue).unwrap_or_else(poisoned),
        }
    }

    /// Takes no more work; its thread ends when it has done what it was told.
    fn close(&self) {
        lock(&self.queue).closed = true;
        self.changed.notify_all();
    }

    /// Drops what it was told and waits for what it is doing.
    fn abort(&self) {
        self.aborted.store(true, SeqCst);
        let mut queue = lock(&self.queue);
        queue.closed = true;
        queue.done += queue.work.len() as u64;
        queue.work.clear();
        self.changed.notify_all();
        while queue.done < queue.told {
            queue = self.wait(queue, None);
        }
    }

    /// Nobody wants the results any more: the context has failed, or has gone.
    fn unwanted(&self) -> bool {
        self.aborted.load(SeqCst) || self.context.failure().is_err()
    }

    fn run(&self) {
        loop {
            let mut queue = lock(&self.queue);
            let work = loop {
                if let Some(work) = queue.work.pop_front() {
                    break work;
                }
                if queue.closed {
                    return;
                }
                queue = self.wait(queue, None);
            };
            drop(queue);
            // On a device that has failed nothing is done any more, and no event completes.
            if !self.unwanted()
                && let Err(code) = self.perform(work)
            {
                self.context.fail(code);
            }
            lock(&self.queue).done += 1;
            self.changed.notify_all();
        }
    }

    fn perform(&self, work: Work) -> Outcome {
        let unwanted = || self.unwanted();
        match work {
            Work::Copy(copies) => copy::perform(copies, &unwanted),
            Work::Fill(fill) => fill.perform(),
            Work::Record(event, record) => {
                faults::meet_unless("record", &unwanted)?;
                if !unwanted() {
                    event.reach(record);
                }
                Ok(())
            }
            Work::Wait(event, record) => {
                event.wait(record, unwanted);
                Ok(())
            }
            Work::Call(HostCall(function, argument)) => {
                // SAFETY: `cuLaunchHostFunc`'s caller promised that it may be called so, once.
                unsafe { function(argument) };
                Ok(())
            }
        }
    }
}

/// The stream of a handle; of a default one that of the current context.
pub(crate) fn find(context: &'static Context, stream: CUstream) -> Outcome<Arc<Stream>> {
    let mut streams = lock(&STREAMS);
    if stream.addr() > DEFAULT_MAX {
        return streams.get(&stream.addr()).cloned().ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE);
    }
    if let Some(stream) = streams.get(&default_key(context)) {
        return Ok(stream.clone());
    }
    let stream = Stream::start(context, PRIORITY_LEAST, 0)?;
    streams.insert(default_key(context), stream.clone());
    Ok(stream)
}

fn of_context(context: &Context) -> Vec<Arc<Stream>> {
    let streams = lock(&STREAMS);
    streams.values().filter(|stream| stream.device() == context.device()).cloned().collect()
}

/// Waits for all that the context was told so far, or until it has failed.
pub(crate) fn synchronize_all(context: &Context) {
    of_context(context).iter().for_each(|stream| stream.synchronize());
}

/// The context ends.
pub(crate) fn destroy_all(context: &Context) {
    let streams = of_context(context);
    lock(&STREAMS).retain(|_, stream| stream.device() != context.device());
    streams.iter().for_each(|stream| stream.abort());
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuStreamCreate(to: *mut CUstream, flags: c_uint) -> CUresult {
    current("cuStreamCreate", |context| create(context, to, flags, PRIORITY_LEAST))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuStreamCreateWithPriority(
    to: *mut CUstream,
    flags: c_uint,
    priority: c_int,
) -> CUresult {
    current("cuStreamCreateWithPriority", |context| create(context, to, flags, priority))
}

fn create(context: &'static Context, to: *mut CUstream, flags: c_uint, priority: c_int) -> Outcome {
    if to.is_null() || flags & !NON_BLOCKING != 0 {
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    // Out of range is brought into range, as the driver does.
    let priority = priority.clamp(PRIORITY_GREATEST, PRIORITY_LEAST);
    let stream = Stream::start(context, priority, flags)?;
    // Looks like an address, and is never one.
    let handle = 0x57e0_0000_0000_0000_u64 as usize + fresh() as usize * 16;
    lock(&STREAMS).insert(handle, stream);
    put(to, std::ptr::without_provenance_mut(handle))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuStreamDestroy_v2(stream: CUstream) -> CUresult {
    // What it was told is still done.
    current("cuStreamDestroy_v2", |_| {
        let bad = CUresult::CUDA_ERROR_INVALID_HANDLE;
        if stream.addr() <= DEFAULT_MAX {
            return Err(bad);
        }
        lock(&STREAMS).remove(&stream.addr()).ok_or(bad)?.close();
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuStreamSynchronize(stream: CUstream) -> CUresult {
    current("cuStreamSynchronize", |context| {
        find(context, stream)?.synchronize();
        context.failure()
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuStreamQuery(stream: CUstream) -> CUresult {
    current("cuStreamQuery", |context| {
        let idle = find(context, stream)?.idle();
        context.failure()?;
        if idle { Ok(()) } else { Err(CUresult::CUDA_ERROR_NOT_READY) }
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuStreamGetPriority(stream: CUstream, to: *mut c_int) -> CUresult {
    current("cuStreamGetPriority", |context| put(to, find(context, stream)?.priority))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuStreamGetFlags(stream: CUstream, to: *mut c_uint) -> CUresult {
    current("cuStreamGetFlags", |context| put(to, find(context, stream)?.flags))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuStreamGetCtx(
    stream: CUstream,
    to: *mut cudarc::driver::sys::CUcontext,
) -> CUresult {
    current("cuStreamGetCtx", |context| put(to, context::handle_of(find(context, stream)?.device())))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuLaunchHostFunc(
    stream: CUstream,
    function: Option<unsafe extern "C" fn(*mut c_void)>,
    argument: *mut c_void,
) -> CUresult {
    current("cuLaunchHostFunc", |context| {
        let function = function.ok_or(CUresult::CUDA_ERROR_INVALID_VALUE)?;
        find(context, stream)?.push(Work::Call(HostCall(function, argument)))
    })
}
