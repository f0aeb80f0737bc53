"""Models with several KV cache groups on vLLM's real Scheduler: what a hit loads, what is saved, and what goes wrong.

The simulated workers check every step that the KV and the states which it reads are those of its prefix, in every
group (`vllm_groups`), so that each scenario proves what was loaded, and not only how much.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import vllm

from unit.fake_native import FAILED, FakeNative, FakeRanks
from unit.test_scheduler_flow import ask, defer, fill
from unit.vllm_groups import KvGroup
from unit.vllm_harness import Engine, expected, prompt

VERSION = tuple(map(int, vllm.__version__.split(".")[:2]))

GEMMA = (KvGroup("window", window=40), KvGroup("window", window=40), KvGroup("full"))
WINDOW = (KvGroup("window", window=33),)
MIXED = (KvGroup("window", block=16, window=24), KvGroup("full", block=32))  # larger blocks for smaller pages
TWO_WINDOWS = (KvGroup("full"), KvGroup("window", window=20), KvGroup("window", window=70))
MAMBA = (KvGroup("align"), KvGroup("align"), KvGroup("full"))
PURE = (KvGroup("align"),)
JAMBA = (KvGroup("full"), KvGroup("window", window=40), KvGroup("align"))
DEEPSEEK = (KvGroup("mla"),)
MODELS = {
    "gemma": GEMMA,
    "window": WINDOW,
    "mixed": MIXED,
    "two-windows": TWO_WINDOWS,
    "mamba": MAMBA,
    "pure": PURE,
    "jamba": JAMBA,
    "mla": DEEPSEEK,
}
if VERSION < (0, 32):
    MODELS["all"] = (KvGroup("all"), KvGroup("full"))

EVERY = pytest.mark.parametrize("name", MODELS)
WINDOWS = pytest.mark.parametrize("name", ["gemma", "window", "mixed", "two-windows"])
# None: vLLM keeps every block that it could hit (dense); 0: what a replay of the prompt needs (0.32's default).
RETENTION = pytest.mark.parametrize("retention", [None, 0])


def align(name: str) -> int:
    return max(group.block for group in MODELS[name])


def test_the_models_have_the_kinds_that_they_claim(native: FakeNative, tmp_path: Path) -> None:
    engine = Engine(native, tmp_path / "model", groups=MIXED)
    hits = engine.half._hits
    assert [group.kind for group in hits.groups] == [1, 0] and hits.align == 32 and hits.hash_tokens == 16
    assert [group.hashes for group in hits.groups] == [1, 2]
    # vLLM's own count: the window of 24 before a boundary reaches back 23 tokens.
    assert hits.groups[0].window_blocks == 2


@EVERY
@RETENTION
def test_a_fresh_engine_loads_what_another_saved(
    native: FakeNative, tmp_path: Path, overlap: bool, name: str, retention: int | None
) -> None:
    tokens = prompt(200)
    options: dict[str, Any] = {"overlap": overlap, "groups": MODELS[name], "retention": retention}
    fill(native, tmp_path, [tokens], **options)
    engine = Engine(native, tmp_path / "model", **options)
    assert ask(engine, "a", tokens) == 192
    assert engine.computed["a"] <= 200 - 192 + 4
    wanted = {"window": 3, "align": 1}
    for index, group in enumerate(MODELS[name]):
        loaded = sum(
            count for _, runs in engine.load_runs for run in runs if run[0] == index for count in run[3:]
        )
        if group.kind == "window":
            assert loaded == -(-(group.window - 1) // group.block)
        elif group.kind == "align":
            assert loaded == wanted["align"]
        elif group.kind != "all":
            assert loaded == 192 // group.block
    engine.assert_clean()


@EVERY
@pytest.mark.parametrize("length", [63, 64, 65, 95, 96, 97])
def test_lengths_around_a_block_boundary(native: FakeNative, tmp_path: Path, name: str, length: int) -> None:
    tokens = prompt(length)
    fill(native, tmp_path, [tokens], groups=MODELS[name])
    engine = Engine(native, tmp_path / "model", groups=MODELS[name])
    wanted = (length - 1) // align(name) * align(name)
    if VERSION < (0, 32) and length % 16 == 0 and any(group.kind == "align" for group in MODELS[name]):
        wanted = 0  # vLLM ends no step before the last block there, so no state is ever at its beginning
    assert ask(engine, "a", tokens) == wanted
    engine.assert_clean()


@EVERY
@RETENTION
def test_a_conversation_goes_on_in_another_engine(
    native: FakeNative, tmp_path: Path, overlap: bool, name: str, retention: int | None
) -> None:
    """What was generated is part of the next prompt: states at its last boundary are saved while it decodes."""
    options: dict[str, Any] = {"overlap": overlap, "groups": MODELS[name], "retention": retention}
    tokens = prompt(70)
    engine = Engine(native, tmp_path / "model", **options)
    engine.add("a", tokens, max_tokens=100)
    engine.run()
    longer = [*tokens, *engine.outputs["a"]]
    engine = Engine(native, tmp_path / "model", **options)
    # The last sampled token's KV is never computed.
    assert ask(engine, "b", [*longer, 5, 6, 7]) == (len(longer) - 1) // align(name) * align(name)
    engine.assert_clean()


@WINDOWS
def test_partial_match_loads_the_window_before_the_common_prefix_ends(
    native: FakeNative, tmp_path: Path, overlap: bool, name: str
) -> None:
    shared = prompt(110)
    fill(native, tmp_path, [shared + prompt(90, 1)], overlap=overlap, groups=MODELS[name], num_blocks=600)
    engine = Engine(native, tmp_path / "model", overlap=overlap, groups=MODELS[name], num_blocks=600)
    assert ask(engine, "a", shared + prompt(50, 2)) == 96
    engine.assert_clean()


def test_states_exist_where_steps_ended(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    """Chunks of 64 tokens leave a state every 64 tokens, whatever vLLM's own cache keeps."""
    shared = prompt(150)
    options: dict[str, Any] = {"overlap": overlap, "groups": MAMBA, "retention": 0, "max_batched": 64}
    fill(native, tmp_path, [shared + prompt(100, 1)], **options)
    engine = Engine(native, tmp_path / "model", **options)
    assert ask(engine, "a", shared + prompt(50, 2)) == 128
    engine.assert_clean()


def test_a_state_is_final_only_where_that_is_proved(native: FakeNative, tmp_path: Path) -> None:
    engine = Engine(native, tmp_path / "model", groups=MAMBA, max_batched=64, retention=0)
    engine.add("a", prompt(200))
    saves, pool = engine.half._saves, engine.pool
    ended: list[tuple[int, int]] = []
    while not engine.reasons:
        engine.step()
        if (state := engine.half._reqs.get("a")) is None:
            break
        computed = state.request.num_computed_tokens
        table = engine.scheduler.kv_cache_manager.get_block_ids("a")[0]
        ended += [(computed, table[-1])] if computed % 16 == 0 else []
        for block, block_id in enumerate(table):
            registered = pool.blocks[block_id].block_hash is not None
            here = ended[-1:] == [((block + 1) * 16, block_id)]
            if block_id and block < min(len(state.request.block_hashes), computed // 16):
                assert saves._state_is_final(state, 0, block, block_id) == (here or registered), (
                    block,
                    computed,
                )
    assert [computed for computed, _ in ended] == [64, 128, 192]
    # The same block in the same place, but of a request that has been preempted since: nobody knows.
    engine.add("b", prompt(300, 1), 200)
    while (state := engine.half._reqs["b"]).request.num_computed_tokens != 320:
        engine.step()
    block_id = engine.scheduler.kv_cache_manager.get_block_ids("b")[0][19]
    assert pool.blocks[block_id].block_hash is None and saves._state_is_final(state, 0, 19, block_id)
    state.request.num_preemptions += 1
    assert not saves._state_is_final(state, 0, 19, block_id)
    engine.run()


@EVERY
def test_chunked_prefill(native: FakeNative, tmp_path: Path, overlap: bool, name: str) -> None:
    tokens = prompt(500)
    options: dict[str, Any] = {
        "overlap": overlap,
        "groups": MODELS[name],
        "max_batched": 64,
        "num_blocks": 600,
    }
    fill(native, tmp_path, [tokens], **options)
    engine = Engine(native, tmp_path / "model", **options)
    assert ask(engine, "a", tokens) == 499 // align(name) * align(name)
    engine.assert_clean()


@EVERY
@RETENTION
def test_own_prefix_cache_first_and_only_the_rest_is_loaded(
    native: FakeNative, tmp_path: Path, overlap: bool, name: str, retention: int | None
) -> None:
    options: dict[str, Any] = {"overlap": overlap, "groups": MODELS[name], "retention": retention}
    tokens = prompt(260)
    fill(native, tmp_path, [tokens], **options)
    engine = Engine(native, tmp_path / "model", **options)
    ask(engine, "short", tokens[:120])
    own = 119 // align(name) * align(name)
    assert ask(engine, "long", tokens) == 256 - own
    assert ask(engine, "again", tokens) == 0
    engine.assert_clean()


@EVERY
def test_blocks_of_the_engines_own_cache_are_saved_again(
    native: FakeNative, tmp_path: Path, overlap: bool, name: str
) -> None:
    """A restarted sidecar fills up from what the engine still has: enough for the same prompt."""
    options: dict[str, Any] = {"overlap": overlap, "groups": MODELS[name]}
    tokens = prompt(200)
    engine = fill(native, tmp_path, [tokens], **options)
    native.store.clear()
    assert ask(engine, "a", tokens) == 0
    engine = Engine(native, tmp_path / "model", **options)
    assert ask(engine, "b", tokens) == 192
    engine.assert_clean()


def test_a_window_that_is_stored_in_part_serves_a_shorter_hit(native: FakeNative, tmp_path: Path) -> None:
    tokens = prompt(200)
    fill(native, tmp_path, [tokens], groups=GEMMA, num_blocks=600)
    hashes = hashes_of(native, tmp_path, tokens)
    del native.store[native.space(1), hashes[9]]  # every window but those up to token 144 needs it
    engine = Engine(native, tmp_path / "model", groups=GEMMA, num_blocks=600)
    assert ask(engine, "a", tokens) == 144
    # What was missing is saved again.
    assert (native.space(1), hashes[9]) in native.store
    engine.assert_clean()


def hashes_of(native: FakeNative, tmp_path: Path, tokens: list[int]) -> list[bytes]:
    engine = Engine(native, tmp_path / "model", groups=GEMMA, num_blocks=600)
    request = engine.add("hashes", tokens)
    engine.abort("hashes")
    engine.run()
    return [bytes(each) for each in request.block_hashes]


def test_blocks_that_no_window_reaches_are_not_saved(native: FakeNative, tmp_path: Path) -> None:
    groups = (KvGroup("window", block=16, window=10), KvGroup("full", block=64))
    fill(native, tmp_path, [prompt(300)], groups=groups)
    # One block before every boundary of 64.
    assert native.stored(0) == 4 and native.stored(1) == 4
    engine = Engine(native, tmp_path / "model", groups=groups)
    assert ask(engine, "a", prompt(300)) == 256
    engine.assert_clean()


# ---- leases


@pytest.mark.parametrize("group", range(3))
@pytest.mark.parametrize("count", [0, 1])
def test_a_short_grant_is_a_shorter_hit_by_one_more_lease(
    native: FakeNative, tmp_path: Path, overlap: bool, group: int, count: int
) -> None:
    tokens = prompt(200)
    fill(native, tmp_path, [tokens], overlap=overlap, groups=GEMMA, num_blocks=600)
    engine = Engine(native, tmp_path / "model", overlap=overlap, groups=GEMMA, num_blocks=600)
    native.lease_short[group] = [count]
    # The window at 192 begins with block 9: without block 9 it ends at 144, without 10 at 160.
    full = {0: 0, 1: 16}[count]
    assert ask(engine, "a", tokens) == (full if group == 2 else {0: 144, 1: 160}[count])
    assert native.calls["lease"] <= 3
    engine.assert_clean()


def test_a_second_short_grant_is_a_miss(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    tokens = prompt(200)
    fill(native, tmp_path, [tokens], overlap=overlap, groups=GEMMA, num_blocks=600)
    engine = Engine(native, tmp_path / "model", overlap=overlap, groups=GEMMA, num_blocks=600)
    native.lease_short[0] = [1, 1]
    assert ask(engine, "a", tokens) == 0
    assert not engine.loads
    engine.assert_clean()


@pytest.mark.parametrize("name", ["gemma", "mamba", "jamba", "mixed"])
def test_a_load_that_would_hold_too_much_is_a_shorter_one(
    native: FakeNative, tmp_path: Path, overlap: bool, name: str
) -> None:
    options: dict[str, Any] = {"overlap": overlap, "groups": MODELS[name], "max_batched": 64}
    tokens = prompt(600)
    fill(native, tmp_path, [tokens], num_blocks=600, **options)
    engine = Engine(native, tmp_path / "model", num_blocks=201, **options)
    assert 0 < ask(engine, "a", tokens) < 592
    assert engine.held_most <= engine.half.holds.limit == 20
    engine.assert_clean()


@EVERY
def test_saves_are_capped_over_all_groups(
    native: FakeNative, tmp_path: Path, overlap: bool, name: str
) -> None:
    native.quiesce_saves = False
    engine = Engine(native, tmp_path / "model", overlap=overlap, groups=MODELS[name], num_blocks=150)
    for index in range(5):
        engine.add(f"r{index}", prompt(100, index))
    while len(engine.reasons) < 5:
        engine.step()
    for index in range(5):
        assert engine.outputs[f"r{index}"] == expected(prompt(100, index), 4)
    assert engine.held_most <= engine.half.holds.limit == 14
    native.quiesce_all()
    engine.run()
    engine.assert_clean()


def test_the_window_at_the_end_is_saved_first_where_not_all_can_be_held(
    native: FakeNative, tmp_path: Path
) -> None:
    """One chunk of 30 blocks in three groups, 40 of which may be held: full attention and the last windows."""
    native.save_polls = 3
    options: dict[str, Any] = {"groups": GEMMA, "max_batched": 1000}
    engine = Engine(native, tmp_path / "model", num_blocks=401, **options)
    tokens = prompt(490)
    ask(engine, "a", tokens)
    engine = Engine(native, tmp_path / "model", num_blocks=1000, **options)
    assert ask(engine, "b", tokens) == 480
    engine.assert_clean()


# ---- failures


@EVERY
def test_a_failed_load_is_recomputed_while_the_old_blocks_stay_held(
    native: FakeNative, tmp_path: Path, overlap: bool, name: str
) -> None:
    tokens = prompt(200)
    options: dict[str, Any] = {"overlap": overlap, "groups": MODELS[name]}
    fill(native, tmp_path, [tokens], **options)
    native.load_outcome, native.quiesce_loads = FAILED, False
    engine = Engine(native, tmp_path / "model", **options)
    engine.add("a", tokens)
    while not engine.reasons:
        engine.step()
        native.late_write(["late"] * 16)
    assert engine.outputs["a"] == expected(tokens, 4)
    assert engine.params["a"]["pillion"]["loaded_tokens"] == 0 and engine.half.holds.held > 0
    native.quiesce_all()
    engine.run()
    engine.assert_clean()


@pytest.mark.parametrize("group", range(3))
def test_one_block_that_is_gone_fails_the_whole_load(
    native: FakeNative, tmp_path: Path, overlap: bool, group: int
) -> None:
    """Evicted between lease and load, in one group: none of the others' blocks is used."""
    tokens = prompt(200)
    fill(native, tmp_path, [tokens], overlap=overlap, groups=JAMBA)
    engine = Engine(native, tmp_path / "model", overlap=overlap, groups=JAMBA)
    engine.add("a", tokens)
    _, runs, _ = native.leases[max(native.leases)]
    _, hashes = runs[group]
    del native.store[native.space(group), hashes[-1]]
    engine.run()
    assert engine.outputs["a"] == expected(tokens, 4)
    assert engine.params["a"]["pillion"]["loaded_tokens"] == 0 and engine.stats["load_failures"] == 1
    engine.assert_clean()


@EVERY
@pytest.mark.parametrize("when", [1, 2, 3])
def test_abort_while_loading(native: FakeNative, tmp_path: Path, overlap: bool, name: str, when: int) -> None:
    tokens = prompt(200)
    fill(native, tmp_path, [tokens], overlap=overlap, groups=MODELS[name])
    native.load_polls = 4
    engine = Engine(native, tmp_path / "model", overlap=overlap, groups=MODELS[name])
    engine.add("a", tokens)
    for _ in range(when):
        engine.step()
    engine.abort("a")
    engine.run()
    engine.assert_clean()


@EVERY
def test_preemption_forced_by_a_tiny_cache(
    native: FakeNative, tmp_path: Path, overlap: bool, name: str
) -> None:
    prompts = [prompt(60, index) for index in range(4)]
    options: dict[str, Any] = {"overlap": overlap, "groups": MODELS[name]}
    fill(native, tmp_path, prompts, **options)
    # Windows and states need fewer blocks than full attention.
    full = sum(group.kind in ("full", "mla", "all") for group in MODELS[name])
    blocks = 14 + 10 * full + 5 * (len(MODELS[name]) - full)
    engine = Engine(native, tmp_path / "model", num_blocks=blocks, **options)
    for index, tokens in enumerate(prompts):
        engine.add(f"r{index}", tokens, 90)
    engine.run(steps=20_000)
    for index, tokens in enumerate(prompts):
        assert engine.outputs[f"r{index}"] == expected(tokens, 90)
    engine.assert_clean()


@EVERY
@pytest.mark.parametrize("abort_after", [None, 0, 1, 2, 3])
def test_loads_that_vllm_defers(
    native: FakeNative, tmp_path: Path, name: str, abort_after: int | None
) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=True, groups=MODELS[name])
    engine = Engine(native, tmp_path / "model", overlap=True, groups=MODELS[name])
    defer(engine, tokens, abort_after)


@EVERY
def test_a_reset_is_a_new_epoch_in_every_group(
    native: FakeNative, tmp_path: Path, overlap: bool, name: str
) -> None:
    tokens = prompt(200)
    engine = fill(native, tmp_path, [tokens], overlap=overlap, groups=MODELS[name])
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert ask(engine, "a", tokens) == 0
    assert engine.scheduler.reset_prefix_cache()
    assert ask(engine, "b", tokens) == 192
    engine.assert_clean()


# ---- speculative decoding


@pytest.mark.parametrize("name", ["gemma", "mixed", "mla", "two-windows"])
def test_rejected_drafts_are_never_saved(
    native: FakeNative, tmp_path: Path, overlap: bool, name: str
) -> None:
    tokens = prompt(70)
    options: dict[str, Any] = {"overlap": overlap, "groups": MODELS[name], "drafts": 3}
    engine = Engine(native, tmp_path / "model", **options)
    engine.add("a", tokens, max_tokens=120)
    engine.run()
    longer = [*tokens, *engine.outputs["a"]]
    assert engine.outputs["a"] == expected(tokens, 120)
    engine = Engine(native, tmp_path / "model", **options)
    assert ask(engine, "b", [*longer, 5, 6, 7]) >= 176 // align(name) * align(name)
    engine.assert_clean()


def test_states_and_drafts_are_refused(native: FakeNative, tmp_path: Path, caplog: Any) -> None:
    engine = Engine(native, tmp_path / "model", groups=MAMBA, drafts=2)
    assert engine.connector._scheduler is None
    assert "speculative decoding with recurrent states" in caplog.text


# ---- tensor parallelism


@pytest.mark.parametrize("name", ["gemma", "mamba", "jamba"])
@pytest.mark.parametrize("world", [2, 8])
def test_every_rank_loads_its_own_part(tmp_path: Path, overlap: bool, name: str, world: int) -> None:
    natives, tokens = FakeRanks(world), prompt(200)
    fill(natives, tmp_path, [tokens], overlap=overlap, groups=MODELS[name])  # type: ignore[arg-type]
    engine = Engine(natives, tmp_path / "model", overlap=overlap, groups=MODELS[name])
    assert ask(engine, "a", tokens) == 192
    engine.assert_clean()


@pytest.mark.parametrize("fault", ["absent", "refuses", "slow", "fails", "lacks", "short"])
@pytest.mark.parametrize("name", ["gemma", "jamba"])
def test_one_bad_rank_of_eight(tmp_path: Path, overlap: bool, name: str, fault: str) -> None:
    natives, tokens = FakeRanks(8), prompt(200)
    fill(natives, tmp_path, [tokens], overlap=overlap, groups=MODELS[name])  # type: ignore[arg-type]
    bad = natives.ranks[5]
    bad.attached = fault != "absent"
    bad.refuse_leases = fault == "refuses"
    bad.grant_after_polls = 10**9 if fault == "slow" else 0
    bad.load_outcome = FAILED if fault == "fails" else 1
    if fault == "lacks":
        for key in [key for key in bad.store if key[0] == bad.space(1)]:
            del bad.store[key]
    bad.grant_blocks_max = 0 if fault == "short" else None
    extra = {"lookup_deadline_ms": 30}
    engine = Engine(natives, tmp_path / "model", overlap=overlap, groups=MODELS[name], extra=extra)
    assert ask(engine, "a", tokens) == 0
    bad.attached, bad.refuse_leases, bad.grant_after_polls = True, False, 0
    bad.load_outcome, bad.grant_blocks_max = 1, None
    assert engine.scheduler.reset_prefix_cache()
    if fault != "lacks":  # what it lacked was saved again, as far as the engine still had it
        assert ask(engine, "b", tokens) == 192
    engine.assert_clean()
