"""What a hit needs of every KV cache group, and the longest one that the presence tables promise.

A hit of N tokens makes the engine go on at token N. For that it needs, of each group:

- full attention (MLA too): every block up to N;
- a sliding window: the blocks that the window of token N reaches back into, as vLLM's `SlidingWindowManager` counts
  them (`cdiv(window - 1, block)`); it puts its null block in the place of those before;
- a recurrent state (Mamba, GDN, short convolution): the one block that holds the state after exactly N tokens.

With a drafter that looks one token ahead (EAGLE, MTP), the last token's KV of the drafter in a block is that of whoever
came first, who may have gone on otherwise. As vLLM does for its own cache, a hit then ends where one more block is
there, of every group that may have such layers: the block after it says that the first of its tokens is the same.

N is a multiple of every group's block size (vLLM's scheduler takes no other), and the search goes as
`HybridKVCacheCoordinator.find_longest_cache_hit` does: each group shortens the candidate until none does.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

FULL, WINDOW, STATE = range(3)


@dataclass(frozen=True)
class Group:
    """One KV cache group, by its index in vLLM's configuration."""

    kind: int
    block_tokens: int
    hashes: int = 1  # block hashes per block: a block is known by its last one
    window_blocks: int = 0  # of WINDOW: blocks before a boundary that the next token reaches
    block_bytes: int = 0
    proof_blocks: int = 0  # blocks behind a hit that must be there, too, and are not loaded
    dense_states: bool = (
        False  # of STATE: every full block is a state (vLLM's mode "all"), not only some ("align")
    )

    def need(self, tokens: int) -> tuple[int, int]:
        """(first, end) of the blocks that a hit of so many tokens needs."""
        end = tokens // self.block_tokens
        if self.kind == FULL:
            return 0, end
        return max(0, end - (1 if self.kind == STATE else self.window_blocks)), end


Run = tuple[int, int, int]  # group, first block, end


class Hits:
    """The groups of one engine, and the search over them."""

    def __init__(self, groups: Sequence[Group], hash_tokens: int) -> None:
        self.groups = tuple(groups)
        self.hash_tokens = hash_tokens  # tokens per block hash
        self.align = math.lcm(*(group.block_tokens for group in groups))
        # Its answer to a lease is a search already: no lookup is needed before.
        first = self.groups[0]
        self.prefix_only = len(self.groups) == 1 and first.kind == FULL and not first.proof_blocks
        self._proof_tokens = [group.proof_blocks * group.block_tokens for group in groups]
        self._full = [index for index, group in enumerate(groups) if group.kind == FULL]
        self._partial = [index for index, group in enumerate(groups) if group.kind != FULL]

    def usable(self, num_tokens: int, num_hashes: int) -> int:
        """The longest hit that a request could use.

        One token is always left to compute, so that a block that others may share is never rewritten.
        """
        known = num_hashes * self.hash_tokens - max(self._proof_tokens)
        return max(0, min(num_tokens - 1, known) // self.align * self.align)

    def runs(self, tokens: int) -> list[Run]:
        """What a hit of so many tokens needs."""
        return [(index, *group.need(tokens)) for index, group in enumerate(self.groups)]

    def missing(self, tokens: int, local: int) -> list[Run]:
        """The same without what the engine has itself, whose own hit is `local` tokens long."""
        found = []
        for index, group in enumerate(self.groups):
            first, end = group.need(tokens)
            if group.kind != STATE:
                first = max(first, local // group.block_tokens)
            if first < end:
                found.append((index, first, end))
        return found

    def blocks(self, tokens: int, local: int) -> int:
        """How many blocks `missing` names."""
        return sum(end - first for _, first, end in self.missing(tokens, local))

    def keys(self, keys: Sequence[bytes], index: int, first: int, end: int) -> Sequence[bytes]:
        """The hashes by which the blocks first…end of a group are known."""
        per_block = self.groups[index].hashes
        if per_block == 1:
            return keys[first:end]
        return keys[(first + 1) * per_block - 1 : end * per_block : per_block]

    def joined(self, keys: Sequence[bytes], index: int, first: int, end: int) -> bytes:
        """The same as the client takes them."""
        return b"".join(self.keys(keys, index, first, end))

    def longest(
        self,
        client: Any,
        keys: Sequence[bytes],
        tokens: int,
        lacking: Collection[tuple[int, int]] = (),
        form: int = 0,
    ) -> int:
        """The longest hit of at most `tokens` in one form (see `shards`).

        `lacking` are blocks (group of the form, index) that the table is wrong about.
        """
        tokens = tokens // self.align * self.align
        base = form * len(self.groups)
        if form and self._full:
            # As a rule nobody has stored a prompt in another form: that should cost next to nothing.
            first = self._full[0]
            if not client.lookup(base + first, self.joined(keys, first, 0, 1)):
                return 0
        for index in self._full:
            size, proof = self.groups[index].block_tokens, self.groups[index].proof_blocks
            wanted = self.joined(keys, index, 0, tokens // size + proof)
            have = client.lookup(base + index, wanted) - proof if tokens else 0
            have = min([max(0, have), *(block for group, block in lacking if group == base + index)])
            tokens = min(tokens, have * size) // self.align * self.align
        there: dict[int, bytearray] = {}
        for index in self._partial if tokens else ():
            # What lies before the longest hit's own blocks counts too: a shorter hit may need it.
            end = tokens // self.groups[index].block_tokens + self.groups[index].proof_blocks
            flags = bytearray(client.present(base + index, self.joined(keys, index, 0, end)))
            if len(flags) != end:
                return 0
            for group, block in lacking:
                if group == base + index and block < len(flags):
                    flags[block] = 0
            there[index] = flags
        before = -1
        while tokens != before:
            before = tokens
            for index, own in there.items():
                tokens = self._fit(self.groups[index], own, tokens)
        return tokens

    def _fit(self, group: Group, there: bytearray, tokens: int) -> int:
        """The longest hit of at most `tokens` that this window or state group allows."""
        size = group.block_tokens
        while tokens > 0:
            first, end = group.need(tokens)
            end += group.proof_blocks
            if group.kind == STATE:
                last = there.rfind(1, 0, end)  # states are far between
                if last == end - 1:
                    return tokens
                tokens = (last + 1) * size // self.align * self.align
                continue
            gap = there.rfind(0, first, end)
            if gap < 0:
                return tokens
            # Every longer hit's window would hold this block as well.
            tokens = max(0, gap - group.proof_blocks) * size // self.align * self.align
        return 0

    def shorter(self, tokens: int, local: int, room: int) -> int:
        """The longest hit of at most `tokens` whose missing blocks number at most `room`; `local` where none does."""
        low, high = local // self.align, tokens // self.align
        while low < high:
            middle = (low + high + 1) // 2
            if self.blocks(middle * self.align, local) <= room:
                low = middle
            else:
                high = middle - 1
        return low * self.align

    def lacked(self, runs: Sequence[Run], granted: Sequence[int], form: int = 0) -> set[tuple[int, int]]:
        """The first block of each run that was not granted, by the groups of the form."""
        return {
            (form * len(self.groups) + index, first + count)
            for (index, first, end), count in zip(runs, granted, strict=False)
            if first + count < end
        }
