"""The scheduler's half: what is promised, what is planned, and which blocks are held (I3, I5, I8).

One owner of all state, no thread and no lock: vLLM calls everything here from the scheduler's main thread.

A *hold* is an extra reference in vLLM's block pool on the blocks of a job, taken when the job is planned and
dropped when every rank said that nothing touches the blocks any more. It is what keeps a late write out of
reused memory, whatever becomes of the request.
"""

import heapq
import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pillion.vllm.config import Settings
from pillion.vllm.log import log_limited, log_once, survivable
from pillion.vllm.metadata import DONE, LoadPlan, PillionMetadata, PillionWorkerMetadata, SavePlan
from pillion.vllm.stats import PillionStats

DIGEST = 32
# A lease that its request has not used for so long is asked for anew before tokens are promised on it.
LEASE_FRESH_S = 20.0
# All waiting for grants inside one scheduling step: many requests may be asked about in one.
STEP_WAIT_US = 800
# A hold this young is about to end by itself, so that the scheduler rather waits than preempts a request.
FREES_SOON_S = 0.1
# How long after a job's deadline the idle engine keeps stepping to see its blocks come back.
SPIN_AFTER_DEADLINE_S = 60.0
ENDED_LOADS_KEPT = 1024


class Req:
    """What is known about a live request."""

    __slots__ = (
        "asked_at",
        "attempted",
        "due",
        "first_poll",
        "granted",
        "lease",
        "loaded_tokens",
        "loading",
        "no_save",
        "promised",
        "request",
        "saved",
        "ticket",
    )

    def __init__(self, request: Any) -> None:
        self.request = request
        self.ticket = 0  # of a lease that no job uses yet
        self.asked_at = 0.0
        self.first_poll = 0.0
        self.granted = -1  # blocks granted; -1 while there is no answer
        self.lease = b""
        self.promised: tuple[int, int] | None = None  # (first block, blocks) of the last answer
        self.attempted = False  # one load attempt per request, ever
        self.loading: bytes | None = None  # job id
        self.loaded_tokens = 0
        self.saved = 0  # blocks of the prompt that are stored or on their way
        self.no_save = False
        self.due = -1  # step in which its next block can be full, at the earliest


@dataclass
class Job:
    """A planned load or save, from plan to quiesced on all ranks."""

    load: bool
    req_id: str
    blocks: list[Any]  # vLLM's KVCacheBlock objects, held
    hashes: list[bytes]
    ticket: int
    planned: float
    deadline: float
    outcomes: int = 0
    failed: bool = False
    quiesced: int = 0
    stored: int = -1


class SchedulerHalf:
    """Lookups, leases, plans and holds of one engine."""

    def __init__(
        self,
        *,
        client: Any,
        settings: Settings,
        block_tokens: int,
        block_bytes: int,
        num_blocks: int,
        loads: bool,
        saves: bool,
        identity: str,
        world_size: int = 1,
    ) -> None:
        self.client = client
        self.settings = settings
        self.stats = PillionStats()
        self.refused: str | None = None
        self.held = 0
        self._promised_blocks = 0  # of requests whose load is promised and not planned yet
        # Block 0 is vLLM's null block, which nobody can hold.
        self.held_max = max(1, int((num_blocks - 1) * settings.max_hold_fraction))
        self._bs = block_tokens
        self._block_bytes = block_bytes
        self._loads, self._saves = loads, saves
        self._identity = identity
        self._world = world_size
        self._pool: Any = None
        self._reqs: dict[str, Req] = {}
        self._jobs: dict[bytes, Job] = {}
        self._open_loads: dict[str, bytes | None] = {}  # request ids that vLLM waits for -> job
        self._ended_loads: deque[str] = deque(maxlen=ENDED_LOADS_KEPT)
        self._to_load: list[LoadPlan] = []
        self._to_save: list[SavePlan] = []
        self._to_end: list[str] = []
        self._in_flight: set[bytes] = set()  # hashes that a save of this epoch carries
        self._due: list[tuple[int, str]] = []
        self._tick = 0
        self._wait_left_us = STEP_WAIT_US
        self._spin_until = 0.0
        self._prefix = os.urandom(8)
        self._minted = 0

    # ---- attach and detach

    def bind(self, block_pool: Any) -> None:
        """Takes vLLM's block pool; without it nothing can be held, so nothing is loaded or saved."""
        self._pool = block_pool

    def refuse(self, reason: str) -> None:
        """Runs uncached from now on. Jobs that are under way still end."""
        if self.refused is None:
            self.refused = reason
            log_once(logging.WARNING, "refused", "running uncached: %s", reason)

    def close(self) -> None:
        """Ends the client's thread; holds stay as they are, the engine is going away."""
        self.client.close()

    # ---- lookup

    def on_new_request(self, request: Any) -> None:
        """Asks for a lease over all full blocks of the prompt that a load could use."""
        if self.refused is not None or self._pool is None:
            return
        state = Req(request)
        self._reqs[request.request_id] = state
        hashes = request.block_hashes
        if hashes and len(hashes[0]) != DIGEST:
            self.refuse(f"block hashes have {len(hashes[0])} bytes, expected {DIGEST}")
            return
        if getattr(request, "lora_request", None) is not None:
            # vLLM's hash names an adapter by name and path, not by its weights: other weights under the
            # same path would hit.
            log_once(logging.WARNING, "lora", "requests with LoRA adapters run uncached")
            state.no_save = state.attempted = True
            return
        if not self._loads or getattr(request, "skip_reading_prefix_cache", False):
            state.attempted = True
            return
        self._ask(state)

    def _ask(self, state: Req) -> None:
        hashes = state.request.block_hashes
        # One token is always left to compute, so that a block that others may share is never rewritten.
        usable = min((state.request.num_tokens - 1) // self._bs, len(hashes))
        state.granted = 0
        state.ticket = self.client.lease(b"".join(hashes[:usable])) if usable > 0 else 0
        state.asked_at = time.monotonic()
        state.granted = -1 if state.ticket else 0

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond `num_computed_tokens` that are granted; (None, False) while that is not known yet."""
        state = self._reqs.get(request.request_id)
        if state is None or state.attempted or self.refused is not None:
            return 0, False
        now = time.monotonic()
        if not state.first_poll:
            state.first_poll = now
            self.stats.add("lookups")
        if state.ticket and now - state.asked_at > LEASE_FRESH_S:
            self._release(state)
            self._ask(state)
            state.first_poll = now
        if state.granted < 0 and not self._poll(state, now):
            return None, False
        return self._promise(state, num_computed_tokens, now)

    def _poll(self, state: Req, now: float) -> bool:
        """Whether the answer about the lease is there (or given up)."""
        wait_us = 0
        if now == state.first_poll and self._wait_left_us > 0:
            wait_us = min(self.settings.lookup_wait_us, self._wait_left_us)
        answer = self.client.lease_poll(state.ticket, wait_us)
        if wait_us:
            self._wait_left_us -= min(wait_us, int((time.monotonic() - now) * 1e6))
        if answer is not None:
            state.granted, state.lease = answer
            return True
        if now - state.first_poll < self.settings.lookup_deadline_ms / 1000:
            return False
        self.stats.add("lookup_timeouts")
        state.granted = 0
        return True

    def _promise(self, state: Req, num_computed_tokens: int, now: float) -> tuple[int | None, bool]:
        first = num_computed_tokens // self._bs
        usable = state.granted - first
        self._set_promise(state, None)
        if usable <= 0:
            # Blocks that the engine holds itself may be evicted before the request is admitted, and then
            # the rest of the lease counts again: it is given back once the request runs.
            return 0, False
        room = self.held_max - self.held - self._promised_blocks
        if room < usable:
            waited = now - state.first_poll
            if self.held and waited < self.settings.lookup_deadline_ms / 1000:
                return None, False
            self.stats.add("held_skips")
            usable = room
        if usable <= 0:
            self._give_up(state)
            return 0, False
        self._set_promise(state, (first, usable))
        return usable * self._bs, True

    def _set_promise(self, state: Req, promise: tuple[int, int] | None) -> None:
        """Keeps the sum of all promises, so that together with the holds they stay below the limit."""
        before = state.promised[1] if state.promised else 0
        self._promised_blocks += (promise[1] if promise else 0) - before
        state.promised = promise

    def _give_up(self, state: Req) -> None:
        """Ends the request's one attempt without a load."""
        state.attempted = True
        self._set_promise(state, None)
        self._release(state)

    def _release(self, state: Req) -> None:
        ticket, state.ticket = state.ticket, 0
        self._release_ticket(ticket)

    def _release_ticket(self, ticket: int) -> None:
        """Gives a lease back. An error ends here: what comes after a release must happen anyway."""
        if not ticket:
            return
        try:
            self.client.release(ticket)
        except BaseException as error:
            if not survivable(error):
                raise
            self.stats.add("errors")
            log_limited(logging.ERROR, "release", "releasing a lease failed: %r", error)

    # ---- loads

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plans the load of exactly the external range, or gives the lease back where there is none."""
        state = self._reqs.get(request.request_id)
        if num_external_tokens <= 0:
            if state is not None and not state.attempted:
                self._give_up(state)
            return
        if state is None or not state.ticket or state.promised is None or self.refused is not None:
            self._lose(request, f"{num_external_tokens} external tokens are not promised any more")
            return
        first, promised = state.promised
        count, rest = divmod(num_external_tokens, self._bs)
        namespace = self.client.namespace_id()
        ids = blocks.get_block_ids()[0][first : first + count]
        if rest or count > promised or len(ids) != count or 0 in ids:
            self._lose(request, f"expected {promised} blocks from block {first} on, got {count} as {ids}")
        elif namespace is None:
            self._lose(request, "the sidecar went away between grant and load")
        else:
            self._plan_load(state, first, ids, namespace)

    def _lose(self, request: Any, reason: str) -> None:
        log_limited(logging.WARNING, "lost", "a promised load is recomputed: %s", reason)
        self.fail_load(request.request_id)

    def _plan_load(self, state: Req, first: int, ids: list[int], namespace: bytes) -> None:
        request = state.request
        deadline_ms = self.settings.load_deadline(len(ids) * self._block_bytes)
        hashes = request.block_hashes[first : first + len(ids)]
        self.client.lease_used(state.ticket)
        job = self._open_job(True, state, ids, hashes, deadline_ms)
        self._set_promise(state, None)
        state.attempted, state.ticket, state.loading = True, 0, job
        self._open_loads[request.request_id] = job
        self._to_load.append(
            LoadPlan(
                job, request.request_id, state.lease, first, namespace, b"".join(hashes), ids, deadline_ms
            )
        )
        self.stats.add("hits")

    def fail_load(self, request_id: str) -> None:
        """vLLM waits for a load of this request that cannot be planned: the workers report its failure."""
        if request_id not in self._open_loads:
            self._open_loads[request_id] = None
            self._to_end.append(request_id)
            self.stats.add("load_failures")
        state = self._reqs.get(request_id)
        if state is not None and state.loading is None:
            self._give_up(state)

    def _open_job(
        self, load: bool, state: Req, ids: Sequence[int], hashes: list[bytes], deadline_ms: int
    ) -> bytes:
        """Takes the hold and mints the job's id."""
        blocks = [self._pool.blocks[block_id] for block_id in ids]
        now = time.monotonic()
        self._minted += 1
        job = self._prefix + self._minted.to_bytes(8, "big")
        deadline = now + deadline_ms / 1000
        self._pool.touch(blocks)
        self.held += len(blocks)
        ticket = state.ticket if load else 0
        self._jobs[job] = Job(load, state.request.request_id, blocks, list(hashes), ticket, now, deadline)
        self._spin_until = max(self._spin_until, deadline + SPIN_AFTER_DEADLINE_S)
        return job

    def _free(self, job_id: bytes) -> None:
        """Drops a job's hold. The last blocks of a prompt come first: they are evicted first."""
        job = self._jobs.pop(job_id)
        self.held -= len(job.blocks)
        self._in_flight.difference_update(job.hashes)
        self._pool.free_blocks(reversed(job.blocks))
        self._release_ticket(job.ticket)

    # ---- one step

    def build_connector_meta(self, output: Any) -> PillionMetadata:
        """This step's jobs. Saves are planned here, for blocks that are full when the step has run."""
        self._wait_left_us = STEP_WAIT_US
        if output.num_scheduled_tokens and self._saves and self.refused is None and self._pool is not None:
            try:
                self._plan_saves(output)
            except BaseException as error:  # loads that are planned must go out whatever happens here
                if not survivable(error):
                    raise
                self.stats.add("errors")
                log_limited(logging.ERROR, "plan_saves", "planning saves failed", exc_info=True)
        if not (self._to_load or self._to_save or self._to_end):
            return PillionMetadata()
        meta = PillionMetadata(self._to_load, self._to_save, self._to_end)
        self._to_load, self._to_save, self._to_end = [], [], []
        return meta

    def _plan_saves(self, output: Any) -> None:
        """Looks only at requests that can have filled a block: a plain decode step costs one comparison.

        A request that gets one token a step cannot fill its next block before as many steps as tokens are
        missing, so it waits in a heap; whatever was scheduled with more tokens, is new, or comes back from
        preemption is looked at.
        """
        self._tick += 1
        scheduled = output.num_scheduled_tokens
        look: list[str] = []
        due = self._due
        while due and due[0][0] <= self._tick:
            tick, req_id = heapq.heappop(due)
            state = self._reqs.get(req_id)
            if state is not None and state.due == tick:
                look.append(req_id)
        if output.total_num_scheduled_tokens != len(scheduled):
            look.extend(req_id for req_id, tokens in scheduled.items() if tokens > 1)
        look.extend(new.req_id for new in output.scheduled_new_reqs)
        look.extend(output.scheduled_cached_reqs.resumed_req_ids)
        if not look:
            return
        ready = self.client.ready()
        for req_id in dict.fromkeys(look):
            if (state := self._reqs.get(req_id)) is None or state.no_save:
                continue
            if req_id not in scheduled and state.request.num_computed_tokens == 0:
                continue  # preempted: looked at again when it is resumed
            if not ready or req_id not in scheduled:
                self._look_again(state, req_id, 1 if ready else 16)
                continue
            self._advance(state, req_id, scheduled[req_id], output.kv_connector_block_state)

    def _look_again(self, state: Req, req_id: str, steps: int) -> None:
        state.due = self._tick + steps
        heapq.heappush(self._due, (state.due, req_id))

    def _advance(self, state: Req, req_id: str, tokens: int, tables: Any) -> None:
        request = state.request
        computed = request.num_computed_tokens + tokens
        full = min(computed // self._bs, len(request.block_hashes))
        complete = True
        if full > state.saved:
            table = tables.get_block_ids(req_id)
            complete = table is not None and self._save(state, table[0], full)
        if not complete:
            self._look_again(state, req_id, 8)
        else:
            # With asynchronous scheduling a block's hash is known a step after its last token is scheduled.
            self._look_again(state, req_id, max(1, (full + 1) * self._bs - computed))

    def _save(self, state: Req, table: Sequence[int], full: int) -> bool:
        """Plans saves of the blocks up to `full` that the sidecar lacks; False where some had to wait."""
        namespace = self.client.namespace_id()
        if namespace is None:
            return False
        hashes = state.request.block_hashes
        start, full = state.saved, min(full, len(table))
        missing = self.client.absent(b"".join(hashes[start:full]))
        run: list[int] = []
        for index in (start + offset for offset in missing):
            if hashes[index] in self._in_flight or table[index] == 0:
                continue
            if run and index != run[-1] + 1:
                self._plan_save(state, table, run, namespace)
                run = []
            if self.held + len(run) >= self.held_max:
                self.stats.add("held_skips")
                if run:
                    self._plan_save(state, table, run, namespace)
                state.saved = index
                return False
            run.append(index)
        if run:
            self._plan_save(state, table, run, namespace)
        state.saved = full
        return True

    def _plan_save(self, state: Req, table: Sequence[int], run: list[int], namespace: bytes) -> None:
        first, last = run[0], run[-1] + 1
        hashes = state.request.block_hashes[first:last]
        ids = list(table[first:last])
        parent = bytes(state.request.block_hashes[first - 1]) if first else b""
        deadline_ms = self.settings.save_deadline_ms
        job = self._open_job(False, state, ids, hashes, deadline_ms)
        self._in_flight.update(hashes)
        self._to_save.append(SavePlan(job, namespace, parent, b"".join(hashes), ids, deadline_ms))

    # ---- what workers report

    def update_connector_output(self, output: Any) -> None:
        """Ends jobs and holds, and keeps back reports that would kill vLLM's scheduler."""
        meta = output.kv_connector_worker_meta
        if isinstance(meta, PillionWorkerMetadata):
            if meta.refused is not None:
                self.refuse(f"the worker runs uncached: {meta.refused}")
            if meta.identity not in (None, self._identity):
                self.refuse("scheduler and worker disagree about the model's identity")
            for job_id, report in meta.jobs.items():
                self._report(job_id, report)
        if output.finished_recving:
            self._filter_finished(output)

    def _report(self, job_id: bytes, report: Any) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            return
        if report.outcomes:
            job.outcomes += report.outcomes
            job.failed |= report.outcome != DONE
            job.stored = report.blocks if job.stored < 0 else min(job.stored, report.blocks)
            if job.outcomes == self._world:
                self._end(job_id, job)
        job.quiesced += report.quiesced
        if job.quiesced >= self._world:
            self._free(job_id)

    def _end(self, job_id: bytes, job: Job) -> None:
        state = self._reqs.get(job.req_id)
        if not job.load:
            self.stats.add("save_failures" if job.failed else "saves")
            if job.stored > 0:
                self.stats.add("saved_blocks", job.stored)
            return
        if state is not None and state.loading == job_id:
            state.loading = None
        if job.failed:
            self.stats.add("load_failures")
            return
        tokens = len(job.blocks) * self._bs
        self.stats.add("loads")
        self.stats.add("loaded_tokens", tokens)
        if state is not None:
            state.loaded_tokens = tokens

    def _filter_finished(self, output: Any) -> None:
        """Drops repeated reports of loads of ours: vLLM asserts that it still waits for each id it gets."""
        for req_id in list(output.finished_recving):
            if req_id in self._open_loads:
                del self._open_loads[req_id]
                self._ended_loads.append(req_id)
            elif req_id in self._ended_loads:
                output.finished_recving.discard(req_id)
                log_limited(logging.ERROR, "twice", "the load of request %s was reported twice", req_id)

    # ---- the end of a request

    def request_finished(self, request: Any, block_ids: Sequence[int]) -> tuple[bool, dict[str, Any] | None]:
        """Never delays: jobs hold their blocks themselves. Tells how many tokens were loaded."""
        state = self._reqs.pop(request.request_id, None)
        if state is None:
            return False, None
        params = {"pillion": {"loaded_tokens": state.loaded_tokens}}
        unproven = state.loading is not None or state.promised is not None
        self._set_promise(state, None)
        try:
            self._cancel_unsent(state)
            if not unproven:
                self._save_rest(state, block_ids)
        finally:
            self._release(state)
        return False, params

    def _save_rest(self, state: Req, block_ids: Sequence[int]) -> None:
        """Blocks whose hash came to be known only now (asynchronous scheduling)."""
        if state.no_save or not self._saves or self.refused is not None:
            return
        request = state.request
        full = min(request.num_computed_tokens // self._bs, len(request.block_hashes), len(block_ids))
        if full > state.saved and self.client.ready():
            self._save(state, block_ids, full)

    def _cancel_unsent(self, state: Req) -> None:
        """A load that no worker was told about: nothing writes its blocks, but vLLM waits for its end."""
        for index, plan in enumerate(self._to_load):
            if plan.job == state.loading:
                del self._to_load[index]
                self._free(plan.job)
                self._open_loads[plan.req_id] = None
                self._to_end.append(plan.req_id)
                return

    # ---- what vLLM asks between steps

    def has_pending_push_work(self) -> bool:
        """Whether the idle engine must keep stepping so that holds end."""
        if self._to_save or self._to_end or self._to_load:
            return True
        return bool(self._jobs) and time.monotonic() < self._spin_until

    def has_pending_block_frees(self) -> bool:
        """Whether waiting a moment frees blocks: young holds on blocks that nobody else uses."""
        young = time.monotonic() - FREES_SOON_S
        return any(
            job.planned > young and any(block.ref_cnt == 1 for block in job.blocks)
            for job in self._jobs.values()
        )

    def reset_cache(self) -> bool | None:
        """Starts a new epoch: nothing that was saved before is seen again.

        Requests that live through the reset neither load nor save: their blocks are of the old epoch.
        """
        # First: whatever happens then, what they have is of the old epoch.
        for state in self._reqs.values():
            state.no_save = True
            state.granted = 0
            self._release(state)
        self._in_flight.clear()
        self.client.new_epoch()
        return True
