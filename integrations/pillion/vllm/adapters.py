"""LoRA adapters: a request's blocks are known by vLLM's hash and by the adapter's weights.

vLLM's block hash names an adapter by name (0.30) or by name and path (0.31 and later), so other weights under the
same path would hit. The key of a block of such a request is SHA-256 over the fingerprint of the adapter's files and
vLLM's hash. An adapter under another name shares nothing.

What was fingerprinted must be what the worker computes with, and the worker says nothing about what it has loaded:

- files are read whole, once, by a thread of its own; until that is done requests run uncached;
- vLLM's worker may read the files again at any time (its cache of adapters is an LRU). So once they have changed on
  disk, nobody knows from here which weights an adapter has, and its requests run uncached for good;
- the same for requests that ask for `load_inplace`, which reloads the files with every step, and for an adapter id
  that is used with two paths: the worker goes by the id.

An adapter that is loaded again after it was unloaded gets another id from vLLM's server, and is read again.
"""

import glob
import hashlib
import logging
import os
import queue
import struct
import threading
from typing import Any

from pillion.vllm.log import log_limited, log_once, survivable

# What vLLM's worker reads of an adapter (`lora/lora_model.py`, `lora/peft_helper.py`).
_FILES = ("adapter_config.json", "adapter_model.*", "new_embeddings.*")
_CHUNK = 1 << 20
ADAPTERS_MAX = 4096  # ids that are remembered; requests with others run uncached

Stat = tuple[tuple[str, int, int, int], ...]


class Adapters:
    """Fingerprints of the adapters of one engine; asked from the scheduler's thread, which never waits."""

    def __init__(self, vllm_config: Any) -> None:
        self._options = str(getattr(vllm_config.lora_config, "lora_dtype", None))
        self._known: dict[int, _Adapter] = {}
        self._unread: queue.SimpleQueue[_Adapter | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def fingerprint(self, lora: Any) -> bytes | None:
        """32 bytes, or None where requests of this adapter run uncached."""
        adapter = self._known.get(lora.lora_int_id)
        if adapter is None:
            self._first_seen(lora)
            return None
        if adapter.refused is None:
            if lora.load_inplace:
                adapter.refuse("load_inplace reloads its weights while the engine runs")
            elif (lora.lora_name, lora.lora_path) != (adapter.name, adapter.path):
                adapter.refuse(f"its id is used with {lora.lora_name} at {lora.lora_path} too")
            elif adapter.digest is not None and adapter.changed():
                adapter.refuse("its files have changed since the engine read them")
        return adapter.digest if adapter.refused is None else None

    def _first_seen(self, lora: Any) -> None:
        if len(self._known) >= ADAPTERS_MAX:
            log_once(
                logging.WARNING, "adapters", "more than %d LoRA adapters: others run uncached", ADAPTERS_MAX
            )
            return
        options = f"{self._options} 3d={getattr(lora, 'is_3d_lora_weight', False)}"
        adapter = _Adapter(lora.lora_name, lora.lora_path, options)
        self._known[lora.lora_int_id] = adapter
        if lora.load_inplace:
            adapter.refuse("load_inplace reloads its weights while the engine runs")
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_all, name="pillion-lora", daemon=True)
            self._thread.start()
        self._unread.put(adapter)

    def _read_all(self) -> None:
        while (adapter := self._unread.get()) is not None:
            try:
                adapter.read()
            except BaseException as error:
                if not survivable(error):
                    raise
                adapter.refuse(f"its files cannot be read: {error!r}")

    def close(self) -> None:
        """Ends the thread."""
        self._unread.put(None)


class _Adapter:
    def __init__(self, name: str, path: str, options: str) -> None:
        self.name = name
        self.path = path
        self.digest: bytes | None = None
        self.refused: str | None = None
        self._options = options
        self._stat: Stat = ()

    def refuse(self, reason: str) -> None:
        self.refused = reason
        log_limited(
            logging.WARNING,
            f"lora {self.name}",
            "requests with the LoRA adapter %s at %s run uncached: %s",
            self.name,
            self.path,
            reason,
        )

    def read(self) -> None:
        """Reads all files; `digest` is set last, and only if nothing changed meanwhile."""
        root = os.path.expanduser(self.path)
        paths = sorted(path for each in _FILES for path in glob.glob(os.path.join(glob.escape(root), each)))
        if not any(os.path.basename(path).startswith("adapter_model.") for path in paths):
            # vLLM would look for it on the Hugging Face hub, at a revision that nobody sees from here.
            self.refuse("expected a directory with adapter_config.json and adapter_model.safetensors")
            return
        before = _stat(paths)
        digest = hashlib.sha256(self._options.encode())
        for path in paths:
            name = os.path.basename(path).encode()
            digest.update(struct.pack("<QQ", len(name), os.path.getsize(path)) + name)
            with open(path, "rb", buffering=0) as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        self._stat = before
        if _stat(paths) != before:
            self.refuse("its files changed while they were read")
            return
        self.digest = digest.digest()

    def changed(self) -> bool:
        """Whether the files are others than those that were read."""
        try:
            return _stat([path for path, *_ in self._stat]) != self._stat
        except OSError:
            return True


def _stat(paths: list[str]) -> Stat:
    found = []
    for path in paths:
        stat = os.stat(path)
        found.append((path, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(found)
