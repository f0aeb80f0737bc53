//! The host device: memory of CPU engines.

use std::io;

use pillion_layouts::Segment;
use pillion_shm::{
    Mapping,
    pidfd::{Peer, Process},
};

use crate::{CopyError, EngineMemory};

/// Pieces per system call; the kernel's limit is 1024.
const PIECES_MAX: usize = 1000;

fn check(bytes: u64, segments: &[Segment], record: usize) -> Result<(), CopyError> {
    for segment in segments {
        let inside =
            |offset: u64, bytes: u64| offset.checked_add(segment.len).is_some_and(|end| end <= bytes);
        if !inside(segment.engine, bytes) || !inside(segment.record, record as u64) {
            let (offset, length) = (segment.engine, segment.len);
            return Err(CopyError::OutOfBounds { bytes, offset, length });
        }
    }
    Ok(())
}

/// An engine's memory in a memfd that we map too: no call, no copy but the one.
#[derive(Debug)]
pub struct MemfdMemory {
    map: Mapping,
}

impl MemfdMemory {
    /// Takes a writable mapping of the whole KV cache.
    pub fn new(map: Mapping) -> Self {
        Self { map }
    }
}

impl EngineMemory for MemfdMemory {
    fn way(&self) -> &'static str {
        "memfd"
    }

    fn bytes(&self) -> u64 {
        self.map.bytes() as u64
    }

    fn read(&self, segments: &[Segment], record: &mut [u8]) -> Result<(), CopyError> {
        check(self.bytes(), segments, record.len())?;
        for segment in segments {
            // SAFETY: both ends were checked; the pool's record and the engine's mapping are different
            // memory. The engine keeps the block unchanged while the save holds it (I4); should it not,
            // the bytes are wrong but the save is revoked, not published.
            unsafe {
                let from = self.map.as_ptr().add(segment.engine as usize);
                let to = record.as_mut_ptr().add(segment.record as usize);
                std::ptr::copy_nonoverlapping(from, to, segment.len as usize);
            }
        }
        Ok(())
    }

    fn write(&self, segments: &[Segment], record: &[u8]) -> Result<(), CopyError> {
        check(self.bytes(), segments, record.len())?;
        for segment in segments {
            // SAFETY: as above; the engine does not look at the block before the load has ended (I3).
            unsafe {
                let from = record.as_ptr().add(segment.record as usize);
                let to = self.map.as_ptr().add(segment.engine as usize);
                std::ptr::copy_nonoverlapping(from, to, segment.len as usize);
            }
        }
        Ok(())
    }
}

/// An engine's private memory, through the kernel. Costs page pinning: about 40 % of memcpy's speed.
#[derive(Debug)]
pub struct ProcessMemory {
    peer: Peer,
    process: Process,
    base: u64,
    bytes: u64,
}

impl ProcessMemory {
    /// The memory `base .. base + bytes` of the process at the other end of a socket.
    ///
    /// # Errors
    /// Where the process is gone.
    pub fn new(peer: Peer, base: u64, bytes: u64) -> io::Result<Self> {
        if base.checked_add(bytes).is_none() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        Ok(Self { peer, process: Process::open(peer.pid)?, base, bytes })
    }

    /// A number may be taken by another process once the peer has ended: looked at before and after.
    fn alive(&self) -> Result<(), CopyError> {
        if self.process.has_ended() {
            return Err(CopyError::Unreachable("the engine's process has ended".into()));
        }
        Ok(())
    }

    fn transfer(&self, segments: &[Segment], record: *mut u8, call: Call) -> Result<(), CopyError> {
        self.alive()?;
        for part in segments.chunks(PIECES_MAX) {
            let local: Vec<libc::iovec> = part
                .iter()
                // The offsets were checked against the record's length by the caller.
                .map(|segment| iovec(record.wrapping_add(segment.record as usize), segment.len))
                .collect();
            let remote: Vec<libc::iovec> = part
                .iter()
                .map(|segment| iovec((self.base + segment.engine) as *mut u8, segment.len))
                .collect();
            let wanted: u64 = part.iter().map(|segment| segment.len).sum();
            let (pid, count) = (self.peer.pid, part.len() as libc::c_ulong);
            // SAFETY: the local pieces lie inside the record that the caller borrowed; the remote ones are
            // checked by the kernel.
            let moved = unsafe {
                match call {
                    Call::Read => {
                        libc::process_vm_readv(pid, local.as_ptr(), count, remote.as_ptr(), count, 0)
                    }
                    Call::Write => {
                        libc::process_vm_writev(pid, local.as_ptr(), count, remote.as_ptr(), count, 0)
                    }
                }
            };
            if moved < 0 {
                return Err(CopyError::Unreachable(explain(&io::Error::last_os_error())));
            }
            if moved as u64 != wanted {
                return Err(CopyError::Unreachable(format!("expected {wanted} bytes to move, got {moved}")));
            }
        }
        self.alive()
    }
}

#[derive(Debug, Clone, Copy)]
enum Call {
    Read,
    Write,
}

fn iovec(base: *mut u8, bytes: u64) -> libc::iovec {
    libc::iovec { iov_base: base.cast(), iov_len: bytes as usize }
}

fn explain(error: &io::Error) -> String {
    let hint = match error.raw_os_error() {
        Some(libc::EPERM) => {
            ": run the sidecar as the engine's user, and where kernel.yama.ptrace_scope is set, give it CAP_SYS_PTRACE"
        }
        Some(libc::ESRCH) => ": the engine's process has ended, or lives in another pid namespace",
        _ => "",
    };
    format!("{error}{hint}")
}

impl EngineMemory for ProcessMemory {
    fn way(&self) -> &'static str {
        "process_vm"
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&self, segments: &[Segment], record: &mut [u8]) -> Result<(), CopyError> {
        check(self.bytes, segments, record.len())?;
        self.transfer(segments, record.as_mut_ptr(), Call::Read)
    }

    fn write(&self, segments: &[Segment], record: &[u8]) -> Result<(), CopyError> {
        check(self.bytes, segments, record.len())?;
        // process_vm_writev only reads its local side.
        self.transfer(segments, record.as_ptr().cast_mut(), Call::Write)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pillion_layouts::vllm::KvCacheTensor;
    use pillion_layouts::vllm::groups::{Group, Pages};
    use pillion_layouts::{BlockPlan, Worker};
    use pillion_shm::{Access, Memfd};

    use super::*;
    use crate::{BlockCopier, HostPool};

    const BLOCKS: u64 = 4;

    const PAGE: u64 = 2 * 32 * 512;
    const BYTES: u64 = PAGE * BLOCKS * 3;

    /// A group of three layers and one of two on the same blocks.
    fn plans() -> Vec<BlockPlan> {
        let group = |layers: u64| Group {
            block_tokens: 32,
            pages: vec![Pages {
                tensor: KvCacheTensor {
                    size: BYTES,
                    offset: 0,
                    layer_stride: PAGE * BLOCKS,
                    block_stride: PAGE,
                    layers: (0..layers).map(|n| format!("group{layers}.{n}")).collect(),
                },
                heads: 2,
                states: 32,
                content_bytes: 512,
                page_bytes: PAGE,
                kernel_blocks: 1,
                packing: "kv total_heads=2 key=256 value=256 dtype=float32".parse().unwrap(),
            }],
        };
        let worker = Worker {
            order: "LBHNC".into(),
            num_blocks: BLOCKS,
            memory_bytes: BYTES,
            rank: 0,
            world: 1,
            groups: vec![group(3), group(2)],
        };
        worker.check().unwrap().iter().map(|group| group.plan().clone()).collect()
    }

    fn pattern(length: u64) -> Vec<u8> {
        (0..length).map(|n| (n * 31 + n / 257) as u8).collect()
    }

    fn round_trip(memory: Arc<dyn EngineMemory>, look: impl Fn() -> Vec<u8>) {
        let copier = BlockCopier::new(memory, plans());
        for (group, layers) in [(0, 3), (1, 2)] {
            one_group(&copier, group, layers, &look);
        }
        assert_eq!(copier.record_bytes(2), Err(CopyError::Group { groups: 2, group: 2 }));
        assert!(matches!(copier.save(2, 0, &mut []), Err(CopyError::Group { .. })));
        assert!(matches!(copier.load(2, 0, &[], 0), Err(CopyError::Group { .. })));
    }

    fn one_group(copier: &BlockCopier, group: u16, layers: usize, look: impl Fn() -> Vec<u8>) {
        let bytes = copier.record_bytes(group).unwrap();
        assert_eq!(bytes, layers as u64 * PAGE);
        let pool = HostPool::create(bytes).unwrap();
        // SAFETY: this test is the only user of the pool.
        let record = unsafe { pool.record_mut(0, bytes) }.unwrap();
        let before = look();
        let checksum = copier.save(group, 2, record).unwrap();
        assert_eq!(checksum, crc_fast::checksum(CrcAlgorithm::Crc64Nvme, record));
        copier.load(group, 1, record, checksum).unwrap();
        let after = look();
        let page = PAGE as usize;
        for layer in 0..3 {
            let at = |block: usize| (layer * BLOCKS as usize + block) * page;
            let source = if layer < layers { 2 } else { 1 };
            assert_eq!(after[at(1)..at(1) + page], before[at(source)..at(source) + page]);
            for untouched in [0, 2, 3] {
                let at = at(untouched);
                assert_eq!(after[at..at + page], before[at..at + page]);
            }
        }
        record[77] ^= 4;
        assert!(matches!(copier.load(group, 1, record, checksum), Err(CopyError::Corrupt { .. })));
        assert!(matches!(copier.save(group, BLOCKS, record), Err(CopyError::Shape { .. })));
        assert!(matches!(copier.save(1 - group, 0, record), Err(CopyError::Shape { .. })));
    }

    /// A rank with one of two heads, and records of an engine that has both.
    #[test]
    fn a_part_of_a_record_is_loaded_only_if_all_of_it_is_right() {
        let (page, blocks) = (32 * 512u64, 4u64);
        let worker = |rank: u32| Worker {
            order: "LBHNC".into(),
            num_blocks: blocks,
            memory_bytes: 2 * blocks * page,
            rank,
            world: 2,
            groups: vec![Group {
                block_tokens: 32,
                pages: vec![Pages {
                    tensor: KvCacheTensor {
                        size: 2 * blocks * page,
                        offset: 0,
                        layer_stride: blocks * page,
                        block_stride: page,
                        layers: vec!["0".into(), "1".into()],
                    },
                    heads: 1,
                    states: 32,
                    content_bytes: 512,
                    page_bytes: page,
                    kernel_blocks: 1,
                    packing: "kv total_heads=2 key=256 value=256 dtype=float32".parse().unwrap(),
                }],
            }],
        };
        // [layers, heads, states, bytes]
        let mut record = pattern(4 * page);
        let checksum = crc_fast::checksum(CrcAlgorithm::Crc64Nvme, &record);
        for rank in 0..2 {
            let own = worker(rank).check().unwrap().remove(0);
            let other = own.other_shard(pillion_layouts::Rank { index: 0, size: 1 }).unwrap();
            let memfd = Memfd::create("engine", 2 * blocks * page).unwrap();
            let engine = memfd.map(Access::ReadWrite).unwrap();
            // SAFETY: the mapping is that long; the copier writes it between looks, on this thread.
            let look =
                || unsafe { std::slice::from_raw_parts(engine.as_ptr(), (2 * blocks * page) as usize) };
            let memory = MemfdMemory::new(memfd.map(Access::ReadWrite).unwrap());
            let copier = BlockCopier::new(Arc::new(memory), vec![own.plan().clone(), other.plan().clone()]);
            assert_eq!(copier.record_bytes(1), Ok(4 * page));
            // Right or wrong, in the part that is loaded and outside of it.
            for at in [0, page, 2 * page, 3 * page].map(|at| at as usize + 5) {
                record[at] ^= 1;
                let wrong = copier.load(1, 2, &record, checksum);
                assert!(matches!(wrong, Err(CopyError::Corrupt { .. })), "{wrong:?}");
                record[at] ^= 1;
                assert!(look().iter().all(|byte| *byte == 0), "nothing is written before it is proved");
            }
            copier.load(1, 2, &record, checksum).unwrap();
            for (layer, block) in [(0, 2), (1, 2)] {
                let at = ((layer * blocks + block) * page) as usize;
                let from = ((2 * layer + u64::from(rank)) * page) as usize;
                assert_eq!(look()[at..at + page as usize], record[from..from + page as usize]);
            }
            let written = look().chunks(page as usize).filter(|page| page.iter().any(|byte| *byte != 0));
            assert_eq!(written.count(), 2, "no other block is touched");
            let saved = copier.save(1, 2, &mut record.clone());
            assert_eq!(saved, Err(CopyError::OnlyLoaded { group: 1 }));
        }
    }

    use crc_fast::CrcAlgorithm;

    #[test]
    fn blocks_go_out_and_in_through_a_memfd() {
        let bytes = BYTES;
        let memfd = Memfd::create("engine", bytes).unwrap();
        let engine = memfd.map(Access::ReadWrite).unwrap();
        // SAFETY: the mapping is `bytes` long and this test is its only user.
        let view = unsafe { std::slice::from_raw_parts_mut(engine.as_ptr(), bytes as usize) };
        view.copy_from_slice(&pattern(bytes));
        let memory = MemfdMemory::new(memfd.map(Access::ReadWrite).unwrap());
        let address = engine.as_ptr() as usize;
        round_trip(Arc::new(memory), || {
            // SAFETY: as above.
            unsafe { std::slice::from_raw_parts(address as *const u8, bytes as usize) }.to_vec()
        });
    }

    #[test]
    fn blocks_go_out_and_in_through_process_vm() {
        let mut engine = pattern(BYTES);
        let peer = Peer { pid: std::process::id() as i32, uid: 0, gid: 0 };
        let base = engine.as_mut_ptr();
        let memory = ProcessMemory::new(peer, base as u64, engine.len() as u64).unwrap();
        let length = engine.len();
        // SAFETY: `engine` outlives the closure's use, and is changed only through process_vm.
        round_trip(Arc::new(memory), || unsafe { std::slice::from_raw_parts(base, length) }.to_vec());
    }

    #[test]
    fn a_process_that_ended_cannot_be_reached() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let peer = Peer { pid: child.id() as i32, uid: 0, gid: 0 };
        let memory = ProcessMemory::new(peer, 4096, 4096).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let segment = Segment { engine: 0, record: 0, len: 8 };
        assert!(matches!(memory.read(&[segment], &mut [0; 8]), Err(CopyError::Unreachable(_))));
    }
}
