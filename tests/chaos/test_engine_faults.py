"""Engines die, give up and are late: nothing of theirs stays, and nothing half-saved is served."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest

from chaos.campaigns import Victims, engine_kills, leftovers
from chaos.conftest import World
from chaos.engine import CANCELLED, DONE, FAILED, Traffic, chain
from chaos.sidecar import Sidecar, ended, until


@pytest.fixture
def victims() -> Iterator[Callable[[Sidecar], Victims]]:
    made: list[Victims] = []

    def make(sidecar: Sidecar) -> Victims:
        made.append(Victims(sidecar))
        return made[-1]

    yield make
    for each in made:
        each.close()


Make = Callable[[Sidecar], Victims]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_engine_killed_at_any_point_leaves_nothing_behind(world: World, seed: int) -> None:
    """30 kills a seed. Its memfd is unmapped, its leases and jobs are gone, and what is served is right."""
    assert engine_kills(world, seed).kills == 30


def test_an_engine_killed_while_the_sidecar_is_stopped_is_cleaned_up_afterwards(
    world: World, victims: Make
) -> None:
    sidecar = world.sidecar()
    (victim,) = victims(sidecar).spawn(("victim", 5, "memfd"))
    with sidecar.stopped():
        time.sleep(0.1)
        os.kill(victim, signal.SIGKILL)
        until(lambda: ended(victim), "its end")
    until(lambda: not leftovers(sidecar, ["victim"]), lambda: leftovers(sidecar, ["victim"]), 3)
    reader = world.engine(sidecar, "reader")
    for prompt in Traffic(reader, 0).prompts:
        if reader.lookup(prompt):
            reader.must_load(prompt)


def test_a_stopped_engine_keeps_its_session_and_loses_its_leases(world: World, victims: Make) -> None:
    sidecar = world.sidecar(lease_seconds=1)
    (victim,) = victims(sidecar).spawn(("victim", 6, "memfd"))
    os.kill(victim, signal.SIGSTOP)
    until(lambda: sidecar.status()["leases"]["held"] == 0, "its leases to run out", 4)
    until(lambda: sidecar.status()["jobs"]["running"] == 0, "its jobs to end", 4)
    assert {s["engine_id"] for s in sidecar.sessions()} == {"victim"}
    done = sidecar.status()["leases"]["granted"]
    os.kill(victim, signal.SIGCONT)
    until(lambda: sidecar.status()["leases"]["granted"] > done, "it to go on", 5)
    os.kill(victim, signal.SIGKILL)
    until(lambda: not leftovers(sidecar, ["victim"]), lambda: leftovers(sidecar, ["victim"]), 3)


@pytest.mark.parametrize("way", ["memfd", "process_vm"])
def test_a_save_that_is_taken_back_is_never_served_with_other_bytes(world: World, way: str) -> None:
    """The source blocks are scribbled over as soon as the save has quiesced, whatever its deadline (I4)."""
    sidecar = world.sidecar()
    engine = world.engine(sidecar, way=way)
    reader = world.engine(sidecar)
    chance = random.Random(4)
    seen = {DONE: 0, CANCELLED: 0, FAILED: 0}
    for index in range(120):
        prompt = chain(f"take-back-{index}", chance.randrange(1, 40))
        # The deadlines from "at once" to "in time", as many of them as may be in the middle of the copy: how many is up
        # to the machine, but for those whose sidecar is stopped meanwhile.
        deadline_ms = chance.choice([0, 0, 1, 1, 1, 2, 3, 5])
        is_stopped = index % 8 == 0
        with sidecar.stopped() if is_stopped else nullcontext():
            job = engine.save(prompt, deadline_ms=deadline_ms)
            wait = time.monotonic() + (0.02 if is_stopped else chance.uniform(0, 0.003))
            while time.monotonic() < wait and not job.quiesced:
                engine.poll()
        engine.wait(job)
        assert job.outcome
        seen[job.outcome] += 1
        if job.outcome == DONE:
            # A save that ends by its deadline may be found a moment before its last block is.
            until(lambda: reader.lookup(prompt) == len(prompt), "what is done to be there", 1)  # noqa: B023
            reader.must_load(prompt)
        elif reader.lookup(prompt):
            raise AssertionError(f"served although it was taken back: {job}")
    assert seen[DONE] > 5 and seen[CANCELLED] > 5, seen
    engine.settle()
    # Nothing of it turns up later.
    until(lambda: sidecar.status()["jobs"]["running"] == 0, "the sidecar to be done with them")
    for index in range(120):
        prompt = chain(f"take-back-{index}", 1)
        if reader.lookup(prompt):
            reader.must_load(prompt)


@pytest.mark.parametrize("way", ["memfd", "process_vm"])
def test_a_load_that_is_late_ends_once_and_holds_its_blocks_until_nothing_writes_them(
    world: World, way: str
) -> None:
    sidecar = world.sidecar()
    engine = world.engine(sidecar, way=way)
    prompt = chain("late", 60)
    engine.must_save(prompt)
    chance = random.Random(5)
    seen = {DONE: 0, CANCELLED: 0, FAILED: 0}
    for _ in range(150):
        job = engine.load(prompt, deadline_ms=chance.choice([0, 0, 1, 1, 2, 3, 6]))
        assert job
        engine.wait(job)
        assert job.outcome
        seen[job.outcome] += 1
    engine.settle()
    assert seen[DONE] > 5 and seen[FAILED] > 5, seen
    sidecar.await_unleased()


def test_more_jobs_than_the_sidecar_takes_end_all_the_same(world: World) -> None:
    sidecar = world.sidecar()
    engine = world.engine(sidecar)
    engine.must_save(chain("a", 1))
    jobs = [engine.save(chain(f"many-{index}", 1)) for index in range(250)]
    engine.settle()
    outcomes = {job.outcome for job in jobs}
    assert outcomes <= {DONE, CANCELLED} and DONE in outcomes
    # As many word slots as there were before: none leaks.
    for round_ in range(8):
        for index in range(200):
            engine.save(chain(f"more-{round_}-{index}", 1), deadline_ms=0)
        engine.settle()
    assert engine.must_save(chain("last", 3)).blocks_done == 3


def test_a_closed_client_detaches_at_once(world: World) -> None:
    sidecar = world.sidecar()
    engine = world.engine(sidecar)
    engine.must_save(chain("a", 10))
    engine.lease(chain("a", 10))
    engine.scheduler.close()
    engine.worker.close()
    until(lambda: not sidecar.sessions(), "its sessions to end", 3)
    sidecar.await_unleased()
    assert engine.lookup(chain("a", 10)) == 0
    assert engine.wait(engine.save(chain("b", 2)), 1).outcome == CANCELLED
