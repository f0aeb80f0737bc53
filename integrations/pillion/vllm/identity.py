"""The namespace: everything besides the block hashes that must agree before KV bytes may be reused.

Both halves of the shim build the same fields, on every start, from files and configuration alone. Other
weights under the same path give another namespace as far as the samples can tell: each tensor is sampled in
at least two places, small tensors and small files are read whole. Weights that differ only between the
samples are not told apart; `model_id` in the shim's configuration replaces the fingerprint.

Each KV cache group is a namespace of its own. Adapters (LoRA) are not in here but in every block's key: see
`adapters`.
"""

import glob
import hashlib
import json
import os
import struct
from types import SimpleNamespace
from typing import Any, Protocol

from pillion.vllm import device
from pillion.vllm.config import Settings

FORMAT = "2"  # of this set of fields and of the fingerprint
_SAMPLES_TOTAL = 20_000
_SAMPLE_BYTES = 64
_WHOLE_TENSOR_BYTES = 4096
_WHOLE_FILE_BYTES = 16 << 20
_HEADER_BYTES_MAX = 256 << 20
# Drafters that propose from the text alone: no layers in the KV cache, no weights.
MODEL_FREE_DRAFTERS = ("ngram", "ngram_gpu", "suffix")
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.npz", "*.tensors")
_CONFIGS = ("config.json", "params.json", "hf_quant_config.json", "quantize_config.json", "*.py")
# These kinds of RoPE compute the same angles whatever the engine's context length is.
_ROPE_OF_FIXED_LENGTH = ("default", "linear", "llama3", "yarn", "mrope")


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


class UnknownModel(Exception):
    """The weights cannot be found or read, so that the model has no fingerprint."""


def namespaces(vllm_config: Any, kv_cache_config: Any, settings: Settings) -> list[dict[str, str]]:
    """The readable form of each group's namespace.

    Raises `UnknownModel` where no `model_id` is given and no weights are found.
    """
    model = f"id:{settings.model_id}" if settings.model_id else "sha256:" + fingerprint(vllm_config)
    drafter = _drafter(vllm_config, settings)
    return [_fields(vllm_config, group, model, drafter) for group in kv_cache_config.kv_cache_groups]


def has_drafter(vllm_config: Any) -> bool:
    """Whether some layers of the KV cache are a drafter's."""
    config = vllm_config.speculative_config
    return config is not None and config.method not in MODEL_FREE_DRAFTERS


def _drafter(vllm_config: Any, settings: Settings) -> str:
    """Whose KV is in the blocks beside the model's, by its weights as well."""
    if not has_drafter(vllm_config):
        return "none"
    config = vllm_config.speculative_config
    if settings.model_id:
        return f"{config.method} id:{settings.model_id}"
    load = getattr(config, "draft_load_config", None) or vllm_config.load_config
    as_model = SimpleNamespace(model_config=config.draft_model_config, load_config=load)
    return f"{config.method} sha256:{fingerprint(as_model)}"


def _fields(vllm_config: Any, group: Any, model: str, drafter: str) -> dict[str, str]:
    from pillion.vllm.support import layer_spec, vllm_version

    spec = layer_spec(group)
    cache = vllm_config.cache_config
    major, minor = vllm_version() or (0, 0)
    names = sorted(group.layer_names)
    return {
        "format": FORMAT,
        "engine": f"vllm-{major}.{minor}",
        "model": model,
        "model_dtype": str(vllm_config.model_config.dtype),
        "quantization": str(vllm_config.model_config.quantization),
        "cache_dtype": f"{cache.cache_dtype}/{_dtype(spec)}"
        + (
            f" but {','.join(map(str, skip))}"
            if (skip := getattr(cache, "kv_cache_dtype_skip_layers", None))
            else ""
        ),
        "page": _page(spec),
        "backend": backend(vllm_config, spec),
        "block_tokens": str(spec.block_size),
        "group": f"{type(spec).__name__} window={getattr(spec, 'sliding_window', None)} "
        f"chunk={getattr(spec, 'attention_chunk_size', None)} layers={len(names)} "
        f"sha256:{hashlib.sha256(chr(10).join(names).encode()).hexdigest()[:32]}",
        "hash_algorithm": str(cache.prefix_caching_hash_algo),
        "hash_seed": hash_seed(str(cache.prefix_caching_hash_algo)),
        "drafter": drafter,
        "shard": f"1/{shards(vllm_config, spec)}",
    }


def shards(vllm_config: Any, spec: Any) -> int:
    """Into how many different parts tensor parallelism divides a block of this group."""
    world = int(vllm_config.parallel_config.tensor_parallel_size)
    if world == 1 or _is_state(spec):
        return world  # a state is one opaque run: what part of it a rank holds is not known here
    if type(spec).__name__ == "MLAAttentionSpec":
        return 1  # every rank holds the same latents
    heads = int(vllm_config.model_config.get_total_num_kv_heads())
    # More ranks than heads: vLLM gives each head to as many ranks that follow each other.
    return heads if spec.num_kv_heads == 1 and heads < world and world % heads == 0 else world


def _is_state(spec: Any) -> bool:
    return hasattr(spec, "mamba_type")


def _dtype(spec: Any) -> str:
    return ",".join(map(str, spec.dtypes)) if _is_state(spec) else str(spec.dtype)


def _page(spec: Any) -> str:
    if _is_state(spec):
        # What the state is and where its parts lie: any change of either is another page.
        kind = getattr(spec.mamba_type, "name", spec.mamba_type)
        conv = os.environ.get("VLLM_SSM_CONV_STATE_LAYOUT", "default")
        return (
            f"{kind} {spec.shapes} {spec.mamba_cache_mode} conv={conv} "
            f"replicated={getattr(spec, 'tp_replicated', False)}"
        )
    # Not how many heads a rank has: records are of whole heads, and other ranks may load them (see `shards`).
    content = spec.state_content_size_bytes
    slots = getattr(spec, "num_head_slots", None)
    cells = f"C{content}" if slots is None else f"slots={slots} C{content}/{spec.num_kv_heads}"
    if slots == 2:
        cells = f"slots=2 C{content // spec.num_kv_heads}"  # a plane of all heads' keys, one of their values
    return f"N{spec.num_states} {cells} quant={getattr(spec, 'kv_quant_mode', None)}"


def of_shard(fields: dict[str, str], index: int, count: int) -> dict[str, str]:
    """The namespace of one of `count` equal parts of every block."""
    return {**fields, "shard": f"{index + 1}/{count}"}


def of_rank(fields: dict[str, str], rank: int, world: int) -> dict[str, str]:
    """The namespace of a rank's part of every block: the heads that tensor parallelism gives it."""
    copies, _ = twins(fields, rank, world)
    return of_shard(fields, rank // copies, world // copies)


def twins(fields: dict[str, str], rank: int, world: int) -> tuple[int, int]:
    """How many ranks hold the same part as this one, itself included, and its number among them."""
    copies = world // int(fields["shard"].rpartition("/")[2])
    return copies, rank % copies


def backend(vllm_config: Any, spec: Any) -> str:
    """The attention backend whose byte format the pages have, with the instruction set of its packing.

    On CUDA the pages of every backend that is served hold [K | V] by head and token, or what `page` and
    `cache_dtype` already tell apart (`AttentionBackend.customize_spec`). So the backend that was asked for is
    enough; which one vLLM chose by itself is known in the worker only.
    """
    if device.on_cuda():
        asked = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
        return f"CUDA/{getattr(asked, 'name', asked) or 'auto'}"
    if _is_state(spec):
        return "CPU/state"
    import torch
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(
        vllm_config.model_config.dtype, spec.block_size, spec.head_size, vllm_config.cache_config.cache_dtype
    )
    avx512 = bool(torch.cpu._is_avx512_supported())
    return f"CPU_ATTN/{isa}{'+avx512' if avx512 else ''}"


def hash_seed(algorithm: str) -> str:
    """A digest of the seed that vLLM's first block hash derives from (`PYTHONHASHSEED` changes it)."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed

    seed = resolve_none_hash_seed(get_hash_fn_by_name(algorithm))
    return "sha256:" + hashlib.sha256(str(seed).encode()).hexdigest()[:32]


def fingerprint(vllm_config: Any) -> str:
    """Hex SHA-256 over the model's configuration and samples of its weights."""
    model = vllm_config.model_config
    root = weights_path(vllm_config)
    digest = hashlib.sha256()
    _add(digest, "format", FORMAT.encode())
    for key, value in _options(vllm_config).items():
        _add(digest, f"option {key}", value.encode())
    if os.path.isfile(root):
        files, configs = [root], []
    else:
        files, configs = _weight_files(root), _matching(root, _CONFIGS)
    if not files:
        raise UnknownModel(f"no weight files in {root}: set model_id in kv_connector_extra_config")
    if getattr(model, "hf_config_path", None) and os.path.isdir(model.hf_config_path):
        configs = [*configs, *_matching(model.hf_config_path, _CONFIGS)]
    try:
        for path in configs:
            with open(path, "rb") as file:
                _add(digest, f"config {os.path.basename(path)}", file.read())
        tensors = sum(len(_header(path)[0]) for path in files if path.endswith(".safetensors"))
        samples = min(64, max(2, _SAMPLES_TOTAL // max(1, tensors)))
        for path in files:
            _add_weights(digest, path, samples)
    except (OSError, ValueError, struct.error) as error:
        raise UnknownModel(f"{root}: {error}: set model_id in kv_connector_extra_config") from error
    return digest.hexdigest()


def _options(vllm_config: Any) -> dict[str, str]:
    """What changes the KV of the same files: overrides, load format, lengths where RoPE depends on them."""
    model, load = vllm_config.model_config, vllm_config.load_config
    overrides = getattr(model, "hf_overrides", None) or {}
    if callable(overrides):
        overrides = {"callable": f"{overrides.__module__}.{overrides.__qualname__}"}
    options = {
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "load_format": str(getattr(load, "load_format", "auto")),
        "hf_overrides": json.dumps(overrides, sort_keys=True, default=str),
    }
    if not _rope_is_fixed(getattr(model, "hf_text_config", None) or getattr(model, "hf_config", None)):
        options["max_model_len"] = str(model.max_model_len)
    return options


def _rope_is_fixed(hf_config: Any) -> bool:
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(hf_config, name, None)
        if isinstance(rope, dict):
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind not in _ROPE_OF_FIXED_LENGTH:
                return False
    return True


def weights_path(vllm_config: Any) -> str:
    """The directory (or single file) that holds the weights on this machine."""
    model = vllm_config.model_config
    for path in (getattr(model, "model_weights", "") or "", model.model):
        if path and os.path.exists(path):
            return os.path.realpath(path)
    try:
        from huggingface_hub import snapshot_download

        return str(
            snapshot_download(
                model.model,
                revision=model.revision,
                cache_dir=getattr(vllm_config.load_config, "download_dir", None),
                local_files_only=True,
            )
        )
    except Exception as error:
        raise UnknownModel(
            f"the weights of {model.model!r} are not found on this machine ({type(error).__name__}): "
            "set model_id in kv_connector_extra_config"
        ) from error


def _matching(root: str, patterns: tuple[str, ...]) -> list[str]:
    return sorted(
        path for pattern in patterns for path in glob.glob(os.path.join(glob.escape(root), pattern))
    )


def _weight_files(root: str) -> list[str]:
    return _matching(root, ("*.safetensors",)) or _matching(root, _OTHER_WEIGHTS)


def _add(digest: _Hash, name: str, data: bytes) -> None:
    """Adds a named, length-prefixed field, so that no two sequences of fields look alike."""
    label = name.encode()
    digest.update(struct.pack("<QQ", len(label), len(data)))
    digest.update(label)
    digest.update(data)


def _add_weights(digest: _Hash, path: str, samples: int) -> None:
    size = os.path.getsize(path)
    name = os.path.basename(path)
    _add(digest, f"file {name}", str(size).encode())
    with open(path, "rb", buffering=0) as file:
        fd = file.fileno()
        if size <= _WHOLE_FILE_BYTES:
            _add(digest, "whole", _read(fd, 0, size))
        elif path.endswith(".safetensors"):
            tensors, header, base = _header(path)
            _add(digest, "header", header)
            for begin, end in tensors:
                _sample(digest, fd, (base + begin, base + end), samples, _SAMPLE_BYTES)
        else:
            _sample(digest, fd, (0, size), 256, 4096)


def _sample(digest: _Hash, fd: int, span: tuple[int, int], samples: int, sample_bytes: int) -> None:
    """Adds evenly spread samples of a range of bytes, its first and last ones included; a short range whole."""
    begin, end = span
    length = end - begin
    if length <= max(_WHOLE_TENSOR_BYTES, samples * sample_bytes):
        _add(digest, "bytes", _read(fd, begin, length))
        return
    step = (length - sample_bytes) // (samples - 1)
    for index in range(samples):
        last = index == samples - 1
        offset = length - sample_bytes if last else index * step
        _add(digest, str(offset), _read(fd, begin + offset, sample_bytes))


def _read(fd: int, offset: int, length: int) -> bytes:
    parts = []
    while length > 0:
        part = os.pread(fd, length, offset)
        if not part:
            raise ValueError(f"expected {length} more bytes at offset {offset}: the file is cut short")
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


def _header(path: str) -> tuple[list[tuple[int, int]], bytes, int]:
    """Byte ranges of a safetensors file's tensors, its header, and where the data begins."""
    with open(path, "rb", buffering=0) as file:
        fd = file.fileno()
        (length,) = struct.unpack("<Q", _read(fd, 0, 8))
        if length > _HEADER_BYTES_MAX:
            raise ValueError(f"{os.path.basename(path)}: a header of {length} bytes is no safetensors header")
        header = _read(fd, 8, length)
    entries = json.loads(header)
    ranges = [
        tuple(entry["data_offsets"]) for name, entry in sorted(entries.items()) if name != "__metadata__"
    ]
    return [(int(begin), int(end)) for begin, end in ranges], header, 8 + length
