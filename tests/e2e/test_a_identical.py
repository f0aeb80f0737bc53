"""Token-identical with and without Pillion: one engine, whose shim starts the sidecar itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest

from e2e.harness import Answer, Engine, Sidecar, until
from e2e.prompts import (
    ABORTED,
    CHUNKED,
    CLEARED,
    COMMON,
    CROWD,
    EDGES,
    GROWN,
    LONG,
    PAUSED,
    RESET,
    SHARED,
    SHARING,
    SHORT,
    Prompt,
)
from e2e.world import MARGIN, Checker, World, fill, loaded

STEP_TOKENS = 256
"""Longer prompts are computed in pieces."""


@pytest.fixture(scope="module")
def sidecar(world: World) -> Sidecar:
    return world.sidecar()


@pytest.fixture(scope="module")
def engine(world: World, identical: Checker, sidecar: Sidecar) -> Iterator[Engine]:
    engine = world.engine("first", sidecar, max_num_batched_tokens=STEP_TOKENS)
    yield engine
    engine.stop()


def one_by_one(engine: Engine, prompts: Sequence[Prompt]) -> list[Answer]:
    return [engine.ask(prompt) for prompt in prompts]


def test_every_choice_of_the_reference_has_a_margin(world: World) -> None:
    close = {name: answer.gap for name, answer in world.reference().items() if (answer.gap or 0) < MARGIN}
    assert not close, f"take another seed: {close}"


def test_a_fresh_engine_answers_the_same_and_saves(
    engine: Engine, identical: Checker, sidecar: Sidecar
) -> None:
    answers = engine.ask_all(LONG)
    identical(*answers)
    assert loaded(answers) == [0] * len(LONG)
    engine.quiet()
    assert sidecar.status()["pool"]["records"] >= sum(prompt.blocks for prompt in LONG)


def test_what_vllm_itself_has_is_not_loaded(engine: Engine, identical: Checker) -> None:
    for answer in one_by_one(engine, LONG):
        identical(answer)
        assert (answer.own, answer.loaded) == (answer.prompt.usable, 0)


def test_whole_prompts_are_loaded(engine: Engine, identical: Checker) -> None:
    engine.forget()
    identical.loads(engine, LONG)


def test_a_shared_prefix_is_loaded_for_prompts_that_nobody_asked_before(
    engine: Engine, identical: Checker
) -> None:
    identical(*fill(engine, SHARING[:1]))
    for prompt in SHARING[1:]:
        identical.loads(engine, [prompt], len(SHARED))
        engine.quiet()
        engine.forget()


def test_vllms_own_prefix_and_ours_go_together(engine: Engine, identical: Checker) -> None:
    identical(*one_by_one(engine, GROWN))
    engine.quiet()
    engine.forget()
    identical.loads(engine, GROWN[:1])  # brings the common prefix into vLLM's own cache
    (answer,) = identical.loads(engine, GROWN[1:])
    assert answer.own in (len(COMMON), 0)  # 0 where a busy machine made a second attempt necessary


def test_prompts_shorter_than_a_block_go_by(engine: Engine, identical: Checker) -> None:
    identical(*fill(engine, SHORT))
    answers = one_by_one(engine, SHORT)
    identical(*answers)
    assert loaded(answers) == [0, 0, 0]


def test_lengths_around_the_edge_of_a_block(engine: Engine, identical: Checker) -> None:
    identical(*fill(engine, EDGES))
    identical.loads(engine, EDGES)


def test_thirty_two_at_once(engine: Engine, identical: Checker) -> None:
    identical(*fill(engine, CROWD))
    answers = engine.ask_all(CROWD)
    identical(*answers)
    hits = sum(1 for answer in answers if answer.loaded)
    print(f"{hits} of {len(CROWD)} loaded {sum(loaded(answers))} tokens")
    # Together they want more blocks than may be held at a time, so that some may go by.
    assert hits > len(CROWD) // 4


def test_prompts_in_chunks(engine: Engine, identical: Checker) -> None:
    assert all(len(prompt.tokens) > 4 * STEP_TOKENS for prompt in CHUNKED)
    identical(*fill(engine, CHUNKED))
    identical.loads(engine, CHUNKED)


def test_aborted_before_they_are_scheduled(engine: Engine, identical: Checker) -> None:
    identical(*fill(engine, ABORTED))
    engine.call("pause", mode="keep")
    waiting = [engine.submit(prompt) for prompt in ABORTED[:4]]
    time.sleep(0.2)
    for request in waiting:
        request.abort()
    engine.call("resume")
    identical.loads(engine, ABORTED[:4])


def test_aborted_while_they_load(engine: Engine, identical: Checker, sidecar: Sidecar) -> None:
    engine.forget()
    for round_ in range(3):
        for number, prompt in enumerate(ABORTED):
            request = engine.submit(prompt)
            time.sleep(0.0005 * (number + len(ABORTED) * round_))
            request.abort()
    engine.quiet()
    until(lambda: not sidecar.status()["leases"]["held"], lambda: f"leases end\n{sidecar.explain()}", 45)
    engine.forget()
    identical(*engine.ask_all(ABORTED))


def test_aborted_while_they_run(engine: Engine, identical: Checker) -> None:
    engine.forget()
    running = [engine.submit(prompt) for prompt in ABORTED]
    for request in running:
        assert request.first.wait(60)
    for request in running:
        request.abort()
    identical(*engine.ask_all(ABORTED))
    engine.quiet()
    engine.forget()
    identical.loads(engine, ABORTED)


def test_a_reset_with_saves_in_flight_is_refused_and_then_succeeds(
    engine: Engine, identical: Checker, sidecar: Sidecar
) -> None:
    with sidecar.stopped(supervisor=False):
        identical(*engine.ask_all(RESET))
        # The saves hang, and hold their blocks: vLLM refuses, and lives.
        assert engine.counters()["unquiesced"] > 0
        assert engine.call("reset", connector=True) is False
    until(lambda: engine.call("reset", connector=True), engine.explain, 45)
    answers = one_by_one(engine, RESET)
    identical(*answers)
    assert loaded(answers) == [0] * len(RESET), "KV of the epoch before the reset was used"
    engine.quiet()
    engine.forget()
    identical.loads(engine, RESET)


def test_what_was_saved_before_a_reset_is_never_seen_again(engine: Engine, identical: Checker) -> None:
    answers = one_by_one(engine, LONG)
    identical(*answers)
    assert loaded(answers) == [0] * len(LONG)


def test_paused_with_saves_in_flight(engine: Engine, identical: Checker, sidecar: Sidecar) -> None:
    running = [engine.submit(prompt) for prompt in PAUSED]
    assert running[0].first.wait(60)
    with sidecar.stopped(supervisor=False):
        pausing = engine.start_call("pause", mode="keep", clear_cache=False)
        time.sleep(1)
    pausing.wait()
    engine.call("resume")
    identical(*(request.answer() for request in running))
    engine.quiet()
    engine.forget()
    identical.loads(engine, PAUSED)


@pytest.mark.parametrize("mode", ["wait", "abort"])
def test_paused_and_cleared_with_saves_in_flight(
    engine: Engine, identical: Checker, sidecar: Sidecar, mode: str
) -> None:
    """As before an update of the weights: what was saved before must not come back."""
    running = [engine.submit(prompt) for prompt in CLEARED]
    for request in running:
        assert request.first.wait(60)
    with sidecar.stopped(supervisor=False):
        pausing = engine.start_call("pause", mode=mode, clear_cache=True)
        time.sleep(1)
    pausing.wait()
    engine.call("resume")
    ended = [request.answer() for request in running]
    assert {answer.finish for answer in ended} <= ({"length"} if mode == "wait" else {"length", "abort"})
    answers = one_by_one(engine, CLEARED)
    identical(*answers)
    assert loaded(answers) == [0] * len(CLEARED)
    engine.quiet()
    engine.forget()
    identical.loads(engine, CLEARED)


def test_nothing_is_left_when_the_engine_has_gone(engine: Engine, sidecar: Sidecar) -> None:
    before = engine.stats()
    engine.stop()
    report = sidecar.idle()
    assert report["faults"] == dict.fromkeys(report["faults"], 0), report["faults"]
    print({name: count for name, count in before.items() if count})
    assert before.get("errors", 0) == 0
