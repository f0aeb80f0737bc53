"""The golden layouts of the Rust tests are what the installed vLLM says today."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import vllm

SCRIPT = Path(__file__).parents[2] / "layouts/tests/data/vllm_layouts.py"
# The script asks functions of vLLM that are nobody's interface; older ones have other signatures.
VERSIONS = ("0.32",)


def generator() -> Any:
    """The script that made the file."""
    spec = importlib.util.spec_from_file_location("vllm_layouts", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not vllm.__version__.startswith(VERSIONS), reason="the golden file is of vLLM 0.32")
def test_golden_layouts_are_those_of_vllm() -> None:
    """Six orders, every spec: tensors as vLLM declares them, views as it makes them."""
    expected = SCRIPT.with_suffix(".json").read_text().splitlines()
    got = generator().text().splitlines()
    assert len(got) == len(expected) > 90
    for line, other in zip(got, expected, strict=True):
        assert line == other
