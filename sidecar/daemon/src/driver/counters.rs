//! What the driver counts, in the words of status reports and metrics.

use pillion_core::{Counters, Direction, Outcome, Role};

use super::{Driver, Mover};
use crate::{
    metrics::{self, CoreCounters, LabelValue, NeighbourCounters, SsdCounters, SsdEngine},
    ssd::Ssd,
};

impl Driver {
    fn ssd_counters(&self, core: &Counters) -> SsdCounters {
        let (places, view) = self.ssd.as_ref().map(Ssd::view).unwrap_or_default();
        let started = || places.iter().filter_map(|(_, started)| started.as_ref());
        let registered = started().filter_map(|how| how.registered.as_ref()).map(|it| it.bytes());
        let with = |engine: &SsdEngine| started().filter(|how| how.engine == engine.text()).count() as u64;
        SsdCounters {
            records: core.ssd_records,
            hidden_records: core.ssd_records_hidden,
            used_bytes: view.shelves.iter().map(|shelf| shelf.used_bytes).sum(),
            capacity_bytes: view.shelves.iter().map(|shelf| shelf.capacity_bytes).sum(),
            writes_waiting: core.ssd_writes_waiting,
            blocks_written: core.ssd_blocks_written,
            bytes_written: core.ssd_bytes_written,
            blocks_read: core.ssd_blocks_read,
            bytes_read: core.ssd_bytes_read,
            unwritten: core.ssd_not_written,
            write_failures: core.ssd_writes_failed,
            read_failures: core.ssd_reads_failed,
            corrupt: core.ssd_corrupt,
            dropped: core.ssd_dropped,
            leases_waited: core.leases_waited,
            leases_cut_short: core.leases_cut_short,
            leases_ahead: core.leases_ahead,
            retired_segments: view.shelves.iter().map(|shelf| u64::from(shelf.retired)).sum(),
            read_only_directories: view.shelves.iter().filter(|shelf| shelf.is_read_only).count() as u64,
            directories: std::array::from_fn(|at| with(&SsdEngine::ALL[at])),
            registered_bytes: registered.min().unwrap_or_default(),
        }
    }

    /// Totals and levels.
    pub fn counters(&self) -> CoreCounters {
        let core = self.core.counters();
        let roles = |role| self.sessions.values().filter(|live| live.view.role == role).count() as u64;
        let movers = || self.sessions.values().filter_map(|live| live.mover.as_ref());
        let mut workers = [0; metrics::Path::ALL.len()];
        for (path, count) in metrics::Path::ALL.iter().zip(&mut workers) {
            *count = movers().filter(|mover| mover.way() == path.text()).count() as u64;
        }
        CoreCounters {
            records: core.records,
            record_bytes: core.record_bytes,
            pool_bytes: self.pool_bytes,
            leased_bytes: core.pinned_bytes,
            leases: core.leases,
            scheduler_sessions: roles(Role::Scheduler),
            worker_sessions: roles(Role::Worker),
            observer_sessions: roles(Role::Observer),
            workers,
            jobs: core.jobs,
            copy_queue: (self.copiers.waiting() + movers().map(Mover::waiting).sum::<usize>()) as u64,
            lease_blocks_asked: core.lease_blocks_asked,
            lease_blocks_hit: core.lease_blocks_hit,
            leases_granted: core.leases_granted,
            leases_empty: core.leases_empty,
            leases_refused: core.leases_refused,
            leases_expired: core.leases_expired,
            loads_done: core.loads_done,
            loads_failed: core.loads_failed,
            loads_cancelled: core.loads_cancelled,
            saves_done: core.saves_done,
            saves_failed: core.saves_failed,
            saves_cancelled: core.saves_cancelled,
            saves_revoked: core.saves_revoked,
            blocks_loaded: core.blocks_loaded,
            blocks_saved: core.blocks_saved,
            bytes_loaded: core.bytes_loaded,
            bytes_saved: core.bytes_saved,
            blocks_deduplicated: core.blocks_deduplicated,
            blocks_without_room: core.blocks_without_room,
            evictions: core.evictions,
            checksum_failures: core.checksum_failures,
            identity_mismatches: core.identity_mismatches,
            deadline_misses: core.deadline_misses,
            protocol_errors: core.protocol_errors,
            worker_restarts: self.restarts,
            ssd: self.ssd_counters(&core),
            neighbours: NeighbourCounters {
                neighbours: self.neighbours.ids().count() as u64,
                held: core.neighbour_blocks_here,
                asked: core.neighbour_blocks_asked,
                borrowed: core.neighbour_blocks_borrowed,
                lent: core.neighbour_blocks_lent,
            },
        }
    }
}

pub(super) fn metrics_direction(direction: Direction) -> metrics::Direction {
    match direction {
        Direction::Load => metrics::Direction::Load,
        Direction::Save => metrics::Direction::Save,
    }
}

pub(super) fn metrics_outcome(outcome: Outcome) -> Option<metrics::Outcome> {
    match outcome {
        Outcome::AlreadyReported => None,
        Outcome::Done => Some(metrics::Outcome::Done),
        Outcome::Failed => Some(metrics::Outcome::Failed),
        Outcome::Cancelled => Some(metrics::Outcome::Cancelled),
    }
}
