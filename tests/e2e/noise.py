"""A fake engine that saves noise, validly checksummed, where a real engine will look for its KV.

It uses the shipped client as a worker's shim does, with the real engine's namespace and block hashes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from typing import Any

from chaos.engine import F_ADD_SEALS, SEALS, canary
from e2e.harness import until
from pillion._native import SchedulerClient, WorkerClient

DONE = 1
SEED = 7


class NoisyEngine:
    """One block's worth of random floats, in every block but the first, which has the canary."""

    def __init__(self, socket: Path, identity: dict[str, Any], blocks: int) -> None:
        self.group = identity["group"]
        self.blocks = blocks
        (self.pages,) = self.group["pages"]
        self.layers: list[str] = self.pages["layers"]
        self.page: int = self.pages["page_bytes"]
        self.total = len(self.layers) * blocks * self.page
        self.fd = os.memfd_create("pillion-noise", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, self.total)
        fcntl.fcntl(self.fd, F_ADD_SEALS, SEALS)
        self.memory = mmap.mmap(self.fd, self.total)
        self._fill()
        options: dict[str, Any] = {
            "socket": str(socket),
            "engine_id": f"noise-{os.urandom(4).hex()}",
            "tenant": "default",
            "namespaces": [identity["namespace"]],
        }
        self.scheduler = SchedulerClient(**options)
        self.worker = WorkerClient(**options)

    def _put(self, layer: int, block: int, content: bytes) -> None:
        begin = (layer * self.blocks + block) * self.page
        self.memory[begin : begin + self.page] = content

    def _fill(self) -> None:
        # The highest byte 0x3f makes a float32 of about 1: noise, and no infinity.
        floats = bytes(byte if index % 4 != 3 else 0x3F for index, byte in enumerate(os.urandom(self.page)))
        proof = canary(SEED, len(self.layers) * self.page)
        for layer in range(len(self.layers)):
            self._put(layer, 0, proof[layer * self.page : (layer + 1) * self.page])
            for block in range(1, self.blocks):
                self._put(layer, block, floats)

    def register(self) -> None:
        """The real engine's pages, in fewer blocks."""
        own = {"size": self.total, "layer_stride": self.blocks * self.page, "block_stride": self.page}
        pages: Any = {**self.pages, **own}
        self.worker.describe(
            layout="LBHNC",
            num_blocks=self.blocks,
            memory_bytes=self.total,
            rank=0,
            world=1,
            groups=[{"block_tokens": self.group["block_tokens"], "pages": [pages]}],
            memfd=self.fd,
        )
        self.worker.check_canary(0, SEED)
        self.worker.register()
        until(
            lambda: self.scheduler.ready() and self.worker.ready(),
            lambda: f"attached: {self.scheduler.status()}; {self.worker.status()}",
        )

    def save(self, hashes: list[bytes]) -> None:
        spaces = self.scheduler.namespace_ids()
        assert spaces is not None
        blocks = list(range(1, len(hashes) + 1))
        self.worker.submit_save(
            os.urandom(16), spaces, [(0, b"", len(blocks))], b"".join(hashes), blocks, 10_000
        )
        events = until(self.worker.poll, lambda: "the save ends")
        assert events[0][1:] == (DONE, True, len(hashes)), events

    def close(self) -> None:
        self.scheduler.close()
        self.worker.close()
        self.memory.close()
        os.close(self.fd)


def save(socket: Path, identity: dict[str, Any], hashes: list[bytes]) -> None:
    """Saves noise as the KV of these blocks, which are a prompt's from its beginning."""
    engine = NoisyEngine(socket, identity, len(hashes) + 1)
    try:
        engine.register()
        engine.save(hashes)
    finally:
        engine.close()
