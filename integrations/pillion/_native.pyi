"""Pillion's client for engine shims. Importing it starts no thread, opens no file and needs no CUDA.

Nothing here raises because the sidecar is absent, slow, hung or dead: that is a miss.
`ValueError` is raised for arguments that are wrong on their face.
"""

from collections.abc import Mapping, Sequence

def version() -> str: ...
def default_socket(device: str) -> str: ...

# "gpu-<uuid>" of the device that holds an address of device memory. OSError where it is none.
def cuda_device(address: int) -> str: ...

# Why CUDA cannot be used in this process, or None.
def cuda_missing() -> str | None: ...

class SchedulerClient:
    """The scheduler's half: lookups, leases, epochs. One background thread; every method returns at once."""

    # engine_id: the same text in scheduler and worker of one engine instance.
    # launch: a command that starts a sidecar (it detaches and returns); empty: never start one.
    def __init__(
        self,
        *,
        socket: str,
        engine_id: str,
        tenant: str,
        namespace: Mapping[str, str],
        launch: Sequence[str] = (),
        grace_ms: int = 5000,
    ) -> None: ...
    def ready(self) -> bool: ...
    # "ready", "connecting: …", "refused: …": for logs.
    def status(self) -> str: ...
    # 16 bytes of the current epoch; None while not attached.
    def namespace_id(self) -> bytes | None: ...
    # Leading blocks (32 bytes each) that the presence table has; 0 when not attached or stale.
    def lookup(self, hashes: bytes) -> int: ...
    # Indices of blocks that the table lacks (all of them when stale; [] when not attached).
    def absent(self, hashes: bytes) -> list[int]: ...
    # Looks up, and asks for a lease over the leading hits; ticket > 0, or 0 when nothing is there.
    def lease(self, hashes: bytes) -> int: ...
    # None: no answer yet. (blocks granted, 16-byte lease id); (0, b"") when refused, lost or unknown.
    def lease_poll(self, ticket: int, wait_us: int = 0) -> tuple[int, bytes] | None: ...
    # Idempotent; a lease whose job runs lives until the job ends.
    def release(self, ticket: int) -> None: ...
    # The lease is handed to a job: renewed by the client until `release`.
    def lease_used(self, ticket: int) -> None: ...
    # Later lookups see nothing that was saved before.
    def new_epoch(self) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def close(self) -> None: ...

class WorkerClient:
    """A worker's half: registration, jobs, completions. One background thread; only `unregister` waits."""

    def __init__(
        self,
        *,
        socket: str,
        engine_id: str,
        tenant: str,
        namespace: Mapping[str, str],
        launch: Sequence[str] = (),
        grace_ms: int = 5000,
    ) -> None: ...

    # Kept, and presented again at every re-attachment.
    # layout: physical order, one of LBNHC, LBHNC, LHBNC, BLHNC, BLNHC, BHLNC.
    # kind: spec class, e.g. "FullAttentionSpec". heads, states, content_bytes: H, N, C (bytes) of one page.
    # page_bytes: what vLLM says a page takes.
    # tensors: (size, offset, layer_stride, block_stride in bytes, layer names).
    # memfd: borrowed (duplicated inside); -1: process_vm on this process, where the allocation is at `base`.
    # cuda: `base` is a device address; the client exports the memory itself (legacy IPC, else VMM) and makes a
    # pool of `events` interprocess events: as many jobs may run at a time. The memory's context must be current.
    def register(
        self,
        *,
        layout: str,
        num_blocks: int,
        block_tokens: int,
        dtype: str,
        kind: str,
        heads: int,
        states: int,
        content_bytes: int,
        page_bytes: int,
        tensors: Sequence[tuple[int, int, int, int, Sequence[str]]],
        memory_bytes: int,
        memfd: int = -1,
        base: int = 0,
        cuda: bool = False,
        events: int = 512,
        canary_seed: int,
    ) -> None: ...
    # From now on block 0 may hold anything: a sidecar that attaches later believes this client's own look.
    def canary_over(self) -> None: ...
    # The memory is about to go away: no new jobs, all end, the sidecar lets go. True: nothing outside this process
    # can touch the memory or keeps it from being freed. Waits at most so long.
    def unregister(self, wait_ms: int = 2000) -> bool: ...
    def ready(self) -> bool: ...
    # "ready", "connecting: …", "refused: <reason>": for logs.
    def status(self) -> str: ...
    # The sidecar has compared the canary once.
    def canary_checked(self) -> bool: ...
    # first: index in the lease of the first block; one block id per hash.
    # stream (of device memory): an event is recorded on this CUstream, and the sidecar waits for it before
    # it copies. No event left: the job is not taken.
    def submit_load(
        self,
        job: bytes,
        lease: bytes,
        first: int,
        namespace: bytes,
        hashes: bytes,
        blocks: Sequence[int],
        deadline_ms: int,
        stream: int | None = None,
    ) -> None: ...
    # parent: 32-byte hash of the block before the first one, b"" at the start of a prompt.
    def submit_save(
        self,
        job: bytes,
        namespace: bytes,
        parent: bytes,
        hashes: bytes,
        blocks: Sequence[int],
        deadline_ms: int,
        stream: int | None = None,
    ) -> None: ...
    # (job, outcome, quiesced, blocks): outcome 0 none (only quiesced), 1 done, 2 failed, 3 cancelled. Every
    # submitted job gets exactly one event with outcome != 0 (at its deadline at the latest) and exactly one
    # with quiesced=True (maybe the same event). blocks: blocks loaded, or newly stored. Never raises; about
    # 1 µs when nothing happened.
    def poll(self) -> list[tuple[bytes, int, bool, int]]: ...
    # Jobs that have not quiesced.
    def unquiesced(self) -> int: ...
    def counters(self) -> dict[str, int]: ...
    def close(self) -> None: ...
