"""What the scheduler half knows about a live request."""

import hashlib
from collections.abc import Sequence
from typing import Any

from pillion.vllm.hits import Run


class Req:
    """One request, from its arrival to its end."""

    __slots__ = (
        "_derived",
        "_last",
        "adapter",
        "asked_at",
        "asks",
        "attempted",
        "due",
        "ends",
        "first_poll",
        "form",
        "hit",
        "lacking",
        "lease",
        "loaded_tokens",
        "loading",
        "no_save",
        "polled",
        "promised",
        "request",
        "runs",
        "saved",
        "ticket",
    )

    def __init__(self, request: Any, groups: int) -> None:
        self.request = request
        self.adapter: bytes | None = None  # fingerprint of the LoRA adapter's weights
        self._derived: list[bytes] = []
        self._last = b""  # the hash that the last of them is derived from
        self.ticket = 0  # of a lease that no job uses yet
        self.asks = 0  # leases asked for
        self.asked_at = 0.0
        self.first_poll = 0.0
        self.polled = 0  # the ticket that was waited for once
        self.runs: list[Run] = []  # what the lease was asked for
        self.form = 0  # in which form, see `shards`
        self.lacking: set[tuple[int, int]] = set()  # blocks that a lease was refused for
        self.hit = -1  # tokens granted; -1 while there is no answer
        self.lease = b""
        self.promised: tuple[int, int, int] | None = None  # (own tokens, hit, blocks) of the last answer
        self.attempted = False  # one load attempt per request, ever
        self.loading: bytes | None = None  # job id
        self.loaded_tokens = 0
        self.saved = [0] * groups  # blocks of each group that are stored, on their way, or given up
        # Of groups with states: (block, its id, preemptions before) where a step ended last at a block boundary.
        self.ends: dict[int, tuple[int, int, int]] = {}
        self.no_save = False
        self.due = -1  # step in which its next block can be full, at the earliest

    def keys(self) -> Sequence[bytes]:
        """By what its blocks are known: vLLM's hashes, and the adapter's weights where there is one.

        vLLM's hash names an adapter by name and path, not by its weights.
        """
        hashes: list[bytes] = self.request.block_hashes
        if self.adapter is None:
            return hashes
        derived, known = self._derived, len(self._derived)
        if known > len(hashes) or (known and hashes[known - 1] != self._last):
            derived.clear()  # a streaming session's last tokens were replaced
        for own in hashes[len(derived) :] if len(derived) < len(hashes) else ():
            derived.append(hashlib.sha256(self.adapter + own).digest())
            self._last = own
        return derived
