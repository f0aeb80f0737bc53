//! The ceiling: what is needed again soonest stays.

use std::collections::BTreeSet;

use super::Policy;
use crate::trace::{Block, Request, Trace};

/// Belady's MIN that may also refuse to cache a block. The cache changes between requests, not within one:
/// what a request finds was there when it came. Keeping a block from one request to the next that asks for it
/// is an interval, and at most `capacity` of them overlap; that those which end first are kept is optimal
/// for the number of blocks found. Among blocks that are needed at the same time parents are kept first: they are
/// needed whenever their child is, so nothing is found behind a hole, and the ceiling is one for prefixes, too.
#[derive(Debug)]
pub struct Belady {
    capacity: usize,
    /// When each block of each request is asked for next: the request's number.
    next_use: Vec<Vec<Option<u32>>>,
    depths: Vec<u32>,
    request: usize,
    key: Vec<Option<(u32, u32)>>,
    held: BTreeSet<(u32, u32, Block)>,
}

impl Belady {
    /// An empty cache that knows what will come.
    pub fn new(trace: &Trace, capacity: usize) -> Self {
        let mut next: Vec<Option<u32>> = vec![None; trace.blocks()];
        let mut next_use = Vec::with_capacity(trace.requests.len());
        for (number, request) in trace.requests.iter().enumerate().rev() {
            next_use.push(request.blocks.iter().map(|block| next[*block as usize]).collect());
            for block in &request.blocks[request.from..request.asked] {
                next[*block as usize] = Some(number as u32);
            }
        }
        next_use.reverse();
        Self {
            capacity,
            next_use,
            depths: (0..trace.blocks() as Block).map(|block| trace.depth(block)).collect(),
            request: 0,
            key: vec![None; trace.blocks()],
            held: BTreeSet::new(),
        }
    }
}

impl Policy for Belady {
    fn holds(&self, block: Block) -> bool {
        self.key[block as usize].is_some()
    }

    fn serve(&mut self, request: &Request, _hit: usize) {
        let uses = &self.next_use[self.request];
        self.request += 1;
        for (block, next) in request.blocks.iter().zip(uses) {
            let key = &mut self.key[*block as usize];
            if let Some((next, depth)) = key.take() {
                self.held.remove(&(next, depth, *block));
            }
            if let Some(next) = *next {
                let depth = self.depths[*block as usize];
                *key = Some((next, depth));
                self.held.insert((next, depth, *block));
            }
        }
        while self.held.len() > self.capacity {
            let Some((_, _, block)) = self.held.pop_last() else { return };
            self.key[block as usize] = None;
        }
    }
}
