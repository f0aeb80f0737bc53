"""Makes a small fp32 model with fixed random weights and a tokenizer, whose greedy choices have a margin.

An engine may add floating-point numbers in another order when it computes a prompt in other pieces, so the
last bits of its logits are nobody's promise. A test that compares tokens needs a model where such bits cannot
turn the choice: here every greedy choice over the given prompts has been checked to win by a stated margin.
The same arguments give the same weights.

Families: Llama, or one of those whose KV cache is of another kind, to see how engines keep and find it. With
--adapter-of, a LoRA adapter for such a model is made instead, with --eagle-of an EAGLE drafter.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from prompts import WORDS, quickstart_prompts

FORMAT = 1
DEFAULT_SEED = 4  # known to hold for quickstart's prompts: the search then ends at once
LONGEST_QUICKSTART_PROMPT = 2100
MARKER = "pillion-model.json"
# A choice must win by this, and by this many times what another order of summation was seen to change.
MARGIN = 0.02
MARGIN_OVER_NOISE = 20.0


@dataclass(frozen=True)
class Size:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    positions: int = 4096


SIZES = {
    # Prefill of 2,000 tokens takes about a second on two cores: what quickstart shows.
    "small": Size(hidden=640, layers=6, heads=10, kv_heads=2, intermediate=1728),
    # For tests, which care about tokens and not about time.
    "tiny": Size(hidden=256, layers=4, heads=4, kv_heads=2, intermediate=512),
}


@dataclass(frozen=True)
class Checked:
    """What the check found over all generated tokens."""

    margin: float
    """Smallest distance between the best logit and the second."""
    noise: float
    """Largest change of a best logit between token-by-token and whole-prompt computation."""
    tokens: int

    def holds(self, bound: float) -> bool:
        return self.margin >= max(bound, MARGIN_OVER_NOISE * self.noise)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, written down rather than trained: every word of WORDS is one token, any text can be coded."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    merges = []
    for word in WORDS:
        have = "Ġ"
        for letter in word:
            if have + letter not in vocab:
                vocab[have + letter] = len(vocab)
                merges.append((have, letter))
            have += letter
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=4096
    )


HEAD = 64
WINDOW = 80
"""Of Gemma's sliding attention: two and a half of the blocks that tests use, so that edges are not the same."""
SHARP = 2.5
"""Attention over thousands of random tokens must look at a few of them: how far its logits are spread."""


def common(size: Size, vocabulary: int) -> dict[str, Any]:
    """What the configurations of all families call the same."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": size.positions,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "dtype": torch.float32,
    }


def llama(size: Size, vocabulary: int) -> Any:
    return LlamaForCausalLM(LlamaConfig(**common(size, vocabulary), head_dim=HEAD))


def gemma3(size: Size, vocabulary: int) -> Any:
    """Sliding-window attention, and full attention in every third layer."""
    given = {**common(size, vocabulary), "num_hidden_layers": 6}
    config = Gemma3TextConfig(
        **given,
        head_dim=HEAD,
        query_pre_attn_scalar=round(HEAD / SHARP**2),
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        pad_token_id=None,
    )
    return Gemma3ForCausalLM(config)


def lfm2(size: Size, vocabulary: int) -> Any:
    """Short convolutions, which keep a state instead of KV, and attention in every third layer."""
    given = {**common(size, vocabulary), "num_hidden_layers": 6}
    given["tie_word_embeddings"] = True  # vLLM ties them in any case
    config = Lfm2Config(
        **given,
        layer_types=["conv", "conv", "full_attention"] * 2,
        block_auto_adjust_ff_dim=False,
        pad_token_id=None,
        # vLLM asks for these two, which transformers has no field for.
        block_dim=size.hidden,
        conv_dim=size.hidden,
    )
    return Lfm2ForCausalLM(config)


def deepseek2(size: Size, vocabulary: int) -> Any:
    """Multi-head latent attention, without experts. Its latent is full size: vLLM's CPU kernel knows no other."""
    config = DeepseekV2Config(
        **{**common(size, vocabulary), "num_key_value_heads": size.heads},
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=HEAD,
        qk_rope_head_dim=64,
        v_head_dim=HEAD,
        first_k_dense_replace=size.layers,
    )
    return DeepseekV2ForCausalLM(config)


FAMILIES: dict[str, Callable[[Size, int], Any]] = {
    "llama": llama,
    "gemma3": gemma3,
    "lfm2": lfm2,
    "deepseek2": deepseek2,
}


def make_weights(family: str, size: Size, seed: int, tokenizer: PreTrainedTokenizerFast) -> Any:
    vocab = tokenizer.get_vocab()
    model = FAMILIES[family](size, (len(vocab) + 63) // 64 * 64)
    generator = torch.Generator().manual_seed(seed)
    words = torch.tensor([vocab["Ġ" + word] for word in WORDS])
    for name, weight in sorted(model.named_parameters()):
        with torch.no_grad():
            if name.endswith("norm.weight"):
                fill_norm(family, name, weight, generator)
                continue
            weight.normal_(0.0, spread(family, name, weight.shape), generator=generator)
            if name == "lm_head.weight":
                # Only words win: what the model writes can be read, and there are fewer close seconds.
                kept = weight[words].clone()
                weight.zero_()
                weight[words] = kept
    return model.eval()


def fill_norm(family: str, name: str, weight: torch.Tensor, generator: torch.Generator) -> None:
    if family == "gemma3":
        weight.zero_()  # Gemma adds one
    elif name.endswith("q_layernorm.weight"):
        weight.fill_(SHARP)
    elif name.endswith("embedding_norm.weight"):
        # The embeddings are the head too. Without signs of its own, the last token would always win again.
        weight.copy_(torch.randint(0, 2, weight.shape, generator=generator) * 2.0 - 1.0)
    else:
        weight.fill_(1.0)


def spread(family: str, name: str, shape: torch.Size) -> float:
    """Standard deviation of a weight: signals keep their size, and attention looks at a few tokens of many."""
    if "embed_tokens" in name:
        return math.sqrt(1.0 / shape[-1]) if family == "gemma3" else 1.0  # Gemma scales them up itself
    inputs = math.sqrt(1.0 / shape[-1])
    if "q_proj" in name or "k_proj" in name:
        return 1.6 * inputs
    if "o_proj" in name or "down_proj" in name:
        return 1.5 * inputs
    if "lm_head" in name:
        return 8.0 * inputs
    return inputs


def check(model: Any, tokenizer: Any, prompts: list[str], max_tokens: int, bound: float) -> Checked:
    """Greedy choices token by token, and for two prompts once more in one piece; stops where the bound is missed."""
    margin, noise, count = float("inf"), 0.0, 0
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model(ids, use_cache=True, logits_to_keep=1)
        chosen, best = [], []
        for _ in range(max_tokens):
            top = out.logits[0, -1].topk(2)
            margin = min(margin, float(top.values[0] - top.values[1]))
            chosen.append(int(top.indices[0]))
            best.append(top.values[0])
            out = model(top.indices[None, :1], past_key_values=out.past_key_values, use_cache=True)
        count += max_tokens
        if margin < bound:
            break
        if prompt not in (prompts[0], prompts[-1]):
            continue
        whole = torch.cat([ids, torch.tensor([chosen[:-1]], dtype=ids.dtype)], dim=1)
        again = model(whole, logits_to_keep=max_tokens).logits[0]
        picked = again[torch.arange(max_tokens), torch.tensor(chosen)]
        noise = max(noise, float((picked - torch.stack(best)).abs().max()))
    return Checked(margin, noise, count)


ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8


def make_adapter(place: Path, base: Path, seed: int) -> None:
    """A LoRA adapter of random numbers, as PEFT would save it; strong enough to change what the model says."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in sorted(model.named_parameters()):
        module = name.removesuffix(".weight")
        if not module.endswith(ADAPTED):
            continue
        outputs, inputs = weight.shape
        down = torch.randn(RANK, inputs, generator=generator) / math.sqrt(inputs)
        up = torch.randn(outputs, RANK, generator=generator) / math.sqrt(RANK)
        weights[f"base_model.model.{module}.lora_A.weight"] = down
        weights[f"base_model.model.{module}.lora_B.weight"] = up
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # a path would make the same adapter another one elsewhere
        "target_modules": list(ADAPTED),
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    place.mkdir(parents=True, exist_ok=True)
    save_file(weights, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def make_eagle(place: Path, base: Path) -> None:
    """An EAGLE head: the model's first layer over a mix of the next token's embedding and the last hidden state.

    It drafts something, from a KV cache of its own; nothing makes it right.
    """
    weights = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    layer = "model.layers.0."
    made = {
        name.removeprefix("model."): weight.clone()
        for name, weight in weights.items()
        if name.startswith(layer) and "input_layernorm" not in name
    }
    eye = torch.eye(weights["model.embed_tokens.weight"].shape[1])
    made["fc.weight"] = torch.cat([0.3 * eye, 0.7 * eye], dim=1).contiguous()
    place.mkdir(parents=True, exist_ok=True)
    save_file(made, place / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}, indent=1) + "\n")


def recipe_of(args: argparse.Namespace, prompts: list[str]) -> dict[str, Any]:
    said = json.dumps([asdict(SIZES[args.size]), prompts, Path(__file__).read_text()])
    return {
        "format": FORMAT,
        "family": args.family,
        "size": args.size,
        "seed": args.seed,
        "max_tokens": args.max_tokens,
        "margin": args.margin,
        "made_from": hashlib.sha256(said.encode()).hexdigest(),
    }


def search(args: argparse.Namespace, tokenizer: Any, prompts: list[str]) -> tuple[Any, int, Checked]:
    """The first seed from `--seed` on whose choices all hold."""
    for seed in range(args.seed, args.seed + args.tries):
        started = time.monotonic()
        model = make_weights(args.family, SIZES[args.size], seed, tokenizer)
        with torch.inference_mode():
            found = check(model, tokenizer, prompts, args.max_tokens, args.margin)
        holds = found.holds(args.margin)
        print(
            f"    seed {seed}: smallest margin {found.margin:.4f} over {found.tokens} tokens, "
            f"noise {found.noise:.6f}: {'good' if holds else 'too close'} ({time.monotonic() - started:.1f} s)",
            file=sys.stderr,
            flush=True,
        )
        if holds:
            return model, seed, found
    raise SystemExit(
        f"error: expected one of {args.tries} seeds from {args.seed} on to have margins of at least {args.margin}, "
        "found none: start from another --seed, or give fewer --prompts"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make-model", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("dir", type=Path, help="where to put it; left alone when it is there already")
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, help="first seed to try (default: %(default)s)"
    )
    parser.add_argument("--tries", type=int, default=40, help="seeds to try (default: %(default)s)")
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="default: %(default)s")
    parser.add_argument(
        "--adapter-of",
        type=Path,
        metavar="MODEL",
        help="make a LoRA adapter for this Llama, from --seed alone",
    )
    parser.add_argument(
        "--eagle-of",
        type=Path,
        metavar="MODEL",
        help="make an EAGLE drafter for this Llama, out of its weights",
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--prompts", type=Path, help="JSON list of prompts to check (default: quickstart's)")
    parser.add_argument(
        "--max-tokens", type=int, default=16, help="tokens per prompt to check (default: %(default)s)"
    )
    parser.add_argument("--margin", type=float, default=MARGIN, help="smallest margin (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    logging.disable_progress_bar()
    if args.adapter_of is not None:
        make_adapter(args.dir, args.adapter_of, args.seed)
        return
    if args.eagle_of is not None:
        make_eagle(args.dir, args.eagle_of)
        return
    tokenizer = make_tokenizer()
    if args.prompts:
        prompts = json.loads(args.prompts.read_text())
    else:
        made = quickstart_prompts(lambda text: len(tokenizer(text).input_ids), LONGEST_QUICKSTART_PROMPT)
        prompts = [prompt.text for prompt in made]
    recipe = recipe_of(args, prompts)
    marker = args.dir / MARKER
    if marker.exists() and json.loads(marker.read_text())["recipe"] == recipe:
        return
    marker.unlink(missing_ok=True)
    model, seed, found = search(args, tokenizer, prompts)
    model.save_pretrained(args.dir, safe_serialization=True)
    tokenizer.save_pretrained(args.dir)
    marker.write_text(json.dumps({"recipe": recipe, "seed": seed, "checked": asdict(found)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
