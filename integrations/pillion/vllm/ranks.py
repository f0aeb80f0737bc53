"""The scheduler's clients of all ranks' sidecars, used as if they were one.

A block counts only if every rank has its part of it: a hit is the smallest of the ranks' hits, a block is absent
if any rank lacks it, and a lease is granted once all have granted. One slow, dead or refusing rank is a miss
for all. What travels to the workers (leases, namespaces) is the ranks' ids one after the other; each takes its
own (`part`).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

HASH_BYTES = 32
ID_BYTES = 16


def part(ids: bytes, rank: int) -> bytes:
    """A rank's own 16 bytes of what the scheduler's half sent to all."""
    return ids if len(ids) == ID_BYTES else ids[rank * ID_BYTES :][:ID_BYTES]


class Ranks:
    """The interface of `pillion._native.SchedulerClient` over one client per rank."""

    def __init__(self, clients: Sequence[Any]) -> None:
        self.clients = list(clients)
        self._tickets: dict[int, list[int]] = {}
        self._answers: dict[int, list[tuple[int, bytes] | None]] = {}
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

    def namespace_id(self) -> bytes | None:
        """All ranks' ids; None while one has none."""
        ids = [client.namespace_id() for client in self.clients]
        return None if None in ids else b"".join(ids)

    def lookup(self, hashes: bytes) -> int:
        """Leading blocks that all ranks have."""
        count = len(hashes) // HASH_BYTES
        for client in self.clients:
            if not count:
                break
            count = min(count, client.lookup(hashes[: count * HASH_BYTES]))
        return count

    def absent(self, hashes: bytes) -> list[int]:
        """Indices of blocks that some rank lacks."""
        missing: set[int] = set()
        for client in self.clients:
            missing.update(client.absent(hashes))
        return sorted(missing)

    def lease(self, hashes: bytes) -> int:
        """Asks every rank for what all of them seem to have; 0 where that is nothing."""
        count = self.lookup(hashes)
        tickets: list[int] = []
        if count:
            asked = hashes[: count * HASH_BYTES]
            try:
                for client in self.clients:
                    ticket = client.lease(asked)
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
        self._answers[self._minted] = [None] * len(tickets)
        return self._minted

    def lease_poll(self, ticket: int, wait_us: int = 0) -> tuple[int, bytes] | None:
        """(blocks that all ranks granted, their leases); None until the last has answered."""
        tickets, answers = self._tickets.get(ticket), self._answers.get(ticket)
        if tickets is None or answers is None:
            return 0, b""
        until = time.monotonic() + wait_us / 1e6
        for rank, client in enumerate(self.clients):
            if answers[rank] is None:
                left_us = max(0, int((until - time.monotonic()) * 1e6)) if wait_us else 0
                answers[rank] = client.lease_poll(tickets[rank], left_us)
        known = [answer for answer in answers if answer is not None]
        blocks = min((answer[0] for answer in known), default=0)
        if known and blocks == 0:
            return 0, b""  # whatever the others say
        if len(known) < len(answers):
            return None
        return blocks, b"".join(answer[1] for answer in known)

    def release(self, ticket: int) -> None:
        """Idempotent. Every rank's lease is given back, whatever the others do."""
        self._answers.pop(ticket, None)
        self._release_all(self._tickets.pop(ticket, []))

    def _release_all(self, tickets: Sequence[int]) -> None:
        self._each(lambda rank: self.clients[rank].release(tickets[rank]), len(tickets))

    def lease_used(self, ticket: int) -> None:
        for client, own in zip(self.clients, self._tickets.get(ticket, []), strict=False):
            client.lease_used(own)

    def new_epoch(self) -> None:
        self._each(lambda rank: self.clients[rank].new_epoch(), len(self.clients))

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
