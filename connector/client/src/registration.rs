//! A worker's KV memory, as it is presented at every attachment.

use std::{
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use pillion_cuda_driver::{self as cuda, CudaError, Exported, ExportedHandle};
use pillion_layouts::{BlockPlan, CheckedGroup, Rank, Worker, vllm::groups::Pages};
use pillion_protocol::wire;
use pillion_shm::{Memfd, Seal};

/// How the memory can be reached.
#[derive(Debug)]
pub enum Memory {
    /// A sealed memfd that holds the whole KV cache.
    Memfd(OwnedFd),
    /// Private memory of this process, by address.
    Process {
        /// First byte of the allocation.
        base: u64,
    },
    /// Memory of a CUDA device.
    Device(DeviceMemory),
}

/// Device memory that another process can open.
#[derive(Debug)]
pub struct DeviceMemory {
    device: cuda::Device,
    base: u64,
    exported: Exported,
}

impl DeviceMemory {
    /// Exports `base .. base + bytes`, device addresses of this process whose context is current.
    ///
    /// # Errors
    /// Where it is no device memory, or cannot be shared.
    pub fn export(base: u64, bytes: u64) -> Result<Self, CudaError> {
        Ok(Self { device: cuda::device_of(base)?, base, exported: cuda::export(base, bytes)? })
    }
}

/// A shard that ranks of another tensor-parallel size store, and that holds heads of this rank: its blocks can be
/// loaded, never saved. Its namespace is the group's with another `shard`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Other {
    /// Index of the group.
    pub group: u32,
    /// Which shard, from 0.
    pub shard: u32,
    /// Of how many.
    pub shards: u32,
}

/// Everything the sidecar must know to move blocks.
#[derive(Debug)]
pub struct Registration {
    worker: Worker,
    others: Vec<Other>,
    groups: Vec<CheckedGroup>,
    memory: Memory,
    /// Groups whose canary was where it should be.
    proved: Vec<bool>,
    /// The group whose canary block 0 holds, and its seed.
    canary: Option<(u32, u64)>,
    cache_mode: Option<String>,
}

/// Why a registration is refused before any sidecar saw it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistrationError {
    /// The memfd can be resized, or has another size.
    #[error(transparent)]
    Memory(#[from] pillion_shm::ShmError),
    /// A layout that is not covered (I10).
    #[error(transparent)]
    Layout(#[from] pillion_layouts::Refusal),
    /// No such group.
    #[error("expected a KV cache group below {groups}, got {group}")]
    Group {
        /// How many there are.
        groups: usize,
        /// Asked for.
        group: usize,
    },
    /// Groups and namespaces do not go together.
    #[error("expected one KV cache group for each of {namespaces} namespaces, got {groups}")]
    Namespaces {
        /// What the client was made with.
        namespaces: usize,
        /// What is registered.
        groups: usize,
    },
    /// A group's canary was never compared.
    #[error(
        "expected the layout canary of every KV cache group to have been compared, that of group {group} was not"
    )]
    Unproved {
        /// The first of them.
        group: usize,
    },
    /// Block 0 does not hold the canary where the layout says it should.
    #[error("the layout canary in block 0 is not where the declared layout puts it: {0}; running uncached")]
    Canary(#[from] pillion_layouts::CanaryMismatch),
    /// Block 0 could not be read.
    #[error("cannot read the KV cache of this process: {0}")]
    Io(#[from] std::io::Error),
    /// The same of device memory, or no events could be made.
    #[error("cannot use the KV cache on its device: {0}")]
    Cuda(#[from] CudaError),
}

impl Registration {
    /// Checks a worker's description of its memory.
    ///
    /// # Errors
    /// Where a layout is not covered (I10).
    pub fn new(worker: Worker, others: Vec<Other>, memory: Memory) -> Result<Self, RegistrationError> {
        let groups = worker.check()?;
        for Other { group, shard, shards } in &others {
            let (group, groups_len) = (*group as usize, groups.len());
            let of = groups.get(group).ok_or(RegistrationError::Group { groups: groups_len, group })?;
            of.other_shard(Rank { index: *shard, size: *shards })?;
        }
        let proved = vec![false; groups.len()];
        Ok(Self { worker, others, groups, memory, proved, canary: None, cache_mode: None })
    }

    /// Reads block 0 by a group's declared layout and compares it with the canary that the engine's own indexing has
    /// just written there. Done here once, because a sidecar that attaches later finds block 0 in use; and because
    /// groups alias one pool, group after group: the last one's canary is there for the sidecar.
    ///
    /// # Errors
    /// Where the canary is not where it should be, or cannot be read.
    pub fn check_canary(&mut self, group: usize, seed: u64) -> Result<(), RegistrationError> {
        let groups = self.groups.len();
        let checked = self.groups.get(group).ok_or(RegistrationError::Group { groups, group })?;
        // Whatever comes of it, the canary of another group is not there any more.
        self.canary = None;
        let record = self.block_0(checked.plan())?;
        checked.canary_check(seed, &record)?;
        self.proved[group] = true;
        self.canary = Some((group as u32, seed));
        Ok(())
    }

    /// Whether it may be presented by a client of so many namespaces.
    pub(crate) fn is_complete(&self, namespaces: usize) -> Result<(), RegistrationError> {
        let groups = self.groups.len();
        if groups != namespaces {
            return Err(RegistrationError::Namespaces { namespaces, groups });
        }
        match self.proved.iter().position(|proved| !proved) {
            Some(group) => Err(RegistrationError::Unproved { group }),
            None => Ok(()),
        }
    }

    pub(crate) fn is_device(&self) -> bool {
        matches!(self.memory, Memory::Device(_))
    }

    fn block_0(&self, plan: &BlockPlan) -> Result<Vec<u8>, RegistrationError> {
        let (file, base) = match &self.memory {
            Memory::Memfd(fd) => {
                let memfd = Memfd::adopt(fd.try_clone()?, Seal::Size, self.worker.memory_bytes)?;
                (Some(File::from(memfd.fd().try_clone_to_owned()?)), 0)
            }
            Memory::Process { base } => (Some(File::open("/proc/self/mem")?), *base),
            Memory::Device(device) => (None, device.base),
        };
        let mut record = vec![0; plan.record_bytes() as usize];
        for segment in plan.segments(0) {
            let place = &mut record[segment.record as usize..(segment.record + segment.len) as usize];
            match &file {
                Some(file) => file.read_exact_at(place, base + segment.engine)?,
                None => cuda::read(base + segment.engine, place)?,
            }
        }
        Ok(record)
    }

    pub(crate) fn message(
        &self,
        request: u64,
        namespaces: &[Vec<(String, String)>],
        fresh: bool,
        events: &[u8],
    ) -> wire::Register {
        let (keys, values) = namespaces.iter().flatten().cloned().unzip();
        let Worker { order, num_blocks, memory_bytes, rank, world, groups } = &self.worker;
        let pages = || groups.iter().flat_map(|group| &group.pages);
        let wide = |of: fn(&Pages) -> u64| pages().map(of).collect::<Vec<_>>();
        let narrow = |of: fn(&Pages) -> u32| pages().map(of).collect::<Vec<_>>();
        let (canary_group, canary_seed) = self.canary.unwrap_or_default();
        let (way, base) = match &self.memory {
            Memory::Memfd(_) => (wire::Way::Memfd, 0),
            Memory::Process { base } => (wire::Way::ProcessVm, *base),
            Memory::Device(memory) => match memory.exported.handle {
                ExportedHandle::Ipc(_) => (wire::Way::CudaIpc, 0),
                ExportedHandle::Vmm(_) => (wire::Way::CudaVmm, 0),
            },
        };
        let device = match &self.memory {
            Memory::Device(memory) => Some(memory),
            _ => None,
        };
        let others = |of: fn(&Other) -> u32| Some(self.others.iter().map(of).collect());
        wire::Register {
            request,
            layout: order.clone(),
            num_blocks: *num_blocks,
            rank: *rank,
            world: *world,
            group_block_tokens: groups.iter().map(|group| group.block_tokens).collect(),
            group_fields: namespaces.iter().map(|fields| fields.len() as u32).collect(),
            group_pages: groups.iter().map(|group| group.pages.len() as u32).collect(),
            keys,
            values,
            page_sizes: wide(|pages| pages.tensor.size),
            page_offsets: wide(|pages| pages.tensor.offset),
            page_layer_strides: wide(|pages| pages.tensor.layer_stride),
            page_block_strides: wide(|pages| pages.tensor.block_stride),
            page_layers: narrow(|pages| pages.tensor.layers.len() as u32),
            page_heads: narrow(|pages| pages.heads),
            page_states: narrow(|pages| pages.states),
            page_content_bytes: narrow(|pages| pages.content_bytes),
            page_bytes: wide(|pages| pages.page_bytes),
            page_kernel_blocks: narrow(|pages| pages.kernel_blocks),
            page_packings: pages().map(|pages| pages.packing.to_string()).collect(),
            layer_names: pages().flat_map(|pages| pages.tensor.layers.clone()).collect(),
            way,
            memory_bytes: *memory_bytes,
            base,
            canary_group,
            canary_seed,
            canary_fresh: fresh && self.canary.is_some(),
            canary_checked: true,
            device: device.map(|memory| memory.device.uuid.0.to_vec()),
            handle: device.and_then(|memory| match &memory.exported.handle {
                ExportedHandle::Ipc(handle) => Some(handle.to_vec()),
                ExportedHandle::Vmm(_) => None,
            }),
            allocation_bytes: device.map_or(0, |memory| memory.exported.allocation_bytes),
            allocation_offset: device.map_or(0, |memory| memory.exported.offset),
            events: device.map(|_| events.to_vec()),
            other_groups: others(|other| other.group),
            other_shards: others(|other| other.shard),
            other_counts: others(|other| other.shards),
            cache_mode: self.cache_mode.clone(),
        }
    }

    /// What an acknowledged save is to mean on a sidecar with an SSD, by its name; else what that is configured to.
    #[must_use]
    pub fn with_cache_mode(self, mode: Option<String>) -> Self {
        Self { cache_mode: mode, ..self }
    }

    pub(crate) fn fds(&self) -> std::io::Result<Vec<OwnedFd>> {
        match &self.memory {
            Memory::Memfd(fd) => Ok(vec![fd.as_fd().try_clone_to_owned()?]),
            Memory::Process { .. } => Ok(Vec::new()),
            Memory::Device(memory) => match &memory.exported.handle {
                ExportedHandle::Vmm(fd) => Ok(vec![fd.as_fd().try_clone_to_owned()?]),
                ExportedHandle::Ipc(_) => Ok(Vec::new()),
            },
        }
    }
}
