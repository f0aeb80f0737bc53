"""What this driver does where its manual is silent: facts for the report. Nothing here can be wrong but ourselves.

Two processes, `exporter` and `importer`, each with the driver alone. A question that fails or is not answered in time
is a fact too.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from ctypes import byref, c_int, c_size_t, c_ubyte, c_void_p
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gpu_check import cuda
from gpu_check.cuda import Address, CudaError, Driver, Handle

if TYPE_CHECKING:
    from gpu_check.world import World

WHOLE_SECONDS = 30
PR_SET_PDEATHSIG = 1
MIB = 1 << 20
SIZES = {"3 MiB": 3 * MIB, "514.5 MiB": 1029 * MIB // 2}

ATTRIBUTES = {
    "CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM": 91,
    "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": 102,
    "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED": 103,
    "GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED": 110,
    "GPU_DIRECT_RDMA_SUPPORTED": 116,
    "IPC_EVENT_SUPPORTED": 125,
    "HANDLE_TYPE_FABRIC_SUPPORTED": 128,
    "HOST_NUMA_ID": 134,
    "ASYNC_ENGINE_COUNT": 40,
}


# ---- in the processes ------------------------------------------------------------


class Process:
    """What a process of the probe can be asked for."""

    def start(self) -> dict[str, float]:
        begun = time.perf_counter()
        self.driver = Driver()
        loaded = time.perf_counter()
        self.driver.cuInit(0)
        initialised = time.perf_counter()
        self.context = Handle()
        self.driver.cuDevicePrimaryCtxRetain(byref(self.context), 0)
        self.driver.cuCtxSetCurrent(self.context)
        ready = time.perf_counter()
        stream = Handle()
        self.driver.cuStreamCreate(byref(stream), cuda.NON_BLOCKING)
        self.stream = stream
        self.memory: dict[str, Address] = {}
        self.usleep = ctypes.cast(ctypes.CDLL(None).usleep, c_void_p)
        return {
            "library": round(loaded - begun, 3),
            "cuInit": round(initialised - loaded, 3),
            "context": round(ready - initialised, 3),
        }

    def code(self, call: str, *arguments: Any) -> str:
        """What the driver answers, as text."""
        return self.named(self.driver.function(call)(*arguments))

    def named(self, code: int) -> str:
        return self.driver.error_name(code).removeprefix("CUDA_") if code else "SUCCESS"

    def attributes(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, number in ATTRIBUTES.items():
            value = c_int()
            answer = self.code("cuDeviceGetAttribute", byref(value), number, 0)
            found[name] = value.value if answer == "SUCCESS" else answer
        return found

    def version(self) -> int:
        return self.driver.version()

    # ---- memory

    def allocate(self, name: str) -> str:
        """The handle."""
        address, handle = Address(), cuda.IpcHandle()
        self.driver.cuMemAlloc_v2(byref(address), SIZES[name])
        self.memory[name] = address
        self.driver.cuIpcGetMemHandle(byref(handle), address)
        return bytes(handle.reserved).hex()

    def range_of(self, name: str) -> str:
        address, base, size = self.memory[name], Address(), c_size_t()
        answer = self.code("cuMemGetAddressRange_v2", byref(base), byref(size), address)
        if answer != "SUCCESS":
            return answer
        return f"starts {address.value - base.value} bytes after the base, {size.value / MIB:g} MiB"

    def take(self, name: str, handle: str) -> str:
        address, begun = Address(), time.perf_counter()
        answer = self.code("cuIpcOpenMemHandle_v2", byref(address), given(handle), 1)
        if answer == "SUCCESS":
            self.memory[name] = address
        return f"{answer} in {time.perf_counter() - begun:.4f} s"

    def let_go(self, name: str) -> str:
        address, begun = self.memory.pop(name), time.perf_counter()
        answer = self.code("cuIpcCloseMemHandle", address)
        return f"{answer} in {time.perf_counter() - begun:.4f} s"

    def export(self, kind: int) -> str:
        """Of physical memory with a handle."""
        prop = cuda.AllocationProp(cuda.PINNED, kind, cuda.Location(cuda.ON_DEVICE, 0))
        step, handle = c_size_t(), Address()
        self.driver.cuMemGetAllocationGranularity(byref(step), byref(prop), 0)
        answer = self.code("cuMemCreate", byref(handle), step.value, byref(prop), 0)
        if answer != "SUCCESS":
            return f"cuMemCreate: {answer}"
        try:
            if kind != cuda.POSIX_FD:
                place = (c_ubyte * 64)()
                return self.code("cuMemExportToShareableHandle", place, handle, kind, 0)
            fd = c_int(-1)
            answer = self.code("cuMemExportToShareableHandle", byref(fd), handle, kind, 0)
            if answer != "SUCCESS":
                return answer
            closes = bool(fcntl.fcntl(fd.value, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)
            target = os.readlink(f"/proc/self/fd/{fd.value}")
            os.close(fd.value)
            return f"SUCCESS, FD_CLOEXEC {'set' if closes else 'not set'}, {target}, granularity {step.value} bytes"
        finally:
            self.driver.cuMemRelease(handle)

    def batches(self) -> dict[str, str]:
        """One piece each, from the host."""
        whole = mmap.mmap(-1, mmap.PAGESIZE)
        view = (c_ubyte * mmap.PAGESIZE).from_buffer(whole)
        host, device = ctypes.addressof(view), Address()
        self.driver.cuMemHostRegister_v2(host, mmap.PAGESIZE, 0)
        self.driver.cuMemAlloc_v2(byref(device), mmap.PAGESIZE)
        copy, found = self.driver.batch_copy(), {}
        for order, name in ((cuda.SOURCE_ORDER_STREAM, "STREAM"), (cuda.SOURCE_ORDER_ANY, "ANY")):
            for flags in (0, 1):
                attributes = cuda.MemcpyAttributes(order)
                attributes.flags = flags
                first, failed = c_size_t(0), c_size_t(0)
                to, source, size = (
                    (Address * 1)(device.value),
                    (Address * 1)(host),
                    (c_size_t * 1)(mmap.PAGESIZE),
                )
                code = copy(
                    to, source, size, 1, byref(attributes), byref(first), 1, byref(failed), self.stream
                )
                ended = self.code("cuStreamSynchronize", self.stream)
                found[f"{name}, flags {flags}"] = f"{self.named(code)}, then the stream: {ended}"
        self.driver.cuMemHostUnregister(host)
        self.driver.cuMemFree_v2(device)
        return found

    # ---- events

    def event(self) -> str:
        """The handle."""
        self.made, handle = Handle(), cuda.IpcHandle()
        self.driver.cuEventCreate(byref(self.made), cuda.DISABLE_TIMING | cuda.INTERPROCESS)
        self.driver.cuIpcGetEventHandle(byref(handle), self.made)
        return bytes(handle.reserved).hex()

    def open_event(self, handle: str) -> str:
        found = Handle()
        answer = self.code("cuIpcOpenEventHandle", byref(found), given(handle))
        if answer != "SUCCESS":
            return answer
        if not hasattr(self, "opened"):
            self.opened = found
            return answer
        return f"{answer}, {'the same' if found.value == self.opened.value else 'another'} event object"

    def open_own_event(self, handle: str) -> str:
        found = Handle()
        answer = self.code("cuIpcOpenEventHandle", byref(found), given(handle))
        if answer != "SUCCESS":
            return answer
        return f"{answer}, {'the same' if found.value == self.made.value else 'another'} event object"

    def record(self, seconds: float) -> str:
        """Behind work that lasts so long."""
        self.driver.cuLaunchHostFunc(self.stream, self.usleep, int(seconds * 1e6))
        self.driver.cuEventRecord(self.made, self.stream)
        return self.code("cuEventQuery", self.made)

    def query(self) -> str:
        return self.code("cuEventQuery", self.opened)

    def watch(self, seconds: float, until: str = "") -> str:
        """Each answer that differs from the one before, with its time; and the longest that a query took."""
        begun = time.perf_counter()
        seen: list[tuple[float, str]] = []
        longest = 0.0
        while True:
            asked = time.perf_counter()
            answer = self.query()
            now = time.perf_counter()
            longest = max(longest, now - asked)
            if not seen or seen[-1][1] != answer:
                seen.append((now - begun, answer))
            if answer == until or now - begun > seconds:
                break
            time.sleep(0.002)
        text = ", ".join(f"{answer} at {at:.3f} s" for at, answer in seen)
        return f"{text}; watched for {now - begun:.3f} s, a query took at most {longest * 1000:.3f} ms"

    def wait_on_stream(self) -> str:
        """Whether a stream that waits for the event of a process that is gone goes on."""
        answer = self.code("cuStreamWaitEvent", self.stream, self.opened, 0)
        begun = time.perf_counter()
        while answer == "SUCCESS" and time.perf_counter() - begun < 1:
            after = self.code("cuStreamQuery", self.stream)
            if after != "ERROR_NOT_READY":
                return f"{answer}; the stream: {after} after {time.perf_counter() - begun:.3f} s"
            time.sleep(0.002)
        return f"{answer}; the stream: still waiting after {time.perf_counter() - begun:.3f} s"


def given(handle: str) -> cuda.IpcHandle:
    return cuda.IpcHandle.from_buffer_copy(bytes.fromhex(handle))


def serve() -> None:
    """One JSON object a line, in and out."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    process = Process()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"value": getattr(process, order["do"])(*order["with"])}
        except CudaError as error:
            answer = {"error": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


# ---- who asks them ----------------------------------------------------------------


class Unanswered(Exception):
    """What came instead of an answer."""


class Asked:
    """A process of the probe, from outside."""

    def __init__(self, deadline: float, log: IO[bytes]) -> None:
        self.deadline = deadline
        self.silent = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpu_check.probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            bufsize=0,
        )
        self.selector = selectors.DefaultSelector()
        assert self.process.stdout
        self.selector.register(self.process.stdout, selectors.EVENT_READ)

    def __call__(self, name: str, *arguments: Any, seconds: float = 5) -> Any:
        if self.silent:
            raise Unanswered(f"not asked: {self.silent}")
        assert self.process.stdin and self.process.stdout
        until = min(self.deadline, time.monotonic() + seconds)
        got = b""
        try:
            self.process.stdin.write(json.dumps({"do": name, "with": arguments}).encode() + b"\n")
            while not got.endswith(b"\n"):
                if not self.selector.select(max(0.0, until - time.monotonic())):
                    self.silent = f"`{name}` did not come back within its time"
                    raise Unanswered(self.silent)
                part = self.process.stdout.read(1 << 16)
                if not part:
                    raise BrokenPipeError
                got += part
        except BrokenPipeError:
            self.silent = f"the process ended in `{name}` ({self.process.wait()})"
            raise Unanswered(self.silent) from None
        answer = json.loads(got)
        if "error" in answer:
            raise Unanswered(answer["error"])
        return answer["value"]

    def kill(self, seconds: float = 5) -> str:
        begun = time.monotonic()
        self.process.kill()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"not gone after {seconds} s"
        return f"gone after {time.monotonic() - begun:.3f} s"

    def close(self) -> None:
        self.selector.close()
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


class Facts:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, name: str, question: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Its answer; None where there was none."""
        try:
            answer = question(*arguments, **options)
        except Exception as error:
            self.lines.append(f"{name}: {error if isinstance(error, Unanswered) else repr(error)}")
            return None
        if isinstance(answer, dict):
            self.lines += [f"{name}, {key}: {value}" for key, value in answer.items()]
        else:
            self.lines.append(f"{name}: {answer}")
        return answer

    def handle(self, name: str, question: Asked, *arguments: Any) -> str:
        """Its answer says nothing to people; "" where there was none."""
        try:
            return str(question(*arguments))
        except Unanswered as error:
            self.lines.append(f"{name}: {error}")
            return ""


def shared_memory() -> str:
    place = os.statvfs("/dev/shm")
    return f"{place.f_bavail * place.f_frsize} bytes free of {place.f_blocks * place.f_frsize}"


def kernel_driver() -> str:
    return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]


def probe(world: World) -> str:
    """Facts about this driver and machine."""
    facts, deadline = Facts(), time.monotonic() + WHOLE_SECONDS
    with (world.place / "probe.log").open("ab") as log:
        exporter, importer = Asked(deadline, log), Asked(deadline, log)
    try:
        machine(facts, exporter, importer)
        memory(facts, exporter, importer)
        events(facts, exporter, importer, 1.5 if not world.fake else 0.3)
    finally:
        exporter.close()
        importer.close()
    return "\n  ".join([f"{len(facts.lines)} facts", *facts.lines])


def machine(facts: Facts, exporter: Asked, importer: Asked) -> None:
    facts.add("seconds of the first process", exporter, "start", seconds=15)
    facts.add("seconds of the second process", importer, "start", seconds=15)
    facts.add("driver version", exporter, "version")
    facts.add("kernel driver", kernel_driver)
    facts.add("attribute", exporter, "attributes")
    facts.add("/dev/shm", shared_memory)


def memory(facts: Facts, exporter: Asked, importer: Asked) -> None:
    for name in SIZES:
        handle = facts.handle(f"handle of {name}", exporter, "allocate", name)
        if not handle:
            continue
        facts.add(f"range of own {name}", exporter, "range_of", name)
        for turn in ("first", "second"):
            took = facts.add(f"{turn} import of {name}", importer, "take", name, handle)
            if not str(took).startswith("SUCCESS"):
                break
            if turn == "first":
                facts.add(f"range of imported {name}", importer, "range_of", name)
                facts.add(f"close of {name}", importer, "let_go", name)
    facts.add("export as POSIX fd", exporter, "export", cuda.POSIX_FD)
    facts.add("export as FABRIC handle", exporter, "export", cuda.FABRIC)
    facts.add("batch copy of one piece", exporter, "batches")


def events(facts: Facts, exporter: Asked, importer: Asked, delay: float) -> None:
    """Ends with the exporter's death."""
    handle = facts.handle("handle of an event", exporter, "event")
    if handle:
        facts.add("event opened by its own process", exporter, "open_own_event", handle)
        facts.add("event opened", importer, "open_event", handle)
        facts.add("event opened again", importer, "open_event", handle)
        facts.add("query of an event never recorded, from outside", importer, "query")
        facts.add(f"query in its own process, {delay} s before it", exporter, "record", delay)
        facts.add("queries from outside meanwhile", importer, "watch", delay + 1, "SUCCESS")
        facts.add("query from outside after it", importer, "query")
        facts.add(f"query in its own process, {2 * delay} s before it", exporter, "record", 2 * delay)
        facts.add("query from outside before the kill", importer, "query")
    facts.add("the exporter, killed in the middle of it", exporter.kill)
    for name in SIZES:
        facts.add(f"close of {name} right after the kill", importer, "let_go", name)
    if handle:
        watched = 2 * delay + 0.5
        after = "queries from outside after the kill"
        facts.add(after, importer, "watch", watched, seconds=watched + 3)
        facts.add("a stream that waits for it after the kill", importer, "wait_on_stream")


if __name__ == "__main__":
    serve()
