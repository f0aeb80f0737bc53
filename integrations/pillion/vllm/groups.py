"""KV cache groups as a worker registers them: which pages hold which layers, and what a backend packs into them.

The sidecar moves whole pages, of the layers that a group has, whatever is in them. What the packing says beyond that
(`layouts/src/vllm/grammar.rs` has the grammar) decides with whom a record may be exchanged, and which order of memory
its bytes survive:

- attention on CUDA is [K | V] by head and token, in any order. The backends that keep a plane of keys and one of values
  say so by two head slots;
- attention on CPU packs a head's tokens of one block for the instruction set: opaque, by head;
- MLA is one row per token, the same on all ranks; a sparse indexer's page has its keys first, then their scales; the
  rows of DeepSeek V4 and of NVFP4 have an inner layout of their own: an opaque page;
- a recurrent state (Mamba, GDN, KDA, short convolution) is one run of bytes that means something to its rank alone:
  how the channels of a convolution divide between ranks is not in vLLM's description.

A description that vLLM's own views contradict is refused, and so is a layer that no KVCacheTensor places: it would be
served with whatever lies in its blocks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pillion.vllm import device, identity

# The cache dtypes that say, by name, what is stored in a byte of fp8.
_FP8 = {"fp8": "fp8", "fp8_e4m3": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"}
_FLOATS = ("float32", "float16", "bfloat16")
_ATTENTION = ("FullAttentionSpec", "SlidingWindowSpec")
_MLA = ("MLAAttentionSpec", "SlidingWindowMLASpec")
_SCALED = {"INT8_PER_TOKEN_HEAD": 1, "FP8_PER_TOKEN_HEAD": 1}  # bytes of an element


class Unserved(Exception):
    """What the sidecar cannot be told of, and why."""


@dataclass(frozen=True)
class Described:
    """The groups for `WorkerClient.describe`, and the views of each one's layers in the same order."""

    groups: list[dict[str, Any]]
    views: list[list[Any]]
    num_blocks: int


def refusal(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """Why these groups cannot be registered, as far as it can be known without the memory; or None."""
    try:
        for tensor, group in _placed(kv_cache_config):
            packing(vllm_config, _spec(kv_cache_config.kv_cache_groups[group], tensor.layers[0]))
    except Unserved as error:
        return str(error)
    return None


def described(vllm_config: Any, kv_cache_config: Any, caches: Mapping[str, Any]) -> Described:
    """What `register_kv_caches` gave, compared with the configuration.

    Raises `Unserved` with what is not as it should be.
    """
    num_blocks = kv_cache_config.num_blocks
    groups: list[dict[str, Any]] = [
        {"block_tokens": group.kv_cache_spec.block_size, "pages": []}
        for group in kv_cache_config.kv_cache_groups
    ]
    views: list[list[Any]] = [[] for _ in groups]
    storages: dict[str, int] = {}  # layer -> where its memory begins
    for tensor, index in _placed(kv_cache_config):
        spec = _spec(kv_cache_config.kv_cache_groups[index], tensor.layers[0])
        kernel_blocks = 0
        for number, name in enumerate(tensor.layers):
            if (view := caches.get(name)) is None:
                raise Unserved(f"layer {name} has no KV cache tensor")
            kernel_blocks = _kernel_blocks(name, view, spec, num_blocks)
            _check_place(name, view, tensor, number, kernel_blocks)
            storages[name] = view.untyped_storage().data_ptr()
            views[index].append(view)
        groups[index]["pages"].append(
            {
                "size": tensor.size,
                "offset": tensor.offset,
                "layer_stride": tensor.layer_stride,
                "block_stride": tensor.block_stride,
                "layers": list(tensor.layers),
                "heads": spec.num_heads,
                "states": spec.num_states,
                "content_bytes": spec.state_content_size_bytes,
                "page_bytes": spec.page_size_bytes,
                "kernel_blocks": kernel_blocks,
                "packing": packing(vllm_config, spec),
            }
        )
    if len(set(storages.values())) != 1:
        raise Unserved(f"the KV cache lies in {len(set(storages.values()))} allocations: expected one")
    _check_shared(kv_cache_config, caches, storages)
    return Described(groups, views, num_blocks)


def never_reads_block_0(kv_cache_config: Any) -> bool:
    """Whether no block table has vLLM's null block in the place of blocks: every block of a prompt is kept."""
    groups = kv_cache_config.kv_cache_groups
    specs = (_spec(group, group.layer_names[0]) for group in groups)
    return all(type(spec).__name__ in ("FullAttentionSpec", "MLAAttentionSpec") for spec in specs)


def _placed(kv_cache_config: Any) -> Iterator[tuple[Any, int]]:
    """Every tensor with the index of its group."""
    groups = kv_cache_config.kv_cache_groups
    empty = set(range(len(groups)))
    seen: set[str] = set()
    for tensor in kv_cache_config.kv_cache_tensors:
        if getattr(tensor, "host_resident", False):
            raise Unserved("the KV cache lies in a host-resident pool")
        if not tensor.layers:
            raise Unserved("a KVCacheTensor without layers")
        names = set(tensor.layers)
        index = next((i for i, group in enumerate(groups) if tensor.layers[0] in group.layer_names), None)
        if index is None or not names <= set(groups[index].layer_names):
            raise Unserved(f"the layers of one KVCacheTensor ({tensor.layers[0]}, …) are not of one group")
        if names & seen or len(names) != len(tensor.layers):
            raise Unserved(f"layer {min(names & seen or names)} is placed twice")
        seen |= names
        empty.discard(index)
        yield tensor, index
    if empty:
        raise Unserved(f"KV cache group {min(empty)} has no KVCacheTensor")


def _spec(group: Any, layer: str) -> Any:
    """A layer's own spec: in `UniformTypeKVCacheSpecs` they differ, and the group's sums their pages up.

    The scheduler's configuration has one of them for all.
    """
    layers = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return layers[layer] if layers else group.kv_cache_spec


def _kernel_blocks(name: str, view: Any, spec: Any, num_blocks: int) -> int:
    """How many rows of a layer's `[B, H, N, C]` a block of the block manager is.

    A backend with block sizes of its own (FlashInfer: at most 64 tokens, CPU MLA: 16) splits each block
    (`prepare_kernel_block_sizes`), where a block is one dense page of its layer.
    """
    if view.dim() != 4:
        raise Unserved(f"KV cache of {name} has {view.dim()} axes: expected [B, H, N, C]")
    rows, heads, states, content = (int(size) for size in view.shape)
    ratio = rows // num_blocks
    content *= view.element_size()
    expected = (spec.num_heads, spec.num_states, spec.state_content_size_bytes)
    if ratio < 1 or rows % num_blocks or (heads, states * ratio, content) != expected:
        shape = (rows, heads, states, content)
        raise Unserved(
            f"KV cache of {name} is [B, H, N, C bytes] = {shape}, expected {(num_blocks, *expected)}"
        )
    return ratio


def _check_place(name: str, view: Any, tensor: Any, number: int, kernel_blocks: int) -> None:
    offset = view.data_ptr() - view.untyped_storage().data_ptr()
    # Of a single block there is no stride.
    stride = view.stride(0) * view.element_size() * kernel_blocks
    stride = stride if view.shape[0] > 1 else tensor.block_stride
    if stride != tensor.block_stride or offset != tensor.offset + number * tensor.layer_stride:
        raise Unserved(f"KV cache of {name} does not lie where its KVCacheTensor says")


def _check_shared(kv_cache_config: Any, caches: Mapping[str, Any], placed: Mapping[str, int]) -> None:
    """Layers that no tensor places use another layer's KV cache (YOCO and the like), and bring no bytes along."""
    places = {(caches[name].data_ptr(), tuple(caches[name].shape)) for name in placed}
    known = {name for group in kv_cache_config.kv_cache_groups for name in group.layer_names}
    for name in (known | set(caches)) - set(placed):
        view = caches.get(name)
        if view is None or (view.data_ptr(), tuple(view.shape)) not in places:
            raise Unserved(f"no KVCacheTensor says where the KV cache of {name} lies")


def packing(vllm_config: Any, spec: Any) -> str:
    """What a page of this spec holds, as the registration says it."""
    name = type(spec).__name__
    if name in _ATTENTION:
        return _attention(vllm_config, spec)
    if name in _MLA:
        return _latent(spec)
    if name == "MambaSpec":
        return _states(spec)
    served = ", ".join((*_ATTENTION, *_MLA, "MambaSpec"))
    # Subclasses keep other things in their pages, or keep them elsewhere.
    raise Unserved(f"KV cache spec {name}: expected one of {served}")


def _attention(vllm_config: Any, spec: Any) -> str:
    total = spec.num_kv_heads * identity.shards(vllm_config, spec)
    mode = getattr(spec.kv_quant_mode, "name", str(spec.kv_quant_mode))
    content, dtype = spec.state_content_size_bytes, _name(spec.dtype)
    if not device.on_cuda():
        form = f"{identity.backend(vllm_config, spec)}/{vllm_config.cache_config.cache_dtype}/{dtype}/{mode}"
        return f"opaque-heads total_heads={total} format={escaped(form)}"
    if mode in _SCALED and spec.num_heads == spec.num_kv_heads:
        size = _SCALED[mode]
        key, value = spec.head_size * size, spec.head_size_v * size
        return f"kv-scaled total_heads={total} key={key} value={value} format={mode.lower()}"
    if mode == "FP8_PER_TENSOR":
        asked = str(vllm_config.cache_config.cache_dtype)
        if asked not in _FP8:
            raise Unserved(f"KV cache dtype {asked}: expected {', '.join(_FP8)}, whose elements are known")
        dtype, size = _FP8[asked], 1
    elif mode == "NONE" and dtype in _FLOATS:
        size = 4 if dtype == "float32" else 2
    else:
        raise Unserved(f"KV cache quantization {mode.lower()} in {dtype}: not served yet")
    key, value = spec.head_size * size, spec.head_size_v * size
    slots = getattr(
        spec, "num_head_slots", None
    )  # two planes of two heads have a page of the same shape as K | V
    if slots is None and content == key + value:
        return f"kv total_heads={total} key={key} value={value} dtype={dtype}"
    if slots == 2 and key == value and content == spec.num_kv_heads * key:
        return f"kv-planes total_heads={total} head={key} dtype={dtype}"
    raise Unserved(
        f"pages of {spec.num_heads} head slots with {content} bytes a token, for {spec.num_kv_heads} heads of "
        f"{key} + {value} bytes: this packing is not known"
    )


def _latent(spec: Any) -> str:
    stored = getattr(spec, "cache_dtype_str", None) or "auto"
    role = getattr(getattr(spec, "cache_role", None), "name", "SPARSE")
    model = getattr(spec, "model_version", None)
    form = f"{stored}/{_name(spec.dtype)}"
    dense = spec.num_heads * spec.num_states * spec.state_content_size_bytes
    if model is not None or spec.page_size_bytes != dense or stored.startswith("nvfp4"):
        return f"opaque-page format={escaped(f'{form}/{model}/{role}/{spec.tokens_per_state}')}"
    if role == "INDEXER":
        content = spec.state_content_size_bytes
        if content != 132:
            return f"opaque-page format={escaped(f'{form}/{role}')}"
        # 128 bytes of fp8 and one float32 (`indexer_k_quant_and_cache`).
        return f"index key=128 scale=4 format={escaped(form)}"
    return f"latent format={escaped(form)}"


def _states(spec: Any) -> str:
    """One run of bytes per layer, for the rank that wrote it (or for all, where every rank has the same)."""
    parts = "+".join(
        f"{'x'.join(map(str, shape))}:{_name(dtype)}"
        for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
    )
    kind = getattr(spec.mamba_type, "name", str(spec.mamba_type))
    form = escaped(f"{kind}/{parts}/conv:{_conv_order()}")
    replicated = int(bool(getattr(spec, "tp_replicated", False)))
    return f"states replicated={replicated} whole:bytes={spec.state_content_size_bytes},format={form}"


def _conv_order() -> str:
    """Whether a convolution's window is `[rows, channels]` (SD) or `[channels, rows]` (DS)."""
    from vllm.model_executor.layers.mamba.mamba_utils import get_conv_state_layout

    return str(get_conv_state_layout())


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def escaped(text: str) -> str:
    """As a format stands in a packing."""
    plain = "._-+/:[]()"
    return "".join(
        chr(byte) if chr(byte).isascii() and (chr(byte).isalnum() or chr(byte) in plain) else f"%{byte:02X}"
        for byte in text.encode()
    )
