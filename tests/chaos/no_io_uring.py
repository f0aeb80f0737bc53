"""Runs a command to which the kernel refuses io_uring, as container runtimes do: no_io_uring.py COMMAND…"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
IO_URING_SETUP = 425
"""The same on every architecture."""
LOAD_NUMBER, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, EPERM = 0x7FFF0000, 0x00050001


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def refuse() -> None:
    """A filter of four instructions: load the call's number, compare, refuse or allow."""
    instructions = b"".join(
        struct.pack("<HBBI", *one)
        for one in (
            (LOAD_NUMBER, 0, 0, 0),
            (JUMP_IF_EQUAL, 0, 1, IO_URING_SETUP),
            (RETURN, 0, 0, EPERM),
            (RETURN, 0, 0, ALLOW),
        )
    )
    held = ctypes.create_string_buffer(instructions)
    program = Program(len(instructions) // 8, ctypes.cast(held, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0, os.strerror(
        ctypes.get_errno()
    )


refuse()
os.execvp(sys.argv[1], sys.argv[1:])
