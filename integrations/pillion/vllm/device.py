"""The device that an engine computes on: its name, and all calls into CUDA that the shim makes itself.

Both halves name the device, each in its own process, and find the sidecar by that name. The scheduler's half
must not make a CUDA context (hundreds of MiB on the engine's GPU), so the name comes from NVML through vLLM's
platform; the worker's half then compares it with where the KV cache really lies.
"""

import os
import re
from typing import Any

CPU = "cpu0"

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Unnamed(Exception):
    """The device cannot be named, so that no sidecar can be found; the text says why."""


class Cuda:
    """Torch's and NVML's part of it; one object, so that tests can replace it."""

    def stream(self) -> int:
        """The handle (`CUstream`) of the stream on which this thread queues work now; 0: the legacy one."""
        import torch

        return int(torch.cuda.current_stream().cuda_stream)

    def synchronize(self, device: Any) -> None:
        """Waits for everything that is queued on `device`, on whatever stream."""
        import torch

        torch.cuda.synchronize(device)

    def uuid(self, physical: int) -> str | bytes:
        """NVML's name of the GPU with this NVML index."""
        from vllm.utils.import_utils import import_pynvml

        nvml = import_pynvml()
        nvml.nvmlInit()
        try:
            uuid: str | bytes = nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(physical))
            return uuid
        finally:
            nvml.nvmlShutdown()


CUDA = Cuda()


def platform() -> Any:
    """vLLM's platform; one function, so that tests can replace it."""
    from vllm.platforms import current_platform

    return current_platform


def on_cpu() -> bool:
    """Whether the engine computes on the CPU."""
    return bool(platform().is_cpu())


def on_cuda() -> bool:
    """Whether the engine computes on an NVIDIA GPU; ROCm, which torch calls "cuda" too, is none."""
    return bool(platform().is_cuda())


def name(vllm_config: Any, rank: int = 0) -> str:
    """`cpu<rank>`, or `gpu-<uuid>` of the GPU that the worker of this tensor-parallel rank uses.

    Raises `Unnamed` where that cannot be told here.
    """
    if not on_cuda():
        return f"cpu{rank}"
    parallel = vllm_config.parallel_config
    index = logical_index(parallel) + rank
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if "MIG-" in visible:
        # vLLM asks NVML for the index of the MIG instance and takes it for one of a GPU.
        raise Unnamed(f"CUDA_VISIBLE_DEVICES={visible}: MIG instances are not served yet")
    assigned = parallel.assigned_physical_gpu_ids
    try:
        # vLLM sets the mapping of `--device-ids` in its workers' processes only, so here it is applied by hand.
        # Without one the platform maps through CUDA_VISIBLE_DEVICES, which all of an engine's processes share.
        uuid = platform().get_device_uuid(index) if assigned is None else CUDA.uuid(assigned[index])
    except Exception as error:
        raise Unnamed(
            f"NVML does not name GPU {index if assigned is None else assigned} "
            f"(CUDA_VISIBLE_DEVICES={visible!r}): {type(error).__name__}: {error}"
        ) from error
    return "gpu-" + normal(uuid)


def logical_index(parallel: Any) -> int:
    """The worker's GPU among those of this engine's configuration, as `Worker.init_device` counts it.

    That is `ParallelConfig.get_local_gpu_index(local_rank)` (0.33; before, the same lines are in `init_device`) for the executors that start their worker on this machine with `local_rank` 0: `uni` and `mp`.
    Each data-parallel replica is an engine core with a configuration of its own, in which
    `EngineCoreProc.run_engine_core` has set `data_parallel_rank_local`; replicas that Ray starts get one
    assigned GPU each and count from 0.
    """
    if getattr(parallel, "use_ray", False) or parallel.distributed_executor_backend == "external_launcher":
        raise Unnamed(
            f"the GPU of a worker that {parallel.distributed_executor_backend} starts is not known here: "
            "expected the executor uni or mp"
        )
    if parallel.data_parallel_backend == "ray" or parallel.nnodes_within_dp != 1:
        return 0
    rank = parallel.data_parallel_rank_local
    if rank is None:
        rank = parallel.data_parallel_index
    return int(rank * parallel.world_size)


def normal(uuid: str | bytes) -> str:
    """A CUDA UUID in lower case and without NVML's `GPU-`."""
    text = uuid.decode(errors="replace") if isinstance(uuid, bytes) else str(uuid)
    short = text.strip("\0").removeprefix("GPU-").lower()
    if _UUID.fullmatch(short) is None:
        raise Unnamed(f"expected the UUID of a GPU, NVML says {text!r}")
    return short
