"""Start, refusals, registration, and that nothing but a wrong configuration can stop an engine."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from pillion.vllm import PillionConnector, register, support
from pillion.vllm import native as source
from unit.fake_native import FakeNative
from unit.vllm_harness import LAYERS, Engine, expected, make_config, make_kv_config, make_tensors, prompt


@pytest.fixture
def make(native: FakeNative, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(source, "native", lambda: native)

    def build(
        role: KVConnectorRole = KVConnectorRole.WORKER, kv: Any = None, change: Any = None, **transfer: Any
    ) -> Any:
        config = make_config(tmp_path / "model", **transfer)
        kv = kv or make_kv_config(20)
        if change is not None:
            change(config, kv)
        return PillionConnector(config, role, kv)

    return build


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Any:
    logging.getLogger("vllm").propagate = True
    caplog.set_level(logging.INFO, "vllm.pillion")
    return caplog


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys; import pillion, pillion.vllm; "
        "assert not {'vllm', 'torch', 'pillion._native'} & set(sys.modules), 'heavy'"
    )
    path = next(p for p in sys.path if p.endswith("integrations"))
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path})


def test_register_twice() -> None:
    register()
    register()
    assert KVConnectorFactory.get_connector_class_by_name("PillionConnector") is PillionConnector


def test_the_cache_mode_is_the_sidecars_unless_it_is_given(make: Any, native: FakeNative) -> None:
    for extra, told in (({}, None), ({"cache_mode": "write_through"}, "write_through")):
        native.cache_mode, native.live = "nothing", False
        make(extra=extra).register_kv_caches(make_tensors(make_kv_config(20)))
        assert native.cache_mode == told


def test_registration_says_where_the_cache_lies(make: Any, native: FakeNative) -> None:
    connector = make()
    kv = make_kv_config(20)
    caches = make_tensors(kv)
    connector.register_kv_caches(caches)
    told = native.registered
    spec = kv.kv_cache_groups[0].kv_cache_spec
    tensor = kv.kv_cache_tensors[0]
    assert (told["layout"], told["num_blocks"], told["rank"], told["world"]) == ("LBHNC", 20, 0, 1)
    assert told["memory_bytes"] == tensor.size
    (group,) = told["groups"]
    (pages,) = group["pages"]
    assert group["block_tokens"] == 16 and pages["layers"] == LAYERS and pages["kernel_blocks"] == 1
    assert (pages["heads"], pages["states"], pages["content_bytes"]) == (2, 16, 2 * 32 * 4)
    assert pages["page_bytes"] == spec.page_size_bytes == 2 * 16 * 256
    assert (pages["size"], pages["offset"]) == (tensor.size, 0)
    assert (pages["layer_stride"], pages["block_stride"]) == (tensor.layer_stride, tensor.block_stride)
    assert pages["packing"].startswith("opaque-heads total_heads=2 format=CPU_ATTN/")
    assert told["memfd"] == -1 and told["base"] == caches[LAYERS[0]].data_ptr()
    from pillion.vllm import canary

    ((proved, seed),) = told["canaries"]
    assert proved == 0 and canary.intact([caches[name] for name in LAYERS], 20, seed)
    scheduler = make(KVConnectorRole.SCHEDULER)
    assert scheduler._scheduler is not None
    own, all_forms = (options["namespaces"] for options in native.options)
    assert own == all_forms[:1] and told["others"] == [(0, 0, 2), (0, 1, 2)]
    assert [fields["shard"] for fields in all_forms] == ["1/1", "1/2", "2/2"]
    assert native.options[0]["engine_id"] != native.options[1]["engine_id"]  # two configs, two engines


def test_the_allocation_goes_into_a_memfd(make: Any, native: FakeNative) -> None:
    connector = make()
    with connector.get_mem_pool_context():
        caches = make_tensors(make_kv_config(20))
    connector.register_kv_caches(caches)
    assert native.registered["memfd"] >= 0
    connector.shutdown()
    assert native.closed == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda c, kv: vars(c.parallel_config).update(
                tensor_parallel_size=2, distributed_executor_backend="ray"
            ),
            "tensor parallelism by the executor ray",
        ),
        (
            lambda c, kv: vars(c.parallel_config).update(enable_fault_tolerance=True),
            "fault tolerance",
        ),
        (
            lambda c, kv: setattr(c.parallel_config, "pipeline_parallel_size", 2),
            "pipeline_parallel_size is 2",
        ),
        (
            lambda c, kv: setattr(c.parallel_config, "decode_context_parallel_size", 2),
            "decode_context_parallel",
        ),
        (
            lambda c, kv: setattr(c.cache_config, "prefix_caching_hash_algo", "xxhash"),
            "not collision resistant",
        ),
        (lambda c, kv: setattr(c.cache_config, "enable_prefix_caching", False), "prefix caching is off"),
        (
            lambda c, kv: kv.kv_cache_groups.append(kv.kv_cache_groups[0]),
            "KV cache group 1 has no KVCacheTensor",
        ),
        (lambda c, kv: kv.kv_cache_tensors.append(kv.kv_cache_tensors[0]), "is placed twice"),
        (lambda c, kv: setattr(kv.kv_cache_tensors[0], "host_resident", True), "host-resident"),
    ],
)
@pytest.mark.parametrize("role", list(KVConnectorRole))
def test_refusals_say_why_and_the_engine_runs(
    make: Any,
    native: FakeNative,
    warnings: pytest.LogCaptureFixture,
    change: Any,
    reason: str,
    role: KVConnectorRole,
) -> None:
    connector = make(role, change=change)
    assert reason in warnings.text and "running uncached" in warnings.text
    assert not native.options, "a refused engine has no client"
    if role == KVConnectorRole.WORKER:
        connector.register_kv_caches({})
        assert connector.get_mem_pool_context() is None
        assert connector.build_connector_worker_meta().refused is not None
        assert connector.build_connector_worker_meta() is None, "told once"
        assert native.registered is None
    else:
        assert connector.get_num_new_matched_tokens(None, 0) == (0, False)
        assert connector.reset_cache() is None and not connector.has_pending_push_work()
    connector.shutdown()


def test_specs_that_are_not_known_are_refused(make: Any, warnings: pytest.LogCaptureFixture) -> None:
    import torch
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec

    kv = make_kv_config(20)
    shape: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    kv.kv_cache_groups[0].kv_cache_spec = ChunkedLocalAttentionSpec(attention_chunk_size=64, **shape)
    assert "KV cache spec ChunkedLocalAttentionSpec" in str(support.refusal(make()._vllm_config, kv))
    for served in (
        SlidingWindowSpec(sliding_window=64, **shape),
        FullAttentionSpec(page_size_padded=1 << 20, **shape),
    ):
        kv.kv_cache_groups[0].kv_cache_spec = served
        assert support.refusal(make()._vllm_config, kv) is None


@pytest.mark.parametrize("version", [(0, 29), (0, 34), (1, 0), None])
def test_unknown_versions_are_refused(
    make: Any, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture, version: Any
) -> None:
    monkeypatch.setattr(support, "vllm_version", lambda: version)
    make(KVConnectorRole.SCHEDULER)
    assert "vLLM 0.30 to 0.33 is known to work" in warnings.text


def test_a_wrong_configuration_stops_the_engine(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown key 'tennant'"):
        make(extra={"tennant": "x"})
    config = make_config(tmp_path / "model", extra={"layout": "NHD"})
    with pytest.raises(ValueError, match="layout"):
        PillionConnector.get_required_kvcache_layout(config)


def test_without_the_extension_module_the_engine_runs(
    make: Any, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    def missing() -> Any:
        raise ImportError("no module named pillion._native")

    monkeypatch.setattr(source, "native", missing)
    connector = make(KVConnectorRole.SCHEDULER)
    assert connector._scheduler is None and "pillion._native" in warnings.text


def test_an_absent_sidecar_costs_the_start_at_most_its_wait(
    make: Any, native: FakeNative, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    native.attached = False
    monkeypatch.setattr(source, "launch_command", lambda socket, device, ranks=1: ["pillion"])
    connector = make(extra={"launch": True, "start_wait_ms": 60})
    begin = time.monotonic()
    connector.register_kv_caches(make_tensors(make_kv_config(20)))
    assert 0.05 < time.monotonic() - begin < 2
    native.attach_status = "refused: layout"
    connector = make(extra={"launch": True, "start_wait_ms": 60_000})
    connector.register_kv_caches(make_tensors(make_kv_config(20)))


def test_where_nothing_can_come_nothing_is_waited_for(make: Any, native: FakeNative) -> None:
    import time

    native.attached = False
    connector = make()  # launch is off in tests, and the socket does not exist
    begin = time.monotonic()
    connector.register_kv_caches(make_tensors(make_kv_config(20)))
    assert time.monotonic() - begin < 1


def test_tensors_that_lie_elsewhere_are_refused(
    make: Any, native: FakeNative, warnings: pytest.LogCaptureFixture
) -> None:
    connector = make()
    caches = make_tensors(make_kv_config(20))
    caches[LAYERS[1]] = caches[LAYERS[1]].clone()
    connector.register_kv_caches(caches)
    assert native.registered is None and "does not lie where" in warnings.text
    connector = make()
    connector.register_kv_caches(make_tensors(make_kv_config(21)))
    assert native.registered is None


def test_an_error_in_registration_refuses_the_worker(
    make: Any, native: FakeNative, warnings: pytest.LogCaptureFixture
) -> None:
    native.raise_in["register"] = BaseException("panic")
    connector = make()
    connector.register_kv_caches(make_tensors(make_kv_config(20)))
    assert "registration failed" in connector.build_connector_worker_meta().refused


def test_a_worker_that_refuses_fails_loads_and_stops_the_scheduler(
    native: FakeNative, tmp_path: Path
) -> None:
    tokens = prompt(100)
    first = Engine(native, tmp_path / "model")
    first.add("fill", tokens)
    first.run()
    engine = Engine(native, tmp_path / "model")
    engine.worker._worker.refuse("no")
    for index in range(2):
        engine.add(f"r{index}", tokens)
        engine.run()
        assert engine.outputs[f"r{index}"] == expected(tokens, 4)
    assert engine.half.refused is not None and len(engine.loads) == 1
    assert engine.half.holds.held == 0 and not native.unreleased()


def test_halves_that_disagree_about_the_model_run_uncached(native: FakeNative, tmp_path: Path) -> None:
    engine = Engine(native, tmp_path / "model")
    engine.worker._worker._identity = "another"
    engine.add("a", prompt(100))
    engine.run()
    assert "disagree" in engine.half.refused
    assert engine.outputs["a"] == expected(prompt(100), 4)


def test_launch_command_names_a_socket_only_where_one_is_configured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(source, "find_binary", lambda: "/x/pillion")
    command = source.launch_command(None, "cpu0")
    assert command == ["/x/pillion", "serve", "--detach", "--device", "cpu0", "--idle-exit-seconds", "1800"]
    assert source.launch_command("/s", "cpu0")[-2:] == ["--socket", "/s"]
    monkeypatch.setattr(source, "find_binary", lambda: None)
    assert source.launch_command("/s", "cpu0") == []


def test_sidecars_that_share_the_memory_are_told_how_many_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "find_binary", lambda: "/x/pillion")
    assert source.launch_command(None, "cpu1", 8)[-2:] == ["--sidecars", "8"]
    assert "--sidecars" not in source.launch_command(None, "cpu0", 1)


def test_the_binary_beside_the_interpreter_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    binary = tmp_path / "pillion"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert source.find_binary() == str(binary)
    binary.unlink()
    monkeypatch.setenv("PATH", "")
    assert source.find_binary() is None


def test_inside_multi_connector(native: FakeNative, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a child of vLLM's MultiConnector our metadata and reports arrive through its wrappers."""
    tokens = prompt(100)
    child = {
        "kv_connector": "PillionConnector",
        "kv_connector_module_path": "pillion.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"model_id": "tiny", "launch": False},
    }
    monkeypatch.setattr(source, "native", lambda: native)
    config = make_config(tmp_path / "model")
    config.kv_transfer_config.kv_connector_extra_config = {"connectors": [child]}
    config.cache_config.num_gpu_blocks = 50
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    scheduler = MultiConnector(config, KVConnectorRole.SCHEDULER, make_kv_config(50))
    worker = MultiConnector(config, KVConnectorRole.WORKER, make_kv_config(50))
    worker.register_kv_caches(make_tensors(make_kv_config(50)))
    assert native.registered is not None and len(tokens) == 100
    assert scheduler.has_pending_push_work() is False and scheduler.requires_kv_delivery is False
    assert worker.get_transfer_results(set()).finished_recving == set()
    assert worker.build_connector_worker_meta() is not None


def test_sleep_hooks_change_nothing_on_cpu(make: Any, native: FakeNative) -> None:
    connector = make()
    connector.register_kv_caches(make_tensors(make_kv_config(20)))
    before = dict(native.calls)
    connector.unregister_kv_caches()
    connector.restore_kv_caches()
    assert native.calls == before and PillionConnector.supports_sleep_mode(None)
