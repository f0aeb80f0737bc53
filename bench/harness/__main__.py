"""usage: python -m harness NAME [--json FILE] [--quick], as scripts/bench calls it.

Ends with 0: every budget is met; 1: one is missed; 3: what is to be measured is not there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from harness.machine import load, machine
from harness.report import all_met, document, table, write

NAMES = {
    "lookup": "harness.lookup",
    "step": "harness.step",
    "copy": "harness.transfer",
    "ttft": "harness.ttft",
    "survival": "harness.survival",
}


def end(number: int, _frame: FrameType | None) -> None:
    """A signal ends the run as an error would: what was started is ended."""
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    try:
        import pillion._native  # noqa: F401
    except ImportError as error:
        print(f"expected Pillion's wheel beside this Python, got: {error}", file=sys.stderr)
        return 3
    where = machine()
    rows = importlib.import_module(NAMES[args.name]).measure(args.quick)
    where["load_after"] = load()
    where["quick"] = args.quick
    print(table(rows))
    if args.json is not None:
        write(args.json, document(where, os.environ.get("PILLION_BENCH_COMMIT") or "unknown", rows))
    return 0 if all_met(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
