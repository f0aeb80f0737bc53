"""Sidecars of one node: what one has, the other's engines load from its pool."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from chaos import wire
from chaos.conftest import World
from chaos.engine import Traffic, chain
from chaos.sidecar import Sidecar, until
from chaos.wire import Raw


def start_second(world: World, first: Sidecar) -> Sidecar:
    """Another device's sidecar in the first one's runtime folder."""
    second = first.sibling("cpu1")
    world.sidecars.append(second)
    second.start()
    return second


def pair(world: World, **flags: Any) -> tuple[Sidecar, Sidecar]:
    """Two sidecars in one runtime folder."""
    first = world.sidecar(device="cpu0", **flags)
    second = start_second(world, first)
    return first, second


def borrows(sidecar: Sidecar, count: int = 1) -> bool:
    return len(sidecar.status()["neighbours"]) == count


def meet(first: Sidecar, second: Sidecar) -> None:
    until(lambda: borrows(first) and borrows(second), lambda: f"them to meet\n{first.explain()}", 10)


def test_what_a_neighbour_has_is_loaded_and_stored_once(world: World) -> None:
    first, second = pair(world)
    meet(first, second)
    prompt = chain("a", 30)
    world.engine(first, "writer").must_save(prompt)
    reader = world.engine(second, "reader")
    until(lambda: reader.lookup(prompt) == 30, "the neighbour's table")
    assert reader.scheduler.absent(0, b"".join(prompt)) == [], "not to be saved again"
    reader.must_load(prompt)
    assert second.status()["pool"]["records"] == 0, "one copy"
    assert second.status()["neighbour_blocks"]["borrowed"] == 30
    assert first.status()["neighbour_blocks"]["lent"] == 30
    for sidecar in (first, second):
        sidecar.await_unleased()


def test_an_engine_that_came_first_learns_of_neighbours_later(world: World) -> None:
    first = world.sidecar(device="cpu0")
    early = world.engine(first, "early")
    second = start_second(world, first)
    meet(first, second)
    prompt = chain("a", 8)
    world.engine(second, "writer").must_save(prompt)
    until(lambda: early.lookup(prompt) == 8, "the table of a neighbour, for a tenant that it had not known")
    early.must_load(prompt)


def test_a_prefix_that_lies_in_two_pools_comes_in_one_load(world: World) -> None:
    first, second = pair(world)
    meet(first, second)
    prompt = chain("a", 20)
    world.engine(first, "one").must_save(prompt[:12])
    engine = world.engine(second, "two")
    until(lambda: engine.lookup(prompt) == 12, "the neighbour's part")
    engine.must_save(prompt[12:], parent=prompt[11])
    assert engine.lookup(prompt) == 20
    engine.must_load(prompt)


def test_tenants_and_models_stay_apart(world: World) -> None:
    first, second = pair(world, config="[tenants.red]\nuids = []\n[tenants.blue]\nuids = []\n")
    meet(first, second)
    prompt = chain("a", 8)
    world.engine(first, "writer", tenant="red").must_save(prompt)
    reader = world.engine(second, "reader", tenant="red")
    until(lambda: reader.lookup(prompt) == 8, "the same tenant")
    strangers: list[dict[str, Any]] = [{"tenant": "blue"}, {"tenant": "red", "model": "model-b"}]
    for options in strangers:
        stranger = world.engine(second, **options)
        time.sleep(0.1)
        assert stranger.lookup(prompt) == 0 and stranger.load(prompt) is None


def test_another_cluster_secret_finds_nothing(world: World) -> None:
    first = world.sidecar(device="cpu0")
    second = first.sibling("cpu1")
    second.state = first.place / "other"
    world.sidecars.append(second)
    second.start()
    prompt = chain("a", 8)
    world.engine(first, "writer").must_save(prompt)
    reader = world.engine(second, "reader")
    time.sleep(0.6)
    assert borrows(first, 0) and borrows(second, 0)
    assert reader.lookup(prompt) == 0 and reader.load(prompt) is None


def test_neighbours_can_be_switched_off(world: World) -> None:
    first, second = pair(world, neighbours="off")
    prompt = chain("a", 8)
    world.engine(first, "writer").must_save(prompt)
    reader = world.engine(second, "reader")
    time.sleep(0.6)
    assert borrows(second, 0) and reader.lookup(prompt) == 0
    raw = Raw(first.socket, wire.hello(role=wire.NEIGHBOUR))
    kind, text = raw.receive() or (0, b"")
    assert kind == wire.REFUSED and b"neighbours" in text
    raw.close()


def test_only_neighbours_speak_of_tenants_and_only_of_those_that_there_are(world: World) -> None:
    sidecar = world.sidecar(config="[tenants.red]\nuids = []\n")
    raw = Raw(sidecar.socket, wire.hello())
    raw.expect(wire.WELCOME)
    raw.send(wire.frame(wire.TENANT_SERVED, wire.table("red")))
    assert b"a neighbour to speak of tenants" in raw.expect(wire.REFUSED)
    raw.close()
    raw = Raw(sidecar.socket, wire.hello(role=wire.NEIGHBOUR))
    raw.expect(wire.WELCOME)
    for tenant in ("blue", "", "../red", "red", "red"):
        raw.send(wire.frame(wire.TENANT_SERVED, wire.table(tenant)))
    raw.send(wire.frame(wire.PING, wire.table(("Q", 1))))
    told = []
    while (frame := raw.receive()) and frame[0] != wire.PONG:
        told.append(frame)
    assert [kind for kind, _ in told] == [wire.NEIGHBOUR_TABLE] * 2
    assert [b"red" in table for _, table in told] == [False, True], "default, which came first, and red, once"
    raw.close()


def traffic(world: World, first: Sidecar, second: Sidecar, seed: int, prompts: int) -> list[Traffic]:
    """The same prompts at both. Every byte that is loaded is compared by the engines themselves."""
    engines = (world.engine(first, "a"), world.engine(second, "b"))
    return [Traffic(engine, seed=seed + at, prompts=prompts, whole=True) for at, engine in enumerate(engines)]


def run(traffics: list[Traffic], seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not enough():
        for _ in range(50):
            for one in traffics:
                one.step()


def restarted(sidecar: Sidecar, times: int) -> bool:
    told = sidecar.try_status()
    return bool(told and told["sidecar"]["worker_restarts"] == times)


def test_a_neighbour_that_is_killed_under_load_costs_hits_only(world: World) -> None:
    first, second = pair(world, host_pool="16MiB")
    meet(first, second)
    both = traffic(world, first, second, 1, 12)
    for restarts in range(1, 5):
        run(both, 0.4)
        first.kill_worker()
        run(both, 0.3)
        until(partial(restarted, first, restarts), "it to start again", 10)
    meet(first, second)
    run(both, 1.0)
    before = [one.loads for one in both]
    run(both, 10, lambda: all(one.loads > loads for one, loads in zip(both, before, strict=True)))
    assert all(one.loads > loads for one, loads in zip(both, before, strict=True)), "loads go on"


def test_a_neighbour_that_is_stopped_is_not_waited_for(world: World) -> None:
    first, second = pair(world)
    meet(first, second)
    prompt = chain("a", 8)
    world.engine(first, "writer").must_save(prompt)
    reader = world.engine(second, "reader")
    until(lambda: reader.lookup(prompt) == 8, "the neighbour's table")
    with first.stopped():
        until(lambda: reader.lookup(prompt) == 0, "its table to go stale", 3)
        assert reader.load(prompt, seconds=2) is None
        own = chain("b", 8)
        reader.must_save(own)
        reader.must_load(own)
    until(lambda: reader.lookup(prompt) == 8, "it to be there again", 10)
    reader.must_load(prompt)


def test_a_small_pool_that_evicts_what_it_has_lent_waits_for_its_return(world: World) -> None:
    """The owner writes all the time; what it has lent stays where it is."""
    first, second = pair(world, host_pool="8MiB")
    meet(first, second)
    both = traffic(world, first, second, 3, 200)

    def enough() -> bool:
        status = second.status()
        return bool(
            status["neighbour_blocks"]["borrowed"] > 100 and status["tiers"][0]["blocks_evicted"] > 100
        )

    run(both, 20, enough)
    assert enough(), second.explain()
    for one in both:
        one.engine.settle()
    for sidecar in (first, second):
        sidecar.await_unleased()
        status = sidecar.status()
        assert status["faults"]["checksum_failures"] == 0
        assert status["neighbour_blocks"]["held"] == 0


def test_a_hostile_neighbour_learns_and_breaks_nothing(world: World) -> None:
    sidecar = world.sidecar()
    engine = world.engine(sidecar)
    prompt = chain("a", 8)
    engine.must_save(prompt)
    raw = Raw(sidecar.socket, wire.hello(role=wire.NEIGHBOUR))
    raw.expect(wire.WELCOME)
    # Hashes are no keys: those derive from the cluster's secret.
    raw.send(wire.frame(wire.BORROW, wire.table(("Q", 1), b"".join(prompt))))
    answer = raw.expect(wire.BORROWED)
    assert b"\xff" * 64 in answer, "nothing is lent"
    for kind, message in (
        (wire.BORROW, wire.table(("Q", 2), b"x" * 33)),
        (wire.DAMAGED, wire.table(b"short")),
    ):
        raw.send(wire.frame(kind, message))
        raw.expect(wire.REFUSED)
    raw.send(wire.frame(wire.DAMAGED, wire.table(bytes(32))))
    raw.close()
    # A client that is none cannot borrow.
    raw = Raw(sidecar.socket, wire.hello())
    raw.expect(wire.WELCOME)
    raw.send(wire.frame(wire.BORROW, wire.table(("Q", 1), bytes(32))))
    assert b"\xff" * 8 in raw.expect(wire.BORROWED)
    raw.close()
    engine.must_load(prompt)
