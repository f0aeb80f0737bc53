"""Sidecars that come after the engine, and engines that are killed in the middle of their jobs."""

from __future__ import annotations

import time

import pytest

from e2e.harness import Engine, Sidecar, until
from e2e.prompts import LATE, VICTIMS, Prompt
from e2e.world import Checker, World


def saves_and_loads(engine: Engine, identical: Checker, prompts: list[Prompt]) -> None:
    identical(*engine.ask_all(prompts))
    engine.quiet()
    engine.forget()
    identical.loads(engine, prompts)


def test_a_sidecar_that_starts_after_the_engine_is_found(world: World, identical: Checker) -> None:
    sidecar = world.sidecar()
    engine = world.engine("early", sidecar, extra={"launch": False})
    try:
        answers = engine.ask_all(LATE)
        identical(*answers)
        assert [answer.loaded for answer in answers] == [0] * len(LATE)
        assert sidecar.try_status() is None, "launch is off: nobody may have started one"
        sidecar.launch()
        until(lambda: len(sidecar.sessions()) == 2, lambda: f"both halves attach\n{sidecar.explain()}", 45)
        # Found in vLLM's own cache, and saved all the same.
        saves_and_loads(engine, identical, LATE)
    finally:
        engine.stop()
    sidecar.idle()


def die(engine: Engine, delay: float | None) -> None:
    """SIGKILL to all of the engine's processes: so long after a burst of requests, or at the first token."""
    requests = [engine.submit(prompt) for prompt in VICTIMS]
    if delay is None:
        assert requests[0].first.wait(60)
    else:
        time.sleep(delay)
    engine.kill()


def nothing_left(sidecar: Sidecar) -> None:
    report = sidecar.idle()
    assert report["jobs"]["running"] == 0, report["jobs"]
    assert report["faults"] == dict.fromkeys(report["faults"], 0), report["faults"]


@pytest.fixture(scope="module")
def survivor(world: World, identical: Checker) -> Sidecar:
    """A sidecar whose engines die young."""
    return world.sidecar()


def heir(world: World, survivor: Sidecar, identical: Checker) -> list[int]:
    """Of what the dead have left, whatever is there is right. Stores the rest; says what was there."""
    engine = world.engine("heir", survivor)
    try:
        answers = [engine.ask(prompt) for prompt in VICTIMS]
        identical(*answers)
        engine.quiet()
        engine.forget()
        identical.loads(engine, VICTIMS)
    finally:
        engine.stop()
    nothing_left(survivor)
    return [answer.loaded for answer in answers]


@pytest.mark.parametrize("delay", [0.05, None], ids=["soon", "at the first token"])
def test_an_engine_that_is_killed_while_it_saves(
    world: World, survivor: Sidecar, delay: float | None
) -> None:
    die(world.engine("saver", survivor), delay)
    nothing_left(survivor)


def test_nothing_half_saved_is_served(world: World, survivor: Sidecar, identical: Checker) -> None:
    print(f"tokens from the dead: {heir(world, survivor, identical)}")


@pytest.mark.parametrize("delay", [0.004, 0.02, 0.06])
def test_an_engine_that_is_killed_while_it_loads(world: World, survivor: Sidecar, delay: float) -> None:
    die(world.engine("loader", survivor), delay)
    nothing_left(survivor)


def test_all_of_it_is_still_there(world: World, survivor: Sidecar, identical: Checker) -> None:
    found = heir(world, survivor, identical)
    assert sum(map(bool, found)) > len(found) // 2, found
