"""Fake engines against real sidecars. Needs `pillion._native` and the `pillion` command, and no vLLM."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

if (tests := str(Path(__file__).parents[1])) not in sys.path:
    sys.path.insert(0, tests)

from chaos.engine import FakeEngine
from chaos.sidecar import Sidecar


class World:
    """What a test started: it is all ended again, and shown where the test fails."""

    def __init__(self) -> None:
        self.sidecars: list[Sidecar] = []
        self.engines: list[FakeEngine] = []

    def sidecar(self, *, start: bool = True, config: str = "", **flags: Any) -> Sidecar:
        sidecar = Sidecar(config=config, **flags)
        self.sidecars.append(sidecar)
        return sidecar.start() if start else sidecar

    def engine(self, sidecar: Sidecar, name: str = "", *, ready: bool = True, **options: Any) -> FakeEngine:
        engine = FakeEngine(sidecar.socket, name or f"engine-{len(self.engines)}", **options)
        self.engines.append(engine)
        return engine.await_ready() if ready else engine

    def explain(self) -> str:
        shown = [sidecar.explain() for sidecar in self.sidecars]
        for engine in self.engines:
            jobs = [f"    {job}" for job in list(engine.jobs.values())[:20]]
            shown += [f"-- {engine.name}: {engine.told()}; slowest call: {engine.slowest}", *jobs]
        return "\n".join(shown)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        for sidecar in self.sidecars:
            sidecar.close()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    try:
        yield world
        for engine in world.engines:
            engine.check()
    finally:
        world.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    world = getattr(item, "funcargs", {}).get("world")
    if call.when == "call" and report.failed and isinstance(world, World):
        report.sections.append(("sidecars and engines", world.explain()))
    return report


__all__: list[str] = []
Maker = Callable[..., FakeEngine]
