"""Which blocks are saved, and in which step.

Saved is what is full and final when the step has run, and what the sidecar lacks, of every group:

- full attention: every block whose tokens are known (a block has a hash only then; a rejected draft has none) and
  computed;
- a sliding window: the same, while vLLM's table still has the block. Blocks that no hit can need, because every
  boundary's window lies elsewhere, are left out;
- a recurrent state: only what is proved to be the state after exactly the block's last token. In vLLM's mode "align"
  a step leaves one state, the one at its end, in the table's block `(end - 1) // block`. So the state at a boundary is
  there if a step ended at that boundary, and nowhere else (a block in which a step ended earlier holds an older state,
  and the others are null); or if vLLM itself has registered the block in its prefix cache under this very hash, which
  is so for states that it found there, that were loaded, or that a kernel exported from within a step. A step that
  begins at the boundary copies the state to another block before it goes on, so that such a block is not written
  again. In the mode "all" (vLLM 0.30 and 0.31) every full block is such a state, and steps go on in the following
  block. Speculative tokens would break all that: an engine with both is refused.

A step with nothing to do costs one comparison (P7). A request that gets one token a step cannot fill its next block
before as many steps as tokens are missing, so it waits in a heap; whatever was scheduled with more tokens, is new, or
comes back from preemption is looked at.
"""

import heapq
import time
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from pillion.vllm.hits import FULL, STATE, Group, Hits
from pillion.vllm.holds import Holds, Job
from pillion.vllm.metadata import SavePlan
from pillion.vllm.request import Req
from pillion.vllm.stats import PillionStats

Wish = tuple[int, Sequence[int]]  # group, indices of its blocks


class Saves:
    """Plans one engine's saves."""

    def __init__(
        self,
        *,
        client: Any,
        hits: Hits,
        holds: Holds,
        stats: PillionStats,
        deadline_ms: int,
        twins: int = 1,  # ranks that hold the same part of some group's blocks
    ) -> None:
        self.planned: list[SavePlan] = []  # of this step
        self._client = client
        self._hits = hits
        self._holds = holds
        self._stats = stats
        self._deadline_ms = deadline_ms
        self._twins = twins
        self._in_flight: set[tuple[int, bytes]] = set()  # what saves of this epoch carry
        self._due: list[tuple[int, str]] = []
        self._tick = 0
        self._aligned_states = [
            index for index, group in enumerate(hits.groups) if group.kind == STATE and not group.dense_states
        ]

    # ---- what to look at

    def plan(self, output: Any, reqs: dict[str, Req]) -> None:
        """Plans the saves of one scheduling step."""
        self._tick += 1
        scheduled = output.num_scheduled_tokens
        look: list[str] = []
        due = self._due
        while due and due[0][0] <= self._tick:
            tick, req_id = heapq.heappop(due)
            state = reqs.get(req_id)
            if state is not None and state.due == tick:
                look.append(req_id)
        if output.total_num_scheduled_tokens != len(scheduled):
            look.extend(req_id for req_id, tokens in scheduled.items() if tokens > 1)
        look.extend(new.req_id for new in output.scheduled_new_reqs)
        look.extend(output.scheduled_cached_reqs.resumed_req_ids)
        if not look:
            return
        ready = self._client.ready()
        for req_id in dict.fromkeys(look):
            if (state := reqs.get(req_id)) is None or state.no_save:
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
        computed = state.request.num_computed_tokens + tokens
        if self._aligned_states and computed % self._hits.align == 0:
            self._note_end(state, computed, tables.get_block_ids(req_id))
        known = min(computed, len(state.keys()) * self._hits.hash_tokens)
        complete, steps = True, 1 << 30
        for index, group in enumerate(self._hits.groups):
            full = known // group.block_tokens
            complete &= full <= state.saved[index]
            # With asynchronous scheduling a block's hash is known a step after its last token is scheduled.
            steps = min(steps, (full + 1) * group.block_tokens - computed)
        if not complete:
            table = tables.get_block_ids(req_id)
            complete = table is not None and self._save(state, table, known)
        self._look_again(state, req_id, max(1, steps) if complete else 8)

    def rest(self, state: Req, table: Sequence[Sequence[int]]) -> None:
        """At a request's end: blocks whose hash came to be known only now (asynchronous scheduling)."""
        if state.no_save:
            return
        known = min(state.request.num_computed_tokens, len(state.keys()) * self._hits.hash_tokens)
        groups = self._hits.groups
        if any(known // group.block_tokens > state.saved[index] for index, group in enumerate(groups)) and (
            self._client.ready()
        ):
            self._save(state, table, known)

    def _note_end(self, state: Req, computed: int, table: Sequence[Sequence[int]] | None) -> None:
        """A step ends at a boundary: remembers which blocks hold its states, until their hash is known."""
        if table is None:
            return
        preemptions = state.request.num_preemptions
        for index in self._aligned_states:
            block = computed // self._hits.groups[index].block_tokens - 1
            if block < len(table[index]) and table[index][block]:
                state.ends[index] = (block, table[index][block], preemptions)

    # ---- what to save

    def _save(self, state: Req, table: Sequence[Sequence[int]], known: int) -> bool:
        """Plans saves of the blocks up to token `known` that the sidecar lacks; False where some had to wait."""
        spaces = self._client.namespace_ids()
        if spaces is None:
            return False
        wishes: list[Wish] = []
        for index, group in enumerate(self._hits.groups):
            start, end = state.saved[index], min(known // group.block_tokens, len(table[index]))
            if start < end:
                wishes.append((index, self._lacking(state, index, table[index], start, end)))
                state.saved[index] = end
        if len(self._hits.groups) > 1:
            wishes = self._by_need(wishes, known)
        runs: list[tuple[int, bytes, int]] = []
        taken: list[tuple[int, int]] = []
        complete = True
        room = self._holds.limit - self._holds.held
        for index, blocks in wishes:
            if len(blocks) > room - len(taken):
                self._stats.add("held_skips")
                keep = max(0, room - len(taken))
                if self._hits.groups[index].kind == FULL:
                    # It goes on from there later; blocks of the other kinds may be gone by then.
                    state.saved[index] = min(state.saved[index], blocks[keep])
                    complete, blocks = False, blocks[:keep]
                else:
                    blocks = blocks[len(blocks) - keep :]
            self._add_runs(state, index, blocks, runs)
            taken.extend((index, block) for block in blocks)
        if taken:
            self._plan(state, table, runs, taken, spaces)
        return complete

    def _lacking(self, state: Req, index: int, table: Sequence[int], start: int, end: int) -> list[int]:
        """The blocks start…end of a group that can be saved and are not yet."""
        hits, keys = self._hits, state.keys()
        group = hits.groups[index]
        candidates: Sequence[int] = range(start, end)
        if group.kind != FULL:
            usable = self._state_is_final if group.kind == STATE else self._is_reachable
            candidates = [
                block for block in candidates if table[block] and usable(state, index, block, table[block])
            ]
            if not candidates:
                return []
        last = candidates[-1] + 1
        own = hits.keys(keys, index, candidates[0], last)
        if len(candidates) != len(own):
            own = [own[block - candidates[0]] for block in candidates]
        absent = [candidates[i] for i in self._client.absent(index, b"".join(own))]
        flying = self._in_flight
        if flying:
            first = candidates[0]
            all_keys = hits.keys(keys, index, first, last)
            absent = [block for block in absent if (index, all_keys[block - first]) not in flying]
        return [block for block in absent if table[block]]

    def _is_reachable(self, _state: Req, index: int, block: int, _block_id: int) -> bool:
        """Whether the window before some boundary holds the block."""
        group, align = self._hits.groups[index], self._hits.align
        boundary = -(-(block + 1) * group.block_tokens // align) * align
        return block >= group.need(boundary)[0]

    def _state_is_final(self, state: Req, index: int, block: int, block_id: int) -> bool:
        """Whether this is the state after exactly that block's last token, for good."""
        group = self._hits.groups[index]
        tokens = (block + 1) * group.block_tokens
        if tokens % self._hits.align:
            return False  # no hit ends there
        if group.dense_states or state.ends.get(index) == (block, block_id, state.request.num_preemptions):
            return True
        own = state.request.block_hashes[tokens // self._hits.hash_tokens - 1]
        found = self._holds.pool.blocks[block_id]
        return bool(
            found.block_hash == make_block_hash_with_group_id(own, index)
            and found.block_hash_num_tokens == tokens
        )

    def _by_need(self, wishes: list[Wish], known: int) -> list[Wish]:
        """In the order in which they are given up, last first, where not all can be held.

        States and the window at the end vanish soon and serve the hit that comes most likely; a window's older
        blocks serve only hits that end earlier.
        """
        boundary = known // self._hits.align * self._hits.align
        tails: list[Wish] = []
        older: list[Wish] = []
        full: list[Wish] = []
        for index, blocks in wishes:
            group: Group = self._hits.groups[index]
            if group.kind == FULL:
                full.append((index, blocks))
                continue
            first = group.need(boundary)[0]
            split = next((i for i, block in enumerate(blocks) if block >= first), len(blocks))
            tails.append((index, blocks[split:]))
            older.append((index, blocks[:split]))
        return [wish for wish in [*tails, *full, *older] if wish[1]]

    def _add_runs(
        self, state: Req, index: int, blocks: Sequence[int], runs: list[tuple[int, bytes, int]]
    ) -> None:
        """Adds a run for every stretch of consecutive blocks."""
        keys, per_block = state.keys(), self._hits.groups[index].hashes
        before = -2
        for block in blocks:
            if block == before + 1:
                last = runs[-1]
                runs[-1] = (index, last[1], last[2] + 1)
            else:
                runs.append((index, bytes(keys[block * per_block - 1]) if block else b"", 1))
            before = block

    def _plan(
        self,
        state: Req,
        table: Sequence[Sequence[int]],
        runs: list[tuple[int, bytes, int]],
        taken: list[tuple[int, int]],
        spaces: bytes,
    ) -> None:
        keys, groups = state.keys(), self._hits.groups
        saving = [(index, keys[(block + 1) * groups[index].hashes - 1]) for index, block in taken]
        ids = [table[index][block] for index, block in taken]
        job = Job(False, state.request.request_id, time.monotonic(), [], saving=saving)
        job_id = self._holds.open(job, ids, self._deadline_ms)
        self._in_flight.update(saving)
        hashes = b"".join(key for _, key in saving)
        # Only where every rank's sidecar reads the others' pools: else each keeps a copy of its own.
        shared = self._twins > 1 and self._client.read_each_other()
        self.planned.append(SavePlan(job_id, spaces, runs, hashes, ids, self._deadline_ms, shared))

    # ---- ends

    def ended(self, job: Job) -> None:
        """A save's blocks may be saved again."""
        self._in_flight.difference_update(job.saving)

    def new_epoch(self) -> None:
        """What is under way belongs to the old epoch."""
        self._in_flight.clear()
