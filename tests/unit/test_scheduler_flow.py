"""Scenarios on vLLM's real Scheduler: what is promised, loaded, saved, and that outputs never change."""

from pathlib import Path
from typing import Any

import pytest

from unit.fake_native import FakeNative
from unit.vllm_harness import BLOCK, Engine, expected, prompt


def fill(native: FakeNative, tmp_path: Path, prompts: list[list[int]], **options: Any) -> Engine:
    """An engine computes the prompts, so that the store has them; it leaves nothing behind."""
    engine = Engine(native, tmp_path / "model", **options)
    for index, tokens in enumerate(prompts):
        engine.add(f"fill-{index}", tokens)
    engine.run()
    engine.assert_clean()
    return engine


def ask(engine: Engine, req_id: str, tokens: list[int], max_tokens: Any = 4) -> int:
    engine.add(req_id, tokens, max_tokens)
    engine.run()
    assert engine.outputs[req_id] == expected(tokens, max_tokens)
    return int(engine.params[req_id]["pillion"]["loaded_tokens"])


def test_a_fresh_engine_loads_what_another_saved(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=overlap)
    assert len(native.store) == 100 // BLOCK
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    assert ask(engine, "a", tokens) == 96
    assert engine.computed["a"] < 4 + 4
    assert engine.stats["loaded_tokens"] == 96 and engine.stats["hits"] == 1
    engine.assert_clean()


def test_generated_tokens_are_saved_too(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    tokens = prompt(30)
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    engine.add("a", tokens, max_tokens=40)
    engine.run()
    # The last sampled token's KV is never computed: 69 positions.
    assert len(native.store) == 69 // BLOCK
    longer = tokens + engine.outputs["a"]
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    assert ask(engine, "b", longer) == 64
    engine.assert_clean()


def test_a_block_whose_hash_is_known_only_at_the_end_is_saved(
    native: FakeNative, tmp_path: Path, overlap: bool
) -> None:
    """With asynchronous scheduling the last block is computed a step before vLLM hashes it."""
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    engine.add("a", prompt(30), max_tokens=BLOCK * 4 - 30 + 1)
    engine.run()
    assert len(native.store) == 4
    engine.assert_clean()


def test_partial_match_loads_the_common_prefix(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    shared = prompt(50)
    fill(native, tmp_path, [shared + prompt(30, 1)], overlap=overlap)
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    assert ask(engine, "a", shared + prompt(30, 2)) == 48
    engine.assert_clean()


@pytest.mark.parametrize("length", [BLOCK * 4 - 1, BLOCK * 4, BLOCK * 4 + 1])
def test_lengths_around_a_block_boundary(
    native: FakeNative, tmp_path: Path, overlap: bool, length: int
) -> None:
    tokens = prompt(length)
    fill(native, tmp_path, [tokens], overlap=overlap)
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    # As in vLLM's own cache, a full-prompt hit leaves the last block to compute, so that no block that others
    # may share is written again.
    assert ask(engine, "a", tokens) == (length - 1) // BLOCK * BLOCK
    engine.assert_clean()


@pytest.mark.parametrize("length", [1, 2, BLOCK - 1])
def test_prompt_shorter_than_a_block(native: FakeNative, tmp_path: Path, overlap: bool, length: int) -> None:
    engine = fill(native, tmp_path, [prompt(length)], overlap=overlap)
    assert "lease" not in native.calls or native.store
    assert ask(engine, "a", prompt(length)) == 0


def test_own_prefix_cache_first_and_only_the_rest_is_loaded(
    native: FakeNative, tmp_path: Path, overlap: bool
) -> None:
    tokens = prompt(160)
    fill(native, tmp_path, [tokens], overlap=overlap)
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    ask(engine, "short", tokens[:40])
    assert ask(engine, "long", tokens) == 144 - 32
    assert ask(engine, "again", tokens) == 0
    engine.assert_clean()


def test_blocks_of_the_engines_own_cache_are_saved_again(
    native: FakeNative, tmp_path: Path, overlap: bool
) -> None:
    """A restarted sidecar fills up from what the engine still has."""
    tokens = prompt(100)
    engine = fill(native, tmp_path, [tokens], overlap=overlap)
    native.store.clear()
    ask(engine, "a", tokens)
    assert len(native.store) == 6
    engine.assert_clean()


def test_chunked_prefill(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    tokens = prompt(500)
    fill(native, tmp_path, [tokens], overlap=overlap, max_batched=64)
    assert len(native.store) == 500 // BLOCK
    engine = Engine(native, tmp_path / "model", overlap=overlap, max_batched=64, num_blocks=400)
    assert ask(engine, "a", tokens) == 496
    engine.assert_clean()


def test_thirty_two_at_once(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    prompts = [prompt(40 + 3 * index, index % 8) for index in range(32)]
    fill(native, tmp_path, prompts, overlap=overlap, num_blocks=600)
    engine = Engine(native, tmp_path / "model", overlap=overlap, num_blocks=600)
    for index, tokens in enumerate(prompts):
        engine.add(f"r{index}", tokens, 20)
    engine.run()
    for index, tokens in enumerate(prompts):
        assert engine.outputs[f"r{index}"] == expected(tokens, 20)
    assert engine.stats["loaded_tokens"] > 0
    engine.assert_clean()


def test_two_requests_with_one_prefix_save_it_once(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    native.save_polls = 5
    tokens = prompt(64)
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    engine.add("a", [*tokens, 5])
    engine.add("b", [*tokens, 6])
    engine.run()
    assert engine.stats["saved_blocks"] == 4
    engine.assert_clean()


# ---- grants


def test_nothing_is_promised_before_the_grant(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=overlap)
    native.grant_after_polls = 5
    engine = Engine(native, tmp_path / "model", overlap=overlap, extra={"lookup_deadline_ms": 60_000})
    engine.add("a", tokens)
    for _ in range(4):
        engine.step()
        assert not engine.loads
    engine.run()
    assert engine.outputs["a"] == expected(tokens, 4)
    assert engine.params["a"]["pillion"]["loaded_tokens"] == 96
    engine.assert_clean()


def test_a_grant_that_never_comes_is_a_miss(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=overlap)
    native.grant_after_polls = 10**9
    engine = Engine(native, tmp_path / "model", overlap=overlap, extra={"lookup_deadline_ms": 20})
    assert ask(engine, "a", tokens) == 0
    assert engine.stats["lookup_timeouts"] == 1
    engine.assert_clean()


def test_a_refused_lease_is_a_miss(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=overlap)
    native.refuse_leases = True
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    assert ask(engine, "a", tokens) == 0
    engine.assert_clean()


def test_a_smaller_grant_is_a_smaller_promise(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=overlap)
    native.grant_blocks_max = 2
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    assert ask(engine, "a", tokens) == 32
    engine.assert_clean()


def test_an_absent_sidecar_costs_nothing_and_is_used_when_it_comes(
    native: FakeNative, tmp_path: Path, overlap: bool
) -> None:
    native.attached = False
    tokens = prompt(100)
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    assert ask(engine, "a", tokens) == 0
    assert not native.store
    native.attached = True
    ask(engine, "b", tokens)
    assert len(native.store) == 6
    engine.assert_clean()


# ---- failures


def test_a_failed_load_is_recomputed_in_fresh_blocks_while_the_old_ones_stay_held(
    native: FakeNative, tmp_path: Path, overlap: bool
) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=overlap)
    native.load_outcome, native.quiesce_loads = 2, False
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    engine.add("a", tokens)
    while not engine.reasons:
        engine.step()
        native.late_write(["late"] * BLOCK)  # the stuck sidecar writes after the deadline
    assert engine.outputs["a"] == expected(tokens, 4)
    assert engine.params["a"]["pillion"]["loaded_tokens"] == 0
    assert engine.stats["load_failures"] == 1 and engine.half.holds.held == 6
    assert engine.scheduler.has_requests(), "the idle engine keeps stepping while blocks are held"
    native.quiesce_all()
    engine.run()
    engine.assert_clean()


def test_one_attempt_per_request(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=overlap)
    native.load_outcome = 2
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    assert ask(engine, "a", tokens) == 0
    assert len(engine.loads) == 1
    assert ask(engine, "b", tokens[:90] + prompt(40, 9)) == 0
    engine.assert_clean()


@pytest.mark.parametrize("error", [ValueError("wrong"), RuntimeError("full"), BaseException("panic")])
def test_a_job_that_the_client_does_not_take_ends_once(
    native: FakeNative, tmp_path: Path, overlap: bool, error: BaseException
) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=overlap)
    native.submit_error = error
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    engine.add("a", tokens)
    while "a" not in engine.reasons:
        engine.step()
    assert engine.outputs["a"] == expected(tokens, 4)
    # Only a ValueError proves that nothing will touch the blocks.
    assert (engine.half.holds.held == 0) == isinstance(error, ValueError)


def test_an_outcome_that_is_never_told_ends_at_the_deadline(
    native: FakeNative, tmp_path: Path, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pillion.vllm import worker

    monkeypatch.setattr(worker, "OVERDUE_S", 0.02)
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=overlap)
    native.load_outcome, native.quiesce_loads = None, False
    engine = Engine(native, tmp_path / "model", overlap=overlap, extra={"load_deadline_ms": 30})
    engine.add("a", tokens)
    while "a" not in engine.reasons:
        engine.step()
    assert engine.outputs["a"] == expected(tokens, 4)
    native.quiesce_all()
    engine.run(steps=100_000)
    engine.assert_clean()


@pytest.mark.parametrize("when", [1, 2, 3])
def test_abort_while_loading(native: FakeNative, tmp_path: Path, overlap: bool, when: int) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=overlap)
    native.load_polls = 4
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    engine.add("a", tokens)
    for _ in range(when):
        engine.step()
    engine.abort("a")
    engine.run()
    engine.assert_clean()


def test_abort_between_plan_and_step_sends_nothing(native: FakeNative, tmp_path: Path) -> None:
    """Deferred loads (vLLM 0.33) are planned outside of schedule(); a request can end before they are sent."""
    tokens = prompt(100)
    fill(native, tmp_path, [tokens])
    engine = Engine(native, tmp_path / "model")
    engine.add("a", tokens)
    engine.in_flight.append(engine.scheduler.schedule())
    request = engine.scheduler.requests["a"]
    plan = engine.in_flight[0].kv_connector_metadata.loads[0]
    # Put the plan back to where it was before the metadata was built.
    engine.in_flight[0].kv_connector_metadata = type(engine.in_flight[0].kv_connector_metadata)()
    engine.half._to_load.append(plan)
    engine.scheduler.finish_requests(request.request_id, type(request.status).FINISHED_ABORTED)
    while engine.in_flight:
        engine.process()
    engine.run()
    assert "submit_load" not in native.calls
    engine.assert_clean()


def test_abort_before_anything(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=overlap)
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    engine.add("a", tokens)
    engine.abort("a")
    engine.run()
    assert not engine.loads
    engine.assert_clean()


def test_a_report_that_comes_twice_does_not_reach_vllm(native: FakeNative, tmp_path: Path) -> None:
    """vLLM's scheduler asserts that it waits for each id that it is told: a repeated one kills the engine."""
    tokens = prompt(100)
    fill(native, tmp_path, [tokens])
    engine = Engine(native, tmp_path / "model")
    half = engine.worker._worker
    take = half.take_results
    told: list[str] = []

    def twice(meta: Any) -> Any:
        finished, failed = take(meta)
        again = {req_id for req_id in told if req_id not in finished}
        told[:] = finished
        return finished | again, failed

    half.take_results = twice
    assert ask(engine, "a", tokens) == 96
    engine.assert_clean()


def test_preemption_forced_by_a_tiny_cache(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    prompts = [prompt(60, index) for index in range(4)]
    fill(native, tmp_path, prompts, overlap=overlap)
    engine = Engine(native, tmp_path / "model", overlap=overlap, num_blocks=24)
    requests = [engine.add(f"r{index}", tokens, 90) for index, tokens in enumerate(prompts)]
    engine.run(steps=20_000)
    for index, tokens in enumerate(prompts):
        assert engine.outputs[f"r{index}"] == expected(tokens, 90)
    assert sum(request.num_preemptions for request in requests) > 0
    engine.assert_clean()


def defer(engine: Engine, tokens: list[int], abort_after: int | None) -> None:
    """vLLM 0.33 can plan a load some steps after the promise (it does for HiSparse only; forced here)."""
    engine.scheduler.defer_async_loads = True
    engine.add("busy", prompt(70, 5), 30)
    for _ in range(3):
        engine.step()
    engine.add("a", tokens)
    if abort_after is None:
        engine.run()
        assert engine.outputs["a"] == expected(tokens, 4)
        assert engine.params["a"]["pillion"]["loaded_tokens"] == 96
    else:
        for _ in range(abort_after):
            engine.step()
        engine.abort("a")
        engine.run()
    assert engine.outputs["busy"] == expected(prompt(70, 5), 30)
    engine.assert_clean()


@pytest.mark.parametrize("abort_after", [None, 0, 1, 2, 3])
def test_loads_that_vllm_defers(native: FakeNative, tmp_path: Path, abort_after: int | None) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=True)
    engine = Engine(native, tmp_path / "model", overlap=True)
    defer(engine, tokens, abort_after)


# ---- holds


def test_holds_are_capped(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    native.quiesce_saves = False
    engine = Engine(native, tmp_path / "model", overlap=overlap, num_blocks=101)
    prompts = [prompt(100, index) for index in range(6)]
    for index, tokens in enumerate(prompts):
        engine.add(f"r{index}", tokens)
    while len(engine.reasons) < len(prompts):
        engine.step()
    for index, tokens in enumerate(prompts):
        assert engine.outputs[f"r{index}"] == expected(tokens, 4)
    assert engine.held_most == 10 and engine.half.holds.limit == 10
    native.quiesce_all()
    engine.run()
    engine.assert_clean()


def test_a_load_is_cut_to_what_may_be_held(native: FakeNative, tmp_path: Path, overlap: bool) -> None:
    tokens = prompt(400)
    fill(native, tmp_path, [tokens], overlap=overlap, num_blocks=400)
    engine = Engine(native, tmp_path / "model", overlap=overlap, num_blocks=101)
    assert ask(engine, "a", tokens) == 160
    assert engine.held_most == 10
    engine.assert_clean()


def test_a_save_that_is_cut_goes_on_when_blocks_come_free(
    native: FakeNative, tmp_path: Path, overlap: bool
) -> None:
    tokens = prompt(320)
    engine = Engine(native, tmp_path / "model", overlap=overlap, num_blocks=101)
    engine.add("a", tokens, 60)
    engine.run()
    assert len(native.store) == 379 // BLOCK
    engine.assert_clean()


def test_pending_frees_count_young_holds_that_nobody_shares(
    native: FakeNative, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.quiesce_saves = False
    engine = Engine(native, tmp_path / "model")
    engine.add("a", prompt(100))
    engine.step()
    assert engine.half.holds.held == 6
    assert not engine.connector.has_pending_block_frees(), "the request uses its blocks itself"
    engine.abort("a")
    assert engine.connector.has_pending_block_frees()
    monkeypatch.setattr("pillion.vllm.holds.FREES_SOON_S", -1.0)
    assert not engine.connector.has_pending_block_frees(), "overdue holds never count"
    native.quiesce_all()
    engine.run()
    engine.assert_clean()


def test_lost_holds_do_not_keep_the_idle_engine_stepping_forever(native: FakeNative, tmp_path: Path) -> None:
    native.quiesce_saves = False
    engine = Engine(native, tmp_path / "model")
    engine.add("a", prompt(100))
    while "a" not in engine.reasons:
        engine.step()
    assert engine.connector.has_pending_push_work()
    engine.half.holds.spin_until = 0.0
    assert not engine.connector.has_pending_push_work()


# ---- reset


def test_reset_with_the_connector_starts_a_new_epoch(
    native: FakeNative, tmp_path: Path, overlap: bool
) -> None:
    tokens = prompt(100)
    engine = fill(native, tmp_path, [tokens], overlap=overlap)
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert ask(engine, "a", tokens) == 0
    assert {space for space, _ in native.store} == {bytes(16), (1).to_bytes(16, "big")}
    engine.assert_clean()


def test_reset_while_blocks_are_held_fails_and_a_retry_succeeds(
    native: FakeNative, tmp_path: Path, overlap: bool
) -> None:
    native.quiesce_saves = False
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    engine.add("a", prompt(100))
    while "a" not in engine.reasons:
        engine.step()
    assert not engine.scheduler.reset_prefix_cache(reset_connector=True)
    native.quiesce_all()
    engine.run()
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    engine.assert_clean()


def test_requests_that_live_through_a_reset_save_and_load_nothing(
    native: FakeNative, tmp_path: Path, overlap: bool
) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=overlap)
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    engine.add("running", prompt(50, 3), 60)
    for _ in range(5):
        engine.step()
    engine.add("waiting", tokens)
    engine.scheduler.reset_prefix_cache(reset_connector=True)
    engine.run()
    assert engine.params["waiting"]["pillion"]["loaded_tokens"] == 0
    assert all(space == bytes(16) for space, _ in native.store)
    engine.assert_clean()


# ---- roles and policies


def test_a_policy_other_than_recompute_saves_and_never_loads(
    native: FakeNative, tmp_path: Path, overlap: bool
) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=overlap)
    engine = Engine(native, tmp_path / "model", overlap=overlap, kv_load_failure_policy="fail")
    assert ask(engine, "a", tokens) == 0
    assert ask(engine, "b", prompt(100, 5)) == 0
    assert len(native.store) == 12 and native.calls["lease"] == 1
    engine.assert_clean()


def test_a_producer_never_loads_and_a_consumer_never_saves(native: FakeNative, tmp_path: Path) -> None:
    tokens = prompt(100)
    engine = Engine(native, tmp_path / "model", kv_role="kv_producer")
    ask(engine, "a", tokens)
    assert len(native.store) == 6
    engine = Engine(native, tmp_path / "model", kv_role="kv_producer")
    assert ask(engine, "b", tokens) == 0
    engine = Engine(native, tmp_path / "model", kv_role="kv_consumer")
    assert ask(engine, "c", tokens) == 96
    ask(engine, "d", prompt(100, 1))
    assert len(native.store) == 6
    engine.assert_clean()


def test_lora_requests_run_uncached(native: FakeNative, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    engine = Engine(native, tmp_path / "model")
    engine.add("a", prompt(100), lora_request=LoRARequest("adapter", 1, "/nonexistent"))
    engine.run()
    assert not native.store
    engine.assert_clean()


# ---- errors of the client (I5)


@pytest.mark.parametrize(
    "method", ["lease", "lease_poll", "lease_used", "release", "namespace_ids", "absent", "ready", "poll"]
)
@pytest.mark.parametrize("error", [RuntimeError("broken"), BaseException("panic")], ids=["error", "panic"])
def test_no_error_of_the_client_reaches_the_engine(
    native: FakeNative, tmp_path: Path, overlap: bool, method: str, error: BaseException
) -> None:
    tokens = prompt(100)
    fill(native, tmp_path, [tokens], overlap=overlap)
    engine = Engine(
        native, tmp_path / "model", overlap=overlap, extra={"lookup_deadline_ms": 20, "load_deadline_ms": 20}
    )
    engine.worker._worker.client.native.raise_in[method] = error
    for index in range(3):
        engine.add(f"r{index}", tokens if index < 2 else prompt(80, 7))
    while len(engine.reasons) < 3:
        engine.step()
    for index in range(3):
        assert engine.outputs[f"r{index}"] == expected(tokens if index < 2 else prompt(80, 7), 4)
    native.raise_in.clear()
    engine.run(steps=100_000)
    assert ask(engine, "after", prompt(90, 11)) == 0


def test_idle_decode_steps_ask_the_client_nothing(native: FakeNative, tmp_path: Path) -> None:
    engine = Engine(native, tmp_path / "model")
    for index in range(8):
        engine.add(f"r{index}", prompt(BLOCK * 2 + 1, index), 40)
    for _ in range(4):
        engine.step()
    before = dict(native.calls)
    for _ in range(8):
        engine.step()
    assert {name: native.calls[name] - before.get(name, 0) for name in native.calls} == dict.fromkeys(
        native.calls, 0
    )
    engine.run()
    engine.assert_clean()
