"""A mounted file system that fails as it is told (`tests/faultfs`)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos.fake_device import built


def refusal() -> str | None:
    """Why nothing can be mounted here, or None."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or os.geteuid() != 0:
        return "mounting a FUSE file system takes root and /dev/fuse"
    return None


class FaultyDisk:
    """The file system on a directory, until it is closed."""

    def __init__(self, place: Path) -> None:
        place.mkdir(parents=True)
        self.place = place
        self.process = subprocess.Popen(
            [str(built("pillion-faultfs", "pillion-faultfs")), str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer()["mounted"] == str(place)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the file system has ended"
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, answer
        return answer

    def tell(self, do: str, **values: Any) -> dict[str, Any]:
        """A command; what the disk has done so far."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def rule(self, what: str, fault: str, value: int = 0, *, after: int = 0, every: int = 0) -> None:
        """From the operation `after` on (0: the next), one of `every` fails; every=0: only that one."""
        self.tell("rule", what=what, fault=fault, value=value, after=after, every=every)

    def well(self) -> None:
        """No more faults."""
        self.tell("clear")

    def status(self) -> dict[str, Any]:
        return self.tell("status")

    def close(self) -> None:
        if self.process.poll() is None:
            assert self.process.stdin
            self.process.stdin.close()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        # Whoever still uses it gets errors from now on, and does not wait.
        subprocess.run(["umount", "-l", str(self.place)], capture_output=True, check=False)


def mounted(place: Path) -> Iterator[FaultyDisk]:
    """The body of a fixture: the file system on a directory for one test, which is skipped where nothing can be mounted."""
    if (reason := refusal()) is not None:
        pytest.skip(reason)
    disk = FaultyDisk(place)
    yield disk
    disk.close()
