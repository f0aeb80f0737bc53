"""The fake engine of the chaos tests, with its KV cache on a device.

Whatever it does to its blocks is queued on its stream, as a model's kernels are: nothing here waits for the
device before a job goes out. So the sidecar has to.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chaos.engine import DONE, FakeEngine, Job, Shape, canary
from gpu_check.device import MIB, Allocation, Bytes, DriverDevice, HostBuffer

STAGING = 256 * MIB
GARBAGE = 0xEE
EVENTS = 64


def _flat(array: Bytes) -> Bytes:
    flat: Bytes = np.ascontiguousarray(array).reshape(-1)
    return flat


@dataclass
class DeviceEngine(FakeEngine):
    """`way`: `ipc` or `vmm`. `offset`: where the KV cache begins inside of its allocation."""

    device: DriverDevice = field(default_factory=DriverDevice)
    offset: int = 0
    seed_error: int = 0
    """Added to the seed that is registered: the canary is then wrong."""
    canary_seconds: float = 5.0
    # test_device_faults counts on this number of events, whatever the client's own is.
    options: Mapping[str, int] = field(default_factory=lambda: {"events": EVENTS})

    def _take_memory(self) -> None:
        size = max(self.record_bytes, min(STAGING, self.record_bytes * self.shape.blocks))
        self.slots = size // self.record_bytes
        self.staging = HostBuffer(self.device.driver, self.slots * self.record_bytes)
        self.allocate()

    def allocate(self) -> None:
        self.next_slot = 0
        self.kv: Allocation = self.device.allocate(self.shape.total, self.way, self.offset)

    def _place(self) -> dict[str, Any]:
        self.device.wait()  # the canary is there
        return {"cuda": True, "base": self.kv.address}

    def register(self) -> None:
        self.seed += self.seed_error
        super().register()
        # As the shim does: the engine waits for its sidecar for a while, and then uses block 0 in any case.
        deadline = time.monotonic() + self.canary_seconds
        while not self.worker.ready() and time.monotonic() < deadline:
            if self.worker.status().startswith("refused"):
                break
            time.sleep(0.002)
        self.worker.canary_over()
        self.fill(0, GARBAGE)  # as graph capture does

    def _after(self) -> dict[str, Any]:
        return {"stream": self.device.stream}

    # ---- memory ----------------------------------------------------------

    def pieces(self, block: int) -> list[tuple[int, int, int]]:
        """(address, place in the record, bytes) of a block."""
        shape = self.shape
        layer, step = shape.strides
        base = self.kv.address + block * step
        if shape.order.startswith("B"):
            return [(base, 0, self.record_bytes)]
        return [(base + index * layer, index * shape.page, shape.page) for index in range(shape.layers)]

    def _physical(self, record: bytes | Bytes) -> Bytes:
        """From [L, H, N, C] to the order that a block's pages have on the device."""
        bytes_ = np.frombuffer(record, dtype=np.uint8) if isinstance(record, bytes) else record
        if self.shape.order.endswith("HNC"):
            return bytes_
        shape = self.shape
        pages = bytes_.reshape(shape.layers, shape.heads, shape.states, shape.content)
        return _flat(pages.transpose(0, 2, 1, 3))

    def _logical(self, block: Bytes) -> Bytes:
        if self.shape.order.endswith("HNC"):
            return block
        shape = self.shape
        pages = block.reshape(shape.layers, shape.states, shape.heads, shape.content)
        return _flat(pages.transpose(0, 2, 1, 3))

    def _slot(self) -> int:
        """A place in the staging buffer that no queued copy uses."""
        if self.next_slot == self.slots:
            self.device.wait()
            self.next_slot = 0
        self.next_slot += 1
        return (self.next_slot - 1) * self.record_bytes

    def write(self, block: int, record: bytes | Bytes) -> None:
        at = self._slot()
        staged = self.staging.array[at : at + self.record_bytes]
        staged[:] = self._physical(record)
        if self.device.mask:
            staged ^= np.uint8(self.device.mask)
        for address, place, size in self.pieces(block):
            self.device.copy_in(address, self.staging.address + at + place, size)
            self.device.compute(address, size)

    def read_many(self, blocks: list[int]) -> list[Bytes]:
        """At most `slots` of them. The arrays are good until the next call."""
        assert len(blocks) <= self.slots
        self.device.wait()
        self.next_slot = 0
        found = []
        for block in blocks:
            at = self._slot()
            for address, place, size in self.pieces(block):
                self.device.copy_out(self.staging.address + at + place, address, size)
            found.append(self.staging.array[at : at + self.record_bytes])
        self.device.wait()
        self.next_slot = 0
        return found

    def read(self, block: int) -> bytes:
        return self._logical(self.read_many([block])[0]).tobytes()

    def fill(self, block: int, value: int) -> None:
        for address, _, size in self.pieces(block):
            self.device.fill(address, value, size)

    def filled(self, block: int, value: int) -> bool:
        return bool((self.read_many([block])[0] == value).all())

    def expected(self, block_hash: bytes) -> bytes:
        return self.content(block_hash).tobytes()

    def content(self, block_hash: bytes) -> Bytes:
        flavour = f"{self.model}/{self.shape.dtype}".encode()
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(block_hash + flavour, "little")))
        words = generator.integers(
            0, 2**64 - 1, endpoint=True, dtype=np.uint64, size=-(-self.record_bytes // 8)
        )
        record: Bytes = words.view(np.uint8)[: self.record_bytes]
        return record

    def _verify(self, job: Job) -> None:
        for start in range(0, len(job.blocks), self.slots):
            blocks, hashes = job.blocks[start : start + self.slots], job.hashes[start : start + self.slots]
            for block, block_hash, found in zip(blocks, hashes, self.read_many(blocks), strict=True):
                right = np.array_equal(self._logical(found), self.content(block_hash))
                assert right, f"{self.name}: wrong bytes in block {block} of {job}: {self._kind_of(found)}"

    def _kind_of(self, found: Bytes) -> str:
        """What wrong bytes look like."""
        values = np.unique(found)
        return f"all of them {values[0]:#04x}" if len(values) == 1 else f"{len(values)} different values"

    # ---- whole errands -----------------------------------------------------

    def pump_ready(self) -> bool:
        refused = self.worker.status().startswith("refused")
        assert not refused, f"{self.name}: {self.told()}"
        return super().pump_ready()

    def sleep(self, wait_ms: int = 5000) -> bool:
        """Lets go of the memory. Says whether nobody else has it any more."""
        let_go: bool = self.worker.unregister(wait_ms)
        self.poll()
        assert not (let_go and self.jobs), (
            f"{self.name}: let go, but not of {list(map(str, self.jobs.values()))}"
        )
        for watched in self.watched:
            self.free.extend(self._look_at(watched).job.blocks)
        self.watched.clear()
        self.device.wait()
        self.kv.free()
        return let_go

    def wake(self) -> None:
        self.allocate()
        self.write(0, canary(self.seed, self.record_bytes))
        self.register()

    def _give_memory_back(self) -> None:
        self.device.wait()
        self.kv.free()
        self.staging.close()

    def close(self) -> None:
        self.worker.unregister(2000)
        super().close()


class Raw:
    """Jobs without bookkeeping, for measurements: as fast as the client takes them."""

    def __init__(self, engine: DeviceEngine, pause: float) -> None:
        self.engine = engine
        self.worker = engine.worker
        self.spaces = engine.scheduler.namespace_ids() or bytes(16)
        self.pause = pause
        self.ended: dict[bytes, tuple[int, int]] = {}

    def fresh(self, count: int) -> bytes:
        """Hashes that nobody has."""
        return os.urandom(32 * count)

    def save(self, hashes: bytes, blocks: list[int], stream: int | None = None) -> bytes:
        job = os.urandom(16)
        stream = self.engine.device.stream if stream is None else stream
        self.worker.submit_save(
            job, self.spaces, [(0, b"", len(blocks))], hashes, blocks, 60_000, stream=stream
        )
        return job

    def load(self, hashes: bytes, blocks: list[int], lease: bytes, stream: int | None = None) -> bytes:
        job = os.urandom(16)
        stream = self.engine.device.stream if stream is None else stream
        runs = [(0, 0, 0, len(blocks))]
        self.worker.submit_load(job, lease, self.spaces, runs, hashes, blocks, 60_000, stream=stream)
        return job

    def lease(self, hashes: bytes) -> tuple[int, bytes]:
        """(ticket, lease) over all of them."""
        scheduler, count = self.engine.scheduler, len(hashes) // 32
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            ticket = scheduler.lease([(0, hashes)])
            grant = None
            while ticket and grant is None and time.monotonic() < deadline:
                grant = scheduler.lease_poll(ticket, 200)
            if grant and grant[0] == [count]:
                return ticket, grant[1]
            scheduler.release(ticket)
            time.sleep(0.001)
        raise AssertionError(f"expected a lease over {count} blocks, got none: {self.engine.told()}")

    def poll(self) -> None:
        for job, outcome, quiesced, blocks in self.worker.poll():
            if outcome:
                self.ended[job] = (outcome, blocks)
            assert outcome == DONE and quiesced, f"a measured job ended as {outcome} (quiesced: {quiesced})"

    def wait(self, *jobs: bytes, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not all(job in self.ended for job in jobs):
            self.poll()
            if self.pause:
                time.sleep(self.pause)
            assert time.monotonic() < deadline, f"a measured job did not end: {self.engine.told()}"
        for job in jobs:
            del self.ended[job]


def shape(record_bytes: int, blocks: int, order: str) -> Shape:
    """Like a Llama's: eight heads of 128, K and V, 16 tokens; as many layers as make up the record."""
    page = 8 * 16 * 512
    assert record_bytes % page == 0
    return Shape(record_bytes // page, blocks, 8, 16, 512, "bfloat16", order)
