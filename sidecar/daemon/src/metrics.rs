//! Prometheus metrics: what each means is in docs/METRICS.md.
//!
//! Every label has a fixed set of values and every series exists from the start
//! (I8): nothing that a client says can add one. Series are held directly, so
//! that counting takes no lock and no look-up.

mod labels;
mod neighbours;
mod ssd;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

pub use labels::{
    Access, Direction, LabelValue, LeaseOutcome, Lending, Lookup, Outcome, Path, Refusal, Role, Skip,
    SsdEngine, Tier, Waited,
};
pub use neighbours::NeighbourCounters;
pub use ssd::SsdCounters;

use labels::{Labels, Metric, PerLabel, PerTwo, pair};
use neighbours::NeighbourMetrics;
use ssd::SsdMetrics;

/// Upper bounds in seconds: 10 µs to 50 s in steps of 1, 2, 5.
const SECONDS: [f64; 21] = [
    1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
    10.0, 20.0, 50.0,
];

/// Upper bounds in bytes: 4 KiB to 4 GiB in steps of 4.
const BYTES: [f64; 11] = [
    4096.0,
    16384.0,
    65536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
    268_435_456.0,
    1_073_741_824.0,
    4_294_967_296.0,
];

type Whole = Gauge<i64>;
type Fraction = Gauge<f64, AtomicU64>;

/// Totals and levels that the core and the daemon keep themselves. They are
/// copied as they are, so that feeding them twice counts nothing twice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CoreCounters {
    /// Records in the host tier, now.
    pub records: u64,
    /// Bytes that they take.
    pub record_bytes: u64,
    /// Size of the host pool.
    pub pool_bytes: u64,
    /// Bytes under a lease or a job.
    pub leased_bytes: u64,
    /// Leases, now.
    pub leases: u64,
    /// Sessions of schedulers, now.
    pub scheduler_sessions: u64,
    /// Sessions of workers, now.
    pub worker_sessions: u64,
    /// Sessions of observers such as `pillion status`, now.
    pub observer_sessions: u64,
    /// Workers by the way to their memory, in the order of [`Path::ALL`], now.
    pub workers: [u64; Path::ALL.len()],
    /// Jobs that have not quiesced, now.
    pub jobs: u64,
    /// Copies that wait for a thread, now.
    pub copy_queue: u64,
    /// Blocks that lease requests asked for.
    pub lease_blocks_asked: u64,
    /// Of these, blocks that were leased.
    pub lease_blocks_hit: u64,
    /// Lease requests that were granted.
    pub leases_granted: u64,
    /// Lease requests that found nothing.
    pub leases_empty: u64,
    /// Lease requests beyond a limit.
    pub leases_refused: u64,
    /// Leases that ran out.
    pub leases_expired: u64,
    /// Loads that ended well.
    pub loads_done: u64,
    /// Loads that failed.
    pub loads_failed: u64,
    /// Loads that were given up.
    pub loads_cancelled: u64,
    /// Saves that ended well.
    pub saves_done: u64,
    /// Saves that failed.
    pub saves_failed: u64,
    /// Saves that were given up.
    pub saves_cancelled: u64,
    /// Saves whose word the engine won (I4).
    pub saves_revoked: u64,
    /// Blocks loaded.
    pub blocks_loaded: u64,
    /// Blocks saved.
    pub blocks_saved: u64,
    /// Bytes loaded.
    pub bytes_loaded: u64,
    /// Bytes saved.
    pub bytes_saved: u64,
    /// Blocks of saves that the store had already.
    pub blocks_deduplicated: u64,
    /// Blocks of saves for which there was no room.
    pub blocks_without_room: u64,
    /// Blocks evicted.
    pub evictions: u64,
    /// Records whose bytes did not match their checksum (I1).
    pub checksum_failures: u64,
    /// Requests whose namespace or digest did not match (I1).
    pub identity_mismatches: u64,
    /// Jobs that were reported at their deadline.
    pub deadline_misses: u64,
    /// Messages that no correct client sends.
    pub protocol_errors: u64,
    /// Times that the supervisor has restarted the worker.
    pub worker_restarts: u64,
    /// The SSD's.
    pub ssd: SsdCounters,
    /// Between sidecars of this node.
    pub neighbours: NeighbourCounters,
}

/// All metrics of one sidecar.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    levels: Levels,
    totals: Totals,
    ssd: SsdMetrics,
    neighbours: NeighbourMetrics,
    job_seconds: PerTwo<Direction, Outcome, Histogram>,
    job_bytes: PerLabel<Direction, Histogram>,
    copy_seconds: PerTwo<Direction, Path, Histogram>,
    lease_seconds: Histogram,
    refusals: PerLabel<Refusal, Counter>,
    stamp_age_max: Fraction,
}

#[derive(Debug)]
struct Levels {
    records: PerLabel<Tier, Whole>,
    used_bytes: PerLabel<Tier, Whole>,
    capacity_bytes: PerLabel<Tier, Whole>,
    leased_bytes: Whole,
    leases: Whole,
    sessions: PerLabel<Role, Whole>,
    workers: PerLabel<Path, Whole>,
    jobs: Whole,
    copy_queue: Whole,
}

#[derive(Debug)]
struct Totals {
    lookup_blocks: PerLabel<Lookup, Counter>,
    lease_requests: PerLabel<LeaseOutcome, Counter>,
    leases_expired: Counter,
    jobs: PerTwo<Direction, Outcome, Counter>,
    saves_revoked: Counter,
    blocks: PerLabel<Direction, Counter>,
    bytes: PerLabel<Direction, Counter>,
    skipped: PerLabel<Skip, Counter>,
    evictions: PerLabel<Tier, Counter>,
    checksum_failures: PerLabel<Tier, Counter>,
    identity_mismatches: Counter,
    deadline_misses: Counter,
    protocol_errors: Counter,
    worker_restarts: Counter,
}

impl Metrics {
    /// All series at zero. `started` is when this generation began.
    pub fn new(version: &str, started: SystemTime) -> Self {
        let mut registry = Registry::with_prefix("pillion");
        let r = &mut registry;
        let build = Info::new(vec![("version", version.to_owned())]);
        r.register("build", "Version of the sidecar; always 1", build);
        let start: Fraction = Gauge::default();
        start.set(started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
        let help = "When this generation of the sidecar started, since 1970";
        r.register_with_unit("generation_start_time", help, Unit::Seconds, start);
        let levels = Levels::new(r);
        let totals = Totals::new(r);
        let ssd = SsdMetrics::new(r);
        let neighbours = NeighbourMetrics::new(r);
        let help = "From the job's arrival to its outcome";
        let job_seconds = PerTwo::register(r, "job", help, Some(Unit::Seconds), seconds);
        let help = "Bytes of the blocks that a job named";
        let job_bytes = PerLabel::register(r, "job", help, Some(Unit::Bytes), || Histogram::new(BYTES));
        let help = "One job's copy, checksums included, queueing not";
        let copy_seconds = PerTwo::register(r, "copy", help, Some(Unit::Seconds), seconds);
        let lease_seconds = seconds();
        let help = "From the arrival of a lease request to its answer";
        r.register_with_unit("lease", help, Unit::Seconds, lease_seconds.clone());
        let help = "Attachments and registrations that were refused, by reason";
        let refusals = PerLabel::register(r, "refusals", help, None, Counter::default);
        let stamp_age_max: Fraction = Gauge::default();
        let help = "Longest gap between two stamps of the presence table in the last 10 seconds; above 0.1 engines saw an empty table";
        r.register_with_unit("presence_stamp_age_max", help, Unit::Seconds, stamp_age_max.clone());
        Self {
            registry,
            levels,
            totals,
            ssd,
            neighbours,
            job_seconds,
            job_bytes,
            copy_seconds,
            lease_seconds,
            refusals,
            stamp_age_max,
        }
    }

    /// A job has been reported to its engine. Jobs and bytes are counted by [`Self::set_core`].
    pub fn job_finished(&self, direction: Direction, outcome: Outcome, bytes: u64, took: Duration) {
        self.job_seconds.at(direction, outcome).observe(took.as_secs_f64());
        self.job_bytes.at(direction).observe(bytes as f64);
    }

    /// A copy thread has ended one job's copy.
    pub fn copy_finished(&self, direction: Direction, path: Path, took: Duration) {
        self.copy_seconds.at(direction, path).observe(took.as_secs_f64());
    }

    /// A lease request has been answered, whatever the answer.
    pub fn lease_answered(&self, took: Duration) {
        self.lease_seconds.observe(took.as_secs_f64());
    }

    /// An attachment or registration has been refused.
    pub fn refused(&self, reason: Refusal) {
        self.refusals.at(reason).inc();
    }

    /// The longest gap between two stamps in the last 10 seconds.
    pub fn set_stamp_age_max(&self, age: Duration) {
        self.stamp_age_max.set(age.as_secs_f64());
    }

    /// Takes over the current totals and levels.
    pub fn set_core(&self, now: &CoreCounters) {
        self.levels.set(now);
        self.totals.set(now);
        self.ssd.set(&now.ssd);
        self.neighbours.set(&now.neighbours);
    }

    /// The OpenMetrics text; see [`crate::http::METRICS_TYPE`].
    pub fn encode(&self) -> String {
        let mut out = String::with_capacity(16 << 10);
        // Writing into a string cannot fail.
        let _ = text::encode(&mut out, &self.registry);
        out
    }
}

fn seconds() -> Histogram {
    Histogram::new(SECONDS)
}

/// A metric without labels.
fn plain<M: Metric>(r: &mut Registry, name: &str, help: &str, unit: Option<Unit>) -> M {
    let metric = M::default();
    labels::register(r, name, help, unit, metric.clone());
    metric
}

/// A metric of each tier.
fn tiers<M: Metric>(r: &mut Registry, name: &str, help: &str, unit: Option<Unit>) -> PerLabel<Tier, M> {
    PerLabel::register(r, name, help, unit, M::default)
}

/// A metric of the host tier only.
fn host<M: Metric>(r: &mut Registry, name: &str, help: &str, unit: Option<Unit>) -> M {
    let family = Family::<Labels, M>::default();
    labels::register(r, name, help, unit, family.clone());
    family.get_or_create_owned(&vec![pair(Tier::Host)])
}

impl Levels {
    fn new(r: &mut Registry) -> Self {
        let bytes = || Some(Unit::Bytes);
        Self {
            records: tiers(r, "records", "Blocks stored", None),
            used_bytes: tiers(r, "used", "Bytes that stored blocks take", bytes()),
            capacity_bytes: tiers(r, "capacity", "Bytes that the tier may take", bytes()),
            leased_bytes: host(r, "leased", "Bytes that leases and jobs keep from eviction", bytes()),
            leases: plain(r, "leases", "Leases held by engines", None),
            sessions: PerLabel::register(r, "sessions", "Attached sessions", None, Gauge::default),
            workers: PerLabel::register(
                r,
                "workers",
                "Registered workers, by the way to their memory",
                None,
                Gauge::default,
            ),
            jobs: plain(r, "jobs_running", "Jobs that still touch an engine's memory or wait to", None),
            copy_queue: plain(r, "copy_queue_jobs", "Jobs that wait for a copy thread", None),
        }
    }

    fn set(&self, now: &CoreCounters) {
        level(self.records.at(Tier::Host), now.records);
        level(self.records.at(Tier::Ssd), now.ssd.records);
        level(self.used_bytes.at(Tier::Host), now.record_bytes);
        level(self.used_bytes.at(Tier::Ssd), now.ssd.used_bytes);
        level(self.capacity_bytes.at(Tier::Host), now.pool_bytes);
        level(self.capacity_bytes.at(Tier::Ssd), now.ssd.capacity_bytes);
        level(&self.leased_bytes, now.leased_bytes);
        level(&self.leases, now.leases);
        level(self.sessions.at(Role::Scheduler), now.scheduler_sessions);
        level(self.sessions.at(Role::Worker), now.worker_sessions);
        level(self.sessions.at(Role::Observer), now.observer_sessions);
        for (path, count) in Path::ALL.iter().zip(now.workers) {
            level(self.workers.at(*path), count);
        }
        level(&self.jobs, now.jobs);
        level(&self.copy_queue, now.copy_queue);
    }
}

impl Totals {
    fn new(r: &mut Registry) -> Self {
        let counters = Counter::<u64>::default;
        let help = "Blocks in lease requests: hit if leased, else miss";
        let lookup_blocks = PerLabel::register(r, "lookup_blocks", help, None, counters);
        let help = "Lease requests: granted, empty (nothing stored) or refused (a limit)";
        let lease_requests = PerLabel::register(r, "lease_requests", help, None, counters);
        let leases_expired = plain(r, "leases_expired", "Leases that ran out without a release", None);
        let jobs = PerTwo::register(r, "jobs", "Jobs by outcome", None, counters);
        let help = "Saves that the engine took back before they were published";
        let saves_revoked = plain(r, "saves_revoked", help, None);
        let help = "Blocks loaded into engines and saved from them";
        let blocks = PerLabel::register(r, "transferred_blocks", help, None, counters);
        let help = "Bytes loaded into engines and saved from them";
        let bytes = PerLabel::register(r, "transferred", help, Some(Unit::Bytes), counters);
        let help = "Blocks of saves that were not stored: duplicate (stored already) or no_room (all else is leased)";
        let skipped = PerLabel::register(r, "save_blocks_skipped", help, None, counters);
        Self {
            lookup_blocks,
            lease_requests,
            leases_expired,
            jobs,
            saves_revoked,
            blocks,
            bytes,
            skipped,
            evictions: tiers(r, "evicted_blocks", "Blocks that had to go, most of them to make room", None),
            checksum_failures: tiers(
                r,
                "checksum_failures",
                "Stored blocks whose bytes had changed; they were dropped, not served",
                None,
            ),
            identity_mismatches: plain(
                r,
                "identity_mismatches",
                "Jobs whose namespace or digest did not match; nothing was served",
                None,
            ),
            deadline_misses: plain(r, "deadline_misses", "Jobs reported as failed at their deadline", None),
            protocol_errors: plain(r, "protocol_errors", "Messages that no correct client sends", None),
            worker_restarts: plain(
                r,
                "worker_restarts",
                "Times that the supervisor restarted the worker",
                None,
            ),
        }
    }

    fn set(&self, now: &CoreCounters) {
        // A miss is what was asked for and not leased; the two are read at one moment.
        let misses = now.lease_blocks_asked.saturating_sub(now.lease_blocks_hit);
        store(self.lookup_blocks.at(Lookup::Hit), now.lease_blocks_hit);
        store(self.lookup_blocks.at(Lookup::Miss), misses);
        store(self.lease_requests.at(LeaseOutcome::Granted), now.leases_granted);
        store(self.lease_requests.at(LeaseOutcome::Empty), now.leases_empty);
        store(self.lease_requests.at(LeaseOutcome::Refused), now.leases_refused);
        store(&self.leases_expired, now.leases_expired);
        store(self.jobs.at(Direction::Load, Outcome::Done), now.loads_done);
        store(self.jobs.at(Direction::Load, Outcome::Failed), now.loads_failed);
        store(self.jobs.at(Direction::Load, Outcome::Cancelled), now.loads_cancelled);
        store(self.jobs.at(Direction::Save, Outcome::Done), now.saves_done);
        store(self.jobs.at(Direction::Save, Outcome::Failed), now.saves_failed);
        store(self.jobs.at(Direction::Save, Outcome::Cancelled), now.saves_cancelled);
        store(&self.saves_revoked, now.saves_revoked);
        store(self.blocks.at(Direction::Load), now.blocks_loaded);
        store(self.blocks.at(Direction::Save), now.blocks_saved);
        store(self.bytes.at(Direction::Load), now.bytes_loaded);
        store(self.bytes.at(Direction::Save), now.bytes_saved);
        store(self.skipped.at(Skip::Duplicate), now.blocks_deduplicated);
        store(self.skipped.at(Skip::NoRoom), now.blocks_without_room);
        store(self.evictions.at(Tier::Host), now.evictions);
        store(self.evictions.at(Tier::Ssd), now.ssd.dropped);
        store(self.checksum_failures.at(Tier::Host), now.checksum_failures);
        store(self.checksum_failures.at(Tier::Ssd), now.ssd.corrupt);
        store(&self.identity_mismatches, now.identity_mismatches);
        store(&self.deadline_misses, now.deadline_misses);
        store(&self.protocol_errors, now.protocol_errors);
        store(&self.worker_restarts, now.worker_restarts);
    }
}

/// The text form knows signed numbers only.
fn level(gauge: &Whole, now: u64) {
    gauge.set(i64::try_from(now).unwrap_or(i64::MAX));
}

/// The core counts; the series only shows. A total never goes back.
fn store(counter: &Counter, total: u64) {
    counter.inner().fetch_max(total, Ordering::Relaxed);
}

#[cfg(test)]
mod tests;
