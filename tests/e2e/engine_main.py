"""Real vLLM engines on request: one process that has imported vLLM, forked for every engine.

Importing vLLM takes most of an engine's start on two cores, three times over. Here it is imported once;
each connection to the socket gets a fork, which builds an `AsyncLLM` with its engine core and worker in
processes of their own as always, and answers JSON lines. The one difference to `vllm serve` is that these
processes are forked and not spawned (scripts/quickstart goes the other way).

usage: engine_main.py SOCKET
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import multiprocessing
import os
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any

PRELOAD = [
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.utils",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.model_loader.default_loader",
    "pillion.vllm.connector",
]


def preload() -> None:
    fork = multiprocessing.get_context("fork")
    for name in PRELOAD:
        module = importlib.import_module(name)
        if hasattr(module, "get_mp_context"):
            # On CPU vLLM would insist on "spawn".
            module.get_mp_context = lambda: fork  # type: ignore[attr-defined]
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: F401

    rotate_three_dimensions_right()
    keep_prefix_caching_of_mla()


def rotate_three_dimensions_right() -> None:
    """vllm/model_executor/layers/rotary_embedding/base.py: the CPU kernel is wrong for queries and keys in 3-D.

    It takes the stride of dimension -2 for a token's, which is a head's there: how a token is rotated then
    depends on how its prompt was cut into steps. LFM2 and DeepSeek call it so; what they answer with plain
    vLLM depends on what the prefix cache had. Llama and Gemma call it in 2-D, and are left alone.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    kernel = RotaryEmbedding.forward_cpu

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        if query.dim() == 3:
            return self.forward_native(positions, query, key)
        return kernel(self, positions, query, key)

    RotaryEmbedding.forward_cpu = forward_cpu


def keep_prefix_caching_of_mla() -> None:
    """vllm/platforms/cpu.py: without AMX, MLA loses prefix caching and prefill in chunks on CPU.

    What both need is there all the same (it is what AMX machines use), and answers are the same with it.
    Without it a KV connector would have nothing to do.
    """
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        caching, chunks = cache.enable_prefix_caching, scheduler.enable_chunked_prefill
        step_tokens = scheduler.max_num_batched_tokens
        check(cls, vllm_config)
        if vllm_config.model_config is not None and vllm_config.model_config.use_mla:
            cache.enable_prefix_caching, scheduler.enable_chunked_prefill = caching, chunks
            scheduler.max_num_batched_tokens = step_tokens

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


class Stats:
    """Sums of what vLLM hands to its loggers."""

    def __init__(self) -> None:
        self.sums: dict[str, int] = {"preemptions": 0, "steps": 0, "drafted": 0, "accepted": 0}

    def logger(self) -> Any:
        from vllm.v1.metrics.loggers import StatLoggerBase

        sums = self.sums

        class Logger(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *_args: Any, **_kwargs: Any) -> None:
                if iteration_stats is not None:
                    sums["preemptions"] += iteration_stats.num_preempted_reqs
                if scheduler_stats is not None:
                    sums["steps"] += 1
                    for name, count in (scheduler_stats.kv_connector_stats or {}).items():
                        sums[name] = sums.get(name, 0) + int(count)
                    if (drafted := scheduler_stats.spec_decoding_stats) is not None:
                        sums["drafted"] += drafted.num_draft_tokens
                        sums["accepted"] += drafted.num_accepted_tokens

            def log_engine_initialized(self) -> None:
                pass

        return Logger


def identity_of(_worker: Any) -> dict[str, Any]:
    """The namespace that the shim in this worker has built, and what it registered (called in the worker)."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from pillion.vllm import identity

    connector = get_kv_transfer_group()
    config = connector._kv_cache_config
    return {
        "namespace": identity.namespaces(connector._vllm_config, config, connector._settings)[0],
        "group": connector._worker._described.groups[0],
    }


def counters_of(_worker: Any) -> dict[str, Any]:
    """What the client in this worker has counted."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    half = get_kv_transfer_group()._worker
    if half.client is None:
        return {"unquiesced": 0, "ready": False}  # refused, and uncached: nothing is ever under way
    return {
        **half.client.counters(),
        "unquiesced": half.client.unquiesced(),
        "ready": half.client.ready(),
        "status": half.client.status(),
    }


def block_hashes(token_ids: list[int], block_tokens: int) -> list[str]:
    """vLLM's own hashes of the full blocks of a prompt, in hex."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils

    function = get_hash_fn_by_name("sha256")
    kv_cache_utils.init_none_hash(function)
    hashes: list[str] = []
    parent = None
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        parent = kv_cache_utils.hash_block_tokens(
            function, parent, token_ids[start : start + block_tokens], None
        )
        hashes.append(bytes(parent).hex())
    return hashes


class Session:
    """One engine, and the connection that it is driven through."""

    def __init__(self, engine: Any, stats: Stats, reader: Any, writer: Any) -> None:
        self.engine = engine
        self.stats = stats
        self.reader = reader
        self.writer = writer
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.requests: dict[int, asyncio.Task[None]] = {}

    def send(self, **message: Any) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")

    async def run(self) -> None:
        while line := await self.reader.readline():
            message = json.loads(line)
            task = asyncio.create_task(self.answer(message))
            self.tasks[message["id"]] = task
            if message["op"] == "generate":
                self.requests[message["id"]] = task
            task.add_done_callback(functools.partial(self._forget, message["id"]))

    def _forget(self, number: int, _task: Any) -> None:
        self.tasks.pop(number, None)
        self.requests.pop(number, None)

    async def answer(self, message: dict[str, Any]) -> None:
        number, op = message.pop("id"), message.pop("op")
        try:
            self.send(id=number, ok=await getattr(self, f"do_{op}")(number, **message))
        except asyncio.CancelledError:
            self.send(id=number, aborted=True)
        except Exception as error:
            traceback.print_exc()
            self.send(id=number, error=f"{type(error).__name__}: {error}")

    async def do_generate(
        self,
        number: int,
        tokens: list[int],
        max_tokens: int,
        logprobs: int | None = None,
        salt: str | None = None,
        adapter: tuple[str, int, str] | None = None,
    ) -> dict[str, Any]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        sampling = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        begun = time.monotonic()
        times: list[float] = []
        seen = 0
        output = None
        prompt = {"prompt_token_ids": tokens, **({"cache_salt": salt} if salt else {})}
        lora = LoRARequest(*adapter) if adapter else None
        async for output in self.engine.generate(prompt, sampling, f"r{number}", lora_request=lora):
            count = len(output.outputs[0].token_ids)
            if count > seen:
                times.append(time.monotonic() - begun)
                if not seen:
                    self.send(id=number, event="first")
                seen = count
        assert output is not None
        choice = output.outputs[0]
        params = output.kv_transfer_params or {}
        gaps = []
        for step in choice.logprobs or []:
            best = sorted((entry.logprob for entry in step.values()), reverse=True)
            gaps.append(best[0] - best[1])
        return {
            "tokens": list(choice.token_ids),
            "finish": choice.finish_reason,
            "cached": output.num_cached_tokens or 0,
            "loaded": params.get("pillion", {}).get("loaded_tokens", 0),
            "preemptions": getattr(output.metrics, "num_preemptions", 0),
            "times": times,
            "took": time.monotonic() - begun,
            "gap": min(gaps, default=None),
        }

    async def do_abort(self, _number: int, request: int) -> bool:
        task = self.requests.get(request)
        return task.cancel() if task is not None else False

    async def do_reset(self, _number: int, connector: bool = False, running: bool = False) -> bool:
        return bool(
            await self.engine.reset_prefix_cache(reset_running_requests=running, reset_connector=connector)
        )

    async def do_pause(self, _number: int, mode: str = "keep", clear_cache: bool = False) -> None:
        await self.engine.pause_generation(mode=mode, clear_cache=clear_cache)

    async def do_resume(self, _number: int) -> None:
        await self.engine.resume_generation()

    async def do_stats(self, _number: int) -> dict[str, int]:
        return dict(self.stats.sums)

    async def do_identity(self, _number: int) -> dict[str, Any]:
        (found,) = await self.engine.collective_rpc(identity_of)
        return dict(found)

    async def do_counters(self, _number: int) -> dict[str, Any]:
        first, *others = await self.engine.collective_rpc(counters_of)
        for other in others:
            for name, value in other.items():
                # Sums over the ranks; ready if all are.
                first[name] = first[name] and value if isinstance(value, bool) else first[name] + value
        return dict(first)

    async def do_hashes(self, _number: int, tokens: list[int], block_tokens: int) -> list[str]:
        return block_hashes(tokens, block_tokens)


async def serve(connection: socket.socket, options: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    begun = time.monotonic()
    stats = Stats()
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options), stat_loggers=[stats.logger()])
    reader, writer = await asyncio.open_connection(sock=connection, limit=1 << 26)
    session = Session(engine, stats, reader, writer)
    config = engine.vllm_config.cache_config
    session.send(
        ready=True,
        took=time.monotonic() - begun,
        num_blocks=config.num_gpu_blocks,
        block_tokens=config.block_size,
    )
    try:
        await session.run()
    finally:
        engine.shutdown()


def child(connection: socket.socket) -> None:
    """Everything after the fork: one engine's life."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(1 << 20)
        if not part:
            return
        data += part
    order = json.loads(data)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["environment"])
    connection.sendall(json.dumps({"group": os.getpid()}).encode() + b"\n")
    try:
        asyncio.run(serve(connection, order["options"]))
    except BaseException as error:
        traceback.print_exc()
        try:
            connection.setblocking(True)
            connection.sendall(json.dumps({"fatal": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        except OSError:
            pass
        raise


def main() -> None:
    path = sys.argv[1]
    preload()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forked engines are nobody's zombies
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in readable:
            return  # it is a pipe from the test run, which has ended
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            code = 1
            try:
                child(connection)
                code = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        connection.close()


if __name__ == "__main__":
    main()
