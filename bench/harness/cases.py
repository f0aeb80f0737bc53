"""The model and the prompts of `ttft`: greedy choices with a checked margin, so that answers can be compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from e2e.prompts import BLOCK, Prompt
from prompts import sentences

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "target" / "models" / "bench-ttft"
ANSWER_TOKENS = 8
LENGTHS = {"1 k": 1010, "4 k": 4010}
"""Neither is one more than a multiple of a block: vLLM's ExampleConnector would never find such a prompt again."""
EACH = 3
"""Prompts of each length. Those of 4 k together are more than a small pool holds."""


def texts() -> dict[str, str]:
    return {
        f"{name} {number}": sentences(f"ttft {name} {number}", int(length * 0.91))
        for name, length in LENGTHS.items()
        for number in range(EACH)
    }


def make() -> dict[str, list[Prompt]]:
    """Makes the model unless it is there; the prompts by their length's name."""
    from transformers import AutoTokenizer

    given = texts()
    file = MODEL.parent / "bench-ttft-prompts.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(list(given.values())))
    command = [sys.executable, str(ROOT / "scripts" / "lib" / "make_model.py"), str(MODEL)]
    options = [f"--prompts={file}", f"--max-tokens={ANSWER_TOKENS}"]
    done = subprocess.run([*command, *options], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"no model could be made\n{done.stderr}")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts: dict[str, list[Prompt]] = {name: [] for name in LENGTHS}
    for name, text in given.items():
        tokens = tuple(tokenizer(text).input_ids)
        assert len(tokens) % BLOCK != 1 and len(tokens) + ANSWER_TOKENS <= 4096, (name, len(tokens))
        prompts[name[: -len(" 0")]].append(Prompt(name, tokens, ANSWER_TOKENS))
    return prompts
