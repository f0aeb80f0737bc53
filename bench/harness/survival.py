"""`survival`: what becomes of an engine's requests when its sidecar is killed, paused, or was never there.

Real vLLM under steady load, each time a fresh one: with Pillion, and with LMCache MP. Told are requests that got no
answer or a wrong one, the longest time in which nobody got an answer, and whether the engine lives.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from chaos.sidecar import Sidecar
from e2e.harness import TRANSFER, Answer, Engine, EngineError, Factory
from e2e.prompts import BLOCK, SOAK, Prompt
from e2e.world import MARGIN, Models
from harness.peers import QUIET, LmcacheServer, Unavailable, lmcache_python
from harness.report import Row

CLIENTS = 4
BEFORE_SECONDS = 4.0
AFTER_SECONDS, AFTER_QUICK = 45.0, 20.0
PATIENCE_SECONDS = 30.0
"""A request without an answer for so long is lost."""
OPTIONS: dict[str, Any] = {"num_gpu_blocks_override": 72, "max_model_len": 1024, "max_num_seqs": 8}
"""A cache so small that prompts come from the sidecar or are computed."""
PILLION, LMCACHE = "Pillion", "LMCache MP"
LMCACHE_TIMEOUT_SECONDS = 5
"""LMCache's default is 300: every scenario would be one long stall."""


class Server(Protocol):
    """What an engine depends on."""

    def kill(self) -> None: ...
    def revive(self) -> None:
        """As an operator's supervisor does."""

    def stop(self) -> None: ...
    def go_on(self) -> None: ...
    def transfer(self) -> dict[str, Any]: ...
    def surroundings(self) -> dict[str, str]: ...
    def close(self) -> None: ...


class Ours:
    def __init__(self) -> None:
        self.sidecar = Sidecar(host_pool="512MiB")
        self.sidecar.start()

    def kill(self) -> None:
        pids = (self.sidecar.supervisor_pid, self.sidecar.living_worker())
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        if self.sidecar.process is not None:
            self.sidecar.process.wait()

    def revive(self) -> None:
        self.sidecar.start()

    def stop(self) -> None:
        self.stopped = self.sidecar.stopped()
        self.stopped.__enter__()

    def go_on(self) -> None:
        self.stopped.__exit__(None, None, None)

    def transfer(self) -> dict[str, Any]:
        return {**TRANSFER, "kv_connector_extra_config": {"launch": False, "max_hold_fraction": 0.5}}

    def surroundings(self) -> dict[str, str]:
        return {key: value for key, value in self.sidecar.environment.items() if key.startswith("PILLION_")}

    def close(self) -> None:
        self.sidecar.close()


class Theirs:
    def __init__(self) -> None:
        self.servers = [self._start()]

    def _start(self, port: int | None = None) -> LmcacheServer:
        flags = ("--l1-size-gb", "1", "--chunk-size", str(BLOCK), "--supported-transfer-mode", "auto")
        shared = ("--shm-name", f"survival_{uuid.uuid4().hex[:8]}")
        return LmcacheServer(f"server-{time.monotonic_ns()}", *flags, *shared, port=port).await_ready()

    def kill(self) -> None:
        os.killpg(self.servers[-1].process.pid, signal.SIGKILL)
        self.servers[-1].process.wait()

    def revive(self) -> None:
        self.servers.append(self._start(self.servers[-1].port))

    def stop(self) -> None:
        os.killpg(self.servers[-1].process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self.servers[-1].process.pid, signal.SIGCONT)

    def transfer(self) -> dict[str, Any]:
        told = self.servers[0].transfer
        extra = {**told["kv_connector_extra_config"], "lmcache.mp.mq_timeout": LMCACHE_TIMEOUT_SECONDS}
        return {**told, "kv_load_failure_policy": "recompute", "kv_connector_extra_config": extra}

    def surroundings(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        for server in self.servers:
            server.close()


def nothing(_server: Server) -> None:
    pass


def killed(server: Server) -> None:
    """And back after two seconds."""
    server.kill()
    time.sleep(2)
    server.revive()


def killed_for_good(server: Server) -> None:
    server.kill()


def paused(server: Server) -> None:
    server.stop()
    time.sleep(10)
    server.go_on()


def stuck(server: Server) -> None:
    """Stopped, and never continued."""
    server.stop()


SCENARIOS: dict[str, Callable[[Server], None]] = {
    "nothing happens": nothing,
    "killed, back after 2 s": killed,
    "killed for good": killed_for_good,
    "paused for 10 s": paused,
    "stopped for good": stuck,
    "never there": nothing,
}
QUICK = ("killed, back after 2 s", "paused for 10 s")


@dataclass
class Outcome:
    answered: int = 0
    wrong: int = 0
    lost: int = 0
    ends: list[float] = field(default_factory=list)
    stall: float = 0.0
    alive: bool = False
    words: str | None = None


class Clients:
    """Ask, and go on asking whatever becomes of a request."""

    def __init__(self, engine: Engine, prompts: list[Prompt], right: dict[str, list[int]]) -> None:
        self.engine, self.prompts, self.right = engine, prompts, right
        self.outcome = Outcome()
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def _ask(self, number: int) -> None:
        turn = number * len(self.prompts) // CLIENTS
        while not self.over.is_set():
            prompt = self.prompts[turn % len(self.prompts)]
            turn += 1
            answer: Answer | None = None
            with suppress(EngineError):
                answer = self.engine.submit(prompt).answer(PATIENCE_SECONDS)
            with self.lock:
                if answer is None:
                    self.outcome.lost += 1
                else:
                    self.outcome.answered += 1
                    self.outcome.wrong += answer.tokens != self.right[prompt.name]
                    self.outcome.ends.append(time.monotonic())
            if self.engine.ended.is_set():
                return

    def stop(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(PATIENCE_SECONDS + 5)


class Bench:
    def __init__(self, quick: bool, stack: ExitStack) -> None:
        self.after = AFTER_QUICK if quick else AFTER_SECONDS
        self.scenarios = {name: SCENARIOS[name] for name in (QUICK if quick else SCENARIOS)}
        self.stack = stack
        self.model = Models().path("a")
        self.factories: dict[str, Factory] = {}

    def factory(self, name: str) -> Factory:
        if name not in self.factories:
            python = sys.executable if name == PILLION else lmcache_python()
            self.factories[name] = Factory([python, "-m", "harness.engine_main"])
            self.stack.callback(self.factories[name].close)
        return self.factories[name]

    def references(self) -> dict[str, list[int]]:
        """Only of prompts whose answers no order of summation changes."""
        engine = self.factory(PILLION).engine("plain", self.model, None, environment=dict(QUIET), **OPTIONS)
        answers = [engine.submit(one, logprobs=2).answer() for one in SOAK]
        engine.stop()
        return {one.prompt.name: one.tokens for one in answers if (one.gap or 0) > MARGIN}

    def run(self, name: str, scenario: str, right: dict[str, list[int]]) -> Outcome:
        prompts = [one for one in SOAK if one.name in right]
        server: Server = Ours() if name == PILLION else Theirs()
        engine: Engine | None = None
        try:
            if scenario == "never there":
                server.kill()
            options: dict[str, Any] = {**OPTIONS, "kv_transfer_config": server.transfer()}
            surroundings = {**QUIET, **server.surroundings()}
            try:
                engine = self.factory(name).engine(
                    "fresh", self.model, None, environment=surroundings, **options
                )
            except EngineError:
                return Outcome(words="the engine does not start")
            return self._under_load(engine, server, prompts, right, SCENARIOS[scenario])
        finally:
            if engine is not None:
                engine.kill()
            server.close()

    def _under_load(
        self,
        engine: Engine,
        server: Server,
        prompts: list[Prompt],
        right: dict[str, list[int]],
        fault: Callable[[Server], None],
    ) -> Outcome:
        # Twice: what it has stored, it has loaded too.
        for prompt in prompts * 2:
            engine.ask(prompt)
        clients = Clients(engine, prompts, right)
        time.sleep(BEFORE_SECONDS)
        begun = time.monotonic()
        fault(server)
        time.sleep(max(0.0, begun + self.after - time.monotonic()))
        asked = time.monotonic()
        clients.stop()
        outcome = clients.outcome
        with clients.lock:
            moments = [begun, *(end for end in outcome.ends if begun <= end <= asked), asked]
        outcome.stall = max(later - sooner for sooner, later in itertools.pairwise(moments))
        with suppress(EngineError):
            outcome.alive = (
                engine.submit(prompts[0]).answer(PATIENCE_SECONDS).tokens == right[prompts[0].name]
            )
        if engine.ended.is_set():
            outcome.words = "the engine died"
        return outcome


def rows_of(scenario: str, ours: Outcome, theirs: Outcome | None, why: str | None) -> list[Row]:
    """Counts stand beside each other; none of them is a ratio."""
    rows = []
    told: tuple[tuple[str, str, Callable[[Outcome], float]], ...] = (
        ("requests answered", "requests", lambda one: one.answered),
        ("requests lost", "requests", lambda one: one.lost),
        ("wrong answers", "requests", lambda one: one.wrong),
        ("longest time without an answer", "s", lambda one: round(one.stall, 2)),
        ("the engine answers afterwards", "yes = 1", lambda one: int(one.alive)),
    )
    for what, unit, of in told:
        note = "; ".join(
            f"{name}: {one.words}" for name, one in ((PILLION, ours), (LMCACHE, theirs)) if one and one.words
        )
        rows.append(
            Row(
                "faults",
                f"{scenario}: {what}",
                of(ours),
                LMCACHE,
                None if theirs is None else of(theirs),
                unit,
                None,
                None,
                None,
                1,
                None,
                note or why,
            )
        )
    return rows


def measure(quick: bool) -> list[Row]:
    rows: list[Row] = []
    with ExitStack() as stack:
        bench = Bench(quick, stack)
        right = bench.references()
        for scenario in bench.scenarios:
            ours = bench.run(PILLION, scenario, right)
            theirs, why = None, None
            try:
                theirs = bench.run(LMCACHE, scenario, right)
            except Unavailable as error:
                why = f"not measured: {error}"
            rows += rows_of(scenario, ours, theirs, why)
            print(f"    {scenario}: {ours and ours.lost} lost, stall {ours.stall:.1f} s; {LMCACHE}: {theirs}"[:300],
                  file=sys.stderr, flush=True)  # fmt: skip
    return rows
