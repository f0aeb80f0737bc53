"""The demonstration that scripts/quickstart runs, once everything is installed. Standard library only."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sidecars
from engine import Answer, Engine, Failed, free_port
from prompts import Prompt, quickstart_prompts, sentences

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "target" / "quickstart"
TRANSFER = (
    '{"kv_connector":"PillionConnector","kv_connector_module_path":"pillion.vllm",'
    '"kv_role":"kv_both","kv_load_failure_policy":"recompute"}'
)
SERVED_NAME = "quickstart"
MAX_TOKENS = 16
LONGEST_PROMPT = 2100
SSD_CAPACITY = "2GiB"
SAVE_SECONDS = 30


@dataclass
class Row:
    """One prompt's answers, and how many tokens came from where."""

    prompt: Prompt
    plain: Answer
    cold: Answer | None = None
    warm: Answer | None = None
    restart: Answer | None = None
    loaded: int = 0
    from_ssd: int = 0
    own_cache_cold: int = 0
    own_cache_warm: int = 0
    own_cache_restart: int = 0

    @property
    def identical(self) -> bool:
        return all(self.same(run) for run in (self.cold, self.warm))

    def same(self, run: Answer | None) -> bool:
        return run is not None and run.token_ids == self.plain.token_ids

    @property
    def own_cache(self) -> bool:
        return self.own_cache_cold + self.own_cache_warm + self.own_cache_restart > 0


def say(text: str) -> None:
    print(f"==> {text}", file=sys.stderr, flush=True)


def note(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)


class Quickstart:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        if args.json and not args.json.parent.is_dir():
            raise Failed(f"expected the folder of --json {args.json} to exist, it does not: make it first")
        self.port = free_port(args.port)
        self.model = args.model or str(ROOT / "target" / "models" / "quickstart")
        # Salted with something new, the same prompts are unknown to a sidecar that served an earlier run.
        self.salt = uuid.uuid4().hex
        self.engine: Engine | None = None
        self.prompts: list[Prompt] = []
        self.sidecars_before = sidecars.running()
        # Whoever runs a sidecar already has decided what it may write, and when it ends.
        self.with_ssd = not self.sidecars_before

    def vllm_flags(self) -> list[str]:
        """vLLM's own flags: what a small machine needs. Nothing here is about Pillion."""
        flags = ["--served-model-name", SERVED_NAME, "--host", "127.0.0.1", "--port", str(self.port)]
        if not self.args.model:
            # `auto` would make bfloat16 of a float32 model.
            flags += ["--dtype", "float32", "--max-model-len", "4096"]
        if self.args.device == "cpu":
            # vLLM would take most of the memory; and compiling costs more here than it gives.
            gib = 1 if self.args.model else 0.5
            flags += [
                "--kv-cache-memory-bytes",
                str(int(gib * 2**30)),
                "--max-num-seqs",
                "32",
                "--enforce-eager",
            ]
        return [*flags, *self.args.vllm_flags]

    def start(self, name: str, *, pillion: bool) -> Engine:
        transfer = ["--kv-transfer-config", TRANSFER] if pillion else []
        say(f"starting {name}")
        vllm = Path(sys.executable).parent / "vllm"
        command = [str(vllm), "serve", self.model, *self.vllm_flags(), *transfer]
        environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
        if self.with_ssd:
            # The sidecar that the engine starts inherits it.
            environment["PILLION_SSD"] = f"{PLACE}/ssd-{{device}}={SSD_CAPACITY}"
        if Path(self.model).is_dir():
            environment["HF_HUB_OFFLINE"] = "1"
        log = PLACE / f"{name.replace(' ', '-').replace(',', '')}.log"
        self.engine = Engine(name, self.port, log, command, environment)
        note(f"serving after {self.engine.wait_ready():.0f} s (log: {log.relative_to(ROOT)})")
        return self.engine

    def stop_engine(self) -> None:
        if self.engine is not None:
            engine, self.engine = self.engine, None
            engine.stop()

    def request(self, text: str, salt: str) -> dict[str, Any]:
        return {
            "model": SERVED_NAME,
            "prompt": text,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "cache_salt": salt,
        }

    def warm_up(self, engine: Engine) -> None:
        """The first request of a process pays for things that no later one does: keep it out of the figures."""
        words = len(self.prompts[0].text.split())
        engine.complete(self.request(sentences("warm-up", words - 20), uuid.uuid4().hex))

    def reference(self) -> list[Row]:
        engine = self.start("plain vLLM", pillion=False)
        longest = min(LONGEST_PROMPT, engine.longest() - 2 * MAX_TOKENS - 64)
        if longest < 2 * engine.block_tokens():
            raise Failed(
                f"expected a model that takes prompts of 2 blocks, this one takes {engine.longest()} tokens"
            )
        self.prompts = quickstart_prompts(lambda text: engine.count_tokens(SERVED_NAME, text), longest)
        self.warm_up(engine)
        rows = []
        for prompt in self.prompts:
            rows.append(Row(prompt, engine.complete(self.request(prompt.text, self.salt))))
        self.stop_engine()
        return rows

    def measured(self, engine: Engine, prompt: Prompt) -> tuple[Answer, int, int]:
        """An answer, the tokens that Pillion loaded for it, and those that vLLM's own cache had."""
        before = engine.metrics()
        answer = engine.complete(self.request(prompt.text, self.salt))

        def gained(name: str) -> int:
            return int(after.get(name, 0) - before.get(name, 0))

        deadline = time.monotonic() + 10
        while True:
            # vLLM counts a step after it has sent the step's tokens.
            after = engine.metrics()
            if gained("vllm:request_success_total") >= 1 or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return answer, gained("vllm:pillion_loaded_tokens_total"), gained("vllm:prefix_cache_hits_total")

    def cold(self, rows: list[Row]) -> None:
        engine = self.start("vLLM with Pillion", pillion=True)
        self.report_sidecar()
        self.warm_up(engine)
        for row in rows:
            row.cold, _, row.own_cache_cold = self.measured(engine, row.prompt)
        self.wait_saved(engine, rows)
        say("stopping this engine; the sidecar lives on")
        self.stop_engine()

    def warm(self, rows: list[Row]) -> None:
        engine = self.start("a fresh vLLM with Pillion", pillion=True)
        self.warm_up(engine)
        for row in rows:
            row.warm, row.loaded, row.own_cache_warm = self.measured(engine, row.prompt)

    def restart(self, rows: list[Row]) -> None:
        """Engine and sidecar end, as with a reboot: what comes back can only come from the SSD."""
        say("stopping this engine and its sidecar")
        self.stop_engine()
        self.stop_own_sidecars()
        engine = self.start("vLLM and a sidecar, both started again", pillion=True)
        self.report_sidecar()
        self.warm_up(engine)
        for row in rows:
            row.restart, row.from_ssd, row.own_cache_restart = self.measured(engine, row.prompt)

    def clear_ssd(self) -> None:
        """What an earlier run left: nobody has it open, and its prompts are not asked again."""
        if self.with_ssd:
            for place in PLACE.glob("ssd-*"):
                shutil.rmtree(place)

    def report_sidecar(self) -> None:
        if not (found := sidecars.running()):
            note("no sidecar is running: see `pillion doctor` and the engine's log for why")
        for sidecar in found:
            whose = (
                "was running already: used, and left as it is"
                if sidecar in self.sidecars_before
                else "started"
            )
            note(f"sidecar {sidecar.device}, process {sidecar.pid}: {whose}")

    def wait_saved(self, engine: Engine, rows: list[Row]) -> None:
        """Saving goes on behind the answers: the engine is stopped once the prompts' blocks are stored."""
        block = engine.block_tokens()
        expected = sum(row.plain.prompt_tokens // block for row in rows if row.prompt.first)
        deadline = time.monotonic() + SAVE_SECONDS
        saved = 0
        while saved < expected and time.monotonic() < deadline:
            time.sleep(0.1)
            saved = int(engine.metrics().get("vllm:pillion_saved_blocks_total", 0))
        if saved < expected:
            note(
                f"expected {expected} saved blocks or more within {SAVE_SECONDS} s, vLLM's metrics count {saved}"
            )

    def stop_own_sidecars(self) -> None:
        for sidecar in sidecars.running():
            if sidecar not in self.sidecars_before:
                sidecars.stop(sidecar)


def table(rows: list[Row]) -> str:
    head = ["request", "prompt tokens", "cold TTFT ms", "warm TTFT ms", "loaded by Pillion"]
    restarted = all(row.restart is not None for row in rows)
    head += ["from SSD TTFT ms", "loaded from SSD"] if restarted else []
    lines = [[*head, "output"]]
    for row in rows:
        assert row.cold is not None and row.warm is not None
        mark = " *" if row.own_cache else ""
        line = [
            row.prompt.name + mark,
            str(row.plain.prompt_tokens),
            f"{row.cold.ttft_ms:.0f}",
            f"{row.warm.ttft_ms:.0f}",
            str(row.loaded),
        ]
        same = row.identical
        if restarted and row.restart is not None:
            line += [f"{row.restart.ttft_ms:.0f}", str(row.from_ssd)]
            same = same and row.same(row.restart)
        lines.append([*line, "identical" if same else "DIFFERS"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    out = []
    for number, line in enumerate(lines):
        cells = [
            cell.ljust(width) if column in (0, len(widths) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip())
        if number == 0:
            out.append("  ".join("-" * width for width in widths))
    if any(row.own_cache for row in rows):
        out.append("* vLLM's own prefix cache had this prefix already, from the request before")
    return "\n".join(out)


def summary(rows: list[Row]) -> str:
    first = [row for row in rows if row.prompt.first]

    def median(pick: Callable[[Row], Answer | None]) -> float:
        return statistics.median(answer.ttft_ms for row in first if (answer := pick(row)) is not None)

    # Plain vLLM's times are not beside them: on a small machine it keeps one core more to itself when it has
    # a connector, so they would compare numbers of threads.
    cold, warm = median(lambda row: row.cold), median(lambda row: row.warm)
    text = (
        f"median time to first token, distinct prefixes: {cold:.0f} ms cold, {warm:.0f} ms after the engine's restart "
        f"({cold / warm:.1f} times faster)"
    )
    if all(row.restart is not None for row in rows):
        ssd = median(lambda row: row.restart)
        text += f", {ssd:.0f} ms from the SSD after both restarted ({cold / ssd:.1f} times faster)"
    return text


def as_json(rows: list[Row]) -> dict[str, Any]:
    def request(row: Row, later: Answer | None, cached: int, identical: bool) -> dict[str, Any]:
        assert row.cold is not None and later is not None
        return {
            "prompt_tokens": row.plain.prompt_tokens,
            "cached_tokens": cached,
            "ttft_ms_cold": round(row.cold.ttft_ms, 2),
            "ttft_ms_warm": round(later.ttft_ms, 2),
            "identical": identical,
        }

    first = [row for row in rows if row.prompt.first]
    requests = [request(row, row.warm, row.loaded, row.identical) for row in first]
    report: dict[str, Any] = {"requests": requests, "identical": all(row.identical for row in rows)}
    if all(row.restart is not None for row in rows):
        report["restart"] = {
            "requests": [request(row, row.restart, row.from_ssd, row.same(row.restart)) for row in first],
            "identical": all(row.same(row.restart) for row in rows),
        }
    return report


def verdict(rows: list[Row], own_model: bool) -> list[str]:
    """What is wrong; nothing if all is well."""
    problems = []
    restarted = all(row.restart is not None for row in rows)

    def differs(row: Row) -> bool:
        return not row.identical or (restarted and not row.same(row.restart))

    if different := [row.prompt.name for row in rows if differs(row)]:
        problems.append(f"the output differs from plain vLLM's for {', '.join(different)}")
        if own_model:
            problems[-1] += (
                " (with this model that can come from vLLM itself: see the warning above; "
                "`-- --dtype float32` widens the margins)"
            )
    if missed := [row.prompt.name for row in rows if row.prompt.first and row.loaded == 0]:
        problems.append(f"Pillion loaded nothing for {', '.join(missed)}")
    if lost := [row.prompt.name for row in rows if restarted and row.prompt.first and row.from_ssd == 0]:
        problems.append(f"nothing came from the SSD for {', '.join(lost)}")
    return problems


def how_to_use(run: Quickstart) -> str:
    assert run.engine is not None
    stop = [f"kill {run.engine.process.pid}    # the engine"]
    stop += [f"kill {sidecar.pid}    # the sidecar" for sidecar in sidecars.running()]
    request = json.dumps({"model": SERVED_NAME, "prompt": "the quick fox", "max_tokens": 16})
    return "\n".join(
        [
            "",
            "Both are still running. Use them:",
            f"    curl http://127.0.0.1:{run.port}/v1/completions -H 'Content-Type: application/json' -d '{request}'",
            f"    {Path(sys.executable).parent / 'pillion'} status",
            "Stop them:",
            *(f"    {line}" for line in stop),
        ]
    )


def show_log(log: Path, lines: int = 40) -> None:
    if log.exists():
        print(f"the end of {log}:", file=sys.stderr)
        print("\n".join(log.read_text(errors="replace").splitlines()[-lines:]), file=sys.stderr)


def show_pillion_lines(log: Path) -> None:
    """What our connector said in an engine's log."""
    said = [line for line in log.read_text(errors="replace").splitlines() if "pillion" in line.lower()]
    print(f"what {log} says of Pillion:", file=sys.stderr)
    print("\n".join(said[-20:]) or "nothing", file=sys.stderr)


def show_status() -> None:
    """What the sidecar says of itself."""
    print("what `pillion status` says:", file=sys.stderr, flush=True)
    pillion = Path(sys.executable).parent / "pillion"
    subprocess.run([str(pillion), "status"], stdout=sys.stderr, check=False, timeout=30)


def prepare_model(args: argparse.Namespace, model: str) -> None:
    if args.model:
        say(f"using the model {args.model}")
        note(
            "warning: where a model's best two tokens are nearly equal, vLLM itself may choose differently when it"
        )
        note("computes the same prompt in batches of another shape. Such a difference is not Pillion's doing")
        return
    say("making a small model with fixed random weights, and checking the margins of its choices")
    subprocess.run([sys.executable, str(ROOT / "scripts" / "lib" / "make_model.py"), model], check=True)


def arguments() -> argparse.Namespace:
    own, vllm_flags = sys.argv[1:], []
    if "--" in own:
        split = own.index("--")
        own, vllm_flags = own[:split], own[split + 1 :]
    parser = argparse.ArgumentParser(prog="scripts/quickstart")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--port", type=int)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help=argparse.SUPPRESS)
    args = parser.parse_args(own)
    args.vllm_flags = vllm_flags
    return args


def demonstrate(run: Quickstart) -> int:
    args = run.args
    prepare_model(args, run.model)
    rows = run.reference()
    run.clear_ssd()
    run.cold(rows)
    run.warm(rows)
    if run.with_ssd:
        run.restart(rows)
    else:
        note("the sidecar was here before: it is not ended to show what the SSD brings back")
    print(f"\n{table(rows)}\n\n{summary(rows)}")
    if args.json:
        args.json.write_text(json.dumps(as_json(rows), indent=1) + "\n")
    problems = verdict(rows, bool(args.model))
    if problems:
        assert run.engine is not None
        show_pillion_lines(run.engine.log)
        show_status()
        raise Failed("; ".join(problems))
    if args.serve:
        print(how_to_use(run))
    return 0


def main() -> int:
    args = arguments()
    keep = False
    run = None
    try:
        run = Quickstart(args)
        code = demonstrate(run)
        keep = args.serve
        return code
    except Failed as failure:
        print(f"error: {failure}", file=sys.stderr)
        if failure.log is not None:
            show_log(failure.log)
        return 1
    except subprocess.CalledProcessError as failure:
        print(
            f"error: {Path(failure.cmd[1]).name} failed with exit code {failure.returncode}", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted: stopping what was started", file=sys.stderr)
        return 130
    finally:
        if run is not None and not keep:
            run.stop_engine()
            run.stop_own_sidecars()


if __name__ == "__main__":
    sys.exit(main())
