"""Random requests, aborts, resets and faults on vLLM's real Scheduler: outputs never change, nothing leaks."""

import random
from pathlib import Path

import pytest

from unit.fake_native import FakeNative
from unit.vllm_harness import BLOCK, Engine, expected, prompt

STEPS = 250


def disturb(rng: random.Random, engine: Engine, live: dict[str, tuple[list[int], int]]) -> None:
    """One random event: a request, an abort, a fault of the sidecar, or its end."""
    event = rng.random()
    if event >= 0.29:
        break_something(rng, engine, event)
    elif event < 0.25:
        begin(rng, engine, live)
    elif live:
        name = rng.choice(sorted(live))
        del live[name]
        engine.abort(name)
    if rng.random() < 0.3:
        engine.native.late_write([f"late {engine.steps}"] * BLOCK)


def begin(rng: random.Random, engine: Engine, live: dict[str, tuple[list[int], int]]) -> None:
    """A request that shares a prefix with some others."""
    if len(live) < 12:
        tokens = prompt(90, rng.randint(0, 3))[: rng.randint(1, 90)] + prompt(rng.randint(1, 40), 9)
        name, count = f"r{engine.steps}", rng.randint(1, 40)
        live[name] = (tokens, count)
        engine.add(name, tokens, count)


def break_something(rng: random.Random, engine: Engine, event: float) -> None:
    """A fault of the sidecar, its end, or a reset of a cache."""
    native = engine.native
    if event < 0.36:
        native.load_outcome = rng.choice([1, 1, 2, 3, None])
        native.quiesce_loads = rng.random() < 0.6
    elif event < 0.40:
        native.save_outcome = rng.choice([1, 1, 1, 2, 3])
        native.quiesce_saves = rng.random() < 0.7
    elif event < 0.45:
        native.load_polls, native.save_polls = rng.randint(1, 5), rng.randint(1, 8)
        native.grant_after_polls = rng.choice([0, 0, 1, 3, 10**9])
    elif event < 0.48:
        native.attached = rng.random() < 0.6
    elif event < 0.49:
        native.store.clear()
    elif event < 0.50:
        engine.scheduler.reset_prefix_cache(reset_connector=True)
    elif event < 0.60:
        # As if other requests had pushed everything out: what comes next must be loaded.
        cached = engine.pool.cached_block_hash_to_block
        engine.pool.evict_blocks(
            {block.block_id for block in engine.pool.blocks if block.block_hash is not None}
        )
        assert len(cached) == 0


def finish(engine: Engine, live: dict[str, tuple[list[int], int]]) -> None:
    """Everything works again, and what is still running comes to the right end."""
    for native in engine.natives:
        native.attached, native.load_outcome, native.save_outcome = True, 1, 1
        native.grant_after_polls = 0
        native.quiesce_all()
    engine.run(steps=100_000)
    for name, (tokens, count) in live.items():
        assert engine.outputs[name] == expected(tokens, count), name
    assert engine.held_most <= engine.half.holds.limit
    engine.assert_clean()


@pytest.mark.parametrize("seed", range(12))
def test_outputs_never_change_and_nothing_leaks(
    native: FakeNative, tmp_path: Path, overlap: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pillion.vllm.worker.OVERDUE_S", 0.0)
    rng = random.Random(seed)
    engine = Engine(
        native,
        tmp_path / "model",
        overlap=overlap,
        num_blocks=rng.choice([30, 60, 200]),
        max_batched=rng.choice([32, 256]),
        extra={"lookup_deadline_ms": 5, "load_deadline_ms": 10, "max_hold_fraction": 0.3},
    )
    live: dict[str, tuple[list[int], int]] = {}
    for _ in range(STEPS):
        disturb(rng, engine, live)
        engine.step()
    finish(engine, live)
