"""Faults of a device and its driver, on the fake device: real sidecars, engines in processes of their own.

What both kinds of machine can show is in `tests/gpu`; here is what a working driver does not do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos.fake_device import library
from chaos.sidecar import Sidecar, daemon, ended, until
from gpu_check.engine import shape
from gpu_check.world import FAKE, MIB, Engine, World

ROOT = Path(__file__).parents[2]
KV = shape(256 << 10, 200, "BLHNC")
AT_ONCE: dict[str, Any] = {"ready": False, "canary_seconds": 0}
"""For engines that do not wait for their sidecar."""


@pytest.fixture(scope="module")
def fake() -> Iterator[Path]:
    """The folder of its switches; it lies on the library path of every process that is started."""
    place = Path(tempfile.mkdtemp(prefix="pdf-", dir="/tmp"))
    for name in ("libcuda.so", "libcuda.so.1"):
        (place / name).symlink_to(library().resolve())
    before = dict(os.environ)
    modules = os.pathsep.join(str(ROOT / "tests" / part) for part in (".", "gpu"))
    os.environ.update(LD_LIBRARY_PATH=str(place), PILLION_FAKE_CUDA=str(place), PYTHONPATH=modules)
    yield place
    os.environ.clear()
    os.environ.update(before)
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def gpu(fake: Path) -> dict[str, Any]:
    (fake / "faults").write_text("")
    found: list[dict[str, Any]] = json.loads(pillion("devices", "--json").stdout)["devices"]
    return {"uuid": found[0]["device"].removeprefix("gpu-")}


@pytest.fixture
def world(gpu: dict[str, Any], fake: Path, tmp_path: Path) -> Iterator[World]:
    world = World(gpu, FAKE, tmp_path, fake, False)
    try:
        yield world
    except BaseException:
        print(world.explain())
        raise
    finally:
        world.close()


def pillion(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k == "PILLION_FAKE_CUDA" or not k.startswith("PILLION_")}
    return subprocess.run(
        [daemon(), *words], env={**kept, **environment}, capture_output=True, text=True, timeout=60
    )


def log(sidecar: Sidecar) -> str:
    return sidecar.log.read_text(errors="replace")


def starts_anew(world: World, sidecar: Sidecar, engine: Engine, fault: str, reason: str) -> None:
    """A fault that nothing but the end of the process ends: it comes soon, and the engine goes on."""
    before, attaches = sidecar.worker_pid, engine.call("attaches")
    world.faults(fault)
    engine.call("load", prompt="kept", count=8, deadline_ms=300)
    engine.call("save", prompt="new", count=8, deadline_ms=300)
    outcomes = engine.call("settle", seconds=20)
    assert "done" not in outcomes, outcomes
    until(lambda: ended(before), f"the sidecar's worker to give up: {log(sidecar)[-2000:]}", 20)
    assert reason in log(sidecar), log(sidecar)[-2000:]
    world.faults()
    engine.call("await_again", before=attaches)
    engine.call("save_and_load", prompt="after", count=8)


def kept(world: World, **flags: Any) -> tuple[Sidecar, Engine]:
    """A sidecar, and an engine that has saved something."""
    sidecar = world.sidecar(grace_seconds=1, cuda_call_seconds=1, **flags)
    engine = world.engine(sidecar, "engine", KV)
    engine.call("done", job=engine.call("save", prompt="kept", count=8))
    engine.call("await_hits", prompt="kept", count=8)
    engine.call("settle")
    return sidecar, engine


def test_a_copy_that_never_ends(world: World) -> None:
    starts_anew(
        world, *kept(world), "process=worker copy hang", "a copy between device and host does not end"
    )


def test_a_driver_call_that_never_returns(world: World) -> None:
    fault = "process=worker cuMemcpyBatchAsync_v2 hang"
    starts_anew(world, *kept(world), fault, "the queueing of copies does not come back")


def test_a_context_that_is_lost(world: World) -> None:
    starts_anew(world, *kept(world), "process=worker copy error 719", "the CUDA context is lost")


def test_an_unmap_that_never_returns(world: World) -> None:
    """The engine goes; its memory would never come back. The sidecar goes too, and another serves."""
    sidecar, engine = kept(world)
    other = world.engine(sidecar, "other", KV)
    before, attaches = sidecar.worker_pid, other.call("attaches")
    world.faults("process=worker cuIpcCloseMemHandle hang")
    engine.kill()
    until(lambda: ended(before), f"the sidecar's worker to give up: {log(sidecar)[-2000:]}", 20)
    assert "the unmapping of an engine's memory does not come back" in log(sidecar)
    world.faults()
    other.call("await_again", before=attaches)
    other.call("save_and_load", prompt="after", count=8)


def test_an_unmap_that_never_returns_while_the_engine_waits_to_sleep(world: World) -> None:
    sidecar, engine = kept(world)
    before = sidecar.worker_pid
    world.faults("process=worker cuIpcCloseMemHandle hang")
    # What may not be said before the memory is free is said when the process is gone.
    assert engine.call("sleep"), engine.call("told")
    assert ended(before)
    world.faults()
    engine.call("wake")
    engine.call("save_and_load", prompt="after", count=8)


def test_memory_that_cannot_be_opened_leaves_the_engine_uncached(world: World) -> None:
    sidecar = world.sidecar()
    world.faults("process=worker cuIpcOpenMemHandle_v2 error 304")
    engine = world.process()
    engine.call("open", socket=str(sidecar.socket), name="engine", shape=vars(KV), way="ipc", **AT_ONCE)
    until(lambda: "refused" in engine.call("told"), "the registration to be refused")
    assert "CUDA_ERROR_OPERATING_SYSTEM (304)" in engine.call("told")
    assert engine.call("jobs_while_asleep") == ["cancelled, quiesced", "failed, quiesced"]
    assert next(s["refused"] for s in sidecar.sessions() if s["role"] == "worker")


def test_an_import_that_takes_long_holds_up_nobody_else(world: World) -> None:
    sidecar, engine = kept(world)
    world.faults("process=worker cuIpcOpenMemHandle_v2 delay 700")
    late = world.process()
    begun = time.monotonic()
    late.call("open", socket=str(sidecar.socket), name="late", shape=vars(KV), way="ipc", **AT_ONCE)
    engine.call("done", job=engine.call("load", prompt="kept", count=8))
    assert engine.call("told") and time.monotonic() - begun < 0.6
    # Told to let go before it had it: it lets go once it has.
    assert late.call("sleep"), late.call("told")
    assert time.monotonic() - begun >= 0.6
    world.faults()
    late.call("wake")
    late.call("done", job=late.call("load", prompt="kept", count=8))


def test_sleep_and_wake_while_an_import_takes_long(world: World) -> None:
    """The request to let go is older than the memory that is presented next: it must not take that away."""
    sidecar = world.sidecar()
    world.faults("process=worker cuIpcOpenMemHandle_v2 delay 500")
    engine = world.process()
    engine.call("open", socket=str(sidecar.socket), name="engine", shape=vars(KV), way="ipc", **AT_ONCE)
    until(lambda: sidecar.sessions(), "the engine to attach")
    time.sleep(0.1)
    assert not engine.call("sleep", wait_ms=20), "nobody can have said so yet"
    engine.call("wake")
    engine.call("save_and_load", prompt="a", count=8)
    assert engine.call("sleep"), engine.call("told")
    assert world.held(sidecar, engine) == 0
    world.faults()
    engine.call("wake")
    engine.call("save_and_load", prompt="b", count=8)


def test_batched_copies_that_fail_are_done_one_by_one(world: World) -> None:
    sidecar = world.sidecar()
    world.faults("process=worker cuMemcpyBatchAsync_v2 error 801")
    engine = world.engine(sidecar, "engine", shape(256 << 10, 200, "LBHNC"))
    engine.call("save_and_load", prompt="a", count=8, jobs=3)
    assert "copying one by one from now on" in log(sidecar)


def test_more_jobs_than_events(world: World) -> None:
    """The rest is not taken, and says so at once."""
    sidecar = world.sidecar()
    engine = world.engine(sidecar, "engine", KV)
    world.faults("process=worker copy rate 1")
    for index in range(70):
        engine.call("save", prompt=f"p{index}", count=1)
    world.faults()
    outcomes = engine.call("settle")
    assert outcomes.count("cancelled") == 70 - 64 == engine.call("counters")["no_event"], outcomes
    assert outcomes.count("done") == 64
    # They are free again.
    engine.call("save_and_load", prompt="after", count=1, jobs=60)


def test_an_engine_of_another_device_is_refused(world: World, fake: Path) -> None:
    (fake / "faults").write_text("devices 2\n")
    second = json.loads(pillion("devices", "--json").stdout)["devices"][1]["device"]
    sidecar = Sidecar(device=second, host_pool=64 * MIB)
    world.sidecars.append(sidecar)
    sidecar.start()
    engine = world.process()
    engine.call("open", socket=str(sidecar.socket), name="engine", shape=vars(KV), way="ipc", **AT_ONCE)
    until(lambda: "refused" in engine.call("told"), "the registration to be refused")
    assert f"expected memory of device {second}" in engine.call("told")


def test_a_sidecar_of_the_cpu_says_where_a_gpu_engine_belongs(world: World) -> None:
    sidecar = Sidecar(host_pool=64 * MIB)
    world.sidecars.append(sidecar)
    sidecar.start()
    engine = world.process()
    engine.call("open", socket=str(sidecar.socket), name="engine", shape=vars(KV), way="vmm", **AT_ONCE)
    until(lambda: "refused" in engine.call("told"), "the registration to be refused")
    assert "it belongs to the sidecar of its GPU" in engine.call("told")


def test_a_pool_that_cannot_be_pinned(world: World, fake: Path) -> None:
    """The sidecar does not serve, says why, and serves once it can."""
    (fake / "faults").write_text("cuMemHostRegister_v2 error 2\n")
    sidecar = Sidecar(device=world.device, host_pool=64 * MIB)
    world.sidecars.append(sidecar)
    with sidecar.log.open("ab") as out:
        sidecar.process = subprocess.Popen(
            sidecar.arguments("serve"),
            env=sidecar.environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    until(lambda: "cannot pin a host pool of 64 MiB" in log(sidecar), lambda: log(sidecar))
    assert "CUDA_ERROR_OUT_OF_MEMORY" in log(sidecar) and not sidecar.socket.exists()
    world.faults()
    sidecar.await_ready()
    world.engine(sidecar, "engine", KV).call("save_and_load", prompt="a", count=4)


def test_status_and_metrics_name_the_way(world: World) -> None:
    sidecar = world.sidecar(http="127.0.0.1:9470")
    engines = [world.engine(sidecar, f"engine-{way}", KV, way=way) for way in ("ipc", "vmm")]
    paths = [s["registration"]["path"] for s in sidecar.sessions() if s["role"] == "worker"]
    assert paths == ["cuda_ipc", "cuda_vmm"]
    time.sleep(0.1)  # the fake writes its statistics that seldom
    canaries = world.statistics(sidecar.worker_pid)["pageable"]
    for engine in engines:
        engine.call("save_and_load", prompt=f"p{engine.pid}", count=2)
    time.sleep(0.6)  # levels are shown every 250 ms
    address = sidecar.status()["sidecar"]["http"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    for way in ("cuda_ipc", "cuda_vmm"):
        assert f'pillion_workers{{path="{way}"}} 1' in text, text
        assert re.search(rf'pillion_copy_seconds_count{{[^}}]*path="{way}"[^}}]*}} [1-9]', text), text
    time.sleep(0.1)
    assert world.statistics(sidecar.worker_pid)["pageable"] == canaries, "the whole pool is pinned"


# ---- which device is served ----------------------------------------------------


@pytest.fixture
def nowhere(tmp_path: Path) -> dict[str, str]:
    """Folders for `pillion serve`. Short: sockets lie in them."""
    place = tempfile.mkdtemp(prefix="pdv-", dir="/tmp")
    return {"PILLION_RUNTIME_DIR": f"{place}/r", "PILLION_STATE_DIR": f"{place}/s", "PILLION_HTTP": "off"}


def stop(nowhere: dict[str, str]) -> list[str]:
    """Ends what `serve --detach` started: the sockets that were there."""
    found = sorted(path.stem for path in Path(nowhere["PILLION_RUNTIME_DIR"]).glob("*.sock"))
    for pid in Path(nowhere["PILLION_RUNTIME_DIR"]).glob("*.supervisor.pid"):
        os.kill(int(pid.read_text()), 15)
        until(lambda pid=pid: not pid.exists(), "the sidecar to stop")  # type: ignore[misc]
    return found


def test_without_a_gpu_serve_serves_the_cpu_and_says_so(gpu: dict[str, Any], nowhere: dict[str, str]) -> None:
    done = pillion(
        "serve", "--detach", "--host-pool=8MiB", **nowhere, LD_LIBRARY_PATH="", PILLION_FAKE_CUDA=""
    )
    assert done.returncode == 0, done.stderr
    assert (
        "no GPU (" in done.stderr and "serving cpu0 instead, engines that compute on the CPU" in done.stderr
    )
    status = pillion("status", **nowhere)
    assert "serving cpu0" in status.stdout, status.stderr
    assert stop(nowhere) == ["cpu0"]


def test_with_a_gpu_serve_serves_the_first_one(gpu: dict[str, Any], nowhere: dict[str, str]) -> None:
    done = pillion("serve", "--detach", "--host-pool=8MiB", **nowhere)
    assert done.returncode == 0 and f"serving gpu-{gpu['uuid']}, the first GPU" in done.stderr, done.stderr
    # Commands find the one sidecar that runs here.
    assert f"serving gpu-{gpu['uuid']}" in pillion("status", **nowhere).stdout
    assert stop(nowhere) == [f"gpu-{gpu['uuid']}"]


def test_a_gpu_that_is_not_there_is_an_error_with_the_choice(
    gpu: dict[str, Any], nowhere: dict[str, str]
) -> None:
    done = pillion("serve", "--device", "gpu3", **nowhere)
    assert done.returncode == 1 and f"expected device gpu3, found only gpu-{gpu['uuid']}" in done.stderr
    done = pillion("serve", "--device", "gpu0", **nowhere, LD_LIBRARY_PATH="", PILLION_FAKE_CUDA="")
    assert done.returncode == 1 and "found none: " in done.stderr and "--device cpu0" in done.stderr


def test_devices_are_shown_with_the_names_of_their_sidecars(gpu: dict[str, Any], fake: Path) -> None:
    (fake / "faults").write_text("devices 2\n")
    text = pillion("devices").stdout.splitlines()
    assert text[0].startswith(f"gpu0  gpu-{gpu['uuid']}  Pillion fake device 0, ") and text[1].startswith(
        "gpu1 "
    )
    none = pillion("devices", LD_LIBRARY_PATH="", PILLION_FAKE_CUDA="")
    assert none.returncode == 0 and none.stdout.startswith("no GPU: ")


def test_a_driver_that_does_not_answer_is_not_waited_for_by_the_sidecar(
    gpu: dict[str, Any], fake: Path, nowhere: dict[str, str]
) -> None:
    """`pillion devices` asks it, in a process of its own: here it says no."""
    (fake / "faults").write_text("cuInit error 999\n")
    done = pillion("serve", "--detach", "--host-pool=8MiB", **nowhere)
    assert done.returncode == 0 and "CUDA_ERROR_UNKNOWN (999)" in done.stderr, done.stderr
    assert stop(nowhere) == ["cpu0"]


def test_what_a_gpu_engine_saved_comes_back_from_the_ssd(world: World, tmp_path: Path) -> None:
    """The same pool is pinned for the device and read and written by the disk."""
    sidecar = world.sidecar(host_pool="16MiB", ssd=f"{tmp_path}/{{device}}=64MiB", ssd_segment="4MiB")
    engine = world.engine(sidecar, "engine", KV)

    def ssd() -> dict[str, Any]:
        status: dict[str, Any] = sidecar.status()["ssd"]
        return status

    for name in ("a", "b"):
        # Together more than the pool holds.
        engine.call("done", job=engine.call("save", prompt=name, count=40))
        until(lambda: not ssd()["writes_waiting"], lambda: f"the writes: {ssd()}")
    assert (ssd()["records"], [path.name for path in tmp_path.glob("gpu-*")]) == (80, [sidecar.device])

    def come_back() -> None:
        for name in ("a", "b"):
            engine.call("await_hits", prompt=name, count=40)
            assert engine.call("done", job=engine.call("load", prompt=name, count=40))
            engine.call("settle")

    come_back()
    attaches = engine.call("attaches")
    sidecar.kill_worker()
    engine.call("await_again", before=attaches)
    come_back()
    assert ssd()["blocks_read"] >= 80 and not ssd()["read_failures"]
