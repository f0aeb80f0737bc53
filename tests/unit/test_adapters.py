"""LoRA: blocks are known by the adapter's weights, and requests run uncached where those are not known for sure."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from pillion.vllm import adapters
from unit.fake_native import FakeNative
from unit.vllm_harness import Engine, expected, prompt

CONFIG = SimpleNamespace(lora_config=SimpleNamespace(lora_dtype="auto"))
TOKENS = prompt(100)


def write(path: Path, weights: bytes = b"w" * 1000, config: str = '{"r": 8}') -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(config)
    (path / "adapter_model.safetensors").write_bytes(weights)
    return path


def lora(path: Path | str, number: int = 1, name: str = "a", **options: Any) -> LoRARequest:
    return LoRARequest(name, number, str(path), **options)


def wait(known: adapters.Adapters, request: LoRARequest) -> bytes:
    until = time.monotonic() + 10
    while (digest := known.fingerprint(request)) is None:
        assert time.monotonic() < until
        time.sleep(0.001)
    return digest


@pytest.fixture
def known() -> Any:
    found = adapters.Adapters(CONFIG)
    yield found
    found.close()


def test_unknown_until_read_and_read_once(
    known: adapters.Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read = adapters._Adapter.read

    def reading(self: Any) -> None:
        reads.append(self.path)
        read(self)

    monkeypatch.setattr(adapters._Adapter, "read", reading)
    request = lora(write(tmp_path / "a"))
    assert known.fingerprint(request) is None, "the scheduler does not wait"
    digest = wait(known, request)
    assert len(digest) == 32
    assert all(known.fingerprint(lora(tmp_path / "a")) == digest for _ in range(20))
    assert reads == [str(tmp_path / "a")]


def test_equal_weights_elsewhere_are_equal_and_others_are_not(
    known: adapters.Adapters, tmp_path: Path
) -> None:
    first = wait(known, lora(write(tmp_path / "a")))
    assert wait(known, lora(write(tmp_path / "b"), 2)) == first
    assert wait(known, lora(write(tmp_path / "c", b"w" * 999 + b"x"), 3)) != first
    assert wait(known, lora(write(tmp_path / "d", config='{"r": 16}'), 4)) != first
    assert wait(known, lora(tmp_path / "a", 5, is_3d_lora_weight=True)) != first


def test_files_that_change_are_not_trusted_again(
    known: adapters.Adapters, tmp_path: Path, caplog: Any
) -> None:
    """The worker may have read either: nobody knows."""
    request = lora(write(tmp_path / "a"))
    digest = wait(known, request)
    write(tmp_path / "a", b"w" * 1000)  # the same bytes, written again
    assert known.fingerprint(request) is None and "have changed" in caplog.text
    assert known.fingerprint(request) is None
    # Unloaded and loaded again, it gets another id from vLLM's server.
    assert wait(known, lora(tmp_path / "a", 2)) == digest


def test_files_that_vanish_are_not_trusted(known: adapters.Adapters, tmp_path: Path) -> None:
    request = lora(write(tmp_path / "a"))
    wait(known, request)
    os.unlink(tmp_path / "a" / "adapter_model.safetensors")
    assert known.fingerprint(request) is None


def test_in_place_reloads_run_uncached(known: adapters.Adapters, tmp_path: Path, caplog: Any) -> None:
    request = lora(write(tmp_path / "a"))
    wait(known, request)
    assert known.fingerprint(lora(tmp_path / "a", load_inplace=True)) is None
    assert known.fingerprint(request) is None, "which weights the worker has now is unknown"
    assert known.fingerprint(lora(tmp_path / "a", 7, load_inplace=True)) is None
    assert "load_inplace" in caplog.text


def test_an_id_with_two_paths_runs_uncached(known: adapters.Adapters, tmp_path: Path) -> None:
    wait(known, lora(write(tmp_path / "a")))
    assert known.fingerprint(lora(write(tmp_path / "b"))) is None
    assert known.fingerprint(lora(tmp_path / "a")) is None


@pytest.mark.parametrize("path", ["someone/some-adapter", "/nonexistent"])
def test_what_is_not_a_directory_here_runs_uncached(known: adapters.Adapters, path: str, caplog: Any) -> None:
    request = lora(path)
    assert known.fingerprint(request) is None
    until = time.monotonic() + 10
    while "expected a directory" not in caplog.text:
        assert time.monotonic() < until
    assert known.fingerprint(request) is None


def test_no_more_adapters_than_are_remembered(
    known: adapters.Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "ADAPTERS_MAX", 1)
    wait(known, lora(write(tmp_path / "a")))
    assert known.fingerprint(lora(write(tmp_path / "b"), 2)) is None
    time.sleep(0.05)
    assert known.fingerprint(lora(tmp_path / "b", 2)) is None


# ---- requests


@pytest.fixture
def engine(native: FakeNative, tmp_path: Path) -> Any:
    def build() -> Engine:
        made = Engine(native, tmp_path / "model")
        made.half._adapters = adapters.Adapters(CONFIG)
        return made

    return build


def ask(engine: Engine, req_id: str, request: LoRARequest | None, **options: Any) -> int:
    if request is not None:
        wait(engine.half._adapters, request)
    engine.add(req_id, TOKENS, lora_request=request, **options)
    engine.run()
    assert engine.outputs[req_id] == expected(TOKENS, 4)
    engine.scheduler.reset_prefix_cache()
    return int(engine.params[req_id]["pillion"]["loaded_tokens"])


def test_an_adapters_blocks_are_its_own(engine: Any, native: FakeNative, tmp_path: Path) -> None:
    first = lora(write(tmp_path / "a"))
    one = engine()
    assert ask(one, "a", first) == 0
    assert len(native.store) == 6
    assert ask(one, "base", None) == 0 and len(native.store) == 12
    again = engine()
    assert ask(again, "a", first) == 96
    assert ask(again, "base", None) == 96
    again.assert_clean()


def test_other_weights_under_the_same_name_and_path_miss(
    engine: Any, native: FakeNative, tmp_path: Path
) -> None:
    assert ask(engine(), "a", lora(write(tmp_path / "a"))) == 0
    write(tmp_path / "a", b"trained further")
    two = engine()
    assert ask(two, "a", lora(tmp_path / "a")) == 0
    assert ask(two, "b", lora(tmp_path / "a")) == 96
    two.assert_clean()


def test_the_first_request_of_an_unknown_adapter_runs_uncached(
    engine: Any, native: FakeNative, tmp_path: Path
) -> None:
    one = engine()
    one.add("a", TOKENS, lora_request=lora(write(tmp_path / "a")))
    one.run()
    assert one.outputs["a"] == expected(TOKENS, 4) and not native.store and "lease" not in native.calls
    one.assert_clean()


def test_what_is_generated_is_saved_under_the_adapters_key(
    engine: Any, native: FakeNative, tmp_path: Path
) -> None:
    one, request = engine(), lora(write(tmp_path / "a"))
    wait(one.half._adapters, request)
    one.add("a", TOKENS, 60, lora_request=request)
    one.run()
    assert len(native.store) == 159 // 16
    assert not {key for _, key in native.store} & {bytes(each) for each in hashes(engine(), request)}
    one.assert_clean()


def hashes(engine: Engine, request: LoRARequest) -> list[bytes]:
    made = engine.add("hashes", TOKENS, lora_request=request)
    engine.abort("hashes")
    engine.run()
    return list(made.block_hashes)


def test_cache_salts_are_walls(engine: Any, native: FakeNative) -> None:
    """vLLM's hash of the first block has the salt in it, and all later ones follow from that."""
    one = engine()
    assert ask(one, "a", None, cache_salt="red") == 0
    assert ask(one, "b", None, cache_salt="blue") == 0
    assert ask(one, "c", None) == 0
    assert len(native.store) == 18
    assert ask(one, "d", None, cache_salt="red") == 96
    one.assert_clean()
