"""The protocol by hand: what a stranger could write to the socket.

A small FlatBuffers writer, so that hostile and outdated clients can be played without the shipped one.
"""

from __future__ import annotations

import array
import contextlib
import socket
import struct
from pathlib import Path

HELLO, WELCOME, REFUSED, OPEN, OPENED, REGISTER, LEASE, LEASED = 1, 2, 3, 4, 5, 6, 8, 9
SAVE, LOAD, CANCEL, PING, PONG, BYE = 12, 13, 14, 15, 16, 17
NEIGHBOUR_TABLE, BORROW, BORROWED, DAMAGED, TENANT_SERVED = 22, 24, 25, 26, 27
SCHEDULER, WORKER, OBSERVER, NEIGHBOUR = 0, 1, 2, 3
Field = tuple[str, int] | bytes | memoryview | str | list[str] | None
"""("H", 7): a scalar by its struct letter; bytes or a memoryview: a vector; None: left out."""


def table(*fields: Field) -> bytes:
    """A FlatBuffer whose root table has these fields, in the order of the schema."""
    vtable_bytes = 4 + 2 * len(fields)
    start = -(-(4 + vtable_bytes) // 8) * 8 + 4  # so that the fields behind the offset begin on 8
    inline, places, heap = bytearray(), [], []
    for field in fields:
        if field is None:
            places.append(0)
            continue
        letter, value = field if isinstance(field, tuple) else ("I", 0)
        inline += bytes(-len(inline) % struct.calcsize(letter))
        places.append(4 + len(inline))
        if not isinstance(field, tuple):
            heap.append((len(inline), field))
        inline += struct.pack("<" + letter, value)
    inline += bytes(-len(inline) % 8)
    vtable = struct.pack(f"<{2 + len(fields)}H", vtable_bytes, 4 + len(inline), *places)
    head = struct.pack("<I", start) + bytes(start - 4 - len(vtable)) + vtable
    body = bytearray(head + struct.pack("<i", len(vtable)) + inline)
    for place, content in heap:
        position = start + 4 + place
        struct.pack_into("<I", body, position, len(body) - position)
        _append(body, content)
    return bytes(body)


def u32(*values: int) -> memoryview:
    """A vector of uint32."""
    return memoryview(array.array("I", values))


def _append(body: bytearray, value: bytes | memoryview | str | list[str]) -> None:
    if isinstance(value, list):
        first = len(body) + 4
        body += struct.pack("<I", len(value)) + bytes(4 * len(value))
        for index, text in enumerate(value):
            struct.pack_into("<I", body, first + 4 * index, len(body) - first - 4 * index)
            _append(body, text)
    else:
        data = value.encode() if isinstance(value, str) else bytes(value)
        body += (
            struct.pack("<I", len(data) if isinstance(value, str) else len(value))
            + data
            + bytes(-(len(data) + 1) % 4 + 1)
        )
    body += bytes(-len(body) % 4)


def frame(kind: int, payload: bytes, fds: int = 0, length: int | None = None) -> bytes:
    return struct.pack("<IHH", len(payload) if length is None else length, kind, fds) + payload


def hello(*, major: int = 2, role: int = SCHEDULER, engine: str = "raw", tenant: str = "default") -> bytes:
    return frame(HELLO, table(("H", major), ("H", 0), ("B", role), engine, tenant, "0"))


def u64(*values: int) -> memoryview:
    """A vector of uint64."""
    return memoryview(array.array("Q", values))


def register(**changed: Field) -> bytes:
    """A registration of 256 blocks of one layer of float32, with some fields changed."""
    fields: dict[str, Field] = {
        "request": ("Q", 1),
        "layout": "LBHNC",
        "num_blocks": ("Q", 256),
        "rank": ("I", 0),
        "world": ("I", 1),
        "group_block_tokens": u32(16),
        "group_fields": u32(1),
        "group_pages": u32(1),
        "keys": ["model"],
        "values": ["m"],
        "page_sizes": u64(1 << 20),
        "page_offsets": u64(0),
        "page_layer_strides": u64(1 << 20),
        "page_block_strides": u64(4096),
        "page_layers": u32(1),
        "page_heads": u32(1),
        "page_states": u32(16),
        "page_content_bytes": u32(256),
        "page_bytes": u64(4096),
        "page_kernel_blocks": u32(1),
        "page_packings": ["kv total_heads=1 key=128 value=128 dtype=float32"],
        "layer_names": ["l"],
        "way": ("B", 0),
        "memory_bytes": ("Q", 1 << 20),
        "base": ("Q", 0),
        "canary_group": ("I", 0),
        "canary_seed": ("Q", 7),
        "canary_fresh": ("B", 1),
        "canary_checked": ("B", 1),
        "device": None,
        "handle": None,
        "allocation_bytes": ("Q", 0),
        "allocation_offset": ("Q", 0),
        "events": None,
        "other_groups": None,
        "other_shards": None,
        "other_counts": None,
        "cache_mode": None,
    }
    assert changed.keys() <= fields.keys(), "no such field"
    return table(*(fields | changed).values())


class Raw:
    """A connection that says whatever it is told to."""

    def __init__(self, path: Path, first: bytes = b"", seconds: float = 5.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(seconds)
        self.socket.connect(str(path))
        self.bytes = b""
        self.ended = False
        self.send(first)

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        """What the other side does not want to hear any more is lost."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if fds:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                self.socket.sendmsg([data], rights)
            elif data:
                self.socket.sendall(data)

    def receive(self) -> tuple[int, bytes] | None:
        """The next frame; None at the end. Raises TimeoutError."""
        while True:
            if len(self.bytes) >= 8:
                length, kind, _ = struct.unpack_from("<IHH", self.bytes)
                if len(self.bytes) >= 8 + length:
                    payload, self.bytes = self.bytes[8 : 8 + length], self.bytes[8 + length :]
                    return kind, payload
            try:
                # File descriptors that come along are not taken: the kernel closes them.
                data = self.socket.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                self.ended = True
                return None
            self.bytes += data

    def expect(self, *kinds: int) -> bytes:
        """The payload of the first frame of such a kind; others are passed over."""
        seen = []
        while (got := self.receive()) is not None:
            if got[0] in kinds:
                return got[1]
            seen.append(got[0])
        raise AssertionError(f"expected a frame of kind {kinds}, the connection ended after {seen}")

    def rest(self) -> list[tuple[int, bytes]]:
        """Everything until the end."""
        frames = []
        while (got := self.receive()) is not None:
            frames.append(got)
        return frames

    def close(self) -> None:
        self.socket.close()
