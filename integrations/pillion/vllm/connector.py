"""`PillionConnector`: routes vLLM's calls to the scheduler's or the worker's half; no error gets out (I5).

Everything here is thin on purpose. The one exception to the silence is a configuration that its author got
wrong: that stops the engine at its start.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from typing import Any, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from pillion.vllm import adapters, config, device, identity, shards, support
from pillion.vllm import native as source
from pillion.vllm.log import log_limited, log_once, logger, survivable
from pillion.vllm.metadata import PillionMetadata
from pillion.vllm.ranks import Ranks
from pillion.vllm.scheduler import SchedulerHalf
from pillion.vllm.stats import PillionPromMetrics, PillionStats
from pillion.vllm.worker import WorkerHalf, wait_ready

SCHEDULER_START_WAIT_MS = 2000  # the worker's half, which starts before, has waited for the sidecar already

F = TypeVar("F", bound=Callable[..., Any])


def guarded(instead: Callable[..., Any]) -> Callable[[F], F]:
    """Turns every error of a method into a log line and the answer of `instead(self, *args)`."""

    def wrap(method: F) -> F:
        place = method.__name__

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except BaseException as error:
                if not survivable(error):
                    raise
                log_limited(logging.ERROR, place, "%s failed, counted as a miss", place, exc_info=True)
                half = self._scheduler or self._worker
                if half is not None:
                    half.stats.add("errors")
                try:
                    return instead(self, *args, **kwargs)
                except BaseException as second:
                    if not survivable(second):
                        raise
                    return None

        return call  # type: ignore[return-value]

    return wrap


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


class PillionConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's KV connector over a Pillion sidecar."""

    if support.HOST_TIER is not None:
        _cache_hit_source = support.HOST_TIER

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._settings = config.parse(self._kv_transfer_config.kv_connector_extra_config)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._waits = False
        try:
            reason = self._start(role)
        except BaseException as error:
            if not survivable(error):
                raise
            reason = f"{type(error).__name__}: {error}"
            logger.error("pillion: start failed", exc_info=True)
        if reason is not None:
            self._scheduler = None
            log_once(logging.WARNING, "refused", "running uncached: %s", reason)
            if role == KVConnectorRole.WORKER:
                self._worker = self._refused_worker(reason)

    # ---- start

    def _start(self, role: KVConnectorRole) -> str | None:
        """Builds this role's half; returns the reason where the engine is refused."""
        reason = support.refusal(self._vllm_config, self._kv_cache_config)
        if reason is not None:
            return reason
        try:
            spaces = identity.namespaces(self._vllm_config, self._kv_cache_config, self._settings)
        except identity.UnknownModel as error:
            return str(error)
        world = self._vllm_config.parallel_config.tensor_parallel_size
        if (given := self._settings.socket) and "{device}" not in given:
            if world > 1 and "{rank}" not in given:
                return f"socket names one sidecar, and there are {world} ranks: expected {{rank}} in it"
            replicas = self._vllm_config.parallel_config.data_parallel_size
            if replicas > 1 and device.on_cuda():
                return f"socket names one sidecar, and {replicas} replicas have GPUs of their own: expected {{device}} in it"
        digest = sha256(repr([sorted(fields.items()) for fields in spaces]).encode()).hexdigest()
        native = source.native()
        own = [support.tensor_parallel_rank(world)] if role == KVConnectorRole.WORKER else range(world)
        try:
            names = {rank: device.name(self._vllm_config, rank) for rank in own}
        except device.Unnamed as error:
            return str(error)
        forms = {rank: self._forms(rank, world) for rank in own}
        options = {
            rank: self._client_options(
                native, name, [identity.of_rank(fields, rank, world) for fields in spaces], rank
            )
            for rank, name in names.items()
        }
        if role == KVConnectorRole.SCHEDULER:
            for rank, each in options.items():
                each["namespaces"] += [
                    identity.of_shard(spaces[group], number, count)
                    for group, number, count in forms[rank].others
                ]
            clients = [native.SchedulerClient(**each) for each in options.values()]
            twins = max(identity.twins(fields, 0, world)[0] for fields in spaces)
            ways = len(forms[0])
            alone = world == 1 and ways == 1
            client = clients[0] if alone else Ranks(clients, list(forms.values()) if ways > 1 else [])
            self._start_scheduler(client, digest, twins, ways)
        else:
            rank, name = next(iter(names.items()))
            self._worker = WorkerHalf(
                client=native.WorkerClient(**options[rank]),
                settings=self._settings,
                vllm_config=self._vllm_config,
                kv_cache_config=self._kv_cache_config,
                layout=self._layout(),
                identity=digest,
                device=name,
                locate=native.cuda_device if device.on_cuda() else None,
                rank=rank,
                world=world,
                twins=[identity.twins(fields, rank, world) for fields in spaces],
                forms=forms[rank],
            )
        return None

    def _forms(self, rank: int, world: int) -> shards.Forms:
        if not self._settings.other_tp_sizes:
            return shards.Forms.own(len(self._kv_cache_config.kv_cache_groups))
        return shards.forms(self._vllm_config, self._kv_cache_config, rank, world)

    def _client_options(
        self, native: Any, name: str, spaces: list[dict[str, str]], rank: int
    ) -> dict[str, Any]:
        """For the sidecar of one rank."""
        given = self._settings.socket
        given = given.replace("{rank}", str(rank)).replace("{device}", name) if given else None
        socket = given or native.default_socket(name)
        world = self._vllm_config.parallel_config.tensor_parallel_size
        launch = source.launch_command(given, name, world) if self._settings.launch else []
        self._waits = self._waits or bool(launch) or os.path.exists(socket)
        if self._settings.launch and not launch:
            log_once(
                logging.WARNING, "binary", "no `pillion` command is found: no sidecar is started from here"
            )
        return {
            "socket": socket,
            "engine_id": str(self._kv_transfer_config.engine_id),
            "tenant": self._settings.tenant,
            "namespaces": spaces,
            "launch": launch,
        }

    def _start_scheduler(self, client: Any, digest: str, twins: int, forms: int) -> None:
        transfer = self._kv_transfer_config
        recompute = transfer.kv_load_failure_policy == "recompute"
        loads = recompute and transfer.is_kv_consumer
        if transfer.is_kv_consumer and not recompute:
            log_once(
                logging.WARNING,
                "policy",
                "kv_load_failure_policy is %r: a failed load would fail its request, so KV is saved and "
                'never loaded; set it to "recompute"',
                transfer.kv_load_failure_policy,
            )
        self._scheduler = SchedulerHalf(
            client=client,
            settings=self._settings,
            hits=support.hits(self._vllm_config, self._kv_cache_config),
            num_blocks=self._kv_cache_config.num_blocks,
            loads=loads,
            saves=transfer.is_kv_producer,
            identity=digest,
            world_size=self._vllm_config.parallel_config.world_size,
            adapters=adapters.Adapters(self._vllm_config) if self._vllm_config.lora_config else None,
            twins=twins,
            forms=forms,
        )
        if self._waits:
            wait_ready(client, min(self._settings.start_wait_ms, SCHEDULER_START_WAIT_MS), "scheduler")

    def _refused_worker(self, reason: str) -> WorkerHalf:
        """A half without a client: it fails what the scheduler's half may plan before it hears of this."""
        half = WorkerHalf(
            client=None,
            settings=self._settings,
            kv_cache_config=self._kv_cache_config,
            layout="",
            identity="",
        )
        half.refused = reason
        return half

    def _layout(self) -> str:
        """The physical order of the KV cache as the engine core resolved it."""
        name = self._kv_cache_config.kv_cache_layout or self._vllm_config.cache_config.kv_cache_layout
        if name is None:
            raise RuntimeError("the KV cache layout is not resolved")
        return {"NHD": "LBNHC", "HND": "LBHNC"}.get(name, str(name))

    # ---- class level

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that does not happen is a later miss, nothing that a request waits for."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Block-first memory, where it can be had: a block is one run of bytes. CPU attention knows one order."""
        settings = config.parse(vllm_config.kv_transfer_config.kv_connector_extra_config)
        if settings.layout == "any" or not device.on_cuda() or support.may_split_blocks(vllm_config):
            return None
        return settings.layout

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Never: nothing is done layer by layer."""
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """True: CPU engines keep their memory while they sleep, and on CUDA the two hooks below are followed."""
        return True

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PillionStats:
        """Our counters from their plain form."""
        return PillionStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> PillionPromMetrics:
        """Our counters in vLLM's `/metrics`."""
        return PillionPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- worker

    @guarded(_nothing)
    def get_mem_pool_context(self) -> Any:
        """Puts the KV cache into shared memory (vLLM 0.31 and later ask)."""
        return self._worker.get_mem_pool_context() if self._worker is not None else None

    @guarded(_nothing)
    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Tells the sidecar where the KV cache lies."""
        if self._worker is not None:
            with self._refusing(self._worker):
                self._worker.register_kv_caches(kv_caches, self._waits)

    @contextlib.contextmanager
    def _refusing(self, worker: WorkerHalf) -> Iterator[None]:
        """An engine whose memory could not be registered runs uncached, and its scheduler's half hears of it."""
        try:
            yield
        except BaseException as error:
            if survivable(error):
                worker.refuse(f"registration failed: {error!r}")
            raise

    @guarded(_nothing)
    def unregister_kv_caches(self) -> None:
        """The KV cache is about to be unmapped (vLLM 0.33: sleep, discard); nothing where it stays (CPU)."""
        if self._worker is not None:
            self._worker.unregister_kv_caches()

    @guarded(_nothing)
    def restore_kv_caches(self) -> None:
        """The KV cache is mapped again, with other contents; nothing where it always was."""
        if self._worker is not None:
            with self._refusing(self._worker):
                self._worker.restore_kv_caches()

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Nothing: holds keep the blocks of jobs from being overwritten."""

    @guarded(_nothing)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Submits the step's loads."""
        meta = self._connector_metadata
        if self._worker is not None and isinstance(meta, PillionMetadata):
            self._worker.start_load_kv(meta)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads end before their request is scheduled."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: saves are whole blocks, after the step."""

    @guarded(_nothing)
    def wait_for_save(self) -> None:
        """Submits the step's saves; waits for nothing."""
        meta = self._connector_metadata
        if self._worker is not None and isinstance(meta, PillionMetadata):
            self._worker.wait_for_save(meta)

    @guarded(lambda *_args, **_kwargs: KVConnectorTransferResults())
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Ended loads; failed ones among both sets, never as block ids."""
        if self._worker is None:
            return KVConnectorTransferResults()
        meta = self._connector_metadata
        finished, failed = self._worker.take_results(meta if isinstance(meta, PillionMetadata) else None)
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)

    @guarded(_nothing)
    def build_connector_worker_meta(self) -> Any:
        """What became of jobs, for the scheduler's half."""
        return self._worker.take_meta() if self._worker is not None else None

    # ---- both

    @guarded(_nothing)
    def get_kv_connector_stats(self) -> PillionStats | None:
        """Counters since the last step."""
        half = self._scheduler or self._worker
        return half.stats.take() if half is not None else None

    @guarded(_nothing)
    def shutdown(self) -> None:
        """Closes the client."""
        half = self._scheduler or self._worker
        if half is not None:
            half.close()

    # ---- scheduler

    @guarded(_nothing)
    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """The pool in which holds are taken."""
        if self._scheduler is not None:
            self._scheduler.bind(gpu_block_pool)

    @guarded(_nothing)
    def on_new_request(self, request: Any) -> None:
        """Looks up and asks for leases."""
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)

    @guarded(lambda *_args, **_kwargs: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """What is granted beyond `num_computed_tokens`."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def _load_lost(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None and num_external_tokens > 0:
            self._scheduler.fail_load(request.request_id)

    @guarded(_load_lost)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plans the load."""
        if self._scheduler is not None:
            self._scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    @guarded(lambda *_args, **_kwargs: PillionMetadata())
    def build_connector_meta(self, scheduler_output: Any) -> PillionMetadata:
        """This step's jobs."""
        if self._scheduler is None:
            return PillionMetadata()
        return self._scheduler.build_connector_meta(scheduler_output)

    @guarded(_nothing)
    def update_connector_output(self, connector_output: Any) -> None:
        """Ends jobs and holds."""
        if self._scheduler is not None:
            self._scheduler.update_connector_output(connector_output)

    @guarded(lambda *_args, **_kwargs: (False, None))
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Never delays the blocks; tells what was loaded."""
        if self._scheduler is None:
            return False, None
        return self._scheduler.request_finished(request, block_ids)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The same where vLLM, or a connector around this one, knows one group only."""
        result: tuple[bool, dict[str, Any] | None] = self.request_finished_all_groups(request, (block_ids,))
        return result

    def take_events(self) -> Iterable[Any]:
        """Nothing: events come from the sidecar."""
        return ()

    @guarded(lambda *_args, **_kwargs: False)
    def has_pending_push_work(self) -> bool:
        """Keeps the idle engine stepping while holds exist."""
        return self._scheduler is not None and self._scheduler.has_pending_push_work()

    @guarded(lambda *_args, **_kwargs: False)
    def has_pending_block_frees(self) -> bool:
        """Whether a hold is about to end that frees blocks."""
        return self._scheduler is not None and self._scheduler.has_pending_block_frees()

    @guarded(lambda *_args, **_kwargs: False)
    def reset_cache(self) -> bool | None:
        """Starts a new epoch; None where nothing is cached."""
        return self._scheduler.reset_cache() if self._scheduler is not None else None
