//! Metrics of borrowing between the sidecars of a node.

use prometheus_client::{metrics::counter::Counter, registry::Registry};

use super::labels::{Lending, PerLabel};
use super::{Whole, level, plain, store};

/// What the core and the daemon count of neighbours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NeighbourCounters {
    /// Sidecars that lend to this one, now.
    pub neighbours: u64,
    /// Blocks of theirs that are leased here, now.
    pub held: u64,
    /// Blocks that neighbours were looked for.
    pub asked: u64,
    /// Blocks that they lent.
    pub borrowed: u64,
    /// Blocks that this one lent.
    pub lent: u64,
}

#[derive(Debug)]
pub(super) struct NeighbourMetrics {
    neighbours: Whole,
    held: Whole,
    blocks: PerLabel<Lending, Counter>,
}

impl NeighbourMetrics {
    pub(super) fn new(r: &mut Registry) -> Self {
        let help = "Blocks that sidecars of this node lent to each other's engines";
        let blocks = PerLabel::register(r, "neighbour_blocks", help, None, Counter::<u64>::default);
        let help = "Blocks of neighbours that are leased here";
        let held = plain(r, "neighbour_blocks_held", help, None);
        let help = "Sidecars of this node that lend to this one";
        let neighbours = plain(r, "neighbours", help, None);
        Self { neighbours, held, blocks }
    }

    pub(super) fn set(&self, now: &NeighbourCounters) {
        level(&self.neighbours, now.neighbours);
        level(&self.held, now.held);
        store(self.blocks.at(Lending::Borrowed), now.borrowed);
        store(self.blocks.at(Lending::Lent), now.lent);
    }
}
