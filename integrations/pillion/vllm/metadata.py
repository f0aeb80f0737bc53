"""What travels between the two halves inside vLLM's own step messages. Pickled every step: keep it small."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

NONE, DONE, FAILED, CANCELLED = 0, 1, 2, 3


class LoadPlan(NamedTuple):
    """A load for every rank, of blocks of all groups."""

    job: bytes  # 16 bytes
    req_id: str
    lease: bytes  # 16 bytes for each rank, see `ranks.part`
    spaces: bytes  # 16 bytes for each rank's every group, see `ranks.part`
    runs: list[tuple[int, int, int, int]]  # (group, run of the lease, first block of it, blocks)
    hashes: bytes  # 32 bytes a block, run after run
    blocks: list[int]
    deadline_ms: int
    form: int = 0  # in which the blocks are stored, see `shards`: the spaces are those of all its parts


class SavePlan(NamedTuple):
    """A save for every rank, of blocks of one request."""

    job: bytes
    spaces: bytes  # 16 bytes for each rank's every group
    # (group, hash of the block before the first one or b"" at the start of a prompt, consecutive blocks)
    runs: list[tuple[int, bytes, int]]
    hashes: bytes
    blocks: list[int]
    deadline_ms: int
    # Ranks that hold the same part of a block save it once among them: each takes its own (`worker.own_part`).
    shared: bool = False


class PillionMetadata(KVConnectorMetadata):
    """Scheduler to workers, one step: jobs to submit, and loads that ended before they were ever sent."""

    def __init__(self, loads: Any = (), saves: Any = (), ended: Any = (), *, forward: bool = False) -> None:
        self.loads: tuple[LoadPlan, ...] = tuple(loads)
        self.saves: tuple[SavePlan, ...] = tuple(saves)
        self.ended: tuple[str, ...] = tuple(ended)  # request ids that wait for a load that will not come
        self.forward = forward  # the step computes something: saves must wait until it has, drafts included

    def __reduce__(self) -> Any:
        if not (self.loads or self.saves or self.ended):
            return (PillionMetadata, ())
        loads, saves = tuple(tuple(plan) for plan in self.loads), tuple(tuple(plan) for plan in self.saves)
        return (_rebuild, (loads, saves, self.ended, self.forward))


def _rebuild(loads: Any, saves: Any, ended: Any, forward: bool) -> PillionMetadata:
    load_plans, save_plans = (LoadPlan(*plan) for plan in loads), (SavePlan(*plan) for plan in saves)
    return PillionMetadata(load_plans, save_plans, ended, forward=forward)


class JobReport(NamedTuple):
    """What the ranks said about a job since the last step."""

    outcome: int  # the worst of the ranks that have one; NONE where none has
    outcomes: int  # ranks that reported an outcome
    quiesced: int  # ranks that no longer touch the blocks
    blocks: int  # fewest blocks of all ranks


@dataclass
class PillionWorkerMetadata(KVConnectorWorkerMetadata):
    """Workers to scheduler."""

    jobs: dict[bytes, JobReport] = field(default_factory=dict)
    refused: str | None = None  # a rank runs uncached: nothing can be loaded or saved
    identity: str | None = None  # digest of the rank's namespace fields, told once

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Merges another rank's report of the same step into this one."""
        if not isinstance(other, PillionWorkerMetadata):
            return self
        for job, theirs in other.jobs.items():
            ours = self.jobs.get(job)
            self.jobs[job] = theirs if ours is None else merge(ours, theirs)
        self.refused = self.refused or other.refused
        if self.identity is not None and other.identity not in (None, self.identity):
            self.refused = self.refused or "ranks disagree about the model"
        self.identity = self.identity or other.identity
        return self


def merge(ours: JobReport, theirs: JobReport) -> JobReport:
    """Both reports of one job: a rank's failure is the job's."""
    counted = [report.blocks for report in (ours, theirs) if report.outcomes]
    return JobReport(
        max(ours.outcome, theirs.outcome),
        ours.outcomes + theirs.outcomes,
        ours.quiesced + theirs.quiesced,
        min(counted, default=0),
    )
