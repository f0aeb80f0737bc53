"""Where the shim gets the compiled client and the `pillion` command from."""

import os
import shutil
import sys
from types import ModuleType

IDLE_EXIT_SECONDS = 1800


def native() -> ModuleType:
    """The extension module `pillion._native`: one function, so that tests can replace the client."""
    from pillion import _native

    return _native


def find_binary() -> str | None:
    """The `pillion` command of the same installation as this package, else the first on the PATH."""
    beside = os.path.join(os.path.dirname(os.path.abspath(sys.executable)), "pillion")
    if os.path.isfile(beside) and os.access(beside, os.X_OK):
        return beside
    return shutil.which("pillion")


def launch_command(socket: str | None, device: str, ranks: int = 1) -> list[str]:
    """The command that starts a sidecar of `device` which outlives this engine; empty where there is none.

    `ranks` sidecars will share this machine's memory.
    """
    binary = find_binary()
    if binary is None:
        return []
    command = [binary, "serve", "--detach", "--device", device, "--idle-exit-seconds", str(IDLE_EXIT_SECONDS)]
    if ranks > 1:
        command += ["--sidecars", str(ranks)]
    return [*command, "--socket", socket] if socket else command
