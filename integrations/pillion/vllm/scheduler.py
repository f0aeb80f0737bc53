"""The scheduler's half: what is promised, what is planned, and which blocks are held (I3, I5, I8).

One owner of all state, no thread and no lock: vLLM calls everything here from the scheduler's main thread. What a hit
needs of each KV cache group is in `hits`, what is saved in `saves`, and the extra references on blocks in `holds`.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from pillion.vllm.adapters import Adapters
from pillion.vllm.config import Settings
from pillion.vllm.hits import Hits
from pillion.vllm.holds import Holds, Job
from pillion.vllm.log import log_limited, log_once, survivable
from pillion.vllm.metadata import LoadPlan, PillionMetadata, PillionWorkerMetadata
from pillion.vllm.request import Req
from pillion.vllm.saves import Saves
from pillion.vllm.stats import PillionStats

DIGEST = 32
# A lease that its request has not used for so long is asked for anew before tokens are promised on it.
LEASE_FRESH_S = 20.0
# All waiting for grants inside one scheduling step: many requests may be asked about in one.
STEP_WAIT_US = 800
# One lease, and another one where the first was granted in part, or for fewer blocks than may be held.
ASKS = 2
ENDED_LOADS_KEPT = 1024


class SchedulerHalf:
    """Lookups, leases, plans and holds of one engine."""

    def __init__(
        self,
        *,
        client: Any,
        settings: Settings,
        hits: Hits,
        num_blocks: int,
        loads: bool,
        saves: bool,
        identity: str,
        world_size: int = 1,
        adapters: Adapters | None = None,
        twins: int = 1,
        forms: int = 1,  # in which blocks may be stored, see `shards`
    ) -> None:
        self.client = client
        self.settings = settings
        self.stats = PillionStats()
        self.refused: str | None = None
        self.holds = Holds(num_blocks, settings.max_hold_fraction)
        self._promised_blocks = 0  # of requests whose load is promised and not planned yet
        self._hits = hits
        self._saves: Saves | None = None
        if saves:
            self._saves = Saves(
                client=client,
                hits=hits,
                holds=self.holds,
                stats=self.stats,
                deadline_ms=settings.save_deadline_ms,
                twins=twins,
            )
        self._loads = loads
        self._identity = identity
        self._world = world_size
        self._adapters = adapters
        self._forms = forms
        self._reqs: dict[str, Req] = {}
        self._open_loads: dict[str, bytes | None] = {}  # request ids that vLLM waits for -> job
        self._ended_loads: deque[str] = deque(maxlen=ENDED_LOADS_KEPT)
        self._to_load: list[LoadPlan] = []
        self._to_end: list[str] = []
        self._wait_left_us = STEP_WAIT_US

    # ---- attach and detach

    def bind(self, block_pool: Any) -> None:
        """Takes vLLM's block pool; without it nothing can be held, so nothing is loaded or saved."""
        hashed = getattr(block_pool, "hash_block_size", self._hits.hash_tokens)
        if hashed != self._hits.hash_tokens:
            self.refuse(f"block hashes cover {hashed} tokens, expected {self._hits.hash_tokens}")
        self.holds.pool = block_pool

    def refuse(self, reason: str) -> None:
        """Runs uncached from now on. Jobs that are under way still end."""
        if self.refused is None:
            self.refused = reason
            log_once(logging.WARNING, "refused", "running uncached: %s", reason)

    def close(self) -> None:
        """Ends the client's thread; holds stay as they are, the engine is going away."""
        if self._adapters is not None:
            self._adapters.close()
        self.client.close()

    # ---- lookup

    def on_new_request(self, request: Any) -> None:
        """Asks for a lease over all blocks that a load could use."""
        if self.refused is not None or self.holds.pool is None:
            return
        state = Req(request, len(self._hits.groups))
        self._reqs[request.request_id] = state
        hashes = request.block_hashes
        if hashes and len(hashes[0]) != DIGEST:
            self.refuse(f"block hashes have {len(hashes[0])} bytes, expected {DIGEST}")
            return
        lora = getattr(request, "lora_request", None)
        if lora is not None:
            state.adapter = self._adapters.fingerprint(lora) if self._adapters is not None else None
            if state.adapter is None:
                state.no_save = state.attempted = True
                return
        if not self._loads or getattr(request, "skip_reading_prefix_cache", False):
            state.attempted = True
            return
        self._ask(state)

    def _ask(self, state: Req, limit: int | None = None) -> None:
        """Asks for a lease on the longest hit that the tables promise."""
        hits, keys = self._hits, state.keys()
        tokens = hits.usable(state.request.num_tokens, len(keys))
        if limit is not None:
            tokens = min(tokens, limit)
        state.asks += 1
        state.hit = 0
        state.form = 0
        if tokens > 0 and (self._forms > 1 or not hits.prefix_only):
            tokens = self._longest(state, keys, tokens)
        if tokens > 0:
            state.runs = hits.runs(tokens)
            base = state.form * len(hits.groups)
            wanted = [
                (base + index, hits.joined(keys, index, first, end)) for index, first, end in state.runs
            ]
            state.ticket = self.client.lease(wanted)
        state.asked_at = time.monotonic()
        state.hit = -1 if state.ticket else 0

    def _longest(self, state: Req, keys: Sequence[bytes], tokens: int) -> int:
        """The longest hit of all forms, and in `state.form` which one has it: our own where it has as much as any."""
        best = 0
        for form in range(self._forms):
            found = self._hits.longest(self.client, keys, tokens, state.lacking, form)
            if found > best:
                best, state.form = found, form
            if best == tokens:
                break
        # Of a prefix, the lease says itself how much of it is there, even where a table is stale.
        return tokens if self._hits.prefix_only and state.form == 0 else best

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
            state.asks = 0
            state.lacking.clear()
            self._ask(state)
            state.first_poll = now
        if state.hit < 0 and not self._poll(state, now):
            return None, False
        return self._promise(state, num_computed_tokens, now)

    def _poll(self, state: Req, now: float) -> bool:
        """Whether the answer about the lease is there (or given up)."""
        wait_us = 0
        if state.polled != state.ticket and self._wait_left_us > 0:
            wait_us = min(self.settings.lookup_wait_us, self._wait_left_us)
        state.polled = state.ticket
        begin = time.monotonic() if wait_us else now
        answer = self.client.lease_poll(state.ticket, wait_us)
        if wait_us:
            self._wait_left_us -= min(wait_us, int((time.monotonic() - begin) * 1e6))
        if answer is not None:
            granted, state.lease = answer
            return self._granted(state, granted)
        if now - state.first_poll < self.settings.lookup_deadline_ms / 1000:
            return False
        self.stats.add("lookup_timeouts")
        state.hit = 0
        return True

    def _granted(self, state: Req, granted: Sequence[int]) -> bool:
        """Makes a hit of what was granted; False where another lease has been asked for."""
        hits = self._hits
        if hits.prefix_only:
            state.hit = granted[0] * hits.align if granted else 0
            return True
        index, _, end = state.runs[0]
        short = hits.lacked(state.runs, granted, state.form)
        if len(granted) == len(state.runs) and not short:
            state.hit = end * hits.groups[index].block_tokens
            return True
        # A shorter hit needs other blocks of the windows and other states.
        self._release(state)
        state.hit = 0
        if any(granted) and state.asks < ASKS:
            state.lacking |= short
            self._ask(state)
        return state.hit >= 0

    def _promise(self, state: Req, num_computed_tokens: int, now: float) -> tuple[int | None, bool]:
        hits, local, hit = self._hits, num_computed_tokens, state.hit
        self._set_promise(state, None)
        if hit <= local:
            # Blocks that the engine holds itself may be evicted before the request is admitted, and then
            # the rest of the lease counts again: it is given back once the request runs.
            return 0, False
        room = self.holds.limit - self.holds.held - self._promised_blocks
        blocks = hits.blocks(hit, local)
        if room < blocks:
            waited = now - state.first_poll
            if self.holds.held and waited < self.settings.lookup_deadline_ms / 1000:
                return None, False
            self.stats.add("held_skips")
            hit = hits.shorter(hit, local, room)
            if hit > local and not hits.prefix_only:
                if state.asks < ASKS:
                    self._release(state)
                    self._ask(state, hit)
                    state.first_poll = now  # the answer may take its time
                    return None, False
                hit = local
            blocks = hits.blocks(hit, local) if hit > local else 0
        if hit <= local:
            self._give_up(state)
            return 0, False
        self._set_promise(state, (local, hit, blocks))
        return hit - local, True

    def _set_promise(self, state: Req, promise: tuple[int, int, int] | None) -> None:
        """Keeps the sum of all promises, so that together with the holds they stay below the limit."""
        before = state.promised[2] if state.promised else 0
        self._promised_blocks += (promise[2] if promise else 0) - before
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
        local, hit, _ = state.promised
        tokens, hits = local + num_external_tokens, self._hits
        # A shorter hit needs other blocks than were granted, unless all that it needs is a prefix.
        fits = tokens == hit or (hits.prefix_only and tokens < hit and tokens % hits.align == 0)
        table = blocks.get_block_ids()
        missing = hits.missing(tokens, local) if fits else []
        ids = [table[index][first:end] for index, first, end in missing]
        spaces = self.client.namespace_ids(state.form) if state.form else self.client.namespace_ids()
        if not missing or any(
            len(own) != end - first or 0 in own for own, (_, first, end) in zip(ids, missing, strict=True)
        ):
            self._lose(
                request, f"expected blocks for the tokens {local} to {hit}, got {num_external_tokens}: {ids}"
            )
        elif spaces is None:
            self._lose(request, "the sidecar went away between grant and load")
        else:
            self._plan_load(state, tokens - local, missing, [block for own in ids for block in own], spaces)

    def _lose(self, request: Any, reason: str) -> None:
        log_limited(logging.WARNING, "lost", "a promised load is recomputed: %s", reason)
        self.fail_load(request.request_id)

    def _plan_load(
        self, state: Req, tokens: int, missing: list[tuple[int, int, int]], ids: list[int], spaces: bytes
    ) -> None:
        request, hits, keys = state.request, self._hits, state.keys()
        size = sum((end - first) * hits.groups[index].block_bytes for index, first, end in missing)
        deadline_ms = self.settings.load_deadline(size)
        # The lease has one run for every group, in the groups' order.
        runs = [(index, index, first - state.runs[index][1], end - first) for index, first, end in missing]
        hashes = b"".join(hits.joined(keys, index, first, end) for index, first, end in missing)
        self.client.lease_used(state.ticket)
        job = Job(True, request.request_id, time.monotonic(), [], tokens=tokens, ticket=state.ticket)
        job_id = self.holds.open(job, ids, deadline_ms)
        self._set_promise(state, None)
        state.attempted, state.ticket, state.loading = True, 0, job_id
        self._open_loads[request.request_id] = job_id
        self._to_load.append(
            LoadPlan(
                job_id, request.request_id, state.lease, spaces, runs, hashes, ids, deadline_ms, state.form
            )
        )
        self.stats.add("hits")
        if state.form:
            self.stats.add("hits_of_other_tp")

    def fail_load(self, request_id: str) -> None:
        """vLLM waits for a load of this request that cannot be planned: the workers report its failure."""
        if request_id not in self._open_loads:
            self._open_loads[request_id] = None
            self._to_end.append(request_id)
            self.stats.add("load_failures")
        state = self._reqs.get(request_id)
        if state is not None and state.loading is None:
            self._give_up(state)

    def _free(self, job_id: bytes) -> None:
        job = self.holds.free(job_id)
        if self._saves is not None:
            self._saves.ended(job)
        self._release_ticket(job.ticket)

    # ---- one step

    def build_connector_meta(self, output: Any) -> PillionMetadata:
        """This step's jobs. Saves are planned here, for blocks that are full when the step has run."""
        self._wait_left_us = STEP_WAIT_US
        saves = self._saves
        if output.num_scheduled_tokens and saves and self.refused is None and self.holds.pool is not None:
            try:
                saves.plan(output, self._reqs)
            except BaseException as error:  # loads that are planned must go out whatever happens here
                if not survivable(error):
                    raise
                self.stats.add("errors")
                log_limited(logging.ERROR, "plan_saves", "planning saves failed", exc_info=True)
        to_save = saves.planned if saves is not None else []
        if not (self._to_load or to_save or self._to_end):
            return PillionMetadata()
        forward = output.total_num_scheduled_tokens > 0
        meta = PillionMetadata(self._to_load, to_save, self._to_end, forward=forward)
        self._to_load, self._to_end = [], []
        if saves is not None:
            saves.planned = []
        return meta

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
        job = self.holds.jobs.get(job_id)
        if job is None:
            return
        job.report(report)
        if report.outcomes and job.outcomes == self._world:
            self._end(job_id, job)
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
        self.stats.add("loads")
        self.stats.add("loaded_tokens", job.tokens)
        if state is not None:
            state.loaded_tokens = job.tokens

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

    def request_finished(
        self, request: Any, block_ids: Sequence[Sequence[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Never delays: jobs hold their blocks themselves. Tells how many tokens were loaded."""
        state = self._reqs.pop(request.request_id, None)
        if state is None:
            return False, None
        params = {"pillion": {"loaded_tokens": state.loaded_tokens}}
        unproven = state.loading is not None or state.promised is not None
        self._set_promise(state, None)
        try:
            self._cancel_unsent(state)
            if self._saves is not None and self.refused is None and not unproven:
                self._saves.rest(state, block_ids)
        finally:
            self._release(state)
        return False, params

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
        if self._to_end or self._to_load or (self._saves is not None and self._saves.planned):
            return True
        return self.holds.spinning()

    def has_pending_block_frees(self) -> bool:
        """Whether waiting a moment frees blocks: young holds on blocks that nobody else uses."""
        return self.holds.frees_soon()

    def reset_cache(self) -> bool | None:
        """Starts a new epoch: nothing that was saved before is seen again.

        Requests that live through the reset neither load nor save: their blocks are of the old epoch.
        """
        # First: whatever happens then, what they have is of the old epoch.
        for state in self._reqs.values():
            state.no_save = True
            state.hit = 0
            self._release(state)
        if self._saves is not None:
            self._saves.new_epoch()
        self._forms = 1
        self.client.new_epoch()
        return True
