"""Device memory and work on it, as an engine has them: with the driver alone, or with torch."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from ctypes import byref, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_check import cuda
from gpu_check.cuda import Address, CudaError, Driver, Handle

MIB = 1 << 20
POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE: takes all pages at once."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass
class Allocation:
    """`free` can be called once."""

    address: int
    bytes: int
    free: Callable[[], None]


class HostBuffer:
    """Shared memory that the device can copy from and to without a detour: pinned, if the driver agrees."""

    def __init__(self, driver: Driver, size: int) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memfd = os.memfd_create("gpu-check", os.MFD_CLOEXEC)
        os.ftruncate(memfd, self.size)
        self.map = mmap.mmap(memfd, self.size, flags=mmap.MAP_SHARED)
        os.close(memfd)
        with suppress(OSError):
            self.map.madvise(POPULATE_WRITE)
        self.array: Bytes = np.frombuffer(self.map, dtype=np.uint8)
        self.address = int(self.array.ctypes.data)
        self.driver = driver
        driver.cuMemHostRegister_v2(self.address, self.size, 0)

    def close(self) -> None:
        self.driver.cuMemHostUnregister(self.address)
        del self.array
        self.map.close()


class Device(ABC):
    """What an engine does with its device. Everything but `copy_out` and `wait` is only queued."""

    kind = ""
    stream = 0
    """The stream that the engine computes on."""
    mask = 0
    """What `compute` does to bytes that were copied in: it flips these bits."""

    @abstractmethod
    def allocate(self, size: int, way: str, offset: int = 0) -> Allocation:
        """KV memory that can be exported: `ipc` or `vmm`. It begins at `offset` inside the allocation."""

    @abstractmethod
    def copy_in(self, address: int, host: int, size: int, stream: int | None = None) -> None: ...

    @abstractmethod
    def copy_out(self, host: int, address: int, size: int, stream: int | None = None) -> None: ...

    @abstractmethod
    def fill(self, address: int, value: int, size: int) -> None: ...

    @abstractmethod
    def compute(self, address: int, size: int) -> None:
        """What a kernel does, where there are kernels."""

    @abstractmethod
    def delay(self, milliseconds: float) -> None:
        """The stream stands still for so long."""

    @abstractmethod
    def wait(self) -> None:
        """Until the stream has done all that was queued."""

    @abstractmethod
    def free_bytes(self) -> int: ...


class DriverDevice(Device):
    """The driver alone, real or fake: no kernels, no torch."""

    kind = "driver"

    def __init__(self) -> None:
        self.driver = Driver()
        self.driver.cuInit(0)
        ordinal = c_int()
        self.driver.cuDeviceGet(byref(ordinal), 0)
        self.ordinal = ordinal.value
        self.context = Handle()
        self.driver.cuDevicePrimaryCtxRetain(byref(self.context), self.ordinal)
        self.driver.cuCtxSetCurrent(self.context)
        self.stream = self.new_stream()
        # Its argument is the number of microseconds, in the place of a pointer: no Python runs in the
        # driver's thread, so nothing waits for the interpreter's lock.
        self.usleep = ctypes.cast(ctypes.CDLL(None).usleep, c_void_p)

    def new_stream(self) -> int:
        stream = Handle()
        self.driver.cuStreamCreate(byref(stream), cuda.NON_BLOCKING)
        return int(stream.value or 0)

    def allocate(self, size: int, way: str, offset: int = 0) -> Allocation:
        return self._map(size, offset) if way == "vmm" else self._plain(size, offset)

    def _plain(self, size: int, offset: int) -> Allocation:
        address = Address()
        self.driver.cuMemAlloc_v2(byref(address), size + offset)
        return Allocation(address.value + offset, size, lambda: self.driver.cuMemFree_v2(address))

    def _map(self, size: int, offset: int) -> Allocation:
        """As sleep-mode allocators have it: physical memory with a handle, mapped at a reserved address."""
        prop = cuda.AllocationProp(cuda.PINNED, cuda.POSIX_FD, cuda.Location(cuda.ON_DEVICE, self.ordinal))
        step = c_size_t()
        self.driver.cuMemGetAllocationGranularity(byref(step), byref(prop), 0)
        whole = -(-(size + offset) // step.value) * step.value
        address, handle = Address(), Address()
        self.driver.cuMemAddressReserve(byref(address), whole, 0, 0, 0)
        self.driver.cuMemCreate(byref(handle), whole, byref(prop), 0)
        self.driver.cuMemMap(address, whole, 0, handle, 0)
        access = cuda.AccessDesc(prop.location, cuda.READ_WRITE)
        self.driver.cuMemSetAccess(address, whole, byref(access), 1)

        def free() -> None:
            self.driver.cuMemUnmap(address, whole)
            self.driver.cuMemRelease(handle)
            self.driver.cuMemAddressFree(address, whole)

        return Allocation(address.value + offset, size, free)

    def copy_in(self, address: int, host: int, size: int, stream: int | None = None) -> None:
        self.driver.cuMemcpyHtoDAsync_v2(address, host, size, self.stream if stream is None else stream)

    def copy_out(self, host: int, address: int, size: int, stream: int | None = None) -> None:
        self.driver.cuMemcpyDtoHAsync_v2(host, address, size, self.stream if stream is None else stream)

    def fill(self, address: int, value: int, size: int) -> None:
        self.driver.cuMemsetD8Async(address, value, size, self.stream)

    def compute(self, address: int, size: int) -> None:
        pass

    def delay(self, milliseconds: float) -> None:
        self.driver.cuLaunchHostFunc(self.stream, self.usleep, int(milliseconds * 1000))

    def wait(self) -> None:
        self.driver.cuStreamSynchronize(self.stream)

    def free_bytes(self) -> int:
        free, total = c_size_t(), c_size_t()
        self.driver.cuMemGetInfo_v2(byref(free), byref(total))
        return free.value

    # ---- for measurements --------------------------------------------------

    def event(self) -> Handle:
        event = Handle()
        self.driver.cuEventCreate(byref(event), cuda.DISABLE_TIMING)
        return event

    def timed(self, *queue: Callable[[], None], streams: tuple[int, ...]) -> float:
        """Seconds from queueing all of it to its end."""
        begun = time.perf_counter()
        for call in queue:
            call()
        for stream in streams:
            self.driver.cuStreamSynchronize(stream)
        return time.perf_counter() - begun

    def batch(self, to: Any, source: Any, sizes: Any, stream: int) -> None:
        """One call of the batch API. All are ctypes arrays of one length."""
        attributes = cuda.MemcpyAttributes(cuda.SOURCE_ORDER_STREAM)
        first, failed = c_size_t(0), c_size_t(0)
        code = self._batch(
            to, source, sizes, len(sizes), byref(attributes), byref(first), 1, byref(failed), stream
        )
        if code:
            raise CudaError("cuMemcpyBatchAsync", code, self.driver.error_name(code))

    @property
    def _batch(self) -> Any:
        if not hasattr(self, "_batch_function"):
            self._batch_function = self.driver.batch_copy()
        return self._batch_function


class TorchDevice(DriverDevice):
    """torch's memory, streams and kernels. Its context is the primary one: the driver's calls see all of it."""

    kind = "torch"
    mask = 0x5A

    def __init__(self) -> None:
        import torch

        self.torch = torch
        torch.cuda.init()
        torch.zeros(1, device="cuda").item()
        super().__init__()
        self.torch_stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.torch_stream)
        self.stream = torch.cuda.current_stream().cuda_stream
        self.tensors: dict[int, Any] = {}
        # `delay` is the driver's here too: torch.cuda._sleep counts the device's clock, which is six times as
        # fast under load as it is when idle.

    def _plain(self, size: int, offset: int) -> Allocation:
        whole = self.torch.zeros(size + offset, dtype=self.torch.int8, device="cuda")
        address = int(whole.data_ptr()) + offset
        self.tensors[address] = whole[offset:]

        def free() -> None:
            nonlocal whole
            del self.tensors[address]
            del whole
            self.torch.cuda.synchronize()
            self.torch.cuda.empty_cache()

        return Allocation(address, size, free)

    def compute(self, address: int, size: int) -> None:
        base, whole = next((at, kv) for at, kv in self.tensors.items() if at <= address < at + kv.numel())
        whole[address - base : address - base + size].bitwise_xor_(self.mask)


def make(kind: str) -> DriverDevice:
    return TorchDevice() if kind == "torch" else DriverDevice()
