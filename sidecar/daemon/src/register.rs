//! From a worker's registration to a copier of its blocks, or a reason why not (I10).

use std::{collections::HashSet, os::fd::OwnedFd, sync::Arc};

use pillion_core::{CacheMode, Group, Registration, key::Namespace};
use pillion_cuda::{
    BlockCopier, DeviceHandle, DeviceSource, EngineMemory, Gpu, MemfdMemory, ProcessMemory, driver,
};
use pillion_layouts::{
    BlockPlan, CheckedGroup, GROUPS_MAX, OtherShard, Rank, Worker,
    vllm::{
        KvCacheTensor,
        groups::{Group as LayoutGroup, Pages},
    },
};
use pillion_protocol::{MAX_OTHER_SHARDS, wire};
use pillion_shm::{
    Access, Memfd, Seal,
    pidfd::{Peer, Process},
};
use tokio::sync::mpsc::UnboundedSender;

use crate::{config, copier::CopyReport, driver::Mover, lanes::Lanes};

/// Events of one worker, at most (I8).
const EVENTS_MAX: usize = 4096;

/// Contiguous runs of one block of every shard of another tensor-parallel size, at most (I8).
const OTHER_RUNS_MAX: usize = 1 << 22;

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

/// The next `count` entries of a column; fails where there are fewer.
fn next<'a, T>(column: &mut &'a [T], count: u32) -> Option<&'a [T]> {
    let (next, rest) = column.split_at_checked(count as usize)?;
    *column = rest;
    Some(next)
}

/// The columns put together again: the worker's groups, and their namespaces.
fn describe(message: &wire::Register) -> Result<(Worker, Vec<Namespace>), Refused> {
    let malformed = |text: &str| Refused::new(wire::Reason::Malformed, text);
    let groups = message.group_block_tokens.len();
    if groups > GROUPS_MAX || [message.group_fields.len(), message.group_pages.len()] != [groups; 2] {
        return Err(malformed(&format!(
            "expected columns of at most {GROUPS_MAX} KV cache groups, got others"
        )));
    }
    let uneven = || malformed("expected columns of equal length that name every layer once, got others");
    let (mut keys, mut values) = (message.keys.as_slice(), message.values.as_slice());
    let mut namespaces = Vec::with_capacity(groups);
    for count in &message.group_fields {
        let fields = next(&mut keys, *count).zip(next(&mut values, *count));
        let namespace = fields.and_then(|(keys, values)| namespace(keys, values)).ok_or_else(|| {
            malformed("expected 1 to 256 namespace fields with different names for each group, got others")
        })?;
        if namespaces.contains(&namespace) {
            let text = "expected a namespace of its own for each KV cache group, got one twice";
            return Err(Refused::new(wire::Reason::Namespace, text));
        }
        namespaces.push(namespace);
    }
    if !keys.is_empty() || !values.is_empty() {
        return Err(malformed("expected the namespaces' fields and no more, got others"));
    }
    let mut pages = pages(message)?.into_iter();
    let group = |(block_tokens, count): (&u32, &u32)| {
        let pages: Vec<Pages> = pages.by_ref().take(*count as usize).collect();
        (pages.len() == *count as usize).then_some(LayoutGroup { block_tokens: *block_tokens, pages })
    };
    let columns = message.group_block_tokens.iter().zip(&message.group_pages);
    let groups: Vec<LayoutGroup> = columns.map(group).collect::<Option<_>>().ok_or_else(uneven)?;
    if pages.next().is_some() {
        return Err(uneven());
    }
    let worker = Worker {
        order: message.layout.clone(),
        num_blocks: message.num_blocks,
        memory_bytes: message.memory_bytes,
        rank: message.rank,
        world: message.world,
        groups,
    };
    Ok((worker, namespaces))
}

/// The shards of other tensor-parallel sizes, each with its namespace.
fn others(
    message: &wire::Register,
    groups: &[CheckedGroup],
    namespaces: &[Namespace],
) -> Result<Vec<(OtherShard, Namespace)>, Refused> {
    let column = |column: &Option<Vec<u32>>| column.clone().unwrap_or_default();
    let (of, shards) = (column(&message.other_groups), column(&message.other_shards));
    let counts = column(&message.other_counts);
    let malformed = |text: String| Refused::new(wire::Reason::Malformed, text);
    if of.len() > MAX_OTHER_SHARDS || [shards.len(), counts.len()] != [of.len(); 2] {
        return Err(malformed(format!(
            "expected three equal columns of at most {MAX_OTHER_SHARDS} shards of other tensor-parallel sizes, got \
             {}, {} and {}",
            of.len(),
            shards.len(),
            counts.len()
        )));
    }
    let mut seen: HashSet<Namespace> = namespaces.iter().cloned().collect();
    let mut runs = 0;
    let mut out = Vec::with_capacity(of.len());
    for ((of, index), size) in of.into_iter().zip(shards).zip(counts) {
        let known = groups.get(of as usize).zip(namespaces.get(of as usize));
        let (group, namespace) = known.ok_or_else(|| {
            malformed(format!("expected shards of a group below {}, got one of {of}", groups.len()))
        })?;
        let namespace = namespace.of_shard(index, size).ok_or_else(|| {
            malformed(format!(
                "expected a field `shard` in the namespace of group {of}, whose other shards are loaded"
            ))
        })?;
        if !seen.insert(namespace.clone()) {
            let text = format!("expected each shard once, got {index} of {size} of group {of} again");
            return Err(Refused::new(wire::Reason::Namespace, text));
        }
        let other = group.other_shard(Rank { index, size });
        let other = other.map_err(|refusal| Refused::new(wire::Reason::Layout, refusal))?;
        runs += other.plan().runs();
        if runs > OTHER_RUNS_MAX {
            let text = format!(
                "expected at most {OTHER_RUNS_MAX} contiguous runs of all other shards' blocks together, got {runs}"
            );
            return Err(Refused::new(wire::Reason::Layout, text));
        }
        out.push((other, namespace));
    }
    Ok(out)
}

/// All groups' pages.
fn pages(message: &wire::Register) -> Result<Vec<Pages>, Refused> {
    let count = message.page_sizes.len();
    let columns = [
        message.page_offsets.len(),
        message.page_layer_strides.len(),
        message.page_block_strides.len(),
        message.page_layers.len(),
        message.page_heads.len(),
        message.page_states.len(),
        message.page_content_bytes.len(),
        message.page_bytes.len(),
        message.page_kernel_blocks.len(),
        message.page_packings.len(),
    ];
    let uneven = || {
        let text = "expected columns of equal length that name every layer once, got others";
        Refused::new(wire::Reason::Malformed, text)
    };
    if columns.iter().any(|length| *length != count) {
        return Err(uneven());
    }
    let mut names = message.layer_names.as_slice();
    let mut out = Vec::with_capacity(count);
    for index in 0..count {
        let packing = message.page_packings[index].parse();
        out.push(Pages {
            tensor: KvCacheTensor {
                size: message.page_sizes[index],
                offset: message.page_offsets[index],
                layer_stride: message.page_layer_strides[index],
                block_stride: message.page_block_strides[index],
                layers: next(&mut names, message.page_layers[index]).ok_or_else(uneven)?.to_vec(),
            },
            heads: message.page_heads[index],
            states: message.page_states[index],
            content_bytes: message.page_content_bytes[index],
            page_bytes: message.page_bytes[index],
            kernel_blocks: message.page_kernel_blocks[index],
            packing: packing.map_err(|refusal| Refused::new(wire::Reason::Layout, refusal))?,
        });
    }
    if names.is_empty() { Ok(out) } else { Err(uneven()) }
}

/// A namespace from its columns.
pub fn namespace(keys: &[String], values: &[String]) -> Option<Namespace> {
    if keys.len() != values.len() || keys.is_empty() || keys.len() > 256 {
        return None;
    }
    Namespace::new(keys.iter().cloned().zip(values.iter().cloned()).collect())
}

fn cache_mode(name: &str) -> Result<CacheMode, Refused> {
    config::cache_mode(name).ok_or_else(|| {
        let expected = config::CACHE_MODES.join(", ");
        Refused::new(wire::Reason::Malformed, format!("expected a cache mode of {expected}, got {name:?}"))
    })
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
    checked: Checked,
    canary: Canary,
}

#[derive(Debug)]
struct Checked {
    registration: Registration,
    order: String,
    groups: Vec<CheckedGroup>,
    others: Vec<OtherShard>,
}

/// What the client says of block 0.
#[derive(Debug, Clone, Copy)]
struct Canary {
    /// Whose it is: the groups alias one pool.
    group: usize,
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
    let (worker, namespaces) = describe(message)?;
    let groups = worker.check().map_err(|refusal| Refused::new(wire::Reason::Layout, refusal))?;
    let canary = Canary {
        group: message.canary_group as usize,
        seed: message.canary_seed,
        fresh: message.canary_fresh,
        checked: message.canary_checked,
    };
    if canary.group >= groups.len() {
        let text =
            format!("expected the canary of a group below {}, got {}", groups.len(), message.canary_group);
        return Err(Refused::new(wire::Reason::Malformed, text));
    }
    let (others, their_namespaces): (Vec<_>, Vec<_>) =
        others(message, &groups, &namespaces)?.into_iter().unzip();
    let own = groups.iter().map(|group| (group.record_bytes(), group.format(), false));
    let theirs = others.iter().map(|other| (other.record_bytes(), other.format(), true));
    let of_core = |((record_bytes, format, load_only), namespace): ((u64, &str, bool), Namespace)| Group {
        namespace,
        record_bytes,
        format: format.into(),
        load_only,
    };
    let registration = Registration {
        num_blocks: message.num_blocks,
        groups: own.chain(theirs).zip(namespaces.into_iter().chain(their_namespaces)).map(of_core).collect(),
        cache_mode: message.cache_mode.as_deref().map(cache_mode).transpose()?,
    };
    let checked = Checked { registration, order: message.layout.clone(), groups, others };
    if matches!(message.way, wire::Way::CudaIpc | wire::Way::CudaVmm) {
        let source = source(message, fd, peer, gpu)?;
        return Ok(Begun::Device(Box::new(Import { source, checked, canary })));
    }
    let copier = BlockCopier::new(host_memory(message, fd, peer)?, checked.plans());
    let group = &checked.groups[canary.group];
    let mut record = vec![0; group.record_bytes() as usize];
    // Read in any case: it proves that the memory can be reached.
    copier
        .save(canary.group as u16, 0, &mut record)
        .map_err(|error| Refused::new(wire::Reason::Memory, error))?;
    let canary = canary.compare(group, &record)?;
    Ok(Begun::Host(checked.with(Mover::Host(copier), canary)))
}

impl Checked {
    fn plans(&self) -> Vec<BlockPlan> {
        let own = self.groups.iter().map(CheckedGroup::plan);
        own.chain(self.others.iter().map(OtherShard::plan)).cloned().collect()
    }

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
        let Self { source, checked, canary } = self;
        let refused = |text: String| Refused::new(wire::Reason::Memory, text);
        let mut memory = match gpu.import(source) {
            Ok(memory) => memory,
            Err(error) => {
                unmapped();
                return Err(refused(format!("cannot open the engine's device memory: {error}")));
            }
        };
        memory.when_closed(unmapped);
        let group = &checked.groups[canary.group];
        let mut record = vec![0; group.record_bytes() as usize];
        memory.read_block(group.plan(), 0, &mut record).map_err(|error| refused(error.to_string()))?;
        let canary = canary.compare(group, &record)?;
        let lanes = Lanes::start(gpu, memory, checked.plans(), reports).map_err(refused)?;
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
    /// Block 0 by our own reading of its group against what the engine's own indexing wrote there.
    fn compare(self, group: &CheckedGroup, record: &[u8]) -> Result<&'static str, Refused> {
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
        group.canary_check(self.seed, record).map_err(|mismatch| {
            let text = format!(
                "the engine's blocks are not where its declared layout puts them: {mismatch}; it runs uncached"
            );
            Refused::new(wire::Reason::Canary, text)
        })?;
        Ok("compared")
    }
}
