"""A `vllm serve` process, and the little of its HTTP interface that the scripts need. Standard library only."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_SECONDS = 900
STOP_SECONDS = 60
REQUEST_SECONDS = 600


class Failed(Exception):
    """What went wrong, in words for the person at the terminal, and the log that says more."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


@dataclass
class Answer:
    prompt_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    ttft_ms: float = 0.0


def free_port(wanted: int | None) -> int:
    """`wanted` if it can be had; 8000 or any free one where nothing is wanted."""
    for port in [8000, 0] if wanted is None else [wanted]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise Failed(f"expected port {wanted} to be free, found it taken: give another --port")


class Engine:
    """One `vllm serve`, in a session of its own so that all of its processes can be found again."""

    def __init__(
        self, name: str, port: int, log: Path, command: Sequence[str], environment: dict[str, str]
    ) -> None:
        self.name = name
        self.port = port
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )

    def wait_ready(self) -> float:
        """Waits until it answers, showing that it is alive. Returns the seconds that took."""
        started = time.monotonic()
        shown = started
        while True:
            now = time.monotonic()
            if (code := self.process.poll()) is not None:
                raise Failed(f"{self.name} ended with exit code {code} instead of serving", self.log)
            if now - started > START_SECONDS:
                raise Failed(f"expected {self.name} to serve within {START_SECONDS} s, it does not", self.log)
            try:
                if self._call("GET", "/health", timeout=5)[0] == 200:
                    return now - started
            except OSError:
                pass
            if now - shown >= 15:
                shown = now
                print(f"    … {now - started:.0f} s: {self._last_line()}", file=sys.stderr, flush=True)
            time.sleep(0.25)

    def stop(self) -> None:
        """Asks it to end, waits for all of its processes, and ends by force what is left."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            self.process.poll()
            if not _group_lives(self.process.pid):
                return
            time.sleep(0.1)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def metrics(self) -> dict[str, float]:
        """vLLM's Prometheus metrics, summed over labels."""
        status, body = self._call("GET", "/metrics", timeout=30)
        if status != 200:
            raise Failed(f"expected metrics from {self.name}, got HTTP {status}", self.log)
        totals: dict[str, float] = {}
        for line in body.decode().splitlines():
            if match := re.match(r"([A-Za-z_:][\w:]*)(?:\{.*\})? (\S+)$", line):
                totals[match[1]] = totals.get(match[1], 0.0) + float(match[2])
        return totals

    def block_tokens(self) -> int:
        """Tokens in one block of the engine's KV cache."""
        body = self._call("GET", "/metrics", timeout=30)[1].decode()
        match = re.search(r'vllm:cache_config_info\{.*?\bblock_size="(\d+)"', body)
        return int(match[1]) if match else 128

    def longest(self) -> int:
        """The longest sequence that the engine takes, in tokens."""
        models = self._json("GET", "/v1/models")
        return int(models["data"][0]["max_model_len"])

    def count_tokens(self, model: str, text: str) -> int:
        return int(self._json("POST", "/tokenize", {"model": model, "prompt": text})["count"])

    def complete(self, request: dict[str, Any]) -> Answer:
        """One streamed completion, by token ids; the time is the client's, from sending to the first token."""
        body = {
            **request,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        answer = Answer()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_SECONDS)
        try:
            connection.connect()
            started = time.perf_counter()
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            if response.status != 200:
                said = response.read(2000).decode(errors="replace")
                raise Failed(f"{self.name} answered HTTP {response.status}: {said}", self.log)
            for line in response:
                data = line.removeprefix(b"data: ").strip()
                if not data or data == b"[DONE]":
                    continue
                self._take(answer, json.loads(data), started)
        except (OSError, http.client.HTTPException) as error:
            raise Failed(
                f"expected a completion from {self.name}, the connection failed: {error!r}", self.log
            ) from error
        finally:
            connection.close()
        if len(answer.token_ids) != request["max_tokens"]:
            raise Failed(
                f"expected {request['max_tokens']} tokens from {self.name}, got {len(answer.token_ids)}",
                self.log,
            )
        return answer

    def _take(self, answer: Answer, event: dict[str, Any], started: float) -> None:
        if "error" in event:
            raise Failed(f"{self.name} ended a completion with an error: {event['error']}", self.log)
        for choice in event.get("choices", []):
            if choice.get("token_ids") and not answer.token_ids:
                answer.ttft_ms = (time.perf_counter() - started) * 1000
            answer.token_ids += choice.get("token_ids") or []
            answer.text += choice.get("text") or ""
        if usage := event.get("usage"):
            answer.prompt_tokens = usage["prompt_tokens"]

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        status, answer = self._call(method, path, timeout=60, body=body)
        if status != 200:
            raise Failed(f"expected an answer of {self.name} to {path}, got HTTP {status}", self.log)
        return json.loads(answer)

    def _call(self, method: str, path: str, *, timeout: float, body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise ConnectionError(repr(error)) from error
        finally:
            connection.close()

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:100] if lines else "nothing in its log yet"


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
