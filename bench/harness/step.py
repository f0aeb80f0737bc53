"""`step` (P7): the time that vLLM spends inside our connector's hooks, beside lookup and leases, which are P5.

vLLM's real Scheduler and both of the connector's halves, as the unit tests drive them, with the real client and a
real sidecar; only the model is simulated. Every call of a hook is timed, and within it every question to the client
that P5 counts (`lookup`, `present`, `lease`, `lease_poll`, `release`), which is taken off.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

from chaos.sidecar import Sidecar, until
from harness.report import Row
from unit import vllm_harness

STEP_US, REQUEST_US = 10.0, 100.0
PROMPT_TOKENS = 1000
ANSWER_TOKENS = 4
BLOCKS = 1200
FORWARD_SECONDS = 0.001
"""What a forward pass takes at least: caches are not as warm after it as they are in a loop."""
DECODED = 12
"""Tokens of an answer whose steps are looked at: fewer than a block has, so that none is filled."""
REQUESTS, REQUESTS_QUICK = 60, 20
FIRST = 10
"""Requests after attaching that are shown by themselves: they find the presence table's pages unmapped."""
WARM_UP = 30
"""Requests after those, which are not measured."""
IDLE_ROUNDS, IDLE_ROUNDS_QUICK = 30, 6
ASKED = ("lookup", "present", "lease", "lease_poll", "release")

HOOKS = {
    "scheduler": (
        "on_new_request",
        "get_num_new_matched_tokens",
        "update_state_after_alloc",
        "build_connector_meta",
        "update_connector_output",
        "request_finished",
        "request_finished_all_groups",
        "has_pending_push_work",
        "has_pending_block_frees",
        "take_events",
    ),
    "worker": (
        "handle_preemptions",
        "bind_connector_metadata",
        "start_load_kv",
        "wait_for_save",
        "get_transfer_results",
        "get_block_ids_with_load_errors",
        "get_kv_connector_stats",
        "build_connector_worker_meta",
        "clear_connector_metadata",
    ),
}


@dataclass(frozen=True)
class Spent:
    """Microseconds of the clock on the wall, and of the processor: on a busy machine they are not the same."""

    wall: float = 0.0
    cpu: float = 0.0

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.cpu - other.cpu)

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall + other.wall, self.cpu + other.cpu)

    def times(self, count: float) -> Spent:
        return Spent(self.wall * count, self.cpu * count)


def median(values: list[Spent]) -> Spent:
    return Spent(statistics.median(one.wall for one in values), statistics.median(one.cpu for one in values))


@dataclass
class Clock:
    """Time within hooks so far, without what P5 counts and what measuring itself takes."""

    spent: Spent = Spent()
    depth: int = 0
    by_name: dict[str, float] = field(default_factory=dict)
    """Microseconds on the wall."""
    hook_costs: Spent = Spent()
    question_costs: Spent = Spent()

    def __post_init__(self) -> None:
        """What an empty hook, and an empty question in one, would be taken for."""
        hook, asking = self.hook("", int), self.hook("", self.question(int))
        for call, name in ((hook, "hook_costs"), (asking, "question_costs")):
            taken = []
            for _ in range(500):
                before = self.spent
                call()
                taken.append(self.spent - before)
            setattr(self, name, median(taken))
        self.spent = Spent()
        self.by_name.clear()

    def hook(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            if self.depth:  # a hook that calls another
                return call(*args, **options)
            self.depth += 1
            before, cpu, wall = self.spent, time.thread_time_ns(), time.perf_counter_ns()
            try:
                return call(*args, **options)
            finally:
                wall = time.perf_counter_ns() - wall
                cpu = time.thread_time_ns() - cpu
                self.depth -= 1
                self.spent += Spent(wall / 1000, cpu / 1000) - self.hook_costs
                self.by_name[name] = self.by_name.get(name, 0.0) + (self.spent - before).wall

        return timed

    def question(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            if not self.depth:
                return call(*args, **options)
            cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
            try:
                return call(*args, **options)
            finally:
                wall = time.perf_counter_ns() - wall
                cpu = time.thread_time_ns() - cpu
                self.spent -= Spent(wall / 1000, cpu / 1000) + self.question_costs

        return timed


class Asked:
    """A client of the scheduler's half whose questions are timed."""

    def __init__(self, client: Any, clock: Clock) -> None:
        self._client = client
        for name in ASKED:
            setattr(self, name, clock.question(getattr(client, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class Native:
    """`pillion._native` as the connector gets it, with what the simulated worker expects of a fake one."""

    def __init__(self, clock: Clock) -> None:
        from pillion import _native

        self._native = _native
        self._clock = clock
        self.memory: Any = None
        self.scheduler: Any = None
        self.worker: Any = None

    def SchedulerClient(self, **options: Any) -> Any:
        self.scheduler = Asked(self._native.SchedulerClient(**options), self._clock)
        return self.scheduler

    def WorkerClient(self, **options: Any) -> Any:
        self.worker = self._native.WorkerClient(**options)
        return self.worker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)


class Engine(vllm_harness.Engine):
    """The simulated engine with a real client. Its blocks hold nothing: what would be in them is not looked at."""

    def __init__(self, socket: Path, place: Path) -> None:
        self.clock = Clock()
        self.source = Native(self.clock)
        extra = {"socket": str(socket), "launch": False, "start_wait_ms": 10_000}
        native: Any = self.source
        super().__init__(native, place, num_blocks=BLOCKS, max_batched=1024, extra=extra)
        for role, connector in (("scheduler", self.connector), ("worker", self.worker)):
            for name in HOOKS[role]:
                if hasattr(connector, name):
                    setattr(connector, name, self.clock.hook(name, getattr(connector, name)))
        self.numbers = 0

    def _compute(self, *_args: Any) -> None:
        """No model."""

    def fresh(self) -> tuple[str, list[int]]:
        """A request's name, and a prompt that nobody had before."""
        self.numbers += 1
        return f"r{self.numbers}", vllm_harness.prompt(PROMPT_TOKENS, seed=self.numbers)

    def settle(self) -> None:
        """Until no job is left: steps without requests, as an engine takes while blocks are held."""

        def quiet() -> bool:
            if not self.half.holds.held:
                return True
            self.step()
            return False

        until(quiet, "the jobs to end", 30)

    def forget(self) -> None:
        self.settle()
        until(self.scheduler.reset_prefix_cache, "vLLM empties its cache", 30)

    def close(self) -> None:
        self.connector.shutdown()
        self.worker.shutdown()


# ---- what is measured


def idle_steps(engine: Engine, running: int, rounds: int, pause: float) -> list[Spent]:
    """Time within hooks, for each step in which so many requests decode and nothing is to be done."""
    took: list[Spent] = []
    for _ in range(rounds):
        names = []
        for _ in range(running):
            name, _ = engine.fresh()
            # Short, and past the edge of a block: all of the answer goes into one.
            engine.add(name, vllm_harness.prompt(34, seed=engine.numbers), max_tokens=DECODED)
            names.append(name)
        for _ in range(3):
            engine.step()
        engine_quiet(engine)
        while all(name in engine.scheduler.requests for name in names):
            time.sleep(pause)
            before = engine.clock.spent
            engine.step()
            if all(name in engine.scheduler.requests for name in names):
                took.append(engine.clock.spent - before)
        engine.run()
        engine.settle()
    return took


def engine_quiet(engine: Engine) -> None:
    """A moment for jobs to end, so that the next step hears of it and those after have nothing to do."""
    time.sleep(0.02)
    engine.step()
    assert not engine.half.holds.held or engine.half.refused, "expected no job to be under way"


def one_request(engine: Engine, name: str, prompt: list[int], step: Spent) -> Spent:
    """Time within hooks over a request's life, and until its jobs are over, beyond those of idle steps."""
    before, steps = engine.clock.spent, engine.steps
    engine.add(name, prompt, max_tokens=ANSWER_TOKENS)
    while engine.scheduler.has_requests():
        engine.step()
        time.sleep(FORWARD_SECONDS)
    while engine.half.holds.held:
        engine.step()
        time.sleep(FORWARD_SECONDS)
    return engine.clock.spent - before - step.times(engine.steps - steps)


def requests(engine: Engine, count: int, step: Spent) -> tuple[list[Spent], list[Spent]]:
    """Of requests that are new and saved, and of the same again, which are loaded."""
    new, found = [], []
    for _ in range(count):
        name, prompt = engine.fresh()
        new.append(one_request(engine, name, prompt, step))
        engine.forget()
        again = f"{name}-again"
        found.append(one_request(engine, again, prompt, step))
        loaded = (engine.params[again] or {}).get("pillion", {}).get("loaded_tokens", 0)
        if not loaded:
            found.pop()  # a miss, which a busy machine makes of a late answer: not what is measured
        engine.forget()
    return new, found


class Bench:
    def __init__(self, quick: bool, stack: ExitStack) -> None:
        self.requests = REQUESTS_QUICK if quick else REQUESTS
        self.rounds = IDLE_ROUNDS_QUICK if quick else IDLE_ROUNDS
        self.stack = stack
        self.place = Path(tempfile.mkdtemp(prefix="pbs-", dir="/tmp"))
        stack.callback(rmtree, self.place, ignore_errors=True)
        self.rows: list[Row] = []

    def engine(self, socket: Path, *, ready: bool) -> Engine:
        engine = Engine(socket, self.place / "model")
        self.stack.callback(engine.close)
        if ready:
            source = engine.source
            until(lambda: source.scheduler.ready() and source.worker.ready(), source.worker.status, 20)
        return engine

    def measure(self, engine: Engine, state: str, *, found: bool) -> None:
        step = Spent()
        for running in (32, 1):
            for pause, apart in ((0.0, "back to back"), (FORWARD_SECONDS, "1 ms apart")):
                steps = idle_steps(engine, running, self.rounds, pause)
                step = median(steps)
                self._row(f"a step with nothing to do, {running} running, {apart}, {state}", steps, STEP_US)
        # That of the last: a single request, with as long between its steps.
        if found:
            first, _ = requests(engine, FIRST, step)
            self._row(f"one of the first {FIRST} requests after attaching, new, {state}", first, REQUEST_US)
            requests(engine, WARM_UP, step)
        engine.clock.by_name.clear()
        new, again = requests(engine, self.requests, step)
        self._row(f"a request, {PROMPT_TOKENS} tokens, new, {state}", new, REQUEST_US)
        if found:
            self._row(f"a request, {PROMPT_TOKENS} tokens, found and loaded, {state}", again, REQUEST_US)
        each = {name: spent / (2 * self.requests) for name, spent in engine.clock.by_name.items()}
        shown = sorted(each.items(), key=lambda item: -item[1])
        print(f"    {state}: mean µs per request and hook, with its steps:", file=sys.stderr)
        print("   ", ", ".join(f"{name} {us:.1f}" for name, us in shown), file=sys.stderr, flush=True)

    def _row(self, case: str, values: list[Spent], limit: float) -> None:
        if not values:
            self.rows.append(Row.without("P7", case, f"{limit:g} µs", "µs", "it did not happen"))
            return
        walls = sorted(one.wall for one in values)
        note = (
            f"p99 {walls[int(len(walls) * 0.99)]:.1f} µs; of the processor {median(values).cpu:.1f} µs at p50"
        )
        self.rows.append(Row.within("P7", f"{case}, p50", walls, limit, "µs", note=note))

    def run(self) -> None:
        absent = self.engine(self.place / "nobody.sock", ready=False)
        self.measure(absent, "no sidecar", found=False)
        sidecar = Sidecar(host_pool="512MiB")
        self.stack.callback(sidecar.close)
        sidecar.start()
        engine = self.engine(sidecar.socket, ready=True)
        self.measure(engine, "sidecar", found=True)
        # Killed with its supervisor, so that none comes back.
        supervisor = sidecar.process
        assert supervisor is not None
        worker = sidecar.worker_pid
        supervisor.kill()
        supervisor.wait()
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        time.sleep(2)
        self.measure(engine, "sidecar killed", found=False)


def measure(quick: bool) -> list[Row]:
    """All rows of `step`."""
    with ExitStack() as stack:
        bench = Bench(quick, stack)
        bench.run()
        return bench.rows
