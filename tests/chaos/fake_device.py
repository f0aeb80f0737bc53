"""Where the fake CUDA driver is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def library() -> Path:
    """The fake device, built if there is none."""
    places = [ROOT / "target" / kind / "libpillion_fake_cuda.so" for kind in ("debug", "release")]
    if named := os.environ.get("PILLION_FAKE_CUDA_LIBRARY"):
        places = [Path(named)]
    elif not any(place.exists() for place in places):
        build = ["cargo", "build", "--locked", "-p", "pillion-fake-cuda"]
        subprocess.run(build, cwd=ROOT, check=True, timeout=500)
    return max((place for place in places if place.exists()), key=lambda place: place.stat().st_mtime)
