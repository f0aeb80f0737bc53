"""LMCache's own bench client as a program that does what it is told: it runs on the Python that has LMCache.

usage: python -m harness.lmcache_client CONFIG, the keywords of `BenchConfig` as JSON. Then one JSON line for every
operation on stdin, answered by one line on stdout. What is timed, and how, is LMCache's own: `lmcache bench server`.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
import time
from typing import Any


class Client:
    def __init__(self, config: dict[str, Any]) -> None:
        place = "lmcache.cli.commands.bench.server_bench"
        options = importlib.import_module(f"{place}.config").BenchConfig(**config)
        self.client = importlib.import_module(f"{place}.client").ServerBenchClient(
            options, lambda _text: None
        )
        self.client.start()
        self.numbers = itertools.count()
        self.compared = False

    def request(self, sequence: int) -> Any:
        return self.client.create_request(sequence, f"request-{next(self.numbers)}", "bench")

    def lookup(self, sequence: int) -> dict[str, Any]:
        """Milliseconds until the answer, and how much of the prompt was found."""
        request = self.request(sequence)
        found = self.client.lookup(request)
        self.client.end_session(request)
        return {
            "ms": found.latency_ms,
            "found": found.hit_chunks,
            "of": found.total_chunks,
            "error": found.error,
        }

    def store(self, sequence: int) -> dict[str, Any]:
        """Milliseconds of a store of the whole prompt; nothing of it may be there."""
        request = self.request(sequence)
        self.client.lookup(request)
        done = self.client.store(request, start_token=0, token_count=request.num_full_tokens)
        self.client.end_session(request)
        return {"ms": done.latency_ms, "ok": done.succeeded}

    def found(self, sequence: int) -> tuple[Any, bool]:
        """A request whose prompt is all there: what was stored is found a moment later."""
        for _ in range(50):
            request = self.request(sequence)
            if self.client.lookup(request).is_full_hit:
                return request, True
            self.client.end_session(request)
            time.sleep(0.1)
        return request, False

    def retrieve(self, sequence: int) -> dict[str, Any]:
        """Milliseconds of a load of the whole prompt, and whether it went well: the first one's bytes are compared."""
        request, found = self.found(sequence)
        span = {"start_token": 0, "token_count": request.num_full_tokens}
        before = None if self.compared else self.client.compute_checksums(request, **span)
        self.client.zero_destination(request, **span)
        done = self.client.retrieve(request, **span)
        self.client.end_session(request)
        same = self.compared or (
            before is not None and before == self.client.compute_checksums(request, **span)
        )
        self.compared = True
        return {"ms": done.latency_ms, "ok": done.succeeded and found and same}


def main() -> None:
    # What is printed by libraries must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    client = Client(json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(client, order["op"])(order["sequence"])), file=answers)
    client.client.close()


if __name__ == "__main__":
    main()
