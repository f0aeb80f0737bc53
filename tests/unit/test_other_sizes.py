"""Blocks that engines of other tensor-parallel sizes stored: which shards a rank looks for, and how they become a load.

The model has 24 heads, and a block's content on a rank is, position by position, a value for each head that the rank
holds. A load cuts what it needs out of every record, as the sidecar does.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pillion.vllm import shards
from unit import vllm_harness
from unit.fake_native import FAILED, FakeJob, FakeNative, FakeRanks, FakeScheduler
from unit.test_scheduler_flow import ask, fill
from unit.vllm_groups import KvGroup
from unit.vllm_harness import BLOCK, Engine, expected, prompt

HEADS = 24
SIZES = (1, 2, 4, 8)
Store = dict[tuple[bytes, bytes], Any]


def heads_of(shard: str) -> range:
    """The heads in a namespace's shard."""
    index, count = map(int, shard.split("/"))
    return range((index - 1) * HEADS // count, index * HEADS // count)


@dataclass
class OneOf(FakeNative):
    """A rank's sidecar. Namespaces are what their fields say, so that engines of different sizes share a store."""

    names: list[dict[str, str]] = field(default_factory=list)
    loaded_records: dict[bytes, int] = field(default_factory=dict)

    def SchedulerClient(self, **options: Any) -> FakeScheduler:
        self.names = options["namespaces"]
        return super().SchedulerClient(**options)

    def space(self, group: int) -> bytes:
        text = repr((self.epoch, sorted(self.names[group].items())))
        return hashlib.sha256(text.encode()).digest()[:16]

    def check_blocks(self, job: FakeJob) -> None:
        """Puts every block of a load together from its records, which must have all heads and nothing useless."""
        own = heads_of(self.names[0]["shard"])
        held = {self.space(index): heads_of(names["shard"]) for index, names in enumerate(self.names)}
        if not job.load:
            assert {held[space] for space, _ in job.keys} == {own}
            return super().check_blocks(job)
        parts: dict[int, list[tuple[range, Any]]] = defaultdict(list)
        for (space, _), block, content in zip(job.keys, job.blocks, job.contents, strict=True):
            parts[block].append((held[space], content))
        job.blocks, job.contents = [], []
        for block, records in parts.items():
            records.sort(key=lambda record: record[0].start)
            assert [head for heads, _ in records for head in heads if head in own] == list(own)
            assert all(set(heads) & set(own) for heads, _ in records), "a record that is of no use"
            job.blocks.append(block)
            found = [content for _, content in records]
            job.contents.append(
                [
                    tuple(
                        value
                        for (heads, _), values in zip(records, position, strict=True)
                        for head, value in zip(heads, values, strict=True)
                        if head in own
                    )
                    for position in zip(*found, strict=True)
                ]
                if None not in found
                else None
            )
        self.loaded_records[job.job] = sum(map(len, parts.values()))
        return None

    def _move(self, job: FakeJob) -> int:
        moved = super()._move(job)
        return self.loaded_records.pop(job.job, moved)


class Node(FakeRanks):
    """The sidecars of an engine's ranks on one node, which lend to each other."""

    def __init__(self, world: int, store: Store) -> None:
        self.sidecars = [OneOf(store=store) for _ in range(world)]
        self.ranks = [*self.sidecars]


class Build:
    """Engines of any size over one model."""

    def __init__(self, tmp_path: Path, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.overlap, self.patch = tmp_path / "model", overlap, monkeypatch
        self.store: Store = {}

    def _sized(self, world: int, kinds: tuple[KvGroup, ...]) -> dict[str, Any]:
        each = HEADS // world

        def salted(value: int, rank: int, group: int) -> tuple[int, ...]:
            return tuple(hash((value, group, head)) for head in range(rank * each, (rank + 1) * each))

        self.patch.setattr(vllm_harness, "salted", salted)
        groups = tuple(KvGroup(kind.kind, kind.block, kind.window, each) for kind in kinds)
        return {"overlap": self.overlap, "groups": groups}

    def filled(self, world: int, *prompts: list[int], kinds: tuple[KvGroup, ...] = (KvGroup(),)) -> None:
        """An engine of so many ranks stores these."""
        fill(Node(world, self.store), self.place, list(prompts), **self._sized(world, kinds))  # type: ignore[arg-type]

    def engine(
        self, world: int, kinds: tuple[KvGroup, ...] = (KvGroup(),), **options: Any
    ) -> tuple[Node, Engine]:
        node = Node(world, self.store)
        return node, Engine(node, self.place, **self._sized(world, kinds), **options)


@pytest.fixture
def build(tmp_path: Path, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> Build:
    return Build(tmp_path, overlap, monkeypatch)


@pytest.mark.parametrize("ours", SIZES)
@pytest.mark.parametrize("theirs", SIZES)
def test_an_engine_of_another_size_hits(build: Build, theirs: int, ours: int) -> None:
    tokens = prompt(100)
    build.filled(theirs, tokens)
    assert len(build.store) == theirs * (100 // BLOCK)
    _, reader = build.engine(ours)
    assert ask(reader, "a", tokens) == 96 and reader.computed["a"] < 8
    assert reader.stats["hits"] == 1
    assert reader.stats.get("hits_of_other_tp", 0) == (ours != theirs)
    # It is stored in the new form, too, and found there from now on.
    assert len(build.store) == (theirs + (ours if ours != theirs else 0)) * (100 // BLOCK)
    assert reader.scheduler.reset_prefix_cache()
    assert ask(reader, "b", tokens) == 96
    assert reader.stats.get("hits_of_other_tp", 0) == (ours != theirs)
    reader.assert_clean()


@pytest.mark.parametrize(("theirs", "ours"), [(1, 2), (4, 2), (2, 4)])
def test_windows_and_full_attention_are_loaded_together(build: Build, theirs: int, ours: int) -> None:
    kinds = (KvGroup("full"), KvGroup("window", window=40))
    tokens = prompt(150)
    build.filled(theirs, tokens, kinds=kinds)
    node, reader = build.engine(ours, kinds)
    assert ask(reader, "a", tokens) == 144 and reader.stats["hits_of_other_tp"] == 1
    reader.assert_clean()
    assert all(not native.unreleased() for native in node.ranks)


def test_the_longest_of_all_forms_is_loaded(build: Build) -> None:
    tokens = prompt(100)
    for world, length in ((1, 36), (4, 68), (2, 52)):
        build.filled(world, tokens[:length])
    node, reader = build.engine(2)
    assert ask(reader, "a", tokens) == 64 and reader.stats["hits_of_other_tp"] == 1
    assert reader.scheduler.reset_prefix_cache()
    # What was loaded was saved, and the rest with it.
    assert ask(reader, "b", tokens) == 96 and reader.stats["hits_of_other_tp"] == 1
    reader.assert_clean()
    assert all(not native.unreleased() for native in node.ranks)


def test_our_own_form_is_loaded_where_it_has_as_much(build: Build) -> None:
    tokens = prompt(100)
    for world in (1, 2, 4):
        build.filled(world, tokens)
    _, reader = build.engine(2)
    assert ask(reader, "a", tokens) == 96 and "hits_of_other_tp" not in reader.stats
    reader.assert_clean()


def test_one_shard_that_is_missing_shortens_the_hit(build: Build) -> None:
    tokens = prompt(100)
    build.filled(4, tokens)
    last = list(dict.fromkeys(space for space, _ in build.store))[-1]
    for key in [key for key in build.store if key[0] == last][2:]:
        del build.store[key]
    _, reader = build.engine(2)
    assert ask(reader, "a", tokens) == 32
    reader.assert_clean()


def test_a_failed_load_is_recomputed_and_saved(build: Build) -> None:
    tokens = prompt(100)
    build.filled(1, tokens)
    node, reader = build.engine(4)
    node.ranks[2].load_outcome = FAILED
    assert ask(reader, "a", tokens) == 0 and reader.stats["load_failures"] == 1
    assert reader.outputs["a"] == expected(tokens, 4)
    assert len(build.store) == 5 * (100 // BLOCK)
    reader.assert_clean()


def test_a_lease_that_one_part_is_not_granted_is_a_shorter_hit(build: Build) -> None:
    tokens = prompt(100)
    build.filled(4, tokens)
    node, reader = build.engine(2)
    # The second part of what the second rank needs: its group is the last of these.
    native = node.sidecars[1]
    part = next(index for index, names in enumerate(native.names) if names["shard"] == "4/4")
    native.lease_short[part] = [3]
    assert ask(reader, "a", tokens) == 48
    reader.assert_clean()
    assert all(not native.unreleased() for native in node.ranks)


def test_after_a_reset_there_is_only_our_own_form(build: Build) -> None:
    tokens = prompt(100)
    build.filled(1, tokens)
    node, reader = build.engine(2)
    assert ask(reader, "a", tokens) == 96
    assert reader.scheduler.reset_prefix_cache(reset_connector=True)
    assert ask(reader, "b", tokens) == 0
    assert [native.groups for native in node.sidecars] == [1, 1]
    assert reader.scheduler.reset_prefix_cache()
    assert ask(reader, "c", tokens) == 96 and reader.stats["hits_of_other_tp"] == 1
    reader.assert_clean()


def test_it_can_be_switched_off(build: Build) -> None:
    tokens = prompt(100)
    build.filled(2, tokens)
    node, reader = build.engine(1, extra={"other_tp_sizes": False})
    assert ask(reader, "a", tokens) == 0
    assert [len(native.names) for native in node.sidecars] == [1]
    reader.assert_clean()


# ---- forms


def forms_of(rank: int, world: int, kinds: list[int | None]) -> shards.Forms:
    """Groups of so many heads; 0 for latents, None for states."""

    def group(heads: int | None) -> Any:
        if heads is None:
            spec = type("MambaSpec", (), {"mamba_type": "mamba2"})()
        elif heads == 0:
            spec = type("MLAAttentionSpec", (), {"num_kv_heads": 1})()
        else:
            spec = type("FullAttentionSpec", (), {"num_kv_heads": max(1, heads // world)})()
        return SimpleNamespace(kv_cache_spec=spec)

    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=world),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: next((h for h in kinds if h), 1)),
        speculative_config=None,
    )
    return shards.forms(config, SimpleNamespace(kv_cache_groups=list(map(group, kinds))), rank, world)


def shards_of(forms: shards.Forms, form: int) -> list[tuple[int, int, int]]:
    """Of its first group."""
    parts = [part - forms.groups for part in forms.parts(form * forms.groups)]
    return [(*forms.others[part],) for part in parts if part >= 0]


def test_uneven_shards_go_to_the_ranks_that_need_them() -> None:
    """Three ranks' records for four: two of these need one shard, two need two."""
    found = [forms_of(rank, 4, [12]) for rank in range(4)]
    form = next(form for form in range(len(found[0])) if (0, 0, 3) in shards_of(found[0], form))
    wanted = [shards_of(each, form) for each in found]
    assert wanted == [[(0, 0, 3)], [(0, 0, 3), (0, 1, 3)], [(0, 1, 3), (0, 2, 3)], [(0, 2, 3)]]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12, 16])
@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 12, 16, 24])
def test_every_form_holds_all_heads_of_a_rank(world: int, heads: int) -> None:
    if heads % world and world % heads:
        return
    count = min(world, heads)
    sizes = {ranks for ranks in range(1, 17) if heads % ranks == 0 or ranks % heads == 0}
    for rank in range(world):
        found = forms_of(rank, world, [heads])
        assert len(found) == len({min(ranks, heads) for ranks in sizes} | {count})
        mine = rank // (world // count)
        own = set(range(mine * heads // count, (mine + 1) * heads // count))
        for form in range(1, len(found)):
            held = [
                set(range(index * heads // parts, (index + 1) * heads // parts))
                for _, index, parts in shards_of(found, form)
            ]
            assert own <= set().union(*held) and sum(map(len, held)) == len(set().union(*held))
            assert all(own & heads_held for heads_held in held)


def test_what_is_the_same_on_all_ranks_is_in_every_form_and_states_only_in_their_own() -> None:
    found = forms_of(1, 2, [8, 0, 8])
    assert [found.parts(group) for group in range(3)] == [[0], [1], [2]]
    for form in range(1, len(found)):
        assert found.parts(3 * form + 1) == [1], "latents"
        assert not set(found.parts(3 * form)) & set(found.parts(3 * form + 2))
    assert len(forms_of(0, 2, [8, None])) == 1 and not forms_of(0, 2, [8, None]).others
    assert len(forms_of(0, 2, [0])) == 1, "nothing divides"
