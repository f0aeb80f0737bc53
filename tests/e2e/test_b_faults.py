"""A restarted engine against a living sidecar, and a sidecar that falls ill under load."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from e2e.harness import Engine, Sidecar, until
from e2e.load import Load
from e2e.prompts import AFTER, LOAD, LONG, TIGHT
from e2e.world import REPORT, Checker, World

BLOCKS = 72
"""Of the KV cache: a few requests fill it, so that requests are preempted and nothing stays for long."""
LOAD_DEADLINE = 2.0
SLACK = 8.0
"""For a machine that others use too."""


@pytest.fixture(scope="module")
def sidecar(world: World, identical: Checker) -> Sidecar:
    """One that a first engine has filled, and left."""
    sidecar = world.sidecar()
    engine = world.engine("filler", sidecar)
    for prompts in (LONG[2:], TIGHT):
        identical(*engine.ask_all(prompts))
        engine.quiet()
    engine.stop()
    return sidecar


@pytest.fixture(scope="module")
def engine(world: World, sidecar: Sidecar) -> Iterator[Engine]:
    engine = world.engine(
        "tiny",
        sidecar,
        num_gpu_blocks_override=BLOCKS,
        max_model_len=1024,
        extra={"max_hold_fraction": 0.5},
    )
    yield engine
    engine.stop()


def under_load(engine: Engine, name: str, fault: Callable[[], None]) -> Load:
    load = Load(engine, LOAD[name])
    try:
        until(lambda: len(load.answers) >= len(load.prompts) or load.errors, engine.explain, 60)
        fault()
        enough = len(load.answers) + len(load.prompts)
        until(lambda: len(load.answers) >= enough or load.errors, engine.explain, 60)
    finally:
        load.stop()
    REPORT.append(load.report(name))
    return load


@pytest.fixture(scope="module")
def healthy(engine: Engine) -> Load:
    """The same load with nothing wrong."""
    load = under_load(engine, "none", lambda: time.sleep(3))
    assert any(answer.loaded for answer in load.answers), (
        "expected the tiny cache to evict, and Pillion to load"
    )
    return load


def test_a_restarted_engine_loads_what_the_last_one_saved(engine: Engine, identical: Checker) -> None:
    identical.loads(engine, LONG[2:])


def test_preempted_requests_answer_the_same(engine: Engine, identical: Checker) -> None:
    before = engine.stats()["preemptions"]
    answers = engine.ask_all(TIGHT)
    identical(*answers)
    assert sum(answer.loaded for answer in answers) > 0
    preempted = engine.stats()["preemptions"] - before
    print(f"{preempted} preemptions, {sum(bool(answer.loaded) for answer in answers)} requests loaded")
    assert preempted > 0, "expected a KV cache this small to preempt"


def kill_worker(sidecar: Sidecar) -> None:
    sidecar.kill_worker()
    time.sleep(2)


def kill_all(sidecar: Sidecar) -> None:
    """Both gone, and a new pair started by hand within a heartbeat."""
    worker, supervisor = sidecar.worker_pid, sidecar.supervisor_pid
    os.kill(supervisor, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    sidecar.launch()
    time.sleep(1)


def stop_for(seconds: float, *, supervisor: bool) -> Callable[[Sidecar], None]:
    def fault(sidecar: Sidecar) -> None:
        with sidecar.stopped(supervisor=supervisor):
            time.sleep(seconds)

    return fault


def unlink(sidecar: Sidecar) -> None:
    sidecar.socket.unlink()
    time.sleep(2)


FAULTS: dict[str, Callable[[Sidecar], None]] = {
    "killed": kill_worker,
    "stopped": stop_for(3, supervisor=True),
    "muted": stop_for(9, supervisor=False),  # long enough for the supervisor to end the worker
    "restarted": kill_all,
    "unlinked": unlink,
    "minute": stop_for(60, supervisor=True),
}


@pytest.mark.parametrize("name", FAULTS)
def test_requests_outlive_their_sidecar(
    engine: Engine, identical: Checker, sidecar: Sidecar, healthy: Load, name: str
) -> None:
    identical(*healthy.answers)
    load = under_load(engine, name, lambda: FAULTS[name](sidecar))
    identical(*load.answers)
    assert load.slowest < healthy.slowest + LOAD_DEADLINE + SLACK, load.report(name)
    hits_return(engine, identical, name)


def hits_return(engine: Engine, identical: Checker, name: str) -> None:
    """Without a restart of the engine: what is saved from now on is loaded again."""

    def again() -> bool:
        identical(*engine.ask_all(AFTER[name]))
        engine.quiet()
        engine.forget()
        answers = engine.ask_all(AFTER[name])
        identical(*answers)
        return all(answer.loaded for answer in answers)

    until(again, lambda: f"hits return after {name}\n{engine.explain()}", 60, pause=0.5)


def test_nothing_is_left_when_the_engine_has_gone(engine: Engine, sidecar: Sidecar) -> None:
    stats = engine.stats()
    print({name: count for name, count in stats.items() if count})
    engine.stop()
    report = sidecar.idle()
    assert report["faults"] == dict.fromkeys(report["faults"], 0), report["faults"]
