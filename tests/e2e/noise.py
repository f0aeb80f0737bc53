"""A fake engine that saves noise, validly checksummed, where a real engine will look for its KV.

It uses the shipped client as a worker's shim does, with the real engine's namespace and block hashes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from pathlib import Path

from chaos.engine import F_ADD_SEALS, SEALS, canary
from pillion._native import SchedulerClient, WorkerClient

LAYERS, HEADS, CONTENT = 4, 2, 512  # the small model's: head size 64, K and V, float32
DONE = 1


def save(socket: Path, namespace: dict[str, str], hashes: list[bytes], block_tokens: int) -> None:
    """Saves random floats as the KV of these blocks, which are a prompt's from its beginning."""
    page = HEADS * block_tokens * CONTENT
    blocks = len(hashes) + 1
    total = LAYERS * blocks * page
    fd = os.memfd_create("pillion-noise", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, total)
    fcntl.fcntl(fd, F_ADD_SEALS, SEALS)
    memory = mmap.mmap(fd, total)
    floats = bytes(byte if index % 4 != 3 else 0x3F for index, byte in enumerate(os.urandom(page)))
    for layer in range(LAYERS):
        for block in range(1, blocks):
            begin = (layer * blocks + block) * page
            memory[begin : begin + page] = floats
    seed = 7
    proof = canary(seed, LAYERS * page)
    for layer in range(LAYERS):
        begin = layer * blocks * page
        memory[begin : begin + page] = proof[layer * page : (layer + 1) * page]
    engine = f"noise-{os.urandom(4).hex()}"
    scheduler = SchedulerClient(socket=str(socket), engine_id=engine, tenant="default", namespace=namespace)
    worker = WorkerClient(socket=str(socket), engine_id=engine, tenant="default", namespace=namespace)
    names = [f"layers.{index}" for index in range(LAYERS)]
    try:
        worker.register(
            layout="LBHNC",
            num_blocks=blocks,
            block_tokens=block_tokens,
            dtype="torch.float32",
            kind="FullAttentionSpec",
            heads=HEADS,
            states=block_tokens,
            content_bytes=CONTENT,
            page_bytes=page,
            tensors=[(total, 0, blocks * page, page, names)],
            memory_bytes=total,
            memfd=fd,
            canary_seed=seed,
        )
        deadline = time.monotonic() + 20
        while not (scheduler.ready() and worker.ready()):
            assert time.monotonic() < deadline, f"{scheduler.status()}; {worker.status()}"
            time.sleep(0.01)
        space = scheduler.namespace_id()
        assert space is not None
        worker.submit_save(os.urandom(16), space, b"", b"".join(hashes), list(range(1, blocks)), 10_000)
        while not (events := worker.poll()):
            assert time.monotonic() < deadline, "expected the save to end"
            time.sleep(0.01)
        assert events[0][1:] == (DONE, True, len(hashes)), events
    finally:
        scheduler.close()
        worker.close()
        memory.close()
        os.close(fd)
