//! A worker's KV memory, as it is presented at every attachment.

use std::{
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use pillion_cuda_driver::{self as cuda, CudaError, Exported, ExportedHandle};
use pillion_layouts::{BlockPlan, canary_check, plan, vllm};
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

/// One `KVCacheTensor`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Bytes.
    pub size: u64,
    /// Offset of its first layer in the allocation.
    pub offset: u64,
    /// Bytes from one layer to the next.
    pub layer_stride: u64,
    /// Bytes from one block to the next.
    pub block_stride: u64,
    /// Names, in the order of their place.
    pub layers: Vec<String>,
}

/// Everything the sidecar must know to move blocks.
#[derive(Debug)]
pub struct Registration {
    /// Physical order.
    pub layout: String,
    /// Spec class.
    pub kind: String,
    /// Cache dtype.
    pub dtype: String,
    /// Blocks.
    pub num_blocks: u64,
    /// Tokens per block.
    pub block_tokens: u32,
    /// H.
    pub heads: u32,
    /// N.
    pub states: u32,
    /// C in bytes.
    pub content_bytes: u32,
    /// What the engine says a page takes.
    pub page_bytes: u64,
    /// Where layers lie.
    pub tensors: Vec<Tensor>,
    /// Bytes of the allocation.
    pub memory_bytes: u64,
    /// How to reach it.
    pub memory: Memory,
    /// Seed of the canary that block 0 holds now.
    pub canary_seed: u64,
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
    fn describe(&self) -> vllm::KvCache {
        vllm::KvCache {
            order: self.layout.clone(),
            num_blocks: self.num_blocks,
            block_tokens: self.block_tokens,
            dtype: self.dtype.clone(),
            kind: self.kind.clone(),
            heads: self.heads,
            states: self.states,
            content_bytes: self.content_bytes,
            page_bytes: self.page_bytes,
            memory_bytes: self.memory_bytes,
            tensors: self
                .tensors
                .iter()
                .map(|tensor| vllm::KvCacheTensor {
                    size: tensor.size,
                    offset: tensor.offset,
                    layer_stride: tensor.layer_stride,
                    block_stride: tensor.block_stride,
                    layers: tensor.layers.clone(),
                })
                .collect(),
        }
    }

    /// Reads block 0 by the declared layout and compares it with the canary that the engine's own
    /// indexing wrote. Done here once, because a sidecar that attaches later finds block 0 in use.
    pub(crate) fn check(&self) -> Result<(), RegistrationError> {
        let layout = vllm::layout(&self.describe())?;
        let record = self.block_0(&plan(&layout)?)?;
        Ok(canary_check(self.canary_seed, layout.shape(), &record)?)
    }

    fn block_0(&self, plan: &BlockPlan) -> Result<Vec<u8>, RegistrationError> {
        let (file, base) = match &self.memory {
            Memory::Memfd(fd) => {
                let memfd = Memfd::adopt(fd.try_clone()?, Seal::Size, self.memory_bytes)?;
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
        let column = |of: fn(&Tensor) -> u64| self.tensors.iter().map(of).collect::<Vec<_>>();
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
        wire::Register {
            request,
            keys,
            values,
            layout: self.layout.clone(),
            kind: self.kind.clone(),
            dtype: self.dtype.clone(),
            num_blocks: self.num_blocks,
            block_tokens: self.block_tokens,
            heads: self.heads,
            states: self.states,
            content_bytes: self.content_bytes,
            page_bytes: self.page_bytes,
            tensor_sizes: column(|tensor| tensor.size),
            tensor_offsets: column(|tensor| tensor.offset),
            tensor_layer_strides: column(|tensor| tensor.layer_stride),
            tensor_block_strides: column(|tensor| tensor.block_stride),
            tensor_layer_counts: self.tensors.iter().map(|tensor| tensor.layers.len() as u32).collect(),
            layer_names: self.tensors.iter().flat_map(|tensor| tensor.layers.clone()).collect(),
            way,
            memory_bytes: self.memory_bytes,
            base,
            canary_seed: self.canary_seed,
            canary_fresh: fresh,
            canary_checked: true,
            device: device.map(|memory| memory.device.uuid.0.to_vec()),
            handle: device.and_then(|memory| match &memory.exported.handle {
                ExportedHandle::Ipc(handle) => Some(handle.to_vec()),
                ExportedHandle::Vmm(_) => None,
            }),
            allocation_bytes: device.map_or(0, |memory| memory.exported.allocation_bytes),
            allocation_offset: device.map_or(0, |memory| memory.exported.offset),
            events: device.map(|_| events.to_vec()),
        }
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
