"""KV really comes from the store, and never from another model's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from e2e import noise
from e2e.harness import Answer, Engine, Sidecar, until
from e2e.prompts import BLOCK, LONG, NOISY, OTHERS, Prompt
from e2e.world import Checker, World


@pytest.fixture(scope="module")
def sidecar(world: World) -> Sidecar:
    return world.sidecar()


@contextmanager
def running(world: World, name: str, sidecar: Sidecar, **options: Any) -> Iterator[Engine]:
    engine = world.engine(name, sidecar, **options)
    try:
        yield engine
    finally:
        engine.stop()


def test_noise_in_the_store_changes_the_answers(world: World, identical: Checker, sidecar: Sidecar) -> None:
    """The negative control: the same test with the right bytes is every other test here."""
    with running(world, "asked", sidecar) as engine:
        identity = engine.call("identity")
        hashes = {prompt.name: engine.hashes(prompt) for prompt in NOISY}
        identical(*engine.ask_all(LONG[3:]))
        engine.quiet()
    for prompt in NOISY:
        noise.save(sidecar.socket, identity, hashes[prompt.name][: prompt.usable // BLOCK])
    with running(world, "deceived", sidecar) as engine:
        for prompt in NOISY:
            answer = until(partial(ask_until_loaded, engine, prompt), engine.explain)
            assert answer.loaded == prompt.usable
            assert answer.tokens != identical.references[prompt.name].tokens, (
                f"{prompt.name}: noise was loaded, and the answer is the same"
            )
        identical.loads(engine, LONG[3:])


def ask_until_loaded(engine: Engine, prompt: Prompt) -> Answer | None:
    answer = engine.ask(prompt)
    if not answer.loaded:
        engine.forget()
    return answer if answer.loaded else None


@pytest.fixture(scope="module")
def place(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path with model a's weights, until a test puts others there."""
    place = tmp_path_factory.mktemp("model") / "weights"
    shutil.copytree(world.model("a"), place)
    return place


def saved_and_not_loaded(engine: Engine, check: Checker) -> None:
    """These answers are this model's own, and Pillion has nothing for it yet; then it has."""
    answers = engine.ask_all(OTHERS)
    check(*answers)
    assert [answer.loaded for answer in answers] == [0] * len(OTHERS)
    engine.quiet()
    engine.forget()
    check.loads(engine, OTHERS)


def test_other_weights_under_the_same_path_are_another_model(
    world: World, identical: Checker, sidecar: Sidecar, place: Path
) -> None:
    other = Checker(world, world.reference("b", OTHERS))
    assert all(
        other.references[prompt.name].tokens != identical.references[prompt.name].tokens for prompt in OTHERS
    )
    with running(world, "weights-a", sidecar, path=place) as engine:
        saved_and_not_loaded(engine, identical)
    for file in place.iterdir():
        file.unlink()
    for file in world.model("b").iterdir():
        shutil.copy(file, place)
    with running(world, "weights-b", sidecar, path=place) as engine:
        saved_and_not_loaded(engine, other)


def test_another_dtype_is_another_model(world: World, sidecar: Sidecar, place: Path) -> None:
    half = Checker(world, world.reference("a", OTHERS, dtype="bfloat16"))
    with running(world, "bfloat16", sidecar, dtype="bfloat16") as engine:
        answers = engine.ask_all(OTHERS)
        assert [answer.loaded for answer in answers] == [0] * len(OTHERS)
        half(*answers)


def test_two_models_live_side_by_side(
    world: World, identical: Checker, sidecar: Sidecar, place: Path
) -> None:
    """The sidecar has both by now; and the same weights are the same model wherever they lie."""
    other = Checker(world, world.reference("b", OTHERS))
    with running(world, "again-a", sidecar) as engine:
        identical.loads(engine, OTHERS)
    with running(world, "again-b", sidecar, which="b") as engine:
        other.loads(engine, OTHERS)


def test_two_tenants_never_share(world: World, identical: Checker) -> None:
    """The same model and the same prompts: each tenant finds its own, and that only."""
    sidecar = world.sidecar()
    sidecar.config.write_text(
        "".join(f"[tenants.{name}]\nuids = [{os.getuid()}]\n" for name in ("red", "blue"))
    )
    # The sidecar that the first engine starts reads it.
    surroundings = {"PILLION_CONFIG": str(sidecar.config)}
    for tenant in ("red", "blue"):
        options = {"extra": {"tenant": tenant}, "environment": surroundings}
        with running(world, tenant, sidecar, **options) as engine:
            saved_and_not_loaded(engine, identical)
    with running(world, "red-again", sidecar, extra={"tenant": "red"}, environment=surroundings) as engine:
        identical.loads(engine, OTHERS)
