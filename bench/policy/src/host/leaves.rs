//! Policies that evict leaves only, as the sidecar's `Store` does: a block with a child in the pool stays.

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::Policy;
use crate::trace::{Block, Request, Trace};

/// How many hits buy how much time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Growth {
    /// log2(uses + 1).
    Log,
    /// The same, rounded down: a block must be hit twice as often for each further step.
    LogFloor,
    /// One for any number of hits.
    Once,
    /// The number of hits.
    Linear,
}

/// Which leaf goes first. `uses` counts hits: being written is none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Order {
    /// The least recently written or hit.
    Lru,
    /// The least often hit; among equals the least recently.
    Lfu,
    /// The least often hit, counted from the count of what was evicted last (LFU with dynamic aging).
    LfuAging,
    /// Those never hit first, whatever their age.
    UnhitFirst,
    /// The least recent, but hits buy time: the touch lies `weight` · capacity · growth(uses) in the future.
    BuyTime {
        /// In capacities.
        weight: f64,
        /// How it grows with the number of hits.
        growth: Growth,
        /// Only writes, not hits, advance the clock.
        writes: bool,
    },
    /// Two queues, each LRU: what was never hit goes first while it has more than `unhit` of the pool, else what
    /// was hit.
    Split {
        /// A share of the capacity.
        unhit: f64,
    },
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    held: bool,
    /// Leased, or being written.
    pinned: bool,
    children: u32,
    uses: u32,
    key: (u64, u64),
    queued: Option<(u64, u64)>,
}

/// A pool of which only unpinned leaves are evicted.
#[derive(Debug)]
pub struct Leaves {
    order: Order,
    capacity: usize,
    parents: Vec<Option<Block>>,
    slots: Vec<Slot>,
    /// Never hit, hit; all are in the first unless the order is [`Order::Split`].
    evictable: [BTreeSet<((u64, u64), Block)>; 2],
    held: usize,
    unhit: usize,
    /// What was evicted lately, with its hits: it counts as hit when it comes back.
    ghosts: VecDeque<(Block, u32)>,
    ghost: HashMap<Block, u32>,
    ghosts_max: usize,
    clock: u64,
    touches: u64,
    /// The first part of the key that was evicted last.
    floor: u64,
    /// Evicted since it was cleared, in that order; with their uses.
    pub evicted: Vec<(Block, u32)>,
}

impl Leaves {
    /// An empty pool.
    pub fn new(trace: &Trace, capacity: usize, order: Order) -> Self {
        Self {
            order,
            capacity,
            parents: (0..trace.blocks() as Block).map(|block| trace.parent(block)).collect(),
            slots: vec![Slot::default(); trace.blocks()],
            evictable: Default::default(),
            held: 0,
            unhit: 0,
            ghosts: VecDeque::new(),
            ghost: HashMap::new(),
            ghosts_max: 0,
            clock: 0,
            touches: 0,
            floor: 0,
            evicted: Vec::new(),
        }
    }

    /// With the memory of as many evicted blocks as fit the pool.
    #[must_use]
    pub fn with_ghosts(mut self) -> Self {
        self.ghosts_max = self.capacity;
        self
    }

    fn slot(&mut self, block: Block) -> &mut Slot {
        &mut self.slots[block as usize]
    }

    /// Hits of a block since it came.
    pub fn uses(&self, block: Block) -> u32 {
        self.slots[block as usize].uses
    }

    fn touch(&mut self, block: Block, hit: bool) {
        let uses = self.slot(block).uses.saturating_add(u32::from(hit));
        self.touches += 1;
        let writes_only = matches!(self.order, Order::BuyTime { writes: true, .. });
        self.clock += u64::from(!hit || !writes_only);
        let first = match self.order {
            Order::Lru | Order::Split { .. } => 0,
            Order::Lfu => u64::from(uses),
            Order::LfuAging => self.floor + u64::from(uses),
            Order::UnhitFirst => u64::from(uses > 0),
            Order::BuyTime { weight, growth, .. } => {
                let steps = match growth {
                    Growth::Log => (f64::from(uses) + 1.0).log2(),
                    Growth::LogFloor => f64::from((uses + 1).ilog2()),
                    Growth::Once => f64::from(uses.min(1)),
                    Growth::Linear => f64::from(uses),
                };
                self.clock + (weight * self.capacity as f64 * steps) as u64
            }
        };
        let key = (first, self.touches);
        let slot = self.slot(block);
        let first_hit = slot.uses == 0 && uses > 0;
        (slot.uses, slot.key) = (uses, key);
        self.unhit -= usize::from(first_hit);
        self.requeue(block);
    }

    fn requeue(&mut self, block: Block) {
        let split = matches!(self.order, Order::Split { .. });
        let slot = &mut self.slots[block as usize];
        let place = (slot.held && !slot.pinned && slot.children == 0).then_some(slot.key);
        if let Some(key) = slot.queued {
            // Its first hit may just have moved it.
            self.evictable.iter_mut().any(|queue| queue.remove(&(key, block)));
        }
        if let Some(key) = place {
            self.evictable[usize::from(split && slot.uses > 0)].insert((key, block));
        }
        slot.queued = place;
    }

    fn pin(&mut self, block: Block, pinned: bool) {
        self.slot(block).pinned = pinned;
        self.requeue(block);
    }

    fn count_child(&mut self, block: Block, by: i32) {
        if let Some(parent) = self.parents[block as usize] {
            let slot = self.slot(parent);
            slot.children = slot.children.checked_add_signed(by).expect("as many go as came");
            self.requeue(parent);
        }
    }

    fn first_to_go(&self) -> Option<((u64, u64), Block)> {
        let [unhit, hit] = [0, 1].map(|queue| self.evictable[queue].first().copied());
        match self.order {
            Order::Split { unhit: share } if (self.unhit as f64) <= share * self.capacity as f64 => {
                hit.or(unhit)
            }
            _ => unhit.or(hit),
        }
    }

    fn evict(&mut self, key: (u64, u64), victim: Block) {
        self.floor = key.0;
        let slot = self.slot(victim);
        slot.held = false;
        let uses = slot.uses;
        self.unhit -= usize::from(uses == 0);
        self.requeue(victim);
        self.count_child(victim, -1);
        self.held -= 1;
        self.evicted.push((victim, uses));
        if self.ghosts_max > 0 {
            self.ghost.insert(victim, uses);
            self.ghosts.push_back((victim, uses));
            if self.ghosts.len() > self.ghosts_max
                && let Some((oldest, uses)) = self.ghosts.pop_front()
                && self.ghost.get(&oldest) == Some(&uses)
            {
                self.ghost.remove(&oldest);
            }
        }
    }

    fn insert(&mut self, block: Block, hit: bool) -> bool {
        // The parent must outlive the search for room.
        self.count_child(block, 1);
        if self.held >= self.capacity {
            let Some((key, victim)) = self.first_to_go() else {
                self.count_child(block, -1);
                return false;
            };
            self.evict(key, victim);
        }
        self.held += 1;
        self.unhit += 1;
        let ghost = self.ghost.remove(&block);
        let slot = self.slot(block);
        (slot.held, slot.pinned, slot.uses) = (true, true, 0);
        if let Some(uses) = ghost {
            slot.uses = uses + 1;
            self.unhit -= 1;
        }
        self.touch(block, hit);
        true
    }

    /// Children never outlive their parents, nor do more blocks fit than fit; for tests.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        assert!(self.held <= self.capacity);
        assert_eq!(self.slots.iter().filter(|slot| slot.held).count(), self.held);
        assert_eq!(self.slots.iter().filter(|slot| slot.held && slot.uses == 0).count(), self.unhit);
        for (block, slot) in self.slots.iter().enumerate() {
            if let Some(parent) = self.parents[block].filter(|_| slot.held) {
                assert!(self.holds(parent), "{block} without {parent}");
            }
        }
    }
}

impl Policy for Leaves {
    fn holds(&self, block: Block) -> bool {
        self.slots[block as usize].held
    }

    fn serve(&mut self, request: &Request, hit: usize) {
        let served = request.from..request.from + hit;
        let here: Vec<Block> =
            request.blocks[served.clone()].iter().copied().filter(|block| self.holds(*block)).collect();
        // Children first: a parent must never be older than its child.
        for block in here.iter().rev() {
            self.touch(*block, true);
            self.pin(*block, true);
        }
        let mut pinned = here;
        for (position, block) in request.blocks.iter().enumerate() {
            if self.holds(*block) {
                continue;
            }
            // A hit that is not here came from a lower tier.
            if !self.insert(*block, served.contains(&position)) {
                break;
            }
            pinned.push(*block);
        }
        for block in pinned {
            self.pin(block, false);
        }
    }
}
