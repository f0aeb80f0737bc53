"""The part of the CUDA driver's interface that the check needs, through ctypes."""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_ulonglong, c_void_p
from typing import Any

Address = c_ulonglong
Handle = c_void_p

NO_DEVICE, NOT_READY = 100, 600
DISABLE_TIMING, INTERPROCESS = 2, 4
NON_BLOCKING = 1
SOURCE_ORDER_STREAM, SOURCE_ORDER_ANY = 1, 3


class Location(ctypes.Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class AllocationProp(ctypes.Structure):
    _fields_ = [
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("win32", c_void_p),
        ("compression", c_ubyte),
        ("rdma", c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", c_ubyte * 4),
    ]


class AccessDesc(ctypes.Structure):
    _fields_ = [("location", Location), ("flags", c_int)]


class MemcpyAttributes(ctypes.Structure):
    _fields_ = [("order", c_int), ("source", Location), ("destination", Location), ("flags", c_uint)]


class IpcHandle(ctypes.Structure):
    """Of memory or of an event."""

    _fields_ = [("reserved", c_ubyte * 64)]


PINNED, POSIX_FD, ON_DEVICE, READ_WRITE = 1, 1, 1, 3
FABRIC = 8

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetUuid_v2": (c_void_p, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(Handle), c_int),
    "cuCtxSetCurrent": (Handle,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(Address), c_size_t),
    "cuMemFree_v2": (Address,),
    "cuMemGetAddressRange_v2": (POINTER(Address), POINTER(c_size_t), Address),
    "cuMemsetD8Async": (Address, c_ubyte, c_size_t, Handle),
    "cuMemcpyHtoD_v2": (Address, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, Address, c_size_t),
    "cuMemcpyHtoDAsync_v2": (Address, c_void_p, c_size_t, Handle),
    "cuMemcpyDtoHAsync_v2": (c_void_p, Address, c_size_t, Handle),
    "cuStreamCreate": (POINTER(Handle), c_uint),
    "cuStreamDestroy_v2": (Handle,),
    "cuStreamSynchronize": (Handle,),
    "cuStreamQuery": (Handle,),
    "cuStreamWaitEvent": (Handle, Handle, c_uint),
    "cuEventCreate": (POINTER(Handle), c_uint),
    "cuEventRecord": (Handle, Handle),
    "cuEventQuery": (Handle,),
    "cuEventDestroy_v2": (Handle,),
    "cuIpcGetEventHandle": (POINTER(IpcHandle), Handle),
    "cuIpcOpenEventHandle": (POINTER(Handle), IpcHandle),
    "cuIpcGetMemHandle": (POINTER(IpcHandle), Address),
    "cuIpcOpenMemHandle_v2": (POINTER(Address), IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (Address,),
    "cuLaunchHostFunc": (Handle, c_void_p, c_void_p),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemGetAllocationGranularity": (POINTER(c_size_t), POINTER(AllocationProp), c_int),
    "cuMemCreate": (POINTER(Address), c_size_t, POINTER(AllocationProp), c_ulonglong),
    "cuMemRelease": (Address,),
    "cuMemAddressReserve": (POINTER(Address), c_size_t, c_size_t, Address, c_ulonglong),
    "cuMemAddressFree": (Address, c_size_t),
    "cuMemMap": (Address, c_size_t, c_size_t, Address, c_ulonglong),
    "cuMemUnmap": (Address, c_size_t),
    "cuMemSetAccess": (Address, c_size_t, POINTER(AccessDesc), c_size_t),
    "cuMemExportToShareableHandle": (c_void_p, Address, c_int, c_ulonglong),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetProcAddress_v2": (c_char_p, POINTER(c_void_p), c_int, c_ulonglong, POINTER(c_int)),
}
BATCH_12_8 = (
    POINTER(Address),
    POINTER(Address),
    POINTER(c_size_t),
    c_size_t,
    POINTER(MemcpyAttributes),
    POINTER(c_size_t),
    c_size_t,
    POINTER(c_size_t),
    Handle,
)


class CudaError(RuntimeError):
    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name} ({code})")
        self.code = code


class Driver:
    """Each function checks the driver's answer: `driver.cuInit(0)`."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")

    def function(self, name: str) -> Any:
        found = getattr(self.library, name)
        found.argtypes, found.restype = SIGNATURES[name], c_int
        return found

    def __getattr__(self, name: str) -> Any:
        if name not in SIGNATURES:
            raise AttributeError(name)
        function = self.function(name)

        def checked(*arguments: Any) -> None:
            self.check(name, function(*arguments))

        # The next time it is found without us.
        setattr(self, name, checked)
        return checked

    def check(self, call: str, code: int) -> None:
        if code:
            raise CudaError(call, code, self.error_name(code))

    def error_name(self, code: int) -> str:
        text = c_char_p()
        self.function("cuGetErrorName")(code, byref(text))
        return (text.value or b"an error without a name").decode()

    def ready(self, call: str, handle: Any) -> bool:
        """cuStreamQuery, cuEventQuery."""
        code: int = self.function(call)(handle)
        if code != NOT_READY:
            self.check(call, code)
        return code != NOT_READY

    def version(self) -> int:
        version = c_int()
        self.cuDriverGetVersion(byref(version))
        return version.value

    def count(self) -> int:
        count = c_int()
        self.cuDeviceGetCount(byref(count))
        return count.value

    def name(self, device: int) -> str:
        text = ctypes.create_string_buffer(256)
        self.cuDeviceGetName(text, 256, device)
        return text.value.decode()

    def uuid(self, device: int) -> str:
        """As nvidia-smi prints it, without its `GPU-`."""
        raw = (c_ubyte * 16)()
        self.cuDeviceGetUuid_v2(raw, device)
        text = bytes(raw).hex()
        return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))

    def batch_copy(self) -> Any:
        """`cuMemcpyBatchAsync` as CUDA 12.8 has it: (to, from, sizes, count, attributes, indices, n, failed, stream)."""
        found, status = c_void_p(), c_int()
        self.cuGetProcAddress_v2(b"cuMemcpyBatchAsync", byref(found), 12080, 0, byref(status))
        if not found.value:
            raise RuntimeError("this driver has no cuMemcpyBatchAsync: expected CUDA 12.8 or newer")
        return ctypes.CFUNCTYPE(c_int, *BATCH_12_8)(found.value)


def find() -> dict[str, Any]:
    """The first device, or why there is none."""
    try:
        driver = Driver()
    except OSError as error:
        return {"reason": f"the driver's library cannot be loaded ({error})"}
    try:
        driver.cuInit(0)
        if not driver.count():
            return {"reason": "the driver sees no device"}
        return {
            "name": driver.name(0),
            "uuid": driver.uuid(0),
            "cuda": driver.version(),
        }
    except CudaError as error:
        return {"reason": str(error)}


def hold() -> None:
    """Keeps a context of the first device until nobody is left at the other end of standard input.

    Without the driver's persistence mode the device is shut down whenever its last process ends, and every first
    process after that waits for seconds.
    """
    driver, context = Driver(), Handle()
    driver.cuInit(0)
    driver.cuDevicePrimaryCtxRetain(byref(context), 0)
    print("held", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1:] == ["hold"]:
        hold()
    else:
        print(json.dumps(find()))
