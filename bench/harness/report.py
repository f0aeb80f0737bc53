"""Rows of measurements: as a table for people, as JSON for everything else."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class Better(Enum):
    """Whether more or less of a unit is better."""

    MORE = "more"
    LESS = "less"


@dataclass(frozen=True)
class Row:
    """One figure beside another one of the same run. A ratio of 1 or more means that ours is better."""

    metric: str
    case: str
    ours: float | None
    peer: str
    theirs: float | None
    unit: str
    ratio: float | None
    budget: float | None
    met: bool | None
    runs: int
    spread: tuple[float, float] | None
    note: str | None = None

    @classmethod
    def of(
        cls,
        metric: str,
        case: str,
        peer: str,
        unit: str,
        better: Better,
        pairs: Sequence[tuple[float, float]],
        *,
        budget: float | None = None,
        failure: str | None = None,
        note: str | None = None,
    ) -> Row:
        """Of pairs (ours, theirs) from interleaved runs: the median of each, and of the ratios of neighbours.

        `failure`: why these figures count for nothing, as answers that differ. Such a row is missed, whatever it says.
        """
        if not pairs:
            return cls.without(metric, case, peer, unit, failure or "nothing was measured", budget=budget)
        ratios = [ours / theirs if better is Better.MORE else theirs / ours for ours, theirs in pairs]
        ratio = statistics.median(ratios)
        met = ratio >= budget if budget is not None else None
        return cls(
            metric,
            case,
            short(statistics.median(ours for ours, _ in pairs)),
            peer,
            short(statistics.median(theirs for _, theirs in pairs)),
            unit,
            short(ratio),
            budget,
            False if failure else met,
            len(pairs),
            (short(min(ratios)), short(max(ratios))),
            f"FAILED: {failure}" if failure else note,
        )

    @classmethod
    def within(
        cls,
        metric: str,
        case: str,
        values: Sequence[float],
        limit: float,
        unit: str,
        *,
        note: str | None = None,
    ) -> Row:
        """A time beside a limit that is a number: met where the median is at most that."""
        peer = f"{limit:g} {unit}"
        pairs = [(value, limit) for value in values]
        return cls.of(metric, case, peer, unit, Better.LESS, pairs, budget=1.0, note=note)

    @classmethod
    def without(
        cls, metric: str, case: str, peer: str, unit: str, why: str, *, budget: float | None = None
    ) -> Row:
        """What cannot be measured here."""
        return cls(metric, case, None, peer, None, unit, None, budget, None, 0, None, f"not measured: {why}")

    def as_json(self) -> dict[str, Any]:
        """The fields of every report; a note only where there is something to say."""
        fields = asdict(self)
        if self.note is None:
            del fields["note"]
        return fields


def short(value: float) -> float:
    """Four digits after the point, and not fewer than four in all."""
    return round(value, 4) if abs(value) >= 0.1 else float(f"{value:.4g}")


def table(rows: Sequence[Row]) -> str:
    """Rows for a terminal."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}" if value < 100 else f"{value:,.0f}"

    def verdict(met: bool | None) -> str:
        return {True: "met", False: "MISSED", None: ""}[met]

    lines = [["", "case", "ours", "beside", "theirs", "unit", "ratio", "spread", "budget", "", ""]]
    for row in rows:
        spread = f"{row.spread[0]:.2f}-{row.spread[1]:.2f}" if row.spread else ""
        budget = "" if row.budget is None else f"{row.budget:g}"
        lines.append(
            [
                row.metric,
                row.case,
                number(row.ours),
                row.peer,
                number(row.theirs),
                row.unit,
                number(row.ratio),
                spread,
                budget,
                verdict(row.met),
                row.note or "",
            ]
        )
    numbers = {2, 4, 6, 8}
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def document(machine: dict[str, Any], commit: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The report as it is written."""
    return {"machine": machine, "commit": commit, "rows": [row.as_json() for row in rows]}


def write(path: Path, report: dict[str, Any]) -> None:
    """One row a line, so that two reports can be compared by eye."""
    rows = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in report["rows"])
    head = {key: value for key, value in report.items() if key != "rows"}
    lines = [
        f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)},\n" for key, value in head.items()
    ]
    path.write_text(f'{{\n{"".join(lines)}  "rows": [\n{rows}\n  ]\n}}\n')


def all_met(rows: Sequence[Row]) -> bool:
    """Whether no budget is missed. What was not measured misses none."""
    return all(row.met is not False for row in rows)
