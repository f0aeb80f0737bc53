"""usage: python -m harness.tables REPORT [BENCH]: rows of a report as docs/BENCHMARKS.md shows them. Standard library only.

REPORT is what `scripts/bench NAME --json` or `scripts/bench all` wrote; BENCH is one of those in the latter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DASH = "\N{EN DASH}"


def figure(value: float | None) -> str:
    """With as many digits as a reader can use."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def said(row: dict[str, Any]) -> str:
    """The last column: whether the budget is met, and the note."""
    met = "" if row.get("met") is None else "met" if row["met"] else "missed"
    return "; ".join(part for part in (met, row.get("note") or "") if part)


def line(row: dict[str, Any]) -> str:
    spread = row.get("spread")
    ratio = DASH if row.get("ratio") is None else f"{row['ratio']:.2f}"
    shown = f"{spread[0]:.2f}{DASH}{spread[1]:.2f}" if spread else DASH
    budget = DASH if row.get("budget") is None else f"{row['budget']:g}"
    cells = [row["case"], figure(row.get("ours")), row["peer"], figure(row.get("theirs")), row["unit"]]
    return "| " + " | ".join([*cells, ratio, shown, budget, said(row)]) + " |"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    head = "| case | ours | beside | theirs | unit | ratio | spread | budget | |\n|---|---:|---|---:|---|---:|---|---:|---|"
    return "\n".join([head, *map(line, rows)])


def main() -> None:
    report, *bench = sys.argv[1:]
    rows = json.loads(Path(report).read_text())["rows"]
    if bench:
        rows = [row for row in rows if row["bench"] == bench[0]]
    print(table(rows))


if __name__ == "__main__":
    main()
