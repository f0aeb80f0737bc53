"""The worker's half: registers the KV cache, submits jobs, and says how each one ended (I2).

vLLM calls everything here from the worker's main thread; the native client has its own thread and answers at
once. Every load that the scheduler planned ends exactly once towards vLLM, whatever the client does: done,
failed, or past its deadline.
"""

import logging
import os
import time
from dataclasses import dataclass
from typing import Any

from pillion.vllm import canary
from pillion.vllm.config import Settings
from pillion.vllm.log import log_limited, log_once, logger, survivable
from pillion.vllm.memory import KvMemfdMode
from pillion.vllm.metadata import (
    CANCELLED,
    DONE,
    FAILED,
    NONE,
    JobReport,
    LoadPlan,
    PillionMetadata,
    PillionWorkerMetadata,
    SavePlan,
    merge,
)
from pillion.vllm.stats import PillionStats

# The client reports an outcome at the deadline; this much later the shim reports a failure without it.
OVERDUE_S = 1.0
_POLL_START_S = 0.005


@dataclass
class Running:
    """A job that the client has, until it has ended and quiesced."""

    req_id: str | None  # of a load that vLLM waits for; None for a save
    blocks: int
    overdue: float
    reported: bool = False


class WorkerHalf:
    """Jobs of one rank."""

    def __init__(
        self, *, client: Any, settings: Settings, kv_cache_config: Any, layout: str, identity: str
    ) -> None:
        self.client = client
        self.settings = settings
        self.stats = PillionStats()
        self.refused: str | None = None
        self._config = kv_cache_config
        self._layout = layout
        self._identity: str | None = identity or None
        self._told_refused = False
        self._mode: KvMemfdMode | None = None
        self._running: dict[bytes, Running] = {}
        self._reports: dict[bytes, JobReport] = {}
        self._finished: set[str] = set()
        self._failed: set[str] = set()
        self._submitted: object = None  # the step's metadata whose loads are submitted
        self._overdue_at = float("inf")

    # ---- start

    def get_mem_pool_context(self) -> KvMemfdMode | None:
        """Puts vLLM's KV cache into a memfd, where vLLM asks (0.31 and later)."""
        if self.refused is not None:
            return None
        self._mode = KvMemfdMode(self._config.kv_cache_tensors[0].size)
        return self._mode

    def register_kv_caches(self, caches: dict[str, Any], waits: bool) -> None:
        """Writes the canary, tells the client where the KV cache lies, waits for a sidecar (start only)."""
        if self.refused is not None:
            return
        spec = self._config.kv_cache_groups[0].kv_cache_spec
        tensor = self._config.kv_cache_tensors[0]
        if (reason := self._unexpected(caches, spec)) is not None:
            self.refuse(reason)
            return
        storage = caches[tensor.layers[0]].untyped_storage()
        memfd = self._mode.taken() if self._mode is not None else None
        if memfd is not None and storage.data_ptr() != memfd.address:
            memfd = None
        if memfd is None:
            log_once(logging.INFO, "process_vm", "the KV cache is not in a memfd: process_vm is used")
        seed = int.from_bytes(os.urandom(8), "little")
        canary.write(caches, tensor.layers, seed)
        self.client.register(
            layout=self._layout,
            num_blocks=self._config.num_blocks,
            block_tokens=spec.block_size,
            dtype=str(spec.dtype),
            kind=type(spec).__name__,
            heads=spec.num_heads,
            states=spec.num_states,
            content_bytes=spec.state_content_size_bytes,
            page_bytes=spec.page_size_bytes,
            tensors=[
                (tensor.size, tensor.offset, tensor.layer_stride, tensor.block_stride, list(tensor.layers))
            ],
            memory_bytes=storage.nbytes(),
            memfd=memfd.fd if memfd is not None else -1,
            base=storage.data_ptr(),
            canary_seed=seed,
        )
        wait_ready(self.client, self.settings.start_wait_ms if waits else 0, "worker")

    def _unexpected(self, caches: dict[str, Any], spec: Any) -> str | None:
        """What about the registered tensors is not as the configuration says."""
        tensor = self._config.kv_cache_tensors[0]
        missing = [name for name in tensor.layers if name not in caches]
        if missing:
            return f"layer {missing[0]} has no KV cache tensor"
        content = spec.state_content_size_bytes
        for index, name in enumerate(tensor.layers):
            view = caches[name]
            size = view.element_size()
            shape = (view.shape[0], view.shape[1], view.shape[2], view.shape[3] * size)
            expected = (self._config.num_blocks, spec.num_heads, spec.num_states, content)
            if shape != expected:
                return f"KV cache of {name} is [B, H, N, C bytes] = {shape}, expected {expected}"
            offset = view.data_ptr() - view.untyped_storage().data_ptr()
            if view.stride(0) * size != tensor.block_stride or offset != (
                tensor.offset + index * tensor.layer_stride
            ):
                return f"KV cache of {name} does not lie where its KVCacheTensor says"
        return None

    def refuse(self, reason: str) -> None:
        """Runs uncached from now on and tells the scheduler's half with the next step."""
        if self.refused is None:
            self.refused = reason
            log_once(logging.WARNING, "refused", "running uncached: %s", reason)

    # ---- one step

    def start_load_kv(self, meta: PillionMetadata) -> None:
        """Submits this step's loads, once, wherever in the step vLLM calls this from."""
        if meta is self._submitted:
            return
        self._submitted = meta
        for req_id in meta.ended:
            self._finish(req_id, ok=False)
        for plan in meta.loads:
            self._load(plan)

    def _load(self, plan: LoadPlan) -> None:
        deadline = time.monotonic() + plan.deadline_ms / 1000 + OVERDUE_S
        self._running[plan.job] = Running(plan.req_id, len(plan.blocks), deadline)
        self._overdue_at = min(self._overdue_at, deadline)
        if self.refused is not None:
            self._end(plan.job, FAILED, quiesced=True)
            return
        try:
            self.client.submit_load(
                plan.job, plan.lease, plan.first, plan.namespace, plan.hashes, plan.blocks, plan.deadline_ms
            )
        except BaseException as error:
            if not survivable(error):
                raise
            self._not_taken(plan.job, "load", error)

    def wait_for_save(self, meta: PillionMetadata) -> None:
        """Submits this step's saves; on CPU the forward pass has run when vLLM calls this."""
        for plan in meta.saves:
            self._save(plan)

    def _save(self, plan: SavePlan) -> None:
        if plan.job in self._running:
            return
        deadline = time.monotonic() + plan.deadline_ms / 1000 + OVERDUE_S
        self._running[plan.job] = Running(None, len(plan.blocks), deadline)
        self._overdue_at = min(self._overdue_at, deadline)
        if self.refused is not None:
            self._end(plan.job, CANCELLED, quiesced=True)
            return
        try:
            self.client.submit_save(
                plan.job, plan.namespace, plan.parent, plan.hashes, plan.blocks, plan.deadline_ms
            )
        except BaseException as error:
            if not survivable(error):
                raise
            self._not_taken(plan.job, "save", error)

    def _not_taken(self, job: bytes, what: str, error: BaseException) -> None:
        """Ends a job that the client did not take.

        `ValueError` comes before the client does anything, so nothing will touch the blocks. After any other
        error nobody can know: the hold stays until the client says that the job has quiesced (I3).
        """
        log_limited(logging.ERROR, f"submit_{what}", "submitting a %s failed: %r", what, error)
        self.stats.add("errors")
        self._end(job, FAILED, quiesced=isinstance(error, ValueError))

    def _end(self, job_id: bytes, outcome: int, quiesced: bool, blocks: int = 0) -> None:
        """Takes one event of a job: each of outcome and quiesced counts once."""
        job = self._running.get(job_id)
        if job is None:
            return
        counts = outcome != NONE and not job.reported
        if counts:
            if job.req_id is not None:
                if outcome == DONE and blocks != job.blocks:
                    outcome = FAILED
                self._finish(job.req_id, ok=outcome == DONE)
            job.reported = True
        report = JobReport(outcome if counts else NONE, int(counts), int(quiesced), blocks if counts else 0)
        before = self._reports.get(job_id)
        self._reports[job_id] = report if before is None else merge(before, report)
        if quiesced:
            if not job.reported:
                self._end(job_id, FAILED, quiesced=False)
            del self._running[job_id]

    def _finish(self, req_id: str, ok: bool) -> None:
        self._finished.add(req_id)
        if not ok:
            self._failed.add(req_id)

    def take_results(self, meta: PillionMetadata | None) -> tuple[set[str], set[str]]:
        """(requests whose load ended, those of them that failed) since the last call."""
        if meta is not None:
            self.start_load_kv(meta)
        if self._running:
            try:
                for job, outcome, quiesced, blocks in self.client.poll():
                    self._end(job, outcome, quiesced, blocks)
            except BaseException as error:
                if not survivable(error):
                    raise
                self.stats.add("errors")
                log_limited(logging.ERROR, "poll", "polling the client failed: %r", error)
            self._report_overdue()
        if not self._finished:
            return set(), set()
        finished, failed = self._finished, self._failed
        self._finished, self._failed = set(), set()
        return finished, failed

    def _report_overdue(self) -> None:
        """Fails jobs whose outcome the client never told. Their holds stay until it says quiesced."""
        now = time.monotonic()
        if now < self._overdue_at:
            return
        waiting = [(job_id, job) for job_id, job in self._running.items() if not job.reported]
        for job_id, job in waiting:
            if now >= job.overdue:
                log_limited(logging.ERROR, "overdue", "the client told no outcome at the deadline of a job")
                self._end(job_id, FAILED, quiesced=False)
        self._overdue_at = min((job.overdue for _, job in waiting if not job.reported), default=float("inf"))

    def take_meta(self) -> PillionWorkerMetadata | None:
        """What the scheduler's half must know of this step, or None."""
        if not self._reports and self._identity is None and (self.refused is None or self._told_refused):
            return None
        meta = PillionWorkerMetadata(self._reports, self.refused, self._identity)
        self._reports, self._identity, self._told_refused = {}, None, self.refused is not None
        return meta

    def close(self) -> None:
        """Ends the client's thread and the memfd; the engine is going away."""
        if self.client is not None:
            self.client.close()
        if self._mode is not None and self._mode.memfd is not None:
            self._mode.memfd.close()


def wait_ready(client: Any, wait_ms: int, who: str) -> bool:
    """Waits for the sidecar while the engine starts; what comes later attaches by itself."""
    until = time.monotonic() + wait_ms / 1000
    while not client.ready():
        status = client.status()
        if status.startswith("refused") or time.monotonic() >= until:
            logger.warning("pillion: %s starts uncached: %s", who, status)
            return False
        time.sleep(_POLL_START_S)
    logger.info("pillion: %s is attached to its sidecar", who)
    return True
