//! What must hold of a sidecar, whatever happens to it.

use pillion_core::{CacheMode, CopyItem, Direction, Event, JobId, Outcome, SessionId};

use super::Boot;
use crate::{
    oracle::Hash,
    pool::{Cell, middle, word_of},
    world::World,
};

/// A job as it was accepted (I2).
#[derive(Debug)]
pub(super) struct Accepted {
    direction: Direction,
    deadline: u64,
    reported: bool,
    /// Of a save, per block: the key that it is stored under, and what is meant to be there.
    wanted: Vec<(u64, [u8; 32], Cell)>,
    /// Of a save: where its records lie, how long they are, and which of `wanted` each is.
    places: Vec<(u64, u64, usize)>,
}

impl Boot {
    /// Whether the record at this place is of a save that goes on.
    pub(super) fn is_being_saved(&self, at: u64) -> bool {
        let mut places = self.jobs.values().flat_map(|job| &job.places);
        places.any(|(offset, bytes, _)| (*offset..offset + bytes).contains(&at))
    }
}

impl World {
    /// Notes what the core is about to accept.
    pub(super) fn accept(&mut self, sidecar: usize, event: &Event) {
        let (session, job, direction, deadline) = match event {
            Event::Save { session, job, deadline_ns, .. } => (*session, *job, Direction::Save, *deadline_ns),
            Event::Load { session, job, deadline_ns, .. } => (*session, *job, Direction::Load, *deadline_ns),
            _ => return,
        };
        let mut wanted = Vec::new();
        if let Event::Save { runs, hashes, blocks, .. } = event {
            let spaces = runs.iter().flat_map(|run| std::iter::repeat_n(run.space, run.count as usize));
            for (space, (hash, block)) in spaces.zip(hashes.iter().zip(blocks)) {
                let meant = self.oracle.means(space, hash);
                wanted.extend(meant.map(|(key, cell): (Hash, Cell)| (u64::from(*block), key, cell)));
            }
        }
        let Some(boot) = self.boot(sidecar) else { return };
        let accepted = Accepted { direction, deadline, reported: false, wanted, places: Vec::new() };
        boot.jobs.insert((session, job), accepted);
    }

    /// Where a save's records will lie.
    pub(super) fn note_places(&mut self, sidecar: usize, session: SessionId, job: JobId, items: &[CopyItem]) {
        let scale = self.plan.scale;
        let Some(boot) = self.boot(sidecar) else { return };
        let Some(live) = boot.sessions.get(&session) else { return };
        let Some(accepted) = boot.jobs.get_mut(&(session, job)) else { return };
        for item in items {
            let wanted = accepted.wanted.iter().position(|(block, ..)| *block == item.block);
            let bytes = live.record_bytes.get(usize::from(item.group));
            if let Some((wanted, bytes)) = wanted.zip(bytes) {
                let offset = item.offset / scale;
                boot.rotten.remove(&offset);
                accepted.places.push((offset, *bytes, wanted));
            }
        }
    }

    /// I4: a save that is about to be published holds exactly what it was to hold.
    pub(super) fn check_published(&mut self, sidecar: usize, session: SessionId, job: JobId) {
        let Some(boot) = self.boot(sidecar) else { return };
        let Some(accepted) = boot.jobs.get(&(session, job)) else { return };
        let (mut wrong, mut blocks) = (None, 0);
        for (offset, bytes, wanted) in &accepted.places {
            let (_, key, cell) = &accepted.wanted[*wanted];
            let mut page = vec![0; *bytes as usize];
            boot.pool.read(*offset, &mut page);
            let (first, second) = page.split_at(middle(page.len()));
            let found = [word_of(first), word_of(second)];
            if found != *cell && !boot.rotten.contains(offset) {
                wrong = Some(format!("{job:?} publishes {found:x?} as {key:02x?}, expected {cell:x?}"));
            }
            blocks += 1;
        }
        if accepted.places.is_empty() {
            wrong = Some(format!("{job:?} publishes what nobody copied"));
        }
        self.net.saw("blocks published and compared", blocks);
        if let Some(wrong) = wrong {
            self.net.broken("I4", || wrong);
        }
    }

    /// I2: one outcome, one quiescence, in this order or at once. I7: what is acknowledged is promised.
    pub(super) fn check_completed(
        &mut self,
        sidecar: usize,
        session: SessionId,
        job: JobId,
        outcome: Outcome,
        quiesced: bool,
    ) {
        let usual = self.plan.ssd.as_ref().map(|ssd| ssd.mode);
        let Some(boot) = self.boot(sidecar) else { return };
        let asked = boot.sessions.get(&session).and_then(|live| live.cache_mode);
        let through = usual.is_some_and(|usual| asked.unwrap_or(usual) == CacheMode::WriteThrough);
        let boot_id = boot.id;
        let Some(accepted) = boot.jobs.get_mut(&(session, job)) else {
            return self.net.broken("I2", || format!("{job:?} ends and does not run: {outcome:?}"));
        };
        let (before, says) = (accepted.reported, outcome != Outcome::AlreadyReported);
        accepted.reported |= says;
        let is_right = before != says && (quiesced || says);
        let copies = boot.copies.values().filter(|copy| (copy.session, copy.job) == (session, job)).count();
        let mut promised = Vec::new();
        if outcome == Outcome::Done && accepted.direction == Direction::Save && through {
            promised = accepted.places.iter().map(|(.., wanted)| accepted.wanted[*wanted].1).collect();
        }
        if quiesced {
            boot.jobs.remove(&(session, job));
        }
        if !is_right {
            self.net.broken("I2", || {
                format!("{job:?}: {outcome:?}, quiesced: {quiesced}; reported before: {before}")
            });
        }
        if quiesced && copies > 0 {
            self.net.broken("I3", || format!("{job:?} has quiesced, and its copy runs"));
        }
        self.net.saw("blocks acknowledged as durable", promised.len() as u64);
        let disk = self.oracle.disk(sidecar);
        if !disk.lied {
            let there = promised.into_iter().filter(|key| !disk.gone.contains(key));
            disk.promised.extend(there.map(|key| (key, boot_id)));
        }
    }

    /// I8, and I2's deadline: what is bounded, after every event.
    pub(super) fn check_bounds(&mut self, sidecar: usize, is_tick: bool) {
        let now = self.net.now;
        let Some(boot) = self.boot(sidecar) else { return };
        let counters = boot.core.counters();
        let limits = &boot.limits;
        let mut wrong = None;
        let mut bound = |what: &'static str, found: u64, most: u64| {
            if found > most {
                wrong = Some(("I8", format!("{what}: {found}, at most {most}")));
            }
        };
        bound("bytes of the pool", counters.record_bytes, limits.pool_bytes);
        bound("leases", counters.leases, limits.leases_max as u64);
        let mut pinned_max = limits.pinned_bytes_max;
        if let Some(ssd) = &limits.ssd {
            let known = counters.ssd_records + counters.ssd_records_hidden;
            bound("records on the SSD", known, ssd.records_max as u64);
            // What is written to the SSD is pinned, too; one that is waited for is pinned before its turn.
            let modes = boot.sessions.values().filter_map(|live| live.cache_mode).chain([ssd.mode]);
            let waits = modes.into_iter().any(|mode| mode == CacheMode::WriteThrough);
            let waited_for = if waits { limits.pool_bytes } else { 0 };
            pinned_max += ssd.put_bytes_max.max(boot.record_bytes_max) + waited_for;
        }
        bound("pinned bytes", counters.pinned_bytes, pinned_max);
        let jobs_max = limits.session_jobs_max as u64;
        if is_tick {
            boot.core.check_invariants();
            let most = boot.core.sessions().map(|session| session.jobs as u64).max().unwrap_or(0);
            bound("jobs of a session", most, jobs_max);
            let listens = |session: &SessionId| boot.sessions.get(session).is_some_and(|live| !live.ended);
            let is_late = |job: &Accepted| !job.reported && job.deadline <= now;
            let late = boot.jobs.iter().find(|((session, _), job)| is_late(job) && listens(session));
            if let Some(((_, job), accepted)) = late {
                wrong = Some(("I2", format!("{job:?} is not reported {} ns late", now - accepted.deadline)));
            }
        }
        if let Some((invariant, text)) = wrong {
            self.net.broken(invariant, || format!("sidecar {sidecar}: {text}"));
        }
    }

    /// What a boot has seen, when it ends: coverage.
    pub(super) fn count(&mut self, boot: &Boot) {
        let counters = boot.core.counters();
        let seen = [
            ("leases refused", counters.leases_refused),
            ("leases expired", counters.leases_expired),
            ("leases that waited", counters.leases_waited),
            ("leases cut short", counters.leases_cut_short),
            ("identities that did not match", counters.identity_mismatches),
            ("deadlines that a sidecar saw pass", counters.deadline_misses),
            ("blocks saved already", counters.blocks_deduplicated),
            ("blocks without room", counters.blocks_without_room),
            ("evictions from pools", counters.evictions),
            ("blocks not written to the SSD", counters.ssd_not_written),
            ("writes to the SSD failed", counters.ssd_writes_failed),
            ("reads from the SSD failed", counters.ssd_reads_failed),
        ];
        seen.into_iter().for_each(|(what, times)| self.net.saw(what, times));
    }

    /// When all that a sidecar was asked for has ended, nothing of it is left.
    pub(crate) fn check_idle(&mut self, sidecar: usize) {
        let Some(boot) = self.boot(sidecar) else { return };
        let counters = boot.core.counters();
        let tier = |bit: u8| boot.shown.values().filter(|tiers| **tiers & bit != 0).count() as u64;
        let left = [
            ("jobs", counters.jobs, 0),
            ("leases", counters.leases, 0),
            ("pinned bytes", counters.pinned_bytes, 0),
            ("borrows", counters.borrows, 0),
            ("borrowed records", counters.neighbour_blocks_here, 0),
            ("jobs that were accepted", boot.jobs.len() as u64, 0),
            ("copies", boot.copies.len() as u64, 0),
            ("sessions of engines", boot.busy().0 as u64, 0),
            ("records shown in the pool", tier(pillion_core::TIER_HOST), counters.records),
            ("records shown on the SSD", tier(pillion_core::TIER_SSD), counters.ssd_records),
        ];
        if let Some((what, found, wanted)) = left.iter().find(|(_, found, wanted)| found != wanted) {
            let text = format!("sidecar {sidecar}: {what}: {found}, expected {wanted}");
            self.net.broken("leak", || text);
        }
    }
}
