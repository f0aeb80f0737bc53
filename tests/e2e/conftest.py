"""Real vLLM on this machine's CPU, real sidecars, and what plain vLLM answers.

Engines are what costs time here: one module's tests share one or two of them, in the order of the file.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

if (tests := str(Path(__file__).parents[1])) not in sys.path:
    sys.path.insert(0, tests)

from e2e.world import REPORT, Checker, World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    world = World()
    yield world
    REPORT.append(f"misses that were tried again: {world.misses}")
    world.close()


@pytest.fixture(scope="session")
def identical(world: World) -> Checker:
    return Checker(world, world.reference())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    world = getattr(item, "funcargs", {}).get("world")
    if report.failed and isinstance(world, World):
        report.sections.append(("engines and sidecar", world.explain()))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in REPORT:
        terminalreporter.write_line(line)
