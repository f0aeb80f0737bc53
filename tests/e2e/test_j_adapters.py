"""LoRA adapters and cache salts: who may share what.

vLLM's block hash goes by an adapter's name, and by its path since 0.31; Pillion's key by that and by the weights. So
other weights under a known name and path are another adapter, and so are equal ones under another name.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from e2e.harness import Answer, Engine, Sidecar
from e2e.prompts import ADAPTED, Adapter, Prompt
from e2e.world import MARGIN, Checker, World

SEEDS = {"red": 1, "blue": 2}
OPTIONS: dict[str, Any] = {
    "enable_lora": True,
    "max_lora_rank": 8,
    # One slot more than adapters: on CPU, vllm/lora/ops/torch_ops/lora_ops.py takes the last slot's weights
    # for tokens without an adapter (their index is -1) as soon as a step has tokens with one. It must be empty.
    "max_loras": 4,
}


@dataclass(frozen=True)
class Adapters:
    red: Adapter
    blue: Adapter
    rot: Adapter
    """The weights of red, under another name and at another place."""

    def prompts(self) -> dict[str, list[Prompt]]:
        named = {one.name: [prompt.under(one) for prompt in ADAPTED] for one in (self.red, self.blue)}
        return {"base": ADAPTED, **named}


@pytest.fixture(scope="module")
def adapters(world: World, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    places = {name: world.models.adapter(world.model(), seed) for name, seed in SEEDS.items()}
    elsewhere = tmp_path_factory.mktemp("adapters") / "copied"
    shutil.copytree(places["red"], elsewhere)
    return Adapters(
        Adapter("red", 1, places["red"]), Adapter("blue", 2, places["blue"]), Adapter("rot", 3, elsewhere)
    )


@pytest.fixture(scope="module")
def references(world: World, adapters: Adapters) -> dict[str, Answer]:
    """What plain vLLM answers; each adapter alone, so that nothing hangs on how it batches them."""
    engine = world.engine("plain-adapters", None, **OPTIONS)
    answers = []
    for prompts in adapters.prompts().values():
        pending = [engine.submit(prompt, logprobs=2) for prompt in prompts]
        answers += [one.answer() for one in pending]
    engine.stop()
    found = {answer.prompt.name: answer for answer in answers}
    # The copy must answer what the original answers.
    copies = {prompt.under(adapters.rot).name: found[prompt.under(adapters.red).name] for prompt in ADAPTED}
    return {**found, **copies}


@pytest.fixture(scope="module")
def identical(world: World, references: dict[str, Answer]) -> Checker:
    return Checker(world, references)


@pytest.fixture(scope="module")
def sidecar(world: World) -> Sidecar:
    return world.sidecar()


@pytest.fixture(scope="module")
def engine(world: World, identical: Checker, sidecar: Sidecar) -> Iterator[Engine]:
    engine = world.engine("adapters", sidecar, **OPTIONS)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def second(world: World, engine: Engine, sidecar: Sidecar) -> Iterator[Engine]:
    """The engine after a restart."""
    engine.quiet()
    engine.stop()
    second = world.engine("adapters-again", sidecar, **OPTIONS)
    yield second
    second.stop()


def missed(engine: Engine, identical: Checker, prompts: list[Prompt]) -> None:
    """Nobody's KV is used for these prompts: not vLLM's own, and none of Pillion's. Then Pillion has theirs."""
    for prompt in prompts:
        answer = engine.ask(prompt)
        identical(answer)
        assert (answer.own, answer.loaded) == (0, 0), f"{prompt.name}: whose KV was that?"
    engine.quiet()
    engine.forget()


def test_adapters_change_every_answer_by_a_margin(references: dict[str, Answer], adapters: Adapters) -> None:
    close = {name: answer.gap for name, answer in references.items() if (answer.gap or 0) < MARGIN}
    assert not close, f"take another seed: {close}"
    for prompt in ADAPTED:
        names = [prompt.name, *(prompt.under(one).name for one in (adapters.red, adapters.blue))]
        answers = {tuple(references[name].tokens) for name in names}
        assert len(answers) == len(names), f"{prompt.name}: expected {len(names)} answers, got {answers}"


def test_two_adapters_and_the_base_never_share(
    engine: Engine, identical: Checker, adapters: Adapters
) -> None:
    """The same prompts for each in turn: what the others have saved of them is nothing to it."""
    for prompts in adapters.prompts().values():
        missed(engine, identical, prompts)


def test_each_finds_its_own(engine: Engine, identical: Checker, adapters: Adapters) -> None:
    for prompts in adapters.prompts().values():
        identical.loads(engine, prompts)


def test_all_in_one_step(engine: Engine, identical: Checker, adapters: Adapters) -> None:
    engine.forget()
    everyone = [prompt for prompts in adapters.prompts().values() for prompt in prompts]
    answers = engine.ask_all(everyone)
    identical(*answers)
    assert sum(bool(answer.loaded) for answer in answers) > len(everyone) // 2
    engine.quiet()
    engine.forget()


def test_salts_are_walls(engine: Engine, identical: Checker, adapters: Adapters) -> None:
    """Between tenants with different salts, and between one of them and everybody without."""
    (prompt, adapted) = (ADAPTED[0], ADAPTED[0].under(adapters.red))
    for one in (prompt, adapted):
        missed(engine, identical, [one.salted("east")])
        missed(engine, identical, [one.salted("west")])
        for salted in (one, one.salted("east"), one.salted("west")):
            identical.loads(engine, [salted])
            engine.forget()


def test_adapters_load_after_a_restart(second: Engine, identical: Checker, adapters: Adapters) -> None:
    for prompts in adapters.prompts().values():
        identical.loads(second, prompts)
    second.forget()


def test_walls_stand_after_a_restart(second: Engine, identical: Checker) -> None:
    identical.loads(second, [ADAPTED[0].salted("east")])
    second.forget()
    missed(second, identical, [ADAPTED[0].salted("north")])


def test_other_weights_under_a_known_name_are_another_adapter(
    world: World, second: Engine, identical: Checker, sidecar: Sidecar, adapters: Adapters
) -> None:
    """And at a known path: as when a user trains on, and puts the result where the last one was."""
    identical(*second.ask_all([prompt.under(adapters.rot) for prompt in ADAPTED]))
    second.quiet()
    second.stop()
    place = adapters.rot.path
    shutil.rmtree(place)
    shutil.copytree(adapters.blue.path, place)
    now = {
        prompt.under(adapters.rot).name: identical.references[prompt.under(adapters.blue).name]
        for prompt in ADAPTED
    }
    third = world.engine("adapters-retrained", sidecar, **OPTIONS)
    try:
        missed(third, Checker(world, now), [prompt.under(adapters.rot) for prompt in ADAPTED])
    finally:
        third.stop()
    sidecar.idle()
