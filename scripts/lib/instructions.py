"""Instructions of the client's calls that engines make from their own threads, counted by callgrind.

usage: instructions.py PROGRAM DAEMON [--write]     (scripts/bench instructions)

Ends with 1 if one takes 5 % more than bench/results/instructions.json says, 3 if there is no valgrind. Counts of another
compiler are shown, and judge nothing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / "bench" / "results" / "instructions.json"
ALLOWED = 1.05
ATTEMPTS = 5
CASES = {
    "lookup-2048": ("count_lookup", "2,048 blocks found in the presence table"),
    "absent-2048": ("count_absent", "2,048 blocks looked up for what is to be saved"),
    "submit-256": ("count_submit", "a save of 256 blocks submitted"),
    "idle-step": ("count_step", "a step with nothing to do"),
}


def start(daemon: str, place: Path) -> subprocess.Popen[bytes]:
    state, run = place / "s", place / "r"
    state.mkdir(mode=0o700)
    # Where a block lies in the table depends on the secret: the same one each time.
    secret = state / "secret"
    secret.write_bytes(bytes(range(32)))
    secret.chmod(0o600)
    flags = [
        f"--runtime-dir={run}",
        f"--state-dir={state}",
        "--device=cpu0",
        "--host-pool=64MiB",
        "--http=off",
    ]
    process = subprocess.Popen(
        [daemon, "serve", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not (run / "cpu0.sock").exists():
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            raise SystemExit("expected a sidecar that serves, it does not")
        time.sleep(0.02)
    return process


def count(program: str, socket: Path, name: str) -> int:
    """A machine without a free core may let a table go stale: then it is tried again."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"]
    command += [f"--toggle-collect=*{CASES[name][0]}*", program, str(socket), name]
    said = ""
    for _ in range(ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        said = done.stderr
        found = re.search(r"Collected : (\d+)", said)
        if done.returncode == 0 and found and int(found[1]):
            return int(found[1])
    raise SystemExit(f"{name} could not be counted:\n{said[-2000:]}")


def main() -> int:
    program, daemon = sys.argv[1:3]
    if shutil.which("valgrind") is None:
        print(
            "expected valgrind, found none: install it (Debian: valgrind), then run this again",
            file=sys.stderr,
        )
        return 3
    compiler = subprocess.run(
        ["rustc", "--version"], capture_output=True, text=True, check=True
    ).stdout.split()[1]
    # A socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        sidecar = start(daemon, Path(folder))
        try:
            counts = {name: count(program, Path(folder) / "r" / "cpu0.sock", name) for name in CASES}
        finally:
            sidecar.terminate()
            sidecar.wait()
    if "--write" in sys.argv[3:]:
        BASELINE.write_text(json.dumps({"compiler": compiler, "instructions": counts}, indent=2) + "\n")
    known = json.loads(BASELINE.read_text())
    more = []
    for name, now in counts.items():
        before = known["instructions"][name]
        print(f"{CASES[name][1]:50} {now:>10,} instructions, {now / before - 1:+.1%}")
        more += [name] if now > before * ALLOWED else []
    if compiler != known["compiler"]:
        print(f"compared with those of rustc {known['compiler']}, this is {compiler}: nothing is judged")
        return 0
    if more:
        print(f"more than 5 % above bench/results/instructions.json: {', '.join(more)}. "
              "If that is as it must be: scripts/bench instructions --write")  # fmt: skip
    return 1 if more else 0


if __name__ == "__main__":
    os.environ.pop("RUST_LOG", None)
    sys.exit(main())
