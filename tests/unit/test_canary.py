"""The canary's words, and that they are written with the engine's own indexing."""

import numpy as np
import torch

from pillion.vllm import canary
from unit.vllm_harness import LAYERS, make_kv_config, make_tensors

MASK = (1 << 64) - 1


def splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_words_are_splitmix64_of_the_count() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the reference vector of Vigna's splitmix64
    for seed in (0, 1, 0xDEADBEEF, MASK, MASK - 3):
        assert canary.words(seed, 0, 9).tolist() == [splitmix64((seed + i) & MASK) for i in range(9)]
    assert canary.words(5, 3, 4).tolist() == canary.words(5, 0, 7).tolist()[3:]


def test_pages_are_slices_of_one_stream_whatever_their_size() -> None:
    for page_bytes in (64, 100, 7):
        stream = np.concatenate([canary.page(9, index, page_bytes) for index in range(5)])
        whole = canary.words(9, 0, (5 * page_bytes + 7) // 8).astype("<u8").view(np.uint8)[: 5 * page_bytes]
        assert np.array_equal(stream, whole)


def test_block_0_holds_the_stream_in_logical_order_and_nothing_else_changes() -> None:
    caches = make_tensors(make_kv_config(4))
    canary.write(caches, LAYERS, 77)
    logical = np.stack([caches[name][0].contiguous().view(torch.uint8).numpy() for name in LAYERS])
    assert np.array_equal(logical.reshape(-1).view("<u8"), canary.words(77, 0, logical.size // 8))
    assert all(bool((caches[name][1:] == 0).all()) for name in LAYERS)
    assert canary.intact(caches, LAYERS, 77) and not canary.intact(caches, LAYERS, 78)


def test_a_token_major_layout_is_written_by_its_own_indexing() -> None:
    """[B, N, H, C] memory seen as [B, H, N, C]: the canary follows the view, not the memory."""
    memory = torch.zeros(3, 4, 2, 8)  # B, N, H, C
    view = memory.permute(0, 2, 1, 3)
    canary.write({"layer": view}, ["layer"], 3)
    stream = torch.from_numpy(canary.page(3, 0, 2 * 4 * 8 * 4).view(np.float32).reshape(2, 4, 8).copy())
    assert torch.equal(view[0].contiguous().view(torch.int32), stream.view(torch.int32))
    assert canary.intact({"layer": view}, ["layer"], 3)


def test_other_element_types() -> None:
    for dtype in (torch.bfloat16, torch.uint8, torch.float16):
        cache = torch.zeros(2, 2, 4, 16, dtype=dtype)
        canary.write({"layer": cache}, ["layer"], 1)
        assert canary.intact({"layer": cache}, ["layer"], 1)
