"""Unit tests of the vLLM shim. They need a vLLM (0.30 to 0.33) in the environment, and no sidecar."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")  # the 0.33 wheel is built for GPUs

# The shim as it lies in the tree, whatever is installed.
SOURCES = str(Path(__file__).parents[2] / "integrations")
if SOURCES not in sys.path:
    sys.path.insert(0, SOURCES)


@pytest.fixture(autouse=True)
def fresh_log_limits() -> None:
    """Each test sees its own log lines, whatever ran before."""
    from pillion.vllm import log

    log._last.clear()


@pytest.fixture
def native() -> Any:
    """A scripted client and sidecar."""
    from unit.fake_native import FakeNative

    return FakeNative()


@pytest.fixture
def gpu(native: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes vLLM's platform and our calls into CUDA those of a machine with GPUs; the tensors stay on the CPU."""
    from pillion.vllm import device
    from unit.fake_gpu import FakeGpu

    fake = FakeGpu(native)
    monkeypatch.setattr(device, "platform", lambda: fake)
    monkeypatch.setattr(device, "CUDA", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    native.cuda = fake.name(0)
    return fake


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def overlap(request: Any) -> Any:
    """Without and with asynchronous scheduling."""
    return request.param
