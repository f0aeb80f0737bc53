//! Neighbours in status reports.

use std::io;

use serde::{Deserialize, Serialize};

use super::{approximate, print::safe};
use crate::metrics::NeighbourCounters;

/// A sidecar of this node that lends to this one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NeighbourStatus {
    /// The device it serves.
    pub device: String,
    /// Its pool.
    pub pool_bytes: u64,
    /// Tenants whose blocks it may have.
    pub tenants: u64,
}

/// Blocks between neighbours.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NeighbourBlocks {
    /// Leased here now.
    pub held: u64,
    /// Looked for.
    pub asked: u64,
    /// Borrowed.
    pub borrowed: u64,
    /// Lent.
    pub lent: u64,
}

impl NeighbourBlocks {
    pub(super) fn of(now: &NeighbourCounters) -> Self {
        Self { held: now.held, asked: now.asked, borrowed: now.borrowed, lent: now.lent }
    }
}

pub(super) fn print(
    neighbours: &[NeighbourStatus],
    blocks: &NeighbourBlocks,
    out: &mut impl io::Write,
) -> io::Result<()> {
    if neighbours.is_empty() && blocks.lent == 0 {
        return Ok(());
    }
    writeln!(out, "neighbours    {}", neighbours.len())?;
    for it in neighbours {
        let (device, pool) = (safe(&it.device), approximate(it.pool_bytes));
        writeln!(out, "  {device}  pool of {pool}, {} tenants", it.tenants)?;
    }
    let NeighbourBlocks { held, borrowed, lent, .. } = blocks;
    writeln!(out, "  blocks      {borrowed} borrowed, {held} of them leased now, {lent} lent")
}
