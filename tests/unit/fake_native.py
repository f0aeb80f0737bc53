"""A scripted stand-in for `pillion._native`, in memory: grants late, refuses, fails, misses deadlines, never quiesces.

`FakeNative` is the module, the sidecar and the fault injector in one. Time is counted in polls of the worker's
client and in calls of `lease_poll`, so that every run of a test is the same. It reads and writes the engine's
blocks through `memory` (block id -> contents), when a job is carried out and not when it is submitted. Every group is
a namespace of its own, so a load that mixes groups up finds nothing, or fails the assertions here.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

DONE, FAILED, CANCELLED = 1, 2, 3


@dataclass
class FakeJob:
    """A submitted job and what is still to happen to it."""

    job: bytes
    load: bool
    keys: list[tuple[bytes, bytes]]  # (namespace, hash) of each block
    blocks: list[int]
    contents: list[Any]  # of a load: what the lease proved
    polls_left: int
    outcome_told: bool = False
    done: bool = False
    quiesced: bool = False


@dataclass
class FakeNative:
    """Knobs first; what happened below them."""

    memory: MutableMapping[int, Any] = field(default_factory=dict)
    attached: bool = True
    attach_status: str = "connecting: nobody listens"
    grant_after_polls: int = 0  # lease_poll calls that answer "not yet"
    refuse_leases: bool = False
    grant_blocks_max: int | None = None
    load_polls: int = 1
    save_polls: int = 1
    load_outcome: int | None = DONE  # None: never told
    save_outcome: int | None = DONE
    quiesce_loads: bool = True
    quiesce_saves: bool = True
    submit_error: BaseException | None = None
    unregister_answer: bool = True  # False: nobody says that the memory is let go of
    cuda: str = "gpu-none"  # the device of every address
    raise_in: dict[str, BaseException] = field(default_factory=dict)  # method name -> error

    store: dict[tuple[bytes, bytes], Any] = field(default_factory=dict)
    jobs: dict[bytes, FakeJob] = field(default_factory=dict)
    epoch: int = 0
    leases: dict[int, tuple[bytes, list[tuple[int, list[bytes]]], int]] = field(
        default_factory=dict
    )  # ticket -> id, (group, hashes granted) of each run, polls
    lease_short: dict[int, list[int]] = field(
        default_factory=dict
    )  # group -> blocks granted of its next runs
    groups: int = 1
    neighbours: list[str] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    described: Any = None  # what `describe` was given, and the canaries that were compared since
    registered: Any = None  # the same, of what was registered
    live: bool = False  # registered, and not unregistered since
    cache_mode: str | None = None  # what was asked for
    log: list[str] = field(default_factory=list)  # the order of what happens around registrations
    streams: list[tuple[str, int | None]] = field(
        default_factory=list
    )  # (load or save, stream) per submission
    ended: list[tuple[bytes, int, bool, int]] = field(default_factory=list)  # events of `unregister`
    calls: dict[str, int] = field(default_factory=dict)
    closed: int = 0
    options: list[dict[str, Any]] = field(default_factory=list)
    minted: int = 0

    def SchedulerClient(self, **options: Any) -> FakeScheduler:
        self.options.append(options)
        self.groups = len(options.get("namespaces", [{}]))
        return FakeScheduler(self)

    def WorkerClient(self, **options: Any) -> FakeWorker:
        self.options.append(options)
        self.live = False  # another engine's memory
        return FakeWorker(self)

    def default_socket(self, device: str) -> str:
        return f"/nonexistent/{device}.sock"

    def version(self) -> str:
        return "fake"

    def cuda_device(self, address: int) -> str:
        self.called("cuda_device")
        assert address > 0
        return self.cuda

    def cuda_missing(self) -> str | None:
        return None

    @property
    def namespace(self) -> bytes:
        """Of the first group."""
        return self.space(0)

    def space(self, group: int) -> bytes:
        return (self.epoch + (group << 64)).to_bytes(16, "big")

    @property
    def spaces(self) -> bytes:
        return b"".join(self.space(group) for group in range(self.groups))

    def stored(self, group: int) -> int:
        """Blocks of a group in this epoch."""
        return sum(space == self.space(group) for space, _ in self.store)

    def called(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if name in self.raise_in:
            raise self.raise_in[name]

    def unreleased(self) -> list[int]:
        """Tickets that the shim has neither released nor handed to a job that was released."""
        return [ticket for ticket in self.leases if ticket not in self.released]

    # ---- what a test does to jobs

    def late_write(self, content: Any) -> int:
        """A stuck sidecar writes now into the blocks of every load that is not done; how many blocks."""
        late = [job for job in self.jobs.values() if job.load and not job.done]
        for job in late:
            for block in job.blocks:
                self.memory[block] = list(content)
        return sum(len(job.blocks) for job in late)

    def quiesce_all(self) -> None:
        """From now on every job quiesces at the next poll."""
        self.quiesce_loads = self.quiesce_saves = True
        for job in self.jobs.values():
            job.polls_left = min(job.polls_left, 1) if job.outcome_told else job.polls_left

    def carry_out(self) -> list[tuple[bytes, int, bool, int]]:
        """One poll: moves every job on and returns the events."""
        events, self.ended = self.ended, []
        for job in list(self.jobs.values()):
            job.polls_left -= 1
            if job.polls_left > 0:
                continue
            outcome, blocks = 0, 0
            wanted = self.load_outcome if job.load else self.save_outcome
            if not job.outcome_told and wanted is not None:
                outcome, job.outcome_told = wanted, True
                if job.load and None in job.contents:
                    outcome = FAILED  # evicted, or the sidecar was restarted
                if outcome == DONE:
                    job.done, blocks = True, self._move(job)
            if self.quiesce_loads if job.load else self.quiesce_saves:
                job.quiesced = True
                del self.jobs[job.job]
            if outcome or job.quiesced:
                events.append((job.job, outcome, job.quiesced, blocks))
        return events

    def check_blocks(self, job: FakeJob) -> None:
        assert len(set(job.blocks)) == len(job.blocks)

    def _move(self, job: FakeJob) -> int:
        if job.load:
            for block, content in zip(job.blocks, job.contents, strict=True):
                self.memory[block] = list(content)
            return len(job.blocks)
        stored = 0
        for block, key in zip(job.blocks, job.keys, strict=True):
            content = list(self.memory[block])
            if key in self.store:
                assert self.store[key] == content, "two contents under one hash"
            else:
                self.store[key] = content
                stored += 1
        return stored


class FakeRanks:
    """The module, with a sidecar for each rank."""

    def __init__(self, world: int) -> None:
        self.ranks = [FakeNative() for _ in range(world)]

    def _of(self, options: dict[str, Any]) -> FakeNative:
        found = re.search(r"cpu(\d+)", options["socket"])
        assert found, options
        assert options["namespaces"][0]["shard"] == f"{int(found[1]) + 1}/{len(self.ranks)}"
        return self.ranks[int(found[1])]

    def SchedulerClient(self, **options: Any) -> FakeScheduler:
        return self._of(options).SchedulerClient(**options)

    def WorkerClient(self, **options: Any) -> FakeWorker:
        return self._of(options).WorkerClient(**options)

    def default_socket(self, device: str) -> str:
        return f"/nonexistent/{device}.sock"


class FakeScheduler:
    """`_native.SchedulerClient`."""

    def __init__(self, native: FakeNative) -> None:
        self.native = native

    def ready(self) -> bool:
        self.native.called("ready")
        return self.native.attached

    def status(self) -> str:
        return "ready" if self.native.attached else self.native.attach_status

    def namespace_ids(self) -> bytes | None:
        self.native.called("namespace_ids")
        return self.native.spaces if self.native.attached else None

    def _leading(self, group: int, hashes: bytes) -> list[bytes]:
        there = self._present(group, hashes)
        return _split(hashes)[: (there + b"\0").index(0)]

    def _present(self, group: int, hashes: bytes) -> bytes:
        assert 0 <= group < self.native.groups
        space, store = self.native.space(group), self.native.store
        return bytes(self.native.attached and (space, each) in store for each in _split(hashes))

    def lookup(self, group: int, hashes: bytes) -> int:
        self.native.called("lookup")
        return len(self._leading(group, hashes))

    def present(self, group: int, hashes: bytes) -> bytes:
        self.native.called("present")
        return self._present(group, hashes)

    def absent(self, group: int, hashes: bytes) -> list[int]:
        self.native.called("absent")
        if not self.native.attached:
            return []
        return [index for index, there in enumerate(self._present(group, hashes)) if not there]

    def lease(self, runs: list[tuple[int, bytes]]) -> int:
        native = self.native
        native.called("lease")
        if not native.attached:
            return 0
        asked = [(group, _split(hashes)) for group, hashes in runs]
        if len(runs) == 1:
            asked = [(group, self._leading(group, hashes)) for group, hashes in runs]
            if not asked[0][1]:
                return 0
        assert all(hashes for _, hashes in asked), "a run of nothing"
        granted = [(group, self._leading(group, b"".join(hashes))) for group, hashes in asked]
        granted = [
            (
                group,
                hashes[
                    : native.lease_short[group].pop(0)
                    if native.lease_short.get(group)
                    else native.grant_blocks_max
                ],
            )
            for group, hashes in granted
        ]
        native.minted += 1
        native.leases[native.minted] = (native.minted.to_bytes(16, "big"), granted, native.grant_after_polls)
        return native.minted

    def lease_poll(self, ticket: int, wait_us: int = 0) -> tuple[list[int], bytes] | None:
        native = self.native
        native.called("lease_poll")
        lease, runs, polls = native.leases[ticket]
        if polls > 0:
            native.leases[ticket] = (lease, runs, polls - 1)
            return None
        counts = [len(hashes) for _, hashes in runs]
        if native.refuse_leases or not native.attached or not any(counts):
            return [], b""
        return counts, lease

    def release(self, ticket: int) -> None:
        self.native.called("release")
        if ticket not in self.native.released:
            self.native.released.append(ticket)

    def lease_used(self, ticket: int) -> None:
        self.native.called("lease_used")
        self.native.used.append(ticket)

    def neighbours(self) -> list[str]:
        return self.native.neighbours

    def device(self) -> str:
        return "fake"

    def new_epoch(self, groups: int | None = None) -> None:
        self.native.called("new_epoch")
        self.native.groups = self.native.groups if groups is None else groups
        self.native.epoch += 1

    def counters(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self.native.closed += 1


class FakeWorker:
    """`_native.WorkerClient`."""

    def __init__(self, native: FakeNative) -> None:
        self.native = native

    def describe(self, **description: Any) -> None:
        self.native.called("describe")
        self.native.log.append("describe")
        assert not (description["cuda"] and description["memfd"] >= 0)
        self.native.described = description | {"canaries": []}

    def check_canary(self, group: int, seed: int) -> None:
        self.native.called("check_canary")
        self.native.log.append("check_canary")
        assert 0 <= group < len(self.native.described["groups"])
        self.native.described["canaries"].append((group, seed))

    def register(self, events: int = 512, cache_mode: str | None = None) -> None:
        self.native.called("register")
        self.native.cache_mode = cache_mode
        self.native.log.append("register")
        assert not self.native.live, "registered twice"
        described = self.native.described
        groups = [group for group, _ in described["canaries"]]
        assert groups == list(range(len(described["groups"]))), "every group's canary, once"
        self.native.registered = described
        self.native.live = True

    def canary_over(self) -> None:
        self.native.called("canary_over")
        self.native.log.append("canary_over")

    def unregister(self, wait_ms: int = 2000) -> bool:
        """Ends all jobs; where nobody answers they do not quiesce before `quiesce_all`."""
        native = self.native
        native.called("unregister")
        native.log.append("unregister")
        assert native.live and 0 < wait_ms <= 5000
        native.live = False
        for job in list(native.jobs.values()):
            outcome = 0 if job.outcome_told else FAILED if job.load else CANCELLED
            job.outcome_told, job.polls_left = True, 1_000_000
            native.ended.append((job.job, outcome, native.unregister_answer, 0))
            if native.unregister_answer:
                del native.jobs[job.job]
        return native.unregister_answer

    def ready(self) -> bool:
        self.native.log.append("ready")
        return self.native.attached

    def status(self) -> str:
        return "ready" if self.native.attached else self.native.attach_status

    def canary_checked(self) -> bool:
        return True

    def submit_load(
        self,
        job: bytes,
        lease: bytes,
        spaces: bytes,
        runs: list[tuple[int, int, int, int]],
        hashes: bytes,
        blocks: list[int],
        deadline_ms: int,
        stream: int | None = None,
    ) -> None:
        native = self.native
        native.called("submit_load")
        native.streams.append(("load", stream))
        if native.submit_error is not None:
            raise native.submit_error
        leased = next(runs for lease_id, runs, _ in native.leases.values() if lease_id == lease)
        wanted = _split(hashes)
        keys: list[tuple[bytes, bytes]] = []
        for group, run, first, count in runs:
            of_group, held = leased[run]
            own = wanted[len(keys) :][:count]
            assert native.space(of_group) == _space(spaces, group) and count > 0
            assert held[first : first + count] == own, "the load asks for blocks outside its lease"
            keys += [(_space(spaces, group), each) for each in own]
        assert len(blocks) == len(wanted) == len(keys) and deadline_ms > 0
        contents = [native.store.get(key) for key in keys]
        self._add(FakeJob(job, True, keys, list(blocks), contents, native.load_polls))

    def submit_save(
        self,
        job: bytes,
        spaces: bytes,
        runs: list[tuple[int, bytes, int]],
        hashes: bytes,
        blocks: list[int],
        deadline_ms: int,
        stream: int | None = None,
    ) -> None:
        native = self.native
        native.called("submit_save")
        native.streams.append(("save", stream))
        if native.submit_error is not None:
            raise native.submit_error
        keys: list[tuple[bytes, bytes]] = []
        for group, parent, count in runs:
            assert len(parent) in (0, 32) and count > 0
            keys += [(_space(spaces, group), each) for each in _split(hashes)[len(keys) :][:count]]
        assert len(keys) == len(blocks) and deadline_ms > 0
        self._add(FakeJob(job, False, keys, list(blocks), [], native.save_polls))

    def _add(self, job: FakeJob) -> None:
        assert self.native.live, "a job while no memory is registered"
        assert len(job.job) == 16 and job.job not in self.native.jobs
        assert 0 not in job.blocks
        self.native.check_blocks(job)
        self.native.jobs[job.job] = job

    def poll(self) -> list[tuple[bytes, int, bool, int]]:
        self.native.called("poll")
        return self.native.carry_out()

    def unquiesced(self) -> int:
        return len(self.native.jobs)

    def counters(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self.native.closed += 1


def _split(hashes: bytes) -> list[bytes]:
    return [hashes[offset : offset + 32] for offset in range(0, len(hashes), 32)]


def _space(spaces: bytes, group: int) -> bytes:
    return spaces[16 * group :][:16]
