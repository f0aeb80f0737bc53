"""Drafters with layers in the KV cache: the same answers, and drafts that are as good after a load as before."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.harness import Engine
from e2e.prompts import BLOCK, CLEARED, PAUSED, Prompt
from e2e.world import Checker, World, fill

PROMPTS = [*PAUSED, *CLEARED]
DRAFTS = 3


@pytest.fixture(scope="module")
def identical(world: World) -> Checker:
    """Against plain vLLM without a drafter: what it drafts changes no answer."""
    return Checker(world, world.reference(prompts=PROMPTS))


def accepted(engine: Engine, prompts: list[Prompt], check: Checker) -> float:
    """The share of drafts that were right, over some prompts."""
    before = engine.stats()
    check(*engine.ask_all(prompts))
    after = engine.stats()
    drafted = after["drafted"] - before["drafted"]
    assert drafted > 0, f"nothing was drafted: {engine.explain()}"
    return (after["accepted"] - before["accepted"]) / drafted


def drafting(world: World, method: str) -> Engine:
    model = world.model()
    drafter = world.models.eagle(model) if method == "eagle" else model
    options: dict[str, Any] = {"method": method, "model": str(drafter), "num_speculative_tokens": DRAFTS}
    return world.engine(method, world.sidecar(), speculative_config=options)


def test_with_eagle_a_hit_ends_a_block_before_what_is_known(world: World, identical: Checker) -> None:
    """Its own layers' KV of a block's last token is that of whoever came first: vLLM computes that block again."""
    engine = drafting(world, "eagle")
    identical(*fill(engine, PROMPTS))
    for prompt in PROMPTS:
        identical.loads(engine, [prompt], tokens=(len(prompt.tokens) // BLOCK - 1) * BLOCK)
    engine.forget()
    identical(*engine.ask_all(PROMPTS))
    assert engine.stats()["drafted"] > 0
    engine.stop()


def test_a_drafter_that_is_always_right_is_so_after_a_load(world: World, identical: Checker) -> None:
    """The model drafts for itself. With other bytes in the drafter's layers it would guess wrong."""
    engine = drafting(world, "draft_model")
    computed = accepted(engine, PROMPTS, identical)
    engine.quiet()
    engine.forget()
    identical.loads(engine, PROMPTS)
    engine.forget()
    loaded = accepted(engine, PROMPTS, identical)
    print(f"drafts that were right: {computed:.3f} computed, {loaded:.3f} loaded")
    assert computed > 0.95 and loaded > 0.95
    engine.stop()
