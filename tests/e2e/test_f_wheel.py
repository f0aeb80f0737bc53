"""What a stranger gets from `pip install`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def wheel() -> Path:
    if named := os.environ.get("PILLION_WHEEL"):
        return Path(named)
    made = sorted((ROOT / "target" / "wheels").glob("pillion-*.whl"), key=lambda path: path.stat().st_mtime)
    assert made, "expected a wheel in target/wheels: run scripts/build-wheel"
    return made[-1]


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PILLION_", "PYTHON"))}
    words = [str(word) for word in command]
    return subprocess.run(words, env={**kept, **environment}, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with our wheel and nothing else."""
    place = tmp_path_factory.mktemp("fresh") / "venv"
    made = run(sys.executable, "-m", "venv", place)
    assert made.returncode == 0, made.stderr
    done = run(place / "bin" / "python", "-m", "pip", "install", "--no-index", wheel())
    assert done.returncode == 0, done.stderr
    return place


def test_pip_brings_the_command_and_the_connector(fresh: Path) -> None:
    binaries = str(fresh / "bin")
    version = run("sh", "-c", "pillion --version", PATH=f"{binaries}:/usr/bin:/bin")
    assert version.returncode == 0, version.stderr
    look = (
        "import pillion, pillion.vllm, pillion._native as n, importlib.metadata as m;"
        "(e,) = [e for e in m.entry_points(group='vllm.general_plugins') if e.name == 'pillion'];"
        "e.load(); print(e.value, n.version())"
    )
    found = run(fresh / "bin" / "python", "-c", look)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["pillion.vllm:register", version.stdout.split()[-1]]


def test_doctor_says_what_is_missing(fresh: Path, tmp_path: Path) -> None:
    places = {"PILLION_RUNTIME_DIR": str(tmp_path / "r"), "PILLION_STATE_DIR": str(tmp_path / "s")}
    done = run(fresh / "bin" / "pillion", "doctor", **places)
    said = done.stdout + done.stderr
    assert done.returncode in (0, 1), said
    assert "vllm" in said.lower() and "sidecar" in said.lower(), said
    assert "panicked" not in said


def test_vllm_knows_the_connector_by_its_name(tmp_path: Path) -> None:
    """By the entry point alone: no `kv_connector_module_path`."""
    look = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory as F;"
        "print(F._registry['PillionConnector']().__name__)"
    )
    found = run(sys.executable, "-c", look, VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    assert found.stdout.strip().endswith("PillionConnector"), found.stdout + found.stderr
