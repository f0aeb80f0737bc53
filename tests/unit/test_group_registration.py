"""KV cache groups as they are registered: what pages hold, and that the memory is as vLLM declares it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from pillion.vllm import canary, groups
from unit.fake_gpu import FakeGpu
from unit.test_layouts_oracle import VERSIONS, generator

BLOCKS = 3


def engine(cache_dtype: str = "auto", world: int = 1, heads: int = 8) -> Any:
    """Of vLLM's configuration, what packings depend on."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=world),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        model_config=SimpleNamespace(dtype=torch.bfloat16, get_total_num_kv_heads=lambda: heads),
        attention_config=None,
    )


def full(**more: Any) -> Any:
    given = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    return FullAttentionSpec(**{**given, **more})


def mla(**more: Any) -> Any:
    given = {"block_size": 64, "num_kv_heads": 1, "head_size": 576, "dtype": torch.bfloat16}
    return MLAAttentionSpec(**{**given, **more})


def mamba(**more: Any) -> Any:
    given: dict[str, Any] = {
        "block_size": 32,
        "shapes": ((3, 20), (4, 5, 2)),
        "dtypes": (torch.bfloat16, torch.float32),
    }
    return MambaSpec(**{**given, **more})


# ---- packings

UINT8 = torch.uint8


@pytest.mark.parametrize(
    ("spec", "cache_dtype", "text"),
    [
        (full(), "auto", "kv total_heads=2 key=128 value=128 dtype=bfloat16"),
        (full(head_size_v=32), "auto", "kv total_heads=2 key=128 value=64 dtype=bfloat16"),
        (full(dtype=torch.float32), "auto", "kv total_heads=2 key=256 value=256 dtype=float32"),
        (
            full(dtype=UINT8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR),
            "fp8_e4m3",
            "kv total_heads=2 key=64 value=64 dtype=fp8_e4m3",
        ),
        (
            full(dtype=UINT8, kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD, state_content_bytes=136),
            "int8_per_token_head",
            "kv-scaled total_heads=2 key=64 value=64 format=int8_per_token_head",
        ),
        (
            full(num_kv_heads=4, num_head_slots=2, state_content_bytes=512),
            "auto",
            "kv-planes total_heads=4 head=128 dtype=bfloat16",
        ),
        (
            full(num_head_slots=2, state_content_bytes=256),
            "auto",
            "kv-planes total_heads=2 head=128 dtype=bfloat16",
        ),
        (
            SlidingWindowSpec(
                block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float16, sliding_window=80
            ),
            "auto",
            "kv total_heads=2 key=128 value=128 dtype=float16",
        ),
        (mla(), "auto", "latent format=auto/bfloat16"),
        (mla(dtype=UINT8, cache_dtype_str="fp8"), "fp8", "latent format=fp8/uint8"),
        (
            mla(dtype=UINT8, cache_dtype_str="fp8_ds_mla", state_content_bytes=656),
            "fp8_ds_mla",
            "latent format=fp8_ds_mla/uint8",
        ),
        (
            mla(dtype=UINT8, cache_dtype_str="fp8_ds_mla", state_content_bytes=584, alignment=576),
            "fp8_ds_mla",
            "opaque-page format=fp8_ds_mla/uint8/None/SPARSE/1",
        ),
        (
            mamba(),
            "auto",
            "states replicated=0 whole:bytes=280,format=MAMBA2/3x20:bfloat16+4x5x2:float32/conv:SD",
        ),
        (
            mamba(tp_replicated=True),
            "auto",
            "states replicated=1 whole:bytes=280,format=MAMBA2/3x20:bfloat16+4x5x2:float32/conv:SD",
        ),
    ],
)
def test_packings_on_cuda(gpu: FakeGpu, spec: Any, cache_dtype: str, text: str) -> None:
    assert groups.packing(engine(cache_dtype), spec) == text


def test_an_indexers_page_has_its_keys_first(gpu: FakeGpu) -> None:
    from vllm.v1.kv_cache_interface import SparseCacheRole

    spec = mla(dtype=UINT8, head_size=132, cache_role=SparseCacheRole.INDEXER)
    assert groups.packing(engine(), spec) == "index key=128 scale=4 format=auto/uint8"


def test_packings_on_cpu_are_opaque_by_head_and_name_the_instruction_set() -> None:
    text = groups.packing(engine(), full())
    assert text.startswith("opaque-heads total_heads=2 format=CPU_ATTN/") and text.endswith(
        "/auto/bfloat16/NONE"
    )
    assert groups.packing(engine(), full(dtype=torch.float32)) != text
    assert groups.packing(engine(), mla()) == "latent format=auto/bfloat16", "rows are rows"
    assert groups.packing(engine(), mamba()).startswith("states replicated=0 whole:bytes=280,")


def test_heads_count_over_all_ranks(gpu: FakeGpu) -> None:
    def total(world: int, heads: int = 8, **spec: Any) -> int:
        text = groups.packing(engine(world=world, heads=heads), full(**spec))
        return int(text.split()[1].removeprefix("total_heads="))

    assert total(4) == 8 and total(1) == 2
    assert total(4, heads=2, num_kv_heads=1) == 2, "two ranks hold the same head"
    assert total(4, heads=4, num_kv_heads=1) == 4
    assert total(4, heads=3, num_kv_heads=1) == 4, "ranks that do not divide"
    assert total(4, heads=2) == 8, "more than one head a rank: none is there twice"


@pytest.mark.parametrize(
    ("spec", "cache_dtype", "reason"),
    [
        (full(dtype=UINT8), "auto", "quantization none in uint8"),
        (
            full(dtype=UINT8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR),
            "auto",
            "KV cache dtype auto: expected fp8",
        ),
        (
            full(dtype=UINT8, kv_quant_mode=KVQuantMode.INT4_PER_TOKEN_HEAD),
            "int4_per_token_head",
            "int4_per_token_head in uint8",
        ),
        (
            full(dtype=UINT8, kv_quant_mode=KVQuantMode.TURBOQUANT_K8V4),
            "turboquant_k8v4",
            "quantization turboquant_k8v4",
        ),
        (full(num_head_slots=4, state_content_bytes=18), "auto", "this packing is not known"),
        (full(state_content_bytes=300), "auto", "this packing is not known"),
    ],
)
def test_packings_that_are_not_served(gpu: FakeGpu, spec: Any, cache_dtype: str, reason: str) -> None:
    with pytest.raises(groups.Unserved, match=reason):
        groups.packing(engine(cache_dtype), spec)


def test_kinds_go_by_their_very_name(gpu: FakeGpu) -> None:
    class SinkFullAttentionSpec(FullAttentionSpec):
        pass

    spec = SinkFullAttentionSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    with pytest.raises(groups.Unserved, match="SinkFullAttentionSpec: expected one of FullAttentionSpec"):
        groups.packing(engine(), spec)


def test_formats_are_escaped() -> None:
    assert groups.escaped("fp8_e4m3/amx+avx512") == "fp8_e4m3/amx+avx512"
    assert groups.escaped("a b,c=d%é") == "a%20b%2Cc%3Dd%25%C3%A9"


# ---- memory


def hybrid() -> tuple[KVCacheConfig, dict[str, Any]]:
    """Two layers of attention and two of padded states on the same blocks, by vLLM's own functions."""
    page = full().page_size_bytes
    names = [["layers.0.attn", "layers.2.attn"], ["layers.1.mixer", "layers.3.mixer"]]
    specs = [full(), mamba(page_size_padded=page)]
    config = KVCacheConfig(
        num_blocks=BLOCKS,
        kv_cache_tensors=[
            KVCacheTensor(
                size=2 * BLOCKS * page, layers=list(layers), layer_stride=BLOCKS * page, block_stride=page
            )
            for layers in names
        ],
        kv_cache_groups=[KVCacheGroupSpec(layers, spec) for layers, spec in zip(names, specs, strict=True)],
        kv_cache_layout="LBHNC",
    )
    views = allocate_kv_cache(config, torch.device("cpu"), KVCacheLayout.LBHNC, [32, 32])
    return config, dict(views)


def test_groups_as_they_are_declared(gpu: FakeGpu) -> None:
    config, caches = hybrid()
    found = groups.described(engine(), config, caches)
    attention, states = found.groups
    page = full().page_size_bytes
    assert found.num_blocks == BLOCKS and not groups.never_reads_block_0(config)
    assert [pages["layers"] for group in found.groups for pages in group["pages"]] == [
        ["layers.0.attn", "layers.2.attn"],
        ["layers.1.mixer", "layers.3.mixer"],
    ]
    assert attention["block_tokens"] == states["block_tokens"] == 32
    assert states["pages"][0] == {
        "size": 2 * BLOCKS * page,
        "offset": 0,
        "layer_stride": BLOCKS * page,
        "block_stride": page,
        "layers": ["layers.1.mixer", "layers.3.mixer"],
        "heads": 1,
        "states": 1,
        "content_bytes": 280,
        "page_bytes": page,
        "kernel_blocks": 1,
        "packing": groups.packing(engine(), mamba()),
    }
    assert found.views[1][1] is caches["layers.3.mixer"]
    assert groups.refusal(engine(), config) is None


def test_groups_alias_and_the_last_canary_stays(gpu: FakeGpu) -> None:
    found = groups.described(engine(), *hybrid())
    canary.write(found.views[0], BLOCKS, 1)
    canary.write(found.views[1], BLOCKS, 2)
    assert canary.intact(found.views[1], BLOCKS, 2) and not canary.intact(found.views[0], BLOCKS, 1)
    for views in found.views:
        canary.clear(views, BLOCKS)
    assert not any(view.any() for views in found.views for view in views)


def missing(config: Any, caches: dict[str, Any]) -> None:
    del caches["layers.2.attn"]


def copied(config: Any, caches: dict[str, Any]) -> None:
    caches["layers.2.attn"] = caches["layers.2.attn"].clone()


def allocated_apart(config: Any, caches: dict[str, Any]) -> None:
    """The right place, of another allocation."""
    storage = caches["layers.2.attn"].untyped_storage().clone()
    own = caches["layers.2.attn"]
    flat = torch.empty(0, dtype=own.dtype).set_(storage)
    caches["layers.2.attn"] = flat.as_strided(own.shape, own.stride(), own.storage_offset())


def swapped(config: Any, caches: dict[str, Any]) -> None:
    first, second = "layers.0.attn", "layers.2.attn"
    caches[first], caches[second] = caches[second], caches[first]


def fewer_blocks(config: Any, caches: dict[str, Any]) -> None:
    caches["layers.0.attn"] = caches["layers.0.attn"][:2]


def other_heads(config: Any, caches: dict[str, Any]) -> None:
    caches["layers.0.attn"] = caches["layers.0.attn"][:, :1]


def other_stride(config: Any, caches: dict[str, Any]) -> None:
    config.kv_cache_tensors[0].block_stride *= 2


def raw(config: Any, caches: dict[str, Any]) -> None:
    caches["layers.0.attn"] = caches["layers.0.attn"].reshape(-1)


def unplaced(config: Any, caches: dict[str, Any]) -> None:
    caches["layers.9.attn"] = torch.zeros(BLOCKS, 2, 32, 128)


def unplaced_without_memory(config: Any, caches: dict[str, Any]) -> None:
    config.kv_cache_groups[0].layer_names.append("layers.9.attn")


def mixed(config: Any, caches: dict[str, Any]) -> None:
    config.kv_cache_tensors[0].layers.append("layers.1.mixer")


def no_tensor(config: Any, caches: dict[str, Any]) -> None:
    del config.kv_cache_tensors[1]


def on_the_host(config: Any, caches: dict[str, Any]) -> None:
    config.kv_cache_tensors[1].host_resident = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (missing, "layer layers.2.attn has no KV cache tensor"),
        (copied, "does not lie where its KVCacheTensor says"),
        (allocated_apart, "lies in 2 allocations"),
        (swapped, "layers.0.attn does not lie where"),
        (fewer_blocks, r"is \[B, H, N, C bytes\] = \(2, 2, 32, 256\), expected \(3, 2, 32, 256\)"),
        (other_heads, r"expected \(3, 2, 32, 256\)"),
        (other_stride, "does not lie where"),
        (raw, r"has 1 axes: expected \[B, H, N, C\]"),
        (unplaced, "no KVCacheTensor says where the KV cache of layers.9.attn lies"),
        (unplaced_without_memory, "no KVCacheTensor says where the KV cache of layers.9.attn lies"),
        (mixed, "are not of one group"),
        (no_tensor, "KV cache group 1 has no KVCacheTensor"),
        (on_the_host, "host-resident"),
    ],
)
def test_memory_that_is_not_as_declared(gpu: FakeGpu, change: Any, reason: str) -> None:
    config, caches = hybrid()
    change(config, caches)
    with pytest.raises(groups.Unserved, match=reason):
        groups.described(engine(), config, caches)


def test_a_layer_may_use_anothers_cache(gpu: FakeGpu) -> None:
    """vLLM adds such layers to the group's names, and registers the other one's tensor for them."""
    config, caches = hybrid()
    config.kv_cache_groups[0].layer_names.append("layers.9.attn")
    caches["layers.9.attn"] = caches["layers.0.attn"]
    found = groups.described(engine(), config, caches)
    assert len(found.views[0]) == 2


@pytest.mark.skipif(not vllm.__version__.startswith(VERSIONS), reason="asks functions of vLLM 0.32")
def test_whatever_vllm_allocates_is_described(gpu: FakeGpu) -> None:
    """Six orders, every kind, kernel blocks: the numbers go to the client as vLLM declares them."""
    module, seen = generator(), 0
    formats = {"full, fp8": "fp8", "mla, fp8": "fp8"}
    for name, model in module.groups().items():
        for order in KVCacheLayout:
            if name == "nvfp4":
                continue
            try:
                config, layout = module.config_of(order.name, model)
            except (AssertionError, ValueError):
                continue  # vLLM has no such thing
            sizes = [specs[0].block_size for _, specs in model]
            caches = allocate_kv_cache(config, torch.device("cpu"), layout, sizes)
            try:
                found = groups.described(engine(formats.get(name, "auto")), config, caches)
            except groups.Unserved as error:
                # The script's specs do not say how they are quantized.
                assert "uint8" in str(error), f"{name} {order}: {error}"
                continue
            assert len(found.groups) == len(model)
            placed = [pages["layers"] for group in found.groups for pages in group["pages"]]
            assert placed == [tensor.layers for tensor in config.kv_cache_tensors]
            seen += 1
    assert seen > 40
