"""What is saved comes back: to whom, how much of it, and what never comes back to anyone."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import pytest

from chaos.conftest import World
from chaos.engine import CANCELLED, DONE, FAILED, Shape, Traffic, canary, chain
from chaos.sidecar import until


@pytest.mark.parametrize("way", ["memfd", "process_vm"])
def test_what_was_saved_comes_back_byte_for_byte(world: World, way: str) -> None:
    sidecar = world.sidecar()
    engine = world.engine(sidecar, way=way)
    prompt = chain("a", 40)
    assert engine.lookup(prompt) == 0
    assert engine.scheduler.absent(0, b"".join(prompt)) == list(range(40))
    assert engine.must_save(prompt).blocks_done == 40
    assert engine.lookup(prompt) == 40
    assert engine.scheduler.absent(0, b"".join(prompt)) == []
    assert len(engine.must_load(prompt).hashes) == 40
    worker = next(s for s in sidecar.sessions() if s["role"] == "worker")
    assert worker["registration"]["path"] == way
    assert engine.worker.canary_checked()


def test_a_second_engine_finds_what_the_first_one_saved(world: World) -> None:
    sidecar = world.sidecar()
    prompt = chain("a", 30)
    world.engine(sidecar, "first").must_save(prompt)
    for way in ("memfd", "process_vm"):
        second = world.engine(sidecar, f"second-{way}", way=way)
        assert len(second.must_load(prompt).hashes) == 30


def test_only_leading_blocks_are_hits(world: World) -> None:
    engine = world.engine(world.sidecar())
    prompt = chain("a", 20)
    engine.must_save(prompt[:8])
    engine.must_save(prompt[12:], parent=prompt[11])
    assert engine.lookup(prompt) == 8
    assert engine.lookup(prompt[:5]) == 5
    assert engine.lookup([*prompt[:5], *chain("b", 5)]) == 5
    assert engine.lookup(chain("b", 5)) == 0
    assert len(engine.must_load(prompt).hashes) == 8
    # The hole is filled: what lay behind it was kept, and is not stored a second time.
    assert engine.must_save(prompt[8:], parent=prompt[7]).blocks_done == 4
    assert len(engine.must_load(prompt).hashes) == 20


def test_saving_twice_stores_once(world: World) -> None:
    sidecar = world.sidecar()
    engines = [world.engine(sidecar) for _ in range(2)]
    prompt = chain("a", 20)
    assert engines[0].must_save(prompt).blocks_done == 20
    assert engines[1].must_save(prompt).blocks_done == 0
    assert sidecar.status()["pool"]["records"] == 20


OTHERS: dict[str, dict[str, Any]] = {
    "another model": {"model": "model-b"},
    "another dtype": {"shape": Shape(dtype="float16")},
    "changed weights": {"extra": {"fingerprint": "2"}},
    "another field": {"extra": {"drafter": "eagle"}},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_the_same_hashes_of_another_identity_are_another_block(world: World, other: dict[str, Any]) -> None:
    sidecar = world.sidecar()
    first, second = world.engine(sidecar), world.engine(sidecar, **other)
    prompt = chain("a", 16)
    first.must_save(prompt)
    ticket, granted, lease = first.lease(prompt)
    assert granted == 16
    assert second.lookup(prompt) == 0 and second.lease(prompt) == (0, 0, b"")
    # Even with the other engine's lease in hand.
    job = second.wait(second.load_leased(prompt, 0, lease))
    assert job.outcome == FAILED
    assert second.must_save(prompt).blocks_done == 16
    first.must_load(prompt)
    second.must_load(prompt)
    first.release(ticket)


def test_a_lease_is_good_for_its_engine_and_its_blocks_only(world: World) -> None:
    sidecar = world.sidecar()
    engine, other = world.engine(sidecar), world.engine(sidecar)
    prompt, unsaved = chain("a", 16), chain("b", 16)
    engine.must_save(prompt)
    ticket, granted, lease = engine.lease(prompt)
    assert granted == 16
    attempts = {
        "another engine": other.load_leased(prompt, 0, lease),
        "another lease id": engine.load_leased(prompt, 0, os.urandom(16)),
        "other hashes": engine.load_leased(unsaved, 0, lease),
        "shifted": engine.load_leased(prompt[:8], 0, lease, first=4),
        "beyond its end": engine.load_leased(prompt[8:], 0, lease, first=9),
        "far beyond its end": engine.load_leased(prompt[8:], 0, lease, first=2**32 - 1),
    }
    for what, job in attempts.items():
        (other if what == "another engine" else engine).wait(job)
        assert job.outcome == FAILED, f"{what}: {job}"
    part = engine.wait(engine.load_leased(prompt[8:], ticket, lease, first=8))
    assert part.outcome == DONE
    sidecar.await_unleased()
    assert engine.wait(engine.load_leased(prompt, 0, lease)).outcome == FAILED, "a lease that was given back"


TENANTS = "[tenants]\nred = { uids = [0] }\nblue = { uids = [0] }\ngreen = { uids = [4711] }\n"


def test_tenants_never_see_each_other(world: World) -> None:
    sidecar = world.sidecar(config=TENANTS)
    red, blue = (world.engine(sidecar, tenant=tenant) for tenant in ("red", "blue"))
    default = world.engine(sidecar)
    prompt = chain("a", 16)
    red.must_save(prompt)
    _, granted, lease = red.lease(prompt)
    assert granted == 16
    for other in (blue, default):
        assert other.lookup(prompt) == 0
        assert other.wait(other.load_leased(prompt, 0, lease)).outcome == FAILED
    assert blue.must_save(prompt).blocks_done == 16, "stored again, for itself"
    # The same engine id does not open the door either.
    twin = world.engine(sidecar, red.name, tenant="blue")
    assert twin.wait(twin.load_leased(prompt, 0, lease)).outcome == FAILED
    assert len({engine.scheduler.namespace_ids() for engine in (red, blue, default)}) == 3


def test_an_unknown_tenant_is_refused_with_the_reason(world: World) -> None:
    sidecar = world.sidecar(config=TENANTS)
    engine = world.engine(sidecar, tenant="purple", ready=False)
    until(lambda: "refused" in engine.scheduler.status(), engine.told)
    assert "purple" in engine.scheduler.status()
    assert engine.lookup(chain("a", 2)) == 0
    assert engine.wait(engine.save(chain("a", 2))).outcome == CANCELLED
    assert sidecar.sessions() == []


def test_a_new_epoch_hides_what_was_saved_before(world: World) -> None:
    sidecar = world.sidecar()
    engine, other = world.engine(sidecar), world.engine(sidecar)
    prompt = chain("a", 16)
    engine.must_save(prompt)
    old = engine.scheduler.namespace_ids()
    engine.scheduler.new_epoch()
    assert engine.lookup(prompt) == 0
    engine.await_ready()
    assert engine.scheduler.namespace_ids() != old
    assert engine.lookup(prompt) == 0
    assert other.lookup(prompt) == 16, "another engine's epoch is its own"
    assert engine.must_save(prompt).blocks_done == 16
    engine.must_load(prompt)
    # It stays hidden after a re-attachment.
    before = engine.attaches(), other.attaches()
    sidecar.kill_worker()
    engine.await_again(before[0])
    other.await_again(before[1])
    other.must_save(prompt)
    assert engine.lookup(prompt) == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_eviction_leaves_prefixes_that_are_whole_and_right(world: World, seed: int) -> None:
    # 4 MiB hold 256 blocks of 16 KiB; the prompts have 600.
    sidecar = world.sidecar(host_pool="4MiB")
    engine = world.engine(sidecar)
    traffic = Traffic(engine, seed, prompts=50, whole=True)
    traffic.run(2.0)
    engine.settle()
    status = sidecar.status()
    assert status["tiers"][0]["blocks_evicted"] > 0
    assert status["pool"]["used_bytes"] <= status["pool"]["bytes"]
    assert status["faults"] == {"checksum_failures": 0, "identity_mismatches": 0, "protocol_errors": 0}
    counts = [engine.lookup(prompt) for prompt in traffic.prompts]
    for prompt, count in zip(traffic.prompts, counts, strict=True):
        there = [index for index in range(len(prompt)) if engine.lookup([prompt[index]])]
        assert there == list(range(count)), "children go before their parents: what is left is a prefix"
    assert any(counts)
    for prompt in traffic.prompts:
        if engine.lookup(prompt):
            engine.must_load(prompt)


def test_a_pool_full_of_leases_takes_no_save_and_recovers(world: World) -> None:
    sidecar = world.sidecar(host_pool="2MiB")
    engine = world.engine(sidecar)
    prompt = chain("a", 120)
    engine.must_save(prompt)
    ticket, granted, _ = engine.lease(prompt)
    assert 0 < granted <= 112, "an eighth of the pool is never leased"
    engine.must_save(chain("b", 60))
    assert engine.lookup(prompt) >= granted, "what is leased stays"
    engine.release(ticket)
    engine.must_save(chain("c", 100))
    assert len(engine.must_load(chain("c", 100)).hashes) == 100


def test_a_lease_in_use_is_renewed_and_given_back_with_its_job(world: World) -> None:
    sidecar = world.sidecar(lease_seconds=1, heartbeat_ms=10_000)
    engine = world.engine(sidecar)
    prompt = chain("a", 8)
    engine.must_save(prompt)
    # However rare its heartbeats: for more than two lease times the client renews what it has a ticket for.
    ticket, granted, lease = engine.lease(prompt)
    engine.scheduler.lease_used(ticket)
    used = time.monotonic()
    while time.monotonic() < used + 2.5:
        engine.poll()
        time.sleep(0.02)
    assert sidecar.status()["leases"]["held"] == 1
    assert engine.wait(engine.load_leased(prompt[:granted], ticket, lease)).outcome == DONE
    until(lambda: sidecar.status()["leases"]["held"] == 0, "the lease to be given back")
    assert sidecar.status()["leases"]["expired"] == 0


def test_a_lease_that_is_given_back_before_it_is_granted_does_not_stay(world: World) -> None:
    sidecar = world.sidecar()
    engine = world.engine(sidecar)
    prompt = chain("a", 8)
    engine.must_save(prompt)
    with sidecar.stopped():
        tickets = [engine.scheduler.lease([(0, b"".join(prompt))]) for _ in range(5)]
        assert all(tickets)
        for ticket in tickets:
            engine.release(ticket)
            assert engine.scheduler.lease_poll(ticket) == ([], b"")
    until(lambda: sidecar.status()["leases"]["granted"] == 5, "the sidecar to answer")
    until(lambda: sidecar.status()["leases"]["held"] == 0, "them to be given back", 3)


def test_many_engines_of_both_ways_share_one_sidecar(world: World) -> None:
    sidecar = world.sidecar()
    engines = [world.engine(sidecar, way=way) for way in ("memfd", "process_vm", "memfd", "process_vm")]
    traffics = [Traffic(engine, seed) for seed, engine in enumerate(engines)]
    order = random.Random(7)
    stop = time.monotonic() + 2.0
    while time.monotonic() < stop:
        order.choice(traffics).step()
        for engine in engines:
            engine.poll()
    for engine in engines:
        engine.settle()
    assert sum(traffic.loads for traffic in traffics) > 20
    sidecar.await_unleased()
    status = sidecar.status()
    assert status["jobs"]["running"] == 0
    assert status["faults"]["protocol_errors"] == 0


def test_a_layout_that_is_not_what_was_declared_is_refused_before_any_block_moves(world: World) -> None:
    engine = world.engine(world.sidecar())
    engine.write(0, canary(engine.seed, engine.record_bytes))
    engine.describe("LBNHC")
    with pytest.raises(ValueError, match="canary"):
        engine.worker.check_canary(0, engine.seed)
    with pytest.raises(ValueError, match="that of group 0 was not"):
        engine.worker.register()
    with pytest.raises(ValueError, match="expected a description"):
        engine.worker.register()
