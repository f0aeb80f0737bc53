//! From a worker's registration to a copier of its blocks, or a reason why not (I10).

use std::{os::fd::OwnedFd, sync::Arc};

use pillion_core::{Registration, key::Namespace};
use pillion_cuda::{BlockCopier, EngineMemory, MemfdMemory, ProcessMemory};
use pillion_layouts::{Layout, canary_check, plan, vllm};
use pillion_protocol::wire;
use pillion_shm::{Access, Memfd, Seal, pidfd::Peer};

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
    pub copier: BlockCopier,
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

/// Checks everything that can be checked, maps the memory, compares the canary.
///
/// # Errors
/// The reason, for the peer.
pub fn register(message: &wire::Register, fd: Option<OwnedFd>, peer: Peer) -> Result<Registered, Refused> {
    let malformed = |text: &str| Refused::new(wire::Reason::Malformed, text);
    let cache = describe(message).ok_or_else(|| {
        malformed("expected columns of equal length that name every layer once, got others")
    })?;
    let namespace = namespace(&message.keys, &message.values)
        .ok_or_else(|| malformed("expected 1 to 256 namespace fields with different names, got others"))?;
    let layout = vllm::layout(&cache).map_err(|refusal| Refused::new(wire::Reason::Layout, refusal))?;
    let plan = plan(&layout).map_err(|refusal| Refused::new(wire::Reason::Layout, refusal))?;
    let memory = memory(message, fd, peer)?;
    let copier = BlockCopier::new(memory, plan);
    let canary = compare(message, &copier, &layout)?;
    let registration = Registration {
        namespace,
        record_bytes: layout.record_bytes(),
        num_blocks: layout.num_blocks(),
        format: layout.format().into(),
    };
    Ok(Registered { copier, registration, layout: message.layout.clone(), canary })
}

fn memory(
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
        (wire::Way::ProcessVm, _) => {
            let memory = ProcessMemory::new(peer, message.base, message.memory_bytes);
            memory
                .map(|memory| Arc::new(memory) as Arc<dyn EngineMemory>)
                .map_err(|error| refused(format!("cannot open the engine's process {}: {error}", peer.pid)))
        }
    }
}

/// Block 0 by our own reading of the layout against what the engine's own indexing wrote there.
fn compare(message: &wire::Register, copier: &BlockCopier, layout: &Layout) -> Result<&'static str, Refused> {
    let mut record = vec![0; layout.record_bytes() as usize];
    // Read in any case: it proves that the memory can be reached.
    copier.save(0, &mut record).map_err(|error| Refused::new(wire::Reason::Memory, error))?;
    if !message.canary_fresh {
        return if message.canary_checked {
            Ok("compared earlier")
        } else {
            Err(Refused::new(
                wire::Reason::Canary,
                "expected the layout canary, or proof that it was compared: restart the engine",
            ))
        };
    }
    canary_check(message.canary_seed, layout.shape(), &record).map_err(|mismatch| {
        let text = format!(
            "the engine's blocks are not where its declared layout puts them: {mismatch}; it runs uncached"
        );
        Refused::new(wire::Reason::Canary, text)
    })?;
    Ok("compared")
}
