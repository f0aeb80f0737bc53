//! What a disk holds in the end, read by a process that has nothing but the disk.

use std::sync::Arc;

use pillion_ssd::{Extent, format::RecordKey, store::Action};

use super::tier::{Tier, disk_of};
use crate::{
    pool::{Pool, middle, word_of},
    world::World,
};

impl World {
    /// What every disk holds in the end is read by a process that has nothing but the disk (I1, I7).
    pub(crate) fn read_back(&mut self, sidecar: usize) {
        let Some(ssd) = self.plan.ssd.clone() else { return };
        let disk = Arc::clone(&self.disks[sidecar]);
        (disk_of(&disk).fault, disk_of(&disk).broken, disk_of(&disk).files_max) = (None, None, usize::MAX);
        let pool = Pool::new(4 * 4096);
        let mut tier = Tier::new(&disk, &pool.memory, &ssd, &mut self.disk_dice);
        let mut found = Vec::new();
        tier.recover(|entry| found.push((entry.meta.key, entry.meta.bytes)));
        let mut compared = 0;
        for (token, (key, bytes)) in found.into_iter().enumerate() {
            let bytes = tier.store.bytes_of(&key).unwrap_or(bytes);
            if tier.store.get(token as u64, key, Extent { offset: 0, bytes }).is_err() {
                continue;
            }
            let is_loaded = tier.drive().iter().any(|action| matches!(action, Action::Loaded { .. }));
            let mut page = vec![0; bytes as usize];
            pool.read(0, &mut page);
            let (first, second) = page.split_at(middle(page.len()));
            let (cell, wanted) = ([word_of(first), word_of(second)], self.oracle.of_key(&key.0));
            let promised = self.oracle.disk(sidecar).promised.contains_key(&key.0);
            if is_loaded && wanted != Some(cell) {
                let text = format!("disk {sidecar} holds {cell:x?} as {key:?}, expected {wanted:x?}");
                self.net.broken("I1", || text);
            }
            if !is_loaded && promised {
                self.net
                    .broken("I7", || format!("disk {sidecar}: {key:?} was acknowledged and cannot be read"));
            }
            compared += u64::from(is_loaded);
        }
        let promised = self.oracle.disk(sidecar).promised.keys();
        let missing = promised.copied().find(|key| !tier.store.contains(&RecordKey(*key)));
        if let Some(key) = missing {
            self.net.broken("I7", || format!("disk {sidecar}: {key:02x?} was acknowledged and is not there"));
        }
        self.net.saw("blocks on disks compared", compared);
    }
}
