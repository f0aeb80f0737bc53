"""Clients that never stop asking."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from e2e.harness import Answer, Engine
from e2e.prompts import Prompt

CLIENTS = 4


@dataclass
class Load:
    """Clients that ask the same prompts over and over, each the next one when the last is answered."""

    engine: Engine
    prompts: list[Prompt]
    answers: list[Answer] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(n,)) for n in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _client(self, number: int) -> None:
        turn = number * len(self.prompts) // CLIENTS
        try:
            while not self._stop.is_set():
                self.answers.append(self.engine.ask(self.prompts[turn % len(self.prompts)]))
                turn += 1
        except BaseException as error:
            self.errors.append(error)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    @property
    def slowest(self) -> float:
        return max(answer.took for answer in self.answers)

    def report(self, name: str) -> str:
        steps = sorted(b - a for one in self.answers for a, b in zip(one.times, one.times[1:], strict=False))
        middle, late = steps[len(steps) // 2], steps[len(steps) * 99 // 100]
        return (
            f"{name}: {len(self.answers)} requests, {sum(bool(one.loaded) for one in self.answers)} loaded; "
            f"slowest request {self.slowest:.2f} s; steps p50 {middle * 1e3:.0f} ms, p99 {late * 1e3:.0f} ms, "
            f"longest {steps[-1] * 1e3:.0f} ms"
        )
