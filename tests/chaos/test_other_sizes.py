"""An engine whose tensor-parallel size changed hits what was stored before: real sidecars, the shipped client, and the
shim's own code between them (so this file needs vLLM), over memory of every physical order.

The model has 12 heads. Each rank of a fake engine holds its share of them, in a layout of its own, and knows every
byte that a block must have.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chaos.conftest import World
from chaos.engine import DONE, Bytes, FakeEngine, Job, Shape, chain, contents
from chaos.sidecar import Sidecar, until
from pillion.vllm import identity, shards
from pillion.vllm.metadata import LoadPlan, SavePlan
from pillion.vllm.ranks import Ranks, part
from pillion.vllm.worker import own_part

HEADS = 12
SIZES = (1, 2, 3, 4)


@dataclass(frozen=True)
class Packing:
    """What a backend packs, in which orders of memory it is served."""

    text: str
    content: int
    orders: tuple[str, ...]


PACKINGS = {
    "kv": Packing(
        f"kv total_heads={HEADS} key=16 value=16 dtype=float16",
        32,
        ("LBNHC", "LBHNC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"),
    ),
    "scaled": Packing(
        f"kv-scaled total_heads={HEADS} key=14 value=14 format=int8_per_token_head",
        14 + 14 + 2 * 4,
        ("LBNHC", "LBHNC", "BLHNC", "BLNHC"),
    ),
    # A page on the CPU.
    "opaque": Packing(f"opaque-heads total_heads={HEADS} format=CPU_ATTN/vec16", 32, ("LBHNC", "BLHNC")),
}


@dataclass
class RankEngine(FakeEngine):
    """One rank. Records are, logically, `[layers, heads, states, bytes]`."""

    rank: int = 0
    world: int = 1
    packing: str = "kv"
    heads: int = HEADS  # of the model

    def __post_init__(self) -> None:
        config, group = model_of(self.world, self.heads)
        fields = {"shard": f"1/{identity.shards(config, group.kv_cache_spec)}"}
        self.forms = shards.forms(config, SimpleNamespace(kv_cache_groups=[group]), self.rank, self.world)
        self.twins = identity.twins(fields, self.rank, self.world)
        self.extra = {**self.extra, **identity.of_rank(fields, self.rank, self.world)}
        super().__post_init__()

    def _take_memory(self) -> None:
        super()._take_memory()
        shape = self.shape
        sizes = {
            "L": shape.layers,
            "B": shape.blocks,
            "H": shape.heads,
            "N": shape.states,
            "C": shape.content,
        }
        axes = [shape.order.index(axis) for axis in "LBHNC"]
        self.cells = self.map.reshape([sizes[axis] for axis in shape.order]).transpose(axes)

    def _client_options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        scheduler, worker = super()._client_options()
        own = scheduler["namespaces"][0]
        others = [identity.of_shard(own, number, count) for _, number, count in self.forms.others]
        return {**scheduler, "namespaces": [own, *others]}, worker

    def describe(self, order: str) -> None:
        shape = self.shape
        packing = PACKINGS[self.packing].text.replace(f"heads={HEADS}", f"heads={self.heads}")
        pages = self.layout(self.cells.strides, packing)
        self.worker.describe(
            layout=order,
            num_blocks=shape.blocks,
            memory_bytes=shape.total,
            rank=self.rank,
            world=self.world,
            groups=[{"block_tokens": shape.states, "pages": [pages]}],
            others=[(group, number, count) for group, number, count in self.forms.others],
            **self._place(),
        )

    def write(self, block: int, record: bytes) -> None:
        shape = self.shape
        cells = np.frombuffer(record, dtype=np.uint8)
        self.cells[:, block] = cells.reshape(shape.layers, shape.heads, shape.states, shape.content)

    def read(self, block: int) -> bytes:
        return self.cells[:, block].tobytes()

    def fill(self, block: int, value: int) -> None:
        self.cells[:, block] = value

    def filled(self, block: int, value: int) -> bool:
        return bool((self.cells[:, block] == value).all())

    def expected(self, block_hash: bytes) -> bytes:
        shape = self.shape
        model = (shape.layers, self.heads, shape.states, shape.content)
        whole: Bytes = np.frombuffer(contents(block_hash, self.model, int(np.prod(model))), dtype=np.uint8)
        first = self.rank // self.twins[0] * shape.heads
        return whole.reshape(model)[:, first : first + shape.heads].tobytes()

    def load_plan(self, plan: LoadPlan, hashes: list[bytes]) -> Job:
        """This rank's load; its blocks are its own."""
        job = self._job("load", hashes, plan.deadline_ms)
        for block in job.blocks:
            self.fill(block, 0)
        own = self.forms.spread(plan._replace(blocks=job.blocks, job=job.id))
        lease, spaces = part(own.lease, self.rank, self.world), part(own.spaces, self.rank, self.world)
        self.worker.submit_load(job.id, lease, spaces, own.runs, own.hashes, own.blocks, own.deadline_ms)
        return self._submitted(job)

    def _give_memory_back(self) -> None:
        del self.cells
        super()._give_memory_back()


def model_of(world: int, heads: int) -> tuple[Any, Any]:
    """What vLLM's configuration says of it, and its only KV cache group."""
    spec = type("FullAttentionSpec", (), {"num_kv_heads": max(1, heads // world)})()
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=world),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: heads),
        speculative_config=None,
    )
    return config, SimpleNamespace(kv_cache_spec=spec)


class SizedEngine:
    """An engine of several ranks, each at a sidecar of its own."""

    def __init__(
        self,
        world: World,
        sidecars: list[Sidecar],
        size: int,
        order: str,
        packing: str,
        model: str,
        states: int = 4,
        heads: int = HEADS,
    ) -> None:
        content = PACKINGS[packing].content
        own = max(1, heads // size)
        shape = Shape(layers=3, blocks=64, heads=own, states=states, content=content, order=order)
        self.size, self.name = size, f"{model}-{size}-{order}"
        self.ranks = [
            RankEngine(
                sidecar.socket,
                f"{self.name}-{rank}",
                shape=shape,
                model=model,
                rank=rank,
                world=size,
                packing=packing,
                heads=heads,
            )
            for rank, sidecar in enumerate(sidecars[:size])
        ]
        world.engines += self.ranks
        for rank in self.ranks:
            rank.await_ready()
        self.client = Ranks([rank.scheduler for rank in self.ranks], [rank.forms for rank in self.ranks])
        self.forms = len(self.ranks[0].forms)

    def must_save(self, prompt: list[bytes]) -> None:
        for rank in self.ranks:
            rank.must_save(prompt)

    def save_once(self, prompt: list[bytes]) -> None:
        """Each rank, of what others hold as well, only its own part."""
        plan = SavePlan(b"", b"", [(0, b"", len(prompt))], b"".join(prompt), [*range(len(prompt))], 1, True)
        for rank in self.ranks:
            own, at = own_part(plan, [rank.twins]), 0
            for _, parent, count in own.runs:
                rank.must_save([prompt[index] for index in own.blocks[at : at + count]], parent=parent)
                at += count

    def found(self, prompt: list[bytes]) -> list[int]:
        """Leading blocks in each form."""
        return [self.client.lookup(form, b"".join(prompt)) for form in range(self.forms)]

    def load(self, prompt: list[bytes], form: int) -> list[Job]:
        """Ends of the load of what is granted in a form, on every rank."""
        ticket = self.client.lease([(form, b"".join(prompt))])
        if not ticket:
            return []
        until(lambda: self.client.lease_poll(ticket) is not None, "the leases")
        granted, lease = self.client.lease_poll(ticket) or ([], b"")
        if not granted:
            self.client.release(ticket)
            return []
        wanted, spaces = prompt[: granted[0]], self.client.namespace_ids(form)
        assert spaces
        runs = [(0, 0, 0, len(wanted))]
        plan = LoadPlan(b"", self.name, lease, spaces, runs, b"".join(wanted), [], 5_000, form)
        jobs = [rank.load_plan(plan, wanted) for rank in self.ranks]
        for rank, job in zip(self.ranks, jobs, strict=True):
            rank.wait(job)
        self.client.release(ticket)
        return jobs

    def close(self) -> None:
        for rank in self.ranks:
            rank.settle()


def node(world: World, size: int, disk: Path | None = None) -> list[Sidecar]:
    """So many sidecars, which have all met."""
    first = world.sidecar(device="cpu0", start=False)
    sidecars = [first, *(first.sibling(f"cpu{index}") for index in range(1, size))]
    world.sidecars += sidecars[1:]
    for sidecar in sidecars:
        if disk is not None:
            sidecar.flags |= {"ssd": f"{disk / sidecar.device}=64MiB", "ssd_cache_mode": "write_through"}
        sidecar.start()
    until(
        lambda: all(len(sidecar.status()["neighbours"]) == size - 1 for sidecar in sidecars),
        "the sidecars to meet",
        20,
    )
    return sidecars


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_size_loads_what_every_other_stored_in_any_order_of_memory(world: World, packing: str) -> None:
    sidecars = node(world, max(SIZES))
    loads = 0
    orders = PACKINGS[packing].orders
    for turn in range(len(orders)):
        model = f"model-{turn}"
        engines = [
            SizedEngine(world, sidecars, size, orders[(turn + at) % len(orders)], packing, model)
            for at, size in enumerate(SIZES)
        ]
        prompts = {engine.size: chain(f"{model}-{engine.size}", 5) for engine in engines}
        for engine in engines:
            engine.must_save(prompts[engine.size])
        for reader, (writer, prompt) in product(engines, prompts.items()):
            until(lambda prompt=prompt, reader=reader: 5 in reader.found(prompt), "tables of all neighbours")  # type: ignore[misc]
            # In exactly the form of who wrote it.
            (form,) = [form for form, blocks in enumerate(reader.found(prompt)) if blocks]
            assert (form == 0) == (writer == reader.size)
            jobs = reader.load(prompt, form)
            assert [job.outcome for job in jobs] == [DONE] * reader.size
            parts = [len(rank.forms.parts(form)) for rank in reader.ranks]
            assert [job.blocks_done for job in jobs] == [5 * count for count in parts]
            loads += 1
        for engine in engines:
            engine.close()
    assert loads == len(orders) * len(SIZES) ** 2
    for sidecar in sidecars:
        sidecar.await_unleased()


def test_heads_that_several_ranks_hold_are_stored_once_and_loaded_by_all(world: World) -> None:
    """Four ranks, two heads: pairs of them hold the same one. An engine of another size loads them, too."""
    sidecars = node(world, 4)
    four, one = (SizedEngine(world, sidecars, size, "BLHNC", "kv", "model", heads=2) for size in (4, 1))
    assert [rank.twins for rank in four.ranks] == [(2, 0), (2, 1), (2, 0), (2, 1)]
    prompt = chain("a", 20)
    four.save_once(prompt)
    records = [sidecar.status()["pool"]["records"] for sidecar in sidecars]
    assert sum(records) == 2 * 20 and min(records) > 0, f"every head once: {records}"
    until(lambda: four.found(prompt)[0] == 20, "tables of all neighbours")
    assert [job.outcome for job in four.load(prompt, 0)] == [DONE] * 4
    until(lambda: 20 in one.found(prompt), "tables of all neighbours")
    assert [job.outcome for job in one.load(prompt, one.found(prompt).index(20))] == [DONE]
    one.must_save(prompt[:5])
    until(lambda: 5 in four.found(prompt)[1:], "tables of all neighbours")
    form = four.found(prompt).index(5)
    assert [job.outcome for job in four.load(prompt, form)] == [DONE] * 4


def test_a_shard_whose_sidecar_is_gone_is_a_miss_until_it_is_back(world: World) -> None:
    sidecars = node(world, 2)
    writer, reader = (SizedEngine(world, sidecars, size, "BLHNC", "kv", "model") for size in (2, 1))
    prompt = chain("a", 5)
    writer.must_save(prompt)
    until(lambda: 5 in reader.found(prompt), "the neighbour's table")
    form = reader.found(prompt).index(5)
    sidecars[1].kill_worker()
    until(lambda: reader.found(prompt)[form] == 0, "its table to count no more")
    assert reader.load(prompt, form) == []
    # Half of a block is no block: what came back without its pool has to be saved again.
    until(
        lambda: (sidecars[1].try_status() or {}).get("sidecar", {}).get("worker_restarts"),
        "it to start again",
    )
    for rank in writer.ranks:
        rank.await_ready()
    writer.must_save(prompt)
    until(lambda: reader.found(prompt)[form] == 5, "the neighbour's table", 20)
    assert [job.outcome for job in reader.load(prompt, form)] == [DONE]


def test_blocks_of_two_ranks_outlive_their_sidecars_on_the_ssd(world: World, tmp_path: Path) -> None:
    sidecars = node(world, 2, disk=tmp_path)
    writer = SizedEngine(world, sidecars, 2, "BLHNC", "kv", "model", states=16)
    prompt = chain("a", 5)
    writer.must_save(prompt)
    writer.close()
    for rank in writer.ranks:
        rank.close()
        world.engines.remove(rank)
    for sidecar in sidecars:
        sidecar.terminate()
        sidecar.start()
    reader = SizedEngine(world, sidecars, 1, "LBNHC", "kv", "model", states=16)
    until(lambda: 5 in reader.found(prompt), "what was on the SSD", 20)
    form = reader.found(prompt).index(5)
    assert [job.outcome for job in reader.load(prompt, form)] == [DONE]
    assert [sidecar.status()["ssd"]["blocks_read"] for sidecar in sidecars] == [5, 5]
