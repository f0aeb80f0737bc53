//! From a worker's registration to a copier of its blocks, or a reason why not (I10).

use std::{os::fd::OwnedFd, sync::Arc};

use pillion_core::{Group, Registration, key::Namespace};
use pillion_cuda::{
    BlockCopier, DeviceHandle, DeviceSource, EngineMemory, Gpu, MemfdMemory, ProcessMemory, driver,
};
use pillion_layouts::{BlockPlan, Layout, canary_check, plan, vllm};
use pillion_protocol::wire;
use pillion_shm::{
    Access, Memfd, Seal,
    pidfd::{Peer, Process},
};
use tokio::sync::mpsc::UnboundedSender;

use crate::{copier::CopyReport, driver::Mover, lanes::Lanes};

/// Events of one worker, at most (I8).
const EVENTS_MAX: usize = 4096;

/// A registration that was refused, for the peer and for the metrics.
#[derive(Debug)]
pub struct Refused {
    /// For code.
    pub reason: wire::Reason,
    /// For people.
    pub text: String,
}

impl Refused {
    fn new(reason: wire::Reason, text: impl ToString) -> Self {
        Self { reason, text: text.to_string() }
    }
}

/// A worker whose blocks can be moved.
#[derive(Debug)]
pub struct Registered {
    /// Moves them.
    pub mover: Mover,
    /// For the core.
    pub registration: Registration,
    /// Physical order, for status.
    pub layout: String,
    /// Whether the canary was compared here, or earlier.
    pub canary: &'static str,
}

fn describe(message: &wire::Register) -> Option<vllm::KvCache> {
    let columns = [
        message.tensor_offsets.len(),
        message.tensor_layer_strides.len(),
        message.tensor_block_strides.len(),
        message.tensor_layer_counts.len(),
    ];
    if columns.iter().any(|length| *length != message.tensor_sizes.len()) {
        return None;
    }
    let mut names = message.layer_names.iter();
    let tensors = (0..message.tensor_sizes.len())
        .map(|index| {
            let count = message.tensor_layer_counts[index] as usize;
            let layers: Vec<_> = names.by_ref().take(count).cloned().collect();
            (layers.len() == count).then_some(vllm::KvCacheTensor {
                size: message.tensor_sizes[index],
                offset: message.tensor_offsets[index],
                layer_stride: message.tensor_layer_strides[index],
                block_stride: message.tensor_block_strides[index],
                layers,
            })
        })
        .collect::<Option<Vec<_>>>()?;
    if names.next().is_some() {
        return None;
    }
    Some(vllm::KvCache {
        order: message.layout.clone(),
        num_blocks: message.num_blocks,
        block_tokens: message.block_tokens,
        dtype: message.dtype.clone(),
        kind: message.kind.clone(),
        heads: message.heads,
        states: message.states,
        content_bytes: message.content_bytes,
        page_bytes: message.page_bytes,
        memory_bytes: message.memory_bytes,
        tensors,
    })
}

/// A namespace from its columns.
pub fn namespace(keys: &[String], values: &[String]) -> Option<Namespace> {
    if keys.len() != values.len() || keys.is_empty() || keys.len() > 256 {
        return None;
    }
    Namespace::new(keys.iter().cloned().zip(values.iter().cloned()).collect())
}

/// A registration that was checked; how it goes on depends on where the memory is.
#[derive(Debug)]
pub enum Begun {
    /// Done.
    Host(Registered),
    /// To be finished by [`Import::finish`] on a thread that may wait for the CUDA driver.
    Device(Box<Import>),
}

/// Device memory that is to be imported.
#[derive(Debug)]
pub struct Import {
    source: DeviceSource,
    plan: BlockPlan,
    layout: Layout,
    checked: Checked,
    canary: Canary,
}

#[derive(Debug)]
struct Checked {
    registration: Registration,
    order: String,
}

/// What the client says of block 0.
#[derive(Debug, Clone, Copy)]
struct Canary {
    seed: u64,
    fresh: bool,
    checked: bool,
}

/// Checks everything that can be checked, maps host memory, compares the canary there.
///
/// # Errors
/// The reason, for the peer.
pub fn register(
    message: &wire::Register,
    fd: Option<OwnedFd>,
    peer: Peer,
    gpu: Option<&Gpu>,
) -> Result<Begun, Refused> {
    let malformed = |text: &str| Refused::new(wire::Reason::Malformed, text);
    let cache = describe(message).ok_or_else(|| {
        malformed("expected columns of equal length that name every layer once, got others")
    })?;
    let namespace = namespace(&message.keys, &message.values)
        .ok_or_else(|| malformed("expected 1 to 256 namespace fields with different names, got others"))?;
    let layout = vllm::layout(&cache).map_err(|refusal| Refused::new(wire::Reason::Layout, refusal))?;
    let plan = plan(&layout).map_err(|refusal| Refused::new(wire::Reason::Layout, refusal))?;
    let group = Group { namespace, record_bytes: layout.record_bytes(), format: layout.format().into() };
    let registration = Registration { num_blocks: layout.num_blocks(), groups: vec![group] };
    let checked = Checked { registration, order: message.layout.clone() };
    let canary =
        Canary { seed: message.canary_seed, fresh: message.canary_fresh, checked: message.canary_checked };
    if matches!(message.way, wire::Way::CudaIpc | wire::Way::CudaVmm) {
        let source = source(message, fd, peer, gpu)?;
        return Ok(Begun::Device(Box::new(Import { source, plan, layout, checked, canary })));
    }
    let copier = BlockCopier::new(host_memory(message, fd, peer)?, plan);
    let mut record = vec![0; layout.record_bytes() as usize];
    // Read in any case: it proves that the memory can be reached.
    copier.save(0, &mut record).map_err(|error| Refused::new(wire::Reason::Memory, error))?;
    let canary = canary.compare(&layout, &record)?;
    Ok(Begun::Host(checked.with(Mover::Host(copier), canary)))
}

impl Checked {
    fn with(self, mover: Mover, canary: &'static str) -> Registered {
        Registered { mover, registration: self.registration, layout: self.order, canary }
    }
}

impl Import {
    /// Maps the memory, compares the canary, starts the lanes. Waits for the driver. `unmapped` is called when the
    /// memory is unmapped again, soon where this fails.
    ///
    /// # Errors
    /// The reason, for the peer.
    pub fn finish(
        self,
        gpu: &Arc<Gpu>,
        import: u64,
        reports: &UnboundedSender<CopyReport>,
        unmapped: impl FnOnce() + Send + Sync + 'static,
    ) -> Result<Registered, Refused> {
        let Self { source, plan, layout, checked, canary } = self;
        let refused = |text: String| Refused::new(wire::Reason::Memory, text);
        let mut memory = match gpu.import(source) {
            Ok(memory) => memory,
            Err(error) => {
                unmapped();
                return Err(refused(format!("cannot open the engine's device memory: {error}")));
            }
        };
        memory.when_closed(unmapped);
        let mut record = vec![0; layout.record_bytes() as usize];
        memory.read_block(&plan, 0, &mut record).map_err(|error| refused(error.to_string()))?;
        let canary = canary.compare(&layout, &record)?;
        let lanes = Lanes::start(gpu, memory, plan, reports).map_err(refused)?;
        Ok(checked.with(Mover::Device { lanes, import }, canary))
    }
}

fn source(
    message: &wire::Register,
    fd: Option<OwnedFd>,
    peer: Peer,
    gpu: Option<&Gpu>,
) -> Result<DeviceSource, Refused> {
    let refused = |text: String| Refused::new(wire::Reason::Memory, text);
    let gpu = gpu.ok_or_else(|| {
        refused("expected an engine that computes on the CPU, got one on a GPU: it belongs to the sidecar of its GPU (`pillion devices`)".into())
    })?;
    let device: [u8; 16] = exactly(message.device.as_deref(), "a device UUID of 16 bytes")?;
    if device != gpu.device().uuid.0 {
        let (ours, theirs) = (gpu.device().uuid, driver::Uuid(device));
        return Err(refused(format!("expected memory of device gpu-{ours}, got some of gpu-{theirs}")));
    }
    let handle = match (message.way, fd) {
        (wire::Way::CudaIpc, _) => {
            DeviceHandle::Ipc(exactly(message.handle.as_deref(), "an IPC handle of 64 bytes")?)
        }
        (_, Some(fd)) => DeviceHandle::Vmm(fd),
        (_, None) => return Err(refused("expected a file descriptor of the memory, got none".into())),
    };
    let (events, rest) = message.events.as_deref().unwrap_or_default().as_chunks();
    if !rest.is_empty() || events.len() > EVENTS_MAX {
        return Err(refused(format!("expected at most {EVENTS_MAX} event handles of 64 bytes each")));
    }
    let process = Process::open(peer.pid)
        .map_err(|error| refused(format!("cannot open the engine's process {}: {error}", peer.pid)))?;
    Ok(DeviceSource {
        handle,
        allocation_bytes: message.allocation_bytes,
        offset: message.allocation_offset,
        bytes: message.memory_bytes,
        events: events.to_vec(),
        process,
    })
}

fn exactly<const N: usize>(bytes: Option<&[u8]>, expected: &str) -> Result<[u8; N], Refused> {
    let bytes = bytes.unwrap_or_default();
    bytes.try_into().map_err(|_| {
        Refused::new(wire::Reason::Malformed, format!("expected {expected}, got {} bytes", bytes.len()))
    })
}

fn host_memory(
    message: &wire::Register,
    fd: Option<OwnedFd>,
    peer: Peer,
) -> Result<Arc<dyn EngineMemory>, Refused> {
    let refused = |text: String| Refused::new(wire::Reason::Memory, text);
    match (message.way, fd) {
        (wire::Way::Memfd, Some(fd)) => {
            let memfd =
                Memfd::adopt(fd, Seal::Size, message.memory_bytes).map_err(|e| refused(e.to_string()))?;
            let map = memfd.map(Access::ReadWrite).map_err(|error| refused(error.to_string()))?;
            Ok(Arc::new(MemfdMemory::new(map)))
        }
        (wire::Way::Memfd, None) => Err(refused("expected a memfd with the registration, got none".into())),
        _ => {
            let memory = ProcessMemory::new(peer, message.base, message.memory_bytes);
            memory
                .map(|memory| Arc::new(memory) as Arc<dyn EngineMemory>)
                .map_err(|error| refused(format!("cannot open the engine's process {}: {error}", peer.pid)))
        }
    }
}

impl Canary {
    /// Block 0 by our own reading of the layout against what the engine's own indexing wrote there.
    fn compare(self, layout: &Layout, record: &[u8]) -> Result<&'static str, Refused> {
        if !self.fresh {
            return if self.checked {
                Ok("compared earlier")
            } else {
                Err(Refused::new(
                    wire::Reason::Canary,
                    "expected the layout canary, or proof that it was compared: restart the engine",
                ))
            };
        }
        canary_check(self.seed, layout.shape(), record).map_err(|mismatch| {
            let text = format!(
                "the engine's blocks are not where its declared layout puts them: {mismatch}; it runs uncached"
            );
            Refused::new(wire::Reason::Canary, text)
        })?;
        Ok("compared")
    }
}
