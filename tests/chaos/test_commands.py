"""What a person types, and what it does to processes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.request

from chaos.conftest import World
from chaos.engine import chain
from chaos.sidecar import Sidecar, daemon, ended, until


def test_status_says_what_a_sidecar_holds_and_does(world: World) -> None:
    sidecar = world.sidecar()
    engine = world.engine(sidecar, "shown")
    engine.must_save(chain("a", 10))
    engine.must_load(chain("a", 10))
    shown = sidecar.command("status")
    assert shown.returncode == 0 and "shown" in shown.stdout and "memfd LBHNC" in shown.stdout
    status = sidecar.status()
    assert status["sidecar"]["pid"] == sidecar.worker_pid
    assert status["sidecar"]["supervisor_pid"] == sidecar.supervisor_pid
    assert status["pool"]["records"] == 10 and status["pool"]["used_bytes"] == 10 * engine.record_bytes
    assert status["tiers"][0]["blocks_loaded"] == status["tiers"][0]["blocks_saved"] == 10
    assert sorted(s["role"] for s in sidecar.sessions()) == ["scheduler", "worker"]


def test_status_without_a_sidecar_fails_in_words(world: World) -> None:
    sidecar = world.sidecar(start=False)
    shown = sidecar.command("status")
    assert shown.returncode != 0 and not shown.stdout
    assert "is a sidecar running?" in shown.stderr


def test_status_of_a_stopped_sidecar_gives_up_in_time(world: World) -> None:
    sidecar = world.sidecar()
    with sidecar.stopped():
        begun = time.monotonic()
        shown = sidecar.command("status")
        assert shown.returncode != 0 and "hangs or is stopped" in shown.stderr
        assert time.monotonic() - begun < 5


def test_doctor_judges_with_and_without_a_sidecar(world: World) -> None:
    sidecar = world.sidecar(start=False)
    without = sidecar.command("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(without.stdout)["checks"]}
    assert checks and all(check["verdict"] in ("ok", "warn", "fail") for check in checks.values())
    assert all(check.get("advice") for check in checks.values() if check["verdict"] != "ok"), checks
    failed = any(check["verdict"] == "fail" for check in checks.values())
    assert without.returncode == int(failed), without.stdout
    sidecar.start()
    world.engine(sidecar)
    with_it = sidecar.command("doctor")
    assert with_it.returncode == without.returncode and "cpu0" in with_it.stdout


def test_config_check_names_every_mistake_at_once(world: World) -> None:
    sidecar = world.sidecar(start=False, config='host_pool = "512MiB"\n')
    right = sidecar.command("config", "check", str(sidecar.config))
    assert right.returncode == 0 and "ok" in right.stdout
    sidecar.config.write_text('host_pol = "1MiB"\nlease_seconds = "soon"\nmax_sessions = 0\n')
    wrong = sidecar.command("config", "check", str(sidecar.config))
    assert wrong.returncode != 0 and not wrong.stdout
    for word in ("host_pol", "host_pool", "lease_seconds", "max_sessions"):
        assert word in wrong.stderr
    missing = sidecar.command("config", "check", str(sidecar.place / "nowhere.toml"))
    assert missing.returncode != 0 and "nowhere.toml" in missing.stderr


def test_config_show_says_where_values_come_from(world: World) -> None:
    sidecar = world.sidecar(start=False, config="max_sessions = 7\n")
    shown = sidecar.command("config", "show", f"--config={sidecar.config}", "--lease-seconds=9")
    assert shown.returncode == 0
    lines = {line.split(" = ")[0]: line for line in shown.stdout.splitlines() if " = " in line}
    assert "= 7" in lines["max_sessions"] and "pillion.toml" in lines["max_sessions"]
    assert "= 9" in lines["lease_seconds"] and "--lease-seconds" in lines["lease_seconds"]


def test_a_wrong_flag_or_file_keeps_it_from_starting_with_a_reason(world: World) -> None:
    sidecar = world.sidecar(start=False, config="max_sessions = 0\n")
    started = subprocess.run(
        sidecar.arguments("serve"), env=sidecar.environment, capture_output=True, text=True, timeout=20
    )
    assert started.returncode != 0 and "max_sessions" in started.stderr
    assert not sidecar.socket.exists()


def detach(sidecar: Sidecar, *flags: str, keep: tuple[int, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        sidecar.arguments("serve", "--detach", *flags),
        env=sidecar.environment,
        pass_fds=keep,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_detached_starts_at_the_same_time_make_one_sidecar(world: World) -> None:
    sidecar = world.sidecar(start=False)
    starters = [detach(sidecar) for _ in range(5)]
    for starter in starters:
        _, errors = starter.communicate(timeout=20)
        assert starter.returncode == 0, errors
    status = sidecar.await_ready()
    supervisor = sidecar.pid_of("cpu0.supervisor.pid")
    assert status["sidecar"]["supervisor_pid"] == supervisor
    ours = [pid for pid in os.listdir("/proc") if pid.isdigit() and serves(pid, sidecar)]
    until(
        lambda: len([pid for pid in ours if not ended(int(pid))]) == 2,
        f"one supervisor and one worker: {ours}",
    )
    again = detach(sidecar)
    assert again.wait(20) == 0
    assert sidecar.status()["sidecar"]["generation"] == status["sidecar"]["generation"]
    world.engine(sidecar).must_save(chain("a", 3))
    os.kill(supervisor, signal.SIGTERM)
    until(lambda: ended(supervisor), "it to end", 15)
    assert not sidecar.socket.exists()


def test_a_detached_one_keeps_nothing_open_that_its_starter_had(world: World) -> None:
    sidecar = world.sidecar(start=False)
    read, write = os.pipe()
    starter = detach(sidecar, keep=(write,))
    os.close(write)
    assert starter.wait(20) == 0
    sidecar.await_ready()
    # vLLM's workers have such pipes: the engine ends when nobody holds them any more.
    ready, _, _ = select.select([read], [], [], 5)
    assert ready and os.read(read, 1) == b""
    os.close(read)
    os.kill(sidecar.pid_of("cpu0.supervisor.pid"), signal.SIGTERM)
    until(lambda: not sidecar.socket.exists(), "it to end", 15)


def serves(pid: str, sidecar: Sidecar) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return str(sidecar.place).encode() in file.read()
    except OSError:
        return False


def test_a_sidecar_without_engines_exits_after_its_idle_time(world: World) -> None:
    sidecar = world.sidecar(idle_exit_seconds=1)
    engine = world.engine(sidecar)
    assert sidecar.process
    stop = time.monotonic() + 2
    while time.monotonic() < stop:
        engine.poll()
        assert sidecar.process.poll() is None, "an engine is attached"
        time.sleep(0.05)
    engine.scheduler.close()
    engine.worker.close()
    assert sidecar.process.wait(8) == 0
    assert not sidecar.socket.exists()


def test_sigterm_and_sigint_end_it_with_success(world: World) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        sidecar = world.sidecar()
        worker = sidecar.worker_pid
        assert sidecar.process
        sidecar.process.send_signal(number)
        assert sidecar.process.wait(10) == 0
        assert ended(worker) and not sidecar.socket.exists()
        assert not (sidecar.runtime / "cpu0.pid").exists()


def test_http_shows_health_and_metrics_and_no_status(world: World) -> None:
    sidecar = world.sidecar(http="127.0.0.1:19470")
    engine = world.engine(sidecar)
    engine.must_save(chain("a", 5))
    address = sidecar.status()["sidecar"]["http"]
    for path in ("healthz", "readyz"):
        with urllib.request.urlopen(f"http://{address}/{path}", timeout=5) as answer:
            assert answer.status == 200
    until(lambda: "pillion_" in sidecar.metrics(), "metrics")
    text = sidecar.metrics()
    assert engine.name not in text and chain("a", 1)[0].hex() not in text


IMPORT = """
import os
def seen():
    return sorted(os.listdir("/proc/self/task")), sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}"))
before = seen()
import pillion._native as native
assert seen() == before, (before, seen())
native.version(), native.default_socket("cpu0")
assert seen() == before, (before, seen())
print("quiet")
"""


def test_importing_the_client_starts_no_thread_and_opens_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "quiet", done.stderr


def test_the_command_names_its_version() -> None:
    done = subprocess.run([daemon(), "--version"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and done.stdout.startswith("pillion ")
