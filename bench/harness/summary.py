"""usage: python -m harness.summary FILE NAME:CODE:REPORT..., the end of `scripts/bench all`. Standard library only.

Puts the reports of several benches into one, each row with the name of its bench, and prints how they did.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAID = {0: "", 1: "a budget is missed", 3: "what is to be measured is not here"}


def summarize(results: Sequence[tuple[str, int, dict[str, Any] | None]]) -> tuple[dict[str, Any], str]:
    """The report of all, and a table of counts."""
    rows: list[dict[str, Any]] = []
    benches: dict[str, Any] = {}
    lines = [f"{'bench':<10}{'rows':>6}{'met':>6}{'missed':>8}{'not measured':>14}"]
    for name, code, report in results:
        own = report["rows"] if report is not None else []
        met = sum(row.get("met") is True for row in own)
        missed = sum(row.get("met") is False for row in own)
        absent = sum(row.get("ours") is None for row in own)
        said = SAID.get(code, f"ended with exit code {code}")
        lines.append(f"{name:<10}{len(own):>6}{met:>6}{missed:>8}{absent:>14}  {said}".rstrip())
        rows += [{"bench": name, **row} for row in own]
        benches[name] = {"exit": code, "machine": (report or {}).get("machine")}
    commits = {report["commit"] for _, _, report in results if report is not None and "commit" in report}
    return {"commit": ", ".join(sorted(commits)), "benches": benches, "rows": rows}, "\n".join(lines)


def read(file: Path) -> dict[str, Any] | None:
    try:
        report: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return report if isinstance(report.get("rows"), list) else None


def main() -> None:
    out, *named = sys.argv[1:]
    results = []
    for one in named:
        name, code, file = one.split(":", 2)
        results.append((name, int(code), read(Path(file))))
    report, shown = summarize(results)
    Path(out).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{shown}\n\nwritten: {out}")


if __name__ == "__main__":
    main()
