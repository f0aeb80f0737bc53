//! Copies between engines and pools: half a block at a time, as `sidecar/daemon`'s `copier.rs` does it in one go, so
//! that whatever may happen during a copy happens during a copy.

use std::{collections::BTreeMap, rc::Rc};

use pillion_core::{BlockOutcome, CopyItem, Direction, Event, JobId, SessionId};
use pillion_ssd::format::checksum;

use crate::{
    net::{End, Next},
    plan::{Fault, Sabotage},
    pool::{Pool, fill, middle, word_of},
    world::World,
};

/// A task of a copy thread.
#[derive(Debug)]
pub(crate) struct Copy {
    pub(super) session: SessionId,
    pub(super) job: JobId,
    direction: Direction,
    items: Vec<CopyItem>,
    /// Mapped when it began: they outlive their sidecars.
    pools: BTreeMap<u32, Rc<Pool>>,
    end: End,
    record_bytes: Vec<u64>,
    pub(super) cancelled: bool,
    /// Whether the engine's memory cannot be reached this time.
    unreachable: bool,
    half: usize,
    page: Vec<u8>,
    outcomes: Vec<BlockOutcome>,
}

impl World {
    pub(super) fn begin_copy(
        &mut self,
        sidecar: usize,
        session: SessionId,
        job: JobId,
        direction: Direction,
        items: Vec<CopyItem>,
    ) {
        if direction == Direction::Save {
            self.note_places(sidecar, session, job, &items);
        }
        let hangs = self.copy_dice.permille(self.plan.rate(Fault::CopyHangs));
        let unreachable = self.copy_dice.permille(self.plan.rate(Fault::MemoryUnreachable));
        let mut delay = self.net.jitter(self.plan.copy_ns);
        if hangs {
            self.net.injected(Fault::CopyHangs);
            delay += 3 * self.plan.load_deadline_ns.max(self.plan.save_deadline_ns);
        }
        if unreachable {
            self.net.injected(Fault::MemoryUnreachable);
        }
        let Some(boot) = self.boot(sidecar) else { return };
        let Some(live) = boot.sessions.get(&session) else { return };
        let (end, record_bytes) = (live.end, live.record_bytes.clone());
        let theirs = |number: &u32| Some((*number, Rc::clone(&boot.neighbours.get(number)?.pool)));
        let mut pools: BTreeMap<u32, Rc<Pool>> =
            items.iter().map(|item| item.pool).filter_map(|number| theirs(&number)).collect();
        pools.insert(0, Rc::clone(&boot.pool));
        let copy = Copy {
            session,
            job,
            direction,
            items,
            pools,
            end,
            record_bytes,
            cancelled: false,
            unreachable,
            half: 0,
            page: Vec::new(),
            outcomes: Vec::new(),
        };
        boot.next_copy += 1;
        let (id, number) = (boot.id, boot.next_copy);
        boot.copies.insert(number, copy);
        self.net.after(delay, Next::Copy { sidecar, boot: id, copy: number });
    }

    /// The next half of a block, and the report after the last.
    pub(crate) fn copy_step(&mut self, sidecar: usize, number: u64) {
        let Some(mut copy) = self.boot(sidecar).and_then(|boot| boot.copies.remove(&number)) else { return };
        let Some(boot) = self.boot(sidecar) else { return };
        let id = boot.id;
        if let Some(outcome) = self.copy_half(sidecar, &mut copy) {
            copy.outcomes.push(outcome);
            copy.half = 0;
        }
        let delay = self.net.jitter(self.plan.copy_ns / 4);
        if copy.outcomes.len() < copy.items.len() {
            if let Some(boot) = self.boot(sidecar) {
                boot.copies.insert(number, copy);
            }
            return self.net.after(delay, Next::Copy { sidecar, boot: id, copy: number });
        }
        let event = Event::CopyDone { session: copy.session, job: copy.job, blocks: copy.outcomes };
        self.net.after(delay, Next::Told { sidecar, boot: id, event: Box::new(event) });
    }

    /// An outcome: this block is over.
    fn copy_half(&mut self, sidecar: usize, copy: &mut Copy) -> Option<BlockOutcome> {
        let item = copy.items[copy.outcomes.len()];
        if copy.half == 0 && copy.cancelled {
            return Some(BlockOutcome::Skipped);
        }
        let End::Engine { engine, life, rank, .. } = copy.end else { return Some(BlockOutcome::Unreachable) };
        let (bytes, pool) = (copy.record_bytes.get(usize::from(item.group)), copy.pools.get(&item.pool));
        let (Some(bytes), Some(pool)) = (bytes, pool) else { return Some(BlockOutcome::Unreachable) };
        let there = &mut self.engines[engine];
        if there.life != life || there.is_dead || (copy.unreachable && copy.half == 1) {
            return Some(BlockOutcome::Unreachable);
        }
        let offset = item.offset / self.plan.scale;
        copy.page.resize(*bytes as usize, 0);
        let split = middle(copy.page.len());
        let range = if copy.half == 0 { 0..split } else { split..copy.page.len() };
        let at = offset + range.start as u64;
        let part = &mut copy.page[range];
        match copy.direction {
            Direction::Save => {
                let Some(cell) = there.cell(rank, item.block) else { return Some(BlockOutcome::Unreachable) };
                fill(part, cell[copy.half]);
                pool.write(at, part);
            }
            Direction::Load => {
                if !pool.read(at, part) {
                    return Some(BlockOutcome::Unreachable);
                }
                // A neighbour's bytes are proved before they go further: its owner may write there at any time.
                if item.pool == 0 {
                    there.written(&mut self.net, copy.job, rank, item.block, copy.half, word_of(part));
                }
            }
        }
        copy.half += 1;
        if copy.half < 2 {
            return None;
        }
        let sum = checksum(&copy.page);
        if copy.direction == Direction::Save {
            let mut stored = vec![0; copy.page.len()];
            pool.read(offset, &mut stored);
            return Some(BlockOutcome::Copied(checksum(&stored)));
        }
        self.proved(sidecar, copy, item, sum)
    }

    /// The end of a block that was loaded.
    fn proved(&mut self, sidecar: usize, copy: &Copy, item: CopyItem, sum: u64) -> Option<BlockOutcome> {
        let End::Engine { engine, rank, .. } = copy.end else { return None };
        let trusted = match self.sabotage {
            Some(Sabotage::ChecksumsSkipped) => true,
            Some(Sabotage::LoansTrusted) => item.pool != 0,
            _ => false,
        };
        if sum != item.checksum && !trusted {
            let is_explained = item.pool != 0 || self.sabotage.is_some();
            let offset = item.offset / self.plan.scale;
            let rotten = self.boot(sidecar).is_some_and(|boot| boot.rotten.contains(&offset));
            self.net.saw("damaged records refused", 1);
            if !is_explained && !rotten {
                self.net.broken("I1", || format!("a leased record changed in the pool: {item:?}"));
            }
            return Some(BlockOutcome::Corrupt);
        }
        if item.pool != 0 {
            let (first, second) = copy.page.split_at(middle(copy.page.len()));
            for (half, part) in [first, second].into_iter().enumerate() {
                self.engines[engine].written(&mut self.net, copy.job, rank, item.block, half, word_of(part));
            }
            self.net.saw("blocks loaded from neighbours", 1);
        }
        Some(BlockOutcome::Copied(item.checksum))
    }

    /// A bit of a pool changes.
    pub(crate) fn rot_pool(&mut self, sidecar: usize) {
        let (scale, bytes) = (self.plan.scale, 4096 * self.plan.groups.len() as u64);
        let dice = &mut self.trouble_dice;
        let Some(boot) = self.sidecars[sidecar].as_mut() else { return };
        // Somewhere in what is used: slabs begin at the pool's start.
        let used = (boot.core.counters().record_bytes / scale + bytes).min(boot.pool.bytes());
        let at = dice.below(used);
        if boot.is_being_saved(at) {
            // Before its checksum is taken nobody can tell.
            return;
        }
        let mut byte = [0];
        boot.pool.read(at, &mut byte);
        byte[0] ^= 1 << dice.below(8);
        boot.pool.write(at, &byte);
        // Whichever record it is of: they are of at most two sectors.
        let page = at / 4096 * 4096;
        boot.rotten.extend([page, page.saturating_sub(4096)]);
        self.oracle.disk(sidecar).lied = true;
        self.oracle.disk(sidecar).promised.clear();
        self.net.injected(Fault::PoolRots);
    }
}
