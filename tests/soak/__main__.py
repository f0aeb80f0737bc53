"""Long campaigns of kills: `python -m soak NAME --runs N`; see scripts/soak."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from chaos.campaigns import Figures, engine_kills, sidecar_kills
from chaos.conftest import World
from soak import faulty_disk, real
from soak.report import Report, spread

PROGRESS_EVERY = 10


def kills(report: Report, runs: int, part: Callable[[World, int], Figures]) -> None:
    """Parts, each in a world of its own, until there were so many kills."""
    total, seed = Figures(), report.seed * 1_000_000
    while total.kills < runs and report.failed < 50:
        seed += 1

        def one(seed: int = seed) -> None:
            with closing(World()) as world:
                figures = part(world, seed)
                for engine in world.engines:
                    engine.check()
            total.add(figures)

        report.attempt(seed, one)
        if seed % PROGRESS_EVERY == 0:
            print(f"{total.kills} kills, {report.failed} failures", flush=True)
    report.counts = {
        "kills": total.kills,
        "loads": total.loads,
        "saves": total.saves,
        "blocks_compared": total.blocks_compared,
        "wrong_bytes": sum("wrong bytes" in text for text in report.failures),
        "late_writes": sum("I3" in text for text in report.failures),
        "recovered_ms": spread(total.waits_ms),
    }


def engine_kill(report: Report, args: argparse.Namespace) -> None:
    kills(report, args.runs, lambda world, seed: engine_kills(world, seed, batches=20))


def sidecar_kill(report: Report, args: argparse.Namespace) -> None:
    """Every other time with an SSD, whose records must come back."""

    def part(world: World, seed: int) -> Figures:
        if seed % 2:
            return sidecar_kills(world, seed)
        with tempfile.TemporaryDirectory(dir=args.dir) as disk:
            flags: dict[str, Any] = {
                "ssd": f"{disk}/{{number}}=32MiB",
                "ssd_segment": "1MiB",
                "host_pool": "4MiB",
            }
            figures = sidecar_kills(world, seed, **flags)
            for sidecar in world.sidecars:
                assert sidecar.status()["ssd"]["blocks_corrupt"] == 0
            return figures

    kills(report, args.runs, part)


CAMPAIGNS: dict[str, tuple[Callable[[Report, argparse.Namespace], None], int]] = {
    "engine-kill": (engine_kill, 10_000),
    "sidecar-kill": (sidecar_kill, 1_000),
    "vllm-kill": (real.campaign, 200),
    "ssd-faults": (faulty_disk.campaign, 1),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak")
    parser.add_argument("name", choices=CAMPAIGNS)
    parser.add_argument("--runs", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where an SSD's files go for the time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    campaign, runs = CAMPAIGNS[args.name]
    args.runs = args.runs or runs
    report = Report(args.name, args.seed)
    campaign(report, args)
    return report.end(args.json)


sys.exit(main())
