//! Where records lie in the host pool: slabs of exact record sizes.
//!
//! The pool is cut into chunks; a slab is a run of chunks that holds records of one
//! size, chosen so that less than 1/32 of it is waste where a run of at most
//! [`SLAB_CHUNKS_MAX`] chunks allows. Empty slabs give their chunks back.

use std::collections::{BTreeSet, HashMap};

/// The unit in which slabs take memory from the pool.
pub const CHUNK_BYTES: u64 = 2 << 20;
const SLAB_CHUNKS_MAX: u64 = 64;
/// The unit of direct I/O. Shorter records do not go to an SSD.
pub(crate) const SECTOR: u64 = 4096;

/// A place of one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    slab: u32,
    slot: u32,
}

#[derive(Debug)]
struct Slab {
    first_chunk: u64,
    chunks: u64,
    stride: u64,
    free: Vec<u32>,
    slots: u32,
}

/// The allocator. It touches no memory.
#[derive(Debug)]
pub(crate) struct Pool {
    /// True: the chunk belongs to a slab.
    taken: Vec<bool>,
    slabs: Vec<Option<Slab>>,
    /// Per stride, the slabs that have a free slot.
    open: HashMap<u64, BTreeSet<u32>>,
    /// Records of at least a sector lie on sectors, whatever that costs.
    sectors: bool,
}

impl Pool {
    pub(crate) fn new(bytes: u64, sectors: bool) -> Self {
        let taken = vec![false; (bytes / CHUNK_BYTES) as usize];
        Self { taken, slabs: Vec::new(), open: HashMap::new(), sectors }
    }

    /// Whether a record of this size could ever be stored.
    pub(crate) fn fits(&self, record_bytes: u64) -> bool {
        record_bytes > 0
            && stride(record_bytes, self.sectors).div_ceil(CHUNK_BYTES) <= self.taken.len() as u64
    }

    pub(crate) fn allocate(&mut self, record_bytes: u64) -> Option<Extent> {
        let stride = stride(record_bytes, self.sectors);
        if let Some(slab) = self.open.get(&stride).and_then(|open| open.first().copied()) {
            return Some(self.take_slot(slab, stride));
        }
        let slab = self.new_slab(stride)?;
        Some(self.take_slot(slab, stride))
    }

    fn take_slot(&mut self, slab_id: u32, stride: u64) -> Extent {
        let slab = self.slabs[slab_id as usize].as_mut().expect("open slabs exist");
        let slot = slab.free.pop().expect("open slabs have a free slot");
        if slab.free.is_empty() {
            self.open.entry(stride).or_default().remove(&slab_id);
        }
        Extent { slab: slab_id, slot }
    }

    fn new_slab(&mut self, stride: u64) -> Option<u32> {
        let wanted = slab_chunks(stride);
        let least = stride.div_ceil(CHUNK_BYTES);
        let (first_chunk, chunks) = self.find_run(wanted).or_else(|| self.find_run(least))?;
        let slots = (chunks * CHUNK_BYTES / stride) as u32;
        self.taken[first_chunk as usize..(first_chunk + chunks) as usize].fill(true);
        let slab = Slab { first_chunk, chunks, stride, free: (0..slots).rev().collect(), slots };
        let id = match self.slabs.iter().position(Option::is_none) {
            Some(index) => {
                self.slabs[index] = Some(slab);
                index
            }
            None => {
                self.slabs.push(Some(slab));
                self.slabs.len() - 1
            }
        };
        self.open.entry(stride).or_default().insert(id as u32);
        Some(id as u32)
    }

    fn find_run(&self, chunks: u64) -> Option<(u64, u64)> {
        let mut start = 0;
        for (index, taken) in self.taken.iter().enumerate() {
            if *taken {
                start = index + 1;
            } else if (index + 1 - start) as u64 == chunks {
                return Some((start as u64, chunks));
            }
        }
        None
    }

    pub(crate) fn free(&mut self, extent: Extent) {
        let slab = self.slabs[extent.slab as usize].as_mut().expect("extents point into live slabs");
        slab.free.push(extent.slot);
        let stride = slab.stride;
        if slab.free.len() as u32 == slab.slots {
            let (first, chunks) = (slab.first_chunk as usize, slab.chunks as usize);
            self.taken[first..first + chunks].fill(false);
            self.slabs[extent.slab as usize] = None;
            self.open.entry(stride).or_default().remove(&extent.slab);
        } else {
            self.open.entry(stride).or_default().insert(extent.slab);
        }
    }

    pub(crate) fn offset(&self, extent: Extent) -> u64 {
        let slab = self.slabs[extent.slab as usize].as_ref().expect("extents point into live slabs");
        slab.first_chunk * CHUNK_BYTES + u64::from(extent.slot) * slab.stride
    }

    #[cfg(test)]
    fn free_chunks(&self) -> u64 {
        self.taken.iter().filter(|taken| !**taken).count() as u64
    }
}

/// Records lie 4 KiB aligned where that costs little (DMA likes it) or an SSD takes them (O_DIRECT asks for it), else
/// by cache line.
fn stride(record_bytes: u64, sectors: bool) -> u64 {
    let least = if sectors { SECTOR } else { 64 << 10 };
    record_bytes.next_multiple_of(if record_bytes >= least { SECTOR } else { 64 })
}

fn slab_chunks(stride: u64) -> u64 {
    let least = stride.div_ceil(CHUNK_BYTES);
    let waste = |chunks: u64| (chunks * CHUNK_BYTES) % stride;
    (least..=least.max(SLAB_CHUNKS_MAX))
        .find(|chunks| waste(*chunks) * 32 <= chunks * CHUNK_BYTES)
        .unwrap_or(least)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn records_never_overlap_and_everything_comes_back(
            sizes in proptest::collection::vec(1u64..5 << 20, 1..4),
            steps in proptest::collection::vec((0usize..4, any::<bool>(), any::<u16>()), 1..200),
            sectors in any::<bool>(),
        ) {
            let mut pool = Pool::new(64 << 20, sectors);
            let mut live: Vec<(Extent, u64)> = Vec::new();
            for (size, grow, pick) in steps {
                let bytes = sizes[size % sizes.len()];
                if grow {
                    if let Some(extent) = pool.allocate(bytes) {
                        let start = pool.offset(extent);
                        prop_assert!(!sectors || bytes < SECTOR || start.is_multiple_of(SECTOR));
                        let bytes = if sectors && bytes >= SECTOR { bytes.next_multiple_of(SECTOR) } else { bytes };
                        prop_assert!(start + bytes <= 64 << 20);
                        for (other, length) in &live {
                            let begin = pool.offset(*other);
                            prop_assert!(start + bytes <= begin || begin + length <= start);
                        }
                        live.push((extent, bytes));
                    }
                } else if !live.is_empty() {
                    let (extent, _) = live.swap_remove(pick as usize % live.len());
                    pool.free(extent);
                }
            }
            for (extent, _) in live.drain(..) {
                pool.free(extent);
            }
            prop_assert_eq!(pool.free_chunks(), 32);
        }
    }

    #[test]
    fn waste_is_small_for_the_sizes_of_the_field() {
        for record in [131_072u64, 73_728, 50_432, 1_835_008, 2 << 20, 14 << 20, 656 * 64] {
            let stride = stride(record, false);
            let chunks = slab_chunks(stride);
            let used = chunks * CHUNK_BYTES / stride * record;
            let share = 1.0 - used as f64 / (chunks * CHUNK_BYTES) as f64;
            assert!(share < 0.04, "{record} byte records waste {share:.3}");
        }
    }

    #[test]
    fn a_pool_is_filled_to_the_last_record() {
        let mut pool = Pool::new(8 << 20, false);
        assert_eq!((0..).map_while(|_| pool.allocate(2 << 20)).count(), 4);
        assert!(pool.allocate(64).is_none());
        assert!(!pool.fits(9 << 20));
        assert!(pool.fits(8 << 20));
    }
}
