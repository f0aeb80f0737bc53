"""CUDA engines without a GPU: what is refused, the device's name, the registration, streams, sleep and wake-up."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from pillion.vllm import PillionConnector, canary, device, support
from pillion.vllm import native as source
from pillion.vllm.metadata import CANCELLED, FAILED, LoadPlan, PillionMetadata, SavePlan
from unit.fake_gpu import FakeGpu, uuid
from unit.fake_native import FakeNative
from unit.vllm_harness import (
    LAYERS,
    Engine,
    expected,
    make_config,
    make_kv_config,
    make_tensors,
    prompt,
)

BOTH = pytest.mark.parametrize("role", list(KVConnectorRole))


@pytest.fixture(autouse=True)
def logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    logging.getLogger("vllm").propagate = True
    caplog.set_level(logging.INFO, "vllm.pillion")
    return caplog


@pytest.fixture
def make(native: FakeNative, gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(source, "native", lambda: native)

    def build(
        role: KVConnectorRole = KVConnectorRole.WORKER, change: Any = None, kv: Any = None, **transfer: Any
    ) -> Any:
        config = make_config(tmp_path / "model", **transfer)
        if change is not None:
            change(config)
        return PillionConnector(config, role, kv or make_kv_config(20))

    return build


def registered(connector: Any) -> Any:
    caches = make_tensors(make_kv_config(20))
    connector.register_kv_caches(caches)
    return caches


def load(job: int = 1) -> LoadPlan:
    return LoadPlan(job.to_bytes(16, "big"), "r", bytes(16), bytes(16), [(0, 0, 0, 1)], bytes(32), [3], 1000)


def save(job: int = 2) -> SavePlan:
    return SavePlan(job.to_bytes(16, "big"), bytes(16), [(0, b"", 1)], bytes(32), [4], 1000)


# ---- what is served


@BOTH
def test_cuda_is_served(make: Any, native: FakeNative, gpu: FakeGpu, role: KVConnectorRole) -> None:
    connector = make(role, extra={"launch": True})
    assert (connector._scheduler or connector._worker) is not None and support.platform_refusal() is None
    assert native.options[0]["socket"] == f"/nonexistent/gpu-{uuid(0)}.sock"
    assert native.options[0]["namespaces"][0]["backend"] == "CUDA/auto"
    assert gpu.asked == [("platform", 0)], "named once, by NVML"


@pytest.mark.parametrize("kind", ["rocm", "xpu", "tpu"])
@BOTH
def test_other_platforms_are_refused(
    make: Any, native: FakeNative, gpu: FakeGpu, logs: Any, kind: str, role: KVConnectorRole, tmp_path: Path
) -> None:
    gpu.kind = gpu.device_name = kind
    make(role)
    assert f"engines on {kind} are not served" in logs.text and not native.options
    assert PillionConnector.get_required_kvcache_layout(make_config(tmp_path / "model")) is None


def test_the_layout_that_is_asked_for(make: Any, gpu: FakeGpu, tmp_path: Path) -> None:
    ask = PillionConnector.get_required_kvcache_layout
    assert ask(make_config(tmp_path / "model")) == "BLHNC"
    assert ask(make_config(tmp_path / "model", extra={"layout": "any"})) is None
    config = make_config(tmp_path / "model")
    cases = [(64, None, "BLHNC"), (128, None, None), (128, "FLASHINFER", None), (128, "FLASH_ATTN", "BLHNC")]
    for size, backend, order in cases:
        config.cache_config.block_size, config.cache_config.user_specified_block_size = size, True
        config.attention_config = SimpleNamespace(backend=backend and SimpleNamespace(name=backend))
        assert ask(config) == order, (size, backend)
    config.cache_config.user_specified_block_size = False
    assert ask(config) == "BLHNC", "a size that vLLM chose is one of the backend's"
    gpu.kind = "cpu"
    assert ask(make_config(tmp_path / "model")) is None
    assert not PillionConnector.requires_piecewise_for_cudagraph({})
    assert PillionConnector.supports_sleep_mode(None)


def model(**values: Any) -> Any:
    def change(config: Any) -> None:
        for name, value in values.items():
            setattr(config.model_config, name, value)

    return change


CASES: list[tuple[tuple[int, int], Any, str | None]] = [
    ((0, 30), model(disable_cascade_attn=False), "cascade attention"),
    ((0, 31), model(disable_cascade_attn=False), "cascade attention"),
    ((0, 32), model(disable_cascade_attn=False), None),
    ((0, 31), model(disable_cascade_attn=True), None),
    ((0, 30), model(enable_sleep_mode=True), "vLLM 0.30 unmaps the KV cache in sleep mode"),
    ((0, 32), model(enable_sleep_mode=True), "vLLM 0.32 unmaps"),
    ((0, 32), model(enable_cumem_allocator=True), "--enable-cumem-allocator"),
    ((0, 33), model(enable_sleep_mode=True, enable_cumem_allocator=True), None),
    ((0, 33), lambda c: setattr(c.cache_config, "cache_dtype", "nvfp4_4over6"), "NVFP4"),
    ((0, 33), lambda c: setattr(c, "weight_transfer_config", object()), "weights are replaced"),
    ((0, 33), lambda c: setattr(c.parallel_config, "distributed_executor_backend", "ray"), "that ray starts"),
    (
        (0, 33),
        lambda c: setattr(c.parallel_config, "distributed_executor_backend", "external_launcher"),
        "that external_launcher starts",
    ),
]


@pytest.mark.parametrize(("version", "change", "reason"), CASES)
@BOTH
def test_cuda_engines_that_are_refused(
    make: Any,
    native: FakeNative,
    monkeypatch: pytest.MonkeyPatch,
    logs: Any,
    version: Any,
    change: Any,
    reason: str | None,
    role: KVConnectorRole,
) -> None:
    monkeypatch.setattr(support, "vllm_version", lambda: version)
    connector = make(role, change)
    if reason is None:
        assert native.options and "uncached" not in logs.text
        return
    assert "running uncached" in logs.text and reason in logs.text
    assert not native.options, "a refused engine has no client"
    if role == KVConnectorRole.WORKER:
        connector.register_kv_caches({})
        connector.unregister_kv_caches()
        connector.restore_kv_caches()
        assert connector.build_connector_worker_meta().refused is not None


def test_quantization_of_the_spec_counts_too(make: Any, logs: Any) -> None:
    kv = make_kv_config(20)
    spec = SimpleNamespace(kv_quant_mode=SimpleNamespace(name="NVFP4"), block_size=16)
    kv.kv_cache_groups[0].kv_cache_spec = spec
    make(kv=kv)
    assert "NVFP4" in logs.text


@pytest.mark.parametrize("change", [case[1] for case in CASES if case[2] and "weights" not in case[2]])
def test_what_only_cuda_must_refuse_is_served_on_cpu(
    make: Any, native: FakeNative, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    gpu.kind = "cpu"
    monkeypatch.setattr(support, "vllm_version", lambda: (0, 31))
    make(change=change)
    assert native.options[0]["socket"] == "/nonexistent/cpu0.sock" and not gpu.asked


# ---- the device's name


@pytest.mark.parametrize(
    ("values", "asked"),
    [
        ({}, ("platform", 0)),
        ({"data_parallel_rank_local": 2, "data_parallel_index": 1}, ("platform", 2)),
        ({"data_parallel_rank_local": None, "data_parallel_index": 3}, ("platform", 3)),
        ({"assigned_physical_gpu_ids": [3, 1]}, ("nvml", 3)),
        ({"assigned_physical_gpu_ids": [3, 1], "data_parallel_rank_local": 1}, ("nvml", 1)),
        # Replicas that Ray starts: one assigned GPU each, counted from 0.
        (
            {
                "data_parallel_backend": "ray",
                "data_parallel_rank_local": 2,
                "assigned_physical_gpu_ids": [2],
            },
            ("nvml", 2),
        ),
        ({"distributed_executor_backend": "mp", "data_parallel_rank_local": 1}, ("platform", 1)),
    ],
)
def test_the_gpu_of_the_worker(make: Any, native: FakeNative, gpu: FakeGpu, values: Any, asked: Any) -> None:
    def change(config: Any) -> None:
        for name, value in values.items():
            setattr(config.parallel_config, name, value)

    for role in KVConnectorRole:
        make(role, change)
    assert gpu.asked == [asked, asked], "both halves alike"
    assert {options["socket"] for options in native.options} == {f"/nonexistent/{gpu.name(asked[1])}.sock"}


def test_the_index_is_vllms_own(make: Any, tmp_path: Path) -> None:
    parallel = make_config(tmp_path / "model").parallel_config
    if not hasattr(parallel, "get_local_gpu_index"):
        return  # before 0.33 the lines are in `Worker.init_device`
    for values in ({}, {"data_parallel_rank_local": 3}, {"data_parallel_backend": "ray"}):
        for name, value in values.items():
            setattr(parallel, name, value)
        assert device.logical_index(parallel) == parallel.get_local_gpu_index(0)


@pytest.mark.parametrize(
    "told", ["GPU-" + uuid(0).upper(), uuid(0), ("GPU-" + uuid(0)).encode(), f"GPU-{uuid(0)}\0"]
)
def test_a_uuid_has_one_form(told: Any) -> None:
    assert device.normal(told) == uuid(0)


@pytest.mark.parametrize(
    "told", ["", "MIG-" + uuid(0), "GPU-1b4e28ba", b"\xff", "0000:01:00.0", uuid(0) + "/x"]
)
def test_what_is_no_uuid_is_refused(
    make: Any, native: FakeNative, gpu: FakeGpu, logs: Any, told: Any
) -> None:
    with pytest.raises(device.Unnamed, match="expected the UUID of a GPU"):
        device.normal(told)
    gpu.answer = told or "none"
    make()
    assert "expected the UUID" in logs.text and not native.options


@pytest.mark.parametrize("error", [NotImplementedError(), IndexError("out of range"), RuntimeError("NVML")])
def test_without_nvml_the_engine_runs_uncached(
    make: Any, native: FakeNative, gpu: FakeGpu, logs: Any, error: BaseException
) -> None:
    gpu.error = error
    make(KVConnectorRole.SCHEDULER)
    assert f"NVML does not name GPU 0 (CUDA_VISIBLE_DEVICES=''): {type(error).__name__}" in logs.text
    assert not native.options


def test_mig_instances_are_refused(
    make: Any, native: FakeNative, monkeypatch: pytest.MonkeyPatch, logs: Any
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"MIG-{uuid(0)}")
    make()
    assert "MIG instances are not served yet" in logs.text and not native.options


def test_memory_on_another_gpu_is_refused_by_both_halves(
    make: Any, native: FakeNative, gpu: FakeGpu, logs: Any
) -> None:
    native.cuda = gpu.name(1)
    worker, scheduler = make(), make(KVConnectorRole.SCHEDULER)
    registered(worker)
    assert native.registered is None and not native.live
    assert f"the KV cache lies on {gpu.name(1)}, but NVML's index names {gpu.name(0)}" in logs.text
    scheduler.update_connector_output(
        SimpleNamespace(kv_connector_worker_meta=worker.build_connector_worker_meta(), finished_recving=None)
    )
    assert "CUDA_DEVICE_ORDER" in scheduler._scheduler.refused


def test_memory_that_cannot_be_located_is_refused(make: Any, native: FakeNative, logs: Any) -> None:
    native.raise_in["cuda_device"] = ValueError("not device memory")
    connector = make()
    registered(connector)
    assert (
        native.registered is None and "not device memory" in connector.build_connector_worker_meta().refused
    )


def test_the_sidecar_is_launched_for_the_gpu(
    make: Any, native: FakeNative, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "find_binary", lambda: "/x/pillion")
    make(extra={"launch": True})
    launch = native.options[0]["launch"]
    assert launch[launch.index("--device") + 1] == f"gpu-{uuid(0)}" and "--socket" not in launch


# ---- registration


@pytest.fixture
def canary_log(native: FakeNative, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts the canary's own steps into the native fake's log."""
    write, clear = canary.write, canary.clear

    def logged_write(*args: Any) -> None:
        native.log.append("canary")
        write(*args)

    def logged_clear(*args: Any) -> None:
        native.log.append("clear")
        clear(*args)

    monkeypatch.setattr(canary, "write", logged_write)
    monkeypatch.setattr(canary, "clear", logged_clear)
    return native.log


def is_intact(caches: Any, native: FakeNative) -> bool:
    """Whether block 0 holds the canary that was proved last."""
    _, seed = native.registered["canaries"][-1]
    return canary.intact([caches[name] for name in LAYERS], 20, seed)


START = ["describe", "canary", "synchronize", "check_canary", "register", "ready", "canary_over", "clear"]


def test_the_order_of_a_start(make: Any, native: FakeNative, canary_log: list[str]) -> None:
    connector = make()
    assert connector.get_mem_pool_context() is None, "vLLM's own memory"
    caches = registered(connector)
    assert canary_log == START
    told = native.registered
    assert told["cuda"] is True and told["memfd"] == -1
    assert told["base"] == caches[LAYERS[0]].untyped_storage().data_ptr()
    assert told["memory_bytes"] == make_kv_config(20).kv_cache_tensors[0].size
    assert all(not caches[name][0].any() for name in LAYERS), "block 0 is as vLLM allocated it"


def test_the_canary_is_there_while_the_sidecar_looks(
    make: Any, native: FakeNative, monkeypatch: pytest.MonkeyPatch
) -> None:
    connector = make()
    seen = []
    caches = make_tensors(make_kv_config(20))
    client = connector._worker.client
    monkeypatch.setattr(
        client,
        "canary_over",
        lambda: seen.append(is_intact(caches, native)),
    )
    connector.register_kv_caches(caches)
    assert seen == [True]


@pytest.mark.parametrize("place", ["describe", "check_canary", "register", "canary_over"])
def test_a_refused_engine_keeps_no_canary_in_block_0(make: Any, native: FakeNative, place: str) -> None:
    """Padded block tables point there, and the words may be NaN."""
    native.raise_in[place] = ValueError("device memory cannot be shared")
    connector = make()
    caches = registered(connector)
    assert connector._worker.refused
    assert all(not caches[name][0].any() for name in LAYERS)


def test_replicas_with_gpus_of_their_own_need_sockets_of_their_own(
    make: Any, native: FakeNative, logs: Any
) -> None:
    change = lambda config: vars(config.parallel_config).update(data_parallel_size=2)  # noqa: E731
    connector = make(change=change, extra={"socket": "/run/one.sock"})
    assert connector._worker.refused and "expected {device} in it" in logs.text
    make(change=change, extra={"socket": "/run/{device}.sock"})
    assert native.options[-1]["socket"] == f"/run/{native.cuda}.sock"


def test_a_cpu_engine_makes_no_call_into_cuda(
    make: Any, native: FakeNative, gpu: FakeGpu, canary_log: list[str]
) -> None:
    gpu.kind = "cpu"
    connector = make()
    assert connector.get_mem_pool_context() is not None
    caches = registered(connector)
    start = ["describe", "canary", "check_canary", "register", "ready"]
    assert canary_log == start and native.registered["cuda"] is False
    assert is_intact(caches, native)
    connector.unregister_kv_caches()
    connector.restore_kv_caches()
    assert canary_log == start and "cuda_device" not in native.calls and native.live


def test_memory_that_cannot_be_exported_is_refused(make: Any, native: FakeNative, logs: Any) -> None:
    native.raise_in["describe"] = ValueError("cudaMallocAsync memory has no handle")
    connector = make()
    registered(connector)
    assert "has no handle" in connector.build_connector_worker_meta().refused
    assert "canary_over" not in native.log
    connector.unregister_kv_caches()
    connector.restore_kv_caches()
    assert native.calls["describe"] == 1 and not {"register", "unregister"} & set(native.calls)


def test_a_canary_in_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        caches = make_tensors(make_kv_config(3))
    views = list(caches.values())
    canary.write(views, 3, 9)
    assert canary.intact(views, 3, 9)
    canary.clear(views, 3)
    assert not any(caches[name].any() for name in LAYERS)


# ---- streams


def test_every_job_names_the_current_stream(make: Any, native: FakeNative, gpu: FakeGpu) -> None:
    connector = make()
    registered(connector)
    native.leases[1] = (bytes(16), [(0, [bytes(32)])], 0)
    gpu.current = 11
    connector.bind_connector_metadata(PillionMetadata([load()], [save()]))
    connector.start_load_kv(None)
    gpu.current = 12  # vLLM may have changed it in between
    connector.wait_for_save()
    connector.get_transfer_results(set())
    assert native.streams == [("load", 11), ("save", 12)], "each once, at the moment of its call"


def test_a_step_without_a_forward_saves_where_vllm_does_not_ask(
    make: Any, native: FakeNative, gpu: FakeGpu
) -> None:
    """vLLM 0.30 leaves `wait_for_save` out of such a step."""
    connector = make()
    registered(connector)
    gpu.current = 0  # the legacy default stream is a stream, too
    connector.bind_connector_metadata(PillionMetadata([], [save()]))
    connector.get_transfer_results(set())
    assert native.streams == [("save", 0)]
    connector.wait_for_save()
    assert len(native.streams) == 1


def test_cpu_jobs_name_no_stream(make: Any, native: FakeNative, gpu: FakeGpu) -> None:
    gpu.kind = "cpu"
    connector = make()
    registered(connector)
    native.leases[1] = (bytes(16), [(0, [bytes(32)])], 0)
    connector.bind_connector_metadata(PillionMetadata([load()], [save()]))
    connector.start_load_kv(None)
    connector.wait_for_save()
    assert native.streams == [("load", None), ("save", None)]


def test_an_engine_on_a_gpu(native: FakeNative, gpu: FakeGpu, tmp_path: Path, overlap: bool) -> None:
    tokens = prompt(100)
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    engine.add("a", tokens)
    engine.run()
    assert engine.outputs["a"] == expected(tokens, 4)
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    engine.add("b", tokens)
    engine.run()
    assert engine.outputs["b"] == expected(tokens, 4) and engine.params["b"]["pillion"]["loaded_tokens"] == 96
    assert {kind for kind, _ in native.streams} == {"load", "save"}
    assert {stream for _, stream in native.streams} == {gpu.current}
    engine.assert_clean()


# ---- sleep and wake-up


def test_sleep_and_wake_up(make: Any, native: FakeNative, canary_log: list[str]) -> None:
    connector = make()
    caches = registered(connector)
    first = native.registered
    del canary_log[:]
    connector.unregister_kv_caches()
    connector.unregister_kv_caches()  # discard, then sleep
    assert canary_log == ["unregister"] and not native.live
    for name in LAYERS:
        caches[name].fill_(7)  # what is in memory after `wake_up`
    connector.restore_kv_caches()
    connector.restore_kv_caches()
    assert canary_log == ["unregister", *START] and native.calls["register"] == 2
    seeds = {first.pop("canaries")[0], native.registered.pop("canaries")[0]}
    assert native.registered == first and len(seeds) == 2, "the same memory, another canary"
    assert all(not caches[name][0].any() and bool((caches[name][1:] == 7).all()) for name in LAYERS)


def test_a_wake_up_without_sleep_and_a_sleep_without_a_start(make: Any, native: FakeNative) -> None:
    connector = make()
    connector.unregister_kv_caches()
    connector.restore_kv_caches()
    assert not native.log
    registered(connector)
    connector.restore_kv_caches()
    assert native.calls["register"] == 1 and "unregister" not in native.calls


def test_a_sleeping_engine_takes_no_jobs(make: Any, native: FakeNative) -> None:
    connector = make()
    registered(connector)
    connector.unregister_kv_caches()
    connector.bind_connector_metadata(PillionMetadata([load()], [save()]))
    connector.start_load_kv(None)
    connector.wait_for_save()
    results = connector.get_transfer_results(set())
    assert results.finished_recving == results.failed_recving == {"r"}
    reports = connector.build_connector_worker_meta().jobs
    assert [(report.outcome, report.quiesced) for report in reports.values()] == [(FAILED, 1), (CANCELLED, 1)]
    assert not native.streams and not connector._worker._running
    connector.restore_kv_caches()
    native.leases[1] = (bytes(16), [(0, [bytes(32)])], 0)
    connector.bind_connector_metadata(PillionMetadata([load(3)], [save(4)]))
    connector.start_load_kv(None)
    connector.wait_for_save()
    assert len(native.streams) == 2


@pytest.mark.parametrize("answer", [True, False])
def test_jobs_in_flight_at_sleep_end(make: Any, native: FakeNative, logs: Any, answer: bool) -> None:
    native.load_polls = native.save_polls = 100
    native.unregister_answer = answer
    connector = make()
    registered(connector)
    native.leases[1] = (bytes(16), [(0, [bytes(32)])], 0)
    connector.bind_connector_metadata(PillionMetadata([load()], [save()]))
    connector.start_load_kv(None)
    connector.wait_for_save()
    connector.unregister_kv_caches()
    results = connector.get_transfer_results(set())
    assert results.finished_recving == results.failed_recving == {"r"}, "vLLM waits for nothing"
    reports = connector.build_connector_worker_meta().jobs
    assert [report.outcome for report in reports.values()] == [FAILED, CANCELLED]
    assert [report.quiesced for report in reports.values()] == [int(answer)] * 2
    assert ("has not let go" in logs.text) is not answer
    connector.restore_kv_caches()
    assert native.live, "the next wake-up registers whatever happened"
    if answer:
        return
    connector.get_transfer_results(set())
    assert connector.build_connector_worker_meta() is None, "holds stay until it has quiesced"
    native.quiesce_all()
    connector.get_transfer_results(set())
    assert [report.quiesced for report in connector.build_connector_worker_meta().jobs.values()] == [1, 1]


def test_an_error_in_unregister_gets_nowhere(make: Any, native: FakeNative, logs: Any) -> None:
    native.raise_in["unregister"] = BaseException("panic")
    connector = make()
    registered(connector)
    connector.unregister_kv_caches()
    assert "has not let go" in logs.text and "unregister_kv_caches failed" in logs.text
    connector.bind_connector_metadata(PillionMetadata([], [save()]))
    connector.wait_for_save()
    assert not native.streams, "asleep all the same"


def test_a_wake_up_that_fails_runs_uncached(make: Any, native: FakeNative) -> None:
    connector = make()
    registered(connector)
    assert connector.build_connector_worker_meta().refused is None
    connector.unregister_kv_caches()
    native.raise_in["register"] = ValueError("no handle")
    connector.restore_kv_caches()
    assert "no handle" in connector.build_connector_worker_meta().refused
    del native.raise_in["register"]
    connector.restore_kv_caches()
    assert native.calls["register"] == 2 and not native.live
    connector.bind_connector_metadata(PillionMetadata([], [save()]))
    connector.wait_for_save()
    assert not native.streams


def test_waking_up_waits_for_the_sidecar_no_longer_than_it_may(
    make: Any, native: FakeNative, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pillion.vllm import worker

    waits: list[int] = []
    monkeypatch.setattr(source, "launch_command", lambda socket, device, ranks=1: ["pillion"])
    monkeypatch.setattr(worker, "wait_ready", lambda client, wait_ms, who: waits.append(wait_ms))
    connector = make(extra={"launch": True})
    registered(connector)
    connector.unregister_kv_caches()
    connector.restore_kv_caches()
    assert waits == [10_000, worker.WAKE_WAIT_MS]


def test_nothing_that_was_computed_before_sleep_is_found_after(
    native: FakeNative, gpu: FakeGpu, tmp_path: Path, overlap: bool
) -> None:
    """As vLLM 0.33's engine core sleeps. A wrong hit would fail the simulated worker: its memory is empty."""
    tokens = prompt(100)
    engine = Engine(native, tmp_path / "model", overlap=overlap)
    engine.add("before", tokens)
    engine.run()
    engine.sleep()
    engine.wake_up()
    engine.add("after", tokens)
    engine.run()
    assert engine.outputs["after"] == expected(tokens, 4)
    assert engine.params["after"]["pillion"]["loaded_tokens"] == 0 and not engine.loads
    assert engine.scheduler.reset_prefix_cache()  # vLLM's own; what was saved since is Pillion's to load
    engine.add("again", tokens)
    engine.run()
    assert engine.params["again"]["pillion"]["loaded_tokens"] == 96
    engine.assert_clean()


def test_a_sleep_waits_for_jobs(native: FakeNative, gpu: FakeGpu, tmp_path: Path) -> None:
    """The engine core pauses until there is no work, and holds are work; what is aborted ends first."""
    native.save_polls = 20
    engine = Engine(native, tmp_path / "model")
    engine.add("a", prompt(100), max_tokens=40)
    for _ in range(3):
        engine.step()
    assert engine.half.holds.held > 0 and engine.scheduler.connector.has_pending_push_work()
    engine.sleep()
    assert engine.half.holds.held == 0 and not native.jobs
    engine.wake_up()
    engine.add("b", prompt(100))
    engine.run()
    assert engine.outputs["b"] == expected(prompt(100), 4)
    engine.assert_clean()


def test_this_vllm_calls_the_hooks_that_are_handled() -> None:
    """0.33 and later call them; before, sleep mode is refused."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    has = hasattr(KVConnectorBase_V1, "unregister_kv_caches")
    assert has == ((support.vllm_version() or (0, 0)) >= (0, 33))
    assert has == hasattr(KVConnectorBase_V1, "supports_sleep_mode")
