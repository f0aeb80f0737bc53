"""Where figures were measured, without names of hosts and paths."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Of this machine, now: call it before the work begins, so that the load is that of others."""
    model = _word("/proc/cpuinfo", "model name")
    memory_kib = int(_word("/proc/meminfo", "MemTotal").split()[0] or 0)
    place = Path(__file__).resolve()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": memory_kib >> 20,
        "kernel": os.uname().release.split("-")[0],
        "file_system": _file_system(place),
        "load_before": load(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def load() -> float:
    """Programs that want a processor, in the last minute."""
    return round(os.getloadavg()[0], 2)


def _word(file: str, name: str) -> str:
    for line in Path(file).read_text().splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return "unknown"


def _file_system(place: Path) -> str:
    """The kind of the longest mount point above a path."""
    best = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, at, kind, *_ = line.split(" ")
        if place.is_relative_to(at) and len(at) >= len(best[0]):
            best = (at, kind)
    return best[1]
