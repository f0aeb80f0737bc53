"""The worker's half: registers the KV cache, submits jobs, and says how each one ended (I2).

vLLM calls everything here from the worker's main thread; the native client has its own thread and answers at
once. Every load that the scheduler planned ends exactly once towards vLLM, whatever the client does: done,
failed, or past its deadline.

Streams (CUDA). A job may touch its blocks only after the work that is queued on them: for a save the forward
that fills them, for a load the zeroing and the late writes of whoever had the blocks before. The client records
an event on the stream that is named at submission, and the sidecar's copy waits for it. The stream that is
current when vLLM calls is the one which that work is queued on, in 0.30 to 0.33:

- All of a step's calls come from the worker's main thread, and neither runner enters another stream around them.
  Model Runner V1: `execute_model` runs `_update_states` (which zeroes: `_zero_block_ids`) and, inside
  `maybe_get_kv_connector_output`, `_model_forward`; that context manager's exit calls `start_load_kv`,
  `wait_for_save` and `get_transfer_results` (with speculative decoding `sample_tokens` calls `wait_for_save`, by
  `finalize_kv_connector`, once the drafter has run: after `get_transfer_results`). Model Runner V2: `execute_model` runs `update_requests` (`kv_block_zeroer`) and the model or
  `run_fullgraph`; `sample_tokens` calls `KVConnector.post_forward`. Steps without a forward
  (`kv_connector_no_forward`, `no_forward`) come after the zeroing, too.
- CUDA graphs are replayed on the current stream, piecewise and full; microbatches (`UBatchWrapper`,
  `begin_capturable_run`) compute on the stream that was current, and are joined before the call returns.
- Asynchronous scheduling adds copy streams for the output (`AsyncGPUModelRunnerOutput`, `AsyncOutput`), which
  wait for the current stream and are left again before `post_forward`. What a step still writes into blocks that
  a later step's plan gets was queued before that later step.
- Which stream that is may change once: `vllm.utils.torch_utils.current_stream` replaces the legacy default
  stream when it is first asked, and makes the new one wait for it. So it is asked for at every submission.

Layer hooks, which full graphs never call, are not used. A load is reported when its bytes are in memory, so
what vLLM launches after the report sees them.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pillion.vllm import canary, groups
from pillion.vllm import device as devices
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
from pillion.vllm.ranks import HASH_BYTES, part
from pillion.vllm.shards import Forms
from pillion.vllm.stats import PillionStats

# The client reports an outcome at the deadline; this much later the shim reports a failure without it.
OVERDUE_S = 1.0
_POLL_START_S = 0.005
# Going to sleep may wait this long for the sidecar to let go of the memory, waking up for it to come back.
UNREGISTER_WAIT_MS = 2000
WAKE_WAIT_MS = 2000


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
        self,
        *,
        client: Any,
        settings: Settings,
        kv_cache_config: Any,
        layout: str,
        identity: str,
        vllm_config: Any = None,
        device: str = devices.CPU,
        locate: Callable[[int], str] | None = None,  # device name of an address
        rank: int = 0,
        world: int = 1,
        twins: Sequence[tuple[int, int]] = (),  # of each group, see `identity.twins`
        forms: Forms | None = None,  # in which this rank finds blocks; None: only in its own
    ) -> None:
        self.client = client
        self.settings = settings
        self.stats = PillionStats()
        self.refused: str | None = None
        self._vllm_config = vllm_config
        self._config = kv_cache_config
        self._layout = layout
        self._identity: str | None = identity or None
        self._device = device
        self._locate = locate
        self._rank, self._world = rank, world
        self._twins = list(twins)
        self._forms = forms or Forms.own(0)
        self._cuda = devices.CUDA if device.startswith("gpu-") else None
        self._described: groups.Described | None = None
        self._registered = False
        self._waits_ms = 0
        self._told_refused = False
        self._mode: KvMemfdMode | None = None
        self._running: dict[bytes, Running] = {}
        self._reports: dict[bytes, JobReport] = {}
        self._finished: set[str] = set()
        self._failed: set[str] = set()
        self._loads_of: object = None  # the step's metadata whose loads are submitted
        self._saves_of: object = None
        self._overdue_at = float("inf")

    # ---- start

    def get_mem_pool_context(self) -> KvMemfdMode | None:
        """Puts vLLM's KV cache into a memfd, where vLLM asks (0.31 and later); on CUDA it stays vLLM's own."""
        if self.refused is not None or self._cuda is not None:
            return None
        self._mode = KvMemfdMode(self._config.kv_cache_tensors[0].size)
        return self._mode

    def register_kv_caches(self, caches: dict[str, Any], waits: bool) -> None:
        """Writes the canary, tells the client where the KV cache lies, waits for a sidecar (start only)."""
        if self.refused is not None:
            return
        try:
            found = groups.described(self._vllm_config, self._config, caches)
        except groups.Unserved as error:
            self.refuse(str(error))
            return
        if (reason := self._elsewhere(found.views[0][0])) is not None:
            self.refuse(reason)
            return
        self._described = found
        self._waits_ms = self.settings.start_wait_ms if waits else 0
        self._register(found, self._waits_ms)

    def _register(self, found: groups.Described, wait_ms: int) -> None:
        # `allocate_kv_cache`: one `torch.zeros` of exactly `tensor.size` bytes for all layers of all groups, on CUDA as
        # well (a part of a segment of torch's caching allocator, or of a VMM mapping with cumem). The client finds the
        # allocation around it and exports that.
        first = found.views[0][0]
        storage = first.untyped_storage()
        memfd = self._mode.taken() if self._mode is not None else None
        if memfd is not None and storage.data_ptr() != memfd.address:
            memfd = None
        if memfd is None and self._cuda is None:
            log_once(logging.INFO, "process_vm", "the KV cache is not in a memfd: process_vm is used")
        stays = self._cuda is None and groups.never_reads_block_0(self._config)
        try:
            self.client.describe(
                layout=self._layout,
                num_blocks=found.num_blocks,
                memory_bytes=storage.nbytes(),
                rank=self._rank,
                world=self._world,
                groups=found.groups,
                others=[tuple(shard) for shard in self._forms.others],
                memfd=memfd.fd if memfd is not None else -1,
                base=storage.data_ptr(),
                cuda=self._cuda is not None,
            )
            for index, views in enumerate(found.views):
                seed = int.from_bytes(os.urandom(8), "little")
                canary.write(views, found.num_blocks, seed)
                if self._cuda is not None:
                    # The client reads the canary on a stream of its own.
                    self._cuda.synchronize(first.device)
                self.client.check_canary(index, seed)
            self.client.register(cache_mode=self.settings.cache_mode)
            self._registered = True
            wait_ready(self.client, wait_ms, "worker")
            if not stays:
                self.client.canary_over()
        finally:
            # Refused or not: block tables point at block 0, and the words are NaN often enough.
            if not stays:
                for views in found.views:
                    canary.clear(views, found.num_blocks)

    def _elsewhere(self, cache: Any) -> str | None:
        """Whether the KV cache lies on another device than the one by whose name both halves look for a sidecar."""
        if self._locate is None:
            return None
        found = self._locate(cache.untyped_storage().data_ptr())
        if found == self._device:
            return None
        return (
            f"the KV cache lies on {found}, but NVML's index names {self._device}: set "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID, or CUDA_VISIBLE_DEVICES to the UUID of a whole GPU"
        )

    # ---- sleep (vLLM 0.33)

    # The scheduler's half need not be told: `EngineCore.sleep` (level 1 and 2) and `release_kv_cache_memory` call
    # `_reset_caches` first, which fails, and with it the call, while blocks are held, and calls our `reset_cache`: a
    # new epoch, in which nothing is found that was computed before. Level 0 resets nothing and unmaps nothing.
    # After a partial wake-up (weights alone, KV cache alone) the scheduler stays paused, and `restore_kv_caches`
    # comes with the KV cache. `reload_weights`, and `collective_rpc("sleep")` past the engine core, reset nothing:
    # whoever calls them must reset the prefix cache with `reset_connector`, as for vLLM's own cache.

    def unregister_kv_caches(self) -> None:
        """Lets go of the KV cache, which is about to be unmapped: ends all jobs, takes none until it is back."""
        if self._cuda is None or not self._registered:
            return
        self._registered = False
        gone = False
        try:
            gone = self.client.unregister(wait_ms=UNREGISTER_WAIT_MS)
        finally:
            if not gone:
                # vLLM unmaps whatever we say. A sidecar that has the memory open goes on with the old pages, which
                # nobody else sees; holds end as always, when it says that it has quiesced, or is gone.
                log_limited(
                    logging.WARNING,
                    "unregister",
                    "the sidecar has not let go of the sleeping engine's KV cache (%s): its memory is freed when it does, "
                    "and blocks of %d jobs stay held",
                    self.client.status(),
                    self.client.unquiesced(),
                )
            self._poll()

    def restore_kv_caches(self) -> None:
        """Registers the KV cache again, at the same addresses and with whatever is in it."""
        if self._cuda is None or self._registered or self._described is None or self.refused is not None:
            return
        self._register(self._described, min(self._waits_ms, WAKE_WAIT_MS))

    def refuse(self, reason: str) -> None:
        """Runs uncached from now on and tells the scheduler's half with the next step."""
        if self.refused is None:
            self.refused = reason
            log_once(logging.WARNING, "refused", "running uncached: %s", reason)

    # ---- one step

    def start_load_kv(self, meta: PillionMetadata) -> None:
        """Submits this step's loads, once, wherever in the step vLLM calls this from."""
        if meta is self._loads_of:
            return
        self._loads_of = meta
        for req_id in meta.ended:
            self._finish(req_id, ok=False)
        for plan in meta.loads:
            self._load(plan)

    def _load(self, plan: LoadPlan) -> None:
        if plan.form:
            plan = self._forms.spread(plan)
        deadline = time.monotonic() + plan.deadline_ms / 1000 + OVERDUE_S
        self._running[plan.job] = Running(plan.req_id, len(plan.blocks), deadline)
        self._overdue_at = min(self._overdue_at, deadline)
        if not self._takes_jobs():
            self._end(plan.job, FAILED, quiesced=True)
            return
        try:
            self.client.submit_load(
                plan.job,
                part(plan.lease, self._rank, self._world),
                part(plan.spaces, self._rank, self._world),
                plan.runs,
                plan.hashes,
                plan.blocks,
                plan.deadline_ms,
                stream=self._stream(),
            )
        except BaseException as error:
            if not survivable(error):
                raise
            self._not_taken(plan.job, "load", error)

    def wait_for_save(self, meta: PillionMetadata) -> None:
        """Submits this step's saves, once; the forward pass has run (CPU) or is queued when vLLM calls this."""
        if meta is self._saves_of:
            return
        self._saves_of = meta
        for plan in meta.saves:
            self._save(plan)

    def _takes_jobs(self) -> bool:
        """Whether a job may touch the engine's memory: not of a refused engine, and not while it sleeps."""
        return self.refused is None and (self._cuda is None or self._registered)

    def _stream(self) -> int | None:
        """The stream that the step's work is queued on (see the top of this file); None where there is none."""
        return self._cuda.stream() if self._cuda is not None else None

    def _save(self, plan: SavePlan) -> None:
        if plan.job in self._running:
            return
        if plan.shared:
            plan = own_part(plan, self._twins)
        deadline = time.monotonic() + plan.deadline_ms / 1000 + OVERDUE_S
        self._running[plan.job] = Running(None, len(plan.blocks), deadline)
        self._overdue_at = min(self._overdue_at, deadline)
        if not self._takes_jobs():
            self._end(plan.job, CANCELLED, quiesced=True)
            return
        if not plan.blocks:
            self._end(plan.job, DONE, quiesced=True)  # all of it is other ranks' part
            return
        try:
            self.client.submit_save(
                plan.job,
                part(plan.spaces, self._rank, self._world),
                plan.runs,
                plan.hashes,
                plan.blocks,
                plan.deadline_ms,
                stream=self._stream(),
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
            if not meta.forward:
                # vLLM 0.30 does not call it then. Else it does, behind the drafter's forward, which may be yet to come.
                self.wait_for_save(meta)
        if self._running:
            self._poll()
            self._report_overdue()
        if not self._finished:
            return set(), set()
        finished, failed = self._finished, self._failed
        self._finished, self._failed = set(), set()
        return finished, failed

    def _poll(self) -> None:
        try:
            for job, outcome, quiesced, blocks in self.client.poll():
                self._end(job, outcome, quiesced, blocks)
        except BaseException as error:
            if not survivable(error):
                raise
            self.stats.add("errors")
            log_limited(logging.ERROR, "poll", "polling the client failed: %r", error)

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


def own_part(plan: SavePlan, twins: Sequence[tuple[int, int]]) -> SavePlan:
    """What of a save this rank stores: of blocks that others hold as well, those whose hash names it."""
    runs: list[tuple[int, bytes, int]] = []
    hashes: list[bytes] = []
    blocks: list[int] = []
    at = 0
    for group, parent, count in plan.runs:
        copies, mine = twins[group]
        before = parent
        for index in range(at, at + count):
            own = plan.hashes[index * HASH_BYTES :][:HASH_BYTES]
            if int.from_bytes(own[:8], "little") % copies == mine:
                if runs and runs[-1][0] == group and hashes and hashes[-1] == before and before:
                    runs[-1] = (group, runs[-1][1], runs[-1][2] + 1)
                else:
                    runs.append((group, before, 1))
                hashes.append(own)
                blocks.append(plan.blocks[index])
            before = own
        at += count
    return plan._replace(runs=runs, hashes=b"".join(hashes), blocks=blocks)


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
