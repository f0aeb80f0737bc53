"""Engines and sidecars of these tests: started, driven, shown where a test fails, ended."""

from __future__ import annotations

import itertools
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.sidecar import Sidecar as ChaosSidecar
from e2e.prompts import BLOCK, Prompt

HERE = Path(__file__).parent
START_SECONDS = 300.0
REQUEST_SECONDS = 120.0
TRANSFER: dict[str, Any] = {
    "kv_connector": "PillionConnector",
    "kv_connector_module_path": "pillion.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
OFFLINE = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # questions to the worker that vLLM has no name for
    "HF_HUB_OFFLINE": "1",
}


def until(
    condition: Callable[[], Any], what: Callable[[], str], seconds: float = 30.0, pause: float = 0.05
) -> Any:
    """Polls until the condition holds, and says what was waited for if it never does."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s in vain: {what()}")
        time.sleep(pause)
    return value


class Sidecar(ChaosSidecar):
    """The places of a sidecar that the engines' shim starts itself; `start()` starts one by hand."""

    def __init__(self) -> None:
        super().__init__(host_pool="512MiB")

    def launch(self, *flags: str) -> None:
        """Starts one by hand, as a user or another engine would."""
        done = self.command("serve", "--detach", "--host-pool=512MiB", "--http=off", *flags)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"

    def idle(self) -> dict[str, Any]:
        """Waits until no engine, lease or job is left, and gives the report."""

        def clean() -> dict[str, Any] | None:
            report = self.try_status()
            if report is None:
                return None
            left = [session for session in report["sessions"] if session["role"] != "observer"]
            busy = left or report["leases"]["held"] or report["pool"]["leased_bytes"]
            return None if busy else report

        report: dict[str, Any] = until(
            clean, lambda: f"no session, lease or job is left\n{self.explain()}", 45
        )
        return report


@dataclass(frozen=True)
class Answer:
    """One request's end."""

    prompt: Prompt
    tokens: list[int]
    finish: str
    cached: int
    """Tokens that were not computed: vLLM's own cache and ours."""
    loaded: int
    """Tokens that Pillion loaded."""
    preemptions: int
    times: list[float]
    took: float
    gap: float | None

    @property
    def own(self) -> int:
        """Tokens from vLLM's own prefix cache."""
        return self.cached - self.loaded

    @property
    def slowest_step(self) -> float:
        return max((b - a for a, b in itertools.pairwise(self.times)), default=0.0)


class EngineError(AssertionError):
    pass


class Pending:
    """An operation that the engine has not answered yet."""

    def __init__(self, engine: Engine, number: int, prompt: Prompt | None) -> None:
        self.engine = engine
        self.number = number
        self.prompt = prompt
        self.first = threading.Event()
        self.inbox: queue.Queue[dict[str, Any]] = queue.Queue()

    def wait(self, seconds: float = REQUEST_SECONDS) -> Any:
        try:
            message = self.inbox.get(timeout=seconds)
        except queue.Empty:
            raise EngineError(f"no answer within {seconds} s\n{self.engine.explain()}") from None
        if "error" in message:
            raise EngineError(f"{message['error']}\n{self.engine.explain()}")
        return None if message.get("aborted") else message["ok"]

    def answer(self, seconds: float = REQUEST_SECONDS) -> Answer:
        assert self.prompt is not None
        got = self.wait(seconds)
        assert got is not None, f"{self.prompt.name} was aborted"
        return Answer(prompt=self.prompt, **got)

    def abort(self) -> None:
        """Cancels the request; waits until it is gone from the frontend."""
        self.engine.call("abort", request=self.number)
        self.inbox.get(timeout=REQUEST_SECONDS)


class Engine:
    """A vLLM engine in processes of its own."""

    def __init__(
        self, factory: Factory, name: str, options: dict[str, Any], environment: dict[str, str]
    ) -> None:
        self.name = name
        self.log = factory.place / f"{name}.log"
        self.connection = factory.connect()
        self.pending: dict[int, Pending] = {}
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()
        self.ready: queue.Queue[dict[str, Any]] = queue.Queue()
        self.ended = threading.Event()
        self._send({"log": str(self.log), "options": options, "environment": {**OFFLINE, **environment}})
        self.group = 0
        threading.Thread(target=self._read, daemon=True).start()
        self.started = self._await_ready()
        self.num_blocks: int = self.started["num_blocks"]

    def _send(self, message: dict[str, Any]) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def _await_ready(self) -> dict[str, Any]:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                message = self.ready.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                self.kill()
                raise EngineError(f"{self.name} did not start\n{self.explain()}") from None
            if "group" in message:
                self.group = message["group"]
            elif "ready" in message:
                return message
            else:
                raise EngineError(f"{self.name} did not start: {message['fatal']}\n{self.explain()}")

    def _read(self) -> None:
        with self.connection.makefile("rb") as lines:
            try:
                for line in lines:
                    self._take(json.loads(line))
            except OSError:
                pass
        self.ended.set()
        self.ready.put({"fatal": "the connection ended"})
        with self.lock:
            left, self.pending = list(self.pending.values()), {}
        for pending in left:
            pending.inbox.put({"error": f"{self.name} is gone"})

    def _take(self, message: dict[str, Any]) -> None:
        if "id" not in message:
            self.ready.put(message)
            return
        with self.lock:
            pending = self.pending.get(message["id"])
            if pending is not None and "event" not in message:
                del self.pending[message["id"]]
        if pending is None:
            return
        pending.first.set()
        if "event" not in message:
            pending.inbox.put(message)

    def start_call(self, op: str, prompt: Prompt | None = None, **arguments: Any) -> Pending:
        pending = Pending(self, next(self.numbers), prompt)
        with self.lock:
            if self.ended.is_set():
                raise EngineError(f"{self.name} is gone\n{self.explain()}")
            self.pending[pending.number] = pending
            self._send({"id": pending.number, "op": op, **arguments})
        return pending

    def call(self, op: str, **arguments: Any) -> Any:
        return self.start_call(op, **arguments).wait()

    # ---- requests

    def submit(self, prompt: Prompt, *, logprobs: int | None = None) -> Pending:
        adapter = prompt.adapter
        return self.start_call(
            "generate",
            prompt,
            tokens=list(prompt.tokens),
            max_tokens=prompt.max_tokens,
            logprobs=logprobs,
            salt=prompt.salt,
            adapter=adapter and [adapter.name, adapter.number, str(adapter.path)],
        )

    def ask(self, prompt: Prompt, *, logprobs: int | None = None) -> Answer:
        return self.submit(prompt, logprobs=logprobs).answer()

    def ask_all(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """All at once."""
        pending = [self.submit(prompt) for prompt in prompts]
        return [one.answer() for one in pending]

    # ---- around them

    def forget(self) -> None:
        """Empties vLLM's own prefix cache, and only that: what comes next can only come from Pillion.

        vLLM refuses while blocks are in use, which those of saves under way are.
        """
        until(lambda: self.call("reset"), lambda: f"vLLM empties its cache\n{self.explain()}", 45)

    def stats(self) -> dict[str, int]:
        """Sums since the start, as they came to vLLM's loggers."""
        sums: dict[str, int] = self.call("stats")
        return sums

    def counters(self) -> dict[str, Any]:
        """Those of the client in the worker."""
        counters: dict[str, Any] = self.call("counters")
        return counters

    def quiet(self) -> None:
        """Waits until no job is under way: all that can be saved is saved."""
        until(lambda: self.counters()["unquiesced"] == 0, lambda: f"all jobs quiesced\n{self.explain()}", 45)

    def hashes(self, prompt: Prompt) -> list[bytes]:
        """vLLM's own block hashes."""
        found = self.call("hashes", tokens=list(prompt.tokens), block_tokens=BLOCK)
        return [bytes.fromhex(one) for one in found]

    # ---- its end

    def stop(self) -> None:
        """As a user would: the frontend shuts its engine down."""
        if not self.ended.is_set():
            self.connection.shutdown(socket.SHUT_WR)
            if not self.ended.wait(60):
                self.kill()
                raise EngineError(f"{self.name} did not stop\n{self.explain()}")
        self._sweep()

    def kill(self) -> None:
        """SIGKILL to all of its processes at once."""
        self._sweep()
        self.ended.wait(20)

    def _sweep(self) -> None:
        if self.group:
            try:
                os.killpg(self.group, signal.SIGKILL)
            except ProcessLookupError:
                return
            until(lambda: not group_lives(self.group), lambda: f"{self.name} is dead", 30)

    def explain(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-60:] if self.log.exists() else []
        return "\n".join([f"-- {self.log}", *lines])


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class Factory:
    """The process that has imported vLLM, and the engines forked from it."""

    def __init__(self, program: Sequence[str] = (sys.executable, str(HERE / "engine_main.py"))) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="pe2-", dir="/tmp"))
        self.socket = self.place / "engines"
        self.log = self.place / "factory.log"
        self.engines: list[Engine] = []
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*program, str(self.socket)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **OFFLINE},
            )

    def connect(self) -> socket.socket:
        def attempt() -> socket.socket | None:
            assert self.process.poll() is None, f"no vLLM here\n{self.log.read_text()}"
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(str(self.socket))
            except OSError:
                connection.close()
                return None
            return connection

        connection: socket.socket = until(attempt, lambda: f"vLLM is imported\n{self.log.read_text()}", 180)
        return connection

    def engine(
        self,
        name: str,
        model: Path,
        sidecar: Sidecar | None,
        *,
        extra: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> Engine:
        """`vllm serve` in all but HTTP; without a sidecar it is plain vLLM."""
        given: dict[str, Any] = {
            "model": str(model),
            "dtype": "float32",
            "max_model_len": 2048,
            "block_size": BLOCK,
            "kv_cache_memory_bytes": 256 << 20,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 2048,
            "enforce_eager": True,
            "disable_log_stats": False,
            **options,
        }
        surroundings = dict(environment or {})
        if sidecar is not None:
            given["kv_transfer_config"] = {**TRANSFER, "kv_connector_extra_config": extra or {}}
            places = {k: v for k, v in sidecar.environment.items() if k.startswith("PILLION_")}
            surroundings = {**places, "PILLION_HTTP": "off", "PILLION_HOST_POOL": "512MiB", **surroundings}
        engine = Engine(self, f"{len(self.engines)}-{name}", given, surroundings)
        self.engines.append(engine)
        print(f"{engine.name}: {engine.num_blocks} blocks, started in {engine.started['took']:.1f} s")
        return engine

    def close(self) -> None:
        for engine in self.engines:
            engine.kill()
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.place, ignore_errors=True)
