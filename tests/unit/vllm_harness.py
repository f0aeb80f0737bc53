"""vLLM's real Scheduler, driven with PillionConnector in both roles and a simulated model.

The simulated worker keeps its own block tables from `SchedulerOutput`, as a model runner does. Its "KV" of a
token is a value that depends on the whole prefix; before a step computes a token, the worker checks that
every earlier position holds the value it must. So a wrong load, a late write or a block that is reused too
early fails the step that would have used it. The next token is a function of the prefix.
"""

from __future__ import annotations

import json
import pickle
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import vllm
from vllm.config import (
    CacheConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from pillion.vllm import native as source
from pillion.vllm import support
from unit.fake_native import FakeNative, FakeRanks
from unit.vllm_groups import FULL, KvGroup, make_groups_config, make_groups_tensors, salted

BLOCK = 16
LAYERS = [f"model.layers.{index}.self_attn.attn" for index in range(2)]
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def make_config(
    model_dir: Path, *, max_batched: int = 256, max_len: int = 1024, world: int = 1, **transfer: Any
) -> VllmConfig:
    """A VllmConfig for a tiny Llama; `transfer` goes into the KVTransferConfig."""
    model_dir.mkdir(parents=True, exist_ok=True)
    heads = max(2, world)
    model = {**MODEL, "num_attention_heads": heads, "num_key_value_heads": heads}
    (model_dir / "config.json").write_text(json.dumps(model))
    extra = {"model_id": "tiny", "launch": False, **transfer.pop("extra", {})}
    options = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute", **transfer}
    return VllmConfig(
        model_config=ModelConfig(
            model=str(model_dir), skip_tokenizer_init=True, dtype="float32", max_model_len=max_len, seed=0
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        parallel_config=ParallelConfig(
            tensor_parallel_size=world, distributed_executor_backend="mp" if world > 1 else None
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=32,
            max_num_batched_tokens=max_batched,
            max_model_len=max_len,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
        ),
        kv_transfer_config=KVTransferConfig(
            kv_connector="PillionConnector",
            kv_connector_module_path="pillion.vllm",
            kv_connector_extra_config=extra,
            **options,
        ),
    )


def make_spec() -> FullAttentionSpec:
    return FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)


def make_kv_config(num_blocks: int) -> KVCacheConfig:
    """One group of full attention, LBHNC, as the CPU engine makes it."""
    spec = make_spec()
    page = spec.page_size_bytes
    return KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[
            KVCacheTensor(
                size=page * num_blocks * len(LAYERS),
                layers=list(LAYERS),
                layer_stride=page * num_blocks,
                block_stride=page,
            )
        ],
        kv_cache_groups=[KVCacheGroupSpec(list(LAYERS), spec)],
        kv_cache_layout="LBHNC",
    )


def make_tensors(kv_config: KVCacheConfig) -> dict[str, torch.Tensor]:
    """The KV cache as vLLM views it: [B, H, N, C] per layer over one allocation."""
    tensor = kv_config.kv_cache_tensors[0]
    spec = kv_config.kv_cache_groups[0].kv_cache_spec
    raw = torch.zeros(tensor.size, dtype=torch.int8, device="cpu").view(torch.float32)
    shape = (len(tensor.layers), kv_config.num_blocks, 2, BLOCK, spec.state_content_size_bytes // 4)
    return dict(zip(tensor.layers, raw.view(shape), strict=True))


@dataclass
class SimRequest:
    """What the simulated model runner knows of a request."""

    tokens: list[int]
    blocks: list[list[int]]  # of each group
    values: list[int] = field(default_factory=list)  # value of each position's prefix
    drafts: list[int] = field(default_factory=list)  # proposed after the last step

    def value(self, position: int) -> int:
        while len(self.values) <= position:
            before = self.values[-1] if self.values else 0
            self.values.append(hash((before, self.tokens[len(self.values)])))
        return self.values[position]


def next_token(value: int) -> int:
    return 3 + value % 1000


class Engine:
    """One engine: scheduler, worker, and the loop between them."""

    def __init__(
        self,
        native: FakeNative | FakeRanks,
        model_dir: Path,
        *,
        num_blocks: int = 200,
        overlap: bool = False,
        max_batched: int = 256,
        groups: tuple[KvGroup, ...] = FULL,
        retention: int | None = None,
        drafts: int = 0,
        drafter: str = "ngram",
        **transfer: Any,
    ) -> None:
        setattr(source, "native", lambda: native)  # noqa: B010
        self.natives = native.ranks if isinstance(native, FakeRanks) else [native]
        self.native = self.natives[0]
        for one in self.natives:
            one.memory = defaultdict(list)  # a fresh engine's KV cache
        self.memory = self.native.memory
        world = len(self.natives)
        self.config = make_config(model_dir, max_batched=max_batched, world=world, **transfer)
        self.config.cache_config.num_gpu_blocks = num_blocks
        self.overlap = overlap
        if overlap:
            # As the GPU does it. The CPU platform turns it off, and with it the second batch in flight.
            self.config.scheduler_config.async_scheduling = True
            type(self.config).max_concurrent_batches = property(
                lambda config: 2 if config.scheduler_config.async_scheduling else 1
            )
        self.groups = groups
        kv_config, again = (
            make_kv_config(num_blocks)
            if groups == FULL
            else make_groups_config(groups, num_blocks, retention)
            for _ in range(2)
        )
        self._configure(groups, drafts, drafter)
        scheduler_block, hash_block = resolve_kv_cache_block_sizes(kv_config, self.config)
        hash_fn = get_hash_fn_by_name("sha256")
        init_none_hash(hash_fn)
        self.hasher = get_request_block_hasher(hash_block, hash_fn)
        from pillion.vllm import PillionConnector

        self.workers = []
        for rank in range(world):
            with mock.patch.object(support, "tensor_parallel_rank", lambda _world, rank=rank: rank):
                worker = PillionConnector(self.config, KVConnectorRole.WORKER, kv_config)
            tensors = make_tensors if groups == FULL else make_groups_tensors
            worker.register_kv_caches(tensors(kv_config))
            self.workers.append(worker)
        self.worker = self.workers[0]
        self.scheduler = (AsyncScheduler if overlap else Scheduler)(
            vllm_config=self.config,
            kv_cache_config=again,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=scheduler_block,
            hash_block_size=hash_block,
            log_stats=True,
        )
        self.connector = self.scheduler.connector
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.free_at_start = self.pool.get_num_free_blocks()
        self.aggregator = KVOutputAggregator(world)
        self.in_flight: deque[Any] = deque()
        self.sims: dict[str, SimRequest] = {}
        self.outputs: dict[str, list[int]] = {}
        self.params: dict[str, Any] = {}
        self.reasons: dict[str, Any] = {}
        self.steps = 0
        self.held_most = 0
        self.computed: dict[str, int] = {}  # tokens that were computed, per request
        self.loads: list[tuple[str, list[int]]] = []
        self.load_runs: list[tuple[str, Any]] = []
        self.stats: dict[str, int] = {}

    def _configure(self, groups: tuple[KvGroup, ...], drafts: int, drafter: str) -> None:
        """What vLLM derives from the model and its options."""
        self.drafts = drafts
        self._drafting: list[Callable[[], None]] = []  # what the drafter does in this step, in the last group
        cache = self.config.cache_config
        cache.block_size = max(group.block for group in groups)
        for group in groups:
            if group.is_state:
                cache.mamba_cache_mode = group.kind
        if drafts:
            self.config.speculative_config = SpeculativeConfig(
                method="ngram",
                num_speculative_tokens=drafts,
                prompt_lookup_max=2,
                target_model_config=self.config.model_config,
                target_parallel_config=self.config.parallel_config,
            )
            # One with weights of its own needs files of it; vLLM's scheduler looks at the method alone.
            self.config.speculative_config.method = drafter
            if drafter != "ngram":
                self.config.speculative_config.draft_model_config = self.config.model_config

    @property
    def half(self) -> Any:
        return self.connector._scheduler

    # ---- requests

    def add(self, req_id: str, prompt: list[int], max_tokens: int = 4, **options: Any) -> Request:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
        request = Request(
            request_id=req_id,
            prompt_token_ids=list(prompt),
            sampling_params=params,
            pooling_params=None,
            block_hasher=self.hasher,
            **options,
        )
        self.outputs[req_id] = []
        self.scheduler.add_request(request)
        return request

    def abort(self, req_id: str) -> None:
        self.scheduler.finish_requests(req_id, RequestStatus.FINISHED_ABORTED)

    def run(self, *, steps: int = 2000) -> None:
        """Steps until nothing is left to do, as the engine core's loop does."""
        for _ in range(steps):
            if not self.scheduler.has_requests() and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"still busy after {steps} steps: {list(self.scheduler.requests)}")

    def step(self) -> None:
        """Schedules one step; executes and processes the oldest when the pipeline is full or idle."""
        output = self.scheduler.schedule()
        output.kv_connector_metadata = pickle.loads(pickle.dumps(output.kv_connector_metadata))
        self.in_flight.append(output)
        self.steps += 1
        if self.half is not None:
            self.held_most = max(self.held_most, self.half.holds.held)
        depth = 2 if self.overlap and output.total_num_scheduled_tokens > 0 else 1
        while len(self.in_flight) >= depth:
            self.process()

    def process(self) -> None:
        """Executes the oldest scheduled step and gives its output to the scheduler."""
        output = self.in_flight.popleft()
        self._update_tables(output)
        self._prepare_blocks(output)
        result = self.aggregator.aggregate([self.execute(output, rank) for rank in range(len(self.workers))])
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                self.outputs[one.request_id].extend(one.new_token_ids)
                if one.finish_reason is not None:
                    self.reasons[one.request_id] = one.finish_reason
                    self.params[one.request_id] = one.kv_transfer_params
            stats = outputs.scheduler_stats
            if stats is not None:
                for name, count in (stats.kv_connector_stats or {}).items():
                    self.stats[name] = self.stats.get(name, 0) + count
        if self.drafts:
            self._propose(output)

    # ---- the simulated worker

    def execute(self, output: Any, rank: int) -> ModelRunnerOutput:
        meta = pickle.loads(pickle.dumps(output.kv_connector_metadata))
        if rank == 0:
            self.loads += [(plan.req_id, plan.blocks) for plan in meta.loads]
            self.load_runs += [(plan.req_id, plan.runs) for plan in meta.loads]
        worker = self.workers[rank]
        worker.handle_preemptions(meta)
        worker.bind_connector_metadata(meta)
        req_ids, sampled = self._forward(output, rank)
        worker.start_load_kv(None)
        saves = output.total_num_scheduled_tokens or not vllm.__version__.startswith("0.30")
        # With speculative decoding the drafter runs first; 0.30 leaves it out where there is no forward.
        behind = self.drafts and output.total_num_scheduled_tokens
        if saves and not behind:
            worker.wait_for_save()
        results = worker.get_transfer_results(output.finished_req_ids)
        connector_output = KVConnectorOutput(
            finished_sending=results.finished_sending,
            finished_recving=results.finished_recving,
            failed_recving=results.failed_recving,
            invalid_block_ids=worker.get_block_ids_with_load_errors(),
            kv_connector_stats=worker.get_kv_connector_stats(),
            kv_connector_worker_meta=worker.build_connector_worker_meta(),
        )
        for draft in self._drafting:
            draft()
        self._drafting.clear()
        if behind:
            worker.wait_for_save()
        worker.clear_connector_metadata()
        return ModelRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: index for index, req_id in enumerate(req_ids)},
            sampled_token_ids=sampled,
            kv_connector_output=pickle.loads(pickle.dumps(connector_output)),
        )

    def sleep(self) -> None:
        """As `EngineCore.sleep(1)` of vLLM 0.33 goes: abort, drain, reset all caches, unmap."""
        self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        self.run()
        assert self.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        self.worker.unregister_kv_caches()
        self.memory.clear()

    def wake_up(self) -> None:
        self.worker.restore_kv_caches()

    def _update_tables(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            self.sims[new.req_id] = SimRequest(
                list(new.prompt_token_ids), [list(own) for own in new.block_ids]
            )
        cached = output.scheduled_cached_reqs
        for req_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            sim = self.sims[req_id]
            if req_id in cached.resumed_req_ids:
                known = list(cached.all_token_ids.get(req_id, sim.tokens))
                if len(known) > len(sim.tokens):
                    sim.tokens = known
                sim.blocks = [[] for _ in self.groups]
            for own, more in zip(sim.blocks, blocks or (), strict=False):
                own.extend(more)

    def _prepare_blocks(self, output: Any) -> None:
        """As the worker does before the forward: zeroes, then copies."""
        for native in self.natives:
            for block in getattr(output, "new_block_ids_to_zero", None) or ():
                native.memory[block] = ["zero"] * BLOCK
            for copy in getattr(output, "kv_cache_block_copies", None) or ():
                native.memory[copy.dst_block_id] = list(native.memory[copy.src_block_id])

    def _propose(self, output: Any) -> None:
        """Drafts for every request that decodes: right ones, wrong ones, and some of each."""
        req_ids, drafts = [], []
        for req_id in output.num_scheduled_tokens:
            sim = self.sims[req_id]
            guess = SimRequest(list(sim.tokens), [])
            for index in range(self.drafts):
                token = next_token(guess.value(len(guess.tokens) - 1))
                wrong = (len(sim.tokens) + index) % 5 in (2, 4)
                guess.tokens.append(7 if wrong else token)
            sim.drafts = guess.tokens[-self.drafts :]
            req_ids.append(req_id)
            drafts.append(sim.drafts)
        if self.overlap:
            return  # the scheduler has placeholders: the next step is scheduled before this one's drafts are known
        self.scheduler.update_draft_token_ids(DraftTokenIds(req_ids, drafts))

    def _forward(self, output: Any, rank: int) -> tuple[list[str], list[list[int]]]:
        """Each rank has its own part of the KV: what another rank computed is wrong here."""
        last = rank == len(self.natives) - 1
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        sampled: list[list[int]] = []
        for req_id, count in output.num_scheduled_tokens.items():
            sim, start = self.sims[req_id], starts[req_id]
            if rank == 0:
                self.computed[req_id] = self.computed.get(req_id, 0) + count
            drafts = output.scheduled_spec_decode_tokens.get(req_id, [])
            if drafts and self.overlap:
                # As the runner corrects the scheduler, which takes all drafts for accepted until it hears.
                drafts = sim.drafts[: len(drafts)]
                start = len(sim.tokens) - (count - len(drafts))
            seen = SimRequest([*sim.tokens, *drafts], []) if drafts else sim
            self._compute(req_id, seen, start, start + count, rank)
            if start + count < len(seen.tokens):
                sampled.append([])
                continue
            tokens = [next_token(sim.value(len(sim.tokens) - 1))]
            for position, draft in enumerate(drafts, len(sim.tokens)):
                if draft != tokens[-1]:
                    break
                tokens.append(next_token(seen.value(position)))
            if last:
                sim.tokens.extend(tokens)
            sampled.append(tokens)
        return list(output.num_scheduled_tokens), sampled

    def _compute(self, req_id: str, seen: SimRequest, start: int, end: int, rank: int) -> None:
        """What a step reads and writes in every group; `seen` has the drafts too."""
        memory = self.natives[rank].memory
        for group, (kind, table) in enumerate(zip(self.groups, self.sims[req_id].blocks, strict=True)):

            def value(position: int, group: int = group) -> int:
                return salted(seen.value(position), rank, group)

            def compute(kind: KvGroup = kind, table: list[int] = table, group: int = group) -> None:
                try:
                    kind.check(memory, table, value, start, end)
                except AssertionError as error:
                    raise AssertionError(f"{req_id}, rank {rank}, group {group}: {error}") from error
                kind.write(memory, table, value, start, end)

            is_drafters = self.config.speculative_config and self.config.speculative_config.method != "ngram"
            if is_drafters and group == len(self.groups) - 1:
                self._drafting.append(compute)
            else:
                compute()

    # ---- checks

    def assert_clean(self) -> None:
        """Nothing leaked: blocks, holds, leases, requests."""
        assert not self.scheduler.requests
        assert self.half.holds.held == 0 and not self.half.holds.jobs
        assert self.pool.get_num_free_blocks() == self.free_at_start
        assert all(block.ref_cnt == 0 for block in self.pool.blocks if not block.is_null)
        for native in self.natives:
            assert not native.unreleased(), "a lease was never released"
            assert not native.jobs, "a job never ended"
        assert not self.half._reqs and not self.half._open_loads
        assert self.half._promised_blocks == 0


def prompt(length: int, seed: int = 0) -> list[int]:
    """A prompt whose first token already differs between seeds."""
    return [3 + (seed * 7919 + index * 31) % 1000 for index in range(length)]


def expected(tokens: list[int], count: int) -> list[int]:
    """What any engine must answer, with or without Pillion."""
    sim = SimRequest(list(tokens), [])
    for _ in range(count):
        sim.tokens.append(next_token(sim.value(len(sim.tokens) - 1)))
    return sim.tokens[len(tokens) :]
