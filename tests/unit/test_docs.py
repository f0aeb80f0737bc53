"""The documentation names tests as proofs: they must exist."""

import re
from pathlib import Path

import faults

ROOT = Path(__file__).parents[2]
# "cuda `one`, `another`": the word says where to look.
KINDS = re.compile(r"\b(core|cuda|ssd|sim|protocol|daemon|gpu-check) ((?:`[\w…-]+`(?:,\s+)?)+)")


def sources(*patterns: str) -> str:
    return "\n".join(path.read_text() for pattern in patterns for path in sorted(ROOT.glob(pattern)))


def has_scenario(scenarios: str, name: str) -> bool:
    if name.endswith("…"):  # made in a loop
        return f'scenario(f"{name[:-1]}' in scenarios
    return f'@scenario("{name}")' in scenarios


def test_every_test_that_the_documentation_names_exists() -> None:
    page = (ROOT / "docs/ROBUSTNESS.md").read_text()
    tests = sources("tests/**/test_*.py")
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 30, "the page's format changed: no test names were found"
    missing = [name for name in named if f"def {name}(" not in tests]
    assert not missing, f"docs/ROBUSTNESS.md names tests that do not exist: {missing}"

    rust = {
        "core": sources("sidecar/core/src/**/tests.rs", "sidecar/core/src/**/tests/*.rs"),
        "cuda": sources("cuda/tests/*.rs", "cuda/**/src/**/*.rs"),
        "ssd": sources("sidecar/ssd/src/**/*.rs", "sidecar/ssd/tests/*.rs"),
        "sim": sources("tests/simulator/tests/*.rs"),
        "protocol": sources("connector/protocol/src/*.rs", "connector/protocol/tests/*.rs"),
        "daemon": sources("sidecar/daemon/src/**/*.rs", "sidecar/daemon/tests/*.rs"),
    }
    scenarios = sources("tests/gpu/gpu_check/scenarios.py")
    found = dict.fromkeys((*rust, "gpu-check"), 0)
    for kind, names in KINDS.findall(page):
        for name in re.findall(r"`([^`]+)`", names):
            there = has_scenario(scenarios, name) if kind == "gpu-check" else f"fn {name}(" in rust[kind]
            assert there, f"docs/ROBUSTNESS.md names a {kind} test that does not exist: {name}"
            found[kind] += 1
    assert (
        found["core"] and found["ssd"] and found["sim"] and found["cuda"] > 10 and found["gpu-check"] > 10
    ), found


def test_the_table_of_faults_is_up_to_date() -> None:
    text = faults.PAGE.read_text()
    assert faults.page(text) == text, "expected the table that `python tests/faults.py` writes, got another"
    numbers = [fault.number for fault in faults.FAULTS]
    assert sorted([*numbers, *faults.LATER]) == list(range(1, 41)), "each number once"


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("cuda/**/README.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
