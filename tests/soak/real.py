"""Kills and pauses of the sidecar under a real vLLM that works all the time."""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from collections.abc import Callable

from e2e.harness import Answer, Sidecar, until
from e2e.load import CLIENTS, Load
from e2e.prompts import SOAK
from e2e.world import MARGIN, Checker, World
from soak.report import Report, spread

Fault = Callable[[Sidecar, random.Random], None]
SETTLE_SECONDS = 3.0
"""After a fault the sidecar has at most so long for itself."""


def killed(sidecar: Sidecar, chance: random.Random) -> None:
    sidecar.kill_worker()


def killed_twice(sidecar: Sidecar, chance: random.Random) -> None:
    """Again while it starts."""
    sidecar.kill_worker()
    sidecar.living_worker()
    time.sleep(chance.uniform(0, 0.1))
    sidecar.kill_worker()


def replaced(sidecar: Sidecar, chance: random.Random) -> None:
    """Worker and supervisor, and another pair by hand."""
    worker, supervisor = sidecar.living_worker(), sidecar.supervisor_pid
    os.kill(supervisor, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    time.sleep(chance.uniform(0, 0.5))
    sidecar.launch()


def paused(sidecar: Sidecar, chance: random.Random) -> None:
    with sidecar.stopped():
        time.sleep(chance.uniform(0.05, 3))


FAULTS: dict[str, tuple[Fault, int]] = {
    "killed": (killed, 6),
    "killed_twice": (killed_twice, 2),
    "replaced": (replaced, 2),
    "paused": (paused, 6),
}
"""With how often each comes."""


def campaign(report: Report, args: argparse.Namespace) -> None:
    world = World()
    try:
        work(world, report, args.runs)
    finally:
        world.close()


def work(world: World, report: Report, runs: int) -> None:
    chance = random.Random(report.seed)
    references = world.reference(prompts=SOAK)
    # Where two tokens are equally likely, another order of summation may choose the other one.
    prompts = [one for one in SOAK if (references[one.name].gap or 0) > MARGIN]
    check = Checker(world, references)
    sidecar = world.sidecar()
    engine = world.engine(
        "soak",
        sidecar,
        num_gpu_blocks_override=72,
        max_model_len=1024,
        extra={"max_hold_fraction": 0.5},
    )
    counts = dict.fromkeys(FAULTS, 0)
    answers: list[Answer] = []
    took: list[float] = []

    def take(load: Load) -> None:
        """Compares what has been answered since."""
        while load.answers:
            answer = load.answers.pop()
            answers.append(answer)
            took.append(answer.took * 1e3)
            check(answer)

    load = Load(engine, prompts)
    try:
        until(lambda: len(load.answers) >= CLIENTS or load.errors, engine.explain, 60)
        while sum(counts.values()) < runs and report.failed < 20 and not load.errors:
            name = chance.choices(list(FAULTS), [weight for _, weight in FAULTS.values()])[0]
            counts[name] += 1

            def one(name: str = name) -> None:
                FAULTS[name][0](sidecar, chance)
                time.sleep(chance.uniform(0, SETTLE_SECONDS))
                take(load)

            report.attempt(report.seed, one)
            if sum(counts.values()) % 10 == 0:
                print(f"{counts}, {len(answers)} answers, {report.failed} failures", flush=True)
    finally:
        report.attempt(report.seed, load.stop)
    report.attempt(report.seed, lambda: take(load))
    left = 0

    def nothing_left() -> None:
        nonlocal left
        left = -1
        engine.quiet()
        left = engine.counters()["unquiesced"]
        # vLLM refuses this while any block is held.
        engine.forget()
        check(*engine.ask_all(prompts[:CLIENTS]))
        engine.stop()
        sidecar.idle()

    report.attempt(report.seed, nothing_left)
    report.counts = {
        "faults": counts,
        "faults_in_all": sum(counts.values()),
        "requests": len(answers),
        "requests_that_loaded": sum(bool(answer.loaded) for answer in answers),
        "preemptions": sum(answer.preemptions for answer in answers),
        "wrong_answers": sum("plain vLLM answers" in text for text in report.failures),
        "hung_requests": sum("no answer within" in text for text in report.failures),
        "blocks_held_at_the_end": left,
        "request_ms": spread(took),
    }
