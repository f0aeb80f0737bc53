//! Policies of the host tier: what stays in a pool of so many blocks.

pub mod belady;
pub mod classic;
pub mod leaves;
#[cfg(test)]
mod tests;

use crate::trace::{Block, Request, Trace};

/// A cache of one tier. All policies insert what a request computed: the host pool is where saves go.
pub trait Policy {
    /// Whether the block is there.
    fn holds(&self, block: Block) -> bool;
    /// Takes in a request. Of what it asked, the first `hit` blocks were served.
    fn serve(&mut self, request: &Request, hit: usize);
}

/// What a run counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Blocks asked for.
    pub asked: u64,
    /// Served: there, and all before them too.
    pub served: u64,
    /// There, behind a hole or not.
    pub found: u64,
}

impl Outcome {
    /// Served / asked.
    pub fn hit_rate(&self) -> f64 {
        self.served as f64 / self.asked.max(1) as f64
    }
}

/// Plays a trace.
pub fn run(trace: &Trace, policy: &mut impl Policy) -> Outcome {
    let mut outcome = Outcome::default();
    for request in &trace.requests {
        let asked = &request.blocks[request.from..request.asked];
        let hit = asked.iter().take_while(|block| policy.holds(**block)).count();
        outcome.asked += asked.len() as u64;
        outcome.served += hit as u64;
        outcome.found += asked.iter().filter(|block| policy.holds(**block)).count() as u64;
        policy.serve(request, hit);
    }
    outcome
}
