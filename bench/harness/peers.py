"""Peers that run as processes of their own: LMCache's MP server, and the engines that speak to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

START_SECONDS = 120.0


class Unavailable(Exception):
    """Why a peer cannot be measured here."""


def lmcache_python() -> str:
    """The Python that has LMCache; scripts/bench says where, or after a "!" why there is none."""
    named = os.environ.get("PILLION_PEER_LMCACHE", "!scripts/bench did not install it")
    if named.startswith("!"):
        raise Unavailable(named[1:])
    return named


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_group(process: subprocess.Popen[bytes], seconds: float = 10.0) -> None:
    """SIGTERM, then SIGKILL, to a process that leads a group of its own, and to everything in it."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


class LmcacheServer:
    """`lmcache server`, LMCache's sidecar ("MP"), by its defaults unless said otherwise."""

    def __init__(self, name: str, *flags: str, port: int | None = None) -> None:
        self.python = lmcache_python()
        self.place = Path(tempfile.mkdtemp(prefix="pbl-", dir="/tmp"))
        self.log = self.place / f"{name}.log"
        # Another server in the place of one that died is found by its engines at the same port.
        self.port, self.http = port or free_port(), free_port()
        command = [self.python, str(Path(self.python).parent / "lmcache"), "server"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--http-port", str(self.http)]
        command += ["--prometheus-port", str(free_port()), "--eviction-policy", "LRU", *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **QUIET},
            )

    @property
    def transfer(self) -> dict[str, Any]:
        """What an engine is told to use it."""
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": self.port,
                "lmcache.mp.mq_timeout": 30,
            },
        }

    def await_ready(self) -> LmcacheServer:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None:
                raise Unavailable(f"its server ended\n{self.explain()}")
            if all(_listens(port) for port in (self.port, self.http)):
                return self
            if time.monotonic() > deadline:
                raise Unavailable(f"its server does not answer\n{self.explain()}")
            time.sleep(0.2)

    def explain(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-30:] if self.log.exists() else []
        return "\n".join([f"-- {self.log.name}", *lines])

    def close(self) -> None:
        end_group(self.process)
        for file in self.place.iterdir():
            file.unlink()
        self.place.rmdir()


class LmcacheClient:
    """LMCache's bench client against such a server, in a process of its own; see `lmcache_client`."""

    def __init__(
        self, server: LmcacheServer, *, shape: str, blocks: int, block: int, tokens: int, way: str
    ) -> None:
        config = {
            "rpc_url": f"tcp://127.0.0.1:{server.port}",
            "http_url": f"http://127.0.0.1:{server.http}",
            "mode": "cpu",
            "transfer_mode": way,
            "tp_size": 1,
            "use_mla": False,
            # It puts a token of its own before these.
            "num_tokens": tokens - 1,
            "kvcache_shape_spec": shape,
            "num_blocks": blocks,
            "block_size": block,
        }
        self.log = server.place / "client.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [server.python, "-m", "harness.lmcache_client", json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **QUIET},
            )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text(errors="replace").splitlines()[-20:]
            raise Unavailable("\n".join(["its bench client ended", *tail]))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, op: str, sequence: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"op": op, "sequence": sequence}).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        end_group(self.process)


QUIET: Mapping[str, str] = {
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
    "PYTHONWARNINGS": "ignore",
    # The hashes by which the server knows a prompt must be those of every engine.
    "PYTHONHASHSEED": "0",
}


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
