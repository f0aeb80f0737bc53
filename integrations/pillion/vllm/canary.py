"""The layout canary: words that the shim writes into block 0 with the engine's own indexing.

The client, and a sidecar that is there, read block 0 by the layout that was registered and compare; a mismatch refuses
the registration (I1, I10), whatever else looked right. The canary of a KV cache group is one stream of bytes that fills
the pages of its layers one after the other, each as `[H, N, C]` (`CheckedGroup::canary_check` in layouts). Groups alias
one pool, so each one's canary is written and compared in turn, and the last one's stays for the sidecar.

Block 0 is vLLM's null block: the block pool never hands it out. On CPU nothing writes it after the canary:
slot mappings hold slots of blocks that requests own, dummy and warm-up runs use slot -1 (which the kernels
skip), and without CUDA graphs there is no padding. Where every block of a prompt is attended to, nothing reads it either:
the canary stays for the engine's whole life, and a sidecar that appears hours after the engine can still check it.

Elsewhere it is there only while the engine starts or wakes up. On a GPU, warm-up and graph capture write block 0 (vLLM's
`redirect_writes_to_null_block`), and padded block tables point at it; where blocks leave a window, or hold states, the
tables point at it on CPU, too. Kernels load from it what they then mask, and random words are NaN often enough that
nobody should have to trust every kernel's masks. So the client is told (`canary_over`; what was compared until then is
remembered, not read again), and it is zeroed, as vLLM allocated it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MUL1 = np.uint64(0xBF58476D1CE4E5B9)
_MUL2 = np.uint64(0x94D049BB133111EB)


def words(seed: int, first: int, count: int) -> NDArray[np.uint64]:
    """`splitmix64(seed + i)` for i from `first`, `count` of them, modulo 2^64."""
    start = (seed + first) % (1 << 64)
    with np.errstate(over="ignore"):
        x = np.arange(count, dtype=np.uint64) + np.uint64(start)
        x = x + _GAMMA
        x = (x ^ (x >> np.uint64(30))) * _MUL1
        x = (x ^ (x >> np.uint64(27))) * _MUL2
        return x ^ (x >> np.uint64(31))


def stream(seed: int, begin: int, count: int) -> NDArray[np.uint8]:
    """Bytes of a group's canary, little endian: `count` from `begin` on."""
    first, last = begin // 8, (begin + count + 7) // 8
    return words(seed, first, last - first).astype("<u8").view(np.uint8)[begin - first * 8 :][:count]


def _block_0(view: Any, num_blocks: int) -> Any:
    """The rows of a layer's `[B, H, N, C]` that are block 0, as bytes: one, or one per kernel block."""
    import torch

    return view[: view.shape[0] // num_blocks].view(torch.uint8)


def _pages(views: Sequence[Any], num_blocks: int, seed: int) -> Any:
    """(block 0 of a layer, its canary in the same shape) for every layer of a group."""
    begin = 0
    for view in views:
        block = _block_0(view, num_blocks)
        parts, heads, states, content = block.shape
        count = parts * heads * states * content
        page = stream(seed, begin, count).reshape(heads, parts, states, content)
        begin += count
        yield block, np.ascontiguousarray(page.transpose(1, 0, 2, 3))


def write(views: Sequence[Any], num_blocks: int, seed: int) -> None:
    """Fills block 0 of the `[B, H, N, C]` tensors of one group's layers, in the order of registration."""
    import torch

    # A tensor that was made in inference mode can be written in inference mode only, others anywhere.
    with torch.inference_mode():
        for block, page in _pages(views, num_blocks, seed):
            block.copy_(torch.from_numpy(page))


def clear(views: Sequence[Any], num_blocks: int) -> None:
    """Makes block 0 all zeros again."""
    import torch

    with torch.inference_mode():
        for view in views:
            _block_0(view, num_blocks).zero_()


def intact(views: Sequence[Any], num_blocks: int, seed: int) -> bool:
    """Whether block 0 still holds the canary, read with the engine's own indexing."""
    return all(
        np.array_equal(block.cpu().contiguous().numpy(), page)
        for block, page in _pages(views, num_blocks, seed)
    )
