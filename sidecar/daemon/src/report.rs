//! What `pillion status` is told, from the driver's state.

use pillion_core::Role;
use serde_json::json;

use crate::{driver::Driver, session::Shared};

/// The report as JSON.
pub fn json(driver: &Driver, shared: &Shared) -> String {
    let counters = driver.counters();
    let sessions: Vec<_> = driver
        .views()
        .map(|(id, view, way, jobs)| {
            json!({
                "session": id.0,
                "role": match view.role {
                    Role::Scheduler => "scheduler",
                    Role::Worker => "worker",
                    Role::Observer => "observer",
                },
                "pid": view.peer.pid,
                "uid": view.peer.uid,
                "tenant": &*view.tenant,
                "engine": &*view.engine,
                "seconds": view.since.elapsed().as_secs(),
                "way": way,
                "layout": view.layout,
                "blocks": view.num_blocks,
                "record_bytes": view.record_bytes,
                "canary": view.canary,
                "refused": view.refused,
                "jobs": jobs,
            })
        })
        .collect();
    let generation: String = driver.generation().iter().map(|byte| format!("{byte:02x}")).collect();
    json!({
        "sidecar": {
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "generation": generation,
            "uptime_seconds": shared.started.elapsed().as_secs(),
            "http": shared.http.map(|address| address.to_string()),
            "device": shared.config.device,
            "socket": shared.socket,
            "restarts": counters.worker_restarts,
        },
        "pool": {
            "bytes": counters.pool_bytes,
            "used_bytes": counters.record_bytes,
            "leased_bytes": counters.leased_bytes,
            "records": counters.records,
        },
        "leases": counters.leases,
        "jobs": counters.jobs,
        "blocks_loaded": counters.blocks_loaded,
        "blocks_saved": counters.blocks_saved,
        "loads_failed": counters.loads_failed,
        "saves_revoked": counters.saves_revoked,
        "evictions": counters.evictions,
        "checksum_failures": counters.checksum_failures,
        "identity_mismatches": counters.identity_mismatches,
        "protocol_errors": counters.protocol_errors,
        "sessions": sessions,
    })
    .to_string()
}
