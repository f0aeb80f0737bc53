"""Engines in processes of their own, which work until they are killed: victim.py SOCKET.

Each line "NAME SEED WAY" on standard input forks one, which says "PID" when it works. That is quicker than a
Python for each, and this process has neither threads nor a client that a fork could tear.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from chaos.engine import FakeEngine, Traffic


def work(socket: str, name: str, seed: str, way: str) -> None:
    # It is stopped from outside, in the middle of a call, too.
    engine = FakeEngine(Path(socket), name, way=way, call_seconds=3600).await_ready()
    traffic = Traffic(engine, int(seed))
    while traffic.loads < 2:
        traffic.step()
    os.write(1, f"{os.getpid()}\n".encode())
    while True:
        traffic.step()


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are nobody's business
    socket = sys.argv[1]
    for line in sys.stdin:
        if os.fork() == 0:
            work(socket, *line.split())


if __name__ == "__main__":
    main()
