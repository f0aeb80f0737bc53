"""Writes vllm_layouts.json: where vLLM itself puts the KV cache, for the six orders and several specs.

vLLM declares the tensors (`get_kv_cache_config_from_groups`, which asks `compute_layout_strides`) and makes
the views (`create_kv_cache_views`); this prints both. layouts/tests/it/vllm_golden.rs compares our layouts
with it, tests/unit/test_layouts_oracle.py compares the file with the vLLM that is installed.

usage: python vllm_layouts.py        (needs vLLM 0.32 and its torch; the output is checked in)
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BLOCKS = 3


def groups() -> dict[str, list[tuple[list[str], list[Any]]]]:
    """Groups of a model by name: layer names with one spec each."""
    import torch
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        MambaSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
        SparseCacheRole,
    )

    def names(count: int, kind: str = "self_attn.attn", first: int = 0) -> list[str]:
        return [f"model.layers.{layer}.{kind}" for layer in range(first, first + count)]

    def full(**more: Any) -> Any:
        given = {"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.bfloat16}
        return FullAttentionSpec(**{**given, **more})

    def mla(**more: Any) -> Any:
        given = {"block_size": 64, "num_kv_heads": 1, "head_size": 576, "dtype": torch.bfloat16}
        return MLAAttentionSpec(**{**given, **more})

    uint8 = torch.uint8
    sparse = mla(dtype=uint8, cache_dtype_str="fp8_ds_mla", state_content_bytes=656)
    index = mla(dtype=uint8, head_size=132, cache_role=SparseCacheRole.INDEXER)
    window = SlidingWindowSpec(
        block_size=16, num_kv_heads=2, head_size=8, dtype=torch.bfloat16, sliding_window=64
    )
    state = MambaSpec(
        block_size=16,
        shapes=((3, 20), (4, 5, 2)),
        dtypes=(torch.bfloat16, torch.float32),
        page_size_padded=1024,
    )
    return {
        "full": [(names(3), [full()] * 3)],
        "full, v shorter": [(names(3), [full(head_size_v=4)] * 3)],
        "full, fp8": [(names(3), [full(dtype=uint8)] * 3)],
        "full, int8 per token and head": [(names(2), [full(dtype=uint8, state_content_bytes=24)] * 2)],
        "full, aligned blocks": [(names(2), [full(block_stride_alignment=768)] * 2)],
        "nvfp4": [
            (names(2), [full(dtype=uint8, head_size=32, num_head_slots=4, state_content_bytes=18)] * 2)
        ],
        "planes": [(names(2), [full(num_head_slots=2, state_content_bytes=32)] * 2)],
        "mla": [(names(3), [mla()] * 3)],
        "mla, fp8": [(names(3), [mla(dtype=uint8)] * 3)],
        "mla, fp8_ds_mla with indexer": [
            (names(2) + names(2, "self_attn.indexer.k_cache"), [sparse, sparse, index, index])
        ],
        "mla, padded states": [
            (
                names(2),
                [mla(dtype=uint8, tokens_per_state=4, block_size=256, state_content_bytes=584, alignment=576)]
                * 2,
            )
        ],
        "full and window": [(names(2), [full()] * 2), (names(2, first=2), [window] * 2)],
        "full and mamba": [(names(2), [full()] * 2), (names(2, "mixer", 2), [state] * 2)],
    }


def config_of(order: str, model: list[tuple[list[str], list[Any]]]) -> Any:
    """vLLM's configuration for some groups and blocks."""
    from vllm.v1.core import kv_cache_utils as utils
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec, UniformTypeKVCacheSpecs
    from vllm.v1.kv_cache_layout import KVCacheLayout

    made = []
    for layers, specs in model:
        spec = specs[0]
        if any(other != spec for other in specs):
            spec = UniformTypeKVCacheSpecs(
                block_size=spec.block_size, kv_cache_specs=dict(zip(layers, specs, strict=True))
            )
        made.append(KVCacheGroupSpec(layers, spec))
    layout = KVCacheLayout[order]
    config = SimpleNamespace(
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: layout,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
    )
    per_block = utils._get_kv_cache_bytes_per_block(made, layout)
    return utils.get_kv_cache_config_from_groups(config, made, per_block * BLOCKS), layout


def described(order: str, model: list[tuple[list[str], list[Any]]], kernel: int | None) -> dict[str, Any]:
    """What vLLM declares and shows for one order."""
    import torch
    from vllm.v1.kv_cache_interface import create_kv_cache_views

    config, layout = config_of(order, model)
    specs = {name: spec for layers, group in model for name, spec in zip(layers, group, strict=True)}
    tensors = []
    for tensor in config.kv_cache_tensors:
        spec = specs[tensor.layers[0]]
        raw = torch.empty(tensor.size, dtype=torch.int8)
        size = None if kernel is None else spec.block_size // kernel
        views = create_kv_cache_views(raw, spec, config.num_blocks, layout, tensor, size)
        shown = []
        for view in views:
            width = view.element_size()
            shown.append([view.storage_offset() * width, *(step * width for step in view.stride()[:3])])
        tensors.append(
            {
                "group": next(at for at, (layers, _) in enumerate(model) if tensor.layers[0] in layers),
                "size": tensor.size,
                "offset": tensor.offset,
                "layer_stride": tensor.layer_stride,
                "block_stride": tensor.block_stride,
                "layers": tensor.layers,
                "heads": spec.num_heads,
                "states": spec.num_states,
                "content": spec.state_content_size_bytes,
                "page": spec.page_size_bytes,
                "views": shown,
            }
        )
    return {"kernel_blocks": kernel or 1, "block_tokens": model[0][1][0].block_size, "tensors": tensors}


def cases() -> list[dict[str, Any]]:
    """Every order of every model; `refused` where vLLM has no such thing."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    out = []
    for name, model in groups().items():
        for layout in KVCacheLayout:
            for kernel in (None, 2) if name in ("full", "mla", "mla, fp8_ds_mla with indexer") else (None,):
                case: dict[str, Any] = {"model": name, "order": layout.name, "num_blocks": BLOCKS}
                try:
                    case |= described(layout.name, model, kernel)
                except (ValueError, AssertionError) as error:
                    case |= {"kernel_blocks": kernel or 1, "refused": type(error).__name__}
                out.append(case)
    return out


def text() -> str:
    """The file's content."""
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases())
    return f"[\n{lines}\n]\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".json").write_text(text())
