"""A fake engine: the shipped client, real memory, and a scheduler's bookkeeping, without a model.

It holds blocks as the vLLM shim does: those of a job that has not quiesced are never reused. Beyond
that it is suspicious. Every job must end exactly once and by its deadline; every job must quiesce
exactly once; what was loaded must be what was saved, byte for byte; source blocks of saves are
scribbled over the moment they are free; destination blocks of failed loads get a pattern the moment
they are free, and that pattern must stay (I3).
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import mmap
import os
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chaos.sidecar import until
from pillion._native import SchedulerClient, WorkerClient

if TYPE_CHECKING:
    from pillion._native import Pages

DONE, FAILED, CANCELLED = 1, 2, 3
NAMES = {0: "none", DONE: "done", FAILED: "failed", CANCELLED: "cancelled"}
CALL_SECONDS = 1.0
"""A call that sleeps longer waited for somebody. (The promise is 1 ms; the machine may be busy.)"""
WATCHED_MAX = 24
"""Failed jobs whose blocks are watched; beyond it the oldest are checked and reused."""
F_ADD_SEALS, SEALS = 1033, 1 | 2 | 4  # SEAL, SHRINK, GROW

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Shape:
    """Of the KV cache. 16 KiB a block, unless said otherwise."""

    layers: int = 4
    blocks: int = 256
    heads: int = 2
    states: int = 32
    content: int = 64
    dtype: str = "float32"
    order: str = "LBHNC"

    @property
    def page(self) -> int:
        return self.heads * self.states * self.content

    @property
    def total(self) -> int:
        return self.layers * self.blocks * self.page

    @property
    def strides(self) -> tuple[int, int]:
        """Bytes from one layer to the next, and from one block to the next."""
        if self.order.startswith("B"):
            return self.page, self.layers * self.page
        return self.blocks * self.page, self.page


def chain(name: str, count: int) -> list[bytes]:
    """Block hashes of a prompt, each from its parent's."""
    hashes, last = [], name.encode()
    for _ in range(count):
        last = hashlib.sha256(last).digest()
        hashes.append(last)
    return hashes


def run_delay() -> float:
    """Seconds that this thread was ready to run and did not; 0 where the kernel does not count."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


@functools.lru_cache(maxsize=8192)
def contents(block_hash: bytes, flavour: str, size: int) -> bytes:
    """What the model would have computed for a block: fixed by hash and model."""
    return hashlib.shake_128(flavour.encode() + block_hash).digest(size)


def canary(seed: int, size: int) -> bytes:
    """splitmix64(seed + i), little endian, in logical order."""
    with np.errstate(over="ignore"):
        z = np.arange(-(-size // 8), dtype=np.uint64) + np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return bytes(z.tobytes()[:size])


@dataclass
class Job:
    """One load or save, and what was heard of it."""

    id: bytes
    kind: str
    hashes: list[bytes]
    blocks: list[int]
    deadline: float
    submitted: float
    ticket: int = 0
    outcome: int | None = None
    ended_at: float = 0.0
    quiesced: bool = False
    blocks_done: int = 0

    def __str__(self) -> str:
        heard = NAMES[self.outcome] if self.outcome is not None else "no end"
        took = f" after {self.ended_at - self.submitted:.3f} s" if self.ended_at else ""
        holds = "quiesced" if self.quiesced else "holds its blocks"
        return f"{self.kind} of {len(self.hashes)} blocks ({self.deadline:.3f} s): {heard}{took}, {holds}"


@dataclass
class Watched:
    """Blocks that nothing may write any more, and what must stay in them."""

    job: Job
    pattern: int


@dataclass
class FakeEngine:
    socket: Path
    name: str = "engine"
    model: str = "model-a"
    tenant: str = "default"
    way: str = "memfd"
    shape: Shape = field(default_factory=Shape)
    grace_ms: int = 600_000
    call_seconds: float = CALL_SECONDS
    launch: Sequence[str] = ()
    extra: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the registration."""

    def __post_init__(self) -> None:
        self.jobs: dict[bytes, Job] = {}
        self.finished: list[Job] = []
        self.watched: deque[Watched] = deque()
        self.free = deque(range(1, self.shape.blocks))
        self.slowest = (0.0, "nothing")
        self.count = 0
        self.patterns = 0
        self.record_bytes = self.shape.layers * self.shape.page
        self.seed = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:7], "little")
        self._take_memory()
        self.write(0, canary(self.seed, self.record_bytes))
        scheduler, worker = self._client_options()
        self.scheduler = SchedulerClient(**scheduler)
        self.worker = WorkerClient(**worker)
        self.register()

    def _client_options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of the scheduler's half and of the worker's."""
        options: dict[str, Any] = {
            "socket": str(self.socket),
            "engine_id": self.name,
            "tenant": self.tenant,
            "namespaces": [{"model": self.model, "dtype": self.shape.dtype, "hash": "sha256", **self.extra}],
            "launch": list(self.launch),
            "grace_ms": self.grace_ms,
        }
        return options, options

    @property
    def memory_name(self) -> str:
        return f"kv-{self.name}"

    def _take_memory(self) -> None:
        self.memfd = -1
        self.memory = self._allocate()
        self.map: Bytes = np.frombuffer(self.memory, dtype=np.uint8)
        self.pages: Bytes = self.map.reshape(self.shape.layers, self.shape.blocks, self.shape.page)

    def _allocate(self) -> mmap.mmap:
        if self.way == "process_vm":
            return mmap.mmap(-1, self.shape.total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memfd = os.memfd_create(self.memory_name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memfd, self.shape.total)
        fcntl.fcntl(self.memfd, F_ADD_SEALS, SEALS)
        return mmap.mmap(self.memfd, self.shape.total, flags=mmap.MAP_SHARED)

    def _place(self) -> dict[str, Any]:
        """Where the memory is, for the registration."""
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) if self.memfd < 0 else 0
        return {"memfd": self.memfd, "base": base}

    def layout(self, strides: tuple[int, ...], packing: str) -> Pages:
        """How one group of full attention lies in the memory: strides of layers and blocks, what a cell holds."""
        shape = self.shape
        layer_stride, block_stride, *_ = strides
        return {
            "size": shape.total,
            "offset": 0,
            "layer_stride": layer_stride,
            "block_stride": block_stride,
            "layers": [f"layers.{index}" for index in range(shape.layers)],
            "heads": shape.heads,
            "states": shape.states,
            "content_bytes": shape.content,
            "page_bytes": shape.page,
            "kernel_blocks": 1,
            "packing": packing,
        }

    def describe(self, order: str) -> None:
        """Tells the client of that group."""
        shape, half = self.shape, self.shape.content // 2
        packing = f"kv total_heads={shape.heads} key={half} value={half} dtype={shape.dtype}"
        pages = self.layout(shape.strides, packing)
        self.worker.describe(
            layout=order,
            num_blocks=shape.blocks,
            memory_bytes=shape.total,
            rank=0,
            world=1,
            groups=[{"block_tokens": shape.states, "pages": [pages]}],
            **self._place(),
        )

    def register(self) -> None:
        self.describe(self.shape.order)
        self.worker.check_canary(0, self.seed)
        self.worker.register(**self.options)

    # ---- memory ----------------------------------------------------------

    def write(self, block: int, record: bytes) -> None:
        self.pages[:, block, :] = np.frombuffer(record, dtype=np.uint8).reshape(self.shape.layers, -1)

    def read(self, block: int) -> bytes:
        return self.pages[:, block, :].tobytes()

    def fill(self, block: int, value: int) -> None:
        self.pages[:, block, :] = value

    def filled(self, block: int, value: int) -> bool:
        """Whether nothing was written since."""
        return bool((self.pages[:, block, :] == value).all())

    def expected(self, block_hash: bytes) -> bytes:
        return contents(block_hash, f"{self.model}/{self.shape.dtype}", self.record_bytes)

    # ---- clients ---------------------------------------------------------

    def timed(self, what: str, call: Callable[[], Any]) -> Any:
        """Calls from a step wait for nothing (I5)."""
        begun, queued = time.monotonic(), run_delay()
        cpu = time.thread_time()
        result = call()
        # Neither computing nor waiting for a processor is waiting for somebody.
        took = time.monotonic() - begun - (time.thread_time() - cpu) - (run_delay() - queued)
        self.slowest = max(self.slowest, (took, what))
        assert took < self.call_seconds, f"{what} blocked the engine for {took:.3f} s"
        return result

    def ready(self) -> bool:
        return self.scheduler.ready() and self.worker.ready()

    def await_ready(self, seconds: float = 15.0) -> FakeEngine:
        until(self.pump_ready, lambda: f"{self.name} to attach: {self.told()}", seconds)
        return self

    def attaches(self) -> tuple[int, int]:
        """How often each half has come in so far."""
        return self.scheduler.counters()["attaches"], self.worker.counters()["attaches"]

    def await_again(self, before: tuple[int, int], seconds: float = 15.0) -> None:
        """Until both halves have come in anew since `before`. They do so by themselves."""

        def again() -> bool:
            return all(now > then for now, then in zip(self.attaches(), before, strict=True)) and self.ready()

        self.wait_for(again, f"to attach again, after {before}", seconds)

    def pump_ready(self) -> bool:
        self.poll()
        return self.ready()

    def told(self) -> str:
        return f"scheduler: {self.scheduler.status()}; worker: {self.worker.status()}"

    def lookup(self, hashes: list[bytes]) -> int:
        count: int = self.timed("lookup", lambda: self.scheduler.lookup(0, b"".join(hashes)))
        return count

    # ---- jobs ------------------------------------------------------------

    def _job(self, kind: str, hashes: list[bytes], deadline_ms: int) -> Job:
        while len(self.free) < len(hashes) and self.watched:
            self.free.extend(self._look_at(self.watched.popleft()).job.blocks)
        assert len(self.free) >= len(hashes), (
            f"{self.name} has no blocks left: {len(self.jobs)} jobs hold them"
        )
        self.count += 1
        job_id = hashlib.sha256(f"{self.name}/{self.count}".encode()).digest()[:16]
        blocks = [self.free.popleft() for _ in hashes]
        return Job(job_id, kind, list(hashes), blocks, deadline_ms / 1000, time.monotonic())

    def save(self, hashes: list[bytes], *, parent: bytes = b"", deadline_ms: int = 10_000) -> Job:
        """Starts a save of these blocks with the contents that belong to them."""
        job = self._job("save", hashes, deadline_ms)
        for block, block_hash in zip(job.blocks, hashes, strict=True):
            self.write(block, self.expected(block_hash))
        spaces = self.scheduler.namespace_ids() or bytes(16)
        joined, blocks, runs = b"".join(hashes), job.blocks, [(0, parent, len(hashes))]
        self.timed(
            "submit_save",
            lambda: self.worker.submit_save(
                job.id, spaces, runs, joined, blocks, deadline_ms, **self._after()
            ),
        )
        return self._submitted(job)

    def _after(self) -> dict[str, Any]:
        """What a job's copies have to wait for."""
        return {}

    def _submitted(self, job: Job) -> Job:
        job.submitted = time.monotonic()
        self.jobs[job.id] = job
        return job

    def lease(self, hashes: list[bytes], seconds: float = 5.0) -> tuple[int, int, bytes]:
        """(ticket, blocks granted, lease id); zeros where nothing is there."""
        ticket: int = self.timed("lease", lambda: self.scheduler.lease([(0, b"".join(hashes))]))
        if not ticket:
            return 0, 0, b""
        deadline = time.monotonic() + seconds
        while (grant := self.timed("lease_poll", lambda: self.scheduler.lease_poll(ticket, 200))) is None:
            self.poll()
            if time.monotonic() > deadline:
                self.release(ticket)
                return 0, 0, b""
        granted, lease = grant
        if not any(granted):
            self.release(ticket)
            return 0, 0, b""
        return ticket, granted[0], lease

    def release(self, ticket: int) -> None:
        self.timed("release", lambda: self.scheduler.release(ticket))

    def load(self, hashes: list[bytes], *, deadline_ms: int = 5_000, seconds: float = 5.0) -> Job | None:
        """Starts a load of the leading blocks that are there; None where none is."""
        ticket, granted, lease = self.lease(hashes, seconds)
        return self.load_leased(hashes[:granted], ticket, lease, deadline_ms=deadline_ms) if ticket else None

    def load_leased(
        self, hashes: list[bytes], ticket: int, lease: bytes, *, deadline_ms: int = 5_000, first: int = 0
    ) -> Job:
        job = self._job("load", hashes, deadline_ms)
        job.ticket = ticket
        for block in job.blocks:
            self.fill(block, 0)
        spaces = self.scheduler.namespace_ids() or bytes(16)
        joined, blocks, runs = b"".join(hashes), job.blocks, [(0, 0, first, len(hashes))]
        self.timed(
            "submit_load",
            lambda: self.worker.submit_load(
                job.id, lease, spaces, runs, joined, blocks, deadline_ms, **self._after()
            ),
        )
        return self._submitted(job)

    def poll(self) -> None:
        """Takes in what happened, and judges it."""
        before = time.monotonic()
        for job_id, outcome, quiesced, blocks in self.timed("poll", self.worker.poll):
            job = self.jobs.get(job_id)
            assert job, f"{self.name}: an event ({NAMES[outcome]}, quiesced={quiesced}) of a job that is over"
            self._take(job, outcome, quiesced, blocks)
        for job in self.jobs.values():
            late = job.outcome is None and before > job.submitted + job.deadline
            assert not late, f"{self.name}: past its deadline: {job}"

    def _take(self, job: Job, outcome: int, quiesced: bool, blocks: int) -> None:
        assert outcome or quiesced, f"{self.name}: an event that says nothing, of {job}"
        if outcome:
            assert job.outcome is None, f"{self.name}: ended again, as {NAMES[outcome]}: {job}"
            job.outcome, job.ended_at, job.blocks_done = outcome, time.monotonic(), blocks
            if outcome == DONE and job.kind == "load":
                assert quiesced, f"{self.name}: done but not quiesced: {job}"
                self._verify(job)
            if job.ticket:
                self.release(job.ticket)
        if quiesced:
            assert not job.quiesced, f"{self.name}: quiesced twice: {job}"
            assert job.outcome is not None, f"{self.name}: quiesced without an end: {job}"
            job.quiesced = True
            del self.jobs[job.id]
            self.finished.append(job)
            self._give_back(job)

    def _verify(self, job: Job) -> None:
        for block, block_hash in zip(job.blocks, job.hashes, strict=True):
            right = self.read(block) == self.expected(block_hash)
            assert right, f"{self.name}: wrong bytes in block {block} of {job}"

    def _give_back(self, job: Job) -> None:
        """The engine may use the blocks again, and does so at once."""
        self.patterns += 1
        pattern = self.patterns % 251 + 1
        for block in job.blocks:
            self.fill(block, pattern)
        if job.kind == "save" or job.outcome == DONE:
            self.free.extend(job.blocks)
            return
        self.watched.append(Watched(job, pattern))
        if len(self.watched) > WATCHED_MAX:
            self.free.extend(self._look_at(self.watched.popleft()).job.blocks)

    def _look_at(self, watched: Watched) -> Watched:
        for block in watched.job.blocks:
            assert self.filled(block, watched.pattern), (
                f"{self.name}: I3: block {block} was written after its job quiesced: {watched.job}"
            )
        return watched

    def wait(self, job: Job, seconds: float = 15.0) -> Job:
        """Until it has ended and quiesced."""
        self.wait_for(lambda: job.quiesced, str(job), seconds)
        return job

    def wait_end(self, job: Job, seconds: float = 15.0) -> Job:
        """Until it has ended. Its blocks may be held longer."""
        self.wait_for(lambda: job.outcome is not None, str(job), seconds)
        return job

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 15.0) -> None:
        def polled() -> Any:
            self.poll()
            return condition()

        until(polled, lambda: f"{self.name}: {what}; {self.told()}", seconds)

    def settle(self, seconds: float = 20.0) -> None:
        """Until no job is left, and nothing wrote what it must not."""
        self.wait_for(lambda: not self.jobs, f"{len(self.jobs)} jobs to end", seconds)
        assert self.worker.unquiesced() == 0
        self.check()

    def check(self) -> None:
        """Nothing was written that the engine had reused."""
        for watched in self.watched:
            self._look_at(watched)

    # ---- whole errands -----------------------------------------------------

    def must_save(self, hashes: list[bytes], *, parent: bytes = b"") -> Job:
        job = self.wait(self.save(hashes, parent=parent))
        assert job.outcome == DONE, f"{job}; {self.told()}"
        return job

    def must_load(self, hashes: list[bytes]) -> Job:
        job = self.load(hashes)
        assert job, f"{self.name}: expected hits, got none: {self.told()}"
        self.wait(job)
        assert job.outcome == DONE, f"{job}; {self.told()}"
        assert job.blocks_done == len(job.hashes)
        return job

    def close(self) -> None:
        self.scheduler.close()
        self.worker.close()
        self._give_memory_back()

    def _give_memory_back(self) -> None:
        del self.pages, self.map
        if self.memfd >= 0:
            os.close(self.memfd)
            self.memfd = -1


class Traffic:
    """Random saves and loads of one engine, one small step at a time."""

    def __init__(
        self,
        engine: FakeEngine,
        seed: int,
        *,
        prompts: int = 24,
        length: int = 12,
        deadline_ms: int = 2_000,
        whole: bool = False,
    ) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.prompts = [chain(f"prompt-{index}", length) for index in range(prompts)]
        self.deadline_ms = deadline_ms
        # Saves begin with the first block: no parent can be evicted between our look and the save.
        self.whole = whole
        self.loads = self.saves = 0

    def step(self) -> None:
        """Takes in events and starts a job, if there is room."""
        engine = self.engine
        engine.poll()
        if len(engine.jobs) >= 8:
            return
        prompt = self.random.choice(self.prompts)
        if len(engine.free) < len(prompt) and not engine.watched:
            return
        if self.random.random() < 0.6 and (
            load := engine.load(prompt, deadline_ms=self.deadline_ms, seconds=0.05)
        ):
            self.loads += 1
            assert load.hashes == prompt[: len(load.hashes)]
        else:
            start = 0 if self.whole else min(self.random.randrange(len(prompt)), engine.lookup(prompt))
            parent = prompt[start - 1] if start else b""
            engine.save(prompt[start:], parent=parent, deadline_ms=self.deadline_ms)
            self.saves += 1

    def run(self, seconds: float) -> None:
        until_time = time.monotonic() + seconds
        while time.monotonic() < until_time:
            self.step()
