"""The sidecar is absent, killed, stopped, restarted, loses its socket: an engine notices misses, nothing else."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

import pytest

from chaos.campaigns import recovers, sidecar_kills
from chaos.conftest import World
from chaos.engine import CANCELLED, DONE, FAILED, Traffic, chain
from chaos.sidecar import ended, process_state, until


def test_an_absent_sidecar_is_a_miss_until_it_comes(world: World) -> None:
    sidecar = world.sidecar(start=False)
    engine = world.engine(sidecar, ready=False)
    prompt = chain("a", 10)
    assert engine.lookup(prompt) == 0 and engine.lease(prompt) == (0, 0, b"")
    assert engine.scheduler.absent(0, b"".join(prompt)) == []
    assert engine.scheduler.namespace_ids() is None
    job = engine.save(prompt)
    engine.poll()
    assert (job.outcome, job.quiesced) == (CANCELLED, True), "at once"
    load = engine.load_leased(prompt, 0, bytes(16))
    engine.poll()
    assert (load.outcome, load.quiesced) == (FAILED, True), "at once"
    assert engine.told().count("connecting: ") == 2
    sidecar.start()
    engine.await_ready(5)
    recovers(engine, "first")


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_a_killed_worker_costs_jobs_but_no_bytes_at_any_point(world: World, seed: int) -> None:
    """12 kills a seed, at random points, under load of both ways of memory."""
    assert sidecar_kills(world, seed).kills == 12


def test_a_killed_supervisor_takes_its_worker_along_in_order(world: World) -> None:
    sidecar = world.sidecar()
    engine = world.engine(sidecar)
    traffic = Traffic(engine, 5)
    traffic.run(0.2)
    worker = sidecar.worker_pid
    os.kill(sidecar.supervisor_pid, signal.SIGKILL)
    until(lambda: ended(worker), "the worker to drain and end", 15)
    traffic.run(0.2)
    engine.settle()
    before = engine.attaches()
    sidecar.process and sidecar.process.wait()
    sidecar.start()
    engine.await_again(before)
    recovers(engine, "after")


def test_a_restart_within_a_heartbeat_is_noticed(world: World) -> None:
    sidecar = world.sidecar(heartbeat_ms=5000)
    engine = world.engine(sidecar)
    prompt = chain("a", 10)
    engine.must_save(prompt)
    ticket, granted, lease = engine.lease(prompt)
    generation = sidecar.status()["sidecar"]["generation"]
    before = engine.attaches()
    sidecar.kill_worker()
    engine.await_again(before)
    assert sidecar.status()["sidecar"]["generation"] != generation
    assert engine.lookup(prompt) == 0, "the new one has nothing"
    # References of the old boot mean nothing to the new one.
    old = engine.wait(engine.load_leased(prompt[:granted], ticket, lease))
    assert old.outcome == FAILED
    engine.must_save(prompt)
    assert engine.wait(engine.load_leased(prompt[:granted], 0, lease)).outcome == FAILED
    engine.must_load(prompt)


def test_a_stopped_sidecar_fails_jobs_at_their_deadline_and_holds_their_blocks(world: World) -> None:
    sidecar = world.sidecar()
    engines = [world.engine(sidecar, way=way) for way in ("memfd", "process_vm")]
    prompt = chain("a", 20)
    engines[0].must_save(prompt)
    leases = [engine.lease(prompt) for engine in engines]
    with sidecar.stopped():
        loads = []
        for engine, (ticket, granted, lease) in zip(engines, leases, strict=True):
            assert granted == 20
            loads.append(engine.load_leased(prompt, ticket, lease, deadline_ms=400))
            save = engine.save(chain("b", 20), deadline_ms=300)
            assert engine.wait(save).outcome == CANCELLED, "taken back: its source blocks are free"
            begun = time.monotonic()
            while engine.lookup(prompt):
                assert time.monotonic() < begun + 1, "the table of a stopped sidecar still promises"
        for engine, load in zip(engines, loads, strict=True):
            assert engine.wait_end(load).outcome == FAILED
            assert load.ended_at - load.submitted < load.deadline + 0.25
        # As long as it is stopped: held, and nobody waits.
        stop = time.monotonic() + 2.0
        while time.monotonic() < stop:
            for engine, load in zip(engines, loads, strict=True):
                engine.poll()
                assert not load.quiesced and engine.worker.unquiesced() == 1
                assert engine.wait(engine.save(chain("c", 4), deadline_ms=200)).outcome == CANCELLED
            time.sleep(0.05)
        assert all(engine.worker.counters()["kills"] == 0 for engine in engines)
    for engine in engines:
        engine.settle()
        engine.await_ready()
        recovers(engine, "continued")
    assert sidecar.status()["sidecar"]["worker_restarts"] == 0
    sidecar.await_unleased()


def test_under_load_a_stop_and_a_continue_change_no_byte(world: World) -> None:
    sidecar = world.sidecar()
    engines = [world.engine(sidecar, way=way) for way in ("memfd", "process_vm")]
    traffics = [Traffic(engine, 20 + index, deadline_ms=150) for index, engine in enumerate(engines)]
    chance = random.Random(3)
    for _ in range(6):
        for traffic in traffics:
            traffic.run(chance.uniform(0.02, 0.1))
        with sidecar.stopped():
            for traffic in traffics:
                traffic.run(chance.uniform(0.1, 0.3))
    for engine in engines:
        engine.settle()
        engine.await_ready()
        recovers(engine, "after")


def test_the_supervisor_kills_a_worker_that_is_mute_and_the_holds_end(world: World) -> None:
    sidecar = world.sidecar(grace_seconds=1)
    engine = world.engine(sidecar)
    prompt = chain("a", 20)
    engine.must_save(prompt)
    ticket, _, lease = engine.lease(prompt)
    before = engine.attaches()
    with sidecar.stopped(supervisor=False) as worker:
        load = engine.load_leased(prompt, ticket, lease, deadline_ms=200)
        assert engine.wait_end(load).outcome == FAILED and not load.quiesced
        engine.wait(load, 6)
        assert process_state(worker) in ("", "Z"), "a hold ends with the process, not before"
    engine.await_again(before)
    recovers(engine, "after")
    assert sidecar.status()["sidecar"]["worker_restarts"] == 1


@pytest.mark.parametrize("others", [0, 1])
def test_a_shim_kills_a_mute_sidecar_only_if_it_is_the_only_one_there(world: World, others: int) -> None:
    sidecar = world.sidecar(heartbeat_ms=100)
    engine = world.engine(sidecar, grace_ms=300)
    for _ in range(others):
        world.engine(sidecar)
    prompt = chain("a", 20)
    engine.must_save(prompt)
    ticket, _, lease = engine.lease(prompt)
    # A heartbeat tells how many engines there are.
    begun = time.monotonic()
    engine.wait_for(lambda: time.monotonic() > begun + 0.6, "two heartbeats")
    with sidecar.stopped() as worker:
        load = engine.load_leased(prompt, ticket, lease, deadline_ms=200)
        if others:
            begun = time.monotonic()
            engine.wait_for(lambda: time.monotonic() > begun + 2.5, "a while")
            assert load.outcome == FAILED and not load.quiesced and process_state(worker) == "T"
            assert engine.worker.counters()["kills"] == 0
        else:
            engine.wait(load, 6)
            assert engine.worker.counters()["kills"] >= 1 and process_state(worker) in ("", "Z")
    engine.settle()
    engine.await_ready()
    recovers(engine, "after")


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_lost_socket_file_costs_nobody_a_connection_and_comes_back(world: World, how: str) -> None:
    sidecar = world.sidecar()
    engine = world.engine(sidecar)
    traffic = Traffic(engine, 8)
    traffic.run(0.2)
    before = engine.attaches()
    sidecar.socket.unlink()
    if how == "replaced":
        sidecar.socket.write_text("somebody's file")
    gone = time.monotonic()
    other = world.engine(sidecar, ready=False)
    while not other.ready():
        traffic.step()
        other.poll()
        assert time.monotonic() < gone + 2.5, f"a new engine cannot attach: {other.told()}"
    traffic.run(0.2)
    engine.settle()
    assert engine.attaches() == before, "its connection went on"
    for each in (engine, other):
        recovers(each, "after")


def test_sigterm_ends_running_jobs_and_sessions_in_order(world: World) -> None:
    sidecar = world.sidecar()
    engines = [world.engine(sidecar, way=way) for way in ("memfd", "process_vm")]
    traffics = [Traffic(engine, index) for index, engine in enumerate(engines)]
    for traffic in traffics:
        traffic.run(0.2)
    worker = sidecar.worker_pid
    assert sidecar.process
    sidecar.process.terminate()
    begun = time.monotonic()
    while sidecar.process.poll() is None:
        for traffic in traffics:
            traffic.step()
        assert time.monotonic() < begun + 12, "it does not end"
    assert sidecar.process.returncode == 0 and ended(worker)
    assert not sidecar.socket.exists()
    for engine in engines:
        engine.settle(1)
        assert engine.worker.unquiesced() == 0
        assert engine.wait(engine.save(chain("late", 2)), 1).outcome == CANCELLED
    assert '"stopped"' in sidecar.log.read_text()


def test_what_is_done_before_a_crash_is_right_and_what_is_not_is_no_hit(world: World) -> None:
    """Kills between a save's begin and end: after the restart nothing is there, before it only whole saves."""
    sidecar = world.sidecar()
    engine = world.engine(sidecar)
    chance = random.Random(17)
    for index in range(4):
        prompt = chain(f"crash-{index}", 100)
        before = engine.attaches()
        job = engine.save(prompt)
        stop = time.monotonic() + chance.uniform(0, 0.004)
        while time.monotonic() < stop:
            engine.poll()
            if hits := engine.lookup(prompt):
                assert hits == 100
        sidecar.kill_worker()
        engine.wait(job)
        assert job.outcome in (DONE, CANCELLED)
        engine.await_again(before)
        assert engine.lookup(prompt) == 0
        engine.must_save(prompt)
        engine.must_load(prompt)


def test_a_sidecar_that_is_told_to_start_by_its_engines_starts_once(world: World) -> None:
    sidecar = world.sidecar(start=False)
    environment = sidecar.environment
    command = [
        "/usr/bin/env",
        *(f"{key}={environment[key]}" for key in ("PILLION_RUNTIME_DIR", "PILLION_STATE_DIR")),
    ]
    launch = [*command, *sidecar.arguments("serve", "--detach", "--idle-exit-seconds=3600")]
    engines = [world.engine(sidecar, launch=launch, ready=False) for _ in range(3)]
    for engine in engines:
        engine.await_ready(15)
        recovers(engine, "launched")
    assert len({session["pid"] for session in sidecar.sessions()}) == 1
    assert len(sidecar.sessions()) == 6
    with contextlib.suppress(ProcessLookupError):
        os.kill(sidecar.supervisor_pid, signal.SIGTERM)
    until(lambda: not sidecar.socket.exists(), "it to end")


def test_a_mute_sidecar_is_called_so_and_asked_for_nothing(world: World) -> None:
    sidecar = world.sidecar(heartbeat_ms=50)
    engine = world.engine(sidecar)
    prompt = chain("a", 4)
    engine.must_save(prompt)
    with sidecar.stopped():
        engine.wait_for(
            lambda: engine.told().count("does not answer heartbeats") == 2, "both halves to notice", 5
        )
        assert engine.scheduler.lease([(0, b"".join(prompt))]) == 0
        begun = time.monotonic()
        assert engine.wait(engine.save(chain("b", 2)), 1).outcome == CANCELLED
        assert time.monotonic() - begun < 0.5, "at once, not at its deadline"
    engine.await_ready()
    engine.must_load(prompt)
