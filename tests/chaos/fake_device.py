"""What tests build beside the wheel, and where the fake CUDA driver is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def built(package: str, file: str) -> Path:
    """The newest of what a package gives, built if there is none."""
    places = [ROOT / "target" / kind / file for kind in ("debug", "release")]
    if not any(place.exists() for place in places):
        subprocess.run(["cargo", "build", "--locked", "-p", package], cwd=ROOT, check=True, timeout=500)
    return max((place for place in places if place.exists()), key=lambda place: place.stat().st_mtime)


def library() -> Path:
    """The fake device."""
    if named := os.environ.get("PILLION_FAKE_CUDA_LIBRARY"):
        place = Path(named)
        assert place.exists(), f"PILLION_FAKE_CUDA_LIBRARY names {named}, which is not there"
        return place
    return built("pillion-fake-cuda", "libpillion_fake_cuda.so")
