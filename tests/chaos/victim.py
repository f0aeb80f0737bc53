"""An engine in a process of its own, which works until it is killed: victim.py SOCKET NAME SEED WAY."""

from __future__ import annotations

import sys
from pathlib import Path

from chaos.engine import FakeEngine, Traffic


def main() -> None:
    socket, name, seed, way = sys.argv[1:]
    # It is stopped from outside, in the middle of a call, too.
    engine = FakeEngine(Path(socket), name, way=way, call_seconds=3600).await_ready()
    traffic = Traffic(engine, int(seed))
    while traffic.loads < 2:
        traffic.step()
    print("working", flush=True)
    while True:
        traffic.step()


if __name__ == "__main__":
    main()
