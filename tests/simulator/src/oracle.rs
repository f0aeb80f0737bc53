//! What must be: slow, simple, and knowing everything.

use std::collections::{BTreeMap, BTreeSet};

use pillion_core::{BlockKey, Group, NamespaceId, Tenant, TenantKey, key::Namespace};

use crate::{
    dice::mix,
    plan::{GroupPlan, Plan},
    pool::Cell,
};

/// Hash of a block, as the engine has it.
pub(crate) type Hash = [u8; 32];

/// Whose bytes a block holds, but for its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Space {
    pub(crate) tenant: usize,
    pub(crate) model: usize,
    pub(crate) epoch: u64,
    pub(crate) group: usize,
    pub(crate) shard: usize,
    pub(crate) shards: usize,
}

/// The content that a block of these tokens must have.
pub(crate) fn content(space: &Space, hash: &Hash) -> Cell {
    let Space { tenant, model, epoch, group, shard, shards } = *space;
    let of_space =
        [tenant, model, group, shard, shards].iter().fold(epoch, |sum, n| mix(sum ^ *n as u64 ^ 0x51));
    let (words, _) = hash.as_chunks::<8>();
    let word = words.iter().fold(of_space, |sum, word| mix(sum ^ u64::from_le_bytes(*word)));
    [word, mix(word)]
}

pub(crate) fn tenant(number: usize) -> Tenant {
    Tenant { name: format!("tenant{number}").into(), key: TenantKey::new([number as u8 + 1; 32]) }
}

/// The empty epoch of a fresh engine is 0.
pub(crate) fn epoch_bytes(epoch: u64) -> Vec<u8> {
    if epoch == 0 { Vec::new() } else { [epoch.to_le_bytes(), mix(epoch).to_le_bytes()].concat() }
}

/// A group as a worker registers it, and as a scheduler names it.
pub(crate) fn group(space: &Space, plan: &GroupPlan, scale: u64) -> Group {
    let shard = format!("{}/{}", space.shard + 1, space.shards);
    let fields = [("model", space.model.to_string()), ("group", space.group.to_string()), ("shard", shard)];
    let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Group {
        namespace: Namespace::new(fields).expect("different names"),
        record_bytes: plan.bytes * scale,
        format: format!("packed {}", plan.bytes).into(),
        load_only: false,
    }
}

/// Everything that was ever said to be saved, by its key, and what a disk promised to keep.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    meant: BTreeMap<[u8; 32], Cell>,
    spaces: BTreeMap<NamespaceId, Space>,
    disks: Vec<DiskOracle>,
}

/// What is known of one disk.
#[derive(Debug, Default)]
pub(crate) struct DiskOracle {
    /// Keys that were acknowledged as durable and have not been said to be gone.
    pub(crate) promised: BTreeMap<[u8; 32], u64>,
    /// Keys that were said to be gone since this boot of its sidecar: an acknowledgement may still be on its way, of
    /// a job that waited for other blocks.
    pub(crate) gone: BTreeSet<[u8; 32]>,
    /// A write or a sync failed since the power last came: nobody knows what of it is on the disk, and what is not
    /// can be read until the power goes.
    pub(crate) doubtful: bool,
    /// It lied, or was given bytes that were damaged before: nothing can be counted on any more but I1.
    pub(crate) lied: bool,
}

impl Oracle {
    pub(crate) fn new(plan: &Plan) -> Self {
        let disks = (0..plan.sidecars).map(|_| DiskOracle::default()).collect();
        Self { disks, ..Self::default() }
    }

    /// An engine opened this namespace.
    pub(crate) fn opened(&mut self, id: NamespaceId, space: Space) {
        self.spaces.insert(id, space);
    }

    /// Somebody is about to save this block; its key.
    pub(crate) fn means(&mut self, id: NamespaceId, hash: &Hash) -> Option<([u8; 32], Cell)> {
        let space = *self.spaces.get(&id)?;
        let key = key_bytes(&tenant(space.tenant).key, id, hash);
        let cell = content(&space, hash);
        self.meant.insert(key, cell);
        Some((key, cell))
    }

    pub(crate) fn of_key(&self, key: &[u8; 32]) -> Option<Cell> {
        self.meant.get(key).copied()
    }

    pub(crate) fn disk(&mut self, sidecar: usize) -> &mut DiskOracle {
        &mut self.disks[sidecar]
    }
}

/// A block key's bytes: what its hash map of the core would compare.
fn key_bytes(tenant: &TenantKey, id: NamespaceId, hash: &Hash) -> [u8; 32] {
    let key = BlockKey::new(tenant, id, 0, hash);
    let bytes: &[u8; 32] = std::borrow::Borrow::borrow(&key);
    *bytes
}
