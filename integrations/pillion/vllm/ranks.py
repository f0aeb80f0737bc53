"""The scheduler's clients of all ranks' sidecars, used as if they were one.

A group may stand for several of a client's groups, which differ by rank (`shards`): it has a block that all of them have.

A block counts only if every rank has its part of it: a hit is what all ranks have, a block is absent if any rank
lacks it, and a lease is granted once all have granted. One slow, dead or refusing rank is a miss
for all. What travels to the workers (leases, namespaces) is the ranks' ids one after the other; each takes its
own (`part`).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from pillion.vllm.shards import Forms

HASH_BYTES = 32
ID_BYTES = 16
LEASE_BLOCKS_MAX = 65_536  # of the protocol


def part(ids: bytes, rank: int, world: int) -> bytes:
    """A rank's own share of what the scheduler's half sent to all: its lease, or the ids of its groups."""
    size = len(ids) // world
    return ids[rank * size :][:size]


class Ranks:
    """The interface of `pillion._native.SchedulerClient` over one client per rank."""

    def __init__(self, clients: Sequence[Any], forms: Sequence[Forms] = ()) -> None:
        self.clients = list(clients)
        self._forms = list(forms)  # of each rank; none: groups are the clients' groups
        self._asked: dict[int, list[list[int]]] = {}  # ticket -> how many runs every run became, by rank
        self._tickets: dict[int, list[int]] = {}
        self._answers: dict[int, list[tuple[list[int], bytes] | None]] = {}
        self._minted = 0

    def ready(self) -> bool:
        return all(client.ready() for client in self.clients)

    def status(self) -> str:
        """Of the first rank that is not ready."""
        for rank, client in enumerate(self.clients):
            if not client.ready():
                text = str(client.status())
                # What begins so ends the waiting at the start.
                return text if text.startswith("refused") else f"{text} (rank {rank})"
        return "ready"

    def _parts(self, rank: int, group: int) -> list[int]:
        """What a group is to one rank's client."""
        return self._forms[rank].parts(group) if self._forms else [group]

    def namespace_ids(self, form: int = 0) -> bytes | None:
        """All ranks' ids of all groups of a form; None while one has none."""
        ids: list[bytes] = []
        for rank, client in enumerate(self.clients):
            own = client.namespace_ids()
            if own is None:
                return None
            if self._forms:
                parts = self._forms[rank].all_parts(form)
                own = b"".join(own[part * ID_BYTES :][:ID_BYTES] for part in parts)
            ids.append(own)
        # Where heads divide unevenly some ranks need fewer shards: what is behind their ids is not looked at.
        size = max(map(len, ids))
        return b"".join(own.ljust(size, b"\0") for own in ids)

    def lookup(self, group: int, hashes: bytes) -> int:
        """Leading blocks that all ranks have."""
        count = len(hashes) // HASH_BYTES
        for rank, client in enumerate(self.clients):
            for part in self._parts(rank, group):
                if not count:
                    return 0
                count = min(count, client.lookup(part, hashes[: count * HASH_BYTES]))
        return count

    def present(self, group: int, hashes: bytes) -> bytes:
        """One byte per block, 1 where all ranks have it."""
        count = len(hashes) // HASH_BYTES
        everywhere = int.from_bytes(b"\1" * count, "big")
        for rank, client in enumerate(self.clients):
            for part in self._parts(rank, group):
                own = client.present(part, hashes) if everywhere else b""
                everywhere &= int.from_bytes(own, "big") if len(own) == count else 0
        return everywhere.to_bytes(count, "big")

    def absent(self, group: int, hashes: bytes) -> list[int]:
        """Indices of blocks of one of our own groups that some rank lacks."""
        missing: set[int] = set()
        for client in self.clients:
            missing.update(client.absent(group, hashes))
        return sorted(missing)

    def lease(self, runs: Sequence[tuple[int, bytes]]) -> int:
        """Asks every rank for the same; 0 where one has nothing to ask.

        Of a single run that may end early, only for what all of them seem to have.
        """
        ranks = range(len(self.clients))
        shapes = [[len(self._parts(rank, group)) for group, _ in runs] for rank in ranks]
        if len(runs) == 1 and shapes != [[1]]:  # a client alone looks for itself
            group, hashes = runs[0]
            blocks = min(self.lookup(group, hashes), LEASE_BLOCKS_MAX // max(own[0] for own in shapes))
            runs = [(group, hashes[: blocks * HASH_BYTES])]
        tickets: list[int] = []
        if all(hashes for _, hashes in runs):
            try:
                for rank, client in enumerate(self.clients):
                    own = [(part, hashes) for group, hashes in runs for part in self._parts(rank, group)]
                    ticket = client.lease(own)
                    if not ticket:
                        break
                    tickets.append(ticket)
            except BaseException:
                self._release_all(tickets)
                raise
        if len(tickets) < len(self.clients):
            self._release_all(tickets)
            return 0
        self._minted += 1
        self._tickets[self._minted] = tickets
        self._asked[self._minted] = shapes
        self._answers[self._minted] = [None] * len(tickets)
        return self._minted

    def lease_poll(self, ticket: int, wait_us: int = 0) -> tuple[list[int], bytes] | None:
        """(blocks of each run that all ranks granted, their leases); None until the last has answered."""
        tickets, answers = self._tickets.get(ticket), self._answers.get(ticket)
        if tickets is None or answers is None:
            return [], b""
        until = time.monotonic() + wait_us / 1e6
        for rank, client in enumerate(self.clients):
            if answers[rank] is None:
                left_us = max(0, int((until - time.monotonic()) * 1e6)) if wait_us else 0
                answer = client.lease_poll(tickets[rank], left_us)
                answers[rank] = answer and (_least(answer[0], self._asked[ticket][rank]), answer[1])
        known = [answer for answer in answers if answer is not None]
        # A rank that granted nothing may say so with no counts at all.
        runs = min((len(granted) for granted, _ in known), default=0)
        blocks = [min(granted[run] for granted, _ in known) for run in range(runs)]
        if known and not any(blocks):
            return [], b""  # whatever the others say
        if len(known) < len(answers):
            return None
        return blocks, b"".join(lease for _, lease in known)

    def release(self, ticket: int) -> None:
        """Idempotent. Every rank's lease is given back, whatever the others do."""
        self._answers.pop(ticket, None)
        self._asked.pop(ticket, None)
        self._release_all(self._tickets.pop(ticket, []))

    def _release_all(self, tickets: Sequence[int]) -> None:
        self._each(lambda rank: self.clients[rank].release(tickets[rank]), len(tickets))

    def lease_used(self, ticket: int) -> None:
        for client, own in zip(self.clients, self._tickets.get(ticket, []), strict=False):
            client.lease_used(own)

    def read_each_other(self) -> bool:
        """Whether every rank's sidecar reads the pools of all others."""
        devices = {client.device() for client in self.clients}
        return all(devices <= {client.device(), *client.neighbours()} for client in self.clients)

    def new_epoch(self) -> None:
        """From now on no other engine stores what we can use: there is our own form only."""
        own = self._forms[0].groups if self._forms else None
        self._forms = [Forms.own(own)] * len(self.clients) if own is not None else []
        self._each(lambda rank: self.clients[rank].new_epoch(own), len(self.clients))

    def counters(self) -> dict[str, int]:
        """Sums over the ranks."""
        total: dict[str, int] = {}
        for client in self.clients:
            for name, count in client.counters().items():
                total[name] = total.get(name, 0) + count
        return total

    def close(self) -> None:
        self._each(lambda rank: self.clients[rank].close(), len(self.clients))

    @staticmethod
    def _each(act: Callable[[int], Any], count: int) -> None:
        """Does it for all ranks; the first error comes out afterwards."""
        first: BaseException | None = None
        for rank in range(count):
            try:
                act(rank)
            except BaseException as error:
                first = first or error
        if first is not None:
            raise first


def _least(granted: Sequence[int], shape: Sequence[int]) -> list[int]:
    """What was granted of runs that became so many runs each: what all parts of it were granted."""
    if len(granted) != sum(shape):
        return []
    rest = iter(granted)
    return [min(next(rest) for _ in range(parts)) for parts in shape]
