//! What `pillion status` is told, from the driver's state.

use std::path::PathBuf;

use pillion_core::Role;
use pillion_ssd::tier::Started;

use crate::{
    driver::{Driver, View},
    neighbours,
    session::Shared,
    status::{
        NeighbourStatus, RegistrationStatus, SessionStatus, SidecarStatus, SsdDirectoryStatus, SsdStatus,
        StatusReport,
    },
};

/// The report as JSON.
pub fn json(driver: &Driver, shared: &Shared) -> String {
    let report = StatusReport {
        sidecar: SidecarStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            supervisor_pid: rustix::process::getppid()
                .map_or(0, |pid| pid.as_raw_nonzero().get().unsigned_abs()),
            generation: driver.generation().iter().map(|byte| format!("{byte:02x}")).collect(),
            uptime_seconds: shared.started.elapsed().as_secs(),
            device: shared.config.device.clone(),
            socket: shared.socket.display().to_string(),
            http: shared.http.map(|address| address.to_string()),
            ..SidecarStatus::default()
        },
        sessions: driver.views().map(|(id, view, way, jobs)| session(id.0, view, way, jobs)).collect(),
        ssd: ssd(driver, shared),
        neighbours: driver.neighbours.views().into_iter().map(neighbour).collect(),
        ..StatusReport::default()
    };
    report.with_counters(&driver.counters()).to_json()
}

fn neighbour(view: neighbours::View) -> NeighbourStatus {
    NeighbourStatus { device: view.device, pool_bytes: view.pool_bytes, tenants: view.tenants as u64 }
}

fn ssd(driver: &Driver, shared: &Shared) -> SsdStatus {
    let Some((directories, view)) = driver.ssd().map(|ssd| ssd.view()) else { return SsdStatus::default() };
    let directory = |(index, (path, started)): (usize, &(PathBuf, Option<Started>))| {
        let shelf = view.shelves.get(index).copied().unwrap_or_default();
        SsdDirectoryStatus {
            path: path.display().to_string(),
            engine: started.as_ref().map_or("", |how| how.engine).to_owned(),
            refused: started.as_ref().and_then(Started::shortfall),
            capacity_bytes: shelf.capacity_bytes,
            used_bytes: shelf.used_bytes,
            records: shelf.records,
            segments: shelf.segments.into(),
            segment_bytes: started.as_ref().map_or(0, |how| how.superblock.segment_bytes),
            retired: shelf.retired.into(),
            read_only: shelf.is_read_only,
        }
    };
    SsdStatus {
        mode: shared.config.ssd_cache_mode.clone(),
        directories: directories.iter().enumerate().map(directory).collect(),
        ..SsdStatus::default()
    }
}

fn session(id: u64, view: &View, way: &str, jobs: usize) -> SessionStatus {
    let role = match view.role {
        Role::Scheduler => "scheduler",
        Role::Worker => "worker",
        Role::Observer => "observer",
        Role::Neighbour => "neighbour",
    };
    let registration = view.layout.as_ref().filter(|_| !way.is_empty()).map(|layout| RegistrationStatus {
        path: way.to_owned(),
        layout: layout.clone(),
        blocks: view.num_blocks,
        groups: view.groups.clone(),
        canary: view.canary.unwrap_or_default().to_owned(),
    });
    SessionStatus {
        id,
        role: role.to_owned(),
        pid: view.peer.pid as u32,
        uid: view.peer.uid,
        tenant: view.tenant.to_string(),
        engine_id: view.engine.to_string(),
        attached_seconds: view.since.elapsed().as_secs(),
        jobs: jobs as u64,
        registration,
        refused: view.refused.clone(),
    }
}
