"""The shortest proof for every vLLM that we serve: a restarted engine loads what the last one saved."""

from __future__ import annotations

import pytest

from e2e.prompts import LONG, OLDER, SHARED, SHARING
from e2e.world import Checker, World

pytestmark = [pytest.mark.vllm031, pytest.mark.vllm030]


def test_a_restarted_engine_loads_and_answers_the_same(world: World) -> None:
    import vllm

    release = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    prompts = [*OLDER, *LONG[2:], *SHARING]
    check = Checker(world, world.reference("a", prompts))
    sidecar = world.sidecar()
    first = world.engine("first", sidecar, max_num_batched_tokens=256)
    try:
        check(*first.ask_all(prompts[:-1]))
        first.quiet()
        # get_mem_pool_context came with 0.31: without it the sidecar reads the engine's own memory.
        registered = [one["registration"] for one in sidecar.sessions() if one["registration"]]
        assert [one["path"] for one in registered] == ["memfd" if release >= (0, 31) else "process_vm"]
        assert [one["canary"] for one in registered] == ["compared"]
    finally:
        first.stop()
    second = world.engine("second", sidecar, max_num_batched_tokens=256)
    try:
        check.loads(second, [*OLDER, *LONG[2:]])
        second.forget()
        check.loads(second, SHARING[-1:], len(SHARED))
        check(*second.ask_all(prompts))
    finally:
        second.stop()
    sidecar.idle()
