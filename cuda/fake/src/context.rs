//! `cuInit` and the primary contexts.

use std::{
    cell::RefCell,
    ffi::{c_int, c_uint},
    sync::{
        Mutex,
        atomic::{
            AtomicU32,
            Ordering::{Relaxed, SeqCst},
        },
    },
};

use cudarc::driver::sys::{CUcontext, CUdevice, CUresult};

use crate::{
    call::{self, current as with_current, initialized, put, put_optional},
    device,
    errors::{self, Outcome},
    event,
    faults::{self, DEVICES_MAX, lock},
    memory, stats, stream,
};

/// The process that called `cuInit`; 0: none.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// The primary context of one device. A handle is its address.
#[derive(Debug)]
pub(crate) struct Context {
    /// How often it is retained; it exists as long as this is not zero.
    retained: Mutex<u32>,
    /// The code that every call ends with from now on; 0: none.
    failed: AtomicU32,
}

static CONTEXTS: [Context; DEVICES_MAX] =
    [const { Context { retained: Mutex::new(0), failed: AtomicU32::new(0) } }; DEVICES_MAX];

thread_local! {
    /// This thread's contexts; the last one is current. None stands for "no context", pushed on purpose.
    static STACK: RefCell<Vec<Option<&'static Context>>> = const { RefCell::new(Vec::new()) };
}

impl Context {
    /// The physical device.
    pub(crate) fn device(&self) -> usize {
        (std::ptr::from_ref(self).addr() - CONTEXTS.as_ptr().addr()) / size_of::<Self>()
    }

    fn handle(&'static self) -> CUcontext {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    fn of(handle: CUcontext) -> Outcome<Option<&'static Self>> {
        if handle.is_null() {
            return Ok(None);
        }
        let known = CONTEXTS.iter().find(|context| context.handle() == handle);
        known.map(Some).ok_or(CUresult::CUDA_ERROR_INVALID_CONTEXT)
    }

    fn exists(&self) -> bool {
        *lock(&self.retained) > 0
    }

    /// Whether the context can be used.
    pub(crate) fn check(&self) -> Outcome {
        self.failure()?;
        if !self.exists() {
            return Err(CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED);
        }
        Ok(())
    }

    /// Fails if something on the device has failed.
    pub(crate) fn failure(&self) -> Outcome {
        match self.failed.load(SeqCst) {
            0 => Ok(()),
            code => Err(errors::from_code(code).unwrap_or(CUresult::CUDA_ERROR_UNKNOWN)),
        }
    }

    /// Something on the device has failed: nothing works any more.
    pub(crate) fn fail(&self, code: CUresult) {
        // The first error is the one that is told.
        let _ = self.failed.compare_exchange(0, code as u32, SeqCst, Relaxed);
    }
}

/// The current context of this thread.
pub(crate) fn current() -> Option<&'static Context> {
    STACK.try_with(|stack| stack.borrow().last().copied().flatten()).ok().flatten()
}

/// The context of a physical device, if it exists.
pub(crate) fn primary(physical: usize) -> Option<&'static Context> {
    CONTEXTS.get(physical).filter(|context| context.exists())
}

/// A handle for what `cuPointerGetAttribute` tells.
pub(crate) fn handle_of(physical: usize) -> CUcontext {
    primary(physical).map_or(std::ptr::null_mut(), Context::handle)
}

/// A forked child counts as one that never called `cuInit`, as with the real driver.
pub(crate) fn check_initialized() -> Outcome {
    if OWNER.load(SeqCst) == std::process::id() {
        return Ok(());
    }
    Err(CUresult::CUDA_ERROR_NOT_INITIALIZED)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuInit(flags: c_uint) -> CUresult {
    // Before anything that takes a lock: a forked child may have inherited it locked.
    let owner = OWNER.load(SeqCst);
    if owner != 0 && owner != std::process::id() {
        return CUresult::CUDA_ERROR_NOT_INITIALIZED;
    }
    call::always("cuInit", || {
        if flags != 0 {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        if faults::folder().is_none() || device::count() == 0 {
            return Err(CUresult::CUDA_ERROR_NO_DEVICE);
        }
        OWNER.store(std::process::id(), SeqCst);
        stats::keep_file();
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDevicePrimaryCtxRetain(to: *mut CUcontext, device: CUdevice) -> CUresult {
    initialized("cuDevicePrimaryCtxRetain", || {
        let context = &CONTEXTS[device::physical(device)?];
        context.failure()?;
        put(to, context.handle())?;
        *lock(&context.retained) += 1;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(device: CUdevice) -> CUresult {
    initialized("cuDevicePrimaryCtxRelease_v2", || {
        let context = &CONTEXTS[device::physical(device)?];
        let mut retained = lock(&context.retained);
        *retained = retained.checked_sub(1).ok_or(CUresult::CUDA_ERROR_INVALID_CONTEXT)?;
        if *retained == 0 {
            // Everything goes with it.
            stream::destroy_all(context);
            event::destroy_all(context);
            memory::release_all(context);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDevicePrimaryCtxGetState(
    device: CUdevice,
    flags: *mut c_uint,
    active: *mut c_int,
) -> CUresult {
    initialized("cuDevicePrimaryCtxGetState", || {
        let context = &CONTEXTS[device::physical(device)?];
        put(flags, 0)?;
        put(active, c_int::from(context.exists()))
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuCtxSetCurrent(context: CUcontext) -> CUresult {
    initialized("cuCtxSetCurrent", || {
        let context = Context::of(context)?;
        STACK.with_borrow_mut(|stack| {
            stack.pop();
            stack.extend(context.map(Some));
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuCtxGetCurrent(to: *mut CUcontext) -> CUresult {
    initialized("cuCtxGetCurrent", || put(to, current().map_or(std::ptr::null_mut(), Context::handle)))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuCtxPushCurrent_v2(context: CUcontext) -> CUresult {
    initialized("cuCtxPushCurrent_v2", || {
        let context = Context::of(context)?;
        STACK.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuCtxPopCurrent_v2(to: *mut CUcontext) -> CUresult {
    initialized("cuCtxPopCurrent_v2", || {
        let popped = STACK.with_borrow_mut(Vec::pop).ok_or(CUresult::CUDA_ERROR_INVALID_CONTEXT)?;
        put_optional(to, popped.map_or(std::ptr::null_mut(), Context::handle));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuCtxGetDevice(to: *mut CUdevice) -> CUresult {
    with_current("cuCtxGetDevice", |context| put(to, device::ordinal(context.device())))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuCtxSynchronize() -> CUresult {
    with_current("cuCtxSynchronize", |context| {
        stream::synchronize_all(context);
        context.failure()
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuCtxGetStreamPriorityRange(
    least: *mut c_int,
    greatest: *mut c_int,
) -> CUresult {
    with_current("cuCtxGetStreamPriorityRange", |_| {
        put_optional(least, stream::PRIORITY_LEAST);
        put_optional(greatest, stream::PRIORITY_GREATEST);
        Ok(())
    })
}

/// Not CUDA: forgets the errors of all contexts, so that tests of one process do not spoil each other.
#[unsafe(no_mangle)]
unsafe extern "C" fn pillion_fake_cuda_revive() {
    CONTEXTS.iter().for_each(|context| context.failed.store(0, SeqCst));
}
