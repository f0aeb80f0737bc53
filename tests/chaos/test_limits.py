"""A sidecar to which the system gives little: no io_uring, few descriptors, little address space, a clock that jumps."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos import wire
from chaos.campaigns import Victims, recovers
from chaos.conftest import World
from chaos.engine import FakeEngine, Shape, Traffic, chain
from chaos.fake_device import built
from chaos.sidecar import Sidecar, ended, until
from chaos.test_ssd import await_written, kill, ssd
from chaos.wire import Raw

NO_IO_URING = (sys.executable, str(Path(__file__).with_name("no_io_uring.py")))
YEAR = 365 * 24 * 3600


def limited(world: World, *wrapper: str, **flags: str) -> Sidecar:
    sidecar = Sidecar(wrapper=wrapper, **flags)
    world.sidecars.append(sidecar)
    return sidecar


def written(world: World, place: Path, *wrapper: str) -> tuple[Sidecar, FakeEngine, list[bytes]]:
    """A limited sidecar with an SSD, its engine, and a prompt of 30 blocks that is on that SSD."""
    flags = {"ssd": f"{place / 'ssd'}=64MiB", "ssd_segment": "1MiB", "http": "127.0.0.1:19470"}
    sidecar = limited(world, *wrapper, **flags).start()
    engine = world.engine(sidecar)
    prompt = chain("a", 30)
    engine.must_save(prompt)
    await_written(sidecar, 30)
    return sidecar, engine, prompt


def comes_back(sidecar: Sidecar, engine: FakeEngine, prompt: list[bytes]) -> None:
    """After the sidecar was killed, all of it, from the SSD."""
    before = engine.attaches()
    kill(sidecar)
    sidecar.start()
    engine.await_again(before)
    assert len(engine.must_load(prompt).hashes) == 30
    assert ssd(sidecar)["blocks_read"] == 30


def test_where_io_uring_is_refused_threads_do_the_same(world: World, tmp_path: Path) -> None:
    sidecar, engine, prompt = written(world, tmp_path, *NO_IO_URING)
    (directory,) = ssd(sidecar)["directories"]
    assert directory["engine"] == "threads" and "io_uring is refused" in directory["refused"]
    assert 'pillion_ssd_directories{engine="threads"} 1' in sidecar.metrics()
    comes_back(sidecar, engine, prompt)


def test_with_little_memory_to_lock_io_uring_goes_without_registered_buffers(
    world: World, tmp_path: Path
) -> None:
    less = ("setpriv", "--bounding-set=-ipc_lock", "prlimit", "--memlock=1048576:1048576")
    sidecar, engine, prompt = written(world, tmp_path, *less)
    # It is tried when the pool's first pages are there.
    until(lambda: ssd(sidecar)["directories"][0]["refused"], "the kernel to refuse them")
    (directory,) = ssd(sidecar)["directories"]
    assert directory["engine"] == "io_uring"
    assert "0 MiB of the pool as registered buffers, not more: Cannot allocate" in directory["refused"]
    metrics = sidecar.metrics()
    assert 'pillion_ssd_directories{engine="io_uring"} 1' in metrics
    assert "\npillion_ssd_registered_bytes 0\n" in metrics
    comes_back(sidecar, engine, prompt)


def test_one_that_must_have_io_uring_says_why_it_does_not_start(world: World, tmp_path: Path) -> None:
    sidecar = limited(world, *NO_IO_URING, ssd=f"{tmp_path / 'ssd'}=64MiB", ssd_engine="uring")
    with pytest.raises(AssertionError):
        sidecar.start(seconds=3)
    assert "Operation not permitted" in sidecar.log.read_text()


def test_with_few_file_descriptors_newcomers_wait_and_the_rest_goes_on(world: World) -> None:
    sidecar = limited(world, "prlimit", "--nofile=64:64").start()
    engine = world.engine(sidecar, "first")
    recovers(engine, "before")
    storm: list[Raw] = []
    for index in range(100):
        try:
            storm.append(
                Raw(sidecar.socket, wire.hello(role=wire.WORKER, engine=f"storm-{index}"), seconds=1)
            )
        except OSError:  # as many as may wait for their accept
            break
    traffic = Traffic(engine, 1)
    traffic.run(1)
    engine.settle()
    recovers(engine, "meanwhile")
    for raw in storm:
        raw.close()
    recovers(world.engine(sidecar, "later"), "after")
    assert sidecar.status()["sidecar"]["worker_restarts"] == 0


def test_memory_that_cannot_be_mapped_leaves_the_engine_uncached(world: World) -> None:
    """Its address space has room for the pool and little else."""
    sidecar = limited(world, "prlimit", f"--as={700 << 20}", host_pool="64MiB").start()
    engine = world.engine(sidecar, "first")
    recovers(engine, "before")
    large = Shape(blocks=1 << 15, content=1 << 10)
    assert large.total > 1 << 30
    refused = world.engine(sidecar, "large", ready=False, shape=large)
    until(lambda: "memory" in refused.told(), refused.told)
    assert not refused.worker.ready()
    recovers(engine, "after")
    assert sidecar.status()["sidecar"]["worker_restarts"] == 0


class Clock:
    """The wall clock of processes that are started with it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.write_bytes(struct.pack("<q", 0) + bytes(4088))
        library = built("pillion-fakeclock", "libpillion_fakeclock.so")
        self.environment = {"LD_PRELOAD": str(library), "PILLION_FAKECLOCK": str(place)}

    def set(self, seconds: int) -> None:
        with self.place.open("r+b") as file:
            file.write(struct.pack("<q", seconds))


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[Clock]:
    yield Clock(tmp_path / "clock")


def test_a_wall_clock_that_jumps_moves_no_deadline_and_no_lease(
    world: World, clock: Clock, tmp_path: Path
) -> None:
    """A year on, ten years back: leases, deadlines, heartbeats and tables go by another clock, in engines too."""
    words = [f"{name}={value}" for name, value in clock.environment.items()]
    sidecar = limited(world, "env", *words, ssd=f"{tmp_path / 'ssd'}=64MiB").start()
    engine = world.engine(sidecar)
    prompt = chain("kept", 20)
    engine.must_save(prompt)
    ticket, granted, lease = engine.lease(prompt)
    assert granted == 20
    with Victims(sidecar, clock.environment) as zoo:
        (other,) = zoo.spawn(("under-the-same-clock", 1, "memfd"))
        for seconds in (YEAR, -10 * YEAR, 0, 30):
            clock.set(seconds)
            Traffic(engine, seconds).run(0.3)
            engine.settle()
        assert not ended(other)
        os.kill(other, signal.SIGKILL)
    job = engine.load_leased(prompt, ticket, lease)
    assert engine.wait(job).blocks_done == 20, "the lease is as old as it is"
    clock.set(YEAR)
    assert len(engine.must_load(prompt).hashes) == 20
    until(lambda: len(sidecar.sessions()) == 2, "the other engine to be gone")
    log = sidecar.log.read_text()
    assert str(time.gmtime().tm_year - 10) in log or str(time.gmtime().tm_year + 1) in log, (
        "the clock did jump"
    )
    status = sidecar.status()
    assert status["jobs"]["deadline_misses"] == 0 and status["sidecar"]["worker_restarts"] == 0
    recovers(engine, "after")
