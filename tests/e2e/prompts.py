"""Every prompt of these tests, as token ids: fixed by its name, so that one plain vLLM can answer all of them first."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

BLOCK = 32
TOKENS = range(10, 900)
"""Of the model's vocabulary: no special ones among them."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as a user names it."""

    name: str
    number: int
    """vLLM's; one for each name."""
    path: Path


@dataclass(frozen=True)
class Prompt:
    name: str
    tokens: tuple[int, ...]
    max_tokens: int
    adapter: Adapter | None = None
    salt: str | None = None

    def under(self, adapter: Adapter) -> Prompt:
        return replace(self, name=f"{self.name}@{adapter.name}", adapter=adapter)

    def salted(self, salt: str) -> Prompt:
        """What this answers is what it answers without salt."""
        return replace(self, salt=salt)

    @property
    def blocks(self) -> int:
        """Full blocks."""
        return len(self.tokens) // BLOCK

    @property
    def usable(self) -> int:
        """Tokens that a load can bring: whole blocks, and one token is always computed."""
        return self.usable_in(BLOCK)

    def usable_in(self, block: int) -> int:
        """The same where blocks have another size."""
        return (len(self.tokens) - 1) // block * block


Registry = dict[str, Prompt]
REGISTRY: Registry = {}
KINDS: Registry = {}
"""Those for models of other kinds: fewer, since each kind needs answers of its own to all of them."""


def text(name: str, length: int) -> tuple[int, ...]:
    rng = random.Random(f"pillion e2e {name}")
    return tuple(rng.choice(TOKENS) for _ in range(length))


def prompt(
    name: str,
    length: int,
    *,
    prefix: tuple[int, ...] = (),
    max_tokens: int = 8,
    registry: Registry = REGISTRY,
) -> Prompt:
    """A prompt of `length` tokens in all, after a prefix that others may share."""
    assert name not in registry, name
    made = Prompt(name, prefix + text(name, length - len(prefix)), max_tokens)
    registry[name] = made
    return made


def several(
    name: str,
    count: int,
    length: int,
    *,
    step: int = 0,
    max_tokens: int = 8,
    registry: Registry = REGISTRY,
) -> list[Prompt]:
    return [
        prompt(f"{name}-{n}", length + n * step, max_tokens=max_tokens, registry=registry)
        for n in range(count)
    ]


# ---- fresh, warm, restarted

LONG = several("long", 4, 900, step=-37)
SHARED = text("shared", 320)
SHARING = [prompt(f"sharing-{n}", 400 + 11 * n, prefix=SHARED) for n in range(4)]
SHORT = [prompt(f"short-{n}", n) for n in (1, 5, 31)]
EDGES = [prompt(f"edge-{k * BLOCK + off}", k * BLOCK + off) for k in (1, 2, 7) for off in (-1, 0, 1)]
CROWD = several("crowd", 32, 200, step=7, max_tokens=12)
CHUNKED = several("chunked", 3, 1500, step=-101)
COMMON = text("common", 352)
GROWN = [prompt(f"grown-{n}", 700 + 50 * n, prefix=COMMON) for n in range(2)]

# ---- aborted, reset, paused

ABORTED = several("aborted", 12, 420, step=13, max_tokens=16)
RESET = several("reset", 4, 330, step=21)
PAUSED = several("paused", 4, 310, step=29, max_tokens=24)
CLEARED = several("cleared", 3, 290, step=31, max_tokens=24)

# ---- load while a sidecar is ill: a fresh set for each kind of illness

ILLS = ("none", "killed", "stopped", "muted", "restarted", "unlinked", "minute")
LOAD = {ill: several(f"load-{ill}", 12, 230, step=11, max_tokens=16) for ill in ILLS}
AFTER = {ill: several(f"after-{ill}", 2, 300, step=40) for ill in ILLS}
TIGHT = several("tight", 14, 330, step=9, max_tokens=72)

SOAKED: Registry = {}
SOAK = several("soak", 12, 230, step=31, max_tokens=12, registry=SOAKED)
"""For campaigns: no test asks them."""

# ---- engines that are killed, sidecars that come late, noise, other models

VICTIMS = several("victim", 6, 640, step=-33, max_tokens=16)
LATE = several("late", 3, 350, step=33)
NOISY = several("noisy", 2, 290, step=64, max_tokens=12)
OTHERS = several("other", 2, 340, step=40)
OLDER = several("older", 2, 360, step=40)

# ---- models of other kinds

KINDS_LONG = several("kinds-long", 3, 900, step=-141, registry=KINDS)
KINDS_SHARED = text("kinds-shared", 320)
KINDS_SHARING = [
    prompt(f"kinds-sharing-{n}", 400 + 11 * n, prefix=KINDS_SHARED, registry=KINDS) for n in range(4)
]
KINDS_COMMON = text("kinds-common", 352)
KINDS_GROWN = [
    prompt(f"kinds-grown-{n}", 600 + 50 * n, prefix=KINDS_COMMON, registry=KINDS) for n in range(2)
]
KINDS_EDGES = [prompt(f"kinds-edge-{n}", n, registry=KINDS) for n in (31, 32, 33, 79, 80, 81, 223, 224, 225)]
"""Around the edges of blocks, and of Gemma's window."""
KINDS_CROWD = several("kinds-crowd", 12, 200, step=17, max_tokens=12, registry=KINDS)
KINDS_LOAD = several("kinds-load", 8, 230, step=23, max_tokens=16, registry=KINDS)
KINDS_TIGHT = several("kinds-tight", 12, 330, step=9, max_tokens=72, registry=KINDS)

# ---- adapters

ADAPTED = several("adapted", 3, 420, step=-90, registry=KINDS)
