"""Runs the built fuzz targets for a time and reports what they did. `scripts/soak fuzz` builds them and calls this."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CORPORA = ROOT / "tests" / "fuzz" / "corpus"
SCRATCH = ROOT / "target" / "fuzz-corpus"
ARTIFACTS = ROOT / "target" / "fuzz-artifacts"
# Of one input: nothing here is meant to take so long, with every check of the sanitizer.
INPUT_SECONDS_MAX = 20
MEMORY_MIB_MAX = 2048
# What libFuzzer leaves that is a finding.
FINDINGS = ("crash-", "timeout-", "oom-", "leak-")
STATE = re.compile(r"^#(\d+)\s.*?cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)
EXECUTED = re.compile(r"^stat::number_of_executed_units:\s+(\d+)", re.MULTILINE)


@dataclass
class Run:
    """One target's share."""

    target: str
    seconds: float = 0.0
    core_seconds: float = 0.0
    executions: int = 0
    cov: int = 0
    ft: int = 0
    corpus: int = 0
    exit_code: int = 0
    crashes: list[str] = field(default_factory=list)


def found(place: Path) -> set[str]:
    return {entry.name for entry in place.iterdir() if entry.name.startswith(FINDINGS)}


def processor_seconds(pid: int) -> float:
    """Of a process that was not waited for, all its threads."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def waited_for(child: subprocess.Popen[bytes], seconds: float) -> tuple[int, float]:
    """Its status and its processor time, of which it gets so much: a machine with other work takes longer for it, and does
    not do less."""
    is_over = False
    while True:
        pid, status, used = os.wait4(child.pid, os.WNOHANG)
        if pid:
            return status, used.ru_utime + used.ru_stime
        if not is_over and processor_seconds(child.pid) >= seconds:
            is_over = True
            # What libFuzzer ends in order by, with its figures.
            child.send_signal(signal.SIGUSR1)
        time.sleep(0.1)


def fuzz(binary: Path, seconds: int) -> Run:
    run = Run(binary.name)
    scratch, artifacts = SCRATCH / run.target, ARTIFACTS / run.target
    for place in (scratch, artifacts):
        place.mkdir(parents=True, exist_ok=True)
    before = found(artifacts)
    log = artifacts / "log"
    command = [
        str(binary),
        f"-timeout={INPUT_SECONDS_MAX}",
        f"-rss_limit_mb={MEMORY_MIB_MAX}",
        "-max_len=4096",
        # Threads that end by themselves look like leaks; descriptors are looked after by the targets.
        "-detect_leaks=0",
        "-print_final_stats=1",
        f"-artifact_prefix={artifacts}/",
        str(scratch),
        str(CORPORA / run.target),
    ]
    begun = time.monotonic()
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        status, used = waited_for(child, seconds)
        child.returncode = run.exit_code = os.waitstatus_to_exitcode(status)
    run.seconds = round(time.monotonic() - begun, 1)
    run.core_seconds = round(used, 1)
    text = log.read_text(errors="replace")
    states = STATE.findall(text)
    if states:
        executions, run.cov, run.ft, run.corpus = (int(number) for number in states[-1])
        run.executions = executions
    if executed := EXECUTED.findall(text):
        run.executions = int(executed[-1])
    run.crashes = [str((artifacts / name).relative_to(ROOT)) for name in sorted(found(artifacts) - before)]
    return run


def failed(run: Run) -> bool:
    return bool(run.crashes) or run.exit_code != 0


def tell(run: Run, binary: Path) -> None:
    print(
        f"    {run.target:14} {run.executions:>11} inputs  {run.core_seconds:>8} core-seconds  cov {run.cov:>6}  ft {run.ft:>6}"
        f"  corpus {run.corpus:>5}  crashes {len(run.crashes)}",
        file=sys.stderr,
        flush=True,
    )
    for crash in run.crashes:
        shown = binary.relative_to(ROOT)
        print(
            f"error: {run.target} failed on {crash}\n"
            f"    replay it:    {shown} {crash}\n"
            f"    keep it:      cp {crash} tests/fuzz/corpus/{run.target}/ && cargo test -p pillion-fuzz {run.target}",
            file=sys.stderr,
            flush=True,
        )
    if run.exit_code != 0 and not run.crashes:
        log = (ARTIFACTS / run.target / "log").relative_to(ROOT)
        print(
            f"error: {run.target} ended with {run.exit_code} and left no input: see {log}",
            file=sys.stderr,
            flush=True,
        )


def all_of(binaries: list[Path], seconds: int, jobs: int) -> list[Run]:
    """As many at a time as there are jobs."""
    left, runs, lock = list(binaries), [], threading.Lock()

    def worker() -> None:
        while True:
            with lock:
                if not left:
                    return
                binary = left.pop(0)
            run = fuzz(binary, seconds)
            with lock:
                runs.append(run)
                tell(run, binary)

    threads = [threading.Thread(target=worker) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(runs, key=lambda run: run.target)


def machine() -> dict[str, Any]:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release().split("-")[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak fuzz", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, required=True, help="of processor time, for all targets together"
    )
    parser.add_argument("--target", action="append", help="only this one; may be given several times")
    parser.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="targets at a time (default: the cores)",
    )
    parser.add_argument("--json", type=Path, help="write the report there, too")
    parser.add_argument(
        "--binaries", type=lambda text: Path(text).resolve(), required=True, help=argparse.SUPPRESS
    )
    parser.add_argument("--commit", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = sorted(place.name for place in CORPORA.iterdir())
    targets = options.target or known
    if unknown := sorted(set(targets) - set(known)):
        parser.error(f"no such target: {', '.join(unknown)}; there are {', '.join(known)}")
    jobs = max(1, min(options.jobs, len(targets)))
    seconds = max(1, int(options.minutes * 60 / len(targets)))
    print(
        f"==> {len(targets)} targets, {jobs} at a time, {seconds} s of a core each",
        file=sys.stderr,
        flush=True,
    )
    runs = all_of([options.binaries / target for target in targets], seconds, jobs)
    report = {
        "campaign": "fuzz",
        "commit": options.commit,
        "machine": machine(),
        "targets": [vars(run) for run in runs],
        "executions": sum(run.executions for run in runs),
        "core_seconds": round(sum(run.core_seconds for run in runs), 1),
        "crashes": sum(len(run.crashes) for run in runs),
        "failed": sum(failed(run) for run in runs),
    }
    text = json.dumps(report, indent=2)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
