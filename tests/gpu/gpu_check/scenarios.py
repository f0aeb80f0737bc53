"""What must hold. Each takes a world of its own and says what it saw; a failure is an exception."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos.engine import Shape
from chaos.sidecar import Sidecar
from gpu_check.engine import shape
from gpu_check.probe import probe
from gpu_check.world import MIB, EngineFailed, Skipped, World

Scenario = Callable[[World], str]
SCENARIOS: dict[str, Scenario] = {}
SECONDS: dict[str, float] = {}
"""At most, for those that have limits of their own."""
LAST: list[str] = []
"""These come after the measurements."""
SANITIZED_READY = 75


def scenario(
    name: str, *, seconds: float | None = None, last: bool = False
) -> Callable[[Scenario], Scenario]:
    def add(function: Scenario) -> Scenario:
        SCENARIOS[name] = function
        if seconds:
            SECONDS[name] = seconds
        if last:
            LAST.append(name)
        return function

    return add


def usual(world: World, blocks: int, order: str = "BLHNC") -> Shape:
    """Block-first: a record is one piece. Otherwise it is many."""
    record = world.sizes.record if order.startswith("B") else world.sizes.fragments_record
    return shape(record, blocks, order)


def registered_by(sidecar: Sidecar) -> list[str]:
    workers = [session for session in sidecar.sessions() if session["role"] == "worker"]
    return [(session["registration"] or {}).get("path", "nothing") for session in workers]


scenario("probe", seconds=45)(probe)


# ---- there and back ----------------------------------------------------------


def round_trip(world: World, way: str, order: str, device: str) -> str:
    """Many blocks by several jobs at once; another engine, with its own memory, finds them as well."""
    world.need(device)
    sizes = world.sizes
    sidecar = world.sidecar()
    kv = usual(world, 1 + 2 * sizes.blocks * sizes.jobs, order)
    first = world.engine(sidecar, "first", kv, way=way, device=device)
    paths = registered_by(sidecar)
    assert len(paths) == 1 and way in paths[0], f"expected the memory to be reached by {way}, got {paths}"
    took = first.call("save_and_load", prompt="a", count=sizes.blocks, jobs=sizes.jobs)
    second = world.engine(sidecar, "second", kv, way=way)
    second.call("load_all", prompt="a", count=sizes.blocks, jobs=sizes.jobs)
    first.call("close")
    second.call("close")
    size = sizes.blocks * sizes.jobs * kv.layers * kv.page / MIB
    return f"{size:.0f} MiB by {paths[0]}, {order}, {took:.2f} s with all comparisons"


for _way, _order, _device in (
    ("ipc", "BLHNC", "driver"),
    ("ipc", "LBNHC", "driver"),
    ("vmm", "BLHNC", "driver"),
    ("vmm", "LBNHC", "driver"),
    ("ipc", "BLHNC", "torch"),
    ("ipc", "LBNHC", "torch"),
):

    def _round_trip(world: World, way: str = _way, order: str = _order, device: str = _device) -> str:
        return round_trip(world, way, order, device)

    scenario(f"round-trip-{'torch' if _device == 'torch' else _way}-{_order}")(_round_trip)


@scenario("batch-copy-off")
def batch_copy_off(world: World) -> str:
    """The plain loop moves the same bytes as the batch API."""
    sizes = world.sizes
    sidecar = world.sidecar(cuda_batch_copy="off")
    for order in ("BLHNC", "LBNHC"):
        kv = usual(world, 1 + 2 * sizes.blocks, order)
        engine = world.engine(sidecar, f"engine-{order}", kv)
        engine.call("save_and_load", prompt=order, count=sizes.blocks)
        engine.call("close")
    return "both layouts"


# ---- order ---------------------------------------------------------------------


def forward(world: World, device: str) -> str:
    """The stream stands still, then the blocks are computed: what was saved is what was computed."""
    world.need(device)
    sidecar, delay = world.sidecar(), 100
    engine = world.engine(sidecar, "engine", usual(world, 200), device=device)
    for turn in range(3):
        job = engine.call("save", prompt=f"p{turn}", count=16, delay_ms=delay)
        took = engine.call("done", job=job)["since"]
        assert took > delay / 1000, f"saved after {took:.3f} s, before its blocks were computed"
        engine.call("await_hits", prompt=f"p{turn}", count=16)
        engine.call("done", job=engine.call("load", prompt=f"p{turn}", count=16))
    engine.call("close")
    return f"saved {took * 1000 - delay:.1f} ms after the end of the forward pass"


@scenario("save-waits-for-forward")
def save_waits(world: World) -> str:
    return forward(world, "driver")


@scenario("save-waits-for-forward-torch")
def save_waits_torch(world: World) -> str:
    return forward(world, "torch")


@scenario("load-waits-for-zeroing")
def load_waits(world: World) -> str:
    """Zeroing that is still queued when a load is submitted comes before it, not after."""
    sidecar, delay = world.sidecar(), 100
    engine = world.engine(sidecar, "engine", usual(world, 200))
    engine.call("save_and_load", prompt="p", count=16)
    for _ in range(3):
        job = engine.call("load", prompt="p-0", count=16, delay_ms=delay)
        took = engine.call("done", job=job)["since"]
        assert took > delay / 1000, f"loaded after {took:.3f} s, before the blocks were zeroed"
    engine.call("close")
    return f"loaded {took * 1000 - delay:.1f} ms after the zeroing"


@scenario("graph-replays-meanwhile")
def graph_meanwhile(world: World) -> str:
    """A captured graph is replayed all the time, on the stream that jobs wait for."""
    world.need("torch")
    sizes = world.sizes
    sidecar = world.sidecar()
    engine = world.engine(sidecar, "engine", usual(world, 1 + 2 * sizes.blocks), device="torch")
    seen = engine.call("graph_meanwhile", seconds=3, prompt="g", count=sizes.blocks)
    engine.call("close")
    return f"{seen['replays']} replays beside {seen['round trips']} round trips"


# ---- an early end ----------------------------------------------------------------


@scenario("deadlines-in-big-jobs")
def deadlines(world: World) -> str:
    """Jobs are cut short anywhere; their blocks are reused at once, and nothing writes them late."""
    sizes = world.sizes
    sidecar = world.sidecar()
    engine = world.engine(sidecar, "engine", usual(world, 1 + 3 * sizes.big))
    world.slow_copies()
    ended = engine.call("cut_short", prompt="big", count=sizes.big, rounds=sizes.rounds, seed=1)
    assert ended["load failed"] > 0, f"no load was cut short: {ended}"
    world.faults()
    engine.call("save_and_load", prompt="after", count=sizes.blocks)
    sidecar.await_unleased()
    engine.call("close")
    return ", ".join(f"{count} {what}" for what, count in sorted(ended.items()) if count)


@scenario("sidecar-killed")
def sidecar_killed(world: World) -> str:
    """SIGKILL in the middle of transfers: the engine goes on, attaches again, and all is well."""
    sizes, chance = world.sizes, random.Random(2)
    sidecar = world.sidecar()
    engine = world.engine(sidecar, "engine", usual(world, 1 + 3 * sizes.big))
    hit = 0
    for turn in range(sizes.kills):
        world.faults()
        job = engine.call("save", prompt=f"here-{turn}", count=sizes.big)
        engine.call("done", job=job)
        engine.call("await_hits", prompt=f"here-{turn}", count=sizes.big)
        whole = engine.call("done", job=engine.call("load", prompt=f"here-{turn}", count=sizes.big))["took"]
        engine.call("settle")
        world.slow_copies()
        before = engine.call("attaches")
        engine.call("save", prompt=f"new-{turn}", count=sizes.big)
        # On a GPU a transfer takes some milliseconds: a kill may come too late. Every second load waits for work
        # of the engine that lasts longer than we do.
        held = turn % 2 == 0
        engine.call("load", prompt=f"here-{turn}", count=sizes.big, delay_ms=50 if held else 0)
        time.sleep(chance.uniform(0, 0.01) if held else chance.uniform(0, 0.8) * whole)
        sidecar.kill_worker()
        ended = engine.call("settle")
        hit += ended != ["done", "done"]
        engine.call("await_again", before=before)
    world.faults()
    assert hit, "no transfer was hit"
    engine.call("save_and_load", prompt="after", count=sizes.blocks)
    engine.call("close")
    return f"{hit} of {sizes.kills} kills cut a transfer short"


@scenario("engine-killed")
def engine_killed(world: World) -> str:
    """Its memory comes back to the device, and its successor finds what it had saved."""
    sizes, chance = world.sizes, random.Random(3)
    sidecar = world.sidecar()
    watcher = world.engine(sidecar, "watcher", usual(world, 2))
    watcher.call("save_and_load", prompt="w", count=1)
    kv = usual(world, 1 + 3 * sizes.big)
    before = world.held(sidecar, watcher)
    for turn in range(sizes.kills):
        way = ("ipc", "vmm")[turn % 2]
        victim = world.engine(sidecar, f"victim-{turn}", kv, way=way)
        if turn:
            victim.call("await_hits", prompt="kept", count=sizes.big)
            victim.call("done", job=victim.call("load", prompt="kept", count=sizes.big))
        else:
            victim.call("done", job=victim.call("save", prompt="kept", count=sizes.big))
            victim.call("await_hits", prompt="kept", count=sizes.big)
        world.slow_copies()
        victim.call("save", prompt=f"lost-{turn}", count=sizes.big)
        victim.call("load", prompt="kept", count=sizes.big)
        # Its own work is done: the sidecar waits for nothing that will never come.
        victim.call("quiet")
        time.sleep(chance.uniform(0, 0.01))
        victim.kill()
        world.faults()
        world.await_released(sidecar, watcher, before)
        assert sidecar.status()["sidecar"]["worker_restarts"] == 0, "the sidecar died with the engine"
        watcher.call("save_and_load", prompt=f"w{turn}", count=1)
    heir = world.engine(sidecar, "heir", kv)
    heir.call("done", job=heir.call("load", prompt="kept", count=sizes.big))
    for turn in range(sizes.kills):
        # What was not saved to its end is not there, or whole.
        if hits := heir.call("lookup", prompt=f"lost-{turn}", count=sizes.big):
            heir.call("done", job=heir.call("load", prompt=f"lost-{turn}", count=hits))
    sidecar.await_unleased()
    heir.call("close")
    watcher.call("close")
    return f"{sizes.kills} kills"


@scenario("engine-killed-in-forward")
def engine_killed_in_forward(world: World) -> str:
    """Jobs wait for work of its own that never ends. Only they are lost: nothing was queued behind that work, so the
    sidecar lets go of the memory and keeps what it has.
    """
    sizes = world.sizes
    # A real driver takes a while to clear away a process that was killed in the middle of its work.
    sidecar = world.sidecar(grace_seconds=1 if world.fake else 5)
    watcher = world.engine(sidecar, "watcher", usual(world, 8))
    watcher.call("save_and_load", prompt="w", count=1)
    before, told = world.held(sidecar, watcher), []
    for way in ("ipc", "vmm"):
        victim = world.engine(sidecar, f"victim-{way}", usual(world, 1 + 3 * sizes.blocks), way=way)
        victim.call("save_and_load", prompt=way, count=4)
        victim.call("save", prompt=f"lost-{way}", count=4, delay_ms=900)
        victim.call("load", prompt=f"{way}-0", count=4)
        time.sleep(0.1)
        victim.kill()
        begun = time.monotonic()
        restarts = sidecar.status()["sidecar"]["worker_restarts"]
        world.await_released(sidecar, watcher, before, 30)
        released = time.monotonic() - begun
        watcher.call("await_ready")
        watcher.call("save_and_load", prompt=f"w-{way}", count=1)
        now = sidecar.status()["sidecar"]["worker_restarts"]
        assert now == restarts, f"the sidecar started anew: all that it had is lost\n{sidecar.explain()}"
        told.append(f"{way}: after {released:.1f} s")
        assert watcher.call("lookup", prompt=f"lost-{way}", count=4) == 0, "served what was never computed"
    watcher.call("close")
    return "; ".join(told)


@scenario("sleep-and-wake")
def sleep_and_wake(world: World) -> str:
    """Let go of the memory, take other memory, go on."""
    sizes = world.sizes
    sidecar = world.sidecar()
    watcher = world.engine(sidecar, "watcher", usual(world, 2))
    kv = usual(world, 1 + 3 * sizes.blocks)
    for way in ("ipc", "vmm"):
        before = world.held(sidecar, watcher)
        engine = world.engine(sidecar, f"engine-{way}", kv, way=way)
        engine.call("save_and_load", prompt=way, count=sizes.blocks)
        if not world.fake:
            # The engine's context stays.
            before = world.held(sidecar, watcher) - kv.total
        for turn in range(2):
            engine.call("load", prompt=f"{way}-0", count=sizes.blocks)  # in its middle
            assert engine.call("sleep"), f"the sidecar did not say that it let go: {engine.call('told')}"
            world.await_released(sidecar, watcher, before)
            ended = engine.call("jobs_while_asleep")
            assert ended == ["cancelled, quiesced", "failed, quiesced"], f"jobs of an engine asleep: {ended}"
            engine.call("settle")
            engine.call("wake")
            engine.call("load_all", prompt=way, count=sizes.blocks)
            engine.call("save_and_load", prompt=f"{way}-awake-{turn}", count=sizes.blocks)
        engine.call("close")
    watcher.call("close")
    return "twice by each way"


# ---- what must be refused ----------------------------------------------------------


def flip_in_pool(pid: int, start: bytes, offset: int) -> None:
    """Changes one bit behind some bytes in the sidecar's pool: in its own mapping, as nobody else can map it to write."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "memfd:pillion-pool" not in line or "rw" not in line.split()[1]:
            continue
        begin, end = (int(text, 16) for text in line.split()[0].split("-"))
        try:
            memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)
        except PermissionError as error:
            raise Skipped(f"the sidecar's memory cannot be written from here: {error}") from error
        try:
            at = begin
            while at < end:
                # The parts overlap: what is looked for may lie across their border.
                found = os.pread(memory, min(16 * MIB + len(start), end - at), at).find(start)
                if found >= 0:
                    place = at + found + offset
                    os.pwrite(memory, bytes([os.pread(memory, 1, place)[0] ^ 4]), place)
                    return
                at += 16 * MIB
        finally:
            os.close(memory)
    raise Skipped("the record was not found in the sidecar's pool")


@scenario("corrupted-record")
def corrupted_record(world: World) -> str:
    """One bit of a stored block changes: the load of it fails, and others do not."""
    sizes = world.sizes
    sidecar = world.sidecar(host_pool=256 * MIB)
    engine = world.engine(sidecar, "engine", usual(world, 64))
    engine.call("save_and_load", prompt="good", count=8)
    engine.call("save_and_load", prompt="bad", count=8)
    start = bytes.fromhex(engine.call("content_start", prompt="bad-0", block=5))
    flip_in_pool(sidecar.worker_pid, start, sizes.record // 2)
    job = engine.call("load", prompt="bad-0", count=8)
    found = engine.call("wait", job=job)
    assert found["outcome"] == "failed", f"a load of a corrupted record: {found}"
    faults = sidecar.status()["faults"]
    assert faults["checksum_failures"] > 0, f"not counted: {faults}"
    engine.call("load_all", prompt="good", count=8)
    engine.call("close")
    return f"refused; {faults['checksum_failures']} checksum failures counted"


@scenario("wrong-canary")
def wrong_canary(world: World) -> str:
    """An engine whose blocks are not where it says is refused with the reason."""
    sidecar = world.sidecar()
    try:
        world.engine(sidecar, "engine", usual(world, 8), seed_error=1, ready=False)
    except EngineFailed as error:
        text = str(error).splitlines()[0]
        assert "ValueError" in text and "canary" in text, f"refused for another reason: {error}"
        return text
    raise AssertionError("a registration with a wrong canary was taken")


# ---- the sanitizer -------------------------------------------------------------------


def sanitizer() -> str | None:
    if found := shutil.which("compute-sanitizer"):
        return found
    places = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    return str(places[-1]) if places else None


@scenario("compute-sanitizer", seconds=150, last=True)
def compute_sanitizer(world: World) -> str:
    """memcheck around the sidecar, for one small round trip by each way."""
    tool = sanitizer()
    if world.fake or not tool:
        raise Skipped("no compute-sanitizer" if not tool else "needs a GPU")
    log = world.place / "sanitizer-%p.log"
    wrapper = [tool, "--tool=memcheck", "--target-processes=all", f"--log-file={log}"]
    # It slows everything down: nobody must be taken for mute.
    flags: dict[str, Any] = {"host_pool": 256 * MIB, "heartbeat_ms": 10_000}
    try:
        sidecar = world.sidecar(wrapper=wrapper, ready=SANITIZED_READY, **flags)
    except (AssertionError, subprocess.TimeoutExpired):
        process = world.sidecars[-1].process
        if process and process.poll() is None:
            why = f"the sidecar did not get ready under it within {SANITIZED_READY} s"
            raise Skipped(why) from None
        raise
    for way in ("ipc", "vmm"):
        engine = world.engine(sidecar, way, usual(world, 64), way=way)
        engine.call("save_and_load", prompt=way, count=16)
        engine.call("close")
    os.kill(sidecar.supervisor_pid, signal.SIGTERM)
    assert sidecar.process
    sidecar.process.wait(30)
    logs = sorted(world.place.glob("sanitizer-*.log"))
    text = "\n".join(each.read_text(errors="replace") for each in logs)
    errors = [int(count) for count in re.findall(r"ERROR SUMMARY: (\d+) error", text)]
    assert errors, f"the sanitizer did not say what it found:\n{text[-3000:]}"
    assert not any(errors), f"{sum(errors)} errors:\n{text[:6000]}"
    return f"0 errors in {len(errors)} processes"
