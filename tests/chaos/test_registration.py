"""Every kind of KV cache that vLLM lays out, registered by the shim's own code with a real sidecar, saved and loaded.

vLLM says where layers lie and makes the views (the script of the golden layouts asks it); the shim describes them and
writes the canaries; blocks of all groups go out and in by one job, and are compared through vLLM's views.
"""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chaos.conftest import World
from chaos.engine import DONE
from chaos.sidecar import Sidecar, until
from pillion._native import SchedulerClient, WorkerClient

pytest.importorskip("vllm.v1.kv_cache_layout")
import torch
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

SCRIPT = Path(__file__).parents[2] / "layouts/tests/data/vllm_layouts.py"
# Of the script's specs these say what is in their bytes.
MODELS = (
    "full",
    "full, v shorter",
    "planes",
    "mla",
    "mla, fp8_ds_mla with indexer",
    "mla, padded states",
    "full and window",
    "full and mamba",
)


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("vllm_layouts", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Hybrid:
    """A worker with vLLM's own tensors, and the scheduler beside it."""

    def __init__(self, sidecar: Sidecar, name: str, config: Any, caches: dict[str, Any], order: str) -> None:
        from pillion.vllm import canary, groups

        engine = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            cache_config=SimpleNamespace(cache_dtype="auto"),
        )
        self.found = groups.described(engine, config, caches)
        storage = self.found.views[0][0].untyped_storage()
        spaces = [{"model": name, "group": str(index)} for index in range(len(self.found.groups))]
        options: dict[str, Any] = {
            "socket": str(sidecar.socket),
            "engine_id": f"{name}-{os.urandom(4).hex()}",
            "tenant": "default",
            "namespaces": spaces,
        }
        self.scheduler, self.worker = SchedulerClient(**options), WorkerClient(**options)
        self.worker.describe(
            layout=order,
            num_blocks=self.found.num_blocks,
            memory_bytes=storage.nbytes(),
            rank=0,
            world=1,
            groups=self.found.groups,  # type: ignore[arg-type]
            base=storage.data_ptr(),
        )
        for index, views in enumerate(self.found.views):
            canary.write(views, self.found.num_blocks, 7 + index)
            self.worker.check_canary(index, 7 + index)
        self.worker.register()
        told = lambda: f"{self.scheduler.status()}; {self.worker.status()}"  # noqa: E731
        until(lambda: self.scheduler.ready() and self.worker.ready(), told)

    def rows(self, group: int, block: int) -> list[torch.Tensor]:
        """A block's bytes in every layer of a group, as vLLM sees them."""
        blocks = self.found.num_blocks
        out = []
        for view in self.found.views[group]:
            ratio = view.shape[0] // blocks
            out.append(view[block * ratio : (block + 1) * ratio].view(torch.uint8))
        return out

    def fill(self, group: int, block: int) -> list[torch.Tensor]:
        rows = self.rows(group, block)
        for row in rows:
            row.copy_(torch.randint(0, 256, row.shape, dtype=torch.uint8))
        return [row.clone() for row in rows]

    def end(self) -> int:
        """Waits for one job; how many blocks it moved."""
        events = until(self.worker.poll, lambda: "the job ends")
        while not events[-1][2]:
            events += until(self.worker.poll, lambda: "the job quiesces")
        assert [event[1] for event in events if event[1]] == [DONE]
        return sum(event[3] for event in events)

    def close(self) -> None:
        self.worker.close()
        self.scheduler.close()


def round_trip(engine: Hybrid) -> None:
    """A block of each group (a pool's blocks belong to one group each) in one job, out and in."""
    count = len(engine.found.groups)
    blocks = [1 + group for group in range(count)]
    hashes = [os.urandom(32) for _ in range(count)]
    before = [engine.fill(group, block) for group, block in enumerate(blocks)]
    spaces = engine.scheduler.namespace_ids()
    assert spaces is not None
    runs = [(group, b"", 1) for group in range(count)]
    engine.worker.submit_save(os.urandom(16), spaces, runs, b"".join(hashes), blocks, 10_000)
    assert engine.end() == count
    for group, block in enumerate(blocks):
        for row in engine.rows(group, block):
            row.fill_(0xEE)
    wanted = [(group, block_hash) for group, block_hash in enumerate(hashes)]
    until(
        lambda: all(engine.scheduler.lookup(group, block_hash) for group, block_hash in wanted),
        lambda: "the blocks are found",
    )
    ticket = engine.scheduler.lease(wanted)
    granted = None
    deadline = time.monotonic() + 10
    while granted is None and time.monotonic() < deadline:
        granted = engine.scheduler.lease_poll(ticket, 1000)
    assert granted is not None and granted[0] == [1] * count
    loads = [(group, group, 0, 1) for group in range(count)]
    engine.worker.submit_load(os.urandom(16), granted[1], spaces, loads, b"".join(hashes), blocks, 10_000)
    assert engine.end() == count
    engine.scheduler.release(ticket)
    for group, block in enumerate(blocks):
        for row, bytes_before in zip(engine.rows(group, block), before[group], strict=True):
            assert torch.equal(row, bytes_before), f"group {group}"
    for group in range(count):
        others = [
            block
            for block in range(1, engine.found.num_blocks)
            if block not in blocks or block != blocks[group]
        ]
        # Nothing but the blocks of the job was written: the rest is as it was, all zeros.
        for block in others:
            if block not in blocks:
                assert all(not row.any() for row in engine.rows(group, block))


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_cache_goes_out_and_in(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pillion.vllm import device

    monkeypatch.setattr(device, "on_cuda", lambda: True)  # whose packings are the richer ones
    module, sidecar = generator(), world.sidecar()
    model, seen = module.groups()[name], 0
    for order in KVCacheLayout:
        for split in (1, 2):
            try:
                config, layout = module.config_of(order.name, model)
                sizes = [specs[0].block_size // split for _, specs in model]
                caches = dict(allocate_kv_cache(config, torch.device("cpu"), layout, sizes))
            except (AssertionError, ValueError):
                continue  # vLLM has no such thing
            if len(model) > 1 and order.name in ("LHBNC", "BHLNC"):
                continue  # nor this, for groups whose pages differ: `resolve_kv_cache_layout`
            engine = Hybrid(sidecar, f"{name}/{order.name}/{split}", config, caches, order.name)
            try:
                round_trip(engine)
            finally:
                engine.close()
            seen += 1
    assert seen >= 4


def test_a_group_that_lies_elsewhere_than_described_is_refused_by_its_canary(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups; the second one's views are read in another order of heads and tokens than vLLM's."""
    from pillion.vllm import canary, device, groups

    monkeypatch.setattr(device, "on_cuda", lambda: True)
    module = generator()
    config, layout = module.config_of("LBHNC", module.groups()["full and window"])
    caches = dict(allocate_kv_cache(config, torch.device("cpu"), layout, [16, 16]))
    engine = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        attention_config=None,
    )
    found = groups.described(engine, config, caches)
    storage = found.views[0][0].untyped_storage()
    sidecar = world.sidecar()
    client = WorkerClient(
        socket=str(sidecar.socket), engine_id="wrong", tenant="default", namespaces=[{"g": "0"}, {"g": "1"}]
    )

    def describe(order: str) -> None:
        client.describe(
            layout=order,
            num_blocks=found.num_blocks,
            memory_bytes=storage.nbytes(),
            rank=0,
            world=1,
            groups=found.groups,  # type: ignore[arg-type]
            base=storage.data_ptr(),
        )

    describe("LBHNC")
    canary.write(found.views[0], found.num_blocks, 1)
    client.check_canary(0, 1)
    with pytest.raises(ValueError, match="that of group 1 was not"):
        client.register()
    canary.write(found.views[1], found.num_blocks, 1)
    describe("LBNHC")
    with pytest.raises(ValueError, match=r"layout canary: expected .* in layer `model\.layers\.2"):
        client.check_canary(1, 1)
    with pytest.raises(ValueError, match="expected a KV cache group below 2, got 2"):
        client.check_canary(2, 1)
    client.close()
