"""Kills at random, as often as wanted: what tests do a few times, and `scripts/soak` ten thousand times."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from chaos.conftest import World
from chaos.engine import FakeEngine, Traffic, chain
from chaos.sidecar import Sidecar, ended

VICTIM = Path(__file__).with_name("victim.py")
WAYS = ("memfd", "memfd", "process_vm")


class Victims:
    """Engines that can be killed. They fight with one sidecar."""

    def __init__(self, sidecar: Sidecar, surroundings: Mapping[str, str] | None = None) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(surroundings or {})}
        code = [sys.executable, str(VICTIM), str(sidecar.socket)]
        self.process = subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def spawn(self, *engines: tuple[str, int, str]) -> list[int]:
        """(name, seed, way) each; their pids when all of them work, in no order."""
        assert self.process.stdin and self.process.stdout
        for name, seed, way in engines:
            self.process.stdin.write(f"{name} {seed} {way}\n".encode())
        self.process.stdin.flush()
        return [int(self.process.stdout.readline()) for _ in engines]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def leftovers(sidecar: Sidecar, names: list[str]) -> str:
    """What the sidecar still has of these engines; "" if nothing."""
    status = sidecar.status()
    found = [f"session {s}" for s in status["sessions"] if s["engine_id"] in names]
    maps = Path(f"/proc/{sidecar.worker_pid}/maps").read_text()
    found += [f"mapping of {name}" for name in names if f"kv-{name} " in maps or f"kv-{name}\n" in maps]
    if status["jobs"]["running"] or status["leases"]["held"] or status["pool"]["leased_bytes"]:
        found.append(f"jobs {status['jobs']}, leases {status['leases']}, pool {status['pool']}")
    return "; ".join(found)


@dataclass
class Figures:
    """What a campaign did."""

    kills: int = 0
    loads: int = 0
    """That were compared, byte for byte."""
    saves: int = 0
    blocks_compared: int = 0
    waits_ms: list[float] = field(default_factory=list)
    """From a kill until nothing was left of it, or until everybody worked again."""

    def add(self, other: Figures) -> None:
        self.kills += other.kills
        self.loads += other.loads
        self.saves += other.saves
        self.blocks_compared += other.blocks_compared
        self.waits_ms += other.waits_ms


def engine_kills(world: World, seed: int, batches: int = 10) -> Figures:
    """Three engines a batch are killed somewhere in their work. Their memfds are unmapped, their leases and jobs are
    gone, and what is served is right."""
    chance, figures = random.Random(seed), Figures()
    sidecar = world.sidecar(host_pool="16MiB")
    reader = world.engine(sidecar, f"reader-{seed}")
    prompts = Traffic(reader, 0).prompts
    with Victims(sidecar) as zoo:
        for batch in range(batches):
            names = [f"victim-{seed}-{batch}-{index}" for index in range(len(WAYS))]
            engines = [(name, chance.randrange(10**6), way) for name, way in zip(names, WAYS, strict=True)]
            pids = zoo.spawn(*engines)
            maps = Path(f"/proc/{sidecar.worker_pid}/maps").read_text()
            for name, way in zip(names, WAYS, strict=True):
                assert (f"kv-{name} " in maps) == (way == "memfd"), "mapped while it lives"
            for pid in pids:
                time.sleep(chance.uniform(0, 0.05))
                assert not ended(pid), "it ended before it was killed"
                os.kill(pid, signal.SIGKILL)
                figures.kills += 1
            gone = time.monotonic()
            while rest := leftovers(sidecar, names):
                assert time.monotonic() < gone + 3, rest
            figures.waits_ms.append((time.monotonic() - gone) * 1e3)
            for prompt in prompts:
                if count := reader.lookup(prompt):
                    assert len(reader.must_load(prompt).hashes) == count
                    figures.loads += 1
                    figures.blocks_compared += count
            sidecar.await_unleased()
    status = sidecar.status()
    assert status["tiers"][0]["blocks_saved"] > 0 and status["jobs"]["loads"]["done"] > 0
    assert status["faults"]["checksum_failures"] == 0
    figures.saves += status["jobs"]["saves"]["done"]
    return figures


def recovers(engine: FakeEngine, name: str) -> None:
    """Saves and loads work, with what was never there before."""
    prompt = chain(f"{engine.name}/{name}", 10)
    assert engine.must_save(prompt).blocks_done == 10
    assert len(engine.must_load(prompt).hashes) == 10


def sidecar_kills(world: World, seed: int, rounds: int = 3, count: int = 4, **flags: Any) -> Figures:
    """Sidecars are killed at random points, under load of both ways of memory. Every job ends once, no byte is wrong,
    everybody comes in again by himself. `{number}` in a flag stands for the sidecar."""
    chance, figures = random.Random(seed), Figures()
    sidecars: list[Sidecar] = []
    for number in range(count):
        given: dict[str, Any] = {
            key: str(value).replace("{number}", str(number)) for key, value in flags.items()
        }
        sidecars.append(world.sidecar(**given))
    engines = [
        world.engine(sidecar, way=way, name=f"{way}-{seed}-{index}")
        for index, sidecar in enumerate(sidecars)
        for way in ("memfd", "process_vm")
    ]
    traffics = [Traffic(engine, seed * 100 + index, prompts=12) for index, engine in enumerate(engines)]
    kills = {sidecar.socket: 0 for sidecar in sidecars}
    for turn in range(rounds):
        before = [engine.attaches() for engine in engines]
        # Each sidecar is killed somewhere in the next 300 ms, while all engines work.
        begun = last = time.monotonic()
        plan = sorted((chance.uniform(0, 0.3), index) for index in range(len(sidecars)))
        while plan or not all(engine.ready() for engine in engines):
            if plan and time.monotonic() > begun + plan[0][0]:
                sidecar = sidecars[plan.pop(0)[1]]
                sidecar.kill_worker()
                kills[sidecar.socket] += 1
                last = time.monotonic()
            for traffic in traffics:
                traffic.step()
            assert time.monotonic() < begun + 15, "an engine does not come back"
        for engine, then in zip(engines, before, strict=True):
            engine.await_again(then)
        figures.waits_ms.append((time.monotonic() - last) * 1e3)
        for engine in engines:
            recovers(engine, f"{seed}-{turn}")
    for engine in engines:
        engine.settle()
        lost = engine.worker.counters()
        assert lost["losses"] >= rounds and lost["unquiesced"] == 0
        figures.blocks_compared += sum(
            job.blocks_done for job in engine.finished if job.kind == "load" and job.blocks_done
        )
    for sidecar in sidecars:
        assert sidecar.status()["sidecar"]["worker_restarts"] == kills[sidecar.socket] == rounds
    figures.kills += sum(kills.values())
    figures.loads += sum(traffic.loads for traffic in traffics)
    figures.saves += sum(traffic.saves for traffic in traffics)
    return figures
