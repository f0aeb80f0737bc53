//! The SSD tier beside the driver: starts it, carries its calls over, and says how it is.

use std::{
    collections::VecDeque,
    fs::DirBuilder,
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pillion_core::{Event, GetEnding, NamespaceId, PutEnding, SsdRecord};
use pillion_cuda::HostPool;
use pillion_ssd::{
    Extent, GetError, Memory, OpenError, PutError,
    format::{Entry, RecordKey, RecordMeta, SpaceId},
    store::{Action, DropReason, Limits},
    tier::{self, DirectoryConfig, Hooks, Started, Tier, View},
};
use tokio::sync::{mpsc::UnboundedSender, oneshot};

use crate::config::{Config, SsdDirectory};

/// Segments that a directory of unusual size has at least, and at most, where nobody chose their length.
const SEGMENTS: u64 = 32;
const SEGMENT_BYTES_MIN: u64 = 16 << 20;
const SEGMENT_BYTES_MAX: u64 = 256 << 20;
/// After a device that failed at the start is looked at again.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// Failures that are logged in a row; the metrics count all of them.
const LOGGED_MAX: u32 = 5;

/// What the tier's threads tell the driver.
pub type Told = Action;

/// A tier that has been recovered, with the records that it has.
#[derive(Debug)]
pub struct Recovered {
    tier: Tier,
    started: Vec<Started>,
    records: Vec<SsdRecord>,
}

/// A recovery that is under way.
#[derive(Debug)]
pub struct Recovering {
    /// How it ends.
    pub answer: oneshot::Receiver<Result<Recovered>>,
    /// A device failed: it is tried again, and nobody waits for that.
    pub fails: Arc<AtomicBool>,
}

/// Opens and recovers the directories of the configuration on a thread of its own: a disk may take its time, or fail for
/// some.
///
/// # Errors
/// Where no thread can be had.
pub fn start(config: &Config, pool: &Arc<HostPool>, tell: UnboundedSender<Told>) -> Result<Recovering> {
    let (tell_answer, answer) = oneshot::channel();
    let fails = Arc::new(AtomicBool::new(false));
    let (config, pool, failed) = (config.clone(), Arc::clone(pool), Arc::clone(&fails));
    let work = move || {
        let mut pause = RETRY_MIN;
        while !tell_answer.is_closed() {
            match recover(&config, Arc::clone(&pool), tell.clone()) {
                Err(error) if is_the_devices(&error, failed.load(Ordering::Acquire)) => {
                    tracing::error!(
                        "{error:#}; serving without the SSD, which is tried again in {} s",
                        pause.as_secs()
                    );
                    failed.store(true, Ordering::Release);
                    thread::sleep(pause);
                    pause = (pause * 2).min(RETRY_MAX);
                }
                ended => {
                    let _ = tell_answer.send(ended);
                    return;
                }
            }
        }
    };
    thread::Builder::new().name("pillion-recover".into()).spawn(work).context("cannot start a thread")?;
    Ok(Recovering { answer, fails })
}

/// Whether a device failed, as opposed to a configuration that is wrong. `again`: it has failed before, and what was
/// begun then may still hold its directory.
fn is_the_devices(error: &anyhow::Error, again: bool) -> bool {
    use rustix::io::Errno;
    const FAILURES: [Errno; 6] =
        [Errno::IO, Errno::NXIO, Errno::REMOTEIO, Errno::NODATA, Errno::UCLEAN, Errno::TIMEDOUT];
    let of = |source: &std::io::Error| source.raw_os_error().map(Errno::from_raw_os_error);
    match error.downcast_ref::<OpenError>() {
        Some(OpenError::Io { source, .. }) => of(source).is_some_and(|errno| FAILURES.contains(&errno)),
        Some(OpenError::Recovery(_)) => true,
        Some(OpenError::Busy { .. }) => again,
        _ => false,
    }
}

fn recover(config: &Config, pool: Arc<HostPool>, tell: UnboundedSender<Told>) -> Result<Recovered> {
    let begun = Instant::now();
    let wanted = tier::Config {
        directories: places(config)
            .into_iter()
            .zip(&config.ssd)
            .map(|(path, wanted)| directory(path, wanted))
            .collect::<Result<_>>()?,
        segment_bytes: segment_bytes(config),
        limits: Limits::default(),
        engine: config.ssd_engine(),
    };
    let hooks = Hooks {
        // The driver is gone only when the process ends.
        tell: Box::new(move |action| drop(tell.send(action))),
        // Decision 008.
        keep: Box::new(|_, was_read| was_read),
    };
    let mut records = Vec::new();
    let memory = Arc::new(memory(pool)?);
    let (tier, started) = Tier::start(&wanted, &memory, hooks, |entry| records.push(record(entry)))
        .context("cannot use the SSD")?;
    for (path, how) in places(config).iter().zip(&started) {
        tracing::info!(
            directory = %path.display(),
            engine = how.engine,
            refused = how.refused,
            records = how.report.records,
            sealed = how.report.sealed,
            scanned = how.report.scanned,
            torn = how.report.torn,
            unreadable = how.report.unreadable,
            took_ms = begun.elapsed().as_millis() as u64,
            "SSD directory recovered"
        );
    }
    if records.len() as u64 > config.presence_slots / 4 * 3 {
        tracing::warn!(
            records = records.len(),
            presence_slots = config.presence_slots,
            "the SSD has more blocks than the presence table finds: raise presence_slots"
        );
    }
    Ok(Recovered { tier, started, records })
}

/// The directories of this device's sidecar: several can share one configuration.
fn places(config: &Config) -> Vec<PathBuf> {
    let place = |one: &SsdDirectory| one.path.to_string_lossy().replace("{device}", &config.device).into();
    config.ssd.iter().map(place).collect()
}

/// The folder above must be there: a disk that is not mounted is not to be filled from below.
fn directory(path: PathBuf, wanted: &SsdDirectory) -> Result<DirectoryConfig> {
    if !path.exists() {
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.with_context(|| {
            format!("cannot make the SSD directory {}: expected the folder above it", path.display())
        })?;
    }
    Ok(DirectoryConfig { path, capacity_bytes: wanted.capacity.0 })
}

fn segment_bytes(config: &Config) -> u64 {
    if config.ssd_segment.0 > 0 {
        return config.ssd_segment.0;
    }
    let least = config.ssd.iter().map(|one| one.capacity.0).min().unwrap_or_default();
    // The power of two below.
    let suits = 1 << (least / SEGMENTS).max(1).ilog2();
    u64::clamp(suits, SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX)
}

fn memory(pool: Arc<HostPool>) -> Result<Memory> {
    let (base, bytes) = (NonNull::new(pool.address()), pool.bytes());
    let base = base.context("the host pool has no address")?;
    ensure!(base.addr().get().is_multiple_of(4096), "expected a host pool that starts on a page");
    // SAFETY: the mapping lives as long as the pool that is kept, and any thread may use it. The core gives an extent
    // to a put only while its record is published and pinned, so that nobody writes it, and to a get only while its
    // record is being written by that get alone, padding included (its slabs have whole sectors); both until the
    // outcome has been taken in.
    Ok(unsafe { Memory::from_raw(base, bytes, pool) })
}

fn record(entry: &Entry) -> SsdRecord {
    let meta = &entry.meta;
    SsdRecord {
        key: meta.key.0,
        space: NamespaceId(meta.space.0),
        hash: meta.hash,
        parent: meta.parent.map(|parent| parent.0),
        tenant: Arc::clone(&meta.tenant),
        format: Arc::clone(&meta.format),
        bytes: meta.bytes,
        checksum: meta.checksum,
    }
}

fn meta(record: SsdRecord) -> RecordMeta {
    RecordMeta {
        key: RecordKey(record.key),
        space: SpaceId(record.space.0),
        hash: record.hash,
        parent: record.parent.map(RecordKey),
        tenant: record.tenant,
        format: record.format,
        bytes: record.bytes,
        checksum: record.checksum,
    }
}

/// A write that came before the tier was there.
#[derive(Debug)]
struct Early {
    token: u64,
    record: Box<SsdRecord>,
    offset: u64,
    durable: bool,
}

/// The driver's end of the tier.
#[derive(Debug)]
pub struct Ssd {
    tier: Option<Tier>,
    /// Bounded by the core's own bound on writes.
    early: VecDeque<Early>,
    directories: Vec<(PathBuf, Option<Started>)>,
    /// Failures in a row.
    failures: u32,
}

impl Ssd {
    /// One that is still being recovered: writes wait for it.
    pub fn starting(config: &Config) -> Self {
        let directories = places(config).into_iter().map(|path| (path, None)).collect();
        Self { tier: None, early: VecDeque::new(), directories, failures: 0 }
    }

    /// It has been recovered. What it has, and how what waited was answered.
    pub fn recovered(&mut self, recovered: Recovered) -> Vec<Event> {
        let Recovered { tier, started, records } = recovered;
        for ((_, place), how) in self.directories.iter_mut().zip(started) {
            *place = Some(how);
        }
        self.tier = Some(tier);
        let mut events = vec![Event::SsdFound { records }];
        for Early { token, record, offset, durable } in std::mem::take(&mut self.early) {
            events.extend(self.put(token, record, offset, durable));
        }
        events
    }

    /// Writes a record. An event: it has ended already.
    pub fn put(&mut self, token: u64, record: Box<SsdRecord>, offset: u64, durable: bool) -> Option<Event> {
        let Some(tier) = &self.tier else {
            self.early.push_back(Early { token, record, offset, durable });
            return None;
        };
        let extent = Extent { offset, bytes: record.bytes };
        let taken = tier.put(token, meta(*record), extent, durable);
        taken.is_err().then_some(Event::SsdPutEnded { token, ending: PutEnding::Failed })
    }

    /// Reads a record. An event: it has ended already.
    pub fn get(&self, token: u64, key: [u8; 32], offset: u64, bytes: u64) -> Option<Event> {
        let taken = self.tier.as_ref().map(|tier| tier.get(token, RecordKey(key), Extent { offset, bytes }));
        let taken = taken.is_some_and(|taken| taken.is_ok());
        (!taken).then_some(Event::SsdGetEnded { token, ending: GetEnding::Busy })
    }

    /// What the tier told, in the core's words; and in the log's.
    pub fn told(&mut self, told: Told) -> Option<Event> {
        match told {
            Action::Stored { token, .. } => {
                self.failures = 0;
                Some(Event::SsdPutEnded { token, ending: PutEnding::Stored })
            }
            Action::StoreFailed { token, error, .. } => {
                let expected = matches!(error, PutError::Busy | PutError::BeingWritten);
                self.complain(expected, || format!("a block was not written: {error}"));
                Some(Event::SsdPutEnded { token, ending: PutEnding::Failed })
            }
            Action::Loaded { token, checksum, .. } => {
                self.failures = 0;
                Some(Event::SsdGetEnded { token, ending: GetEnding::Loaded(checksum) })
            }
            Action::LoadFailed { token, error, .. } => {
                let expected = matches!(error, GetError::Busy | GetError::Missing);
                self.complain(expected, || format!("a block was not read: {error}"));
                let ending = match error {
                    GetError::Busy => GetEnding::Busy,
                    GetError::Corrupt(_) => GetEnding::Corrupt,
                    GetError::Missing | GetError::Extent { .. } | GetError::Io(_) => GetEnding::Gone,
                };
                Some(Event::SsdGetEnded { token, ending })
            }
            Action::Dropped { key, reason } => {
                // The others were said when the read failed.
                if reason == DropReason::Unsynced {
                    self.complain(false, || "a block is lost with a failed sync, and will be a miss".into());
                }
                Some(Event::SsdDropped { key: key.0 })
            }
            Action::ReadOnly { shelf } => {
                let directory = self.directories.get(shelf).map(|(path, _)| path.display().to_string());
                tracing::error!(
                    directory,
                    "too many errors: nothing is written to this SSD directory any more; what is there is read"
                );
                None
            }
            // The tier carries these out itself.
            Action::Io { .. } | Action::WantsRoom { .. } => None,
        }
    }

    fn complain(&mut self, expected: bool, text: impl FnOnce() -> String) {
        if expected {
            return;
        }
        self.failures += 1;
        if self.failures <= LOGGED_MAX {
            tracing::warn!("SSD: {}", text());
        }
        if self.failures == LOGGED_MAX {
            tracing::warn!("SSD: more of the same is counted, and not logged until something works again");
        }
    }

    /// For status reports and metrics: the directories with how each started, and what is in them.
    pub fn view(&self) -> (&[(PathBuf, Option<Started>)], View) {
        (&self.directories, self.tier.as_ref().map(Tier::view).unwrap_or_default())
    }

    /// Ends what is in flight and seals what is open, on a thread of its own: whoever waits may stop waiting.
    pub fn close(&mut self) -> Option<oneshot::Receiver<()>> {
        let tier = self.tier.take()?;
        let (done, ended) = oneshot::channel();
        let close = move || {
            drop(tier);
            let _ = done.send(());
        };
        // Without a thread nothing is sealed; the next start reads the headers.
        thread::Builder::new().name("pillion-seal".into()).spawn(close).ok()?;
        Some(ended)
    }
}

/// How long the start waits for recovery before it serves without what is on the SSD, which comes when it comes.
pub const RECOVERY_WAIT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ByteSize;

    #[test]
    fn sidecars_that_share_a_configuration_have_directories_of_their_own() {
        let one = SsdDirectory { path: "/ssd/{device}/kv".into(), capacity: ByteSize(1 << 30) };
        let config = Config { ssd: vec![one], device: "cpu1".into(), ..Config::default() };
        assert_eq!(places(&config), [PathBuf::from("/ssd/cpu1/kv")]);
    }

    #[test]
    fn what_the_tier_tells_ends_what_the_core_asked_for() {
        let mut ssd = Ssd::starting(&Config::default());
        let key = RecordKey([7; 32]);
        let io = |errno| GetError::Io(pillion_ssd::device::IoError::Os(errno));
        for (error, ending) in [
            (GetError::Missing, GetEnding::Gone),
            (GetError::Busy, GetEnding::Busy),
            (io(5), GetEnding::Gone),
            (GetError::Corrupt(pillion_ssd::format::Refused::Other("key")), GetEnding::Corrupt),
        ] {
            let event = ssd.told(Action::LoadFailed { token: 3, key, error });
            assert!(matches!(event, Some(Event::SsdGetEnded { token: 3, ending: told }) if told == ending));
        }
        let event = ssd.told(Action::StoreFailed { token: 4, key, error: PutError::ReadOnly });
        assert!(matches!(event, Some(Event::SsdPutEnded { token: 4, ending: PutEnding::Failed })));
        let event = ssd.told(Action::Dropped { key, reason: DropReason::Evicted });
        assert!(matches!(event, Some(Event::SsdDropped { key: [7, ..] })));
        assert!(ssd.told(Action::ReadOnly { shelf: 0 }).is_none());
    }

    #[test]
    fn before_recovery_writes_wait_and_reads_are_not_there() {
        let mut ssd = Ssd::starting(&Config::default());
        let record = SsdRecord {
            key: [1; 32],
            space: NamespaceId([2; 16]),
            hash: [3; 32],
            parent: None,
            tenant: "t".into(),
            format: "f".into(),
            bytes: 4096,
            checksum: 5,
        };
        assert!(ssd.put(1, Box::new(record), 0, false).is_none());
        assert_eq!(ssd.early.len(), 1);
        let event = ssd.get(2, [1; 32], 0, 4096);
        assert!(matches!(event, Some(Event::SsdGetEnded { token: 2, ending: GetEnding::Busy })));
    }

    #[test]
    fn segments_suit_the_smallest_directory() {
        let config = |capacities: &[u64], segment: u64| Config {
            ssd: capacities
                .iter()
                .map(|bytes| SsdDirectory { path: "/x".into(), capacity: ByteSize(*bytes) })
                .collect(),
            ssd_segment: ByteSize(segment),
            ..Config::default()
        };
        assert_eq!(segment_bytes(&config(&[64 << 20], 0)), 16 << 20);
        assert_eq!(segment_bytes(&config(&[1 << 40, 3 << 30], 0)), 64 << 20);
        assert_eq!(segment_bytes(&config(&[1 << 40], 0)), 256 << 20);
        assert_eq!(segment_bytes(&config(&[1 << 40], 1 << 20)), 1 << 20);
    }
}
