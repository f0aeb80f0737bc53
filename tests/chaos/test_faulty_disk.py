"""The SSD tier's own I/O on a disk that fails (FUSE): whatever it does, no wrong byte reaches an engine.

The same faults at every operation, below the tier's I/O, are in the tier's own tests. Long runs: `scripts/soak ssd-faults`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos.conftest import World
from chaos.engine import DONE, FAILED, FakeEngine, Shape, Traffic, chain
from chaos.faulty_disk import FaultyDisk, mounted
from chaos.sidecar import Sidecar, until
from chaos.test_ssd import await_written, ssd

MIB = 1 << 20
SECTOR = 4096
SMALL = Shape(layers=2, heads=2, states=16, content=64)
"""Records of one sector."""
LONG = os.environ.get("PILLION_SOAK") == "1"
EIO, ENOSPC = 5, 28
Count = Callable[[str, object], None]
"""Adds to what `scripts/soak ssd-faults` reports."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    yield from mounted(tmp_path / "disk")


def on(world: World, disk: FaultyDisk, **flags: Any) -> Sidecar:
    given = {"ssd": f"{disk.place}=64MiB", "ssd_segment": "1MiB", "drain_seconds": 3, **flags}
    return world.sidecar(**given)


def stop_at_once(sidecar: Sidecar) -> None:
    """As when the power goes: nothing is written any more."""
    with sidecar.stopped() as worker:
        os.kill(sidecar.supervisor_pid, 9)
        os.kill(worker, 9)
    assert sidecar.process
    sidecar.process.wait(10)


def headers(disk: FaultyDisk) -> list[tuple[str, int]]:
    """Segment file and byte of every record's header."""
    found = []
    for file in sorted(disk.place.glob("*.segment")):
        data = file.read_bytes()
        found += [(file.name, at) for at in range(0, len(data), SECTOR) if data[at:].startswith(b"PLNHEAD")]
    return found


def loaded(engine: FakeEngine, prompts: list[list[bytes]]) -> int:
    """How many of these prompts' blocks come back; the engine compares every byte."""
    count = 0
    for prompt in prompts:
        job = engine.load(prompt)
        if job is not None and engine.wait(job).outcome == DONE:
            count += len(job.hashes)
    return count


def must_come_back(engine: FakeEngine, prompts: list[list[bytes]], what: str) -> None:
    """A machine without a free core may let a lookup be late: that is a miss, and not a loss."""
    for prompt in prompts:

        def whole(prompt: list[bytes] = prompt) -> bool:
            return loaded(engine, [prompt]) == len(prompt)

        until(whole, lambda: f"{what}; {engine.told()}")


@pytest.mark.parametrize("part", ["header", "payload", "commit"])
def test_a_bit_that_rots_is_detected(
    world: World, disk: FaultyDisk, part: str, record_property: Count
) -> None:
    """Another bit in each record: of every bit of what a header says, or of any other place."""
    chance = random.Random(part)
    bits = list(range(512 * 8)) if LONG and part == "header" else chance.sample(range(512 * 8), 256)
    prompts = [chain(f"{part}-{index}", 1) for index in range(len(bits))]
    sidecar = on(world, disk)
    engine = world.engine(sidecar, "writer", shape=SMALL)
    for prompt in prompts:
        engine.must_save(prompt)
    await_written(sidecar, len(prompts))
    assert sidecar.terminate() == 0
    places = headers(disk)
    assert len(places) == len(prompts)
    for (file, at), bit in zip(places, bits, strict=True):
        where = {
            "header": bit,
            "payload": SECTOR * 8 + chance.randrange(SECTOR * 8),
            "commit": 2 * SECTOR * 8 + bit,
        }
        disk.tell("rot", file=file, bit=at * 8 + where[part])
    sidecar.start()
    reader = world.engine(sidecar, "reader", shape=SMALL)
    found = loaded(reader, prompts)
    if part == "commit":
        # Of no use but to recover, and a footer vouches for these.
        assert found == len(prompts)
        return
    assert found == 0, "every bit counts"
    record_property(f"bits_rotten_in_{part}", len(bits))
    record_property(f"bits_detected_in_{part}", ssd(sidecar)["blocks_corrupt"])
    assert ssd(sidecar)["blocks_corrupt"] == len(prompts), "detected / injected"


@pytest.mark.parametrize("mode", ["write_back", "write_through"])
@pytest.mark.parametrize("how", ["first", "some", "lose"])
def test_a_power_cut_tears_what_was_not_synced(
    world: World, disk: FaultyDisk, mode: str, how: str, record_property: Count
) -> None:
    """In every prefix, or in any order: what is there is right, and what was acknowledged as durable is there."""
    sidecar = on(world, disk, ssd_cache_mode=mode)
    saved: list[list[bytes]] = []
    runs = (200 if LONG else 12) if how != "lose" else 3
    record_property(f"power_cuts_{mode}_{how}", runs)
    chance = random.Random(how)
    for run in range(runs):
        engine = world.engine(sidecar, f"writer-{run}")
        prompt = chain(f"{mode}-{run}", 3)
        engine.must_save(prompt)
        await_written(sidecar, 1)
        # Under way when it happens.
        late = chain(f"late-{run}", 4)
        engine.save(late)
        for _ in range(chance.randrange(3)):
            engine.poll()
        stop_at_once(sidecar)
        units = disk.status()["unsynced"]
        # Spread over all prefixes, and not beyond.
        disk.tell("cut", how=how, value=run * (units + 1) // runs if how == "first" else run)
        engine.close()
        world.engines.remove(engine)
        sidecar.start()
        reader = world.engine(sidecar, f"reader-{run}")
        saved.append(prompt)
        if mode == "write_through":
            must_come_back(reader, saved, f"what was acknowledged, after cut {run}")
        else:
            loaded(reader, saved)
        loaded(reader, [late])
        reader.close()
        world.engines.remove(reader)
    assert sidecar.status()["faults"]["identity_mismatches"] == 0


FAULTS: dict[str, tuple[str, str, int]] = {
    "writes fail": ("write", "errno", EIO),
    "writes are torn": ("write", "torn", 11),
    "writes are lost": ("write", "lost", 0),
    "writes go elsewhere": ("write", "misdirected", 48),
    "a bit of a write changes": ("write", "flip", 40_007),
    "no room": ("write", "errno", ENOSPC),
    "reads fail": ("read", "errno", EIO),
    "a bit of a read changes": ("read", "flip", 40_007),
    "syncs fail": ("sync", "errno", EIO),
    "syncs are lies": ("sync", "lost", 0),
}


@pytest.mark.parametrize("io", ["auto", "threads"])
@pytest.mark.parametrize("name", FAULTS)
def test_no_wrong_byte_whatever_the_disk_does(
    world: World, disk: FaultyDisk, name: str, io: str, record_property: Count
) -> None:
    """A working set larger than the pool, faults now and then, and a restart in the middle."""
    sidecar = on(world, disk, host_pool="2MiB", ssd_engine=io)
    engine = world.engine(sidecar)
    known, new = (Traffic(engine, seed=len(name), prompts=prompts, whole=True) for prompts in (40, 4000))
    seconds = 5.0 if LONG else 0.3

    def run() -> None:
        known.run(seconds)
        new.run(seconds)

    run()
    what, fault, value = FAULTS[name]
    disk.rule(what, fault, value, after=3, every=5 if what != "sync" else 2)
    run()
    before = engine.attaches()
    sidecar.kill_worker()
    engine.await_again(before, 30)
    run()
    injected = disk.status()["injected"]
    record_property(f"faults_under_load: {name}", injected)
    disk.well()
    run()
    engine.settle()
    assert injected > 0, "nothing went wrong"
    status = sidecar.status()
    assert status["faults"]["identity_mismatches"] == status["faults"]["protocol_errors"] == 0


def test_a_flipped_bit_is_detected_at_every_read(
    world: World, disk: FaultyDisk, record_property: Count
) -> None:
    sidecar = on(world, disk)
    engine = world.engine(sidecar, "writer")
    prompts = [chain(f"flip-{index}", 1) for index in range(60)]
    for prompt in prompts:
        engine.must_save(prompt)
    await_written(sidecar, 60)
    assert sidecar.terminate() == 0
    sidecar.start()
    reader = world.engine(sidecar, "reader")
    before = disk.status()["injected"]
    # Behind the header, in front of the commit.
    disk.rule("read", "flip", (SECTOR + 777) * 8, every=1)
    assert loaded(reader, prompts) == 0
    injected = disk.status()["injected"] - before
    record_property("bits_flipped_by_reads", injected)
    record_property("bits_flipped_and_detected", ssd(sidecar)["blocks_corrupt"])
    assert ssd(sidecar)["blocks_corrupt"] == injected == 60, "detected / injected"
    disk.well()
    assert loaded(reader, prompts) == 0, "who was found wrong once is not asked again"


def test_a_slow_disk_is_not_waited_for(world: World, disk: FaultyDisk) -> None:
    """A load falls through to recompute when waiting costs more."""
    sidecar = on(world, disk, ssd_wait_ms=100)
    engine = world.engine(sidecar, "writer")
    prompt = chain("a", 20)
    engine.must_save(prompt)
    await_written(sidecar, 20)
    assert sidecar.terminate() == 0
    sidecar.start()
    reader = world.engine(sidecar, "reader")
    until(lambda: reader.lookup(prompt) == 20, "the table")
    disk.rule("read", "slow", 1500, every=1)
    assert reader.load(prompt) is None, "it is computed"
    assert ssd(sidecar)["leases_cut_short"] >= 1
    disk.well()
    # What has come by then is there.
    until(lambda: ssd(sidecar)["blocks_read"] > 0, "the slow reads", 20)
    until(lambda: loaded(reader, [prompt]) == 20, "all of it", 20)


def prompt_on_a_slow_disk(
    world: World, disk: FaultyDisk, **flags: Any
) -> tuple[FakeEngine, list[bytes], Sidecar]:
    """A prompt that takes longer to read than a lookup waits, though the disk brings a block now and then."""
    sidecar = on(world, disk, ssd_engine="threads", ssd_wait_ms=100, **flags)
    engine = world.engine(sidecar, "writer")
    warm_up, prompt = chain("warm-up", 20), chain("a", 120)
    for one in (warm_up, prompt):
        engine.must_save(one)
    await_written(sidecar, 140)
    assert sidecar.terminate() == 0
    sidecar.start()
    reader = world.engine(sidecar, "reader")
    until(lambda: reader.lookup(prompt) == 120, "the table")
    disk.rule("read", "slow", 40, every=1)
    until(lambda: loaded(reader, [warm_up]) == 20, "the pace of the disk", 20)
    return reader, prompt, sidecar


def test_a_load_begins_while_the_rest_of_its_prefix_is_read(world: World, disk: FaultyDisk) -> None:
    reader, prompt, sidecar = prompt_on_a_slow_disk(world, disk, ssd_ahead_ms=10_000)
    before = ssd(sidecar)["leases_ahead"]
    assert len(reader.must_load(prompt).hashes) == 120, "by one lease"
    assert ssd(sidecar)["leases_ahead"] == before + 1
    sidecar.await_unleased()


def test_without_reading_ahead_a_lease_is_what_has_been_read(world: World, disk: FaultyDisk) -> None:
    reader, prompt, sidecar = prompt_on_a_slow_disk(world, disk, ssd_ahead_ms=0)
    job = reader.load(prompt)
    assert job is None or len(job.hashes) < 120
    assert ssd(sidecar)["leases_ahead"] == 0 and ssd(sidecar)["leases_cut_short"] > 0
    if job is not None:
        reader.wait(job)
    sidecar.await_unleased()


@pytest.mark.parametrize("fault", ["errno", "slow"])
def test_a_disk_that_fails_under_a_load_fails_the_load_only(
    world: World, disk: FaultyDisk, fault: str
) -> None:
    """Promised, and then not brought: an error, or nothing for longer than a request is to wait."""
    reader, prompt, sidecar = prompt_on_a_slow_disk(world, disk, ssd_ahead_ms=3000)
    disk.well()
    disk.rule("read", fault, EIO if fault == "errno" else 20_000, after=10, every=1)
    job = reader.load(prompt, deadline_ms=30_000)
    assert job is not None and len(job.hashes) == 120
    assert reader.wait(job).outcome == FAILED and job.quiesced, "long before its deadline"
    disk.well()
    until(lambda: loaded(reader, [prompt]) > 0, "what it brought", 30)
    reader.must_save(prompt)
    sidecar.await_unleased()


@pytest.mark.parametrize("what", ["read", "write", "sync"])
def test_the_nth_operation_fails(world: World, disk: FaultyDisk, what: str, record_property: Count) -> None:
    """Save, evict, load, restart, load; each time another operation fails, from the first to the last."""
    counts = {"read": 40, "write": 24, "sync": 8}
    chosen = range(counts[what]) if LONG else random.Random(what).sample(range(counts[what]), 5)
    record_property(f"nth_{what}_failed", len(chosen))
    sidecar = on(world, disk, host_pool="2MiB", ssd=f"{disk.place}=8MiB")
    for run, number in enumerate(sorted(chosen)):
        engine = world.engine(sidecar, f"engine-{run}")
        prompts = [chain(f"{what}-{run}-{index}", 12) for index in range(12)]
        struck = disk.status()["injected"]
        disk.rule(what, "errno", EIO, after=number)
        for prompt in prompts:
            engine.must_save(prompt)
        loaded(engine, prompts)
        before = engine.attaches()
        sidecar.kill_worker()
        engine.await_again(before, 30)
        loaded(engine, prompts)
        if LONG:
            assert disk.status()["injected"] == struck + 1, f"there is no {what} {number}"
        disk.well()
        engine.settle()
        engine.close()
        world.engines.remove(engine)
    assert sidecar.status()["faults"]["identity_mismatches"] == 0
