"""Hostile clients are answered or dropped, and an honest engine beside them saves and loads all the while."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from chaos import wire
from chaos.conftest import World
from chaos.engine import F_ADD_SEALS, SEALS, Traffic, chain
from chaos.sidecar import Sidecar, until
from chaos.wire import Raw


@contextlib.contextmanager
def honest(world: World, sidecar: Sidecar) -> Iterator[Traffic]:
    """An engine that works in a thread of its own, and has not noticed anything at the end."""
    engine = world.engine(sidecar, "honest")
    prompt = chain("honest", 10)
    engine.must_save(prompt)
    traffic, stop, trouble = Traffic(engine, 1), threading.Event(), list[BaseException]()
    rounds = 0

    def work() -> None:
        nonlocal rounds
        try:
            while not stop.is_set():
                traffic.step()
                engine.must_load(prompt)
                rounds += 1
                time.sleep(0.001)
        except BaseException as error:
            trouble.append(error)

    worker = sidecar.worker_pid
    before = engine.attaches()
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield traffic
    finally:
        then = rounds
        until(lambda: rounds > then + 3 or trouble, "the honest engine to go on")
        stop.set()
        thread.join()
    if trouble:
        raise trouble[0]
    engine.settle()
    assert engine.attaches() == before, "it never lost its connection"
    assert sidecar.worker_pid == worker, "the sidecar never restarted"
    until(
        lambda: not [s for s in sidecar.sessions() if s["engine_id"] != "honest"],
        "the hostile sessions to end",
    )
    sidecar.await_unleased()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def garbage(chance: random.Random) -> bytes:
    return chance.randbytes(chance.choice([1, 7, 8, 64, 5000, 100_000]))


def nonsense_payload(chance: random.Random) -> bytes:
    kind = chance.randrange(0, 40)
    return wire.frame(kind, chance.randbytes(chance.randrange(0, 300)))


def flipped(chance: random.Random) -> bytes:
    """A message as it should be, but for a few bits."""
    space, job = bytes(16), chance.randbytes(16)
    message = bytearray(
        chance.choice(
            [
                wire.table(("Q", 1), ["model"], ["m"], b""),
                wire.table(("Q", 2), space, wire.u32(chance.randrange(4)), chance.randbytes(64)),
                wire.table(
                    *(job, space, wire.u32(2), bytes(33), chance.randbytes(64), wire.u32(1, 2)),
                    *(("I", 5), ("Q", 6), ("I", 7)),
                ),
                wire.table(("Q", 3)),
            ]
        )
    )
    for _ in range(chance.randrange(1, 6)):
        message[chance.randrange(len(message))] ^= 1 << chance.randrange(8)
    return wire.frame(chance.choice([wire.OPEN, wire.LEASE, wire.SAVE, wire.PING]), bytes(message))


@pytest.mark.parametrize("attached", [False, True], ids=["before-hello", "in-session"])
@pytest.mark.parametrize("make", [garbage, nonsense_payload, flipped])
def test_random_bytes_are_answered_or_dropped(
    world: World, make: Callable[[random.Random], bytes], attached: bool
) -> None:
    sidecar = world.sidecar()
    chance = random.Random(f"{make.__name__}{attached}")
    with honest(world, sidecar):
        for index in range(40):
            role = chance.choice([wire.SCHEDULER, wire.WORKER, wire.OBSERVER])
            raw = Raw(sidecar.socket, wire.hello(role=role, engine=f"raw-{index}") if attached else b"")
            if attached:
                raw.expect(wire.WELCOME)
            for _ in range(4):
                raw.send(make(chance))
            raw.socket.shutdown(1)
            for kind, _ in raw.rest():
                assert kind in (wire.REFUSED, wire.BYE, wire.PONG, wire.OPENED, wire.LEASED), kind
            raw.close()


def test_a_frame_that_is_too_long_is_refused_by_its_header(world: World) -> None:
    sidecar = world.sidecar()
    with honest(world, sidecar):
        for length in (4 * 2**20 + 1, 2**31, 2**32 - 1):
            raw = Raw(sidecar.socket, wire.frame(wire.HELLO, b"", length=length))
            assert b"expected a frame of at most" in raw.expect(wire.REFUSED)
            assert raw.receive() is None
            raw = Raw(sidecar.socket, wire.hello())
            raw.expect(wire.WELCOME)
            raw.send(wire.frame(wire.PING, b"", length=length))
            assert b"expected a frame of at most" in raw.expect(wire.BYE)
            assert raw.receive() is None


def test_the_third_malformed_message_ends_the_session(world: World) -> None:
    sidecar = world.sidecar()
    with honest(world, sidecar):
        raw = Raw(sidecar.socket, wire.hello())
        raw.expect(wire.WELCOME)
        for _ in range(2):
            raw.send(wire.frame(99, b"??"))
            assert b"unknown message kind 99" in raw.expect(wire.REFUSED)
            raw.send(wire.frame(wire.PING, wire.table(("Q", 5))))
            raw.expect(wire.PONG)
        raw.send(wire.frame(wire.SAVE, b"\xff" * 64))
        assert b"3 malformed messages" in raw.expect(wire.BYE)
        assert raw.receive() is None


def test_another_protocol_version_is_refused_in_words(world: World) -> None:
    sidecar = world.sidecar()
    with honest(world, sidecar):
        for major in (0, 1, 3, 65535):
            raw = Raw(sidecar.socket, wire.hello(major=major))
            text = raw.expect(wire.REFUSED)
            assert f"the client speaks {major}".encode() in text and b"expected protocol version 2" in text
            assert raw.receive() is None


def test_a_first_message_that_is_no_hello_is_refused(world: World) -> None:
    sidecar = world.sidecar()
    with honest(world, sidecar):
        for first in (
            wire.frame(wire.PING, wire.table(("Q", 1))),
            wire.hello(engine=""),
            wire.hello(engine="x" * 300),
        ):
            raw = Raw(sidecar.socket, first)
            assert b"expected" in raw.expect(wire.REFUSED)
            assert raw.receive() is None


def test_a_client_that_says_nothing_or_half_a_hello_is_dropped_after_two_seconds(world: World) -> None:
    sidecar = world.sidecar()
    with honest(world, sidecar):
        begun = time.monotonic()
        silent = [Raw(sidecar.socket, first) for first in (b"", b"\1", wire.hello()[:20])]
        assert [raw.receive() for raw in silent] == [None] * 3
        assert 1.5 < time.monotonic() - begun < 4


def test_half_a_frame_in_a_session_holds_nobody_up(world: World) -> None:
    sidecar = world.sidecar()
    with honest(world, sidecar):
        half = [Raw(sidecar.socket, wire.hello(engine=f"half-{n}")) for n in range(20)]
        for raw in half:
            raw.expect(wire.WELCOME)
            raw.send(wire.frame(wire.SAVE, bytes(3 << 20))[:-1])
        time.sleep(0.3)
        for raw in half:
            raw.close()


@pytest.mark.parametrize("attached", [False, True], ids=["before-hello", "in-session"])
def test_a_flood_of_file_descriptors_is_cut_off(world: World, attached: bool) -> None:
    sidecar = world.sidecar()
    null = os.open("/dev/null", os.O_RDONLY)
    with honest(world, sidecar):
        worker = sidecar.worker_pid
        before = descriptors(worker)
        most = 0
        for _ in range(3):
            raw = Raw(sidecar.socket, wire.hello(role=wire.WORKER) if attached else b"", seconds=3)
            if attached:
                raw.expect(wire.WELCOME)
            # One long frame that never ends, eight descriptors with each of its bytes.
            raw.send(wire.frame(wire.SAVE if attached else wire.HELLO, b"", length=1 << 20))
            for _ in range(300):
                raw.send(b"x", [null] * 8)
                most = max(most, descriptors(worker))
            raw.socket.shutdown(1)
            raw.rest()
            raw.close()
        assert most < before + 80, f"{most - before} descriptors piled up in the sidecar"
        until(lambda: descriptors(worker) <= before, "the sidecar to close what it was sent")
    os.close(null)


def test_more_descriptors_than_a_message_may_carry_end_the_session(world: World) -> None:
    sidecar = world.sidecar()
    null = os.open("/dev/null", os.O_RDONLY)
    with honest(world, sidecar):
        for count, announced in ((200, 0), (1, 5), (0, 2), (4, 4), (8, 0)):
            raw = Raw(sidecar.socket, wire.hello())
            raw.expect(wire.WELCOME)
            raw.send(wire.frame(wire.PING, wire.table(("Q", 1)), fds=announced), [null] * count)
            raw.socket.shutdown(1)
            assert {kind for kind, _ in raw.rest()} <= {wire.PONG, wire.BYE, wire.REFUSED}
    os.close(null)


def test_a_registration_with_the_wrong_memory_is_refused_with_the_reason(world: World) -> None:
    """Unsealed, too small, no memfd at all, somebody else's: none of it brings the sidecar down."""
    sidecar = world.sidecar()
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 1 << 20)
    null = os.open("/dev/null", os.O_RDWR)
    with honest(world, sidecar):
        for fd in (unsealed, null, None):
            for way, base in ((0, 0), (1, 0), (1, 2**64 - 4096)):
                raw = Raw(sidecar.socket, wire.hello(role=wire.WORKER))
                raw.expect(wire.WELCOME)
                payload = wire.register(way=("B", way), base=("Q", base))
                raw.send(wire.frame(wire.REGISTER, payload, fds=int(fd is not None)), [fd] if fd else None)
                told = raw.expect(wire.REFUSED)
                assert not (b"columns" in told or b"canary" in told), f"refused for another reason: {told!r}"
                raw.close()
    os.close(unsealed)
    os.close(null)


IN_SHARDS: dict[str, wire.Field] = {
    "group_fields": wire.u32(2),
    "keys": ["model", "shard"],
    "values": ["m", "1/1"],
}


def others(*shards: tuple[int, int, int]) -> dict[str, wire.Field]:
    """Shards of other sizes: (group, shard, of how many)."""
    names = ("other_groups", "other_shards", "other_counts")
    return {name: wire.u32(*column) for name, column in zip(names, zip(*shards, strict=True), strict=True)}


HOSTILE_SHARDS: dict[str, tuple[dict[str, wire.Field], bytes]] = {
    "of no group": (IN_SHARDS | others((1, 0, 2)), b"shards of a group below 1"),
    "columns of two lengths": (
        IN_SHARDS | others((0, 0, 2)) | {"other_groups": wire.u32(0, 0)},
        b"equal columns",
    ),
    "a column that is not there": (IN_SHARDS | others((0, 0, 2)) | {"other_counts": None}, b"equal columns"),
    "1025 of them": (IN_SHARDS | others(*[(0, 0, 2)] * 1025), b"at most 1024 shards"),
    "of a namespace that names none": (others((0, 0, 2)), b"a field `shard`"),
    "its own": (IN_SHARDS | others((0, 0, 1)), b"each shard once"),
    "one twice": (IN_SHARDS | others((0, 0, 2), (0, 0, 2)), b"each shard once"),
    "beyond the last": (IN_SHARDS | others((0, 5, 2)), b"expected one below 2, got 5"),
    "of none": (IN_SHARDS | others((0, 0, 0)), b"expected one below 0, got 0"),
    "of states": (
        IN_SHARDS
        | others((0, 0, 2))
        | {
            "page_packings": ["states replicated=0 whole:bytes=4096,format=a"],
            "page_states": wire.u32(1),
            "page_content_bytes": wire.u32(4096),
        },
        b"",
    ),
}


HOSTILE_REGISTRATIONS: dict[str, tuple[dict[str, wire.Field], bytes]] = {
    "no groups": (
        {
            **{name: wire.u32() for name in ("group_block_tokens", "group_fields", "group_pages")},
            "keys": [],
            "values": [],
        },
        b"expected columns of equal length",
    ),
    "65 groups": (
        {name: wire.u32(*[0] * 65) for name in ("group_block_tokens", "group_fields", "group_pages")},
        b"at most 64 KV cache groups",
    ),
    "groups of two lengths": ({"group_pages": wire.u32(1, 1)}, b"at most 64 KV cache groups"),
    "more fields than there are": ({"group_fields": wire.u32(2)}, b"1 to 256 namespace fields"),
    "fewer fields than there are": ({"keys": ["a", "b"], "values": ["a", "b"]}, b"and no more"),
    "a field without a value": ({"values": []}, b"1 to 256 namespace fields"),
    "a cache mode that there is not": ({"cache_mode": "write-back"}, b"cache mode of write_back"),
    "no fields": ({"keys": [], "values": [], "group_fields": wire.u32(0)}, b"1 to 256 namespace fields"),
    "one namespace for two groups": (
        {
            "group_block_tokens": wire.u32(16, 16),
            "group_fields": wire.u32(1, 1),
            "group_pages": wire.u32(1, 0),
            "keys": ["model", "model"],
            "values": ["m", "m"],
        },
        b"a namespace of its own",
    ),
    "more pages than there are": ({"group_pages": wire.u32(2)}, b"columns of equal length"),
    "4 billion pages": ({"group_pages": wire.u32(2**32 - 1)}, b"columns of equal length"),
    "fewer pages than there are": ({"group_pages": wire.u32(0)}, b"columns of equal length"),
    "pages of two lengths": ({"page_heads": wire.u32(1, 1)}, b"columns of equal length"),
    "more layers than there are": ({"page_layers": wire.u32(2**32 - 1)}, b"columns of equal length"),
    "a layer of no page": ({"layer_names": ["l", "m"]}, b"columns of equal length"),
    "a layer twice": ({"page_layers": wire.u32(2), "layer_names": ["l", "l"]}, b"each layer once"),
    "an order of its own": ({"layout": "HCNBL"}, b"kv cache order"),
    "a packing of its own": ({"page_packings": ["bytes"]}, b"packing of a page"),
    "a rank beyond its world": ({"rank": ("I", 1)}, b"expected one below 1, got 1"),
    "no world": ({"world": ("I", 0)}, b"expected one below 0"),
    "2^63 blocks": ({"num_blocks": ("Q", 2**63)}, b""),
    "a page of 2^64 bytes": ({"page_bytes": wire.u64(2**64 - 1)}, b""),
    "states of 2^32 bytes": (
        {"page_content_bytes": wire.u32(2**32 - 1), "page_heads": wire.u32(2**32 - 1)},
        b"",
    ),
    "no kernel blocks": ({"page_kernel_blocks": wire.u32(0)}, b"kernel blocks"),
    "the canary of no group": ({"canary_group": ("I", 1)}, b"the canary of a group below 1"),
    "a canary that nobody wrote": ({}, b"layout canary"),
    "no canary, and no proof of one": (
        {"canary_fresh": ("B", 0), "canary_checked": ("B", 0)},
        b"expected the layout canary, or proof",
    ),
}


def test_registrations_that_make_no_sense_are_refused_with_the_reason(world: World) -> None:
    refused_registrations(world, HOSTILE_REGISTRATIONS)


def test_shards_that_make_no_sense_are_refused(world: World) -> None:
    refused_registrations(world, HOSTILE_SHARDS)


def refused_registrations(world: World, cases: dict[str, tuple[dict[str, wire.Field], bytes]]) -> None:
    sidecar = world.sidecar()
    memory = os.memfd_create("kv", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, 1 << 20)
    fcntl.fcntl(memory, F_ADD_SEALS, SEALS)
    with honest(world, sidecar):
        for name, (changed, reason) in cases.items():
            raw = Raw(sidecar.socket, wire.hello(role=wire.WORKER))
            raw.expect(wire.WELCOME)
            raw.send(wire.frame(wire.REGISTER, wire.register(**changed), fds=1), [memory])
            told = raw.expect(wire.REFUSED)
            assert reason in told, f"{name} is refused for another reason: {told!r}"
            raw.close()
    os.close(memory)


def test_a_storm_of_connections_is_told_that_it_is_busy(world: World) -> None:
    sidecar = world.sidecar(max_sessions=20)
    with honest(world, sidecar):
        storm = [Raw(sidecar.socket, wire.hello(engine=f"storm-{index}")) for index in range(200)]
        answers = [raw.receive() for raw in storm]
        welcome = [answer for answer in answers if answer and answer[0] == wire.WELCOME]
        refused = [answer[1] for answer in answers if answer and answer[0] == wire.REFUSED]
        assert len(welcome) + len(refused) == 200
        assert len(welcome) <= 18, "two belong to the honest engine"
        assert all(b"max_sessions" in text or b"introduce themselves" in text for text in refused)
        for raw in storm:
            raw.close()
    assert world.engine(sidecar, "later").ready()


def test_silent_connections_do_not_exhaust_the_sidecar(world: World) -> None:
    """They are not sessions, and must be bounded all the same (I8)."""
    sidecar = world.sidecar()
    with honest(world, sidecar):
        worker = sidecar.worker_pid
        silent: list[Raw] = []
        most = 0
        stop = time.monotonic() + 1.5
        while len(silent) < 2000 and time.monotonic() < stop:
            try:
                silent.append(Raw(sidecar.socket))
            except BlockingIOError:  # as many as may wait for their accept
                time.sleep(0.002)
            most = max(most, descriptors(worker)) if len(silent) % 20 == 0 else most
        assert len(silent) > 600
        assert most < 600, f"{most} descriptors open in the sidecar"
        for raw in silent:
            raw.close()
        late = until(lambda: try_attach(sidecar), "a newcomer to get in")
        late.close()


def try_attach(sidecar: Sidecar) -> Raw | None:
    raw = None
    with contextlib.suppress(TimeoutError, AssertionError, OSError):
        raw = Raw(sidecar.socket, wire.hello(engine="late"), seconds=1)
        raw.expect(wire.WELCOME)
        return raw
    if raw:
        raw.close()
    return None


def test_a_client_that_never_reads_is_dropped(world: World) -> None:
    sidecar = world.sidecar()
    with honest(world, sidecar):
        deaf = Raw(sidecar.socket, wire.hello(role=wire.OBSERVER), seconds=20)
        query = wire.frame(18, wire.table(("Q", 1))) * 500
        # Its own sending is held up only if the sidecar stops reading: both are an answer.
        deaf.socket.settimeout(1)
        with contextlib.suppress(TimeoutError):
            for _ in range(200):
                try:
                    deaf.socket.sendall(query)
                except (BrokenPipeError, ConnectionResetError):
                    break
        until(lambda: "does not read" in sidecar.log.read_text(), "it to be dropped", 20)
        deaf.close()


def test_leases_that_a_client_leaves_behind_run_out(world: World) -> None:
    sidecar = world.sidecar(lease_seconds=1)
    with honest(world, sidecar) as traffic:
        raw = Raw(sidecar.socket, wire.hello(engine="forgetful"))
        raw.expect(wire.WELCOME)
        names = {"model": "model-a", "dtype": "float32", "hash": "sha256"}
        raw.send(wire.frame(wire.OPEN, wire.table(("Q", 1), list(names), list(names.values()), b"")))
        opened = raw.expect(wire.OPENED)
        space = traffic.engine.scheduler.namespace_ids()
        assert space and space in opened
        hashes = b"".join(chain("honest", 10))
        raw.send(wire.frame(wire.LEASE, wire.table(("Q", 2), space, wire.u32(10), hashes)))
        raw.expect(wire.LEASED)
        until(lambda: sidecar.status()["leases"]["expired"] >= 1, "the lease to run out", 4)
        raw.close()


IMPOSTOR = """
import os, sys, time
os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
from pillion._native import SchedulerClient, WorkerClient
options = dict(socket=sys.argv[2], engine_id=sys.argv[3], tenant=sys.argv[4], namespaces=[{"model": "model-a", "dtype": "float32", "hash": "sha256"}])
scheduler, worker = SchedulerClient(**options), WorkerClient(**options)
deadline = time.monotonic() + 10
while time.monotonic() < deadline and not scheduler.ready() and "refused" not in scheduler.status():
    time.sleep(0.01)
print(scheduler.status(), scheduler.lookup(0, bytes.fromhex(sys.argv[5])), sep="|")
"""


def impostor(sidecar: Sidecar, uid: int, engine: str, tenant: str) -> str:
    code = [
        sys.executable,
        "-c",
        IMPOSTOR,
        str(uid),
        str(sidecar.socket),
        engine,
        tenant,
        b"".join(chain("honest", 10)).hex(),
    ]
    done = subprocess.run(code, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_another_user_is_denied_unless_allowed(world: World) -> None:
    config = "allow_uids = [4711]\n[tenants]\nred = { uids = [4712] }\n"
    sidecar = world.sidecar(config=config)
    closed = world.sidecar()
    assert sidecar.runtime.stat().st_mode & 0o777 == 0o711
    assert closed.runtime.stat().st_mode & 0o777 == 0o700
    secret = sidecar.state / "secret"
    assert secret.stat().st_mode & 0o777 == 0o600 and sidecar.state.stat().st_mode & 0o777 == 0o700
    if os.geteuid() != 0:
        return  # only root can be somebody else; what keeps others out was looked at
    with honest(world, sidecar):
        assert "refused" in impostor(sidecar, 4713, "stranger", "default")
        assert "refused" in impostor(sidecar, 4711, "stranger", "red")
        assert "refused" in impostor(sidecar, 4712, "stranger", "default")
        assert impostor(sidecar, 4711, "friend", "default") == "ready|10"
        assert impostor(sidecar, 4712, "red", "red") == "ready|0"
    assert "Permission denied" in impostor_unreachable(closed)


def impostor_unreachable(sidecar: Sidecar) -> str:
    code = "import os,socket,sys; os.setuid(4711); socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(sidecar.socket)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode != 0
    return done.stderr


def test_jobs_that_no_correct_client_sends_are_refused(world: World) -> None:
    """Blocks beyond the cache, jobs before a registration, double ids: all refused, none copied."""
    sidecar = world.sidecar()
    with honest(world, sidecar):
        raw = Raw(sidecar.socket, wire.hello(role=wire.WORKER))
        raw.expect(wire.WELCOME)
        for index in range(5):
            blocks = wire.table(
                *(bytes([index]) * 16, bytes(16), wire.u32(1), bytes(33), bytes(32), wire.u32(2**32 - 1)),
                *(("I", 2**32 - 1), ("Q", 1), ("I", 1)),
            )
            raw.send(wire.frame(wire.SAVE, blocks))
        answered: list[int] = []
        raw.socket.shutdown(1)
        answered += [kind for kind, _ in raw.rest()]
        assert wire.REFUSED in answered or wire.BYE in answered
