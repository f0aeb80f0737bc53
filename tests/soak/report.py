"""What a campaign leaves: counts, failures with their seeds, and the machine they were counted on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FAILURES_MAX = 20
"""Shown in full; more of them say no more."""


def commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    name = git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{name} and changes" if git("status", "--porcelain") else name


def machine() -> dict[str, Any]:
    """Without names of hosts and paths."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "cores": os.cpu_count(),
        "cpu": models[0] if models else platform.machine(),
        "kernel": platform.release().split("-")[0],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load_before": f"{os.getloadavg()[0]:.2f}",
    }


def spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered), 2),
        "p99": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], 2),
        "max": round(ordered[-1], 2),
    }


@dataclass
class Report:
    campaign: str
    seed: int
    commit: str = field(default_factory=commit)
    machine: dict[str, Any] = field(default_factory=machine)
    counts: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    failed: int = 0
    seconds: int = 0

    def __post_init__(self) -> None:
        self._begun = time.monotonic()

    def attempt(self, seed: int, run: Callable[[], None]) -> bool:
        """One part of the campaign: what goes wrong is kept, and the campaign goes on."""
        try:
            run()
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            self.failed += 1
            if len(self.failures) < FAILURES_MAX:
                self.failures.append(f"seed {seed}: {error!s:.4000}")
            print(f"FAILED, seed {seed}: {error}", flush=True)
            return False
        return True

    def end(self, path: Path | None) -> int:
        """Prints and writes it. The exit code."""
        self.seconds = round(time.monotonic() - self._begun)
        told = asdict(self)
        told.update(told.pop("counts"))
        text = json.dumps(told, indent=2, sort_keys=True) + "\n"
        print(text)
        if path is not None:
            path.write_text(text)
        return 1 if self.failed else 0
