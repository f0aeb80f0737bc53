"""vLLM's whole KV cache in one sealed memfd, which the sidecar maps instead of copying through the kernel.

vLLM allocates its KV cache by exactly one `torch.zeros(nbytes, dtype=torch.int8, device=…)` inside the
context that the connector returns from `get_mem_pool_context` (0.31 and later). The mode below answers that
call with a tensor over a memfd. Where anything is not as expected, vLLM gets its own memory and the sidecar
falls back to `process_vm_readv`.
"""

import fcntl
import logging
import mmap
import os
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pillion.vllm.log import logger

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class KvMemfd:
    """An anonymous file of `nbytes`, mapped here and sealed against any change of its size.

    The seals make it safe for both sides: neither can raise SIGBUS in the other by truncating. The mapping
    lives as long as a tensor over it does.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.fd = os.memfd_create("pillion-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            mapping = mmap.mmap(self.fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(self.fd)
            raise
        self.tensor: torch.Tensor = torch.frombuffer(mapping, dtype=torch.int8)
        self.address: int = self.tensor.data_ptr()

    def close(self) -> None:
        """Closes the descriptor; the mapping stays as long as the engine uses it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class KvMemfdMode(TorchFunctionMode):
    """Puts the one allocation of `nbytes` int8 zeros on the CPU into a memfd, and touches no other call."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.nbytes = nbytes
        self.memfd: KvMemfd | None = None
        self.asked = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and self._is_kv_cache(args, kwargs):
            self.asked += 1
            if self.asked == 1 and (tensor := self._allocate()) is not None:
                return tensor
        return func(*args, **kwargs)

    def _is_kv_cache(self, args: Any, kwargs: Any) -> bool:
        size = args[0] if len(args) == 1 else kwargs.get("size")
        if isinstance(size, list | tuple) and len(size) == 1:
            size = size[0]
        device = torch.device(kwargs.get("device") or "cpu")
        return bool(size == self.nbytes and kwargs.get("dtype") == torch.int8 and device.type == "cpu")

    def _allocate(self) -> torch.Tensor | None:
        try:
            self.memfd = KvMemfd(self.nbytes)
        except OSError as error:
            logger.log(
                logging.WARNING,
                "pillion: no memfd of %d bytes for the KV cache (%s): process_vm is used",
                self.nbytes,
                error,
            )
            return None
        return self.memfd.tensor

    def taken(self) -> "KvMemfd | None":
        """The memfd, if the KV cache and nothing else went into it."""
        return self.memfd if self.asked == 1 else None
