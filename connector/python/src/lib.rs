//! `pillion._native`: the client for Python shims. Thin: types in, types out.
//!
//! Importing it starts no thread, opens no file and needs no CUDA. No method raises
//! because of the sidecar; `ValueError` says that an argument is wrong on its face.

use std::{collections::HashMap, os::fd::BorrowedFd, path::PathBuf, time::Duration};

use pillion_client::{
    DeviceMemory, ForeignStream, JobEvent, LoadJob, Memory, Options, Registration, SaveJob, Tensor,
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
    namespace: HashMap<String, String>,
    launch: Vec<String>,
    grace_ms: u64,
) -> PyResult<Options> {
    if engine_id.is_empty() || tenant.is_empty() {
        return Err(PyValueError::new_err("expected an engine id and a tenant, got an empty string"));
    }
    let mut namespace: Vec<_> = namespace.into_iter().collect();
    namespace.sort();
    Ok(Options { socket, engine_id, tenant, namespace, launch, grace: Duration::from_millis(grace_ms) })
}

/// The scheduler's half.
#[pyclass(frozen, module = "pillion._native")]
struct SchedulerClient(pillion_client::SchedulerClient);

#[pymethods]
impl SchedulerClient {
    #[new]
    #[pyo3(signature = (*, socket, engine_id, tenant, namespace, launch = Vec::new(), grace_ms = 5000))]
    fn new(
        socket: PathBuf,
        engine_id: String,
        tenant: String,
        namespace: HashMap<String, String>,
        launch: Vec<String>,
        grace_ms: u64,
    ) -> PyResult<Self> {
        let options = options(socket, engine_id, tenant, namespace, launch, grace_ms)?;
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

    fn namespace_id<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.0.namespace_id().map(|id| PyBytes::new(py, &id))
    }

    fn lookup(&self, hashes: &[u8]) -> PyResult<usize> {
        Ok(self.0.lookup(self::hashes(hashes)?))
    }

    fn absent(&self, hashes: &[u8]) -> PyResult<Vec<u32>> {
        Ok(self.0.absent(self::hashes(hashes)?))
    }

    fn lease(&self, hashes: &[u8]) -> PyResult<u64> {
        Ok(self.0.lease(self::hashes(hashes)?))
    }

    #[pyo3(signature = (ticket, wait_us = 0))]
    fn lease_poll<'py>(
        &self,
        py: Python<'py>,
        ticket: u64,
        wait_us: u64,
    ) -> Option<(u32, Bound<'py, PyBytes>)> {
        let wait = Duration::from_micros(wait_us);
        // Without a wait there is nothing to gain from letting other threads in.
        let grant = if wait.is_zero() {
            self.0.lease_poll(ticket, wait)
        } else {
            py.detach(|| self.0.lease_poll(ticket, wait))
        }?;
        let lease: &[u8] = if grant.blocks > 0 { &grant.lease } else { &[] };
        Some((grant.blocks, PyBytes::new(py, lease)))
    }

    fn release(&self, ticket: u64) {
        self.0.release(ticket);
    }

    /// The lease now belongs to a job; it is renewed until it is released.
    fn lease_used(&self, ticket: u64) {
        let _ = ticket;
    }

    fn new_epoch(&self) {
        self.0.new_epoch();
    }

    fn counters(&self, py: Python<'_>) -> PyResult<Py<PyDict>> {
        counters(py, self.0.counters())
    }

    fn close(&self) {
        self.0.close();
    }
}

/// A worker's half.
#[pyclass(frozen, module = "pillion._native")]
struct WorkerClient(pillion_client::WorkerClient);

#[pymethods]
impl WorkerClient {
    #[new]
    #[pyo3(signature = (*, socket, engine_id, tenant, namespace, launch = Vec::new(), grace_ms = 5000))]
    fn new(
        socket: PathBuf,
        engine_id: String,
        tenant: String,
        namespace: HashMap<String, String>,
        launch: Vec<String>,
        grace_ms: u64,
    ) -> PyResult<Self> {
        let options = options(socket, engine_id, tenant, namespace, launch, grace_ms)?;
        pillion_client::WorkerClient::new(options)
            .map(Self)
            .map_err(|error| PyOSError::new_err(error.to_string()))
    }

    #[pyo3(signature = (*, layout, num_blocks, block_tokens, dtype, kind, heads, states, content_bytes, page_bytes,
                        tensors, memory_bytes, canary_seed, memfd = -1, base = 0, cuda = false, events = 512))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of the Python interface")]
    fn register(
        &self,
        layout: String,
        num_blocks: u64,
        block_tokens: u32,
        dtype: String,
        kind: String,
        heads: u32,
        states: u32,
        content_bytes: u32,
        page_bytes: u64,
        tensors: Vec<(u64, u64, u64, u64, Vec<String>)>,
        memory_bytes: u64,
        canary_seed: u64,
        memfd: i32,
        base: u64,
        cuda: bool,
        events: usize,
    ) -> PyResult<()> {
        if !(1..=EVENTS_MAX).contains(&events) {
            return Err(PyValueError::new_err(format!("expected 1 to {EVENTS_MAX} events, got {events}")));
        }
        let memory = if cuda {
            let exported = DeviceMemory::export(base, memory_bytes);
            Memory::Device(exported.map_err(|error| PyValueError::new_err(error.to_string()))?)
        } else if memfd >= 0 {
            // SAFETY: the caller keeps the descriptor open during the call; it is duplicated here.
            let borrowed = unsafe { BorrowedFd::borrow_raw(memfd) };
            let owned = borrowed.try_clone_to_owned();
            Memory::Memfd(owned.map_err(|error| PyValueError::new_err(format!("memfd {memfd}: {error}")))?)
        } else {
            Memory::Process { base }
        };
        let tensors = tensors
            .into_iter()
            .map(|(size, offset, layer_stride, block_stride, layers)| Tensor {
                size,
                offset,
                layer_stride,
                block_stride,
                layers,
            })
            .collect();
        let registration = Registration {
            layout,
            kind,
            dtype,
            num_blocks,
            block_tokens,
            heads,
            states,
            content_bytes,
            page_bytes,
            tensors,
            memory_bytes,
            memory,
            canary_seed,
        };
        self.0.register(registration, events).map_err(|error| PyValueError::new_err(error.to_string()))
    }

    fn canary_over(&self) {
        self.0.canary_over();
    }

    #[pyo3(signature = (wait_ms = 2000))]
    fn unregister(&self, py: Python<'_>, wait_ms: u64) -> bool {
        py.detach(|| self.0.unregister(Duration::from_millis(wait_ms)))
    }

    fn ready(&self) -> bool {
        self.0.ready()
    }

    fn status(&self) -> String {
        self.0.status()
    }

    fn canary_checked(&self) -> bool {
        self.0.canary_checked()
    }

    #[pyo3(signature = (job, lease, first, namespace, hashes, blocks, deadline_ms, stream = None))]
    #[expect(clippy::too_many_arguments, reason = "the Python interface")]
    fn submit_load(
        &self,
        job: &[u8],
        lease: &[u8],
        first: u32,
        namespace: &[u8],
        hashes: &[u8],
        blocks: Vec<u32>,
        deadline_ms: u64,
        stream: Option<u64>,
    ) -> PyResult<()> {
        per_block(hashes, &blocks)?;
        let (job, lease, space) = (id("job", job)?, id("lease", lease)?, id("namespace", namespace)?);
        let (hashes, deadline) = (hashes.to_vec(), Duration::from_millis(deadline_ms));
        let stream = foreign(stream);
        self.0.submit_load(LoadJob { job, lease, first, space, hashes, blocks, deadline, stream });
        Ok(())
    }

    #[pyo3(signature = (job, namespace, parent, hashes, blocks, deadline_ms, stream = None))]
    #[expect(clippy::too_many_arguments, reason = "the Python interface")]
    fn submit_save(
        &self,
        job: &[u8],
        namespace: &[u8],
        parent: &[u8],
        hashes: &[u8],
        blocks: Vec<u32>,
        deadline_ms: u64,
        stream: Option<u64>,
    ) -> PyResult<()> {
        per_block(hashes, &blocks)?;
        if !parent.is_empty() && parent.len() != HASH_BYTES {
            let got = parent.len();
            return Err(PyValueError::new_err(format!("expected a parent hash of 0 or 32 bytes, got {got}")));
        }
        let (job, space) = (id("job", job)?, id("namespace", namespace)?);
        let (parent, hashes, deadline) =
            (parent.to_vec(), hashes.to_vec(), Duration::from_millis(deadline_ms));
        let stream = foreign(stream);
        self.0.submit_save(SaveJob { job, space, parent, hashes, blocks, deadline, stream });
        Ok(())
    }

    fn poll<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u8, bool, u32)> {
        let event = |event: JobEvent| {
            (PyBytes::new(py, &event.job), event.outcome as u8, event.quiesced, event.blocks)
        };
        self.0.poll().into_iter().map(event).collect()
    }

    fn unquiesced(&self) -> usize {
        self.0.unquiesced()
    }

    fn counters(&self, py: Python<'_>) -> PyResult<Py<PyDict>> {
        counters(py, self.0.counters())
    }

    fn close(&self) {
        self.0.close();
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
