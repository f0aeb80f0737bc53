"""KV cache groups for the simulated engine: their vLLM specs, and what a model of each kind reads and writes.

A block's content is a list of the values of its positions; a value depends on the whole prefix, the rank and the
group, so that a block of another group, another position or another prompt is never right by chance. Block tables
are the model runner's own, which never learn that the scheduler has put null blocks in: only what the scheduler keeps
is read.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

Memory = MutableMapping[int, Any]
Value = Callable[[int], int]  # of the prefix that ends at a position


@dataclass(frozen=True)
class KvGroup:
    """One group: `full`, `mla`, `window`, `align` or `all` (recurrent states, by vLLM's cache mode)."""

    kind: str = "full"
    block: int = 16
    window: int = 0
    heads: int = 2  # of one rank

    def spec(self) -> Any:
        if self.kind in ("align", "all"):
            return MambaSpec(
                block_size=self.block,
                shapes=((2, 16), (4, 8)),
                dtypes=(torch.float32, torch.float32),
                mamba_cache_mode=self.kind,
            )
        shape: dict[str, Any] = {"block_size": self.block, "head_size": 32, "dtype": torch.float32}
        if self.kind == "mla":
            return MLAAttentionSpec(num_kv_heads=1, **shape)
        if self.kind == "window":
            return SlidingWindowSpec(num_kv_heads=self.heads, sliding_window=self.window, **shape)
        return FullAttentionSpec(num_kv_heads=self.heads, **shape)

    @property
    def is_state(self) -> bool:
        return self.kind in ("align", "all")

    # ---- one step of a request: tokens start…end

    def check(self, memory: Memory, table: list[int], value: Value, start: int, end: int) -> None:
        """That everything this step reads is what it must be."""
        if self.is_state:
            if start:
                found = memory[table[(start - 1) // self.block]]
                assert found == [value(start - 1)], f"wrong state after {start} tokens"
            return
        first = max(0, start - self.window + 1) if self.kind == "window" else 0
        for position in range(first, start):
            block = table[position // self.block]
            assert block, f"null block at position {position} of {start}"
            found = memory[block][position % self.block]
            assert found == value(position), f"wrong KV at position {position} of {start}"

    def write(self, memory: Memory, table: list[int], value: Value, start: int, end: int) -> None:
        """What the step leaves behind."""
        if not self.is_state:
            for position in range(start, end):
                block = table[position // self.block]
                assert block, f"null block at position {position}"
                content = memory[block]
                if len(content) != self.block:
                    content = memory[block] = [None] * self.block
                content[position % self.block] = value(position)
            return
        if self.kind == "all":
            for tokens in range(start // self.block * self.block + self.block, end + 1, self.block):
                memory[table[tokens // self.block - 1]] = [value(tokens - 1)]
        # In the mode "align" the worker copies the state to the last token's block before it goes on.
        block = table[(end - 1) // self.block]
        assert block, f"null block for the state after {end} tokens"
        memory[block] = [value(end - 1)]


FULL = (KvGroup(),)


def salted(value: int, rank: int, group: int) -> int:
    """A position's content on one rank in one group."""
    return value + rank if group == 0 else hash((value, rank, group))


def make_groups_config(
    groups: tuple[KvGroup, ...], num_blocks: int, retention: int | None = None
) -> KVCacheConfig:
    """Groups that alias one allocation, each with a layer of its own."""
    specs = [group.spec() for group in groups]
    page = max(spec.page_size_bytes for spec in specs)
    specs = [spec if spec.page_size_bytes == page else replace(spec, page_size_padded=page) for spec in specs]
    names = [[f"model.layers.{index}.attn"] for index in range(len(groups))]
    config = KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[
            KVCacheTensor(
                size=page * num_blocks, layers=list(own), layer_stride=page * num_blocks, block_stride=page
            )
            for own in names
        ],
        kv_cache_groups=[KVCacheGroupSpec(list(own), spec) for own, spec in zip(names, specs, strict=True)],
        kv_cache_layout="LBHNC",
    )
    config.prefix_cache_retention_interval = retention
    return config


def make_groups_tensors(config: KVCacheConfig) -> dict[str, Any]:
    """The memory, as vLLM allocates and views it."""
    blocks = [group.kv_cache_spec.block_size for group in config.kv_cache_groups]
    return dict(allocate_kv_cache(config, torch.device("cpu"), KVCacheLayout.LBHNC, blocks))
