"""Pillion's client for engine shims. Importing it starts no thread, opens no file and needs no CUDA.

Nothing here raises because the sidecar is absent, slow, hung or dead: that is a miss.
`ValueError` is raised for arguments that are wrong on their face.
"""

from collections.abc import Mapping, Sequence
from typing import TypedDict

def version() -> str: ...
def default_socket(device: str) -> str: ...

# "gpu-<uuid>" of the device that holds an address of device memory. OSError where it is none.
def cuda_device(address: int) -> str: ...

# Why CUDA cannot be used in this process, or None.
def cuda_missing() -> str | None: ...

class SchedulerClient:
    """The scheduler's half: lookups, leases, epochs. One background thread; every method returns at once."""

    # engine_id: the same text in scheduler and worker of one engine instance.
    # namespaces: one per KV cache group, in the order of the registration; groups are known by their index in it.
    # launch: a command that starts a sidecar (it detaches and returns); empty: never start one.
    def __init__(
        self,
        *,
        socket: str,
        engine_id: str,
        tenant: str,
        namespaces: Sequence[Mapping[str, str]],
        launch: Sequence[str] = (),
        grace_ms: int = 5000,
    ) -> None: ...
    def ready(self) -> bool: ...
    # "ready", "connecting: …", "refused: …": for logs.
    def status(self) -> str: ...
    # 16 bytes per group, of the current epoch; None until all are open.
    def namespace_ids(self) -> bytes | None: ...
    # Leading blocks (32 bytes each) of a group that the presence table has; 0 when not attached or stale.
    def lookup(self, group: int, hashes: bytes) -> int: ...
    # One byte per block: 1 where the table has it.
    def present(self, group: int, hashes: bytes) -> bytes: ...
    # Indices of blocks that the table lacks (all of them when stale; [] when not attached).
    def absent(self, group: int, hashes: bytes) -> list[int]: ...
    # Asks for a lease of runs of (group, hashes); ticket > 0, or 0 when nothing can be asked.
    def lease(self, runs: Sequence[tuple[int, bytes]]) -> int: ...
    # None: no answer yet. (leading blocks granted of each run, 16-byte lease id); b"" where nothing was granted.
    def lease_poll(self, ticket: int, wait_us: int = 0) -> tuple[list[int], bytes] | None: ...
    # Idempotent; a lease whose job runs lives until the job ends.
    def release(self, ticket: int) -> None: ...
    # The lease is handed to a job: renewed by the client until `release`.
    def lease_used(self, ticket: int) -> None: ...
    # Devices of the other sidecars of the node whose tables are fresh: what they have can be leased here.
    def neighbours(self) -> list[str]: ...
    # The device of ours; "" before the first attachment.
    def device(self) -> str: ...
    # Later lookups see nothing that was saved before. groups: how many of them, from the first, go on (None: all); of the
    # others, which other engines fill, nothing can be of the new epoch.
    def new_epoch(self, groups: int | None = None) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def close(self) -> None: ...

class Pages(TypedDict):
    """A KVCacheTensor with the spec of its layers: all sizes in bytes."""

    size: int
    offset: int
    layer_stride: int
    block_stride: int
    layers: Sequence[str]
    heads: int  # H, N and C of one page
    states: int
    content_bytes: int
    page_bytes: int  # what vLLM says that a page takes, padding included
    kernel_blocks: int  # in a block
    packing: str  # what the backend packs into a page; the grammar is in layouts/src/vllm/grammar.rs

class Group(TypedDict):
    """One KV cache group."""

    block_tokens: int
    pages: Sequence[Pages]

class WorkerClient:
    """A worker's half: registration, jobs, completions. One background thread; only `unregister` waits."""

    def __init__(
        self,
        *,
        socket: str,
        engine_id: str,
        tenant: str,
        namespaces: Sequence[Mapping[str, str]],
        launch: Sequence[str] = (),
        grace_ms: int = 5000,
    ) -> None: ...

    # Before a registration: says where the KV memory lies and what is in it. ValueError with the reason where that is
    # not served or contradicts itself.
    # layout: physical order, one of LBNHC, LBHNC, LHBNC, BLHNC, BLNHC, BHLNC.
    # others: (group, shard, shards) of the shards, counted from 0, that ranks of other tensor-parallel sizes store and of
    # which this rank holds heads. Their blocks can be loaded and not saved; to jobs they are further groups, in this
    # order, whose namespaces are the group's with another `shard` ("2/4" is shard 1 of 4).
    # memfd: borrowed (duplicated inside); -1: process_vm on this process, where the allocation is at `base`.
    # cuda: `base` is a device address; the client exports the memory itself (legacy IPC, else VMM). The memory's
    # context must be current.
    def describe(
        self,
        *,
        layout: str,
        num_blocks: int,
        memory_bytes: int,
        rank: int,
        world: int,
        groups: Sequence[Group],
        others: Sequence[tuple[int, int, int]] = (),
        memfd: int = -1,
        base: int = 0,
        cuda: bool = False,
    ) -> None: ...
    # Block 0 holds this group's canary now, written with the engine's own indexing: ValueError where it is not found by
    # the description. Needed of every group, one after the other; the last one's must stay for the sidecar.
    def check_canary(self, group: int, seed: int) -> None: ...
    # What was described is presented, now and again at every re-attachment. events: interprocess events for device
    # memory; as many jobs may run at a time.
    def register(self, *, events: int = 512, cache_mode: str | None = None) -> None: ...
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
    # spaces: `namespace_ids` of the scheduler's half. runs: (group, run of the lease, its first block, blocks); the
    # hashes and block ids are those of one run after the other.
    # stream (of device memory): an event is recorded on this CUstream, and the sidecar waits for it before
    # it copies. No event left: the job is not taken.
    def submit_load(
        self,
        job: bytes,
        lease: bytes,
        spaces: bytes,
        runs: Sequence[tuple[int, int, int, int]],
        hashes: bytes,
        blocks: Sequence[int],
        deadline_ms: int,
        stream: int | None = None,
    ) -> None: ...
    # runs: (group, parent, blocks); parent: 32-byte hash of the block before the first one, b"" where there is none.
    def submit_save(
        self,
        job: bytes,
        spaces: bytes,
        runs: Sequence[tuple[int, bytes, int]],
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
