"""What the peers in Python have in common: the arguments that bench/native gives, and the figures that it reads."""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=["read", "write"])
    parser.add_argument("--dir", required=True, type=Path)
    for name in ("bytes", "depth", "total"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    return parser.parse_args()


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def report(move: Callable[[], int]) -> None:
    """Prints how fast so many bytes were moved."""
    began, cpu_began = time.perf_counter(), cpu_seconds()
    moved = move()
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu_began
    print(json.dumps({"gbps": moved / seconds / 1e9, "cpu_s_per_gb": cpu / (moved / 1e9)}))
