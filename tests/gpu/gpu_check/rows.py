"""Rows of a benchmark's report: ours beside a peer or a limit, in the same run.

A ratio of 1 or more always means that we are better: ours / theirs for rates, theirs / ours for times.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _row(
    metric: str,
    case: str,
    ours: float,
    peer: str | None,
    theirs: float | None,
    unit: str,
    ratios: Sequence[float],
    ratio: float | None,
    budget: float | None,
    runs: int,
) -> Row:
    return {
        "metric": metric,
        "case": case,
        "ours": digits(ours),
        "peer": peer,
        "theirs": digits(theirs),
        "unit": unit,
        "ratio": digits(ratio),
        "budget": budget,
        "met": None if budget is None or ratio is None else ratio >= budget,
        "runs": runs,
        "spread": [digits(min(ratios)), digits(max(ratios))] if ratios else None,
    }


def digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def rate(
    metric: str,
    case: str,
    ours: Sequence[float],
    *,
    peer: str | None = None,
    theirs: Sequence[float] = (),
    budget: float | None = None,
    unit: str = "GB/s",
) -> Row:
    """More is better. Without a peer the spread is that of the rate around its median."""
    middle = statistics.median(ours)
    if not theirs:
        spread = [each / middle for each in ours]
        return _row(metric, case, middle, peer, None, unit, spread, None, None, len(ours))
    limit = statistics.median(theirs)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return _row(metric, case, middle, peer, limit, unit, ratios, middle / limit, budget, len(ours))


def duration(
    metric: str,
    case: str,
    ours: float,
    *,
    peer: str | None = None,
    theirs: float | None = None,
    ratios: Sequence[float] = (),
    budget: float | None = None,
    unit: str = "us",
    runs: int,
) -> Row:
    """Less is better. A difference of two times can be less than nothing: then it counts as nothing."""
    ratio = None if theirs is None else theirs / max(ours, 1e-3)
    return _row(metric, case, ours, peer, theirs, unit, ratios, ratio, budget, runs)


def as_fake(row: Row) -> Row:
    """What a fake device takes says nothing about any budget."""
    return {**row, "met": None}


def table(rows: Sequence[Row]) -> list[str]:
    """For people."""
    head = ("", "case", "ours", "limit or peer", "theirs", "unit", "ratio", "budget", "")
    lines = [head]
    for row in rows:
        mark = {True: "met", False: "MISSED", None: ""}[row["met"]]
        lines.append(
            (
                row["metric"],
                row["case"],
                _text(row["ours"]),
                row["peer"] or "",
                _text(row["theirs"]),
                row["unit"],
                _text(row["ratio"]),
                _text(row["budget"]),
                mark,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def machine(gpu: dict[str, Any]) -> dict[str, Any]:
    """What the figures belong to."""
    found: dict[str, Any] = {
        "gpu": gpu["name"],
        "gpu_uuid": gpu["uuid"],
        "cuda": f"{gpu['cuda'] // 1000}.{gpu['cuda'] % 1000 // 10}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    return {**found, **_nvidia_smi(gpu["uuid"])}


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _nvidia_smi(uuid: str) -> dict[str, Any]:
    fields = {
        "driver": "driver_version",
        "link_gen": "pcie.link.gen.max",
        "link_width": "pcie.link.width.max",
        "gpu_memory": "memory.total",
        "persistence": "persistence_mode",
        "sm_clock": "clocks.sm",
    }
    if not shutil.which("nvidia-smi"):
        return {}
    query = [
        "nvidia-smi",
        f"--id=GPU-{uuid}",
        "--format=csv,noheader",
        f"--query-gpu={','.join(fields.values())}",
    ]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(fields):
        return {}
    return dict(zip(fields, values, strict=True))
