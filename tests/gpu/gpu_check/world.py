"""The processes of a check: sidecars, engines, and on the fake device its switches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chaos.engine import Shape
from chaos.sidecar import Sidecar, until


class EngineFailed(AssertionError):
    """What an engine process saw must not be."""


class Skipped(Exception):
    """Cannot be tried here; says why."""


@dataclass(frozen=True)
class Sizes:
    """How much is moved. `big` is what one job of a fault scenario moves; a job of `bench` measures."""

    record: int
    fragments_record: int
    blocks: int
    jobs: int
    big: int
    rounds: int
    kills: int
    pool: int
    bench: int
    bench_pool: int
    bench_records: tuple[int, ...]
    memcpy: int
    runs: int
    fragments: tuple[int, ...]
    counts: tuple[int, ...]
    sweep: int
    latency_runs: int
    latency_record: int
    windows: int
    window: float
    decode_jobs: int
    decode_blocks: int


START_FIGURES = ("touch_ms", "pin_ms", "copies", "huge_pages")
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 64 * KIB

FULL = Sizes(
    record=2 * MIB,
    fragments_record=512 * KIB,
    blocks=128,
    jobs=4,
    big=256,
    rounds=12,
    kills=5,
    pool=6 * GIB,
    bench=GIB,
    bench_pool=12 * GIB,
    bench_records=(512 * KIB, MIB, 2 * MIB, 4 * MIB),
    memcpy=2 * GIB,
    runs=7,
    fragments=tuple(4 * KIB << shift for shift in range(10)),
    counts=(64, 512, 4096, 16384),
    sweep=2 * GIB,
    latency_runs=200,
    latency_record=2 * MIB,
    windows=6,
    window=2.0,
    decode_jobs=6,
    decode_blocks=64,
)
QUICK = Sizes(
    record=2 * MIB,
    fragments_record=256 * KIB,
    blocks=64,
    jobs=2,
    big=128,
    rounds=6,
    kills=2,
    pool=3 * GIB,
    bench=GIB,
    bench_pool=6 * GIB,
    bench_records=(512 * KIB, 2 * MIB),
    memcpy=2 * GIB,
    runs=3,
    fragments=(4 * KIB, 16 * KIB, 64 * KIB, 512 * KIB, 2 * MIB),
    counts=(512, 4096),
    sweep=GIB,
    latency_runs=50,
    latency_record=2 * MIB,
    windows=3,
    window=0.7,
    decode_jobs=6,
    decode_blocks=64,
)
FAKE = Sizes(
    record=4 * PAGE,
    fragments_record=2 * PAGE,
    blocks=16,
    jobs=2,
    big=64,
    rounds=6,
    kills=2,
    pool=128 * MIB,
    bench=8 * MIB,
    bench_pool=96 * MIB,
    bench_records=(8 * PAGE, 32 * PAGE),
    memcpy=16 * MIB,
    runs=3,
    fragments=(4 * KIB, 64 * KIB),
    counts=(64, 5000),
    sweep=24 * MIB,
    latency_runs=10,
    latency_record=4 * PAGE,
    windows=1,
    window=0.2,
    decode_jobs=2,
    decode_blocks=4,
)


class Engine:
    """An engine process. Methods are those of engine_process.Session."""

    def __init__(self, device: str, environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpu_check.engine_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
            )
        self.about = self.call("use", device=device)

    @property
    def pid(self) -> int:
        return self.process.pid

    def call(self, name: str, /, **options: Any) -> Any:
        self.begin(name, **options)
        return self.finish()

    def begin(self, name: str, /, **options: Any) -> None:
        """The answer is for `finish`."""
        assert self.process.stdin
        self.asked = name
        self.process.stdin.write(json.dumps({"do": name, "with": options}) + "\n")
        self.process.stdin.flush()

    def finish(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise EngineFailed(f"the engine's process ended ({code}) in `{self.asked}`:\n{self.tail()}")
        answer = json.loads(line)
        if "value" in answer:
            return answer["value"]
        if "failed" in answer:
            raise EngineFailed(answer["failed"])
        raise EngineFailed(f"`{self.asked}`: {answer['error']}\n{answer['trace']}")

    def open(self, sidecar: Sidecar, name: str, shape: Shape, **options: Any) -> Engine:
        self.call("open", socket=str(sidecar.socket), name=name, shape=asdict(shape), **options)
        return self

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


class World:
    """What one scenario started. Ended with it, whatever happened."""

    def __init__(
        self, gpu: dict[str, Any], sizes: Sizes, place: Path, fake: Path | None, torch: bool
    ) -> None:
        self.gpu, self.sizes, self.place, self.fake, self.torch = gpu, sizes, place, fake, torch
        self.device = f"gpu-{gpu['uuid']}"
        self.sidecars: list[Sidecar] = []
        self.engines: list[Engine] = []
        self.starts: list[dict[str, Any]] = []

    # ---- processes -----------------------------------------------------------

    def sidecar(self, *, wrapper: Sequence[str] = (), ready: float = 60, **flags: Any) -> Sidecar:
        flags = {"host_pool": self.sizes.pool, **flags}
        sidecar = Sidecar(device=self.device, wrapper=wrapper, **flags)
        self.sidecars.append(sidecar)
        return sidecar.start(ready)

    def need(self, device: str) -> None:
        if device == "torch" and not self.torch:
            raise Skipped("needs torch")

    def process(self, device: str = "driver") -> Engine:
        log = self.place / f"engine-{len(self.engines)}.log"
        engine = Engine(device, dict(os.environ), log)
        self.engines.append(engine)
        if self.fake or (os.cpu_count() or 1) < 4:
            engine.call("patience", pause=0.0001)
        return engine

    def engine(
        self, sidecar: Sidecar, name: str, shape: Shape, *, device: str = "driver", **options: Any
    ) -> Engine:
        # Not at the beginning of its allocation: a forgotten offset is seen.
        options = {"way": "ipc", "offset": 2 * MIB, **options}
        return self.process(device).open(sidecar, name, shape, **options)

    def explain(self) -> str:
        shown = [sidecar.explain() for sidecar in self.sidecars]
        for index, engine in enumerate(self.engines):
            if tail := engine.tail():
                shown.append(f"-- engine {index}\n{tail}")
        return "\n".join(shown)

    def close(self) -> None:
        """Ends everything, even if one thing cannot be ended."""
        engines, sidecars = self.engines, self.sidecars
        self.engines, self.sidecars = [], []
        with ExitStack() as stack:
            # The last comes first.
            for sidecar in reversed(sidecars):
                stack.callback(sidecar.close)
                stack.callback(self.note_starts, sidecar)
            for engine in reversed(engines):
                stack.callback(engine.kill)
            self.faults()

    def note_starts(self, sidecar: Sidecar) -> None:
        """What a sidecar says of its pool, each time that it starts."""
        if not sidecar.log.exists():
            return
        for line in sidecar.log.read_text(errors="replace").splitlines():
            if '"the pool is pinned"' in line:
                with suppress(ValueError, KeyError):
                    said = json.loads(line)
                    self.starts.append({name: said[name] for name in START_FIGURES})

    # ---- the fake device -------------------------------------------------------

    def faults(self, *lines: str) -> None:
        """Switches of the fake device; without one they are left out."""
        if self.fake:
            (self.fake / "faults").write_text("".join(f"{line}\n" for line in lines))

    def slow_copies(self) -> None:
        """So that something can happen in the middle of a transfer, where memory is as fast as the copies."""
        self.faults("process=worker copy rate 200")

    def statistics(self, pid: int) -> dict[str, int]:
        """What the fake device counts for a process."""
        assert self.fake
        file = self.fake / f"stats-{pid}.json"
        until(file.exists, f"{file.name} of the fake device")
        found: dict[str, int] = json.loads(file.read_text())
        return found

    def held(self, sidecar: Sidecar, watcher: Engine) -> int:
        """What is taken on the device: bytes, or on the fake device the sidecar's imports."""
        if self.fake:
            time.sleep(0.06)  # it is written that seldom
            return self.statistics(sidecar.worker_pid)["live_imports"]
        return -int(watcher.call("free_bytes"))

    def await_released(self, sidecar: Sidecar, watcher: Engine, before: int, seconds: float = 15) -> None:
        """Until no more is taken than then: the sidecar has let go."""
        # Contexts and pools move by some MiB.
        slack = 0 if self.fake else 64 * MIB
        until(
            lambda: self.held(sidecar, watcher) <= before + slack,
            lambda: f"device memory to be given back: {self.held(sidecar, watcher)}, before {before}",
            seconds,
        )
