//! `pillion._native`: the client for Python shims. Thin: types in, types out.
//!
//! Importing it starts no thread, opens no file and needs no CUDA. No method raises
//! because of the sidecar; `ValueError` says that an argument is wrong on its face.

use std::{
    collections::HashMap,
    os::fd::BorrowedFd,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use pillion_client::{
    DeviceMemory, ForeignStream, JobEvent, LoadJob, LoadRun, Memory, Options, Other, Registration, SaveJob,
    SaveRun, Worker,
    vllm::{
        KvCacheTensor,
        groups::{Group, Pages},
    },
};
use pyo3::{
    exceptions::{PyOSError, PyValueError},
    prelude::*,
    types::{PyBytes, PyDict},
};

const HASH_BYTES: usize = 32;
/// Events of one worker: as many jobs may run at a time.
const EVENTS_MAX: usize = 1024;

fn id(what: &str, bytes: &[u8]) -> PyResult<[u8; 16]> {
    bytes
        .try_into()
        .map_err(|_| PyValueError::new_err(format!("expected a {what} of 16 bytes, got {}", bytes.len())))
}

fn hashes(bytes: &[u8]) -> PyResult<&[u8]> {
    if bytes.len().is_multiple_of(HASH_BYTES) {
        return Ok(bytes);
    }
    Err(PyValueError::new_err(format!(
        "expected joined block hashes of 32 bytes each, got {} bytes",
        bytes.len()
    )))
}

fn per_block(hashes: &[u8], blocks: &[u32]) -> PyResult<()> {
    if hashes.len() == blocks.len() * HASH_BYTES {
        return Ok(());
    }
    let (found, wanted) = (blocks.len(), hashes.len() / HASH_BYTES);
    Err(PyValueError::new_err(format!("expected one block id per hash ({wanted}), got {found}")))
}

/// A group's namespace in the joined ids of all groups.
fn space(spaces: &[[u8; 16]], group: usize) -> PyResult<[u8; 16]> {
    spaces
        .get(group)
        .copied()
        .ok_or_else(|| PyValueError::new_err(format!("expected a group below {}, got {group}", spaces.len())))
}

fn spaces(bytes: &[u8]) -> PyResult<&[[u8; 16]]> {
    let (ids, rest) = bytes.as_chunks();
    if rest.is_empty() {
        return Ok(ids);
    }
    Err(PyValueError::new_err(format!(
        "expected joined namespace ids of 16 bytes, got {} bytes",
        bytes.len()
    )))
}

fn counted(counts: impl Iterator<Item = u32>, blocks: &[u32]) -> PyResult<()> {
    let counted: u64 = counts.map(u64::from).sum();
    if counted == blocks.len() as u64 {
        return Ok(());
    }
    Err(PyValueError::new_err(format!(
        "expected runs that count the {} blocks, got runs of {counted}",
        blocks.len()
    )))
}

/// A CUDA stream as Python frameworks give it.
fn foreign(stream: Option<u64>) -> Option<ForeignStream> {
    // SAFETY: the caller passes a stream that it works on at this moment; it is used during this call only.
    stream.map(|raw| unsafe { ForeignStream::from_raw(raw) })
}

fn counters(py: Python<'_>, counters: Vec<(&'static str, u64)>) -> PyResult<Py<PyDict>> {
    let dict = PyDict::new(py);
    for (name, value) in counters {
        dict.set_item(name, value)?;
    }
    Ok(dict.unbind())
}

fn options(
    socket: PathBuf,
    engine_id: String,
    tenant: String,
    namespaces: Vec<HashMap<String, String>>,
    launch: Vec<String>,
    grace_ms: u64,
) -> PyResult<Options> {
    if engine_id.is_empty() || tenant.is_empty() {
        return Err(PyValueError::new_err("expected an engine id and a tenant, got an empty string"));
    }
    if namespaces.is_empty() {
        return Err(PyValueError::new_err("expected a namespace for each KV cache group, got none"));
    }
    let sorted = |namespace: HashMap<String, String>| {
        let mut fields: Vec<_> = namespace.into_iter().collect();
        fields.sort();
        fields
    };
    let namespaces = namespaces.into_iter().map(sorted).collect();
    Ok(Options { socket, engine_id, tenant, namespaces, launch, grace: Duration::from_millis(grace_ms) })
}

/// The scheduler's half.
#[pyclass(frozen, module = "pillion._native")]
struct SchedulerClient(pillion_client::SchedulerClient);

#[pymethods]
impl SchedulerClient {
    #[new]
    #[pyo3(signature = (*, socket, engine_id, tenant, namespaces, launch = Vec::new(), grace_ms = 5000))]
    fn new(
        socket: PathBuf,
        engine_id: String,
        tenant: String,
        namespaces: Vec<HashMap<String, String>>,
        launch: Vec<String>,
        grace_ms: u64,
    ) -> PyResult<Self> {
        let options = options(socket, engine_id, tenant, namespaces, launch, grace_ms)?;
        pillion_client::SchedulerClient::new(options)
            .map(Self)
            .map_err(|error| PyOSError::new_err(error.to_string()))
    }

    fn ready(&self) -> bool {
        self.0.ready()
    }

    fn status(&self) -> String {
        self.0.status()
    }

    /// 16 bytes per group; None until all are open.
    fn namespace_ids<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.0.namespace_ids().map(|ids| PyBytes::new(py, ids.as_flattened()))
    }

    fn lookup(&self, group: usize, hashes: &[u8]) -> PyResult<usize> {
        Ok(self.0.lookup(group, self::hashes(hashes)?))
    }

    /// One byte per block: 1 where the table has it.
    fn present<'py>(&self, py: Python<'py>, group: usize, hashes: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
        let present = self.0.present(group, self::hashes(hashes)?);
        Ok(PyBytes::new(py, &present.into_iter().map(u8::from).collect::<Vec<_>>()))
    }

    fn absent(&self, group: usize, hashes: &[u8]) -> PyResult<Vec<u32>> {
        Ok(self.0.absent(group, self::hashes(hashes)?))
    }

    fn lease(&self, runs: Vec<(usize, Bound<'_, PyBytes>)>) -> PyResult<u64> {
        let checked =
            |(group, bytes): &'_ (usize, Bound<'_, PyBytes>)| hashes(bytes.as_bytes()).map(|_| *group);
        let groups = runs.iter().map(checked).collect::<PyResult<Vec<_>>>()?;
        let runs: Vec<_> =
            groups.into_iter().zip(&runs).map(|(group, (_, bytes))| (group, bytes.as_bytes())).collect();
        Ok(self.0.lease(&runs))
    }

    #[pyo3(signature = (ticket, wait_us = 0))]
    fn lease_poll<'py>(
        &self,
        py: Python<'py>,
        ticket: u64,
        wait_us: u64,
    ) -> Option<(Vec<u32>, Bound<'py, PyBytes>)> {
        let wait = Duration::from_micros(wait_us);
        // Without a wait there is nothing to gain from letting other threads in.
        let grant = if wait.is_zero() {
            self.0.lease_poll(ticket, wait)
        } else {
            py.detach(|| self.0.lease_poll(ticket, wait))
        }?;
        let lease: &[u8] = if grant.is_nothing() { &[] } else { &grant.lease };
        let lease = PyBytes::new(py, lease);
        Some((grant.blocks, lease))
    }

    fn release(&self, ticket: u64) {
        self.0.release(ticket);
    }

    /// The lease now belongs to a job; it is renewed until it is released.
    fn lease_used(&self, ticket: u64) {
        let _ = ticket;
    }

    fn neighbours(&self) -> Vec<String> {
        self.0.neighbours()
    }

    fn device(&self) -> String {
        self.0.device()
    }

    /// groups: those that go on, from the first; None: all.
    #[pyo3(signature = (groups = None))]
    fn new_epoch(&self, groups: Option<usize>) {
        self.0.new_epoch(groups.unwrap_or(usize::MAX));
    }

    fn counters(&self, py: Python<'_>) -> PyResult<Py<PyDict>> {
        counters(py, self.0.counters())
    }

    fn close(&self) {
        self.0.close();
    }
}

/// A KVCacheTensor with the spec of its layers.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct PagesOfGroup {
    size: u64,
    offset: u64,
    layer_stride: u64,
    block_stride: u64,
    layers: Vec<String>,
    heads: u32,
    states: u32,
    content_bytes: u32,
    page_bytes: u64,
    kernel_blocks: u32,
    packing: String,
}

/// One KV cache group.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct GroupOfWorker {
    block_tokens: u32,
    pages: Vec<PagesOfGroup>,
}

fn wrong(error: impl ToString) -> PyErr {
    PyValueError::new_err(error.to_string())
}

fn group_of(group: GroupOfWorker) -> PyResult<Group> {
    let pages = |pages: PagesOfGroup| {
        let PagesOfGroup { size, offset, layer_stride, block_stride, layers, .. } = pages;
        Ok(Pages {
            tensor: KvCacheTensor { size, offset, layer_stride, block_stride, layers },
            heads: pages.heads,
            states: pages.states,
            content_bytes: pages.content_bytes,
            page_bytes: pages.page_bytes,
            kernel_blocks: pages.kernel_blocks,
            packing: pages.packing.parse().map_err(wrong)?,
        })
    };
    let pages = group.pages.into_iter().map(pages).collect::<PyResult<_>>()?;
    Ok(Group { block_tokens: group.block_tokens, pages })
}

fn memory(memory_bytes: u64, memfd: i32, base: u64, cuda: bool) -> PyResult<Memory> {
    if cuda {
        return Ok(Memory::Device(DeviceMemory::export(base, memory_bytes).map_err(wrong)?));
    }
    if memfd < 0 {
        return Ok(Memory::Process { base });
    }
    // SAFETY: the caller keeps the descriptor open during the call; it is duplicated here.
    let borrowed = unsafe { BorrowedFd::borrow_raw(memfd) };
    let owned = borrowed.try_clone_to_owned();
    Ok(Memory::Memfd(owned.map_err(|error| wrong(format!("memfd {memfd}: {error}")))?))
}

/// A worker's half.
#[pyclass(frozen, module = "pillion._native")]
struct WorkerClient {
    client: pillion_client::WorkerClient,
    /// What was described and not registered yet.
    described: Mutex<Option<Registration>>,
}

impl WorkerClient {
    fn described(&self) -> MutexGuard<'_, Option<Registration>> {
        self.described.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl WorkerClient {
    #[new]
    #[pyo3(signature = (*, socket, engine_id, tenant, namespaces, launch = Vec::new(), grace_ms = 5000))]
    fn new(
        socket: PathBuf,
        engine_id: String,
        tenant: String,
        namespaces: Vec<HashMap<String, String>>,
        launch: Vec<String>,
        grace_ms: u64,
    ) -> PyResult<Self> {
        let options = options(socket, engine_id, tenant, namespaces, launch, grace_ms)?;
        let client = pillion_client::WorkerClient::new(options);
        let client = client.map_err(|error| PyOSError::new_err(error.to_string()))?;
        Ok(Self { client, described: Mutex::default() })
    }

    /// Describes the KV memory: a device's, that of a memfd, or this process's own at an address. See
    /// `layouts/src/vllm/grammar.rs` for packings.
    #[pyo3(signature = (*, layout, num_blocks, memory_bytes, rank, world, groups, others = Vec::new(), memfd = -1, base = 0, cuda = false))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of the Python interface")]
    fn describe(
        &self,
        layout: String,
        num_blocks: u64,
        memory_bytes: u64,
        rank: u32,
        world: u32,
        groups: Vec<GroupOfWorker>,
        others: Vec<(u32, u32, u32)>,
        memfd: i32,
        base: u64,
        cuda: bool,
    ) -> PyResult<()> {
        let groups = groups.into_iter().map(group_of).collect::<PyResult<_>>()?;
        let worker = Worker { order: layout, num_blocks, memory_bytes, rank, world, groups };
        let memory = memory(memory_bytes, memfd, base, cuda)?;
        let other = |(group, shard, shards)| Other { group, shard, shards };
        let others = others.into_iter().map(other).collect();
        *self.described() = Some(Registration::new(worker, others, memory).map_err(wrong)?);
        Ok(())
    }

    /// Compares block 0, read as a group's was described, with the canary that was just written there.
    fn check_canary(&self, py: Python<'_>, group: usize, seed: u64) -> PyResult<()> {
        py.detach(|| match self.described().as_mut() {
            Some(registration) => registration.check_canary(group, seed).map_err(wrong),
            None => Err(wrong("expected a description of the KV memory before its canary")),
        })
    }

    /// Presents what was described, now and at every later attachment. Block 0 must still hold the canary that was
    /// compared last. `cache_mode`: what saves mean on a sidecar with an SSD, unless that is left to it.
    #[pyo3(signature = (*, events = 512, cache_mode = None))]
    fn register(&self, events: usize, cache_mode: Option<String>) -> PyResult<()> {
        if !(1..=EVENTS_MAX).contains(&events) {
            return Err(wrong(format!("expected 1 to {EVENTS_MAX} events, got {events}")));
        }
        let registration = self.described().take();
        let registration = registration
            .ok_or_else(|| wrong("expected a description of the KV memory before its registration"))?;
        self.client.register(registration.with_cache_mode(cache_mode), events).map_err(wrong)
    }

    fn canary_over(&self) {
        self.client.canary_over();
    }

    #[pyo3(signature = (wait_ms = 2000))]
    fn unregister(&self, py: Python<'_>, wait_ms: u64) -> bool {
        py.detach(|| self.client.unregister(Duration::from_millis(wait_ms)))
    }

    fn ready(&self) -> bool {
        self.client.ready()
    }

    fn status(&self) -> String {
        self.client.status()
    }

    fn canary_checked(&self) -> bool {
        self.client.canary_checked()
    }

    /// `spaces`: the namespace ids of all groups; `runs`: (group, run of the lease, its first block, blocks).
    #[pyo3(signature = (job, lease, spaces, runs, hashes, blocks, deadline_ms, stream = None))]
    #[expect(clippy::too_many_arguments, reason = "the Python interface")]
    fn submit_load(
        &self,
        job: &[u8],
        lease: &[u8],
        spaces: &[u8],
        runs: Vec<(usize, u32, u32, u32)>,
        hashes: &[u8],
        blocks: Vec<u32>,
        deadline_ms: u64,
        stream: Option<u64>,
    ) -> PyResult<()> {
        per_block(hashes, &blocks)?;
        let (job, lease, spaces) = (id("job", job)?, id("lease", lease)?, self::spaces(spaces)?);
        let run =
            |(group, run, first, count)| Ok(LoadRun { space: space(spaces, group)?, run, first, count });
        let runs = runs.into_iter().map(run).collect::<PyResult<Vec<_>>>()?;
        counted(runs.iter().map(|run| run.count), &blocks)?;
        let (hashes, deadline) = (hashes.to_vec(), Duration::from_millis(deadline_ms));
        let stream = foreign(stream);
        self.client.submit_load(LoadJob { job, lease, runs, hashes, blocks, deadline, stream });
        Ok(())
    }

    /// `spaces`: the namespace ids of all groups; `runs`: (group, hash of the block before or b"", blocks).
    #[pyo3(signature = (job, spaces, runs, hashes, blocks, deadline_ms, stream = None))]
    #[expect(clippy::too_many_arguments, reason = "the Python interface")]
    fn submit_save(
        &self,
        job: &[u8],
        spaces: &[u8],
        runs: Vec<(usize, Bound<'_, PyBytes>, u32)>,
        hashes: &[u8],
        blocks: Vec<u32>,
        deadline_ms: u64,
        stream: Option<u64>,
    ) -> PyResult<()> {
        per_block(hashes, &blocks)?;
        let (job, spaces) = (id("job", job)?, self::spaces(spaces)?);
        let run = |(group, parent, count): (usize, Bound<'_, PyBytes>, u32)| {
            let parent = match parent.as_bytes() {
                [] => None,
                bytes => Some(bytes.try_into().map_err(|_| {
                    let got = bytes.len();
                    PyValueError::new_err(format!("expected a parent hash of 0 or 32 bytes, got {got}"))
                })?),
            };
            Ok(SaveRun { space: space(spaces, group)?, parent, count })
        };
        let runs = runs.into_iter().map(run).collect::<PyResult<Vec<_>>>()?;
        counted(runs.iter().map(|run| run.count), &blocks)?;
        let (hashes, deadline) = (hashes.to_vec(), Duration::from_millis(deadline_ms));
        let stream = foreign(stream);
        self.client.submit_save(SaveJob { job, runs, hashes, blocks, deadline, stream });
        Ok(())
    }

    fn poll<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u8, bool, u32)> {
        let event = |event: JobEvent| {
            (PyBytes::new(py, &event.job), event.outcome as u8, event.quiesced, event.blocks)
        };
        self.client.poll().into_iter().map(event).collect()
    }

    fn unquiesced(&self) -> usize {
        self.client.unquiesced()
    }

    fn counters(&self, py: Python<'_>) -> PyResult<Py<PyDict>> {
        counters(py, self.client.counters())
    }

    fn close(&self) {
        self.client.close();
    }
}

/// The version of this build.
#[pyfunction]
fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Where the sidecar of a device listens by default.
#[pyfunction]
fn default_socket(device: &str) -> PyResult<String> {
    Ok(pillion_client::default_socket(device).to_string_lossy().into_owned())
}

/// The name of the device that holds an address of device memory. Raises OSError where it is none.
#[pyfunction]
fn cuda_device(address: u64) -> PyResult<String> {
    let device = pillion_client::device_of(address);
    device.map(|device| device.label()).map_err(|error| PyOSError::new_err(error.to_string()))
}

/// Why CUDA cannot be used in this process, or None.
#[pyfunction]
fn cuda_missing() -> Option<String> {
    pillion_client::cuda_init().err().map(|error| error.to_string())
}

/// The status report of a sidecar, as JSON. Raises OSError with the reason where there is none.
#[pyfunction]
#[pyo3(signature = (socket, timeout_ms = 2000))]
fn status(py: Python<'_>, socket: PathBuf, timeout_ms: u64) -> PyResult<String> {
    py.detach(|| pillion_client::fetch_status(&socket, Duration::from_millis(timeout_ms)))
        .map_err(PyOSError::new_err)
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<SchedulerClient>()?;
    module.add_class::<WorkerClient>()?;
    module.add_function(wrap_pyfunction!(version, module)?)?;
    module.add_function(wrap_pyfunction!(default_socket, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_device, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_missing, module)?)?;
    module.add_function(wrap_pyfunction!(status, module)?)?;
    Ok(())
}
