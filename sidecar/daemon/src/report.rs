//! What `pillion status` is told, from the driver's state.

use pillion_core::Role;

use crate::{
    driver::{Driver, View},
    session::Shared,
    status::{RegistrationStatus, SessionStatus, SidecarStatus, StatusReport},
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
        ..StatusReport::default()
    };
    report.with_counters(&driver.counters()).to_json()
}

fn session(id: u64, view: &View, way: &str, jobs: usize) -> SessionStatus {
    let role = match view.role {
        Role::Scheduler => "scheduler",
        Role::Worker => "worker",
        Role::Observer => "observer",
    };
    let registration = view.layout.as_ref().filter(|_| !way.is_empty()).map(|layout| RegistrationStatus {
        path: way.to_owned(),
        layout: layout.clone(),
        blocks: view.num_blocks,
        block_bytes: view.record_bytes.clone(),
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
