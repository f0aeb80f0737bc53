"""Real vLLM engines for a Python that may not have our wheel: the peers' environment.

usage: python -m harness.engine_main SOCKET, as tests/e2e/engine_main.py, which does all of it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from e2e import engine_main


def let_vllm_look_at_llvmlite() -> None:
    """vllm/triton_utils/dispatcher.py asks everything that is imported for its `__dict__`, and takes it for a dict.

    llvmlite's library, which LMCache has imported by then (by numba), answers to any name with a function: the
    worker would die.
    """
    ffi: Any = importlib.import_module("llvmlite.binding.ffi")
    answer = ffi._lib_wrapper.__getattr__

    def __getattr__(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return answer(self, name)

    ffi._lib_wrapper.__getattr__ = __getattr__


class Silent(engine_main.Stats):
    """Takes no notice of what is told: connectors tell things of their own kinds."""

    def logger(self) -> Any:
        from vllm.v1.metrics.loggers import StatLoggerBase

        class Logger(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(self, *_args: Any, **_kwargs: Any) -> None:
                pass

            def log_engine_initialized(self) -> None:
                pass

        return Logger


if __name__ == "__main__":
    engine_main.Stats = Silent  # type: ignore[misc]
    if importlib.util.find_spec("pillion") is None:
        engine_main.PRELOAD.remove("pillion.vllm.connector")
        let_vllm_look_at_llvmlite()
    engine_main.main()
