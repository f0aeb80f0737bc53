"""A machine with four GPUs, as far as the shim asks: vLLM's platform, and `pillion.vllm.device.Cuda`, in one."""

from __future__ import annotations

from typing import Any

from unit.fake_native import FakeNative


def uuid(index: int) -> str:
    """The UUID of NVML's GPU `index`, as CUDA prints it."""
    return f"1b4e28ba-2fa1-11d2-883f-b9a761bde3f{index}"


class FakeGpu:
    """Knobs are attributes; `synchronize` and the stream's uses go into the native fake's log."""

    device_name = "cuda"

    def __init__(self, native: FakeNative) -> None:
        self.native = native
        self.kind = "cuda"
        self.current = 0x5EED  # the current stream's handle
        self.asked: list[tuple[str, int]] = []
        self.answer: Any = None  # instead of a GPU's UUID
        self.error: BaseException | None = None

    @staticmethod
    def name(index: int) -> str:
        return f"gpu-{uuid(index)}"

    # ---- vLLM's platform

    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    def get_device_uuid(self, device_id: int = 0) -> Any:
        self.asked.append(("platform", device_id))
        if self.error is not None:
            raise self.error
        return self.answer or f"GPU-{uuid(device_id).upper()}"

    # ---- ours

    def stream(self) -> int:
        return self.current

    def synchronize(self, device: Any) -> None:
        self.native.log.append("synchronize")

    def uuid(self, physical: int) -> bytes:
        self.asked.append(("nvml", physical))
        return f"GPU-{uuid(physical)}".encode()
