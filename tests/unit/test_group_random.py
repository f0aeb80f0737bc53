"""Random requests, aborts, resets and faults over several KV cache groups, and the search against a slow one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pillion.vllm.hits import FULL, STATE, WINDOW, Group, Hits
from pillion.vllm.ranks import Ranks
from unit.fake_native import FakeNative, FakeRanks
from unit.test_group_flow import MODELS
from unit.test_scheduler_random import disturb, finish
from unit.vllm_harness import Engine

STEPS = 200


def walk(natives: Any, tmp_path: Path, seed: int, sparse: bool = True, **options: Any) -> None:
    rng = random.Random(seed)
    engine = Engine(
        natives,
        tmp_path / "model",
        max_batched=rng.choice([32, 64, 256]),
        retention=rng.choice([None, 0, 32]) if sparse else None,
        extra={"lookup_deadline_ms": 5, "load_deadline_ms": 10, "max_hold_fraction": 0.3},
        **options,
    )
    live: dict[str, tuple[list[int], int]] = {}
    for _ in range(STEPS):
        engine.native = rng.choice(engine.natives)
        disturb(rng, engine, live)
        if rng.random() < 0.1:
            group = rng.randrange(len(engine.groups))
            engine.native.lease_short[group] = [rng.randint(0, 3)]
        engine.step()
    finish(engine, live)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pillion.vllm.worker.OVERDUE_S", 0.0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(2))
def test_outputs_never_change_and_nothing_leaks(
    native: FakeNative, tmp_path: Path, overlap: bool, name: str, seed: int
) -> None:
    blocks = random.Random(seed).choice([60, 110, 300])
    sparse = name != "mla"  # a model without windows and states has nothing to leave out
    walk(native, tmp_path, seed, sparse, overlap=overlap, groups=MODELS[name], num_blocks=blocks)


@pytest.mark.parametrize("name", ["gemma", "mixed", "mla"])
@pytest.mark.parametrize("seed", range(2))
def test_with_drafts(native: FakeNative, tmp_path: Path, overlap: bool, name: str, seed: int) -> None:
    walk(
        native,
        tmp_path,
        100 + seed,
        name != "mla",
        overlap=overlap,
        groups=MODELS[name],
        num_blocks=110,
        drafts=3,
    )


@pytest.mark.parametrize("name", ["gemma", "jamba"])
@pytest.mark.parametrize("seed", range(2))
def test_over_ranks(tmp_path: Path, overlap: bool, name: str, seed: int) -> None:
    walk(FakeRanks(4), tmp_path, 200 + seed, overlap=overlap, groups=MODELS[name], num_blocks=110)


# ---- the search


def slow(hits: Hits, stores: list[FakeNative], keys: list[bytes], limit: int, lacking: set[Any]) -> int:
    """The longest hit by trying all of them."""
    for tokens in range(limit // hits.align * hits.align, 0, -hits.align):
        if all(
            (index, block) not in lacking
            and all(
                (store.space(index), hits.keys(keys, index, block, block + 1)[0]) in store.store
                for store in stores
            )
            for index, first, end in hits.runs(tokens)
            for block in range(first, end)
        ):
            return tokens
    return 0


@pytest.mark.parametrize("seed", range(200))
def test_the_search_finds_the_longest_hit(seed: int) -> None:
    rng = random.Random(seed)
    groups = []
    for _ in range(rng.randint(1, 4)):
        size = rng.choice([16, 32, 48])
        kind = rng.choice([FULL, WINDOW, STATE])
        groups.append(Group(kind, size, size // 16, window_blocks=rng.randint(1, 5) if kind == WINDOW else 0))
    hits = Hits(groups, 16)
    keys = [rng.randbytes(32) for _ in range(rng.randint(1, 40))]
    stores = [FakeNative(groups=len(groups)) for _ in range(rng.randint(1, 2))]
    density = rng.choice([0.5, 0.9, 0.98])
    for store in stores:
        for index, group in enumerate(groups):
            for block in range(len(keys) // group.hashes):
                if rng.random() < density:
                    store.store[store.space(index), hits.keys(keys, index, block, block + 1)[0]] = [0]
    namespaces: list[dict[str, str]] = [{} for _ in groups]
    clients = [store.SchedulerClient(namespaces=namespaces) for store in stores]
    client = clients[0] if len(clients) == 1 else Ranks(clients)
    limit = hits.usable(rng.randint(1, 41 * 16), len(keys))
    lacking = {(rng.randrange(len(groups)), rng.randrange(40)) for _ in range(rng.randint(0, 2))}
    found = hits.longest(client, keys, limit, lacking)
    assert found == slow(hits, stores, keys, limit, lacking)


@pytest.mark.parametrize("seed", range(100))
def test_a_hit_for_the_room_there_is(seed: int) -> None:
    rng = random.Random(seed)
    groups = [
        Group(rng.choice([FULL, WINDOW, STATE]), rng.choice([16, 32]), window_blocks=rng.randint(1, 5))
        for _ in range(rng.randint(1, 4))
    ]
    hits = Hits(groups, 16)
    local = hits.align * rng.randint(0, 5)
    tokens = local + hits.align * rng.randint(1, 20)
    room = rng.randint(-3, 60)
    fits = [
        shorter
        for shorter in range(local + hits.align, tokens + 1, hits.align)
        if hits.blocks(shorter, local) <= room
    ]
    assert hits.shorter(tokens, local, room) == max(fits, default=local)
