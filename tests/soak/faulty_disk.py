"""Everything that tests/chaos/test_faulty_disk.py knows, for longer and at every place."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from soak.report import ROOT, Report


class Watcher:
    """Counts what the tests say that they did."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.passed = 0
        self.skipped = 0
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.skipped += int(report.skipped)
        if report.failed:
            self.failures.append(f"{report.nodeid}: {report.longreprtext:.4000}")
        if report.when == "call" and report.passed:
            self.passed += 1
            for name, count in report.user_properties:
                self.counts[name] = self.counts.get(name, 0) + count


def campaign(report: Report, args: argparse.Namespace) -> None:
    os.environ["PILLION_SOAK"] = "1"
    watcher = Watcher()
    chosen = ["-k", args.only] if getattr(args, "only", None) else []
    tests = Path(ROOT / "tests" / "chaos" / "test_faulty_disk.py")
    pytest.main(["-q", "-p", "no:cacheprovider", str(tests), *chosen], plugins=[watcher])
    report.failures, report.failed = watcher.failures, len(watcher.failures)
    if watcher.skipped or not watcher.passed:
        report.failed += 1
        report.failures.append(f"expected every test to run; {watcher.skipped} were skipped")
    report.counts = {"tests": watcher.passed, **watcher.counts}
