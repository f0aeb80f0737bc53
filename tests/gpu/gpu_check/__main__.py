"""The command. Ends with 0: all is well; 1: something failed, was missed or was not run; 3: there is no GPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_check.world import World

NO_GPU = 3
SCENARIO_SECONDS = 75
MEASUREMENT_SECONDS = 150
"""At most, so that one that hangs leaves time for the others."""
CLOSING_SECONDS = 20
HOLD_SECONDS = 30


class TimeUp(BaseException):
    """The time for one thing, or for everything, has run out."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description="Checks and measures Pillion on this machine's GPU."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write scenarios and rows there")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="without --json: the folder of a file named after the GPU",
    )
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only those whose names begin so; a wrong name lists them all",
    )
    parser.add_argument(
        "--seconds", type=float, default=540, help="after this nothing new begins [default: %(default)s]"
    )
    parser.add_argument("--fake", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def fake_device(place: Path) -> Path:
    """Puts the fake driver in the place of the real one, for us and all that we start. Returns its switches."""
    named = os.environ.get("PILLION_FAKE_CUDA_LIBRARY")
    root = Path(__file__).parents[3]
    built = [root / "target" / kind / "libpillion_fake_cuda.so" for kind in ("debug", "release")]
    newest = sorted((path for path in built if path.exists()), key=lambda path: path.stat().st_mtime)
    library = Path(named) if named else newest[-1] if newest else None
    if not library or not library.exists():
        sys.exit(
            "expected the fake device: run `cargo build -p pillion-fake-cuda`, or set PILLION_FAKE_CUDA_LIBRARY"
        )
    libraries, switches = place / "lib", place / "fake"
    libraries.mkdir()
    switches.mkdir()
    for name in ("libcuda.so", "libcuda.so.1"):
        (libraries / name).symlink_to(library.resolve())
    path = [str(libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    os.environ.update(LD_LIBRARY_PATH=os.pathsep.join(path), PILLION_FAKE_CUDA=str(switches))
    return switches


def find_gpu() -> dict[str, Any]:
    """Looked for by a process of its own: a driver may end it."""
    command = [sys.executable, str(Path(__file__).with_name("cuda.py"))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        found: dict[str, Any] = json.loads(done.stdout)
        return found
    except subprocess.TimeoutExpired:
        return {"reason": "the driver did not answer for a minute"}
    except ValueError:
        return {
            "reason": f"the driver ended the process that asked ({done.returncode}): {done.stderr.strip()[-300:]}"
        }


@contextmanager
def held_gpu() -> Iterator[None]:
    """A process that does nothing but keep the device up, for as long as we work."""
    command = [sys.executable, str(Path(__file__).with_name("cuda.py")), "hold"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout
            answers, _, _ = select.select([holder.stdout], [], [], HOLD_SECONDS)
            if not (answers and holder.stdout.readline()):
                print("the device could not be kept up: starts may take seconds longer", flush=True)
            yield
        finally:
            holder.kill()


def explain(world: World) -> str:
    """For failures, of which this must not be one."""
    try:
        return world.explain()
    except Exception as error:
        return f"nothing more is known: {error!r}"


def has_torch(fake: bool) -> bool:
    """Whether torch is there and can use this GPU. It knows no fake one."""
    if fake or not importlib.util.find_spec("torch"):
        return False
    code = "import torch; torch.zeros(1, device='cuda').item()"
    try:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0
    except subprocess.TimeoutExpired:
        return False


class Check:
    def __init__(
        self, options: argparse.Namespace, gpu: dict[str, Any], place: Path, fake: Path | None
    ) -> None:
        from gpu_check.rows import machine
        from gpu_check.world import FAKE, FULL, QUICK

        self.machine = machine(gpu)
        self.options, self.gpu, self.place, self.fake = options, gpu, place, fake
        self.sizes = FAKE if fake else QUICK if options.quick else FULL
        self.begun = time.monotonic()
        self.torch = has_torch(bool(fake))
        self.scenarios: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.told_start = False

    def wanted(self) -> dict[str, Callable[..., Any]]:
        from gpu_check.budgets import BENCHES
        from gpu_check.scenarios import LAST, SCENARIOS

        everything: dict[str, Callable[..., Any]] = {**SCENARIOS, **BENCHES}
        for name in LAST:
            everything[name] = everything.pop(name)
        only = tuple(self.options.only)
        if not only:
            return everything
        found = {name: each for name, each in everything.items() if name.startswith(only)}
        if not found:
            sys.exit(f"expected names out of {', '.join(everything)}; got {', '.join(only)}")
        return found

    def left(self) -> float:
        return float(self.options.seconds) - (time.monotonic() - self.begun)

    def run(self) -> bool:
        from gpu_check.budgets import BENCHES
        from gpu_check.scenarios import SECONDS

        for name, function in self.wanted().items():
            if self.left() <= 0:
                self.report(name, "not run", 0, "no time was left")
                continue
            begun = time.monotonic()
            measures = name in BENCHES
            most = SECONDS.get(name, MEASUREMENT_SECONDS if measures else SCENARIO_SECONDS)
            result, detail, rows, starts = self.one(name, function, measures, most)
            self.rows += rows
            self.report(name, result, time.monotonic() - begun, detail, starts)
        return all(each["result"] in ("passed", "skipped") for each in self.scenarios)

    def one(
        self, name: str, function: Callable[..., Any], measures: bool, most: float
    ) -> tuple[str, str, list[Any], list[Any]]:
        """(result, detail, rows, what its sidecars said of their starts)"""
        from gpu_check.world import World

        place = self.place / name
        place.mkdir()
        world = World(self.gpu, self.sizes, place, self.fake, self.torch)
        result, detail, rows = self.tried(world, function, measures, most)
        # Again and again: each thing that cannot be ended is given up.
        signal.setitimer(signal.ITIMER_REAL, CLOSING_SECONDS, CLOSING_SECONDS)
        try:
            world.close()
        except (Exception, TimeUp):
            detail = f"{detail}\nwhat it started could not be ended:\n{traceback.format_exc()}"
            result = "failed"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return result, detail, rows, world.starts

    def tried(
        self, world: World, function: Callable[..., Any], measures: bool, most: float
    ) -> tuple[str, str, list[Any]]:
        """(result, detail, rows)"""
        from gpu_check.rows import as_fake
        from gpu_check.world import Skipped

        whole = self.left() < most
        signal.setitimer(signal.ITIMER_REAL, max(0.1, min(self.left(), most)))
        try:
            found = function(world)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if not measures:
                return "passed", found, []
            rows = [as_fake(row) for row in found] if self.fake else found
            missed = [row["case"] for row in rows if row["met"] is False]
            if missed:
                return "missed", f"budgets missed: {'; '.join(missed)}", rows
            return "passed", f"{len(rows)} rows", rows
        except Skipped as why:
            return "skipped", str(why), []
        except TimeUp:
            if whole:
                return "not run", "the time ran out in its middle", []
            return "failed", f"not at its end after {most:g} s\n{explain(world)}", []
        except Exception as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            trace = traceback.format_exc() if not isinstance(error, AssertionError) else str(error)
            return "failed", f"{trace}\n{explain(world)}", []
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def report(self, name: str, result: str, seconds: float, detail: str, starts: Sequence[Any] = ()) -> None:
        self.scenarios.append(
            {
                "name": name,
                "result": result,
                "seconds": round(seconds, 2),
                "detail": detail,
                "starts": list(starts),
            }
        )
        print(f"{name:30} {result:8} {seconds:6.1f} s  {detail}", flush=True)
        if starts and not self.told_start:
            self.told_start = True
            figures = ", ".join(f"{key} {value}" for key, value in starts[0].items())
            print(f"{'':30} the first start of a sidecar: {figures}", flush=True)
        # After each: what was found stays, whatever comes.
        self.write()

    def write(self) -> None:
        file = self.options.json
        if not file and self.options.results and not self.fake:
            self.options.results.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"[^a-z0-9]+", "-", self.gpu["name"].lower())
            # A part does not take the place of the whole.
            part = "-part" if self.options.only or self.options.quick else ""
            file = self.options.results / f"gpu-{name}{part}.json"
        if not file:
            return
        report = {
            "machine": self.machine,
            "commit": os.environ.get("PILLION_GPU_CHECK_COMMIT") or None,
            "fake": bool(self.fake),
            "quick": bool(self.options.quick),
            "seconds": round(time.monotonic() - self.begun, 1),
            "rows": self.rows,
            "scenarios": self.scenarios,
        }
        file.write_text(json.dumps(report, indent=1) + "\n")

    def summary(self) -> None:
        from gpu_check.rows import table

        if self.rows:
            print("\n" + "\n".join(table(self.rows)))
        counts: dict[str, int] = {}
        for each in self.scenarios:
            counts[each["result"]] = counts.get(each["result"], 0) + 1
        kind = " (fake device: no measurement)" if self.fake else ""
        text = ", ".join(f"{count} {result}" for result, count in sorted(counts.items()))
        print(f"\n{text}; {time.monotonic() - self.begun:.0f} s on {self.gpu['name']}{kind}")


def time_up(_number: int, _frame: FrameType | None) -> None:
    raise TimeUp


def checked(options: argparse.Namespace, gpu: dict[str, Any], place: Path, fake: Path | None) -> int:
    check = Check(options, gpu, place, fake)
    signal.signal(signal.SIGALRM, time_up)
    print(
        f"{gpu['name']} ({gpu['uuid']}), CUDA {gpu['cuda']}, torch: {'yes' if check.torch else 'no'}",
        flush=True,
    )
    well = check.run()
    check.summary()
    check.write()
    return 0 if well else 1


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Short: sockets lie in folders beside it, and their names have at most 107 bytes.
    place = Path(tempfile.mkdtemp(prefix="pgc-", dir="/tmp"))
    try:
        fake = fake_device(place) if options.fake else None
        gpu = find_gpu()
        if "reason" in gpu:
            print(f"no GPU: {gpu['reason']}")
            return NO_GPU
        with held_gpu():
            return checked(options, gpu, place, fake)
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
