"""The KV cache in a sealed memfd: the one allocation, and only that."""

import fcntl
import mmap
import os

import pytest
import torch

from pillion.vllm.memory import KvMemfdMode

BYTES = 3 * mmap.PAGESIZE


def test_the_kv_cache_goes_into_a_sealed_memfd() -> None:
    mode = KvMemfdMode(BYTES)
    with mode:
        buffer = torch.zeros(BYTES, dtype=torch.int8, device=torch.device("cpu"))
    memfd = mode.taken()
    assert memfd is not None and buffer.untyped_storage().data_ptr() == memfd.address
    assert memfd.address % mmap.PAGESIZE == 0 and not bool(buffer.any())
    buffer[5] = 42
    assert os.pread(memfd.fd, 1, 5) == b"\x2a"
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert fcntl.fcntl(memfd.fd, fcntl.F_GET_SEALS) == wanted
    with pytest.raises(OSError):
        os.ftruncate(memfd.fd, 0)
    memfd.close()
    buffer[6] = 1  # the mapping outlives the descriptor
    memfd.close()


def test_other_allocations_are_left_alone() -> None:
    mode = KvMemfdMode(BYTES)
    with mode:
        torch.zeros(BYTES, dtype=torch.uint8)
        torch.zeros(BYTES + 1, dtype=torch.int8)
        torch.zeros(3, mmap.PAGESIZE, dtype=torch.int8)
        torch.ones(BYTES, dtype=torch.int8)
    assert mode.taken() is None and mode.asked == 0


def test_a_second_allocation_of_that_size_makes_it_ambiguous() -> None:
    mode = KvMemfdMode(BYTES)
    with mode:
        first = torch.zeros(BYTES, dtype=torch.int8)
        second = torch.zeros((BYTES,), dtype=torch.int8)
    assert first.data_ptr() != second.data_ptr()
    assert mode.taken() is None


def test_without_memfd_the_engine_gets_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> int:
        raise OSError("no memfd here")

    monkeypatch.setattr(os, "memfd_create", refuse)
    mode = KvMemfdMode(BYTES)
    with mode:
        buffer = torch.zeros(BYTES, dtype=torch.int8)
    assert mode.taken() is None and buffer.numel() == BYTES
