"""Tensor parallelism: one sidecar per rank, and vLLM's real Scheduler above them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pillion.vllm.ranks import Ranks, part
from unit.fake_native import CANCELLED, DONE, FAILED, FakeNative, FakeRanks
from unit.test_scheduler_flow import ask, fill
from unit.vllm_harness import BLOCK, Engine, expected, prompt

WORLDS = pytest.mark.parametrize("world", [2, 8])


@WORLDS
def test_every_rank_loads_its_own_part(tmp_path: Path, overlap: bool, world: int) -> None:
    natives, tokens = FakeRanks(world), prompt(100)
    fill(natives, tmp_path, [tokens], overlap=overlap)  # type: ignore[arg-type]
    stores = [native.store for native in natives.ranks]
    assert all(len(store) == 100 // BLOCK for store in stores)
    engine = Engine(natives, tmp_path / "model", overlap=overlap)
    assert ask(engine, "a", tokens) == 96
    assert engine.computed["a"] < 8
    engine.assert_clean()


@WORLDS
def test_a_hit_is_the_smallest_of_the_ranks(tmp_path: Path, overlap: bool, world: int) -> None:
    natives, tokens = FakeRanks(world), prompt(100)
    fill(natives, tmp_path, [tokens], overlap=overlap)  # type: ignore[arg-type]
    # One rank has evicted what comes after the third block.
    store = natives.ranks[1].store
    for key in list(store)[3:]:
        del store[key]
    engine = Engine(natives, tmp_path / "model", overlap=overlap)
    assert ask(engine, "a", tokens) == 48
    # What it lacked was saved again, by all that lacked it.
    assert all(len(native.store) == 100 // BLOCK for native in natives.ranks)
    engine.assert_clean()


@WORLDS
@pytest.mark.parametrize("fault", ["absent", "refuses", "slow"])
def test_one_rank_that_does_not_grant_is_a_miss_for_all(
    tmp_path: Path, overlap: bool, world: int, fault: str
) -> None:
    natives, tokens = FakeRanks(world), prompt(100)
    fill(natives, tmp_path, [tokens], overlap=overlap)  # type: ignore[arg-type]
    bad = natives.ranks[world - 1]
    bad.attached = fault != "absent"
    bad.refuse_leases = fault == "refuses"
    bad.grant_after_polls = 10**9 if fault == "slow" else 0
    extra = {"lookup_deadline_ms": 30}
    engine = Engine(natives, tmp_path / "model", overlap=overlap, extra=extra)
    assert ask(engine, "a", tokens) == 0
    assert not engine.loads
    # It comes back.
    bad.attached, bad.refuse_leases, bad.grant_after_polls = True, False, 0
    other = prompt(100, seed=1)
    assert ask(engine, "b", other) == 0
    assert engine.scheduler.reset_prefix_cache()
    assert ask(engine, "c", other) == 96
    engine.assert_clean()


@WORLDS
def test_one_rank_that_fails_a_load_fails_it_on_all(tmp_path: Path, overlap: bool, world: int) -> None:
    natives, tokens = FakeRanks(world), prompt(100)
    fill(natives, tmp_path, [tokens], overlap=overlap)  # type: ignore[arg-type]
    bad = natives.ranks[world // 2]
    bad.load_outcome, bad.load_polls = FAILED, 3
    engine = Engine(natives, tmp_path / "model", overlap=overlap)
    assert ask(engine, "a", tokens) == 0
    assert engine.stats["load_failures"] == 1
    bad.load_outcome = DONE
    assert engine.scheduler.reset_prefix_cache()
    assert ask(engine, "b", tokens) == 96
    engine.assert_clean()


def test_blocks_are_held_until_the_last_rank_has_quiesced(tmp_path: Path, overlap: bool) -> None:
    natives, tokens = FakeRanks(8), prompt(100)
    fill(natives, tmp_path, [tokens], overlap=overlap)  # type: ignore[arg-type]
    stuck = natives.ranks[5]
    stuck.load_outcome, stuck.quiesce_loads = FAILED, False
    engine = Engine(natives, tmp_path / "model", overlap=overlap)
    engine.add("a", tokens)
    while not engine.reasons:
        engine.step()
        stuck.late_write([7] * BLOCK)  # long after everybody else has gone on
    assert engine.outputs["a"] == expected(tokens, 4)
    assert engine.stats["load_failures"] == 1 and engine.half.holds.held == 96 // BLOCK
    stuck.quiesce_all()
    engine.run()
    engine.assert_clean()


def test_a_save_that_one_rank_gives_up_is_no_hit_and_is_saved_again(tmp_path: Path, overlap: bool) -> None:
    natives, tokens = FakeRanks(2), prompt(100)
    natives.ranks[1].save_outcome = CANCELLED
    fill(natives, tmp_path, [tokens], overlap=overlap)  # type: ignore[arg-type]
    assert len(natives.ranks[0].store) == 100 // BLOCK and not natives.ranks[1].store
    natives.ranks[1].save_outcome = DONE
    engine = Engine(natives, tmp_path / "model", overlap=overlap)
    assert ask(engine, "a", tokens) == 0
    assert engine.scheduler.reset_prefix_cache()
    assert ask(engine, "b", tokens) == 96
    engine.assert_clean()


def test_a_reset_is_a_new_epoch_on_every_rank(tmp_path: Path, overlap: bool) -> None:
    natives, tokens = FakeRanks(2), prompt(100)
    engine = fill(natives, tmp_path, [tokens], overlap=overlap)  # type: ignore[arg-type]
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert [native.epoch for native in natives.ranks] == [1, 1]
    assert ask(engine, "a", tokens) == 0
    engine.assert_clean()


def test_a_socket_must_name_each_ranks_sidecar(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(FakeRanks(2), tmp_path / "model", extra={"socket": "/run/cpu0.sock"})
    assert engine.connector._scheduler is None and "expected {rank} in it" in caplog.text
    natives = FakeRanks(2)
    Engine(natives, tmp_path / "model", extra={"socket": "/run/x-cpu{rank}.sock"})
    sockets = [[each["socket"] for each in native.options] for native in natives.ranks]
    assert sockets == [["/run/x-cpu0.sock"] * 2, ["/run/x-cpu1.sock"] * 2]


# ---- the clients as one ------------------------------------------------------


def ranks(world: int, blocks: list[int]) -> tuple[Ranks, list[FakeNative], bytes]:
    """Rank r has the first `blocks[r]` of eight blocks."""
    natives = [FakeNative() for _ in range(world)]
    hashes = [bytes([index]) * 32 for index in range(8)]
    for native, count in zip(natives, blocks, strict=True):
        native.store = {(native.namespace, block_hash): [0] for block_hash in hashes[:count]}
    return Ranks([native.SchedulerClient() for native in natives]), natives, b"".join(hashes)


def test_a_lease_is_granted_when_the_last_rank_has_granted() -> None:
    clients, natives, hashes = ranks(3, [8, 5, 6])
    natives[1].grant_after_polls = 2
    ticket = clients.lease([(0, hashes)])
    assert clients.lease_poll(ticket) is None and clients.lease_poll(ticket) is None
    answer = clients.lease_poll(ticket)
    assert answer is not None and answer[0] == [5] and len(answer[1]) == 48
    for rank, native in enumerate(natives):
        assert part(answer[1], rank, 3) == native.leases[1][0]
        assert len(native.leases[1][1][0][1]) == 5, "no more is leased than all have"
    clients.release(ticket)
    clients.release(ticket)
    assert all(native.released == [1] for native in natives)
    assert clients.lease_poll(ticket) == ([], b"")


def test_what_one_rank_does_not_have_is_not_asked_of_the_others() -> None:
    clients, natives, hashes = ranks(3, [8, 0, 6])
    assert clients.lookup(0, hashes) == 0 and clients.lease([(0, hashes)]) == 0
    assert not any(native.leases for native in natives)
    assert clients.absent(0, hashes) == list(range(8))
    assert ranks(2, [8, 5])[0].absent(0, hashes) == [5, 6, 7]


def test_a_rank_that_refuses_ends_the_waiting_for_the_others() -> None:
    clients, natives, hashes = ranks(2, [8, 8])
    natives[0].grant_after_polls, natives[1].refuse_leases = 10**9, True
    ticket = clients.lease([(0, hashes)])
    assert clients.lease_poll(ticket) == ([], b"")
    clients.release(ticket)
    assert [native.released for native in natives] == [[1], [1]]


def test_an_error_of_one_rank_keeps_nothing_of_the_others() -> None:
    clients, natives, hashes = ranks(2, [8, 8])
    ticket = clients.lease([(0, hashes)])
    natives[0].raise_in["release"] = RuntimeError("gone")
    with pytest.raises(RuntimeError):
        clients.release(ticket)
    assert natives[1].released == [1]
    assert clients.status() == "ready" and clients.ready()
    natives[1].attached = False
    assert not clients.ready() and clients.namespace_ids() is None
    assert clients.status() == "connecting: nobody listens (rank 1)"


def test_a_lease_that_one_rank_cannot_ask_for_is_given_back_by_the_others() -> None:
    clients, natives, hashes = ranks(3, [8, 8, 8])
    natives[1].raise_in["lease"] = RuntimeError("no thread")
    with pytest.raises(RuntimeError):
        clients.lease([(0, hashes)])
    assert [native.released for native in natives] == [[1], [], []]


def test_one_rank_needs_no_parts() -> None:
    assert part(b"x" * 16, 0, 1) == b"x" * 16
