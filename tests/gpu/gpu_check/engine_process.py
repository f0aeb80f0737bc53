"""An engine in a process of its own, at the orders of the check: one JSON object a line, in and out.

{"do": "save", "with": {…}} is answered by {"value": …}, {"failed": text} where an assertion did not hold, or
{"error": text} for everything else that was raised.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from chaos.engine import DONE, NAMES, Job, Shape, chain
from gpu_check.device import DriverDevice, make
from gpu_check.engine import DeviceEngine
from gpu_check.measure import Measure

PR_SET_PDEATHSIG = 1


class Session(Measure):
    """What can be asked for."""

    def __init__(self) -> None:
        self.device: DriverDevice | None = None
        self.open_engine: DeviceEngine | None = None
        self.started: list[tuple[Job, float]] = []
        """With the time at which the order came."""

    @property
    def engine(self) -> DeviceEngine:
        assert self.open_engine, "expected an engine that was opened"
        return self.open_engine

    def use(self, device: str) -> dict[str, Any]:
        """The first thing that is asked for."""
        self.device = make(device)
        return {"pid": os.getpid(), "name": self.device.driver.name(0)}

    def open(
        self, *, socket: str, shape: dict[str, Any], ready: bool = True, **options: Any
    ) -> dict[str, Any]:
        assert self.device
        self.open_engine = DeviceEngine(Path(socket), shape=Shape(**shape), device=self.device, **options)
        if ready:
            self.open_engine.await_ready(30)
        return {"checked": self.open_engine.worker.canary_checked()}

    def await_ready(self, seconds: float = 30) -> None:
        self.engine.await_ready(seconds)

    def close(self) -> None:
        if self.open_engine:
            self.open_engine.check()
            self.open_engine.close()
            self.open_engine = None

    def told(self) -> str:
        return self.engine.told()

    def free_bytes(self) -> int:
        assert self.device
        return self.device.free_bytes()

    def counters(self) -> dict[str, int]:
        return self.engine.worker.counters()

    # ---- jobs ------------------------------------------------------------

    def save(self, prompt: str, count: int, deadline_ms: int = 30_000, delay_ms: float = 0) -> int:
        """Starts it: its number. `delay_ms`: the stream stands still for so long before it computes the blocks."""
        begun = time.monotonic()
        if delay_ms:
            self.engine.device.delay(delay_ms)
        return self._started(self.engine.save(chain(prompt, count), deadline_ms=deadline_ms), begun)

    def _started(self, job: Job, begun: float) -> int:
        self.started.append((job, begun))
        return len(self.started) - 1

    def load(self, prompt: str, count: int, deadline_ms: int = 30_000, delay_ms: float = 0) -> int:
        """Likewise. `delay_ms`: before it zeroes the blocks."""
        begun = time.monotonic()
        if delay_ms:
            self.engine.device.delay(delay_ms)
        job = self.engine.load(chain(prompt, count), deadline_ms=deadline_ms)
        assert job, f"expected hits of {prompt}, got none: {self.engine.told()}"
        assert len(job.hashes) == count, f"expected {count} hits of {prompt}, got {len(job.hashes)}"
        return self._started(job, begun)

    def wait(self, job: int, seconds: float = 60) -> dict[str, Any]:
        """Until it has ended and quiesced."""
        found, begun = self.started[job]
        self.engine.wait(found, seconds)
        return {
            "outcome": NAMES[found.outcome or 0],
            "took": found.ended_at - found.submitted,
            "since": found.ended_at - begun,
            "blocks": found.blocks_done,
        }

    def settle(self, seconds: float = 60) -> list[str]:
        """Until no job is left: how each of those ended that were started since the last time."""
        self.engine.settle(seconds)
        ended = [NAMES[job.outcome or 0] for job, _ in self.started]
        self.started = []
        return ended

    def done(self, job: int, seconds: float = 60) -> dict[str, Any]:
        found = self.wait(job, seconds)
        assert found["outcome"] == NAMES[DONE], f"{self.started[job][0]}; {self.engine.told()}"
        return found

    def quiet(self) -> None:
        """Until the stream has done all that was queued: the events of all jobs are reached."""
        self.engine.device.wait()

    def lookup(self, prompt: str, count: int) -> int:
        return self.engine.lookup(chain(prompt, count))

    def await_hits(self, prompt: str, count: int, seconds: float = 10) -> None:
        """A save may be done a moment before its last block can be found."""
        hashes = chain(prompt, count)
        self.engine.wait_for(
            lambda: self.engine.lookup(hashes) == count, f"{count} hits of {prompt}", seconds
        )

    def save_and_load(self, prompt: str, count: int, jobs: int = 1) -> float:
        """Whole errands, the jobs at once; every byte is compared."""
        begun = time.monotonic()
        for kind in (self.save, self.load):
            numbers = [kind(f"{prompt}-{index}", count) for index in range(jobs)]
            for number in numbers:
                self.done(number)
            if kind == self.save:
                for index in range(jobs):
                    self.await_hits(f"{prompt}-{index}", count)
        self.settle()
        return time.monotonic() - begun

    def load_all(self, prompt: str, count: int, jobs: int = 1) -> None:
        for index in range(jobs):
            self.await_hits(f"{prompt}-{index}", count)
        for number in [self.load(f"{prompt}-{index}", count) for index in range(jobs)]:
            self.done(number)
        self.settle()

    def cut_short(self, prompt: str, count: int, rounds: int, seed: int) -> dict[str, int]:
        """Loads and saves with deadlines from "at once" to "in time". What they leave behind is checked."""
        chance, ended = random.Random(seed), dict.fromkeys(("load done", "load failed"), 0)
        whole = self.done(self.save(prompt, count))["took"]
        self.await_hits(prompt, count)
        whole = max(whole, self.done(self.load(prompt, count))["took"])
        for index in range(rounds):
            deadline = 0 if index == 0 else int(chance.uniform(0, 1.1) * whole * 1000)
            found = self.wait(self.load(prompt, count, deadline_ms=deadline))
            ended[f"load {found['outcome']}"] = ended.get(f"load {found['outcome']}", 0) + 1
            name = f"{prompt}-cut-{index}"
            deadline = int(chance.uniform(0, 1.1) * whole * 1000)
            found = self.wait(self.save(name, count, deadline_ms=deadline))
            ended[f"save {found['outcome']}"] = ended.get(f"save {found['outcome']}", 0) + 1
            hits = self.engine.lookup(chain(name, count))
            # Its blocks were scribbled over when it quiesced: what is served must be what was there before.
            if hits:
                self.done(self.load(name, hits))
        self.settle()
        return ended

    # ---- the sidecar goes, or we do --------------------------------------------

    def attaches(self) -> list[int]:
        return list(self.engine.attaches())

    def await_again(self, before: list[int], seconds: float = 30) -> None:
        self.engine.await_again((before[0], before[1]), seconds)

    def sleep(self, wait_ms: int = 5000) -> bool:
        return self.engine.sleep(wait_ms)

    def wake(self) -> None:
        self.engine.wake()
        self.engine.await_ready(30)

    def jobs_while_asleep(self) -> list[str]:
        """They are not taken, and end at once."""
        engine, ended = self.engine, []
        one, space = os.urandom(32), bytes(16)
        engine.worker.submit_save(os.urandom(16), space, [(0, b"", 1)], one, [1], 1000, **engine._after())
        engine.worker.submit_load(
            os.urandom(16), bytes(16), space, [(0, 0, 0, 1)], one, [1], 1000, **engine._after()
        )
        for _, outcome, quiesced, _ in engine.worker.poll():
            ended.append(NAMES[outcome] + (", quiesced" if quiesced else ""))
        return ended

    def content_start(self, prompt: str, block: int) -> str:
        """The first bytes of a record, as hex digits."""
        return self.engine.expected(chain(prompt, block + 1)[block])[:64].hex()


def answer(session: Session, line: str) -> dict[str, Any]:
    order = json.loads(line)
    try:
        return {"value": getattr(session, order["do"])(**order.get("with", {}))}
    except AssertionError as error:
        return {"failed": str(error) or traceback.format_exc()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}


def main() -> None:
    # Nobody gives orders any more: then there is nothing to do either.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints does not print among the answers
    session = Session()
    for line in sys.stdin:
        out.write(json.dumps(answer(session, line)) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
