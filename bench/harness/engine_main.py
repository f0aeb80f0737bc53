"""Real vLLM engines for a Python that may not have our wheel: the peers' environment.

usage: engine_main.py SOCKET, as tests/e2e/engine_main.py, which does all of it.
"""

from __future__ import annotations

import importlib.util

from e2e import engine_main

if __name__ == "__main__":
    if importlib.util.find_spec("pillion") is None:
        engine_main.PRELOAD.remove("pillion.vllm.connector")
    engine_main.main()
