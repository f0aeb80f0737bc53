//! Metrics of the SSD tier. They exist, at zero, without one, too.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::{Registry, Unit};

use super::labels::{Access, LabelValue, PerLabel, SsdEngine, Waited};
use super::{Whole, level, plain, store};

/// What the core and the tier count of the SSD.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SsdCounters {
    /// Records that can be found, now.
    pub records: u64,
    /// Recovered records whose tenant has not attached, now.
    pub hidden_records: u64,
    /// Bytes on the disks that can be read, now.
    pub used_bytes: u64,
    /// Bytes that all directories may take.
    pub capacity_bytes: u64,
    /// Blocks that wait to be written or are being written, now.
    pub writes_waiting: u64,
    /// Blocks written.
    pub blocks_written: u64,
    /// Their bytes.
    pub bytes_written: u64,
    /// Blocks read and proved.
    pub blocks_read: u64,
    /// Their bytes.
    pub bytes_read: u64,
    /// Blocks that left the host pool before their turn to be written came.
    pub unwritten: u64,
    /// Writes that failed.
    pub write_failures: u64,
    /// Reads that failed, damaged blocks included.
    pub read_failures: u64,
    /// Blocks whose bytes had changed.
    pub corrupt: u64,
    /// Blocks that are not there any more.
    pub dropped: u64,
    /// Lease requests that waited.
    pub leases_waited: u64,
    /// Of these, answered before all was there.
    pub leases_cut_short: u64,
    /// Leases that were granted while some of their blocks were still to be read.
    pub leases_ahead: u64,
    /// Segments that are not written again after an error, now.
    pub retired_segments: u64,
    /// Directories that take no writes any more, now.
    pub read_only_directories: u64,
    /// Directories that have been recovered, by [`SsdEngine`].
    pub directories: [u64; SsdEngine::ALL.len()],
    /// Bytes of the host pool that are registered with the ring of every directory that has one, now.
    pub registered_bytes: u64,
}

#[derive(Debug)]
pub(super) struct SsdMetrics {
    hidden: Whole,
    waiting: Whole,
    retired: Whole,
    read_only: Whole,
    directories: PerLabel<SsdEngine, Whole>,
    registered: Whole,
    blocks: PerLabel<Access, Counter>,
    bytes: PerLabel<Access, Counter>,
    failures: PerLabel<Access, Counter>,
    unwritten: Counter,
    waits: PerLabel<Waited, Counter>,
    ahead: Counter,
}

impl SsdMetrics {
    pub(super) fn new(r: &mut Registry) -> Self {
        let counters = Counter::<u64>::default;
        let help = "Lease requests that waited for the SSD or a neighbour: granted whole, or cut_short after their wait";
        let waits = PerLabel::register(r, "lease_waits", help, None, counters);
        let help = "Blocks on the SSD whose tenant has not attached since the start";
        let hidden = plain(r, "ssd_hidden_records", help, None);
        let help = "Blocks that wait to be written to the SSD or are being written";
        let waiting = plain(r, "ssd_write_queue_blocks", help, None);
        let help = "Segment files that are not written again after an error";
        let retired = plain(r, "ssd_retired_segments", help, None);
        let help = "SSD directories that take no writes any more after too many errors";
        let read_only = plain(r, "ssd_read_only_directories", help, None);
        let help = "SSD directories that have been recovered, by what reads and writes them";
        let directories = PerLabel::register(r, "ssd_directories", help, None, Whole::default);
        let help = "Bytes of the host pool that the kernel has pinned for io_uring; it grows to the pool's size after the start";
        let registered = plain(r, "ssd_registered", help, Some(Unit::Bytes));
        let help = "Blocks read from the SSD and written to it";
        let blocks = PerLabel::register(r, "ssd_blocks", help, None, counters);
        let help = "Bytes of blocks read from the SSD and written to it";
        let bytes = PerLabel::register(r, "ssd_transferred", help, Some(Unit::Bytes), counters);
        let help = "Blocks whose reading or writing failed";
        let failures = PerLabel::register(r, "ssd_failures", help, None, counters);
        let help = "Blocks that left the host pool before they were written to the SSD";
        let unwritten = plain(r, "ssd_unwritten_blocks", help, None);
        let help = "Leases that were granted while some of their blocks were still to be read from the SSD";
        let ahead = plain(r, "ssd_leases_ahead", help, None);
        Self {
            hidden,
            waiting,
            retired,
            read_only,
            directories,
            registered,
            blocks,
            bytes,
            failures,
            unwritten,
            waits,
            ahead,
        }
    }

    pub(super) fn set(&self, now: &SsdCounters) {
        level(&self.hidden, now.hidden_records);
        level(&self.waiting, now.writes_waiting);
        level(&self.retired, now.retired_segments);
        level(&self.read_only, now.read_only_directories);
        for (engine, count) in SsdEngine::ALL.iter().zip(now.directories) {
            level(self.directories.at(*engine), count);
        }
        level(&self.registered, now.registered_bytes);
        store(self.blocks.at(Access::Read), now.blocks_read);
        store(self.blocks.at(Access::Write), now.blocks_written);
        store(self.bytes.at(Access::Read), now.bytes_read);
        store(self.bytes.at(Access::Write), now.bytes_written);
        store(self.failures.at(Access::Read), now.read_failures);
        store(self.failures.at(Access::Write), now.write_failures);
        store(&self.unwritten, now.unwritten);
        // One that waits right now is neither.
        store(self.waits.at(Waited::Whole), now.leases_waited.saturating_sub(now.leases_cut_short));
        store(self.waits.at(Waited::CutShort), now.leases_cut_short);
        store(&self.ahead, now.leases_ahead);
    }
}
