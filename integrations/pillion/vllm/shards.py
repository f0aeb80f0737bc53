"""Blocks that engines of other tensor-parallel sizes have stored.

A rank stores the heads that it holds of a block as one record, a *shard*: "2/4" is the second of four equal parts. A
rank of an engine of another size holds some heads of one such shard, or all of several. It loads its part of each, and
goes on to save its own shards, so that a cache moves to the new size as it is used.

A *form* is one way in which a block may be stored. Form 0 is our own: each group's block is one record. In any other
form, that of another number of ranks, a group's block is there if every shard is there that holds heads of this rank.
The groups of form f are known by the indices `f * groups + group`.

To the native client every such shard is a further group, behind the engine's own ones: looked up and leased like these
by the scheduler's half, loaded and never saved by the worker's.

Only attention divides by heads. MLA's latents are the same on all ranks, and so in every form. What part of a recurrent
state a rank holds is not known, and a drafter's layers need not divide as the model's do: an engine with either has its
own form only.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from pillion.vllm import identity, support
from pillion.vllm.hits import STATE
from pillion.vllm.metadata import LoadPlan

# Numbers of ranks whose records are looked for.
RANKS_MAX = 16


class Shard(NamedTuple):
    """One of so many equal parts of a group's blocks, counted from 0."""

    group: int
    number: int
    shards: int


class Forms:
    """One rank's: which of the client's groups hold a block of each group, in each form."""

    def __init__(
        self, groups: int, others: Sequence[Shard], forms: Sequence[Sequence[Sequence[int]]]
    ) -> None:
        self.groups = groups
        self.others = list(others)  # the client's groups from `groups` on
        self._forms = [[list(parts) for parts in form] for form in forms]

    @classmethod
    def own(cls, groups: int) -> "Forms":
        """Of an engine that looks for nothing but what its like have stored."""
        return cls(groups, [], [[[group] for group in range(groups)]])

    def __len__(self) -> int:
        return len(self._forms)

    def parts(self, group: int) -> list[int]:
        """The client's groups that together are a group of some form."""
        form, group = divmod(group, self.groups)
        return self._forms[form][group]

    def all_parts(self, form: int) -> list[int]:
        """Those of all groups of a form, one after the other: the runs of a lease, and the namespaces of a load."""
        return [part for parts in self._forms[form] for part in parts]

    def spread(self, plan: LoadPlan) -> LoadPlan:
        """The same load by the client's groups: every block comes in as many parts as there are records of it."""
        form = self._forms[plan.form]
        begins = list(accumulate((len(parts) for parts in form), initial=0))
        size = len(plan.hashes) // max(1, len(plan.blocks))
        runs: list[tuple[int, int, int, int]] = []
        hashes: list[bytes] = []
        blocks: list[int] = []
        at = 0
        for group, run, first, count in plan.runs:
            # The lease has one run for every group, in the groups' order.
            for part in range(len(form[run])):
                runs.append((begins[group] + part, begins[run] + part, first, count))
                hashes.append(plan.hashes[at * size : (at + count) * size])
                blocks += plan.blocks[at : at + count]
            at += count
        return plan._replace(runs=runs, hashes=b"".join(hashes), blocks=blocks)


def forms(vllm_config: Any, kv_cache_config: Any, rank: int, world: int) -> Forms:
    """Every form in which this rank can find blocks: its own first, then by the number of ranks."""
    specs = [support.layer_spec(group) for group in kv_cache_config.kv_cache_groups]
    # A drafter's layers may be divided otherwise than the model's.
    if any(support.kind_of(spec) == STATE for spec in specs) or identity.has_drafter(vllm_config):
        return Forms.own(len(specs))
    own = [identity.shards(vllm_config, spec) for spec in specs]
    # Heads of the whole model; 0 where every rank has all there is.
    heads = [
        0 if type(spec).__name__ == "MLAAttentionSpec" else spec.num_kv_heads * count
        for spec, count in zip(specs, own, strict=True)
    ]
    others: dict[Shard, int] = {}
    found = [[[group] for group in range(len(specs))]]
    seen = [own]
    for ranks in range(1, RANKS_MAX + 1):
        counts = [_shards(total, ranks) for total in heads]
        if 0 in counts or counts in seen:
            continue
        seen.append(counts)
        form = []
        for group, (ours, theirs) in enumerate(zip(own, counts, strict=True)):
            mine = rank // (world // ours)
            wanted = [
                Shard(group, number, theirs)
                for number in range(mine * theirs // ours, -(-(mine + 1) * theirs // ours))
            ]
            form.append(
                [group]
                if theirs == ours
                else [others.setdefault(shard, len(specs) + len(others)) for shard in wanted]
            )
        found.append(form)
    return Forms(len(specs), list(others), found)


def _shards(heads: int, ranks: int) -> int:
    """Into how many parts so many ranks divide the heads, as `identity.shards` says it; 0 where they cannot."""
    if heads == 0:
        return 1
    if heads % ranks == 0:
        return ranks
    return heads if ranks % heads == 0 else 0
