"""What this shim serves, and the reason for everything that it refuses (I10).

Refused means: the engine runs as if Pillion were not there, and the log says why, once. Both halves ask here,
so that they decide alike.
"""

from collections.abc import Callable
from typing import Any, cast

from pillion.vllm import device, identity
from pillion.vllm import groups as registered
from pillion.vllm.hits import FULL, STATE, WINDOW, Group, Hits

FIRST_VERSION = (0, 30)
LAST_VERSION = (0, 33)
STRONG_HASHES = ("sha256", "sha256_cbor")
# Drafters with layers in the KV cache, whose KV of a token depends on at most the token after it.
DRAFTERS = ("eagle", "eagle3", "mtp", "draft_model")

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


def refusal(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """Why this engine cannot be served, or None."""
    for check in (_version, _platform, _cuda, _parallel, _hashes, _model, _groups, _memory):
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
    """Why engines on this platform are not served, or None."""
    if device.on_cpu() or device.on_cuda():
        return None
    return f"engines on {device.platform().device_name} are not served: expected CPU or CUDA"


def _platform(_vllm_config: Any, _kv: Any) -> str | None:
    return platform_refusal()


def _cuda(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """What only CUDA engines can be configured for."""
    if not device.on_cuda():
        return None
    version, model = vllm_version() or FIRST_VERSION, vllm_config.model_config
    if version < (0, 32) and not getattr(model, "disable_cascade_attn", True):
        # `get_num_common_prefix_blocks` takes `ref_cnt == number of requests` for "every request shares this
        # block", which a hold's extra reference makes untrue: cascade attention would read another request's
        # prefix. It is off by default, and gone in 0.32.
        return (
            "cascade attention miscounts blocks that a connector holds: leave --no-disable-cascade-attn away"
        )
    if version < (0, 33) and (
        getattr(model, "enable_sleep_mode", False) or getattr(model, "enable_cumem_allocator", False)
    ):
        # `Worker.sleep` and `Worker.discard` unmap the KV cache and `Worker.wake_up` puts other memory under
        # the same addresses. Before 0.33 no worker's connector hears of it in any way; only the scheduler's
        # hears `reset_cache`, from `EngineCore._reset_caches`. The sidecar would go on with memory that is
        # not the engine's any more. What makes the memory unmappable is the cumem allocator, which sleep
        # mode switches on and which `sleep` works with wherever it is on.
        return (
            f"vLLM {version[0]}.{version[1]} unmaps the KV cache in sleep mode without telling connectors: "
            "use 0.33 or later, or leave --enable-sleep-mode and --enable-cumem-allocator away"
        )
    modes = {str(vllm_config.cache_config.cache_dtype).lower()}
    for group in kv_cache_config.kv_cache_groups:
        modes.add(getattr(getattr(group.kv_cache_spec, "kv_quant_mode", None), "name", "").lower())
    if any(mode.startswith("nvfp4") for mode in modes):
        # FlashInfer keeps a page's data and its scales apart, and swizzles the scales as the kernel wants them:
        # where a byte lies does not follow from [H, N, C], and the records are by [H, N, C].
        return "NVFP4 pages are not laid out by head and token: not served yet"
    return None


def may_split_blocks(vllm_config: Any) -> bool:
    """Whether the attention backend may have to split the blocks that the user asked for into kernel blocks.

    Block-first blocks are never split (`prepare_kernel_block_sizes`), and nothing keeps vLLM from running a
    backend with a block size that it does not know then: FlashInfer has 16, 32 and 64, where it has no more.
    Sizes that vLLM chose are the backend's own.
    """
    cache = vllm_config.cache_config
    if not getattr(cache, "user_specified_block_size", False) or cache.block_size in (16, 32, 64):
        return False
    asked = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    return getattr(asked, "name", asked) not in ("FLASH_ATTN", "TRITON_ATTN")  # any multiple of 16


def _parallel(vllm_config: Any, _kv: Any) -> str | None:
    parallel = vllm_config.parallel_config
    if getattr(parallel, "enable_fault_tolerance", False):
        # A rank's failed step takes its reports about jobs along (0.33): a load would never end.
        return "fault tolerance (enable_fault_tolerance) loses what ranks report: not served yet"
    if parallel.tensor_parallel_size > 1:
        executor = parallel.distributed_executor_backend
        if executor not in ("mp", "uni") or getattr(parallel, "nnodes", 1) != 1:
            # The sidecars of ranks on other machines cannot be reached from here.
            return f"tensor parallelism by the executor {executor}: expected mp on one machine"
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, name, 1) or 1
        if size != 1:
            return f"{name} is {size}: not served yet"
    return None


def tensor_parallel_rank(world: int) -> int:
    """Of the worker that this process is."""
    if world == 1:
        return 0
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


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
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    groups = kv_cache_config.kv_cache_groups
    _, hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    told = getattr(kv_cache_config, "hash_block_size", None)
    if told not in (None, hash_tokens):
        return f"block hashes cover {told} tokens, expected {hash_tokens}"
    for group in groups:
        if group.kv_cache_spec.block_size % hash_tokens:
            return f"block hashes cover {hash_tokens} tokens and blocks {group.kv_cache_spec.block_size}: expected a divisor"
    return None


def _model(vllm_config: Any, _kv: Any) -> str | None:
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        return "KV scales are computed at run time and are not in the cache: give fixed scales"
    if getattr(vllm_config.model_config, "is_diffusion", False):
        return "diffusion models rewrite their KV"
    if getattr(vllm_config.model_config, "runner_type", "generate") != "generate":
        return f"models that generate are served, this is a {vllm_config.model_config.runner_type} runner"
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        # `update_weights` changes the weights in place and resets nothing; a caller who pauses with
        # `clear_cache=False`, or resets the prefix cache without `reset_connector`, would load KV of other
        # weights, and store KV of unknown weights under the name of the files'.
        return "weights are replaced while the engine runs (weight_transfer_config): not served yet"
    return _drafter(vllm_config)


def _drafter(vllm_config: Any) -> str | None:
    config = vllm_config.speculative_config
    if config is None or config.method in identity.MODEL_FREE_DRAFTERS:
        return None
    if config.method not in DRAFTERS:
        served = ", ".join((*identity.MODEL_FREE_DRAFTERS, *DRAFTERS))
        return f"speculative decoding with {config.method!r} is not served yet: expected one of {served}"
    if getattr(vllm_config, "num_prefill_lookahead_tokens", 1) > 1:
        # Its modules rewrite the last tokens' KV in the next step: what a block holds is not final when it is full.
        return "MTP with several modules rewrites KV that was computed: not served yet"
    for name in ("num_speculative_tokens_per_batch_size", "parallel_drafting"):
        if getattr(config, name, None):
            return f"speculative decoding with {name} is not served yet"
    return None


def layer_spec(group: Any) -> Any:
    """A group's KV cache spec. Where its layers' pages differ, the first layer's: all that the manager looks at is equal.

    vLLM gives the scheduler that one anyway (`generate_scheduler_kv_cache_config`).
    """
    layers = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return next(iter(layers.values())) if layers else group.kv_cache_spec


def kind_of(spec: Any) -> int | None:
    """How vLLM's manager of this spec treats blocks; None for what is not served.

    By the class's very name: subclasses (`RSWASpec`, `SinkFullAttentionSpec`, `HiddenStateCacheSpec`, …) have
    managers of their own, or say something else about their blocks.
    """
    return _KINDS.get(type(spec).__name__)


_KINDS = {
    "FullAttentionSpec": FULL,
    "MLAAttentionSpec": FULL,
    "SlidingWindowSpec": WINDOW,
    "MambaSpec": STATE,
}


def _groups(vllm_config: Any, kv_cache_config: Any) -> str | None:
    groups = kv_cache_config.kv_cache_groups
    if not groups:
        return "the model has no KV cache"
    for number, group in enumerate(groups):
        if (reason := _group(vllm_config, group)) is not None:
            return f"KV cache group {number}: {reason}" if len(groups) > 1 else reason
    return None


def _group(vllm_config: Any, group: Any) -> str | None:
    if getattr(group, "host_resident", False) or not getattr(group, "enable_kv_transfer", True):
        return "the KV cache group is not transferable"
    if getattr(getattr(group, "role", None), "value", "default") != "default":
        return f"the KV cache group is {group.role.value}: not served yet"
    specs = list(getattr(group.kv_cache_spec, "kv_cache_specs", {}).values()) or [group.kv_cache_spec]
    for spec in specs:
        if (reason := _spec(vllm_config, spec)) is not None:
            return reason
    return None


def _spec(vllm_config: Any, spec: Any) -> str | None:
    kind, name = kind_of(spec), type(spec).__name__
    if kind is None:
        return f"KV cache spec {name}: expected one of {', '.join(_KINDS)}"
    if not getattr(spec, "prefix_cacheable", True) or int(getattr(spec, "prefix_replay_tokens", 0)):
        # Buffers that hits rebuild, in ways that differ by model.
        return "the KV cache group is not prefix cacheable as it is"
    if getattr(spec, "non_causal", False):
        return "the model attends non-causally: a prefix's KV depends on what follows"
    if kind == STATE:
        return _state(vllm_config, spec)
    if getattr(spec, "tokens_per_state", 1) != 1:
        return f"{spec.tokens_per_state} tokens share a state of the KV cache: not served yet"
    if kind == WINDOW and (spec.sliding_window < 2 or getattr(spec, "extra_retained_tokens", 0)):
        return f"a sliding window of {spec.sliding_window} tokens with others behind it: not served yet"
    return None


def _state(vllm_config: Any, spec: Any) -> str | None:
    cache = vllm_config.cache_config
    if spec.mamba_cache_mode not in ("align", "all"):
        return f"mamba_cache_mode {spec.mamba_cache_mode}: states of prefixes are not kept"
    if vllm_config.speculative_config is not None or spec.num_speculative_blocks:
        # Which block holds the state of the accepted tokens is known in the worker only, after the step.
        return "speculative decoding with recurrent states: not served yet"
    for name in ("use_replayssm", "use_kda_recoverssm"):
        if getattr(cache, name, False):
            return f"{name} keeps states that are not up to date"
    return None


def hits(vllm_config: Any, kv_cache_config: Any) -> Hits:
    """What hits of this engine need; only for an engine that is not refused."""
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    _, hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    drafted = _drafted(vllm_config, kv_cache_config)
    groups = []
    for group, is_drafted in zip(kv_cache_config.kv_cache_groups, drafted, strict=True):
        spec = layer_spec(group)
        size = spec.block_size
        groups.append(
            Group(
                kind=cast(int, kind_of(spec)),
                block_tokens=size,
                hashes=size // hash_tokens,
                window_blocks=_window(spec),
                block_bytes=spec.page_size_bytes * len(group.layer_names),
                dense_states=getattr(spec, "mamba_cache_mode", "") == "all",
                proof_blocks=int(is_drafted),
            )
        )
    return Hits(groups, hash_tokens)


def _drafted(vllm_config: Any, kv_cache_config: Any) -> list[bool]:
    """The groups of which vLLM finds a block more than a hit has, as `KVCacheCoordinator` marks them."""
    config, groups = vllm_config.speculative_config, kv_cache_config.kv_cache_groups
    drops = getattr(config, "use_eagle_block_drop", getattr(config, "use_eagle", None))
    if drops is None or not drops():
        return [False] * len(groups)
    marked = [bool(getattr(group, "is_eagle_group", False)) for group in groups]
    return marked if any(marked) else [True] * len(groups)


def _window(spec: Any) -> int:
    """As `SlidingWindowManager._contiguous_blocks_for_hit`: the next token sees itself and window - 1 before it."""
    if kind_of(spec) != WINDOW:
        return 0
    return -(-(int(spec.sliding_window) - 1) // int(spec.block_size))


def _memory(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """What cannot be registered."""
    return registered.refusal(vllm_config, kv_cache_config)
