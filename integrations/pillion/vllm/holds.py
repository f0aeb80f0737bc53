"""The scheduler half's jobs, and the blocks that they hold (I3, I8).

A *hold* is an extra reference in vLLM's block pool on the blocks of a job, taken when the job is planned and
dropped when every rank said that nothing touches the blocks any more. It is what keeps a late write out of
reused memory, whatever becomes of the request. All groups' blocks come from one pool, and one limit counts them.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pillion.vllm.metadata import DONE

# A hold this young is about to end by itself, so that the scheduler rather waits than preempts a request.
FREES_SOON_S = 0.1
# How long after a job's deadline the idle engine keeps stepping to see its blocks come back.
SPIN_AFTER_DEADLINE_S = 60.0


@dataclass
class Job:
    """A planned load or save, from plan to quiesced on all ranks."""

    load: bool
    req_id: str
    planned: float
    blocks: list[Any]  # vLLM's KVCacheBlock objects, held
    tokens: int = 0  # of a load: how many the request gets
    ticket: int = 0  # of a load: its lease
    saving: list[tuple[int, bytes]] = field(default_factory=list)  # of a save: (group, key) of each block
    outcomes: int = 0
    failed: bool = False
    quiesced: int = 0
    stored: int = -1

    def report(self, report: Any) -> None:
        """Adds what some ranks said."""
        if report.outcomes:
            self.outcomes += report.outcomes
            self.failed |= report.outcome != DONE
            self.stored = report.blocks if self.stored < 0 else min(self.stored, report.blocks)
        self.quiesced += report.quiesced


class Holds:
    """Every job that has not quiesced, and how many blocks all of them hold."""

    def __init__(self, num_blocks: int, fraction: float) -> None:
        self.pool: Any = None
        self.jobs: dict[bytes, Job] = {}
        self.held = 0
        # Block 0 is vLLM's null block, which nobody can hold.
        self.limit = max(1, int((num_blocks - 1) * fraction))
        self.spin_until = 0.0
        self._prefix = os.urandom(8)
        self._minted = 0

    def open(self, job: Job, ids: Sequence[int], deadline_ms: int) -> bytes:
        """Takes the hold and mints the job's id."""
        job.blocks = [self.pool.blocks[block_id] for block_id in ids]
        self._minted += 1
        job_id = self._prefix + self._minted.to_bytes(8, "big")
        self.pool.touch(job.blocks)
        self.held += len(job.blocks)
        self.jobs[job_id] = job
        self.spin_until = max(self.spin_until, job.planned + deadline_ms / 1000 + SPIN_AFTER_DEADLINE_S)
        return job_id

    def free(self, job_id: bytes) -> Job:
        """Drops a job's hold. The last blocks of a prompt come first: they are evicted first."""
        job = self.jobs.pop(job_id)
        self.held -= len(job.blocks)
        self.pool.free_blocks(reversed(job.blocks))
        return job

    def frees_soon(self) -> bool:
        """Whether waiting a moment frees blocks: young holds on blocks that nobody else uses."""
        young = time.monotonic() - FREES_SOON_S
        return any(
            job.planned > young and any(block.ref_cnt == 1 for block in job.blocks)
            for job in self.jobs.values()
        )

    def spinning(self) -> bool:
        """Whether the idle engine must keep stepping so that holds end."""
        return bool(self.jobs) and time.monotonic() < self.spin_until
