"""The check of a GPU machine, as it is shipped, on the fake device: each of its scenarios is a case here.

It runs once, from its bundle. Alone: `scripts/gpu-check --fake --only NAME`.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chaos import fake_device
from gpu_check import rows
from gpu_check.__main__ import Check
from gpu_check.budgets import BENCHES
from gpu_check.scenarios import SCENARIOS
from gpu_check.world import START_FIGURES

ROOT = Path(__file__).parents[2]
NO_GPU = 3
NEEDS_TORCH = {name for name in SCENARIOS if "torch" in name} | {"graph-replays-meanwhile", "P4"}


@pytest.fixture(scope="module")
def library() -> Path:
    return fake_device.library()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a folder that nobody may write."""
    folder = tmp_path_factory.mktemp("bundle")
    made = folder / "pillion-gpu-check.run"
    wheels = sorted((ROOT / "target" / "wheels").glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime)
    environment = {**os.environ, **({"PILLION_GPU_CHECK_WHEEL": str(wheels[-1])} if wheels else {})}
    command = [str(ROOT / "scripts" / "gpu-check"), "--bundle", str(made)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert made.stat().st_size < 64 << 20
    assert made.stat().st_mode & stat.S_IXUSR
    folder.chmod(0o555)
    return made


def start(bundle: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As on another machine: without anything of ours but the bundle."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PILLION_") and name not in ("PYTHONPATH", "LD_LIBRARY_PATH")
    }
    return subprocess.run(
        ["sh", str(bundle), *words],
        env={**kept, "PYTHON": sys.executable, "PATH": os.defpath, **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_a_gpu_it_says_so(bundle: Path, tmp_path: Path) -> None:
    done = start(bundle, CUDA_VISIBLE_DEVICES="", TMPDIR=str(tmp_path))
    assert done.returncode == NO_GPU, done.stderr
    assert done.stdout.startswith("no GPU: ")
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


def test_a_stray_fake_device_is_no_gpu(bundle: Path, library: Path, tmp_path: Path) -> None:
    for name in ("libcuda.so", "libcuda.so.1"):
        (tmp_path / name).symlink_to(library)
    done = start(bundle, LD_LIBRARY_PATH=str(tmp_path))
    assert done.returncode == NO_GPU
    assert "CUDA_ERROR_NO_DEVICE" in done.stdout


def test_what_there_was_no_time_for_is_reported(bundle: Path, library: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    words = ("--fake", "--seconds", "0", "--json", str(report), "--only", "round-trip-ipc", "P8")
    done = start(bundle, *words, PILLION_FAKE_CUDA_LIBRARY=str(library))
    assert done.returncode == 1
    found = {each["name"]: each["result"] for each in json.loads(report.read_text())["scenarios"]}
    assert found == dict.fromkeys(("round-trip-ipc-BLHNC", "round-trip-ipc-LBNHC", "P8"), "not run")


@pytest.fixture(scope="module")
def report(bundle: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All of it."""
    place = tmp_path_factory.mktemp("report")
    file = place / "report.json"
    done = start(
        bundle,
        "--fake",
        "--quick",
        "--json",
        str(file),
        PILLION_FAKE_CUDA_LIBRARY=str(library),
        TMPDIR=str(place),
    )
    assert file.exists(), f"no report: {done.stdout}\n{done.stderr}"
    found: dict[str, Any] = json.loads(file.read_text())
    found["code"], found["said"] = done.returncode, done.stdout + done.stderr
    assert [each.name for each in place.iterdir()] == ["report.json"], "it leaves nothing behind"
    return found


@pytest.mark.parametrize("name", [*SCENARIOS, *BENCHES])
def test_on_the_fake_device(report: dict[str, Any], name: str) -> None:
    (found,) = (each for each in report["scenarios"] if each["name"] == name)
    if name in NEEDS_TORCH:
        assert (found["result"], found["detail"]) == ("skipped", "needs torch")
    elif name == "compute-sanitizer":
        assert found["result"] == "skipped"
    else:
        assert found["result"] == "passed", found["detail"]


def test_the_sanitizer_comes_last_and_facts_come_first(report: dict[str, Any]) -> None:
    names = [each["name"] for each in report["scenarios"]]
    assert (names[0], names[-1]) == ("probe", "compute-sanitizer")
    facts = dict(line.strip().split(": ", 1) for line in report["scenarios"][0]["detail"].splitlines()[1:])
    assert facts["driver version"] == "13000"
    assert facts["attribute, IPC_EVENT_SUPPORTED"] == "1"
    assert facts["range of imported 514.5 MiB"] == "starts 0 bytes after the base, 514.5 MiB"
    assert facts["query from outside before the kill"] == "ERROR_NOT_READY"


def test_the_report_has_the_starts_of_sidecars(report: dict[str, Any]) -> None:
    starts = {each["name"]: each["starts"] for each in report["scenarios"]}
    assert starts["probe"] == []
    assert [set(each) for each in starts["round-trip-ipc-BLHNC"]] == [set(START_FIGURES)]
    assert len(starts["sidecar-killed"]) > 1, "each start of it"


def test_what_cannot_be_ended_is_reported_with_its_scenario(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(quick=True, seconds=60)
    check = Check(options, {"name": "a GPU", "uuid": "0", "cuda": 13000}, tmp_path, tmp_path)
    ended = []

    class Stuck:
        def kill(self) -> None:
            raise OSError("stuck")

    class Willing:
        def kill(self) -> None:
            ended.append(self)

    def scenario(world: Any) -> str:
        world.engines += [Stuck(), Willing()]
        return "well"

    result, detail, _, _ = check.one("name", scenario, False, 5)
    assert result == "failed"
    assert detail.startswith("well\nwhat it started could not be ended") and "OSError: stuck" in detail
    assert len(ended) == 1, "the others are ended all the same"


def test_the_report_has_every_row_and_no_judgement(report: dict[str, Any]) -> None:
    assert report["code"] == 0, report["said"]
    assert report["fake"] is True
    assert {"gpu", "cuda", "cpu", "cores", "memory_gib", "kernel"} <= set(report["machine"])
    assert report["commit"] is None or len(report["commit"]) >= 40
    metrics = [row["metric"] for row in report["rows"]]
    assert {name: metrics.count(name) for name in set(metrics)} == {"limit": 9, "P1": 4, "P3": 1, "P8": 6}
    for row in report["rows"]:
        assert list(row) == "metric case ours peer theirs unit ratio budget met runs spread".split()
        assert row["met"] is None, "a fake device proves nothing"
        assert row["ours"] is not None and row["runs"] > 0


def test_rows_judge_by_the_ratio() -> None:
    rate = rows.rate("P1", "save", [48.0, 50.0, 52.0], peer="memcpy", theirs=[50.0, 50.0, 50.0], budget=0.95)
    assert (rate["ours"], rate["theirs"], rate["ratio"], rate["met"]) == (50.0, 50.0, 1.0, True)
    assert rate["spread"] == [0.96, 1.04] and rate["runs"] == 3
    slow = rows.rate("P1", "save", [40.0], peer="memcpy", theirs=[50.0], budget=0.95)
    assert (slow["ratio"], slow["met"]) == (0.8, False)
    alone = rows.rate("limit", "memcpy", [50.0, 55.0])
    assert (alone["theirs"], alone["ratio"], alone["met"]) == (None, None, None)
    time = rows.duration("P4", "step", 5.1, theirs=5.0, budget=0.98, unit="ms", runs=10)
    assert (time["ratio"], time["met"]) == (0.9804, True)
    assert rows.as_fake(slow)["met"] is None
    assert "MISSED" in rows.table([slow])[1]
