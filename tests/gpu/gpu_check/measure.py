"""What an engine process can measure: the machine's limits, and ours beside them in the same run.

Everything here returns raw figures; rows.py makes rows of them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gpu_check.decode import Decode
from gpu_check.device import MIB, DriverDevice, HostBuffer, TorchDevice
from gpu_check.engine import DeviceEngine, Raw

DESCRIPTORS_MAX = 4096
"""Of one batch call: with 51,828 driver 580.159.04 crashes."""


class Limits:
    """Two pinned buffers and two pieces of device memory, for plain copies both ways."""

    def __init__(self, device: DriverDevice, size: int) -> None:
        self.device, self.size = device, size
        self.hosts = [HostBuffer(device.driver, size) for _ in range(2)]
        self.pieces = [device.allocate(size, "ipc") for _ in range(2)]
        self.streams = (device.new_stream(), device.new_stream())

    def out(self) -> float:
        """GB/s of one copy from the device."""
        return self.size / self._timed(self._out) / 1e9

    def into(self) -> float:
        return self.size / self._timed(self._into) / 1e9

    def both(self) -> float:
        """GB/s of one copy each way at the same time, in sum."""
        return 2 * self.size / self._timed(self._out, self._into) / 1e9

    def _timed(self, *queue: Callable[[], None]) -> float:
        return self.device.timed(*queue, streams=self.streams)

    def _out(self) -> None:
        self.device.copy_out(self.hosts[0].address, self.pieces[0].address, self.size, self.streams[0])

    def _into(self) -> None:
        self.device.copy_in(self.pieces[1].address, self.hosts[1].address, self.size, self.streams[1])

    def batch(self, out: bool, fragment: int, count: int) -> Callable[[], float]:
        """Measures copies of `count` fragments each that do not lie side by side, in calls of 4096 at most."""
        device, host = self.pieces[0].address, self.hosts[0].address
        places = np.random.default_rng(1).permutation(self.size // fragment)[:count].astype(np.uint64)
        # Scattered on the device, as blocks are; in order on the host, as records are.
        scattered = places * np.uint64(fragment) + np.uint64(device)
        ordered = np.arange(count, dtype=np.uint64) * np.uint64(fragment) + np.uint64(host)
        calls = []
        for start in range(0, count, DESCRIPTORS_MAX):
            length = min(DESCRIPTORS_MAX, count - start)
            array = ctypes.c_ulonglong * length
            on_device = array.from_buffer_copy(scattered[start : start + length])
            on_host = array.from_buffer_copy(ordered[start : start + length])
            sizes = (ctypes.c_size_t * length)(*[fragment] * length)
            calls.append((on_host, on_device, sizes) if out else (on_device, on_host, sizes))

        def measure() -> float:
            queue = [
                lambda to=to, source=source, sizes=sizes: self.device.batch(
                    to, source, sizes, self.streams[0]
                )
                for to, source, sizes in calls
            ]
            return count * fragment / self._timed(*queue) / 1e9

        return measure

    def close(self) -> None:
        for piece in self.pieces:
            piece.free()
        for host in self.hosts:
            host.close()
        for stream in self.streams:
            self.device.driver.cuStreamDestroy_v2(stream)


class Measure:
    device: DriverDevice | None
    pause = 0.0
    """Between looks at whether a job has ended; 0 where there are cores enough."""

    @property
    def engine(self) -> DeviceEngine:
        raise NotImplementedError

    def patience(self, pause: float) -> None:
        self.pause = pause

    @contextmanager
    def limits(self, size: int) -> Iterator[Limits]:
        assert self.device
        limits = Limits(self.device, size)
        try:
            yield limits
        finally:
            limits.close()

    # ---- the machine -------------------------------------------------------

    def memcpy(self, size: int, runs: int) -> dict[str, list[float]]:
        with self.limits(size) as limits:
            for call in (limits.out, limits.into, limits.both):
                call()
            found: dict[str, list[float]] = {"out": [], "into": [], "both": []}
            for _ in range(runs):
                found["out"].append(limits.out())
                found["into"].append(limits.into())
                found["both"].append(limits.both())
            return found

    def batches(self, size: int, fragments: list[int], counts: list[int], runs: int) -> list[dict[str, Any]]:
        """A sweep over cuMemcpyBatchAsync: GB/s by direction, fragment and number of them."""
        found = []
        with self.limits(size) as limits:
            for out in (True, False):
                for fragment in fragments:
                    for count in (count for count in counts if count * fragment <= size):
                        measure = limits.batch(out, fragment, count)
                        measure()
                        rates = [measure() for _ in range(runs)]
                        found.append({"out": out, "fragment": fragment, "count": count, "rates": rates})
        return found

    # ---- through the sidecar -------------------------------------------------

    def _random_blocks(self, blocks: list[int]) -> None:
        words = np.random.default_rng(7).integers(0, 2**63, size=-(-self.engine.record_bytes // 8))
        record = words.view(np.uint8)[: self.engine.record_bytes].copy()
        for block in blocks:
            record[:8] = np.frombuffer(block.to_bytes(8, "little"), dtype=np.uint8)
            self.engine.write(block, record)
        self.engine.device.wait()

    def throughput(self, blocks: int, memcpy_bytes: int, runs: int) -> dict[str, list[float]]:
        """A save and a load of so many blocks, each beside a plain copy in the same direction."""
        engine, raw = self.engine, Raw(self.engine, self.pause)
        numbers = list(range(1, blocks + 1))
        size = blocks * engine.record_bytes
        self._random_blocks(numbers)
        found: dict[str, list[float]] = {"save": [], "out": [], "load": [], "into": []}
        with self.limits(memcpy_bytes) as limits:
            for run in range(runs + 1):
                hashes = raw.fresh(blocks)
                out = limits.out()
                begun = time.perf_counter()
                raw.wait(raw.save(hashes, numbers))
                saved = time.perf_counter() - begun
                into = limits.into()
                ticket, lease = raw.lease(hashes)
                begun = time.perf_counter()
                raw.wait(raw.load(hashes, numbers, lease))
                loaded = time.perf_counter() - begun
                engine.scheduler.release(ticket)
                if run:  # the first one warms up
                    figures = (size / saved / 1e9, out, size / loaded / 1e9, into)
                    for name, figure in zip(found, figures, strict=True):
                        found[name].append(figure)
        self._still_right(numbers, raw)
        return found

    def _still_right(self, numbers: list[int], raw: Raw) -> None:
        """Fast is not enough: one more round trip, with zeroes in between, and every byte compared."""
        engine = self.engine
        hashes = raw.fresh(len(numbers))
        before = [engine.read_many([block])[0].copy() for block in numbers[:: max(1, len(numbers) // 64)]]
        raw.wait(raw.save(hashes, numbers))
        for block in numbers:
            engine.fill(block, 0)
        ticket, lease = raw.lease(hashes)
        raw.wait(raw.load(hashes, numbers, lease))
        engine.scheduler.release(ticket)
        for block, record in zip(numbers[:: max(1, len(numbers) // 64)], before, strict=True):
            assert np.array_equal(engine.read_many([block])[0], record), f"wrong bytes in block {block}"

    def both_ways(self, blocks: int, memcpy_bytes: int, runs: int) -> dict[str, list[float]]:
        """A save and a load at the same time, beside two plain copies at the same time: GB/s in sum."""
        engine, raw = self.engine, Raw(self.engine, self.pause)
        saved, loaded = list(range(1, blocks + 1)), list(range(blocks + 1, 2 * blocks + 1))
        size = blocks * engine.record_bytes
        self._random_blocks(saved + loaded)
        here = raw.fresh(blocks)
        raw.wait(raw.save(here, loaded))
        found: dict[str, list[float]] = {"ours": [], "memcpy": []}
        with self.limits(memcpy_bytes) as limits:
            for run in range(runs + 1):
                ticket, lease = raw.lease(here)
                fresh = raw.fresh(blocks)
                plain = limits.both()
                begun = time.perf_counter()
                raw.wait(raw.save(fresh, saved), raw.load(here, loaded, lease))
                took = time.perf_counter() - begun
                engine.scheduler.release(ticket)
                if run:
                    found["ours"].append(2 * size / took / 1e9)
                    found["memcpy"].append(plain)
        return found

    # ---- latency -------------------------------------------------------------

    def latency(self, runs: int) -> dict[str, list[float]]:
        """Microseconds, of jobs of one block.

        `request`: from the scheduler's question for a lease to the block's bytes being there.
        `load`: the same from the submission on.
        `event_load`, `event_save`: from the moment at which the engine's stream reaches the job's event, as its
        own process sees it, to the end of the job. `event_out`, `event_into`: the same for a plain copy of the
        same bytes that waits for the same event in a stream of the engine's own process.
        """
        engine, raw = self.engine, Raw(self.engine, self.pause)
        self._random_blocks([1, 2])
        here = raw.fresh(1)
        raw.wait(raw.save(here, [1]))
        found: dict[str, list[float]] = {
            name: [] for name in ("request", "load", "event_load", "event_save", "event_into", "event_out")
        }
        with self.limits(max(MIB, engine.record_bytes)) as limits:
            for run in range(runs + 10):
                figures = self._one_block(raw, here, limits)
                if run >= 10:
                    for name, figure in figures.items():
                        found[name].append(figure * 1e6)
        return found

    def _one_block(self, raw: Raw, here: bytes, limits: Limits) -> dict[str, float]:
        engine, found = self.engine, {}
        begun = time.perf_counter()
        ticket, lease = raw.lease(here)
        submitted = time.perf_counter()
        raw.wait(raw.load(here, [2], lease))
        ended = time.perf_counter()
        found["request"], found["load"] = ended - begun, ended - submitted
        found["event_load"] = self._after_event(raw, lambda: raw.load(here, [2], lease))
        found["event_save"] = self._after_event(raw, lambda: raw.save(raw.fresh(1), [1]))
        engine.scheduler.release(ticket)
        device, host, size = engine.kv.address, limits.hosts[0].address, engine.record_bytes
        found["event_into"] = self._plain_after_event(
            limits, lambda stream: engine.device.copy_in(device, host, size, stream)
        )
        found["event_out"] = self._plain_after_event(
            limits, lambda stream: engine.device.copy_out(host, device, size, stream)
        )
        return found

    def _after_event(self, raw: Raw, submit: Callable[[], bytes]) -> float:
        device = self.engine.device
        driver, event = device.driver, device.event()
        # Long enough for the job to be with the sidecar, waiting.
        device.delay(4)
        job = submit()
        driver.cuEventRecord(event, device.stream)
        while not driver.ready("cuEventQuery", event):
            pass
        reached = time.perf_counter()
        raw.wait(job)
        took = time.perf_counter() - reached
        driver.cuEventDestroy_v2(event)
        return took

    def _plain_after_event(self, limits: Limits, copy: Callable[[int], None]) -> float:
        device, stream = self.engine.device, limits.streams[0]
        driver, event, end = device.driver, device.event(), device.event()
        device.delay(4)
        driver.cuEventRecord(event, device.stream)
        driver.cuStreamWaitEvent(stream, event, 0)
        copy(stream)
        driver.cuEventRecord(end, stream)
        while not driver.ready("cuEventQuery", event):
            pass
        reached = time.perf_counter()
        while not driver.ready("cuEventQuery", end):
            pass
        took = time.perf_counter() - reached
        for each in (event, end):
            driver.cuEventDestroy_v2(each)
        return took

    # ---- beside a model --------------------------------------------------------

    def graph_meanwhile(self, seconds: float, prompt: str, count: int) -> dict[str, Any]:
        """Round trips while a captured graph is replayed without a pause; what it computes stays right."""
        assert isinstance(self.device, TorchDevice)
        engine, decode = self.engine, Decode(self.device, layers=4, hidden=2048, width=5632, batch=16)
        polled, replays, trips = engine.poll, 0, 0
        first = decode.replayed()

        def poll() -> None:
            nonlocal replays
            if decode.idle():
                decode.replay()
                replays += 1
            polled()

        engine.poll = poll  # type: ignore[method-assign]
        try:
            begun = time.monotonic()
            while time.monotonic() < begun + seconds or not trips:
                self.save_and_load(f"{prompt}-{trips}", count)
                trips += 1
        finally:
            engine.poll = polled  # type: ignore[method-assign]
        assert replays >= trips, f"only {replays} replays in {trips} round trips"
        assert decode.same(first), "the graph's results changed while blocks were saved and loaded"
        return {"replays": replays, "round trips": trips}

    def save_and_load(self, prompt: str, count: int, jobs: int = 1) -> float:
        raise NotImplementedError

    def decode(
        self, seconds: float, windows: int, blocks: int, jobs: int, small: bool = False
    ) -> dict[str, Any]:
        """Milliseconds per decode step, in turn without traffic and with loads and saves at full speed.

        As a shim does, the step's loop itself submits jobs and asks for their ends, between the launch of the
        graph and the wait for its result; without traffic it asks as well.
        """
        assert isinstance(self.device, TorchDevice)
        raw = Raw(self.engine, 0)
        size = {"layers": 4, "hidden": 1024, "width": 2816, "batch": 8} if small else {}
        model = Decode(self.device, **size)
        traffic = Traffic(raw, blocks, jobs)
        quiet: list[list[float]] = []
        busy: list[list[float]] = []
        moved = took = 0.0
        model.steps(raw.poll, seconds / 2)
        for _ in range(windows):
            quiet.append(model.steps(raw.poll, seconds))
            traffic.begin()
            model.steps(traffic.step, seconds / 10)
            bytes_before, begun = traffic.bytes, time.perf_counter()
            busy.append(model.steps(traffic.step, seconds))
            moved += traffic.bytes - bytes_before
            took += time.perf_counter() - begun
            traffic.end()
        return {"quiet": quiet, "busy": busy, "rate": moved / took / 1e9}


class Traffic:
    """So many loads and so many saves under way at any time."""

    def __init__(self, raw: Raw, blocks: int, jobs: int) -> None:
        self.raw, self.blocks, self.jobs = raw, blocks, jobs
        self.bytes = 0
        self.running: dict[bytes, Callable[[], bytes]] = {}
        numbers = iter(range(1, 2 * jobs * blocks + 1))
        places = [[next(numbers) for _ in range(blocks)] for _ in range(2 * jobs)]
        self.sources, self.targets = places[:jobs], places[jobs:]
        self.here = [raw.fresh(blocks) for _ in range(jobs)]
        for hashes, source in zip(self.here, self.sources, strict=True):
            raw.wait(raw.save(hashes, source))
        self.leases: list[tuple[int, bytes]] = []

    def begin(self) -> None:
        self.leases = [self.raw.lease(hashes) for hashes in self.here]
        for index in range(self.jobs):
            _, lease = self.leases[index]
            self._start(
                lambda i=index, lease=lease: self.raw.load(self.here[i], self.targets[i], lease)  # type: ignore[misc]
            )
            self._start(lambda i=index: self.raw.save(self.raw.fresh(self.blocks), self.sources[i]))  # type: ignore[misc]

    def _start(self, submit: Callable[[], bytes]) -> None:
        self.running[submit()] = submit

    def step(self) -> None:
        self.raw.poll()
        for job in [job for job in self.raw.ended if job in self.running]:
            del self.raw.ended[job]
            self.bytes += self.blocks * self.raw.engine.record_bytes
            self._start(self.running.pop(job))

    def end(self) -> None:
        self.raw.wait(*self.running)
        self.running.clear()
        for ticket, _ in self.leases:
            self.raw.engine.scheduler.release(ticket)
