"""Engine and sidecar end, as with a reboot: the prompts come back from the SSD, and the answers are the same."""

from __future__ import annotations

import os
import signal
from typing import Any

from chaos.sidecar import ended
from e2e.harness import Engine, Sidecar, until
from e2e.prompts import CHUNKED, GROWN, LONG, Prompt
from e2e.world import ATTEMPTS, Checker, World

PROMPTS = [*LONG, *CHUNKED, *GROWN]


def start(world: World, sidecar: Sidecar, name: str) -> Engine:
    """The shim starts the sidecar, which is told of its SSD by the engine's environment."""
    return world.engine(name, sidecar, environment={"PILLION_SSD": f"{sidecar.place}/ssd-{{device}}=1GiB"})


def ssd(sidecar: Sidecar) -> dict[str, Any]:
    status: dict[str, Any] = sidecar.status()["ssd"]
    return status


def end(sidecar: Sidecar, how: signal.Signals) -> None:
    pids = [sidecar.supervisor_pid, sidecar.worker_pid]
    for pid in pids if how == signal.SIGKILL else pids[:1]:
        os.kill(pid, how)
    until(lambda: all(ended(pid) for pid in pids), lambda: f"the sidecar ends\n{sidecar.explain()}", 30)


def comes_back(engine: Engine, identical: Checker, prompt: Prompt) -> None:
    """Until all of it came from Pillion. A disk or a machine that is slow makes a lookup shorter, never wrong, and what
    it was asked for is there the next time."""
    for _ in range(ATTEMPTS):
        answer = engine.ask(prompt)
        identical(answer)
        if answer.loaded == prompt.usable - answer.own:
            return
        engine.quiet()
        engine.forget()
    raise AssertionError(f"{prompt.name}: {ATTEMPTS} times less than {prompt.usable} tokens: {answer}")


def test_prompts_come_back_after_engine_and_sidecar_ended(world: World, identical: Checker) -> None:
    sidecar = world.sidecar()
    engine = start(world, sidecar, "before")
    try:
        answers = engine.ask_all(PROMPTS)
        identical(*answers)
        assert [answer.loaded for answer in answers] == [0] * len(PROMPTS)
        engine.quiet()
        blocks = sidecar.status()["pool"]["records"]
        assert blocks >= sum(prompt.blocks for prompt in LONG)
    finally:
        engine.stop()
    # In order: what was not written yet is written now.
    end(sidecar, signal.SIGTERM)
    for name, how in (("after-term", signal.SIGKILL), ("after-kill", signal.SIGTERM)):
        engine = start(world, sidecar, name)
        try:
            assert ssd(sidecar)["records"] == blocks
            for prompt in PROMPTS:
                comes_back(engine, identical, prompt)
            engine.quiet()
            now = ssd(sidecar)
            assert now["blocks_read"] >= sum(prompt.blocks for prompt in LONG), now
            assert (now["read_failures"], now["blocks_written"]) == (0, 0), now
        finally:
            engine.stop()
        end(sidecar, how)
