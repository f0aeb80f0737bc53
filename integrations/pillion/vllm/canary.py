"""The layout canary: words that the shim writes into block 0 with the engine's own indexing.

The sidecar reads block 0 by the layout that was registered and compares; a mismatch refuses the
registration (I1, I10), whatever else looked right.

Block 0 is vLLM's null block: the block pool never hands it out. On CPU nothing writes it after the canary:
slot mappings hold slots of blocks that requests own, dummy and warm-up runs use slot -1 (which the kernels
skip), and without CUDA graphs there is no padding. So the canary stays readable for the engine's whole life,
and a sidecar that appears hours after the engine can still check it.

On a GPU it is there only while the engine starts or wakes up. Warm-up and graph capture write block 0 (vLLM's
`redirect_writes_to_null_block`), and padded block tables point at it: kernels load from it what they then mask,
and random words are NaN often enough that nobody should have to trust every kernel's masks. So the client is told
(`canary_over`; what was compared until then is remembered, not read again), and it is zeroed, as vLLM allocated it.
"""

from collections.abc import Mapping, Sequence
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


def page(seed: int, index: int, page_bytes: int) -> NDArray[np.uint8]:
    """The canary bytes of the page of layer `index`: a slice of one stream over all layers, little endian."""
    begin = index * page_bytes
    first = begin // 8
    last = (begin + page_bytes + 7) // 8
    stream = words(seed, first, last - first).astype("<u8").view(np.uint8)
    return stream[begin - first * 8 :][:page_bytes]


def write(caches: Mapping[str, Any], layers: Sequence[str], seed: int) -> None:
    """Fills block 0 of every layer's `[B, H, N, C]` tensor, in the order of `layers`."""
    import torch

    # A tensor that was made in inference mode can be written in inference mode only, others anywhere.
    with torch.inference_mode():
        for index, name in enumerate(layers):
            block = caches[name][0].view(torch.uint8)
            heads, states, content = block.shape
            values = page(seed, index, heads * states * content).reshape(heads, states, content)
            block.copy_(torch.from_numpy(np.ascontiguousarray(values)))


def clear(caches: Mapping[str, Any], layers: Sequence[str]) -> None:
    """Makes block 0 all zeros again."""
    import torch

    with torch.inference_mode():
        for name in layers:
            caches[name][0].zero_()


def intact(caches: Mapping[str, Any], layers: Sequence[str], seed: int) -> bool:
    """Whether block 0 still holds the canary, read with the engine's own indexing."""
    import torch

    for index, name in enumerate(layers):
        block = caches[name][0].view(torch.uint8).cpu().contiguous().numpy().reshape(-1)
        if not np.array_equal(block, page(seed, index, block.size)):
            return False
    return True
