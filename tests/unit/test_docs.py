"""The documentation names tests as proofs: they must exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_documentation_names_exists() -> None:
    tests = "\n".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    core = "\n".join(path.read_text() for path in ROOT.glob("sidecar/core/src/**/tests.rs"))
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs/ROBUSTNESS.md").read_text())
    assert len(named) > 30, "the page's format changed: no test names were found"
    missing = [name for name in named if f"def {name}(" not in tests]
    assert not missing, f"docs/ROBUSTNESS.md names tests that do not exist: {missing}"
    for name in re.findall(r"core `(\w+)`", (ROOT / "docs/ROBUSTNESS.md").read_text()):
        assert f"fn {name}(" in core, f"docs/ROBUSTNESS.md names a core test that does not exist: {name}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
