"""Every prompt of these tests, as token ids: fixed by its name, so that one plain vLLM can answer all of them first."""

from __future__ import annotations

import random
from dataclasses import dataclass

BLOCK = 32
TOKENS = range(10, 900)
"""Of the model's vocabulary: no special ones among them."""


@dataclass(frozen=True)
class Prompt:
    name: str
    tokens: tuple[int, ...]
    max_tokens: int

    @property
    def blocks(self) -> int:
        """Full blocks."""
        return len(self.tokens) // BLOCK

    @property
    def usable(self) -> int:
        """Tokens that a load can bring: whole blocks, and one token is always computed."""
        return (len(self.tokens) - 1) // BLOCK * BLOCK


REGISTRY: dict[str, Prompt] = {}


def text(name: str, length: int) -> tuple[int, ...]:
    rng = random.Random(f"pillion e2e {name}")
    return tuple(rng.choice(TOKENS) for _ in range(length))


def prompt(name: str, length: int, *, prefix: tuple[int, ...] = (), max_tokens: int = 8) -> Prompt:
    """A prompt of `length` tokens in all, after a prefix that others may share."""
    assert name not in REGISTRY, name
    made = Prompt(name, prefix + text(name, length - len(prefix)), max_tokens)
    REGISTRY[name] = made
    return made


def several(name: str, count: int, length: int, *, step: int = 0, max_tokens: int = 8) -> list[Prompt]:
    return [prompt(f"{name}-{n}", length + n * step, max_tokens=max_tokens) for n in range(count)]


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

# ---- engines that are killed, sidecars that come late, noise, other models

VICTIMS = several("victim", 6, 640, step=-33, max_tokens=16)
LATE = several("late", 3, 350, step=33)
NOISY = several("noisy", 2, 290, step=64, max_tokens=12)
OTHERS = several("other", 2, 340, step=40)
OLDER = several("older", 2, 360, step=40)
