"""Engine and sidecar end, as with a reboot: the prompts come back from the SSD, and the answers are the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos.faulty_disk import FaultyDisk, mounted
from chaos.sidecar import ended
from e2e.harness import Engine, Sidecar, until
from e2e.prompts import CHUNKED, GROWN, LONG, Prompt
from e2e.world import ATTEMPTS, Checker, World

PROMPTS = [*LONG, *CHUNKED, *GROWN]

DISK_RULES = (
    ("read", "flip", 300_007, 29),
    ("read", "errno", 5, 61),
    ("write", "lost", 0, 13),
    ("write", "flip", 300_007, 17),
    ("write", "torn", 33, 29),
    ("write", "misdirected", 48, 31),
    ("sync", "errno", 5, 7),
)
"""What fails, how, with which value, and how often: one operation of so many."""
DISK_ROUNDS_MIN, DISK_ROUNDS_MAX = 3, 12
"""One block that is found damaged fails all of its load: a round without any load is nothing unusual."""


def start(world: World, sidecar: Sidecar, name: str) -> Engine:
    """The shim starts the sidecar, which is told of its SSD by the engine's environment."""
    return world.engine(name, sidecar, environment={"PILLION_SSD": f"{sidecar.place}/ssd-{{device}}=1GiB"})


def ssd(sidecar: Sidecar) -> dict[str, Any]:
    status: dict[str, Any] = sidecar.status()["ssd"]
    return status


def end(sidecar: Sidecar, how: signal.Signals) -> None:
    pids = [sidecar.supervisor_pid, sidecar.worker_pid]
    for pid in pids if how == signal.SIGKILL else pids[:1]:
        os.kill(pid, how)
    until(lambda: all(ended(pid) for pid in pids), lambda: f"the sidecar ends\n{sidecar.explain()}", 30)


def comes_back(engine: Engine, identical: Checker, prompt: Prompt) -> None:
    """Until all of it came from Pillion. A disk or a machine that is slow makes a lookup shorter, never wrong, and what
    it was asked for is there the next time."""
    for _ in range(ATTEMPTS):
        answer = engine.ask(prompt)
        identical(answer)
        if answer.loaded == prompt.usable - answer.own:
            return
        engine.quiet()
        engine.forget()
    raise AssertionError(f"{prompt.name}: {ATTEMPTS} times less than {prompt.usable} tokens: {answer}")


def test_prompts_come_back_after_engine_and_sidecar_ended(world: World, identical: Checker) -> None:
    sidecar = world.sidecar()
    engine = start(world, sidecar, "before")
    try:
        answers = engine.ask_all(PROMPTS)
        identical(*answers)
        assert [answer.loaded for answer in answers] == [0] * len(PROMPTS)
        engine.quiet()
        blocks = sidecar.status()["pool"]["records"]
        assert blocks >= sum(prompt.blocks for prompt in LONG)
    finally:
        engine.stop()
    # In order: what was not written yet is written now.
    end(sidecar, signal.SIGTERM)
    for name, how in (("after-term", signal.SIGKILL), ("after-kill", signal.SIGTERM)):
        engine = start(world, sidecar, name)
        try:
            assert ssd(sidecar)["records"] == blocks
            for prompt in PROMPTS:
                comes_back(engine, identical, prompt)
            engine.quiet()
            now = ssd(sidecar)
            assert now["blocks_read"] >= sum(prompt.blocks for prompt in LONG), now
            assert (now["read_failures"], now["blocks_written"]) == (0, 0), now
        finally:
            engine.stop()
        end(sidecar, how)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    yield from mounted(tmp_path / "disk")


def killed(sidecar: Sidecar, engine: Engine) -> None:
    """The sidecar's worker, which comes back."""
    before = engine.counters()["attaches"]
    sidecar.kill_worker()
    until(lambda: engine.counters()["attaches"] > before, engine.explain, 30)
    until(lambda: engine.counters()["ready"], engine.explain, 30)


def test_answers_are_the_same_whatever_the_disk_does(
    world: World, identical: Checker, disk: FaultyDisk
) -> None:
    """A pool that is smaller than the prompts, and a disk that fails, lies and changes bits. Round after round, until
    something was loaded between the faults, and something was found damaged."""
    sidecar = world.sidecar()
    surroundings = {
        "PILLION_SSD": f"{disk.place}=1GiB",
        "PILLION_SSD_SEGMENT": "4MiB",
        "PILLION_HOST_POOL": "16MiB",
    }
    engine = world.engine("faulty-disk", sidecar, environment=surroundings)
    try:
        identical(*engine.ask_all(PROMPTS))
        engine.quiet()
        until(lambda: ssd(sidecar)["writes_waiting"] == 0, engine.explain, 30)
        loaded = damaged = turns = 0
        while turns < DISK_ROUNDS_MIN or not (loaded and damaged):
            assert turns < DISK_ROUNDS_MAX, f"{loaded} tokens loaded, {damaged} damaged\n{engine.explain()}"
            turns += 1
            # What is in memory would hide the disk.
            disk.well()
            killed(sidecar, engine)
            for what, fault, value, every in DISK_RULES:
                disk.rule(what, fault, value, after=every, every=every)
            engine.forget()
            answers = engine.ask_all(PROMPTS)
            identical(*answers)
            loaded += sum(answer.loaded for answer in answers)
            engine.quiet()
            damaged += ssd(sidecar)["blocks_corrupt"]
        injected = disk.status()["injected"]
        print(
            f"{turns} rounds, {injected} faults of the disk, {loaded} tokens loaded, {damaged} blocks found damaged"
        )
        assert injected > 10
        assert sidecar.status()["faults"]["identity_mismatches"] == 0
    finally:
        engine.stop()
