"""The examples of docs/SEMANTICS.md, in order, against a real sidecar."""

from __future__ import annotations

import doctest
from pathlib import Path

from chaos.conftest import World
from chaos.engine import chain

PAGE = Path(__file__).parents[2] / "docs" / "SEMANTICS.md"


def test_the_examples_of_the_semantics_page_are_true(world: World) -> None:
    text = PAGE.read_text()
    examples = doctest.DocTestParser().get_doctest(
        text, {"world": world, "chain": chain}, PAGE.name, str(PAGE), 0
    )
    assert len(examples.examples) >= 10, "the page lost its examples"
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    failed, _ = runner.run(examples, out=report.append, clear_globs=False)
    assert not failed, "".join(report)
