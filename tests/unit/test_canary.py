"""The canary's words, and that they are written with the engine's own indexing."""

import numpy as np
import torch

from pillion.vllm import canary
from unit.vllm_harness import make_kv_config, make_tensors

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


def test_any_part_of_the_stream_is_the_stream() -> None:
    whole = canary.words(9, 0, 100).astype("<u8").view(np.uint8)
    for begin in range(20):
        for count in range(20):
            assert np.array_equal(canary.stream(9, begin, count), whole[begin:][:count])


def test_block_0_holds_the_stream_in_logical_order_and_nothing_else_changes() -> None:
    views = list(make_tensors(make_kv_config(4)).values())
    canary.write(views, 4, 77)
    logical = np.stack([view[0].contiguous().view(torch.uint8).numpy() for view in views])
    assert np.array_equal(logical.reshape(-1).view("<u8"), canary.words(77, 0, logical.size // 8))
    assert all(bool((view[1:] == 0).all()) for view in views)
    assert canary.intact(views, 4, 77) and not canary.intact(views, 4, 78)
    canary.clear(views, 4)
    assert not any(view.any() for view in views)


def test_a_token_major_layout_is_written_by_its_own_indexing() -> None:
    """[B, N, H, C] memory seen as [B, H, N, C]: the canary follows the view, not the memory."""
    memory = torch.zeros(3, 4, 2, 8)  # B, N, H, C
    view = memory.permute(0, 2, 1, 3)
    canary.write([view], 3, 3)
    wanted = torch.from_numpy(canary.stream(3, 0, 2 * 4 * 8 * 4).view(np.float32).reshape(2, 4, 8).copy())
    assert torch.equal(view[0].contiguous().view(torch.int32), wanted.view(torch.int32))
    assert canary.intact([view], 3, 3)


def test_kernel_blocks_of_a_block_are_parts_of_one_page() -> None:
    """Two heads, four states in two kernel blocks: a head's states follow each other in the stream."""
    view = torch.zeros(6, 2, 2, 8, dtype=torch.uint8)
    canary.write([view], 3, 5)
    page = torch.from_numpy(canary.stream(5, 0, 64).reshape(2, 4, 8).copy())
    assert torch.equal(view[0], page[:, :2]) and torch.equal(view[1], page[:, 2:])
    assert not view[2:].any() and canary.intact([view], 3, 5)


def test_pages_of_different_sizes_follow_each_other() -> None:
    small, large = torch.zeros(2, 1, 1, 13, dtype=torch.int8), torch.zeros(2, 2, 3, 5, dtype=torch.uint8)
    canary.write([small, large], 2, 8)
    assert np.array_equal(small[0].view(torch.uint8).numpy().reshape(-1), canary.stream(8, 0, 13))
    assert np.array_equal(large[0].numpy().reshape(-1), canary.stream(8, 13, 30))


def test_other_element_types() -> None:
    for dtype in (torch.bfloat16, torch.uint8, torch.float16, torch.int8):
        cache = torch.zeros(2, 2, 4, 16, dtype=dtype)
        canary.write([cache], 2, 1)
        assert canary.intact([cache], 2, 1)
