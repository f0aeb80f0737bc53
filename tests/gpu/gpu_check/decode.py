"""A toy decode step as a captured CUDA graph: the matrix products of a Llama-8B, without attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from gpu_check.device import TorchDevice


class Decode:
    """With the sizes given here a step reads 14 GB of weights: about 4 ms on an H200."""

    def __init__(
        self, device: TorchDevice, layers: int = 32, hidden: int = 4096, width: int = 14336, batch: int = 32
    ) -> None:
        self.torch, self.stream = device.torch, device.torch_stream
        torch = self.torch
        generator = torch.Generator(device="cuda").manual_seed(1)

        def weight(rows: int, columns: int) -> Any:
            made = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
            return made.normal_(0, rows**-0.5, generator=generator)

        self.weights = [
            (
                weight(hidden, hidden + hidden // 2),
                weight(hidden, hidden),
                weight(hidden, 2 * width),
                weight(width, hidden),
            )
            for _ in range(layers)
        ]
        self.hidden, self.width = hidden, width
        self.input = torch.empty(batch, hidden, dtype=torch.bfloat16, device="cuda").normal_(
            generator=generator
        )
        for _ in range(3):
            self._forward()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self._forward()
        self.event = torch.cuda.Event()
        self.replay()
        self.stream.synchronize()

    def _forward(self) -> Any:
        torch = self.torch
        x = self.input
        for qkv, out, up, down in self.weights:
            x = x + (torch.nn.functional.rms_norm(x, (self.hidden,)) @ qkv)[:, : self.hidden] @ out
            gate, value = (torch.nn.functional.rms_norm(x, (self.hidden,)) @ up).split(self.width, dim=1)
            x = x + (torch.nn.functional.silu(gate) * value) @ down
        return x

    def replay(self) -> None:
        self.graph.replay()
        self.event.record()

    def idle(self) -> bool:
        return bool(self.event.query())

    def replayed(self) -> Any:
        """The result of one step, computed now."""
        self.replay()
        self.stream.synchronize()
        return self.output.clone()

    def same(self, result: Any) -> bool:
        return bool(self.torch.equal(self.replayed(), result))

    def steps(self, hook: Callable[[], None], seconds: float) -> list[float]:
        """Milliseconds of each step. `hook` is called in each, as an engine calls its connector."""
        took, end = [], time.perf_counter() + seconds
        while (begun := time.perf_counter()) < end:
            self.replay()
            hook()
            self.event.synchronize()
            took.append((time.perf_counter() - begun) * 1000)
        return took
