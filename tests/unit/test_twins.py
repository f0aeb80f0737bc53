"""Ranks that hold the same part of a block: whose part it is, and that it is stored once among them."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from pillion.vllm import identity
from pillion.vllm.metadata import SavePlan
from pillion.vllm.ranks import Ranks
from pillion.vllm.saves import Saves
from pillion.vllm.worker import own_part


def shards(spec: Any, world: int, heads: int) -> list[str]:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=world),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: heads),
    )
    fields = {"model": "m", "shard": f"1/{identity.shards(config, spec)}"}
    return [identity.of_rank(fields, rank, world)["shard"] for rank in range(world)]


def spec(name: str, **values: Any) -> Any:
    return type(name, (), values)()


@pytest.mark.parametrize(
    ("kind", "heads", "expected"),
    [
        (spec("FullAttentionSpec", num_kv_heads=2), 8, ["1/4", "2/4", "3/4", "4/4"]),
        (spec("FullAttentionSpec", num_kv_heads=1), 4, ["1/4", "2/4", "3/4", "4/4"]),
        (spec("FullAttentionSpec", num_kv_heads=1), 2, ["1/2", "1/2", "2/2", "2/2"]),
        (spec("SlidingWindowSpec", num_kv_heads=1), 1, ["1/1", "1/1", "1/1", "1/1"]),
        (spec("MLAAttentionSpec", num_kv_heads=1), 128, ["1/1", "1/1", "1/1", "1/1"]),
        (spec("MambaSpec", mamba_type="mamba2"), 8, ["1/4", "2/4", "3/4", "4/4"]),
    ],
)
def test_equal_parts_have_one_name(kind: Any, heads: int, expected: list[str]) -> None:
    assert shards(kind, 4, heads) == expected


def test_every_block_belongs_to_exactly_one_of_the_ranks_that_hold_it() -> None:
    hashes = [os.urandom(32) for _ in range(60)]
    before = os.urandom(32)
    plan = SavePlan(
        b"j" * 16,
        b"",
        [(0, b"", 20), (1, before, 30), (0, before, 10)],
        b"".join(hashes),
        list(range(100, 160)),
        1000,
        True,
    )
    parent_of = {
        **{block: hashes[block - 101] if block > 100 else b"" for block in range(100, 120)},
        **{block: hashes[block - 101] if block > 120 else before for block in range(120, 150)},
        **{block: hashes[block - 101] if block > 150 else before for block in range(150, 160)},
    }
    seen: dict[tuple[int, int], int] = {}
    for rank in range(4):
        # Group 0 is the same on two ranks each, group 1 is every rank's own.
        mine = own_part(plan, [(2, rank % 2), (1, 0)])
        assert sum(count for _, _, count in mine.runs) == len(mine.blocks) == len(mine.hashes) // 32
        at = 0
        for group, parent, count in mine.runs:
            for offset in range(count):
                block = mine.blocks[at]
                assert mine.hashes[at * 32 :][:32] == hashes[block - 100]
                if offset == 0:
                    assert parent == parent_of[block]
                seen[(group, block)] = seen.get((group, block), 0) + 1
                at += 1
    assert {block for group, block in seen if group == 0} == {*range(100, 120), *range(150, 160)}
    assert all(times == (2 if group == 0 else 4) for (group, _), times in seen.items())


@pytest.mark.parametrize(
    ("twins", "reads", "shared"),
    [
        (1, [["b", "c"], ["a", "c"], ["a", "b"]], False),
        (3, [["b", "c"], ["a", "c"], ["b", "a", "z"]], True),
        (3, [["b", "c"], ["a"], ["a", "b"]], False),
        (3, [["b", "c"], ["a", "z"], ["a", "b"]], False),
        (3, [[], [], []], False),
    ],
)
def test_a_save_is_shared_only_where_the_others_can_read_it(
    twins: int, reads: list[list[str]], shared: bool
) -> None:
    def of(device: str, neighbours: list[str]) -> Any:
        return SimpleNamespace(device=lambda: device, neighbours=lambda: neighbours)

    client = Ranks([of(device, neighbours) for device, neighbours in zip("abc", reads, strict=True)])
    holds = SimpleNamespace(open=lambda *_: b"j" * 16)
    hits: Any = SimpleNamespace(groups=[SimpleNamespace(kind="full", hashes=1)])
    saves = Saves(client=client, hits=hits, holds=holds, stats=None, deadline_ms=1, twins=twins)  # type: ignore[arg-type]
    state: Any = SimpleNamespace(keys=lambda: [b"h" * 32], request=SimpleNamespace(request_id="r"))
    saves._plan(state, [[7]], [(0, b"", 1)], [(0, 0)], b"s" * 16)
    assert saves.planned[0].shared is shared
