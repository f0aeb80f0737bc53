"""P1, P3, P4 and P8, and the machine's limits: rows for the report. `scripts/bench gpu` prints the same."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from itertools import chain
from typing import Any

from gpu_check.engine import shape
from gpu_check.rows import Row, duration, quantile, rate
from gpu_check.world import GIB, KIB, MIB, Engine, World

Bench = Callable[[World], list[Row]]
BENCHES: dict[str, Bench] = {}
COPY_THREADS = 8


def bench(name: str) -> Callable[[Bench], Bench]:
    def add(function: Bench) -> Bench:
        BENCHES[name] = function
        return function

    return add


def bytes_(size: int) -> str:
    for name, unit in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= unit:
            return f"{size / unit:g} {name}"
    return f"{size} B"


def opened(world: World, record: int, blocks: int, device: str = "driver") -> Engine:
    # One core checksums a third of what a PCIe 5 link moves.
    enough = len(os.sched_getaffinity(0)) >= COPY_THREADS
    threads: dict[str, Any] = {"copy_threads": COPY_THREADS} if enough else {}
    sidecar = world.sidecar(host_pool=world.sizes.bench_pool, **threads)
    return world.engine(sidecar, "engine", shape(record, blocks, "BLHNC"), device=device)


@bench("limits")
def limits(world: World) -> list[Row]:
    """Pinned copies in one process, and the batch API by fragment size."""
    sizes = world.sizes
    engine = world.process()
    plain = engine.call("memcpy", size=sizes.memcpy, runs=sizes.runs)
    size = bytes_(sizes.memcpy)
    rows = [
        rate("limit", f"device to host, one memcpy of {size}", plain["out"]),
        rate("limit", f"host to device, one memcpy of {size}", plain["into"]),
        rate("limit", f"both ways at once, memcpys of {size}", plain["both"]),
    ]
    swept = engine.call(
        "batches", size=sizes.sweep, fragments=sizes.fragments, counts=sizes.counts, runs=sizes.runs
    )
    for found in swept:
        way = "device to host" if found["out"] else "host to device"
        one = statistics.median(plain["out" if found["out"] else "into"])
        case = f"batch copies {way}, {found['count']} x {bytes_(found['fragment'])}"
        rows.append(
            rate("limit", case, found["rates"], peer="one memcpy", theirs=[one] * len(found["rates"]))
        )
    return rows


@bench("P1")
def one_way(world: World) -> list[Row]:
    sizes, rows = world.sizes, []
    for record in sizes.bench_records:
        blocks = sizes.bench // record
        found = opened(world, record, blocks + 1).call(
            "throughput", blocks=blocks, memcpy_bytes=sizes.memcpy, runs=sizes.runs
        )
        world.close()
        peer = f"memcpy of {bytes_(sizes.memcpy)}"
        for what, limit in (("save", "out"), ("load", "into")):
            case = f"{what}, {blocks} blocks of {bytes_(record)}"
            rows.append(rate("P1", case, found[what], peer=peer, theirs=found[limit], budget=0.95))
    return rows


@bench("P3")
def two_ways(world: World) -> list[Row]:
    sizes = world.sizes
    record = sizes.bench_records[-1 if len(sizes.bench_records) < 3 else 2]
    blocks = sizes.bench // record
    found = opened(world, record, 2 * blocks + 1).call(
        "both_ways", blocks=blocks, memcpy_bytes=sizes.memcpy, runs=sizes.runs
    )
    case = f"save and load at once, {blocks} blocks of {bytes_(record)} each"
    return [rate("P3", case, found["ours"], peer="two memcpys at once", theirs=found["memcpy"], budget=0.95)]


@bench("P8")
def latency(world: World) -> list[Row]:
    sizes = world.sizes
    record, runs = sizes.latency_record, sizes.latency_runs
    found = opened(world, record, 4).call("latency", runs=runs)
    block = f"one block of {bytes_(record)}"
    rows = [
        _time(f"request to usable: lease and load, {block}", found["request"], "budget", 1000.0, 1.0),
        _time(f"submission to usable: load, {block}", found["load"]),
    ]
    # Small blocks: the copy itself takes next to no time.
    world.close()
    record = 64 * KIB
    found = opened(world, record, 16).call("latency", runs=runs)
    block = f"one block of {bytes_(record)}"
    for ours, theirs, what in (
        ("event_load", "event_into", "load"),
        ("event_save", "event_out", "save"),
    ):
        plain = statistics.median(found[theirs])
        rows.append(_time(f"event to the end of a {what}, {block}", found[ours], "copy in the engine", plain))
        # What the sidecar adds to a copy in a stream of the engine's own: it starts the copy, checks the bytes
        # and reports. The start alone cannot be seen from outside: this proves its budget or says nothing.
        added = [each - plain for each in found[ours]]
        row = _time(f"event to start of a {what}'s copy, at most, {block}", added, "budget", 10.0, 1.0)
        rows.append({**row, "met": row["met"] or None})
    return rows


def _time(
    case: str,
    ours: list[float],
    peer: str | None = None,
    theirs: float | None = None,
    budget: float | None = None,
) -> Row:
    middle = statistics.median(ours)
    ends = (quantile(ours, 0.99), quantile(ours, 0.01))
    ratios = [theirs / max(each, 1e-3) for each in ends] if theirs is not None else []
    return duration(
        "P8", f"{case}, p50", middle, peer=peer, theirs=theirs, ratios=ratios, budget=budget, runs=len(ours)
    )


@bench("P4")
def decode(world: World) -> list[Row]:
    world.need("torch")
    sizes = world.sizes
    blocks = 1 + 2 * sizes.decode_jobs * sizes.decode_blocks
    found: dict[str, Any] = opened(world, sizes.record, blocks, "torch").call(
        "decode",
        seconds=sizes.window,
        windows=sizes.windows,
        blocks=sizes.decode_blocks,
        jobs=sizes.decode_jobs,
    )
    rows = []
    for name, share, budget in (("p50", 0.5, 1 / 1.02), ("p99", 0.99, 1 / 1.03)):
        quiet = [quantile(window, share) for window in found["quiet"]]
        busy = [quantile(window, share) for window in found["busy"]]
        rows.append(
            duration(
                "P4",
                f"decode step beside loads and saves, {name}",
                quantile(list(chain(*found["busy"])), share),
                peer="without them",
                theirs=quantile(list(chain(*found["quiet"])), share),
                ratios=[a / b for a, b in zip(quiet, busy, strict=True)],
                budget=round(budget, 4),
                unit="ms",
                runs=sum(map(len, found["busy"])),
            )
        )
    return [*rows, rate("P4", "loads and saves meanwhile, in sum", [found["rate"]])]
