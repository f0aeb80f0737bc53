"""`copy` (P6, P8): 512 MiB of KV cache saved to a sidecar's host pool and loaded from it, from Python.

Ours is the shipped client on memory in a memfd, as a CPU engine's is, from the call that submits the job to the
event that it is done; the sidecar copies with two threads and computes and proves checksums. Beside it stand plain
copies of as many bytes between buffers of this process, by one thread and by two, and LMCache's sidecar, by its own
bench client and with its own defaults, on blocks of the same shape. P8 is a single block: from the question for its
lease to its bytes being there.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from chaos.engine import DONE, F_ADD_SEALS, SEALS, FakeEngine, Shape, chain
from chaos.sidecar import Sidecar
from harness.peers import LmcacheClient, LmcacheServer, Unavailable
from harness.report import Better, Row

MIB = 1 << 20
BLOCK_TOKENS = 16
SHAPE = Shape(layers=32, blocks=257, heads=8, states=BLOCK_TOKENS, content=512, dtype="float16")
"""A block of 16 tokens has 2 MiB, in 32 layers of 64 KiB: Llama-8B in half precision."""
BLOCKS = 256
TOTAL = BLOCKS * SHAPE.layers * SHAPE.page
ROUNDS, ROUNDS_QUICK = 11, 3
POOL, FILLS = "1088MiB", 2
"""So many saves use its pages for the first time; every later one takes the place of what was saved before."""
SINGLES, SINGLES_QUICK = 300, 60
POLL_SECONDS = 0.0002
THREADS = 2
"""The sidecar's `copy_threads`, by default."""
LMCACHE_SHAPE = f"(2,{2 * BLOCKS},{BLOCK_TOKENS},8,128):float16:32"
SERVER, SHM = "LMCache MP, its server copies", "LMCache MP, the engine copies"
"""Both by shared memory: `lmcache_driven` and `engine_driven`. vLLM on a CPU is given the second."""
BESIDE_MEMCPY, BESIDE_LMCACHE = 0.65, {"save": 8.0, "load": 3.0}
FIRST_BLOCK_MS = 1.0

assert TOTAL == 512 * MIB


class Engine(FakeEngine):
    """Contents are noise that is made once; blocks are compared after the clock has stopped."""

    def expected(self, block_hash: bytes) -> bytes:
        return noise(self.record_bytes)

    def transfer(self, submit: Callable[[bytes, bytes], None], poll_seconds: float) -> float:
        """Seconds from the call to the event that the job is done."""
        job = uuid.uuid4().bytes
        spaces = self.scheduler.namespace_ids()
        assert spaces is not None
        begun = time.perf_counter()
        submit(job, spaces)
        while True:
            for name, outcome, quiesced, _ in self.worker.poll():
                if name == job:
                    took = time.perf_counter() - begun
                    assert outcome == DONE and quiesced, f"the job ended with {outcome}: {self.told()}"
                    return took
            if poll_seconds:
                time.sleep(poll_seconds)

    def save_all(self, hashes: list[bytes]) -> float:
        blocks = list(range(1, len(hashes) + 1))
        joined = b"".join(hashes)
        return self.transfer(
            lambda job, spaces: self.worker.submit_save(
                job, spaces, [(0, b"", len(hashes))], joined, blocks, 60_000
            ),
            POLL_SECONDS,
        )

    def load_all(self, hashes: list[bytes], poll_seconds: float = POLL_SECONDS) -> float:
        """With the lease, which is asked for first; the clock begins with the load."""
        ticket, granted, lease = self.lease(hashes)
        assert granted == len(hashes), f"expected {len(hashes)} blocks, got a lease of {granted}"
        blocks, joined = list(range(1, granted + 1)), b"".join(hashes)
        took = self.transfer(
            lambda job, spaces: self.worker.submit_load(
                job, lease, spaces, [(0, 0, 0, granted)], joined, blocks, 60_000
            ),
            poll_seconds,
        )
        self.scheduler.release(ticket)
        return took

    def request_to_usable(self, block_hash: bytes) -> float:
        """Seconds from the question for a lease of one block to its bytes being there."""
        begun = time.perf_counter()
        ticket = self.scheduler.lease([(0, block_hash)])
        while (answer := self.scheduler.lease_poll(ticket, 200)) is None:
            pass
        granted, lease = answer
        assert granted == [1], f"expected a lease of one block, got {granted}"
        self.transfer(
            lambda job, spaces: self.worker.submit_load(
                job, lease, spaces, [(0, 0, 0, 1)], block_hash, [1], 10_000
            ),
            0,
        )
        took = time.perf_counter() - begun
        self.scheduler.release(ticket)
        return took

    def fill_all(self, source: np.ndarray[Any, Any] | int) -> None:
        self.pages[:, 1 : BLOCKS + 1, :] = source

    def holds_noise(self) -> bool:
        """Whether every block has the bytes that were saved."""
        wanted = np.frombuffer(noise(self.record_bytes), dtype=np.uint8).reshape(SHAPE.layers, SHAPE.page)
        return all(bool((self.pages[:, block, :] == wanted).all()) for block in range(1, BLOCKS + 1))


_NOISE: dict[int, bytes] = {}


def noise(size: int) -> bytes:
    if size not in _NOISE:
        _NOISE[size] = hashlib.shake_128(b"copy").digest(size)
    return _NOISE[size]


class Memcpy:
    """Between two buffers that both have been written before."""

    def __init__(self) -> None:
        self.source = self._buffer()
        self.target = self._buffer()

    def _buffer(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """In a memfd, as the engine's memory and the pool are."""
        import fcntl

        memfd = os.memfd_create("bench", os.MFD_ALLOW_SEALING)
        os.ftruncate(memfd, TOTAL)
        fcntl.fcntl(memfd, F_ADD_SEALS, SEALS)
        view: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(mmap.mmap(memfd, TOTAL), dtype=np.uint8)
        os.close(memfd)
        view[:] = 1
        return view

    def run(self, threads: int) -> float:
        """Seconds. numpy lets go of the interpreter's lock while it copies."""
        part = TOTAL // threads
        begun = time.perf_counter()
        workers = [
            threading.Thread(
                target=np.copyto, args=(self.target[at : at + part], self.source[at : at + part])
            )
            for at in range(part, TOTAL, part)
        ]
        for worker in workers:
            worker.start()
        np.copyto(self.target[:part], self.source[:part])
        for worker in workers:
            worker.join()
        return time.perf_counter() - begun


class Bench:
    def __init__(self, quick: bool, stack: ExitStack) -> None:
        self.quick = quick
        self.rounds = ROUNDS_QUICK if quick else ROUNDS
        self.stack = stack
        sidecar = Sidecar(host_pool=POOL, copy_threads=THREADS)
        stack.callback(sidecar.close)
        sidecar.start(60)
        self.engine = Engine(sidecar.socket, "copy", shape=SHAPE)
        stack.callback(self.engine.close)
        self.engine.await_ready()
        self.memcpy = Memcpy()
        self.missing: dict[str, str] = {}
        self.peers: dict[str, LmcacheClient] = {}
        self.rates: dict[tuple[str, str], list[float]] = {}
        self.failed: dict[str, int] = {}

    def start_peer(self, name: str, way: str, *flags: str) -> None:
        try:
            server = LmcacheServer("server", "--l1-size-gb", "2", "--supported-transfer-mode", "auto", *flags)
            self.stack.callback(server.close)
            server.await_ready()
            client = LmcacheClient(
                server,
                shape=LMCACHE_SHAPE,
                blocks=2 * BLOCKS,
                block=BLOCK_TOKENS,
                tokens=BLOCKS * BLOCK_TOKENS,
                way=way,
            )
            self.stack.callback(client.close)
            self.peers[name] = client
        except Unavailable as error:
            self.missing[name] = str(error).splitlines()[0]
            print(f"{name}: {error}", file=sys.stderr)

    def run(self) -> list[Row]:
        self.start_peer(SERVER, "lmcache_driven")
        self.start_peer(SHM, "engine_driven", "--shm-name", f"bench_{uuid.uuid4().hex[:8]}")
        fresh = [self._first_use(number) for number in range(FILLS)]
        for number in range(self.rounds + 1):
            self._round(number)
            if number == 0:  # warms up: pools, page tables, everybody's first time
                self.rates.clear()
            print(f"    round {number}", file=sys.stderr, flush=True)
        return [*self._copies(), self._fresh(fresh), *self._first_block()]

    def _first_use(self, number: int) -> tuple[float, float]:
        """A save into pages of the pool that nobody has written before, and a plain copy."""
        took = self.engine.save_all(chain(f"first use {number}", BLOCKS))
        return TOTAL / took / 1e9, TOTAL / self.memcpy.run(THREADS) / 1e9

    def _fresh(self, pairs: list[tuple[float, float]]) -> Row:
        case = "save 512 MiB, into pages of the pool that were never used"
        return Row.of("P6", case, memcpy_name(THREADS), "GB/s", Better.MORE, pairs)

    def _round(self, number: int) -> None:
        engine = self.engine
        hashes = chain(f"copy {number}", BLOCKS)
        engine.fill_all(
            np.frombuffer(noise(engine.record_bytes), dtype=np.uint8).reshape(SHAPE.layers, 1, -1)
        )
        self._take("ours", "save", engine.save_all(hashes))
        self._memcpy("save")
        engine.fill_all(0)
        self._take("ours", "load", engine.load_all(hashes))
        assert engine.holds_noise(), "wrong bytes after a load"
        self._memcpy("load")
        for name in list(self.peers):
            try:
                self._peer(name, number)
            except Unavailable as error:
                self.missing[name] = str(error).splitlines()[0]
                del self.peers[name]

    def _memcpy(self, direction: str) -> None:
        for threads in (1, THREADS):
            self._take(memcpy_name(threads), direction, self.memcpy.run(threads))

    def _peer(self, name: str, number: int) -> None:
        client = self.peers[name]
        for direction, op in (("save", "store"), ("load", "retrieve")):
            answer = client.ask(op, number)
            if answer["ok"]:
                self._take(name, direction, float(answer["ms"]) / 1000)
            else:
                self.failed[name] = self.failed.get(name, 0) + 1
                self._take(name, direction, float("nan"))

    def _take(self, name: str, direction: str, seconds: float) -> None:
        self.rates.setdefault((name, direction), []).append(TOTAL / seconds / 1e9)

    def _copies(self) -> list[Row]:
        rows = []
        for direction in ("save", "load"):
            case = f"{direction} 512 MiB, blocks of 2 MiB in 64 KiB pieces"
            ours = self.rates["ours", direction]
            for threads in (THREADS, 1):
                peer = memcpy_name(threads)
                budget = BESIDE_MEMCPY if threads == THREADS else None
                pairs = list(zip(ours, self.rates[peer, direction], strict=True))
                rows.append(Row.of("P6", case, peer, "GB/s", Better.MORE, pairs, budget=budget))
            rows += [self._beside(case, direction, ours, name) for name in (SERVER, SHM)]
        return rows

    def _beside(self, case: str, direction: str, ours: list[float], name: str) -> Row:
        if name in self.missing:
            return Row.without("P6", case, name, "GB/s", self.missing[name], budget=BESIDE_LMCACHE[direction])
        theirs = self.rates[name, direction]
        pairs = [(mine, other) for mine, other in zip(ours, theirs, strict=True) if other == other]
        note = f"{self.failed[name]} of its transfers failed" if name in self.failed else None
        budget = BESIDE_LMCACHE[direction]
        return Row.of("P6", case, name, "GB/s", Better.MORE, pairs, budget=budget, note=note)

    def _first_block(self) -> list[Row]:
        hashes = chain("first block", BLOCKS)
        self.engine.save_all(hashes)
        taken = []
        for number in range(SINGLES_QUICK if self.quick else SINGLES):
            taken.append(self.engine.request_to_usable(hashes[0]) * 1000)
            time.sleep(0.002 if number % 2 else 0.01)
        taken.sort()
        note = f"p99 {taken[int(len(taken) * 0.99)]:.2f} ms"
        case = "request accepted → first block usable, one block of 2 MiB, p50"
        return [
            Row.within("P8", case, taken, FIRST_BLOCK_MS, "ms", note=note),
            Row.without(
                "P8",
                "stream event → the sidecar's copy starts",
                "10 µs",
                "µs",
                "there is no GPU: `bench gpu`",
            ),
        ]


def memcpy_name(threads: int) -> str:
    return f"memcpy, {threads} thread{'s' if threads > 1 else ''}"


def measure(quick: bool) -> list[Row]:
    """All rows of `copy`."""
    with ExitStack() as stack:
        return Bench(quick, stack).run()
