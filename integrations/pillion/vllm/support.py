"""What this shim serves, and the reason for everything that it refuses (I10).

Refused means: the engine runs as if Pillion were not there, and the log says why, once. Both halves ask here,
so that they decide alike.
"""

from collections.abc import Callable
from typing import Any

FIRST_VERSION = (0, 30)
LAST_VERSION = (0, 33)
STRONG_HASHES = ("sha256", "sha256_cbor")
# Drafters that propose from the text alone: no layers in the KV cache, no weights.
MODEL_FREE_DRAFTERS = ("ngram", "ngram_gpu", "suffix")

try:  # vLLM 0.32 and later split cache hits by the tier that supplied them
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    HOST_TIER: Any = CacheHitSource.HOST
except ImportError:
    HOST_TIER = None

Check = Callable[[Any, Any], str | None]


def vllm_version() -> tuple[int, int] | None:
    """(major, minor) of the vLLM that runs this process; None where it does not say."""
    import vllm

    parts = str(getattr(vllm, "__version__", "")).split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (IndexError, ValueError):
        return None


def on_cpu() -> bool:
    """Whether the engine computes on the CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def refusal(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """Why this engine cannot be served, or None."""
    for check in (_version, _platform, _parallel, _hashes, _model, _groups, _memory):
        if (reason := check(vllm_config, kv_cache_config)) is not None:
            return reason
    return None


def _version(_vllm_config: Any, _kv: Any) -> str | None:
    version = vllm_version()
    if version is not None and FIRST_VERSION <= version <= LAST_VERSION:
        return None
    first, last = (".".join(map(str, v)) for v in (FIRST_VERSION, LAST_VERSION))
    return f"vLLM {first} to {last} is known to work, this is {version or 'of unknown version'}"


def platform_refusal() -> str | None:
    """Why engines on this platform are not served, or None.

    Before GPUs are: vLLM 0.30 and 0.31 take `ref_cnt == number of requests` for "every request shares this
    block" (`get_num_common_prefix_blocks`), which a hold's extra reference makes untrue. Attention backends
    with cascade attention (none on CPU) would then read another request's prefix.
    """
    return None if on_cpu() else "not yet on GPU: this release serves CPU engines"


def _platform(_vllm_config: Any, _kv: Any) -> str | None:
    return platform_refusal()


def _parallel(vllm_config: Any, _kv: Any) -> str | None:
    parallel = vllm_config.parallel_config
    for name in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, name, 1) or 1
        if size != 1:
            return f"{name} is {size}: one rank is served yet"
    return None


def _hashes(vllm_config: Any, kv_cache_config: Any) -> str | None:
    cache = vllm_config.cache_config
    algorithm = cache.prefix_caching_hash_algo
    if algorithm not in STRONG_HASHES:
        return (
            f"--prefix-caching-hash-algo {algorithm} is not collision resistant; "
            f"expected {' or '.join(STRONG_HASHES)}"
        )
    if not cache.enable_prefix_caching:
        return "prefix caching is off: vLLM then promises nothing about the KV of equal prefixes"
    hash_block = getattr(kv_cache_config, "hash_block_size", None)
    groups = kv_cache_config.kv_cache_groups
    if hash_block is not None and groups and hash_block != groups[0].kv_cache_spec.block_size:
        return (
            f"block hashes cover {hash_block} tokens and blocks {groups[0].kv_cache_spec.block_size}: "
            "expected the same"
        )
    return None


def _model(vllm_config: Any, _kv: Any) -> str | None:
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        return "KV scales are computed at run time and are not in the cache: give fixed scales"
    if getattr(vllm_config.model_config, "is_diffusion", False):
        return "diffusion models rewrite their KV"
    if getattr(vllm_config.model_config, "runner_type", "generate") != "generate":
        return f"models that generate are served, this is a {vllm_config.model_config.runner_type} runner"
    drafter = vllm_config.speculative_config
    if drafter is not None and getattr(drafter, "method", None) not in MODEL_FREE_DRAFTERS:
        return f"speculative decoding with {drafter.method!r} has KV of its own: not served yet"
    return None


def _groups(_vllm_config: Any, kv_cache_config: Any) -> str | None:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"{len(groups)} KV cache groups (hybrid model): one is served yet"
    group = groups[0]
    kind = type(group.kv_cache_spec).__name__
    if kind != "FullAttentionSpec":
        return f"KV cache spec {kind}: FullAttentionSpec is served yet"
    if getattr(group.kv_cache_spec, "non_causal", False):
        return "the model attends non-causally: a prefix's KV depends on what follows"
    if getattr(group, "is_eagle_group", False):
        return "a drafter's layers share the KV cache group: not served yet"
    if getattr(group, "host_resident", False) or not getattr(group, "enable_kv_transfer", True):
        return "the KV cache group is not transferable"
    return None


def _memory(_vllm_config: Any, kv_cache_config: Any) -> str | None:
    tensors = kv_cache_config.kv_cache_tensors
    if len(tensors) != 1:
        return f"{len(tensors)} KV cache tensors with different pages: one is served yet"
    tensor, group = tensors[0], kv_cache_config.kv_cache_groups[0]
    if getattr(tensor, "host_resident", False):
        return "the KV cache lies in a host-resident pool"
    if sorted(tensor.layers) != sorted(group.layer_names):
        return "layers share KV with layers outside their tensor"
    spec = group.kv_cache_spec
    if spec.page_size_bytes != spec.num_heads * spec.num_states * spec.state_content_size_bytes:
        return "pages are padded: not served yet"
    return None
