"""Models of other kinds than Llama: sliding windows, states of convolutions, latent attention.

What differs is what an engine keeps of a prompt, not what Pillion promises: the same answers, and after a
restart the whole prompt but its last tokens. All kinds share one sidecar, and with it a chance to be mistaken
for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from e2e.harness import Answer, Engine, Sidecar, until
from e2e.prompts import (
    BLOCK,
    KINDS,
    KINDS_COMMON,
    KINDS_CROWD,
    KINDS_EDGES,
    KINDS_GROWN,
    KINDS_LOAD,
    KINDS_LONG,
    KINDS_SHARED,
    KINDS_SHARING,
    KINDS_TIGHT,
)
from e2e.world import FAMILIES, MARGIN, Checker, World, fill, loaded

STEP_TOKENS = 256
"""Longer prompts are computed in pieces."""
BLOCKS = 120
"""Of the second engine's KV cache: a few requests fill it."""


@dataclass(frozen=True)
class Kind:
    family: str
    block: int
    hybrid: bool
    """vLLM keeps windows and states only at the end of a prompt, and where it has seen two prompts part."""

    @property
    def options(self) -> dict[str, Any]:
        return {"block_size": self.block}


KINDS_OF_MODELS = {
    "gemma3": Kind("gemma3", BLOCK, hybrid=True),
    "lfm2": Kind("lfm2", BLOCK, hybrid=True),
    "deepseek2": Kind("deepseek2", 16, hybrid=False),  # vLLM's CPU kernel for MLA knows no other block
}
assert set(KINDS_OF_MODELS) == set(FAMILIES)


@pytest.fixture(scope="module", params=FAMILIES)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS_OF_MODELS[request.param]


@pytest.fixture(scope="module")
def references(world: World, kind: Kind) -> dict[str, Answer]:
    """What plain vLLM answers."""
    return world.reference(kind.family, KINDS_PROMPTS, **kind.options)


KINDS_PROMPTS = [prompt for name, prompt in KINDS.items() if name.startswith("kinds-")]


@pytest.fixture(scope="module")
def identical(world: World, kind: Kind, references: dict[str, Answer]) -> Checker:
    return Checker(world, references, kind.block)


@pytest.fixture(scope="module")
def sidecar(world: World) -> Sidecar:
    return world.sidecar()


@pytest.fixture(scope="module")
def engine(world: World, kind: Kind, identical: Checker, sidecar: Sidecar) -> Iterator[Engine]:
    engine = world.engine(
        f"{kind.family}-first",
        sidecar,
        which=kind.family,
        max_num_batched_tokens=STEP_TOKENS,
        **kind.options,
    )
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def second(
    world: World, kind: Kind, identical: Checker, engine: Engine, sidecar: Sidecar
) -> Iterator[Engine]:
    """The engine after a restart, with a KV cache so small that requests are preempted."""
    engine.quiet()
    engine.stop()
    second = world.engine(
        f"{kind.family}-second",
        sidecar,
        which=kind.family,
        max_num_batched_tokens=STEP_TOKENS,
        max_model_len=1024,
        num_gpu_blocks_override=BLOCKS,
        extra={"max_hold_fraction": 0.5},
        **kind.options,
    )
    yield second
    second.stop()


def test_every_choice_of_the_reference_has_a_margin(references: dict[str, Answer]) -> None:
    close = {name: answer.gap for name, answer in references.items() if (answer.gap or 0) < MARGIN}
    assert not close, f"take another seed: {close}"


def test_a_fresh_engine_answers_the_same_and_saves(
    engine: Engine, identical: Checker, sidecar: Sidecar
) -> None:
    before = sidecar.status()["pool"]["records"]
    answers = engine.ask_all(KINDS_LONG)
    identical(*answers)
    assert loaded(answers) == [0] * len(KINDS_LONG)
    engine.quiet()
    full_attention = sum(len(prompt.tokens) // identical.block for prompt in KINDS_LONG)
    assert sidecar.status()["pool"]["records"] - before >= full_attention


def test_what_vllm_itself_has_is_not_loaded(engine: Engine, identical: Checker) -> None:
    for prompt in KINDS_LONG:
        answer = engine.ask(prompt)
        identical(answer)
        assert (answer.own, answer.loaded) == (prompt.usable_in(identical.block), 0)


def test_whole_prompts_are_loaded(engine: Engine, identical: Checker) -> None:
    engine.forget()
    identical.loads(engine, KINDS_LONG)


def test_lengths_around_the_edges_of_blocks_and_windows(engine: Engine, identical: Checker) -> None:
    identical(*fill(engine, KINDS_EDGES))
    identical.loads(engine, KINDS_EDGES)


def test_a_shared_prefix_is_loaded_for_prompts_that_nobody_asked_before(
    engine: Engine, identical: Checker, kind: Kind
) -> None:
    """Of a hybrid, the second prompt shows where the two part; what is needed there exists from then on."""
    first, second, *later = KINDS_SHARING
    for prompt in (first, second) if kind.hybrid else (first,):
        identical(engine.ask(prompt))
        engine.quiet()
    engine.forget()
    for prompt in later:
        identical.loads(engine, [prompt], len(KINDS_SHARED))
        engine.quiet()
        engine.forget()
    identical.loads(engine, later)


def test_vllms_own_prefix_and_ours_go_together(engine: Engine, identical: Checker) -> None:
    for prompt in KINDS_GROWN:
        identical(engine.ask(prompt))
    engine.quiet()
    engine.forget()
    identical.loads(engine, KINDS_GROWN[:1])
    (answer,) = identical.loads(engine, KINDS_GROWN[1:])
    # A hybrid may have kept nothing at the fork; and a busy machine makes a second attempt necessary.
    assert answer.own in (len(KINDS_COMMON), 0)


def test_many_at_once(engine: Engine, identical: Checker) -> None:
    identical(*fill(engine, KINDS_CROWD))
    answers = engine.ask_all(KINDS_CROWD)
    identical(*answers)
    hits = sum(1 for answer in answers if answer.loaded)
    print(f"{hits} of {len(KINDS_CROWD)} loaded {sum(loaded(answers))} tokens")
    # Together they want more blocks than may be held at a time, so that some may go by.
    assert hits > len(KINDS_CROWD) // 4


def test_a_restarted_engine_loads_what_the_last_one_saved(second: Engine, identical: Checker) -> None:
    identical.loads(second, KINDS_LONG)


def test_preempted_requests_answer_the_same(second: Engine, identical: Checker) -> None:
    before = second.stats()["preemptions"]
    for _ in range(2):
        # Whatever is there of them in the second round: the same answers.
        answers = second.ask_all(KINDS_TIGHT)
        identical(*answers)
    assert sum(loaded(answers)) > 0
    preempted = second.stats()["preemptions"] - before
    print(f"{preempted} preemptions, {sum(map(bool, loaded(answers)))} requests loaded")
    assert preempted > 0, "expected a KV cache this small to preempt"


def attached_since(engine: Engine, before: int) -> bool:
    return bool(engine.counters()["attaches"] > before)


def test_a_sidecar_is_killed_under_load(second: Engine, identical: Checker, sidecar: Sidecar) -> None:
    """Once while it saves, once while it loads."""
    for _ in range(2):
        before = second.counters()["attaches"]
        pending = [second.submit(prompt) for prompt in KINDS_LOAD]
        assert pending[0].first.wait(60)
        sidecar.kill_worker()
        identical(*[one.answer() for one in pending])
        until(partial(attached_since, second, before), second.explain)
        until(lambda: second.counters()["ready"], second.explain)
        second.quiet()
        second.forget()
        identical(*second.ask_all(KINDS_LOAD))
        second.quiet()
        second.forget()
    identical.loads(second, KINDS_LOAD[:4])


def test_nothing_is_left_when_the_engine_has_gone(second: Engine, sidecar: Sidecar) -> None:
    stats = second.stats()
    print({name: count for name, count in stats.items() if count})
    second.stop()
    report = sidecar.idle()
    assert report["faults"] == dict.fromkeys(report["faults"], 0), report["faults"]
    assert stats.get("errors", 0) == 0
