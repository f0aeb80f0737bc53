"""Unit tests of the vLLM shim. They need a vLLM (0.30 to 0.33) in the environment, and no sidecar."""

import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")  # the 0.33 wheel is built for GPUs

HERE = Path(__file__).parent
for path in (HERE, HERE.parents[1] / "integrations"):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_log_limits():
    """Each test sees its own log lines, whatever ran before."""
    from pillion.vllm import log

    log._last.clear()


@pytest.fixture
def native():
    from fake_native import FakeNative

    return FakeNative()


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def overlap(request):
    """Without and with asynchronous scheduling."""
    return request.param
