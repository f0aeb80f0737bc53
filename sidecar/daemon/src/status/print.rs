//! The report for people.

use std::io;

use super::{Outcomes, SessionStatus, StatusReport, TierStatus, approximate};

/// Writes the report as text.
pub fn print(report: &StatusReport, out: &mut impl io::Write) -> io::Result<()> {
    sidecar(report, out)?;
    pool(report, out)?;
    sessions(report, out)?;
    work(report, out)?;
    report.tiers.iter().try_for_each(|tier| self::tier(tier, out))?;
    report.ssd.print(out)?;
    super::neighbours::print(&report.neighbours, &report.neighbour_blocks, out)?;
    faults(report, out)
}

fn sidecar(report: &StatusReport, out: &mut impl io::Write) -> io::Result<()> {
    let it = &report.sidecar;
    let state = if it.draining { "draining" } else { "serving" };
    writeln!(out, "pillion {}, {state} {}", safe(&it.version), safe(&it.device))?;
    let (up, restarts) = (duration(it.uptime_seconds), it.worker_restarts);
    writeln!(
        out,
        "  process     {} (supervisor {}), up {up}, restarts {restarts}",
        it.pid, it.supervisor_pid
    )?;
    writeln!(out, "  generation  {}", safe(&it.generation))?;
    writeln!(out, "  socket      {}", safe(&it.socket))?;
    match &it.http {
        Some(address) => writeln!(out, "  http        http://{}/metrics", safe(address)),
        None => writeln!(out, "  http        off"),
    }
}

fn pool(report: &StatusReport, out: &mut impl io::Write) -> io::Result<()> {
    let it = &report.pool;
    writeln!(
        out,
        "  pool        {} of {} used ({}), {} blocks, {} leased",
        approximate(it.used_bytes),
        approximate(it.bytes),
        share(it.used_bytes, it.bytes),
        it.records,
        approximate(it.leased_bytes),
    )
}

fn sessions(report: &StatusReport, out: &mut impl io::Write) -> io::Result<()> {
    writeln!(out, "sessions      {}", report.sessions.len())?;
    for session in &report.sessions {
        writeln!(out, "  {}", session_line(session))?;
        let groups = session.registration.iter().flat_map(|memory| &memory.groups);
        groups.enumerate().try_for_each(|(index, group)| {
            let bytes = approximate(group.block_bytes);
            // A client that is no engine of ours may name its namespace as it likes.
            let said =
                [("", &group.kind), ("shard ", &group.shard), ("tokens a block ", &group.block_tokens)];
            let said = said.into_iter().filter(|(_, text)| !text.is_empty());
            let said: String = said.map(|(what, text)| format!("{what}{}; ", safe(text))).collect();
            let also = match group.also_loads.as_slice() {
                [] => String::new(),
                shards => format!("; loads its part of shards {}, too", safe(&shards.join(" "))),
            };
            writeln!(out, "    group {index}: {said}blocks of {bytes}{also}")
        })?;
    }
    if report.refused.is_empty() {
        return Ok(());
    }
    writeln!(out, "refused of late")?;
    for it in &report.refused {
        let (ago, role, reason) = (duration(it.seconds_ago), safe(&it.role), safe(&it.reason));
        writeln!(out, "  {ago} ago: {role} pid {} uid {}: {reason}", it.pid, it.uid)?;
    }
    Ok(())
}

fn session_line(it: &SessionStatus) -> String {
    let (role, tenant, engine) = (safe(&it.role), safe(&it.tenant), safe(&it.engine_id));
    let mut line = format!(
        "{role:<9} pid {} uid {} tenant {tenant} engine {engine}, for {}, {} jobs running",
        it.pid,
        it.uid,
        duration(it.attached_seconds),
        it.jobs
    );
    if let Some(memory) = &it.registration {
        let (path, layout, canary) = (safe(&memory.path), safe(&memory.layout), safe(&memory.canary));
        line += &format!("; {path} {layout}, {} blocks, canary {canary}", memory.blocks);
    }
    if let Some(reason) = &it.refused {
        line += &format!("; REFUSED, runs uncached: {}", safe(reason));
    }
    line
}

fn work(report: &StatusReport, out: &mut impl io::Write) -> io::Result<()> {
    let it = &report.leases;
    writeln!(
        out,
        "leases        {} held; {} granted, {} empty, {} refused, {} expired",
        it.held, it.granted, it.empty, it.refused, it.expired
    )?;
    let it = &report.jobs;
    writeln!(
        out,
        "jobs          {} running, {} waiting; {} past their deadline",
        it.running, it.waiting, it.deadline_misses
    )?;
    writeln!(out, "  loads       {}", outcomes(it.loads))?;
    writeln!(out, "  saves       {}, {} revoked", outcomes(it.saves), it.saves_revoked)
}

fn outcomes(it: Outcomes) -> String {
    format!("{} done, {} failed, {} cancelled", it.done, it.failed, it.cancelled)
}

fn tier(it: &TierStatus, out: &mut impl io::Write) -> io::Result<()> {
    let asked = it.blocks_hit.saturating_add(it.blocks_missed);
    writeln!(out, "tier {}", safe(&it.name))?;
    writeln!(out, "  lookups     {} of {asked} blocks hit ({})", it.blocks_hit, share(it.blocks_hit, asked))?;
    writeln!(out, "  loaded      {} blocks, {}", it.blocks_loaded, approximate(it.bytes_loaded))?;
    writeln!(
        out,
        "  saved       {} blocks, {}; {} stored already, {} without room",
        it.blocks_saved,
        approximate(it.bytes_saved),
        it.blocks_duplicate,
        it.blocks_without_room
    )?;
    writeln!(out, "  evicted     {} blocks", it.blocks_evicted)
}

fn faults(report: &StatusReport, out: &mut impl io::Write) -> io::Result<()> {
    let it = &report.faults;
    writeln!(
        out,
        "faults        {} checksum failures, {} identity mismatches, {} protocol errors",
        it.checksum_failures, it.identity_mismatches, it.protocol_errors
    )
}

fn share(part: u64, whole: u64) -> String {
    if whole == 0 { "–".to_owned() } else { format!("{:.0} %", 100.0 * part as f64 / whole as f64) }
}

fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, ..) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// Peers choose some of these strings; a terminal must not obey them.
pub(super) fn safe(text: &str) -> String {
    let shown = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().take(200).map(shown).collect()
}
