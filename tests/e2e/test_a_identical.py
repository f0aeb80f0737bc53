"""Token-identical with and without Pillion; one engine, whose shim starts the sidecar itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from e2e.harness import Engine, Sidecar
from e2e.prompts import LONG
from e2e.world import MARGIN, Checker, World


@pytest.fixture(scope="module")
def sidecar(world: World) -> Sidecar:
    return world.sidecar()


@pytest.fixture(scope="module")
def engine(world: World, identical: Checker, sidecar: Sidecar) -> Iterator[Engine]:
    engine = world.engine("first", sidecar, max_num_batched_tokens=256)
    yield engine
    engine.stop()


def test_every_choice_of_the_reference_has_a_margin(world: World) -> None:
    close = {name: answer.gap for name, answer in world.reference().items() if (answer.gap or 0) < MARGIN}
    assert not close, f"take another seed: {close}"


def test_a_fresh_engine_saves_and_answers_the_same(
    engine: Engine, identical: Checker, sidecar: Sidecar
) -> None:
    answers = engine.ask_all(LONG)
    identical(*answers)
    assert [answer.loaded for answer in answers] == [0] * len(LONG)
    engine.quiet()
    assert sidecar.status()["pool"]["records"] >= sum(prompt.blocks for prompt in LONG)


def test_warm_in_the_engine_nothing_is_loaded(engine: Engine, identical: Checker) -> None:
    for prompt in LONG:
        answer = engine.ask(prompt)
        identical(answer)
        assert (answer.own, answer.loaded) == (prompt.usable, 0)


def test_warm_in_pillion_the_whole_prompt_is_loaded(engine: Engine, identical: Checker) -> None:
    engine.forget()
    for prompt in LONG:
        answer = engine.ask(prompt)
        identical(answer)
        assert (answer.own, answer.loaded) == (0, prompt.usable)
