//! What `pillion status` shows. The sidecar sends a [`StatusReport`] as JSON over
//! its socket; there is no HTTP route for it.
//!
//! A report of another version still reads: fields that it lacks are zero or
//! empty, fields that we do not know are left out.

mod neighbours;
mod print;
mod ssd;

use std::io;

use serde::{Deserialize, Serialize};

use crate::metrics::CoreCounters;

pub use neighbours::{NeighbourBlocks, NeighbourStatus};
pub use print::print;
pub use ssd::{SsdDirectoryStatus, SsdStatus};

/// Refusals that a report keeps, newest last.
pub const REFUSALS_MAX: usize = 16;

/// One sidecar at one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StatusReport {
    /// The process.
    pub sidecar: SidecarStatus,
    /// The host pool.
    pub pool: PoolStatus,
    /// Attached sessions, oldest first.
    pub sessions: Vec<SessionStatus>,
    /// Who was refused of late, at most [`REFUSALS_MAX`].
    pub refused: Vec<RefusedStatus>,
    /// Leases.
    pub leases: LeaseStatus,
    /// Loads and saves.
    pub jobs: JobStatus,
    /// The tiers of blocks that engines load from: the host pool.
    pub tiers: Vec<TierStatus>,
    /// The SSD behind it.
    pub ssd: SsdStatus,
    /// Sidecars of this node that lend to this one.
    pub neighbours: Vec<NeighbourStatus>,
    /// Blocks between them.
    pub neighbour_blocks: NeighbourBlocks,
    /// What should never happen, counted since the start.
    pub faults: FaultStatus,
}

/// The process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SidecarStatus {
    /// Its version.
    pub version: String,
    /// The worker's process id.
    pub pid: u32,
    /// The supervisor's process id.
    pub supervisor_pid: u32,
    /// This boot, 32 hex digits.
    pub generation: String,
    /// Age of this boot.
    pub uptime_seconds: u64,
    /// Restarts by the supervisor.
    pub worker_restarts: u64,
    /// Whether SIGTERM has come.
    pub draining: bool,
    /// The device it serves.
    pub device: String,
    /// Its socket.
    pub socket: String,
    /// Address of `/metrics`, unless it is off.
    pub http: Option<String>,
}

/// The host pool.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PoolStatus {
    /// Its size.
    pub bytes: u64,
    /// Bytes that records take.
    pub used_bytes: u64,
    /// Bytes that leases and jobs keep from eviction.
    pub leased_bytes: u64,
    /// Records in it.
    pub records: u64,
}

/// One attached session.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SessionStatus {
    /// Its number.
    pub id: u64,
    /// scheduler, worker or observer.
    pub role: String,
    /// The peer's process.
    pub pid: u32,
    /// The peer's user.
    pub uid: u32,
    /// Its tenant.
    pub tenant: String,
    /// Which engine instance.
    pub engine_id: String,
    /// How long it has been attached.
    pub attached_seconds: u64,
    /// Jobs that have not quiesced.
    pub jobs: u64,
    /// What a worker registered.
    pub registration: Option<RegistrationStatus>,
    /// Why its registration was refused: it stays attached and runs uncached.
    pub refused: Option<String>,
}

/// What a worker registered.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RegistrationStatus {
    /// The way to its memory: memfd or process_vm.
    pub path: String,
    /// Physical order of its KV cache, such as LBHNC.
    pub layout: String,
    /// Blocks of its KV cache.
    pub blocks: u64,
    /// Its KV cache groups.
    pub groups: Vec<GroupStatus>,
    /// How the layout was proved: "compared", or "presented" at a re-attachment.
    pub canary: String,
}

/// A KV cache group of a worker, as its namespace names it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GroupStatus {
    /// What its layers are, such as `SlidingWindowSpec window=80 …`.
    pub kind: String,
    /// Which of the different parts of a block this rank holds, such as 1/2.
    pub shard: String,
    /// Tokens of a block.
    pub block_tokens: String,
    /// Bytes of a stored block.
    pub block_bytes: u64,
    /// Shards that engines of other tensor-parallel sizes store and that this rank can load its part of.
    pub also_loads: Vec<String>,
}

impl GroupStatus {
    /// Of a registration: its groups, and what else they load.
    pub fn of_all(groups: &[pillion_core::Group]) -> Vec<Self> {
        let (others, own): (Vec<_>, Vec<_>) = groups.iter().partition(|group| group.load_only);
        let with_others = |group: &pillion_core::Group| {
            let shard = |other: &&pillion_core::Group| other.namespace.field("shard").map(str::to_owned);
            let alike = |other: &&&pillion_core::Group| other.namespace.is_shard_of(&group.namespace);
            Self { also_loads: others.iter().filter(alike).filter_map(shard).collect(), ..Self::of(group) }
        };
        own.into_iter().map(with_others).collect()
    }

    fn of(group: &pillion_core::Group) -> Self {
        let field = |name| group.namespace.field(name).unwrap_or_default().to_owned();
        Self {
            kind: field("group"),
            shard: field("shard"),
            block_tokens: field("block_tokens"),
            block_bytes: group.record_bytes,
            also_loads: Vec::new(),
        }
    }
}

/// A peer that was sent away.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RefusedStatus {
    /// How long ago.
    pub seconds_ago: u64,
    /// Its role, if it came to say it.
    pub role: String,
    /// The peer's process.
    pub pid: u32,
    /// The peer's user.
    pub uid: u32,
    /// Why, as it was told.
    pub reason: String,
}

/// Leases.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LeaseStatus {
    /// Held now.
    pub held: u64,
    /// Granted since the start.
    pub granted: u64,
    /// Requests that found nothing.
    pub empty: u64,
    /// Requests beyond a limit.
    pub refused: u64,
    /// Ran out without a release.
    pub expired: u64,
}

/// Loads and saves.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct JobStatus {
    /// Not quiesced yet.
    pub running: u64,
    /// Of these, waiting for a copy thread.
    pub waiting: u64,
    /// Loads by outcome.
    pub loads: Outcomes,
    /// Saves by outcome.
    pub saves: Outcomes,
    /// Saves that engines took back.
    pub saves_revoked: u64,
    /// Reported as failed at their deadline.
    pub deadline_misses: u64,
}

/// How jobs ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Outcomes {
    /// Well.
    pub done: u64,
    /// Not.
    pub failed: u64,
    /// Given up.
    pub cancelled: u64,
}

/// One tier's counters since the start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TierStatus {
    /// host.
    pub name: String,
    /// Blocks in lease requests that were leased.
    pub blocks_hit: u64,
    /// Blocks in lease requests that were not.
    pub blocks_missed: u64,
    /// Blocks loaded into engines.
    pub blocks_loaded: u64,
    /// Their bytes.
    pub bytes_loaded: u64,
    /// Blocks saved from engines.
    pub blocks_saved: u64,
    /// Their bytes.
    pub bytes_saved: u64,
    /// Blocks of saves that were stored already.
    pub blocks_duplicate: u64,
    /// Blocks of saves for which there was no room.
    pub blocks_without_room: u64,
    /// Blocks evicted.
    pub blocks_evicted: u64,
}

/// What should never happen.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FaultStatus {
    /// Stored blocks whose bytes had changed.
    pub checksum_failures: u64,
    /// Jobs whose namespace or digest did not match.
    pub identity_mismatches: u64,
    /// Messages that no correct client sends.
    pub protocol_errors: u64,
}

impl StatusReport {
    /// Fills everything that the counters know; sessions and process are the caller's.
    pub fn with_counters(mut self, now: &CoreCounters) -> Self {
        self.neighbour_blocks = NeighbourBlocks::of(&now.neighbours);
        self.pool = PoolStatus {
            bytes: now.pool_bytes,
            used_bytes: now.record_bytes,
            leased_bytes: now.leased_bytes,
            records: now.records,
        };
        self.leases = LeaseStatus {
            held: now.leases,
            granted: now.leases_granted,
            empty: now.leases_empty,
            refused: now.leases_refused,
            expired: now.leases_expired,
        };
        self.jobs = JobStatus {
            running: now.jobs,
            waiting: now.copy_queue,
            loads: Outcomes {
                done: now.loads_done,
                failed: now.loads_failed,
                cancelled: now.loads_cancelled,
            },
            saves: Outcomes {
                done: now.saves_done,
                failed: now.saves_failed,
                cancelled: now.saves_cancelled,
            },
            saves_revoked: now.saves_revoked,
            deadline_misses: now.deadline_misses,
        };
        self.tiers = vec![TierStatus {
            name: "host".to_owned(),
            blocks_hit: now.lease_blocks_hit,
            blocks_missed: now.lease_blocks_asked.saturating_sub(now.lease_blocks_hit),
            blocks_loaded: now.blocks_loaded,
            bytes_loaded: now.bytes_loaded,
            blocks_saved: now.blocks_saved,
            bytes_saved: now.bytes_saved,
            blocks_duplicate: now.blocks_deduplicated,
            blocks_without_room: now.blocks_without_room,
            blocks_evicted: now.evictions,
        }];
        self.ssd.set(&now.ssd);
        self.faults = FaultStatus {
            checksum_failures: now.checksum_failures,
            identity_mismatches: now.identity_mismatches,
            protocol_errors: now.protocol_errors,
        };
        self.sidecar.worker_restarts = now.worker_restarts;
        self
    }

    /// The bytes that go over the socket.
    pub fn to_json(&self) -> String {
        // A struct of numbers and strings always serializes.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads what came over the socket.
    pub fn from_json(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// For `pillion status --json`.
    pub fn write_json(&self, out: &mut impl io::Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut *out, self)?;
        out.write_all(b"\n")
    }
}

/// Bytes for people: three digits are enough.
fn approximate(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| bytes >> shift > 0) {
        Some((name, shift)) => format!("{:.1} {name}", bytes as f64 / (1u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests;
