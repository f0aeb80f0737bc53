"""What these tests share: models, plain vLLM's answers, and everything that was started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from e2e.harness import Answer, Engine, Factory, Sidecar
from e2e.prompts import REGISTRY

ROOT = Path(__file__).parents[2]
MARGIN = 0.0005
"""Of log-probability between the best token and the second, in every choice of every prompt here. What another
order of summation changes is a hundred times smaller."""
SEEDS = {"a": 11, "b": 12}


class Models:
    """Small models with fixed weights, made once."""

    def path(self, which: str) -> Path:
        place = ROOT / "target" / "models" / f"e2e-{which}"
        prompts = ROOT / "target" / "models" / "e2e-prompts.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        prompts.write_text(json.dumps(["a quiet river and"]))
        command = [sys.executable, str(ROOT / "scripts" / "lib" / "make_model.py"), str(place)]
        options = ["--size=tiny", f"--seed={SEEDS[which]}", f"--prompts={prompts}", "--max-tokens=8"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return place


class World:
    """What these tests have started, shown where a test fails."""

    def __init__(self) -> None:
        self.factory = Factory()
        self.sidecars: list[Sidecar] = []
        self.models = Models()
        self._references: dict[str, dict[str, Answer]] = {}
        self._paths: dict[str, Path] = {}

    def model(self, which: str = "a") -> Path:
        if which not in self._paths:
            self._paths[which] = self.models.path(which)
        return self._paths[which]

    def sidecar(self, **flags: object) -> Sidecar:
        sidecar = Sidecar(**flags)
        self.sidecars.append(sidecar)
        return sidecar

    def engine(self, name: str, sidecar: Sidecar | None, *, which: str = "a", **options: Any) -> Engine:
        return self.factory.engine(name, self.model(which), sidecar, **options)

    def reference(self, which: str = "a", **options: Any) -> dict[str, Answer]:
        """What plain vLLM answers, one prompt after the other; every choice with a margin."""
        key = f"{which} {sorted(options.items())}"
        if key not in self._references:
            engine = self.engine(f"plain-{which}", None, which=which, **options)
            self._references[key] = {
                prompt.name: engine.ask(prompt, logprobs=2) for prompt in REGISTRY.values()
            }
            engine.stop()
        return self._references[key]

    def explain(self) -> str:
        shown = [engine.explain() for engine in self.factory.engines[-2:]]
        return "\n".join([*shown, *(sidecar.explain() for sidecar in self.sidecars[-1:])])

    def close(self) -> None:
        self.factory.close()
        for sidecar in self.sidecars:
            sidecar.close()


class Checker:
    """Compares answers with those of plain vLLM."""

    def __init__(self, references: dict[str, Answer]) -> None:
        self.references = references

    def __call__(self, *answers: Answer) -> None:
        for answer in answers:
            expected = self.references[answer.prompt.name]
            assert answer.tokens == expected.tokens, (
                f"{answer.prompt.name}: plain vLLM answers {expected.tokens}, got {answer.tokens} "
                f"(loaded {answer.loaded}, vLLM's own cache {answer.own}, preempted {answer.preemptions} times)"
            )
