"""The namespace: equal in both processes and across restarts, different for everything that matters."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pillion.vllm import identity
from pillion.vllm.config import Settings
from unit.vllm_harness import make_config, make_kv_config


def write_safetensors(path: Path, tensors: dict[str, Any]) -> None:
    """A safetensors file by hand: header length, header, data."""
    header, data = {}, b""
    for name, values in tensors.items():
        raw = values.astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def weights(seed: int = 0, size: int = 50_000) -> Any:
    random = np.random.default_rng(seed)
    return {f"layer.{index}.weight": random.standard_normal(size).astype("f4") for index in range(3)}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model directory with weights, large enough for `_WHOLE_FILE_BYTES` to be out of the way."""
    monkeypatch.setattr(identity, "_WHOLE_FILE_BYTES", 1024)
    config = make_config(tmp_path / "model")
    write_safetensors(tmp_path / "model" / "model.safetensors", weights())
    return SimpleNamespace(dir=tmp_path / "model", config=config)


def fields(config: Any, **settings: Any) -> Any:
    return identity.namespaces(config, make_kv_config(10), Settings(**settings))[0]


def test_equal_for_equal_engines_and_short(model: Any) -> None:
    first = fields(model.config)
    assert first == fields(make_config(model.dir))
    assert all(isinstance(value, str) and len(value) < 200 for value in first.values())
    assert first["block_tokens"] == "16" and first["backend"].startswith("CPU_ATTN/")


def test_equal_in_another_process(model: Any) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]; from pathlib import Path\n"
        "from pillion.vllm import identity; identity._WHOLE_FILE_BYTES = 1024\n"
        "from unit.vllm_harness import make_config\n"
        "print(identity.fingerprint(make_config(Path(sys.argv[1]))))"
    )
    paths = [p for p in sys.path if p.endswith(("integrations", "tests"))]
    done = subprocess.run(
        [sys.executable, "-c", code, str(model.dir), *paths],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    assert done.stdout.split()[-1] == identity.fingerprint(model.config)


def test_equal_at_another_path(model: Any, tmp_path: Path) -> None:
    model.dir.rename(tmp_path / "elsewhere")
    before = identity.fingerprint(SimpleNamespace(**vars_of(model.config, tmp_path / "elsewhere")))
    (tmp_path / "elsewhere").rename(tmp_path / "model")
    assert identity.fingerprint(model.config) == before


def vars_of(config: Any, path: Path) -> Any:
    options = SimpleNamespace(**{k: getattr(config.model_config, k) for k in OPTIONS})
    options.model = str(path)
    return {"model_config": options, "load_config": config.load_config}


OPTIONS = ("dtype", "quantization", "hf_overrides", "hf_text_config", "max_model_len", "revision", "model")


def test_other_weights_under_the_same_path(model: Any) -> None:
    before = fields(model.config)["model"]
    write_safetensors(model.dir / "model.safetensors", weights(seed=1))
    assert fields(model.config)["model"] != before


@pytest.mark.parametrize("position", [0, 49_999])
def test_one_end_of_one_tensor(model: Any, position: int) -> None:
    before = fields(model.config)["model"]
    changed = weights()
    changed["layer.1.weight"][position] += 1
    write_safetensors(model.dir / "model.safetensors", changed)
    assert fields(model.config)["model"] != before


def test_small_files_are_read_whole(tmp_path: Path) -> None:
    config = make_config(tmp_path / "model")
    write_safetensors(tmp_path / "model" / "model.safetensors", weights())
    before = identity.fingerprint(config)
    changed = weights()
    changed["layer.1.weight"][25_001] += 1
    write_safetensors(tmp_path / "model" / "model.safetensors", changed)
    assert identity.fingerprint(config) != before


def test_other_formats_are_sampled(model: Any) -> None:
    (model.dir / "model.safetensors").unlink()
    (model.dir / "pytorch_model.bin").write_bytes(b"a" * 3_000_000)
    before = fields(model.config)["model"]
    assert before == fields(model.config)["model"]
    (model.dir / "pytorch_model.bin").write_bytes(b"a" * 2_999_999 + b"b")
    assert fields(model.config)["model"] != before


def test_configuration_and_options_count(model: Any) -> None:
    before = fields(model.config)["model"]
    text = (model.dir / "config.json").read_text()
    (model.dir / "config.json").write_text(text.replace("4096", "8192"))
    assert fields(model.config)["model"] != before
    (model.dir / "config.json").write_text(text)
    model.config.model_config.hf_overrides = {"rope_theta": 5e5}
    assert fields(model.config)["model"] != before


def test_dtype_block_size_and_hash_seed_are_told_apart(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = fields(model.config)
    model.config.model_config.dtype = torch.bfloat16
    assert fields(model.config)["model_dtype"] != before["model_dtype"]
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert fields(model.config)["hash_seed"] != before["hash_seed"]


def test_an_id_replaces_the_fingerprint(model: Any) -> None:
    (model.dir / "model.safetensors").unlink()
    with pytest.raises(identity.UnknownModel, match="set model_id"):
        fields(model.config)
    assert fields(model.config, model_id="llama-x")["model"] == "id:llama-x"


@pytest.mark.parametrize("content", [b"", b"\x10", b"\xff" * 64, struct.pack("<Q", 4) + b"nope"])
def test_a_broken_file_is_no_model(model: Any, content: bytes) -> None:
    (model.dir / "model.safetensors").write_bytes(content)
    with pytest.raises(identity.UnknownModel, match="set model_id"):
        identity.fingerprint(model.config)


def test_weights_that_are_not_here(model: Any) -> None:
    model.config.model_config.model = "someone/some-model-that-is-not-cached"
    with pytest.raises(identity.UnknownModel, match="not found on this machine"):
        identity.fingerprint(model.config)
