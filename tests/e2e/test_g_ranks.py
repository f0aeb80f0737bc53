"""Two tensor-parallel ranks, each with a sidecar of its own: what counts is what both have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from e2e.harness import Engine, Sidecar, until
from e2e.prompts import KINDS_LONG, LONG, OTHERS, SHARED, SHARING, TIGHT, Prompt
from e2e.world import ATTEMPTS, Checker, World, fill

PROMPTS = LONG[:4]
SMALL: dict[str, Any] = {
    # So small that requests are preempted.
    "num_gpu_blocks_override": 72,
    "max_model_len": 1024,
    "extra": {"max_hold_fraction": 0.5},
}


@pytest.fixture(scope="module")
def identical(world: World) -> Checker:
    """Against plain vLLM with two ranks: their sums have another order than one's."""
    asked = [*PROMPTS, *SHARING, *TIGHT]
    return Checker(world, world.reference(prompts=asked, tensor_parallel_size=2))


@pytest.fixture(scope="module")
def sidecars(world: World) -> Iterator[list[Sidecar]]:
    first = world.sidecar()
    pair = [first, first.sibling("cpu1")]
    yield pair
    pair[1].close()


@pytest.fixture(scope="module")
def engine(world: World, identical: Checker, sidecars: list[Sidecar]) -> Iterator[Engine]:
    engine = world.engine("ranks", sidecars[0], tensor_parallel_size=2)
    yield engine
    engine.stop()


def test_two_ranks_save_each_their_part(engine: Engine, identical: Checker, sidecars: list[Sidecar]) -> None:
    answers = engine.ask_all(PROMPTS)
    identical(*answers)
    assert [answer.loaded for answer in answers] == [0] * len(PROMPTS)
    engine.quiet()
    records = [sidecar.status()["pool"]["records"] for sidecar in sidecars]
    assert records[0] == records[1] >= sum(prompt.blocks for prompt in PROMPTS)
    for sidecar in sidecars:
        roles = sorted(session["role"] for session in sidecar.sessions())
        engine_roles = [role for role in roles if role != "neighbour"]
        assert engine_roles == ["scheduler", "worker"], f"{sidecar.device}: {roles}"


def test_two_ranks_load_each_their_part(engine: Engine, identical: Checker) -> None:
    engine.forget()
    identical.loads(engine, PROMPTS)


def test_two_ranks_load_a_shared_prefix(engine: Engine, identical: Checker) -> None:
    engine.forget()
    identical(*fill(engine, SHARING[:1]))
    identical.loads(engine, SHARING[1:2], len(SHARED))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_ranks_sidecar_dies_under_load(
    engine: Engine, identical: Checker, sidecars: list[Sidecar], rank: int
) -> None:
    """Whatever was under way: the same answers. What one rank lost is a miss for both, and saved again."""
    engine.forget()
    before = engine.counters()["attaches"]
    pending = [engine.submit(prompt) for prompt in PROMPTS]
    pending[0].first.wait(60)
    sidecars[rank].kill_worker()
    identical(*[one.answer() for one in pending])
    until(lambda: engine.counters()["attaches"] > before, engine.explain)
    until(lambda: engine.counters()["ready"], engine.explain)
    engine.quiet()
    engine.forget()
    identical(*engine.ask_all(PROMPTS))
    engine.quiet()
    engine.forget()
    identical.loads(engine, PROMPTS)


def test_a_restarted_engine_with_two_ranks_hits_and_is_preempted(
    world: World, engine: Engine, identical: Checker, sidecars: list[Sidecar]
) -> None:
    engine.quiet()
    engine.stop()
    second = world.engine("ranks-again", sidecars[0], tensor_parallel_size=2, **SMALL)
    identical.loads(second, PROMPTS)
    second.forget()
    identical(*second.ask_all(TIGHT))
    assert second.stats()["preemptions"] > 0
    second.quiet()
    second.stop()


def loads_of_another_size(world: World, engine: Engine, check: Checker, prompts: list[Prompt]) -> None:
    """What nobody of the engine's size has stored is loaded at the first try, as far as the machine lets it."""
    answers = engine.ask_all(prompts)
    check(*answers)
    loaded = [answer.loaded for answer in answers]
    world.misses += sum(not tokens for tokens in loaded)
    wrong = [
        tokens for tokens, prompt in zip(loaded, prompts, strict=True) if tokens not in (0, prompt.usable)
    ]
    assert any(loaded) and not wrong, (
        f"{loaded} of {[prompt.usable for prompt in prompts]}: {engine.explain()}"
    )
    engine.quiet()


def test_one_rank_loads_what_two_have_saved_and_two_what_one_has(
    world: World, sidecars: list[Sidecar], engine: Engine
) -> None:
    """A page on the CPU is opaque to us head by head, and a rank's heads are whole pages of them."""
    single = world.engine("one-rank", sidecars[0])
    check = Checker(world, world.reference())
    loads_of_another_size(world, single, check, PROMPTS)
    # Stored in its own form, too.
    single.forget()
    check.loads(single, PROMPTS)
    check(*single.ask_all(OTHERS))
    single.quiet()
    single.stop()
    pair = world.engine("two-ranks", sidecars[0], tensor_parallel_size=2)
    check = Checker(world, world.reference(prompts=OTHERS, tensor_parallel_size=2))
    loads_of_another_size(world, pair, check, OTHERS)
    pair.stop()


def test_equal_parts_are_stored_once_and_loaded_by_both_ranks(world: World) -> None:
    """Latent attention: every rank holds all of every block. Each sidecar stores some and lends them to the other."""
    first = world.sidecar()
    pair = [first, first.sibling("cpu1")]
    options: dict[str, Any] = {"which": "deepseek2", "block_size": 16, "tensor_parallel_size": 2}
    prompts = KINDS_LONG
    references = world.reference("deepseek2", prompts, block_size=16, tensor_parallel_size=2)
    identical = Checker(world, references, 16)
    engine = world.engine("latent", first, **options)
    until(lambda: all(len(one.status()["neighbours"]) == 1 for one in pair), engine.explain)
    identical(*engine.ask_all(prompts))
    engine.quiet()
    stored = [sidecar.status()["pool"]["records"] for sidecar in pair]
    # Also the tokens that were generated fill blocks.
    once = sum(prompt.usable_in(16) // 16 for prompt in prompts)
    assert min(stored) > 0 and once <= sum(stored) < 1.5 * once, f"{stored} of about {once}"
    engine.stop()
    again = world.engine("latent-again", first, **options)
    identical.loads(again, prompts)
    lent = [sidecar.status()["neighbour_blocks"]["lent"] for sidecar in pair]
    assert min(lent) > 0, f"each rank needs what the other's sidecar stores: {lent}"
    again.stop()
    pair[1].close()


def test_data_parallel_replicas_share_what_either_has_saved(world: World, sidecars: list[Sidecar]) -> None:
    """Two engine cores with a worker each, on one sidecar. Which of them answers is vLLM's choice."""
    reference = Checker(world, world.reference())
    first = world.engine("replicas", sidecars[0], data_parallel_size=2)
    reference(*first.ask_all([*PROMPTS, SHARING[0]]))
    first.quiet()
    engines = {session["engine_id"] for session in sidecars[0].sessions() if session["role"] == "worker"}
    assert len(engines) == 2, engines
    first.stop()
    second = world.engine("replicas-again", sidecars[0], data_parallel_size=2, **SMALL)
    usable = [prompt.usable for prompt in PROMPTS] * 2
    for attempt in range(ATTEMPTS):
        # Each prompt twice at once, so that both replicas get some of them.
        answers = second.ask_all([*PROMPTS, *PROMPTS])
        reference(*answers)
        found = [answer.own + answer.loaded for answer in answers]
        if found == usable:
            break
        # On a machine this busy a miss is right.
        world.misses += 1
        assert attempt + 1 < ATTEMPTS, f"expected hits of {usable} tokens, got {found}"
        second.quiet()
        second.forget()
    assert sum(answer.loaded for answer in answers) > 0
    second.quiet()
    second.forget()
    answers = second.ask_all(SHARING[1:])
    reference(*answers)
    assert {answer.own + answer.loaded for answer in answers} <= {0, len(SHARED)}, "a prefix, or a miss"
    assert sum(answer.loaded for answer in answers) > 0
    # Both are preempted while their sidecar dies.
    pending = [second.submit(prompt) for prompt in [*TIGHT, *TIGHT]]
    pending[0].first.wait(60)
    sidecars[0].kill_worker()
    reference(*[one.answer() for one in pending])
    assert second.stats()["preemptions"] > 0
    second.stop()
