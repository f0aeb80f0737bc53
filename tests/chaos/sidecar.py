"""A real sidecar in a place of its own, and everything that can be done to it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

READY_SECONDS = 20.0
"""For a debug build on a busy machine."""


def until(condition: Callable[[], Any], what: str | Callable[[], str], seconds: float = 10.0) -> Any:
    """Polls until the condition holds, and says what was waited for if it never does."""
    deadline = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            text = what if isinstance(what, str) else what()
            raise AssertionError(f"waited {seconds} s in vain: {text}")
        time.sleep(0.002)


def daemon() -> str:
    """The `pillion` command: named by PILLION_BIN, else the one that the wheel put beside this Python."""
    if named := os.environ.get("PILLION_BIN"):
        return named
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    found = shutil.which("pillion", path=os.pathsep.join(places))
    assert found, "expected `pillion` beside this Python or on the PATH: install the wheel or set PILLION_BIN"
    return found


def process_state(pid: int) -> str:
    """The letter that the kernel gives it; "" for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def ended(pid: int) -> bool:
    return process_state(pid) in ("", "Z", "X")


class Sidecar:
    """`pillion serve` with its own folders. Flags as keywords: host_pool="8MiB" is --host-pool=8MiB."""

    def __init__(
        self, *, device: str = "cpu0", wrapper: Sequence[str] = (), config: str = "", **flags: Any
    ) -> None:
        self.device = device
        # What `pillion serve` is started by, if not by us: a debugger, a sanitizer.
        self.wrapper = wrapper
        # Short: a socket's path has at most 107 bytes.
        self.place = Path(tempfile.mkdtemp(prefix="pch-", dir="/tmp"))
        self.runtime = self.place / "r"
        self.state = self.place / "s"
        self.socket = self.runtime / f"{device}.sock"
        self.log = self.place / "log"
        # Mute after four heartbeats: on a machine with more work than cores one second comes too soon.
        self.flags = {"device": device, "host_pool": "64MiB", "http": "off", "heartbeat_ms": 1000, **flags}
        self.config = self.place / "pillion.toml"
        self.config.write_text(config)
        # Other users must get through to the runtime folder, whose own mode the sidecar decides.
        self.place.chmod(0o711)
        self.process: subprocess.Popen[bytes] | None = None
        self.siblings: list[Sidecar] | None = []

    def sibling(self, device: str) -> Self:
        """Another device's, in the same folders; whoever starts it. Ends with this one, if not before."""
        assert self.siblings is not None, "a sibling has none"
        other = copy.copy(self)
        other.device, other.process, other.siblings = device, None, None
        self.siblings.append(other)
        other.socket = self.runtime / f"{device}.sock"
        other.flags = {**self.flags, "device": device}
        return other

    @property
    def environment(self) -> dict[str, str]:
        ours = ("PILLION_FAKE_CUDA",)
        kept = {k: v for k, v in os.environ.items() if k in ours or not k.startswith("PILLION_")}
        return {
            **kept,
            "PILLION_DEVICE": self.device,
            "PILLION_RUNTIME_DIR": str(self.runtime),
            "PILLION_STATE_DIR": str(self.state),
        }

    def arguments(self, *words: str) -> list[str]:
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in self.flags.items()]
        return [*self.wrapper, daemon(), *words, f"--config={self.config}", *flags]

    def command(self, *words: str, seconds: float = 20) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [daemon(), *words], env=self.environment, capture_output=True, text=True, timeout=seconds
        )

    def start(self, seconds: float = READY_SECONDS) -> Sidecar:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.arguments("serve"),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(self.try_status_or_ended, lambda: f"a sidecar that answers\n{self.explain()}", seconds)
        assert self.process.poll() is None, f"it ended with {self.process.returncode}\n{self.explain()}"
        return self

    def try_status_or_ended(self) -> bool:
        assert self.process
        return self.process.poll() is not None or self.try_status() is not None

    def await_ready(self, seconds: float = READY_SECONDS) -> dict[str, Any]:
        status: dict[str, Any] = until(
            self.try_status, lambda: f"a sidecar that answers\n{self.explain()}", seconds
        )
        return status

    def try_status(self) -> dict[str, Any] | None:
        done = self.command("status", "--json")
        return json.loads(done.stdout) if done.returncode == 0 else None

    def metrics(self) -> str:
        """As Prometheus gets them, of one that was started with `http`."""
        address = self.status()["sidecar"]["http"]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    def status(self) -> dict[str, Any]:
        done = self.command("status", "--json")
        assert done.returncode == 0, f"no status: {done.stderr}\n{self.explain()}"
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def sessions(self) -> list[dict[str, Any]]:
        """Those of engines; the one that asks is an observer."""
        return [session for session in self.status()["sessions"] if session["role"] != "observer"]

    def await_unleased(self, seconds: float = 5.0) -> None:
        """What engines gave back has come to be free: nothing is pinned, no lease is left."""

        def unleased() -> bool:
            status = self.status()
            return not (status["pool"]["leased_bytes"] or status["leases"]["held"])

        until(unleased, lambda: f"leases to end\n{self.explain()}", seconds)

    def explain(self) -> str:
        """For failures: what it says of itself, and the end of its log."""
        lines: list[str] = []
        for log in (self.log, self.state / f"{self.device}.log"):
            if log.exists():
                lines += [f"-- {log.name}", *log.read_text(errors="replace").splitlines()[-40:]]
        try:
            done = self.command("status", seconds=5)
            shown = done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            shown = "no answer"
        return "\n".join(["-- status", shown.rstrip(), *lines])

    def pid_of(self, name: str) -> int:
        def read() -> int:
            try:
                return int((self.runtime / name).read_text())
            except (OSError, ValueError):
                return 0

        pid: int = until(read, lambda: f"a pid in {name}\n{self.explain()}")
        return pid

    @property
    def worker_pid(self) -> int:
        return self.pid_of(f"{self.device}.pid")

    @property
    def supervisor_pid(self) -> int:
        return (
            self.process.pid
            if self.process and not self.wrapper
            else self.pid_of(f"{self.device}.supervisor.pid")
        )

    def living_worker(self) -> int:
        """Its pid; waits for one that is being started."""

        def living() -> int:
            pid = self.worker_pid
            return 0 if ended(pid) else pid

        pid: int = until(living, lambda: f"a worker that lives\n{self.explain()}", READY_SECONDS)
        return pid

    def kill_worker(self) -> int:
        """SIGKILL. Says which process that was."""
        pid = self.living_worker()
        os.kill(pid, signal.SIGKILL)
        return pid

    @contextmanager
    def stopped(self, *, supervisor: bool = True) -> Iterator[int]:
        """SIGSTOP, and SIGCONT at the end. Gives the worker's pid."""
        worker = self.living_worker()
        stopped = ([self.supervisor_pid] if supervisor else []) + [worker]
        try:
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            until(lambda: all(process_state(pid) in "TZX" for pid in stopped), "the processes to stop")
            yield worker
        finally:
            for pid in reversed(stopped):
                if not ended(pid):
                    os.kill(pid, signal.SIGCONT)

    def terminate(self, seconds: float = 15) -> int:
        """SIGTERM: how it ended."""
        assert self.process
        self.process.terminate()
        return self.process.wait(seconds)

    def close(self) -> None:
        """Kills what is left, and clears the place, which is the first one's: its siblings' pids are in it."""
        for sibling in self.siblings or ():
            sibling.close()
        pids = []
        for name in (f"{self.device}.supervisor.pid", f"{self.device}.pid"):
            try:
                pids.append(int((self.runtime / name).read_text()))
            except (OSError, ValueError):
                continue
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in pids:
            # It may end between any two of these.
            with suppress(OSError):
                if not ended(pid) and "pillion" in Path(f"/proc/{pid}/comm").read_text():
                    os.kill(pid, signal.SIGKILL)
        if self.siblings is not None:
            shutil.rmtree(self.place, ignore_errors=True)
