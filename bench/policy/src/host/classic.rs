//! Policies over blocks that know nothing of prefixes. They are told the last blocks of a request first, which
//! makes them evict those first; LRU is there the other way round as well.

use std::collections::{BTreeMap, VecDeque};

use super::Policy;
use crate::trace::{Block, Request, Trace};

/// What a policy sees of a request, in its order: the blocks that it asked for, and those to insert if they
/// are missing.
fn accesses(request: &Request, last_first: bool) -> Vec<(Block, bool)> {
    let asked = |position| (request.from..request.asked).contains(&position);
    let all = request.blocks.iter().enumerate().map(|(position, block)| (*block, asked(position)));
    if last_first { all.rev().collect() } else { all.collect() }
}

/// A queue from which any block can be taken.
#[derive(Debug, Default)]
struct List {
    order: BTreeMap<u64, Block>,
    next: u64,
}

impl List {
    fn push(&mut self, block: Block) -> u64 {
        self.next += 1;
        self.order.insert(self.next, block);
        self.next
    }

    fn oldest(&self) -> Option<Block> {
        self.order.first_key_value().map(|(_, block)| *block)
    }

    fn len(&self) -> usize {
        self.order.len()
    }
}

/// Least recently used.
#[derive(Debug)]
pub struct Lru {
    capacity: usize,
    last_first: bool,
    place: Vec<Option<u64>>,
    list: List,
}

impl Lru {
    /// An empty cache. `last_first`: the first block of a request is its most recently used one.
    pub fn new(trace: &Trace, capacity: usize, last_first: bool) -> Self {
        Self { capacity, last_first, place: vec![None; trace.blocks()], list: List::default() }
    }
}

impl Policy for Lru {
    fn holds(&self, block: Block) -> bool {
        self.place[block as usize].is_some()
    }

    fn serve(&mut self, request: &Request, _hit: usize) {
        for (block, asked) in accesses(request, self.last_first) {
            match self.place[block as usize] {
                Some(_) if !asked => continue,
                Some(place) => {
                    self.list.order.remove(&place);
                }
                None if self.list.len() >= self.capacity => {
                    let Some((_, victim)) = self.list.order.pop_first() else { return };
                    self.place[victim as usize] = None;
                }
                None => {}
            }
            self.place[block as usize] = Some(self.list.push(block));
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum S3Place {
    Out,
    Small,
    Main,
}

/// S3-FIFO (SOSP'23): a small queue of a tenth, a main queue that gives second chances, and the names of
/// what left the small one.
#[derive(Debug)]
pub struct S3Fifo {
    small_capacity: usize,
    capacity: usize,
    /// Hits in the small queue from which on a block goes to the main one.
    threshold: u8,
    place: Vec<S3Place>,
    hits: Vec<u8>,
    small: VecDeque<Block>,
    main: VecDeque<Block>,
    ghosts: VecDeque<(Block, u32)>,
    /// Which of its ghosts is the latest; 0 if it is none.
    ghost: Vec<u32>,
    ghost_count: u32,
}

impl S3Fifo {
    /// An empty cache. The paper's threshold is 2.
    pub fn new(trace: &Trace, capacity: usize, threshold: u8) -> Self {
        Self {
            small_capacity: (capacity / 10).max(1),
            capacity,
            threshold,
            place: vec![S3Place::Out; trace.blocks()],
            hits: vec![0; trace.blocks()],
            small: VecDeque::new(),
            main: VecDeque::new(),
            ghosts: VecDeque::new(),
            ghost: vec![0; trace.blocks()],
            ghost_count: 0,
        }
    }

    fn make_room(&mut self) {
        while self.small.len() + self.main.len() >= self.capacity {
            if self.small.len() >= self.small_capacity || self.main.is_empty() {
                let Some(block) = self.small.pop_front() else { return };
                if self.hits[block as usize] >= self.threshold {
                    self.hits[block as usize] = 0;
                    self.place[block as usize] = S3Place::Main;
                    self.main.push_back(block);
                } else {
                    self.place[block as usize] = S3Place::Out;
                    self.remember(block);
                }
            } else if let Some(block) = self.main.pop_front() {
                if self.hits[block as usize] > 0 {
                    self.hits[block as usize] -= 1;
                    self.main.push_back(block);
                } else {
                    self.place[block as usize] = S3Place::Out;
                }
            }
        }
    }

    fn remember(&mut self, block: Block) {
        self.ghost_count += 1;
        self.ghost[block as usize] = self.ghost_count;
        self.ghosts.push_back((block, self.ghost_count));
        if self.ghosts.len() > self.capacity - self.small_capacity
            && let Some((block, count)) = self.ghosts.pop_front()
            && self.ghost[block as usize] == count
        {
            self.ghost[block as usize] = 0;
        }
    }
}

impl Policy for S3Fifo {
    fn holds(&self, block: Block) -> bool {
        self.place[block as usize] != S3Place::Out
    }

    fn serve(&mut self, request: &Request, _hit: usize) {
        for (block, asked) in accesses(request, true) {
            if self.holds(block) {
                let hits = &mut self.hits[block as usize];
                *hits = (*hits + u8::from(asked)).min(3);
                continue;
            }
            self.make_room();
            self.hits[block as usize] = 0;
            if std::mem::take(&mut self.ghost[block as usize]) > 0 {
                self.place[block as usize] = S3Place::Main;
                self.main.push_back(block);
            } else {
                self.place[block as usize] = S3Place::Small;
                self.small.push_back(block);
            }
        }
    }
}

/// Four rows of counters up to 15, halved now and then: how often a block was seen, at least roughly.
#[derive(Debug)]
struct Sketch {
    rows: [Vec<u8>; 4],
    seen: usize,
    halve_at: usize,
}

impl Sketch {
    fn new(capacity: usize) -> Self {
        let width = capacity.next_power_of_two().max(16) * 4;
        Self { rows: std::array::from_fn(|_| vec![0; width]), seen: 0, halve_at: capacity.max(16) * 10 }
    }

    fn index(&self, row: usize, block: Block) -> usize {
        let mixed = (u64::from(block) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(16 * row as u32);
        (mixed.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32) as usize & (self.rows[row].len() - 1)
    }

    fn add(&mut self, block: Block) {
        for row in 0..4 {
            let index = self.index(row, block);
            self.rows[row][index] = (self.rows[row][index] + 1).min(15);
        }
        self.seen += 1;
        if self.seen >= self.halve_at {
            self.seen /= 2;
            self.rows.iter_mut().flatten().for_each(|count| *count /= 2);
        }
    }

    fn count(&self, block: Block) -> u8 {
        (0..4).map(|row| self.rows[row][self.index(row, block)]).min().unwrap_or(0)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Region {
    Window,
    Probation,
    Protected,
}

/// W-TinyLFU (as Caffeine's, with a fixed window of 1 %): what leaves the window is admitted to the main
/// part, a segmented LRU, only if it was seen more often than what would have to go.
#[derive(Debug)]
pub struct WTinyLfu {
    window: usize,
    main: usize,
    protected: usize,
    sketch: Sketch,
    place: Vec<Option<(Region, u64)>>,
    lists: [List; 3],
}

impl WTinyLfu {
    /// An empty cache.
    pub fn new(trace: &Trace, capacity: usize) -> Self {
        let window = (capacity / 100).max(1);
        let main = capacity - window;
        Self {
            window,
            main,
            protected: main * 4 / 5,
            sketch: Sketch::new(capacity),
            place: vec![None; trace.blocks()],
            lists: Default::default(),
        }
    }

    fn put(&mut self, block: Block, region: Region) {
        let place = self.lists[region as usize].push(block);
        self.place[block as usize] = Some((region, place));
    }

    fn take(&mut self, block: Block) -> Option<Region> {
        let (region, place) = self.place[block as usize].take()?;
        self.lists[region as usize].order.remove(&place);
        Some(region)
    }

    fn oldest(&self, region: Region) -> Option<Block> {
        self.lists[region as usize].oldest()
    }

    fn admit(&mut self) {
        if self.lists[Region::Window as usize].len() <= self.window {
            return;
        }
        let Some(candidate) = self.oldest(Region::Window) else { return };
        self.take(candidate);
        let main =
            self.lists[Region::Probation as usize].len() + self.lists[Region::Protected as usize].len();
        if main >= self.main {
            let victim = self.oldest(Region::Probation).or_else(|| self.oldest(Region::Protected));
            let Some(victim) = victim else { return };
            if self.sketch.count(candidate) <= self.sketch.count(victim) {
                return;
            }
            self.take(victim);
        }
        self.put(candidate, Region::Probation);
    }
}

impl Policy for WTinyLfu {
    fn holds(&self, block: Block) -> bool {
        self.place[block as usize].is_some()
    }

    fn serve(&mut self, request: &Request, _hit: usize) {
        for (block, asked) in accesses(request, true) {
            if self.holds(block) && !asked {
                continue;
            }
            self.sketch.add(block);
            match self.take(block) {
                None => {
                    self.put(block, Region::Window);
                    self.admit();
                }
                Some(Region::Window) => self.put(block, Region::Window),
                Some(_) => {
                    self.put(block, Region::Protected);
                    if self.lists[Region::Protected as usize].len() > self.protected
                        && let Some(demoted) = self.oldest(Region::Protected)
                    {
                        self.take(demoted);
                        self.put(demoted, Region::Probation);
                    }
                }
            }
        }
    }
}
