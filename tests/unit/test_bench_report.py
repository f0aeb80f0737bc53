"""What the benches' rows say: which way a ratio goes, when a budget is met, how figures are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.report import Better, Row, all_met, document, table, write
from harness.summary import summarize
from harness.tables import line

FIELDS = "metric case ours peer theirs unit ratio budget met runs spread".split()


def test_a_ratio_of_more_than_one_is_better_for_rates_and_for_times() -> None:
    rates = Row.of("P6", "save", "memcpy", "GB/s", Better.MORE, [(8.0, 4.0)])
    times = Row.of("ttft", "1 k", "recompute", "ms", Better.LESS, [(4.0, 8.0)])
    assert rates.ratio == times.ratio == 2.0
    assert rates.met is None, "no budget, no verdict"


def test_ratios_are_those_of_neighbours_and_not_of_medians() -> None:
    pairs = [(1.0, 2.0), (10.0, 30.0), (100.0, 100.0)]
    row = Row.of("P5", "hit", "peer", "µs", Better.LESS, pairs)
    assert (row.ours, row.theirs, row.ratio) == (10.0, 30.0, 2.0)
    assert row.spread == (1.0, 3.0) and row.runs == 3


@pytest.mark.parametrize(("ours", "met"), [(6.5, True), (6.4, False)])
def test_a_budget_is_met_where_the_ratio_reaches_it(ours: float, met: bool) -> None:
    row = Row.of("P6", "load", "memcpy", "GB/s", Better.MORE, [(ours, 10.0)], budget=0.65)
    assert row.met is met and all_met([row]) is met


@pytest.mark.parametrize(("values", "met"), [([9.0, 10.0, 50.0], True), ([9.0, 10.1, 50.0], False)])
def test_a_time_within_a_limit_is_judged_by_its_median(values: list[float], met: bool) -> None:
    row = Row.within("P7", "a step", values, 10.0, "µs")
    assert (row.peer, row.theirs, row.budget, row.met) == ("10 µs", 10.0, 1.0, met)


def test_answers_that_differ_are_missed_however_fast() -> None:
    row = Row.of("ttft", "1 k", "recompute", "ms", Better.LESS, [(1.0, 9.0)], failure="2 of 9 answers differ")
    assert row.met is False and not all_met([row])
    assert row.note == "FAILED: 2 of 9 answers differ"


def test_what_was_not_measured_is_said_and_misses_nothing() -> None:
    row = Row.without("P12", "operations", "dashmap", "M/s", "it was not built", budget=1.0)
    empty = Row.of("P6", "load", "LMCache", "GB/s", Better.MORE, [])
    assert (row.ours, row.ratio, row.met, row.spread, row.runs) == (None, None, None, None, 0)
    assert row.note == "not measured: it was not built"
    assert empty.note == "not measured: nothing was measured" and all_met([row, empty])


def test_the_report_has_the_fields_of_every_bench(tmp_path: Path) -> None:
    rows = [
        Row.of("P6", "load", "memcpy", "GB/s", Better.MORE, [(1.23456789, 2.0)]),
        Row.without("P12", "operations", "dashmap", "M/s", "not built"),
    ]
    write(tmp_path / "r.json", document({"cores": 2}, "abc", rows))
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["machine"], report["commit"]) == ({"cores": 2}, "abc")
    assert list(report["rows"][0]) == FIELDS and list(report["rows"][1]) == [*FIELDS, "note"]
    assert report["rows"][0]["ours"] == 1.2346 and report["rows"][0]["spread"] == [0.6173, 0.6173]


def test_the_table_shows_every_row_with_its_verdict() -> None:
    rows = [
        Row.within("P7", "a step", [20.0], 10.0, "µs", note="p99 30 µs"),
        Row.without("P12", "operations", "dashmap", "M/s", "not built"),
    ]
    head, missed, absent = table(rows).splitlines()
    assert head.split() == "case ours beside theirs unit ratio spread budget".split()
    assert "MISSED" in missed and missed.endswith("p99 30 µs") and "0.50-0.50" in missed
    assert absent.endswith("not measured: not built")


def test_a_summary_counts_what_every_bench_said() -> None:
    rows = [Row.within("P7", "a", [1.0], 10.0, "µs"), Row.within("P7", "b", [20.0], 10.0, "µs")]
    step = document({"cores": 2}, "abc", rows)
    report, shown = summarize([("step", 1, step), ("gpu", 3, None), ("ssd", 2, None)])
    assert [row["bench"] for row in report["rows"]] == ["step", "step"] and report["commit"] == "abc"
    _, counted, gpu, broken = shown.splitlines()
    assert counted.split()[:5] == ["step", "2", "1", "1", "0"]
    assert gpu.endswith("is not here") and broken.endswith("ended with exit code 2")


def test_a_row_stands_in_the_docs_as_on_a_terminal() -> None:
    row = Row.within("P5", "hit, p50", [4.0, 5.0, 6.0], 10.0, "µs", note="p99 7 µs").as_json()
    assert (
        line(row)
        == "| hit, p50 | 5.00 | 10 µs | 10.00 | µs | 2.00 | 1.67\N{EN DASH}2.50 | 1 | met; p99 7 µs |"
    )
    absent = Row.without("P8", "event", "10 µs", "µs", "there is no GPU").as_json()
    dash = "\N{EN DASH}"
    assert line(absent) == (
        f"| event | {dash} | 10 µs | {dash} | µs | {dash} | {dash} | {dash} | not measured: there is no GPU |"
    )
