"""`ttft`: time to the first token of a prompt that was seen before, on real vLLM; from where its KV comes.

Every contender is an engine of its own with the same model and the same threads, and all are alive at once. In a
round each one answers every prompt, after its vLLM's own prefix cache was emptied; rounds are repeated, and who
begins changes. Answers must be those of the engine that recomputes; where tokens came from is looked up each time.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

from chaos.sidecar import Sidecar
from e2e.harness import TRANSFER, Answer, Engine, Factory, until
from e2e.prompts import BLOCK, TOKENS, Prompt
from harness import cases
from harness.peers import QUIET, LmcacheServer, Unavailable, lmcache_python
from harness.report import Better, Row

ROUNDS, ROUNDS_QUICK = 5, 2
FILLS, FILLS_QUICK = 2, 1
SECONDS, SECONDS_QUICK = 1200, 400
"""After the engines have started, no further round begins later than this: a busy machine makes fewer of them."""
SPINS_SECONDS = 1.2
"""An engine's worker spins for a second after its last step: the next one waits until it has stopped."""
WRITTEN_SECONDS = 3.0
"""Until what was stored is where it will be read from."""
OPTIONS = {
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 512 << 20,
}
HOST_POOL = "1GiB"
SMALL_POOL = "32MiB"
"""A prompt of 4 k tokens takes 25 MB: one fits, and two others between its visits make it leave."""

RECOMPUTE = "recompute"
OWN_CACHE = "vLLM's own prefix cache"
HOST = "Pillion, host"
SSD = "Pillion, SSD"
SHM = "LMCache MP, shared memory"
PICKLE = "LMCache MP, pickle"
DISK = "LMCache MP, disk"
EXAMPLE = "vLLM's ExampleConnector"


@dataclass
class Contender:
    """An engine, and what it has to tell of every answer."""

    name: str
    engine: Engine
    chunk: int = BLOCK
    """Tokens by which it finds prompts again."""
    from_disk: Callable[[], int] | None = None
    """Blocks that it has read from a disk so far."""

    def usable(self, prompt: Prompt) -> int:
        return (len(prompt.tokens) - 1) // self.chunk * self.chunk


@dataclass
class Log:
    """All that one contender did in one kind of round."""

    ttft_ms: dict[tuple[str, int], float] = field(default_factory=dict)
    """By prompt and round."""
    differ: int = 0
    partial: int = 0
    """Answers for which less came than there was, or from elsewhere."""

    def note(self, name: str) -> str | None:
        said = []
        if self.differ:
            said.append(f"{self.differ} of {len(self.ttft_ms)} answers of {name} DIFFER from the recompute's")
        if self.partial:
            said.append(
                f"{self.partial} of {len(self.ttft_ms)} loads of {name} brought less than all, or from elsewhere"
            )
        return "; ".join(said) or None


class Bench:
    def __init__(self, quick: bool, stack: ExitStack) -> None:
        self.quick = quick
        self.stack = stack
        self.prompts = cases.make()
        self.missing: dict[str, str] = {}
        self.contenders: list[Contender] = []
        self.logs: dict[tuple[str, str], Log] = {}
        self.references: dict[str, list[int]] = {}
        self.place = Path(tempfile.mkdtemp(prefix="ttft-", dir=cases.ROOT / "target"))
        stack.callback(rmtree, self.place, ignore_errors=True)

    # ---- who takes part

    def begin(self) -> None:
        ours = self._factory(sys.executable)
        self._engine(ours, RECOMPUTE)
        self._pillion(ours, HOST, host_pool=HOST_POOL)
        small = self._pillion(
            ours, SSD, host_pool=SMALL_POOL, ssd=f"{self.place / 'ssd'}=2GiB", ssd_wait_ms=450
        )
        self.contenders[-1].from_disk = lambda: int(small.status()["ssd"]["blocks_read"])
        self._may_miss(EXAMPLE, lambda: self._example(ours))
        try:
            theirs = self._factory(lmcache_python())
        except Unavailable as error:
            self.missing |= dict.fromkeys((SHM, PICKLE, DISK), str(error))
            return
        self._may_miss(SHM, lambda: self._lmcache(theirs, SHM, "--shm-name", f"bench_{uuid.uuid4().hex[:8]}"))
        self._may_miss(PICKLE, lambda: self._lmcache(theirs, PICKLE))
        self._may_miss(DISK, lambda: self._lmcache_disk(theirs))

    def _may_miss(self, name: str, start: Callable[[], object]) -> None:
        """A peer that does not start here is said to be missing; the others go on."""
        try:
            start()
        except (AssertionError, Unavailable) as error:
            reason = str(error).splitlines()
            self.missing[name] = next((line for line in reason if line.strip()), "no reason given")
            print(f"{name}: {error}", file=sys.stderr)

    def _factory(self, python: str) -> Factory:
        factory = Factory([python, "-m", "harness.engine_main"])
        self.stack.callback(factory.close)
        return factory

    def _engine(
        self,
        factory: Factory,
        name: str,
        transfer: dict[str, Any] | None = None,
        surroundings: dict[str, str] | None = None,
    ) -> None:
        options: dict[str, Any] = dict(OPTIONS)
        if transfer is not None:
            options["kv_transfer_config"] = {"kv_load_failure_policy": "recompute", **transfer}
        safe = "".join(letter if letter.isalnum() else "-" for letter in name)
        engine = factory.engine(
            safe, cases.MODEL, None, environment={**QUIET, **(surroundings or {})}, **options
        )
        self.contenders.append(Contender(name, engine))

    def _pillion(self, factory: Factory, name: str, **flags: Any) -> Sidecar:
        sidecar = Sidecar(**flags)
        self.stack.callback(sidecar.close)
        sidecar.start()
        places = {key: value for key, value in sidecar.environment.items() if key.startswith("PILLION_")}
        extra = {"kv_connector_extra_config": {"launch": False}}
        self._engine(factory, name, {**TRANSFER, **extra}, places)
        engine = self.contenders[-1].engine
        until(lambda: engine.counters()["ready"], engine.explain, 30)
        return sidecar

    def _example(self, factory: Factory) -> None:
        place = self.place / "example"
        place.mkdir()
        extra = {"shared_storage_path": str(place)}
        transfer = {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }
        self._engine(factory, EXAMPLE, transfer)

    def _lmcache(self, factory: Factory, name: str, *flags: str) -> LmcacheServer:
        server = LmcacheServer(
            "server",
            "--l1-size-gb",
            "2",
            "--chunk-size",
            str(BLOCK),
            "--supported-transfer-mode",
            "auto",
            *flags,
        )
        self.stack.callback(server.close)
        server.await_ready()
        self._engine(factory, name, server.transfer)
        return server

    def _lmcache_disk(self, factory: Factory) -> None:
        """What was stored leaves its memory once it is on the disk, so that every load comes from there."""
        place = self.place / "lmcache"
        place.mkdir()
        adapter = f'{{"type": "fs", "base_path": "{place}"}}'
        policy = ("--l2-adapter", adapter, "--l2-store-policy", "skip_l1")
        self._lmcache(factory, DISK, "--shm-name", f"bench_{uuid.uuid4().hex[:8]}", *policy)

    # ---- what they do

    def order(self) -> Iterator[Prompt]:
        """Long and short in turn, so that each displaces the others from a small pool."""
        for number in range(cases.EACH - self.quick):
            for prompts in reversed(self.prompts.values()):
                yield prompts[number]

    def run(self) -> None:
        for contender in self.contenders:
            chance = random.Random(1)
            noise = tuple(chance.choice(TOKENS) for _ in range(4000))
            for _ in range(2):
                contender.engine.ask(Prompt("warm-up", noise, 2))
        begun = time.monotonic()
        limit = SECONDS_QUICK if self.quick else SECONDS
        for number in range(FILLS_QUICK if self.quick else FILLS):
            if not number or time.monotonic() - begun < limit / 3:
                self._round("new", number, salt=f"fill {number}")
        time.sleep(WRITTEN_SECONDS)
        for number in range(ROUNDS_QUICK if self.quick else ROUNDS):
            if not number or time.monotonic() - begun < limit:
                self._round("again", number, salt="fill 0")

    def _round(self, kind: str, number: int, salt: str) -> None:
        turn = number % len(self.contenders)
        for contender in self.contenders[turn:] + self.contenders[:turn]:
            time.sleep(SPINS_SECONDS)
            for prompt in self.order():
                self._ask(contender, kind, number, prompt.salted(salt))
            print(f"    {kind} {number}: {contender.name}", file=sys.stderr, flush=True)

    def _ask(self, contender: Contender, kind: str, number: int, prompt: Prompt) -> None:
        engine = contender.engine
        engine.forget()
        before = contender.from_disk() if contender.from_disk else 0
        answer = engine.ask(prompt)
        expected = contender.usable(prompt) if kind == "again" and contender.name != RECOMPUTE else 0
        whole = answer.cached == expected
        if contender.from_disk and expected:
            whole = whole and contender.from_disk() - before == expected // BLOCK
        self._take(contender.name, kind, number, answer, whole)
        if contender.name == RECOMPUTE and kind == "again":
            own = engine.ask(prompt)
            self._take(OWN_CACHE, kind, number, own, own.cached == contender.usable(prompt))

    def _take(self, name: str, kind: str, number: int, answer: Answer, whole: bool) -> None:
        log = self.logs.setdefault((name, kind), Log())
        log.ttft_ms[answer.prompt.name, number] = answer.times[0] * 1000
        log.partial += not whole
        reference = self.references.setdefault(answer.prompt.name, answer.tokens)
        log.differ += answer.tokens != reference

    # ---- what came out

    def rows(self) -> list[Row]:
        rows = []
        for name in cases.LENGTHS:
            rows += [
                self._row(name, "again", f"{name}, from host memory", HOST, peer)
                for peer in (RECOMPUTE, OWN_CACHE, SHM, PICKLE, EXAMPLE)
            ]
            rows += [
                self._row(name, "again", f"{name}, from the SSD", SSD, peer)
                for peer in (RECOMPUTE, DISK, EXAMPLE)
            ]
            rows += [
                self._row(name, "new", f"{name}, new: computed and stored", HOST, peer)
                for peer in (RECOMPUTE, SHM, PICKLE, EXAMPLE)
            ]
        return rows

    def _row(self, length: str, kind: str, case: str, ours: str, peer: str) -> Row:
        if peer in self.missing:
            return Row.without("ttft", case, peer, "ms", self.missing[peer])
        mine, theirs = self.logs[ours, kind], self.logs[peer, kind]
        both = [key for key in mine.ttft_ms if key in theirs.ttft_ms and key[0].startswith(length)]
        pairs = [(mine.ttft_ms[key], theirs.ttft_ms[key]) for key in both]
        said = [note for note in (mine.note(ours), theirs.note(peer)) if note]
        failure = mine.note(ours) if mine.differ else None
        return Row.of(
            "ttft", case, peer, "ms", Better.LESS, pairs, failure=failure, note="; ".join(said) or None
        )

    def raw(self) -> dict[str, Any]:
        """Every figure, by contender and kind of round, then by prompt and round."""
        return {
            f"{name}, {kind}": {
                f"{prompt}, round {number}": round(ms, 2) for (prompt, number), ms in log.ttft_ms.items()
            }
            for (name, kind), log in self.logs.items()
        }


def measure(quick: bool) -> list[Row]:
    """All rows of `ttft`."""
    with ExitStack() as stack:
        bench = Bench(quick, stack)
        bench.begin()
        try:
            bench.run()
        finally:
            file = cases.ROOT / "target" / "bench" / "ttft-raw.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(bench.raw(), indent=1) + "\n")
        return bench.rows()
