"""`lookup` (P5): how long vLLM's scheduler waits for "how much of this prompt is there?", asked from Python.

Ours is the native client with a real sidecar: the presence table alone, as it is looked at while a step is
scheduled; and with a lease, from the question until the answer is there. Peers answer the same question for the
same number of blocks: vLLM's own prefix cache (its `BlockPool`, in process), LMCache's sidecar by LMCache's own
client, and the least that any other process can do from Python: a round trip over a Unix socket or ZeroMQ.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from chaos.engine import FakeEngine, Shape, chain
from chaos.sidecar import Sidecar
from harness.peers import LmcacheClient, LmcacheServer, Unavailable
from harness.report import Better, Row

SIZES = (512, 2048)
ROUNDS, ROUNDS_QUICK = 30, 6
CALLS = 40
"""Of one contender before it is the next one's turn."""
BLOCK_TOKENS = 16
TABLE_US = {512: 15.0, 2048: 60.0}
LEASE_US = {512: 100.0, 2048: 200.0}
LEASE_P99_US = 500.0
PAUSE_SECONDS = 0.001
"""After a lease, so that giving it back is over before the next one is asked for."""
WAIT_US = 200
"""What the shim lets a lease's answer take before the step goes on."""

Call = Callable[[], float]
"""One question; the microseconds until its answer."""


@dataclass
class Figures:
    """Of one contender: the median of each round, and every call."""

    medians: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)

    def p99(self) -> float:
        return sorted(self.calls)[int(len(self.calls) * 0.99)]


def timed(call: Callable[[], object], expected: object) -> float:
    begun = time.perf_counter_ns()
    got = call()
    took = time.perf_counter_ns() - begun
    assert got == expected, f"expected {expected}, got {got}"
    return took / 1000


# ---- ours


def table_alone(engine: FakeEngine, hashes: list[bytes], there: bool) -> Call:
    """From vLLM's list of hashes to the number of leading blocks that the table has."""
    client, expected = engine.scheduler, len(hashes) if there else 0
    return lambda: timed(lambda: client.lookup(0, b"".join(hashes)), expected)


def with_lease(engine: FakeEngine, hashes: list[bytes], there: bool) -> Call:
    """From vLLM's list of hashes to a granted lease, or to the answer that there is none."""
    client, expected = engine.scheduler, len(hashes) if there else 0

    def ask() -> float:
        begun = time.perf_counter_ns()
        ticket = client.lease([(0, b"".join(hashes))])
        granted = 0
        while ticket:
            answer = client.lease_poll(ticket, WAIT_US)
            if answer is not None:
                granted = answer[0][0]
                break
        took = time.perf_counter_ns() - begun
        client.release(ticket)
        time.sleep(PAUSE_SECONDS)
        assert granted == expected, f"expected a lease of {expected} blocks, got one of {granted}"
        return took / 1000

    return ask


# ---- peers


def own_cache(hashes: list[bytes], there: bool) -> Call:
    """vLLM's `FullAttentionManager.find_longest_cache_hit`: one look into a dict for each block."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    pool = BlockPool(len(hashes) + 1, True, BLOCK_TOKENS)
    if there:
        for block, block_hash in zip(pool.blocks[1:], hashes, strict=True):
            pool.cached_block_hash_to_block.insert(make_block_hash_with_group_id(block_hash, 0), block)

    def look() -> int:
        found = 0
        for block_hash in hashes:
            if not pool.get_cached_block(block_hash, [0]):
                break
            found += 1
        return found

    return lambda: timed(look, len(hashes) if there else 0)


def _answer_socket(end: socket.socket, size: int) -> None:
    while True:
        left = size
        while left:
            part = end.recv(left)
            if not part:
                return
            left -= len(part)
        end.sendall(b"\0\0\0\0")


def unix_socket(stack: ExitStack, hashes: list[bytes]) -> Call:
    """The hashes there, four bytes back; the other end does nothing with them."""
    ours, theirs = socket.socketpair()
    joined = b"".join(hashes)
    process = multiprocessing.get_context("fork").Process(
        target=_answer_socket, args=(theirs, len(joined)), daemon=True
    )
    process.start()
    theirs.close()
    stack.callback(_end, process, ours)

    def ask() -> int:
        ours.sendall(b"".join(hashes))
        return len(ours.recv(4))

    return lambda: timed(ask, 4)


def _answer_zmq(address: str) -> None:
    import zmq

    replies = zmq.Context().socket(zmq.REP)
    replies.bind(address)
    while replies.recv():
        replies.send(b"\0\0\0\0")


def zeromq(stack: ExitStack, hashes: list[bytes]) -> Call:
    """The same over ZeroMQ, REQ and REP, ipc."""
    import zmq

    place = Path(tempfile.mkdtemp(prefix="pbz-", dir="/tmp"))
    address = f"ipc://{place}/z"
    process = multiprocessing.get_context("fork").Process(target=_answer_zmq, args=(address,), daemon=True)
    process.start()
    asks = zmq.Context().socket(zmq.REQ)
    asks.connect(address)

    def close() -> None:
        asks.close(0)
        _end(process)
        for file in place.iterdir():
            file.unlink()
        place.rmdir()

    stack.callback(close)

    def ask() -> int:
        asks.send(b"".join(hashes))
        return len(asks.recv())

    return lambda: timed(ask, 4)


def _end(process: multiprocessing.process.BaseProcess, *sockets: socket.socket) -> None:
    for one in sockets:
        one.close()
    process.terminate()
    process.join()


def lmcache(stack: ExitStack, size: int) -> dict[bool, Call]:
    """Calls of LMCache's own client for a prompt that is there and one that is not."""
    server = LmcacheServer("server", "--l1-size-gb", "1", "--supported-transfer-mode", "auto")
    stack.callback(server.close)
    server.await_ready()
    shape = f"(2,{size + 64},{BLOCK_TOKENS},1,8):float16:1"
    client = LmcacheClient(
        server,
        shape=shape,
        blocks=size + 64,
        block=BLOCK_TOKENS,
        tokens=size * BLOCK_TOKENS,
        way="engine_driven",
    )
    stack.callback(client.close)
    stored = client.ask("store", 1)
    if not stored["ok"]:
        raise Unavailable("its bench client could not store a prompt")

    def call(sequence: int, there: bool) -> Call:
        def ask() -> float:
            answer = client.ask("lookup", sequence)
            assert answer["found"] == (answer["of"] if there else 0), answer
            return float(answer["ms"]) * 1000

        return ask

    return {True: call(1, True), False: call(2, False)}


# ---- the run


class Bench:
    def __init__(self, quick: bool, stack: ExitStack) -> None:
        self.rounds = ROUNDS_QUICK if quick else ROUNDS
        self.stack = stack
        self.missing: str | None = None
        sidecar = Sidecar(host_pool="256MiB")
        stack.callback(sidecar.close)
        sidecar.start()
        # Blocks as small as they get: nothing here depends on what is in them.
        shape = Shape(layers=1, blocks=max(SIZES) + 64, heads=1, states=BLOCK_TOKENS, content=64)
        self.engine = FakeEngine(sidecar.socket, "lookup", shape=shape)
        stack.callback(self.engine.close)
        self.engine.await_ready()
        self.prompts = {size: chain(f"there {size}", size) for size in SIZES}
        self.unknown = {size: chain(f"not there {size}", size) for size in SIZES}
        for hashes in self.prompts.values():
            self.engine.must_save(hashes)
        self.engine.wait_for(self._all_found, "what was saved to be found")

    def _all_found(self) -> bool:
        return all(self.engine.lookup(hashes) == size for size, hashes in self.prompts.items())

    def contenders(self, size: int) -> dict[tuple[str, bool], Call]:
        made: dict[tuple[str, bool], Call] = {}
        for there in (True, False):
            hashes = (self.prompts if there else self.unknown)[size]
            made["table", there] = table_alone(self.engine, hashes, there)
            made["lease", there] = with_lease(self.engine, hashes, there)
            made["vLLM's own prefix cache", there] = own_cache(hashes, there)
        hashes = self.prompts[size]
        made["Unix socket, Python", True] = unix_socket(self.stack, hashes)
        made["ZeroMQ, Python", True] = zeromq(self.stack, hashes)
        try:
            made |= {("LMCache MP", there): call for there, call in lmcache(self.stack, size).items()}
        except Unavailable as error:
            self.missing = str(error).splitlines()[0]
            print(f"LMCache MP: {error}", file=sys.stderr)
        return made

    def run(self, size: int) -> list[Row]:
        contenders = self.contenders(size)
        figures = {key: Figures() for key in contenders}
        for number in range(self.rounds + 1):
            for key, call in contenders.items():
                calls = CALLS // 4 if key[0] == "LMCache MP" else CALLS
                values = [call() for _ in range(calls)]
                if number:  # the first round warms up
                    figures[key].medians.append(statistics.median(values))
                    figures[key].calls += values
        return self.rows(size, figures)

    def rows(self, size: int, figures: dict[tuple[str, bool], Figures]) -> list[Row]:
        rows = []
        for there in (True, False):
            case = f"{size:,} blocks, {'hit' if there else 'miss'}"
            for ours, text, limit in (
                ("table", "table alone", TABLE_US[size]),
                ("lease", "with lease", LEASE_US[size]),
            ):
                mine = figures[ours, there]
                rows.append(Row.within("P5", f"{case}, {text}, p50", mine.medians, limit, "µs"))
                if ours == "lease":
                    note = f"of {len(mine.calls):,} calls"
                    rows.append(
                        Row.within("P5", f"{case}, {text}, p99", [mine.p99()], LEASE_P99_US, "µs", note=note)
                    )
                peers = ["vLLM's own prefix cache", "Unix socket, Python", "ZeroMQ, Python", "LMCache MP"]
                rows += [self._beside(f"{case}, {text}, p50", mine, figures, peer, there) for peer in peers]
        return rows

    def _beside(
        self, case: str, mine: Figures, figures: dict[tuple[str, bool], Figures], peer: str, there: bool
    ) -> Row:
        # A round trip is the same whatever is answered.
        theirs = figures.get((peer, there)) or (figures.get((peer, True)) if peer != "LMCache MP" else None)
        if theirs is None:
            return Row.without("P5", case, peer, "µs", self.missing or "not measured")
        return Row.of(
            "P5", case, peer, "µs", Better.LESS, list(zip(mine.medians, theirs.medians, strict=True))
        )


def measure(quick: bool) -> list[Row]:
    """All rows of `lookup`."""
    rows = []
    for size in SIZES:
        with ExitStack() as stack:
            rows += Bench(quick, stack).run(size)
    return rows
