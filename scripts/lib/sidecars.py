"""The sidecars that run on this machine, found where they say so: pid files in the runtime directory."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

DRAIN_SECONDS = 30


@dataclass(frozen=True)
class Sidecar:
    device: str
    pid: int
    """The supervisor's: ending it ends its worker too."""
    started: str
    """Start time of the process in clock ticks: a pid may come back, this pair does not."""


def runtime_directories() -> list[Path]:
    """Where sidecars of this user may be: the same places, in the same order, as the daemon's own."""
    if configured := os.environ.get("PILLION_RUNTIME_DIR"):
        return [Path(configured)]
    places = [Path("/run/pillion"), Path(f"/tmp/pillion-{os.getuid()}")]
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        places.insert(0, Path(session) / "pillion")
    return places


def running() -> list[Sidecar]:
    """All sidecars of this user that are alive."""
    found = []
    for place in runtime_directories():
        try:
            files = sorted(place.glob("*.supervisor.pid"))
        except OSError:
            continue
        for file in files:
            try:
                pid = int(file.read_text())
            except (OSError, ValueError):
                continue
            if (started := _start_time(pid)) is not None:
                found.append(Sidecar(file.name.removesuffix(".supervisor.pid"), pid, started))
    return found


def stop(sidecar: Sidecar) -> None:
    """Asks it to drain and end, and waits for that."""
    deadline = time.monotonic() + DRAIN_SECONDS
    if _start_time(sidecar.pid) != sidecar.started:
        return
    os.kill(sidecar.pid, signal.SIGTERM)
    while time.monotonic() < deadline:
        if _start_time(sidecar.pid) != sidecar.started:
            return
        time.sleep(0.05)
    os.kill(sidecar.pid, signal.SIGKILL)


def _start_time(pid: int) -> str | None:
    """None where that process is gone, is a zombie, or is none of ours."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    name = stat[stat.index("(") + 1 : stat.rindex(")")]
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] == "Z" or not name.startswith("pillion") else fields[19]
