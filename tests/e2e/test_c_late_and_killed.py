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


def die(engine: Engine, delay: float) -> None:
    """SIGKILL to all of the engine's processes, `delay` seconds into a burst of requests."""
    requests = [engine.submit(prompt) for prompt in VICTIMS]
    if delay > 0:
        time.sleep(delay)
    else:
        assert requests[0].first.wait(60)
    engine.kill()


@pytest.fixture(scope="module")
def survivor(world: World, identical: Checker) -> Sidecar:
    """A sidecar whose engines die young."""
    return world.sidecar()


@pytest.mark.parametrize("delay", [0.02, 0.0, 0.25], ids=["starting", "saving", "loading"])
def test_an_engine_that_is_killed_leaves_nothing_behind(
    world: World, survivor: Sidecar, identical: Checker, delay: float
) -> None:
    engine = world.engine("victim", survivor)
    die(engine, delay)
    report = survivor.idle()
    assert report["jobs"]["running"] == 0, report["jobs"]
    assert report["faults"] == dict.fromkeys(report["faults"], 0), report["faults"]


def test_nothing_half_saved_is_served(world: World, survivor: Sidecar, identical: Checker) -> None:
    engine = world.engine("heir", survivor)
    try:
        # Of what the dead have left, some is there; whatever is, is right.
        answers = [engine.ask(prompt) for prompt in VICTIMS]
        identical(*answers)
        print(f"from the dead: {[answer.loaded for answer in answers]}")
        engine.quiet()
        engine.forget()
        identical.loads(engine, VICTIMS)
    finally:
        engine.stop()
    survivor.idle()
