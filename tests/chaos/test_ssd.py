"""The SSD tier: what was saved outlives the sidecar, and never comes back wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from chaos.conftest import World
from chaos.engine import DONE, FAILED, FakeEngine, Shape, Traffic, chain
from chaos.sidecar import Sidecar, until

MIB = 1 << 20
SECTOR = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "ssd"


def with_ssd(world: World, disk: Path, capacity: str = "64MiB", **flags: Any) -> Sidecar:
    return world.sidecar(**{"ssd": f"{disk}={capacity}", "ssd_segment": "1MiB", **flags})


def ssd(sidecar: Sidecar) -> dict[str, Any]:
    status: dict[str, Any] = sidecar.status()["ssd"]
    return status


def await_written(sidecar: Sidecar, blocks: int) -> None:
    """Until so many blocks are on the SSD, and none is on its way."""

    def written() -> bool:
        now = ssd(sidecar)
        return bool(now["records"] >= blocks and not now["writes_waiting"])

    until(written, lambda: f"{blocks} blocks on the SSD\n{sidecar.explain()}")


def used_on_disk(disk: Path) -> int:
    """Bytes that the files take."""
    total = 0
    for file in disk.glob("*.segment"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


@pytest.mark.parametrize("io", ["auto", "threads"])
def test_what_was_saved_outlives_a_sidecar_that_is_killed(world: World, disk: Path, io: str) -> None:
    sidecar = with_ssd(world, disk, ssd_engine=io)
    engine = world.engine(sidecar)
    prompt = chain("a", 40)
    engine.must_save(prompt)
    await_written(sidecar, 40)
    before = engine.attaches()
    sidecar.kill_worker()
    engine.await_again(before)
    assert engine.lookup(prompt) == 40, "there before the engine asks"
    assert engine.scheduler.absent(0, b"".join(prompt)) == [], "not saved again"
    assert len(engine.must_load(prompt).hashes) == 40
    now = ssd(sidecar)
    assert (now["blocks_read"], now["blocks_written"], now["read_failures"]) == (40, 0, 0)
    (directory,) = now["directories"]
    assert directory["path"] == str(disk) and directory["records"] == 40
    assert directory["engine"] == "threads" or io == "auto"
    # From the pool this time.
    engine.must_load(prompt)
    assert ssd(sidecar)["blocks_read"] == 40


def test_sigterm_writes_what_has_not_been_written(world: World, disk: Path) -> None:
    sidecar = with_ssd(world, disk)
    engine = world.engine(sidecar)
    prompt = chain("a", 200)
    engine.must_save(prompt)
    assert sidecar.terminate() == 0
    sidecar.start()
    assert "scanned=0" in sidecar.log.read_text().replace('"scanned":0', "scanned=0"), "sealed in order"
    fresh = world.engine(sidecar, "fresh")
    assert len(fresh.must_load(prompt).hashes) == 200


def test_a_working_set_that_is_larger_than_the_pool_is_read_back(world: World, disk: Path) -> None:
    sidecar = with_ssd(world, disk, host_pool="4MiB")
    engine = world.engine(sidecar)
    prompts = [chain(f"prompt-{index}", 60) for index in range(12)]
    for index, prompt in enumerate(prompts):
        engine.must_save(prompt)
        await_written(sidecar, 60 * (index + 1))
    status = sidecar.status()
    assert status["pool"]["records"] <= 256 < 720 == status["ssd"]["records"]
    for prompt in [*prompts, *reversed(prompts)]:
        assert engine.lookup(prompt) == 60
        assert len(engine.must_load(prompt).hashes) == 60
    status = sidecar.status()
    assert status["ssd"]["blocks_read"] >= 720 - 256
    assert status["ssd"]["blocks_written"] == 720, "nothing is written twice"
    assert status["pool"]["used_bytes"] <= status["pool"]["bytes"]


def flip_bytes(disk: Path, chance: random.Random, count: int) -> None:
    files = sorted(disk.glob("*.segment"))
    for _ in range(count):
        with chance.choice(files).open("r+b") as file:
            at = chance.randrange(SECTOR, MIB)
            file.seek(at)
            old = file.read(1)
            file.seek(at)
            file.write(bytes([old[0] ^ (1 << chance.randrange(8))]))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("orderly", [True, False])
def test_bytes_that_change_on_the_disk_are_misses(world: World, disk: Path, seed: int, orderly: bool) -> None:
    sidecar = with_ssd(world, disk, drain_seconds=2)
    engine = world.engine(sidecar)
    prompts = [chain(f"prompt-{index}", 20) for index in range(20)]
    for prompt in prompts:
        engine.must_save(prompt)
    await_written(sidecar, 400)
    leave(world, engine)
    if orderly:
        sidecar.terminate()
    else:
        with sidecar.stopped():
            kill(sidecar)
    chance = random.Random(seed)
    flip_bytes(disk, chance, 200)
    sidecar.start()
    fresh = world.engine(sidecar, "fresh")
    # The engine compares every byte that it is given.
    loaded = 0
    for prompt in prompts:
        # Damage that is found after the promise fails the load; each time it is a shorter promise.
        while job := fresh.load(prompt):
            if fresh.wait(job).outcome == DONE:
                loaded += len(job.hashes)
                break
    assert 0 < loaded < 400
    faults = sidecar.status()["faults"]
    assert faults == {"checksum_failures": 0, "identity_mismatches": 0, "protocol_errors": 0}
    # What was lost is saved anew. (A block behind a gap is found to be damaged once the gap is filled.)
    for prompt in prompts:

        def whole(prompt: list[bytes] = prompt) -> bool:
            fresh.must_save(prompt)
            job = fresh.load(prompt)
            return job is not None and fresh.wait(job).outcome == DONE and len(job.hashes) == 20

        until(whole, "all damaged blocks to be replaced")


def leave(world: World, engine: FakeEngine) -> None:
    """It does not come back when the sidecar does."""
    engine.close()
    world.engines.remove(engine)


def kill(sidecar: Sidecar) -> None:
    """Supervisor and worker, at once."""
    assert sidecar.process
    worker = sidecar.worker_pid
    os.kill(sidecar.process.pid, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    sidecar.process.wait()
    until(lambda: not Path(f"/proc/{worker}").exists(), "the worker to be gone")


TENANTS = "[tenants]\nred = { uids = [0] }\nblue = { uids = [0] }\n"


def test_after_a_restart_tenants_and_models_are_walls_still(world: World, disk: Path) -> None:
    sidecar = with_ssd(world, disk, config=TENANTS)
    red = world.engine(sidecar, tenant="red")
    prompt = chain("a", 16)
    red.must_save(prompt)
    await_written(sidecar, 16)
    leave(world, red)
    sidecar.terminate()
    sidecar.start()
    blue = world.engine(sidecar, "blue", tenant="blue")
    assert ssd(sidecar)["hidden_records"] == 16, "nobody has come who may see them"
    others = [
        blue,
        world.engine(sidecar, "other-model", tenant="red", model="model-b"),
        world.engine(sidecar, "other-dtype", tenant="red", shape=Shape(dtype="float16")),
    ]
    assert ssd(sidecar)["hidden_records"] == 0
    again = world.engine(sidecar, "again", tenant="red")
    for other in others:
        assert other.lookup(prompt) == 0 and other.lease(prompt) == (0, 0, b"")
    _, granted, lease = again.lease(prompt)
    assert granted == 16
    for other in others:
        assert other.wait(other.load_leased(prompt, 0, lease)).outcome == FAILED
    again.must_load(prompt)


def test_another_cluster_secret_finds_nothing(world: World, disk: Path) -> None:
    sidecar = with_ssd(world, disk)
    prompt = chain("a", 16)
    world.engine(sidecar).must_save(prompt)
    sidecar.terminate()
    (sidecar.state / "secret").unlink()
    sidecar.start()
    engine = world.engine(sidecar, "later")
    assert engine.lookup(prompt) == 0
    assert engine.must_save(prompt).blocks_done == 16
    assert engine.lookup(prompt) == 16


def test_a_directory_serves_one_sidecar(world: World, disk: Path) -> None:
    first = with_ssd(world, disk)
    prompt = chain("a", 10)
    world.engine(first).must_save(prompt)
    await_written(first, 10)
    second = with_ssd(world, disk, start=False)
    with second.log.open("ab") as log:
        second.process = subprocess.Popen(
            second.arguments("serve"), env=second.environment, stdout=log, stderr=log
        )
    until(lambda: "in use by another process" in second.log.read_text(), second.explain)
    assert second.try_status() is None, "it does not serve without what it was told to use"
    assert first.terminate() == 0
    # It has another secret: what is there is not its own.
    second.await_ready()
    assert ssd(second)["hidden_records"] == 10


def test_what_is_not_ours_is_refused_and_left_as_it_is(world: World, disk: Path) -> None:
    disk.mkdir()
    (disk / "thesis.tex").write_text("mine")
    sidecar = with_ssd(world, disk, start=False)
    with sidecar.log.open("ab") as log:
        sidecar.process = subprocess.Popen(
            sidecar.arguments("serve"), env=sidecar.environment, stdout=log, stderr=log
        )
    until(lambda: "not a directory of this tier" in sidecar.log.read_text(), sidecar.explain)
    sidecar.terminate()
    assert [file.name for file in disk.iterdir()] == ["thesis.tex"]
    missing = with_ssd(world, disk / "not" / "there", start=False)
    with missing.log.open("ab") as log:
        missing.process = subprocess.Popen(
            missing.arguments("serve"), env=missing.environment, stdout=log, stderr=log
        )
    until(lambda: "expected the folder above it" in missing.log.read_text(), missing.explain)


def test_the_capacity_is_kept_and_the_oldest_goes(world: World, disk: Path) -> None:
    sidecar = with_ssd(world, disk, capacity="4MiB", host_pool="4MiB")
    engine = world.engine(sidecar)
    prompts = [chain(f"prompt-{index}", 30) for index in range(40)]
    most = 0
    for prompt in prompts:
        engine.must_save(prompt)
        until(lambda: not ssd(sidecar)["writes_waiting"], "the writes")
        most = max(most, used_on_disk(disk))
    assert 3 * MIB <= most <= 4 * MIB
    now = ssd(sidecar)
    assert now["blocks_dropped"] > 0 and now["records"] <= 4 * MIB // (24 * 1024)
    (directory,) = now["directories"]
    assert directory["used_bytes"] <= directory["capacity_bytes"] == 4 * MIB
    for prompt in prompts:
        if engine.lookup(prompt):
            engine.must_load(prompt)
    assert len(engine.must_load(prompts[-1]).hashes) == 30


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_fails_no_engine(world: World, small_disk: Path) -> None:
    sidecar = with_ssd(world, small_disk / "ssd", capacity="64MiB", host_pool="4MiB")
    engine = world.engine(sidecar)
    (small_disk / "somebody-elses").write_bytes(bytes(3 * MIB))
    prompts = [chain(f"prompt-{index}", 30) for index in range(40)]
    for prompt in prompts:
        engine.must_save(prompt)
        assert len(engine.must_load(prompt).hashes) == 30
    until(lambda: not ssd(sidecar)["writes_waiting"], "the writes")
    now = ssd(sidecar)
    assert now["blocks_written"] > 100 and not now["directories"][0]["read_only"]
    assert len(engine.must_load(prompts[-1]).hashes) == 30


@pytest.mark.parametrize("seed", [5, 6])
def test_kills_at_any_point_under_load_change_no_byte(world: World, disk: Path, seed: int) -> None:
    chance = random.Random(seed)
    sidecar = with_ssd(world, disk, capacity="8MiB", host_pool="2MiB")
    engines = [world.engine(sidecar, way=way) for way in ("memfd", "process_vm")]
    traffics = [Traffic(engine, seed * 10 + index, prompts=40) for index, engine in enumerate(engines)]
    for _ in range(6):
        before = [engine.attaches() for engine in engines]
        end = time.monotonic() + chance.uniform(0.1, 0.6)
        while time.monotonic() < end:
            for traffic in traffics:
                traffic.step()
        sidecar.kill_worker()
        for engine, attaches in zip(engines, before, strict=True):
            engine.await_again(attaches, 30)
    for traffic in traffics:
        traffic.run(0.5)
    for engine in engines:
        engine.settle()
    assert used_on_disk(disk) <= 8 * MIB
    status = sidecar.status()
    assert status["ssd"]["blocks_read"] > 0 and status["ssd"]["blocks_corrupt"] == 0
    assert status["faults"] == {"checksum_failures": 0, "identity_mismatches": 0, "protocol_errors": 0}
    sidecar.await_unleased()


@pytest.mark.parametrize("mode", ["write_through", "write_around", "read_only"])
def test_cache_modes(world: World, disk: Path, mode: str) -> None:
    writer = with_ssd(world, disk, ssd_cache_mode="write_back" if mode == "read_only" else mode)
    engine = world.engine(writer)
    prompt = chain("a", 30)
    engine.must_save(prompt)
    if mode != "write_through":
        await_written(writer, 30)
    with writer.stopped():
        kill(writer)
    writer.flags["ssd_cache_mode"] = mode
    writer.start()
    fresh: FakeEngine = world.engine(writer, "fresh")
    assert len(fresh.must_load(prompt).hashes) == 30, "acknowledged, and there"
    fresh.must_save(chain("b", 10))
    assert len(fresh.must_load(chain("b", 10)).hashes) == 10
    until(lambda: not ssd(writer)["writes_waiting"], "the writes")
    assert ssd(writer)["blocks_written"] == (0 if mode == "read_only" else 10)


def test_each_engine_may_have_a_cache_mode_of_its_own(world: World, disk: Path) -> None:
    sidecar = with_ssd(world, disk)
    modes = ("write_through", "read_only", "write_back")

    def engines(time: str) -> dict[str, FakeEngine]:
        return {
            mode: world.engine(sidecar, f"{mode}-{time}", model=mode, options={"cache_mode": mode})
            for mode in modes
        }

    prompt = chain("a", 20)
    first = engines("before")
    first["write_back"].must_save(prompt)
    await_written(sidecar, 20)
    first["read_only"].must_save(prompt)
    assert len(first["read_only"].must_load(prompt).hashes) == 20, "from the pool"
    before = ssd(sidecar)["blocks_written"]
    first["write_through"].must_save(prompt)
    assert ssd(sidecar)["blocks_written"] == before + 20, "acknowledged when it is written"
    with sidecar.stopped():
        kill(sidecar)
    sidecar.start()
    again = engines("after")
    assert len(again["write_through"].must_load(prompt).hashes) == 20
    assert len(again["write_back"].must_load(prompt).hashes) == 20
    assert again["read_only"].load(prompt) is None, "it was never written"
    sidecar.await_unleased()
