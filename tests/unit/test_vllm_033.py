"""The scheduler scenarios on vLLM 0.33's own Python source, which has no wheel for CPUs.

`PILLION_VLLM_033` names a directory with its unpacked wheel. Its compiled parts are not needed: nothing here
computes. The interpreter's own vLLM gives the dependencies.
"""

import os
import subprocess
import sys
from pathlib import Path

import vllm

HERE = Path(__file__).parent
FILES = (
    "test_scheduler_flow.py",
    "test_group_flow.py",
    "test_drafters.py",
    "test_connector.py",
    "test_gpu.py",
    "test_api_members.py",
)


def test_scheduler_scenarios_on_033() -> None:
    source = os.environ.get("PILLION_VLLM_033")
    if not source or vllm.__version__.startswith("0.33"):
        return
    env = {**os.environ, "PYTHONPATH": source, "VLLM_TARGET_DEVICE": "cpu"}
    code = (
        "import sys, vllm, pytest; assert vllm.__version__.startswith('0.33'), vllm.__file__; "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    arguments = ["-q", "-p", "no:cacheprovider", *(str(HERE / name) for name in FILES)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=HERE.parents[1], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
