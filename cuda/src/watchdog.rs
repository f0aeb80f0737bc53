//! Knows when a thread that talks to the driver does not come back.
//!
//! A call that hangs in a driver cannot be given up: its thread holds locks that the next call needs, and
//! nobody can say what it still writes. So there is no time-out for it but the end of the process, whose
//! memory and mappings the kernel then takes back (crash-only). Whoever owns the process asks
//! [`Watchdog::stuck`] now and then.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use pillion_shm::clock;

#[derive(Debug, Default)]
struct Beat {
    /// In ns of the monotonic clock; 0: nothing under way.
    until_ns: AtomicU64,
    what: Mutex<&'static str>,
}

#[derive(Debug, Default)]
struct Watched {
    beats: Vec<Weak<Beat>>,
    fatal: Option<String>,
}

/// All threads that may get stuck.
#[derive(Debug, Clone, Default)]
pub struct Watchdog(Arc<Mutex<Watched>>);

/// One such thread's.
#[derive(Debug)]
pub struct Pulse(Arc<Beat>);

impl Watchdog {
    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a new thread.
    pub fn pulse(&self) -> Pulse {
        let beat = Arc::new(Beat::default());
        let mut watched = self.watched();
        watched.beats.retain(|beat| beat.strong_count() > 0);
        watched.beats.push(Arc::downgrade(&beat));
        Pulse(beat)
    }

    /// Says that nothing can be proved any more about what still touches memory.
    pub fn fail(&self, text: String) {
        self.watched().fatal.get_or_insert(text);
    }

    /// Why this process must end, if it must.
    pub fn stuck(&self) -> Option<String> {
        let watched = self.watched();
        if let Some(text) = &watched.fatal {
            return Some(text.clone());
        }
        let now = clock::monotonic_ns();
        watched.beats.iter().filter_map(Weak::upgrade).find_map(|beat| {
            let until = beat.until_ns.load(Ordering::Acquire);
            let what = *beat.what.lock().unwrap_or_else(PoisonError::into_inner);
            (until != 0 && until < now).then(|| format!("{what} does not come back"))
        })
    }
}

impl Pulse {
    /// Does something that should not take longer than `limit`. It is not stopped if it does.
    pub fn during<T>(&self, what: &'static str, limit: Duration, act: impl FnOnce() -> T) -> T {
        *self.0.what.lock().unwrap_or_else(PoisonError::into_inner) = what;
        let until = clock::monotonic_ns() + limit.as_nanos() as u64;
        self.0.until_ns.store(until, Ordering::Release);
        let result = act();
        self.0.until_ns.store(0, Ordering::Release);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_too_long_is_noticed_while_it_lasts() {
        let dog = Watchdog::default();
        let pulse = dog.pulse();
        assert_eq!(pulse.during("a call", Duration::from_secs(60), || dog.stuck()), None);
        let seen = pulse.during("an unmap", Duration::ZERO, || {
            std::thread::sleep(Duration::from_millis(1));
            dog.stuck()
        });
        assert_eq!(seen.as_deref(), Some("an unmap does not come back"));
        assert_eq!(dog.stuck(), None, "it came back");
        dog.fail("the context is lost".into());
        drop(pulse);
        assert_eq!(dog.stuck().as_deref(), Some("the context is lost"));
    }
}
