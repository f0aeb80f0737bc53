"""Kills and pauses of the sidecar under a real vLLM that works all the time."""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

from e2e.harness import Answer, Sidecar, until
from e2e.load import CLIENTS, Load
from e2e.prompts import SOAK
from e2e.world import MARGIN, Checker, World
from soak.report import Report, spread

SETTLE_SECONDS = 2.0
"""After a fault the sidecar has at most so long for itself."""


@dataclass
class Faults:
    """What happens to the sidecar. It has an SSD, so that engines find something after each of them."""

    sidecar: Sidecar
    ssd: str
    chance: random.Random

    def killed(self) -> None:
        self.sidecar.kill_worker()

    def killed_twice(self) -> None:
        """Again while it starts."""
        self.sidecar.kill_worker()
        self.sidecar.living_worker()
        time.sleep(self.chance.uniform(0, 0.1))
        self.sidecar.kill_worker()

    def replaced(self) -> None:
        """Worker and supervisor, and another pair by hand."""
        worker, supervisor = self.sidecar.living_worker(), self.sidecar.supervisor_pid
        os.kill(supervisor, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        time.sleep(self.chance.uniform(0, 0.5))
        self.sidecar.launch(f"--ssd={self.ssd}")

    def paused(self) -> None:
        with self.sidecar.stopped():
            time.sleep(self.chance.uniform(0.05, 3))

    def draw(self) -> tuple[str, Callable[[], None]]:
        kinds = (self.killed, self.killed_twice, self.replaced, self.paused)
        (kind,) = self.chance.choices(kinds, (6, 2, 2, 6))
        return kind.__name__, kind


def campaign(report: Report, args: argparse.Namespace) -> None:
    world = World()
    try:
        with tempfile.TemporaryDirectory(dir=args.dir) as disk:
            work(world, report, args.runs, f"{disk}/ssd=1GiB")
    finally:
        world.close()


def work(world: World, report: Report, runs: int, ssd: str) -> None:
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
        environment={"PILLION_SSD": ssd},
    )
    faults = Faults(sidecar, ssd, random.Random(report.seed))
    counts: dict[str, int] = {}
    answers: list[Answer] = []

    def take(load: Load) -> None:
        """Compares what has been answered since."""
        while load.answers:
            answers.append(load.answers.pop())
            check(answers[-1])

    load = Load(engine, prompts)
    try:
        until(lambda: len(load.answers) >= len(prompts) or load.errors, engine.explain, 120)
        while sum(counts.values()) < runs and report.failed < 20 and not load.errors:
            name, fault = faults.draw()
            counts[name] = counts.get(name, 0) + 1

            def one(fault: Callable[[], None] = fault) -> None:
                fault()
                time.sleep(faults.chance.uniform(0, SETTLE_SECONDS))
                take(load)

            report.attempt(report.seed, one)
            if sum(counts.values()) % 10 == 0:
                print(f"{counts}, {len(answers)} answers, {report.failed} failures", flush=True)
    finally:
        report.attempt(report.seed, load.stop)
    report.attempt(report.seed, lambda: take(load))
    held = -1

    def nothing_left() -> None:
        nonlocal held
        engine.quiet()
        held = engine.counters()["unquiesced"]
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
        "blocks_held_at_the_end": held,
        "request_ms": spread([answer.took * 1e3 for answer in answers]),
    }
