"""Drafters with layers in the KV cache: a hit is as long as vLLM's own would be, and nothing of a rejected draft is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pillion.vllm import identity
from pillion.vllm.hits import FULL, WINDOW, Group, Hits
from unit.fake_native import FakeNative
from unit.test_scheduler_flow import fill
from unit.vllm_groups import KvGroup
from unit.vllm_harness import BLOCK, Engine, expected, prompt

MODELS = {
    "one group": (KvGroup("full"),),
    "the drafter's own group": (KvGroup("full"), KvGroup("full", heads=1)),
    "windows": (KvGroup("full"), KvGroup("window", window=40)),
    "latents": (KvGroup("mla"),),
}
each_model = pytest.mark.parametrize("name", MODELS)
LENGTHS = (15, 16, 17, 31, 32, 33, 47, 48, 49, 97, 112, 113, 128)


def options(name: str, overlap: bool, drafter: str, **more: Any) -> dict[str, Any]:
    return {"overlap": overlap, "groups": MODELS[name], "drafts": 3, "drafter": drafter, **more}


def computed(engine: Engine, req_id: str, tokens: list[int]) -> int:
    """Tokens of the prompt that were not computed again. Drafts that were rejected count as computed."""
    engine.add(req_id, tokens, 1)
    engine.run()
    assert engine.outputs[req_id] == expected(tokens, 1)
    return len(tokens) - engine.computed[req_id]


@each_model
@pytest.mark.parametrize("drafter", ["eagle", "draft_model"])
def test_hits_are_as_long_as_vllms_own(
    native: FakeNative, tmp_path: Path, overlap: bool, name: str, drafter: str
) -> None:
    """An engine that computed the prompts and loads nothing, and one that finds all that it saved."""
    more = {"kv_role": "kv_producer"}
    first = Engine(native, tmp_path / "model", **options(name, overlap, drafter, **more))
    for length in LENGTHS:
        assert computed(first, f"first-{length}", prompt(length, seed=length)) == 0
    own = {length: computed(first, f"own-{length}", prompt(length, seed=length)) for length in LENGTHS}
    first.assert_clean()
    second = Engine(native, tmp_path / "model", **options(name, overlap, drafter))
    loaded = {length: computed(second, f"loads-{length}", prompt(length, seed=length)) for length in LENGTHS}
    for length in LENGTHS:
        # At the very end of a prompt vLLM does not look for the block that it would drop: with one group, and before
        # 0.32 with several.
        longer = loaded[length] - own[length]
        assert longer == 0 or (drafter == "eagle" and length % BLOCK == 0 and longer == BLOCK), length
    assert own[97] < own[113] and (own[31] > 0) == (drafter == "draft_model")
    second.assert_clean()


@each_model
@pytest.mark.parametrize("drafter", ["eagle", "draft_model"])
def test_rejected_drafts_are_never_saved(
    native: FakeNative, tmp_path: Path, overlap: bool, name: str, drafter: str
) -> None:
    """Some drafts are right and some are wrong: what is loaded later, into both, is what was accepted."""
    tokens = prompt(60)
    first = fill(native, tmp_path, [tokens], **options(name, overlap, drafter))
    first.add("long", tokens, 100)
    first.run()
    assert first.outputs["long"] == expected(tokens, 100)
    first.assert_clean()
    second = Engine(native, tmp_path / "model", **options(name, overlap, drafter))
    answer = [*tokens, *expected(tokens, 100)]
    assert computed(second, "again", answer) >= 128
    second.add("more", answer, 20)
    second.run()
    assert second.outputs["more"] == expected(answer, 20)
    second.assert_clean()


def test_a_drafter_is_part_of_the_namespace(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], **options("one group", overlap, "eagle"))
    names = {native.options[-1]["namespaces"][0]["drafter"]}
    Engine(native, tmp_path / "model", **options("one group", overlap, "ngram"))
    names.add(native.options[-1]["namespaces"][0]["drafter"])
    assert names == {"eagle id:tiny", "none"}


def test_weights_of_a_drafter_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from pillion.vllm.config import Settings

    seen: list[Any] = []

    def fingerprint(config: Any) -> str:
        seen.append(config)
        return "f"

    monkeypatch.setattr(identity, "fingerprint", fingerprint)
    drafter, load = object(), object()
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(method="eagle3", draft_model_config=drafter), load_config=load
    )
    assert identity._drafter(config, Settings()) == "eagle3 sha256:f"
    assert seen[0].model_config is drafter and seen[0].load_config is load


def test_the_search_wants_a_block_more_and_no_more() -> None:
    class Table:
        def __init__(self, *have: set[int]) -> None:
            self.have = have

        def lookup(self, group: int, hashes: bytes) -> int:
            count = len(hashes) // 32
            return next((index for index in range(count) if index not in self.have[group]), count)

        def present(self, group: int, hashes: bytes) -> bytes:
            return bytes(index in self.have[group] for index in range(len(hashes) // 32))

    keys = [bytes([index]) * 32 for index in range(20)]
    alone = Hits([Group(FULL, 16, proof_blocks=1)], 16)
    assert not alone.prefix_only
    assert alone.usable(160, 10) == 144 and alone.usable(161, 10) == 144 and alone.usable(159, 9) == 128
    assert alone.usable(17, 1) == 0
    for have in range(8):
        found = alone.longest(Table(set(range(have))), keys, alone.usable(161, 10))
        assert found == max(0, have - 1) * 16
    assert alone.longest(Table(set(range(8))), keys, 144, {(0, 3)}) == 48
    both = Hits([Group(FULL, 16), Group(WINDOW, 16, window_blocks=2, proof_blocks=1)], 16)
    for gap in range(8):
        window = set(range(8)) - {gap}
        found = both.longest(Table(set(range(8)), window), keys, 112) // 16
        fits = [n for n in range(8) if set(range(max(0, n - 2), n + 1)) <= window or n == 0]
        assert found == max(fits), (gap, found)
