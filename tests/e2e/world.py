"""What these tests share: models, plain vLLM's answers, and everything that was started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from e2e.harness import Answer, Engine, Factory, Sidecar
from e2e.prompts import BLOCK, REGISTRY, Prompt

ROOT = Path(__file__).parents[2]
MARGIN = 0.0005
"""Of log-probability between the best token and the second, in every choice of every prompt here. What another
order of summation changes is a hundred times smaller."""
SEEDS = {"a": 11, "b": 12, "gemma3": 11, "lfm2": 12, "deepseek2": 12}
FAMILIES = ("gemma3", "lfm2", "deepseek2")
"""Models that are no Llamas; each is called by its family."""


ATTEMPTS = 4

REPORT: list[str] = []
"""Measurements that are shown at the end of the run: no test judges them."""


class Models:
    """Small models with fixed weights, made once."""

    def path(self, which: str) -> Path:
        place = ROOT / "target" / "models" / f"e2e-{which}"
        prompts = ROOT / "target" / "models" / "e2e-prompts.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        prompts.write_text(json.dumps(["a quiet river and"]))
        command = [sys.executable, str(ROOT / "scripts" / "lib" / "make_model.py"), str(place)]
        options = ["--size=tiny", f"--seed={SEEDS[which]}", f"--prompts={prompts}", "--max-tokens=8"]
        if which in FAMILIES:
            options.append(f"--family={which}")
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return place

    def adapter(self, base: Path, seed: int) -> Path:
        """A LoRA adapter."""
        return self._made(f"e2e-adapter-{seed}", f"--adapter-of={base}", f"--seed={seed}")

    def eagle(self, base: Path) -> Path:
        """An EAGLE drafter."""
        return self._made("e2e-eagle", f"--eagle-of={base}")

    def _made(self, name: str, *options: str) -> Path:
        place = ROOT / "target" / "models" / name
        command = [sys.executable, str(ROOT / "scripts" / "lib" / "make_model.py"), str(place)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return place


class World:
    """What these tests have started, shown where a test fails."""

    def __init__(self) -> None:
        self.factory = Factory()
        self.sidecars: list[Sidecar] = []
        self.models = Models()
        self.misses = 0
        """Loads that were repeated because the first attempt was a miss: a busy machine's, as a rule."""
        self._references: dict[str, dict[str, Answer]] = {}
        self._paths: dict[str, Path] = {}

    def model(self, which: str = "a") -> Path:
        if which not in self._paths:
            self._paths[which] = self.models.path(which)
        return self._paths[which]

    def sidecar(self) -> Sidecar:
        sidecar = Sidecar()
        self.sidecars.append(sidecar)
        return sidecar

    def engine(
        self,
        name: str,
        sidecar: Sidecar | None,
        *,
        which: str = "a",
        path: Path | None = None,
        **options: Any,
    ) -> Engine:
        return self.factory.engine(name, path or self.model(which), sidecar, **options)

    def reference(
        self, which: str = "a", prompts: Iterable[Prompt] | None = None, **options: Any
    ) -> dict[str, Answer]:
        """What plain vLLM answers to these prompts (all of them)."""
        key = f"{which} {sorted(options.items())} {prompts and [one.name for one in prompts]}"
        if key not in self._references:
            engine = self.engine(f"plain-{which}", None, which=which, **options)
            pending = [engine.submit(one, logprobs=2) for one in prompts or REGISTRY.values()]
            answers = [one.answer() for one in pending]
            engine.stop()
            self._references[key] = {answer.prompt.name: answer for answer in answers}
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

    def __init__(self, world: World, references: dict[str, Answer], block: int = BLOCK) -> None:
        self.world = world
        self.references = references
        self.block = block

    def __call__(self, *answers: Answer) -> None:
        for answer in answers:
            expected = self.references[answer.prompt.name]
            assert answer.tokens == expected.tokens, (
                f"{answer.prompt.name}: plain vLLM answers {expected.tokens}, got {answer.tokens} "
                f"(loaded {answer.loaded}, vLLM's own cache {answer.own}, preempted {answer.preemptions} times)"
            )

    def loads(self, engine: Engine, prompts: Iterable[Prompt], tokens: int | None = None) -> list[Answer]:
        """Asks one by one: each must answer the same, and load all that vLLM itself lacks (or `tokens`).

        On a machine so busy that the sidecar does not get to run within a lookup's deadline, a miss is
        right. So a miss is tried again; answers must be the same in any case.
        """
        answers = []
        for prompt in prompts:
            for attempt in range(ATTEMPTS):
                answer = engine.ask(prompt)
                self(answer)
                usable = prompt.usable_in(self.block)
                wanted = usable - answer.own if tokens is None else tokens
                if answer.loaded == wanted and (wanted or not usable):
                    break
                assert answer.loaded == 0, (
                    f"{prompt.name}: expected {wanted} tokens from Pillion, got {answer.loaded} and {answer.own} of vLLM"
                )
                assert attempt < ATTEMPTS - 1, f"{prompt.name}: {ATTEMPTS} misses, expected {wanted} tokens"
                self.world.misses += 1
                engine.quiet()
                engine.forget()
            answers.append(answer)
        return answers


def loaded(answers: Sequence[Answer]) -> list[int]:
    return [answer.loaded for answer in answers]


def fill(engine: Engine, prompts: Sequence[Prompt]) -> list[Answer]:
    """Answers to prompts that are new to everyone; returns once Pillion has them and vLLM's cache is empty."""
    answers = engine.ask_all(prompts)
    assert loaded(answers) == [0] * len(answers), f"expected new prompts, loaded {loaded(answers)} tokens"
    engine.quiet()
    engine.forget()
    return answers
