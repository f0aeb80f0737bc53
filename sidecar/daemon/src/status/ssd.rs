//! The SSD in status reports.

use std::io;

use serde::{Deserialize, Serialize};

use super::{approximate, print::safe};
use crate::metrics::SsdCounters;

/// The SSD tier.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SsdStatus {
    /// The cache mode.
    pub mode: String,
    /// None: there is no SSD.
    pub directories: Vec<SsdDirectoryStatus>,
    /// Blocks that can be found.
    pub records: u64,
    /// Recovered blocks whose tenant has not attached.
    pub hidden_records: u64,
    /// Blocks written.
    pub blocks_written: u64,
    /// Their bytes.
    pub bytes_written: u64,
    /// Blocks that wait to be written or are being written.
    pub writes_waiting: u64,
    /// Blocks that left the host pool before they were written.
    pub blocks_unwritten: u64,
    /// Writes that failed.
    pub write_failures: u64,
    /// Blocks read and proved.
    pub blocks_read: u64,
    /// Their bytes.
    pub bytes_read: u64,
    /// Reads that failed.
    pub read_failures: u64,
    /// Of these, blocks whose bytes had changed.
    pub blocks_corrupt: u64,
    /// Blocks that are not there any more.
    pub blocks_dropped: u64,
    /// Lease requests that waited for it.
    pub leases_waited: u64,
    /// Of these, answered before all was there.
    pub leases_cut_short: u64,
    /// Leases that were granted while some of their blocks were still to be read.
    pub leases_ahead: u64,
}

/// One directory.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SsdDirectoryStatus {
    /// Where.
    pub path: String,
    /// `io_uring` or `threads`; empty while it is being recovered.
    pub engine: String,
    /// Why it is not io_uring, where that was tried.
    pub refused: Option<String>,
    /// Bytes that it may take, in whole segments.
    pub capacity_bytes: u64,
    /// Bytes of blocks that can be read.
    pub used_bytes: u64,
    /// Those blocks.
    pub records: u64,
    /// Segment files that are there.
    pub segments: u64,
    /// Length of one.
    pub segment_bytes: u64,
    /// Of these, not written again after an error.
    pub retired: u64,
    /// Nothing is written any more.
    pub read_only: bool,
}

impl SsdStatus {
    /// Takes over what is counted.
    pub(super) fn set(&mut self, now: &SsdCounters) {
        self.records = now.records;
        self.hidden_records = now.hidden_records;
        self.blocks_written = now.blocks_written;
        self.bytes_written = now.bytes_written;
        self.writes_waiting = now.writes_waiting;
        self.blocks_unwritten = now.unwritten;
        self.write_failures = now.write_failures;
        self.blocks_read = now.blocks_read;
        self.bytes_read = now.bytes_read;
        self.read_failures = now.read_failures;
        self.blocks_corrupt = now.corrupt;
        self.blocks_dropped = now.dropped;
        self.leases_waited = now.leases_waited;
        self.leases_cut_short = now.leases_cut_short;
        self.leases_ahead = now.leases_ahead;
    }

    pub(super) fn print(&self, out: &mut impl io::Write) -> io::Result<()> {
        if self.directories.is_empty() {
            return Ok(());
        }
        writeln!(out, "tier ssd, {}", safe(&self.mode))?;
        for it in &self.directories {
            it.print(out)?;
        }
        writeln!(
            out,
            "  blocks      {} can be found, {} of tenants that have not attached, {} dropped",
            self.records, self.hidden_records, self.blocks_dropped
        )?;
        writeln!(
            out,
            "  written     {} blocks, {}; {} waiting, {} left the pool before, {} failed",
            self.blocks_written,
            approximate(self.bytes_written),
            self.writes_waiting,
            self.blocks_unwritten,
            self.write_failures
        )?;
        writeln!(
            out,
            "  read        {} blocks, {}; {} failed, of these {} damaged",
            self.blocks_read,
            approximate(self.bytes_read),
            self.read_failures,
            self.blocks_corrupt
        )?;
        writeln!(
            out,
            "  waited for  by {} lookups, {} of them cut short; {} answered while blocks were still to be read",
            self.leases_waited, self.leases_cut_short, self.leases_ahead
        )
    }
}

impl SsdDirectoryStatus {
    fn print(&self, out: &mut impl io::Write) -> io::Result<()> {
        let path = safe(&self.path);
        if self.engine.is_empty() {
            return writeln!(out, "  {path}  being recovered");
        }
        let mut line = format!(
            "{path}  {} of {} used, {} blocks, {} segments of {}, {}",
            approximate(self.used_bytes),
            approximate(self.capacity_bytes),
            self.records,
            self.segments,
            approximate(self.segment_bytes),
            safe(&self.engine)
        );
        if let Some(why) = &self.refused {
            line += &format!(" ({})", safe(why));
        }
        if self.retired > 0 {
            line += &format!("; {} segments RETIRED after errors", self.retired);
        }
        if self.read_only {
            line += "; READ ONLY after too many errors";
        }
        writeln!(out, "  {line}")
    }
}
