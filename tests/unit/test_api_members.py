"""A new vLLM fails here first: the connector API is experimental and changes between releases."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import vllm

from pillion.vllm import PillionConnector, support
from unit.api_members import members

DATA = Path(__file__).parent / "data"
RECORDED = {
    path.stem.removeprefix("members-"): json.loads(path.read_text()) for path in DATA.glob("members-*.json")
}

# What the connector leaves to vLLM's base class, and why.
INHERITED = {
    "role": "constant",
    "bind_connector_metadata": "the base class keeps the step's metadata",
    "clear_connector_metadata": "see bind_connector_metadata",
    "has_connector_metadata": "see bind_connector_metadata",
    "bind_kv_cache_manager": "calls bind_gpu_block_pool",
    "get_finished": "get_transfer_results replaces it",
    "get_block_ids_with_load_errors": "failures are told by request, never by block ids",
    "get_kv_connector_kv_cache_events": "events come from the sidecar",
    "get_handshake_metadata": "a child of MultiConnector must not hide its siblings' handshake",
    "set_xfer_handshake_metadata": "no handshake",
    "set_xfer_handshake_metadata_pp_aware": "no handshake",
    "get_finished_count": "every rank reports",
    "set_host_xfer_buffer_ops": "no host buffers inside the engine",
    "finish_forward": "nothing is read during the forward pass",
    "reset_capture_state": "nothing is captured",
    "register_finished_partial_tail": "blocks that are not full are not saved",
    "supports_divergent_local_hybrid_hits": "a hit is what all groups agree on",
    "get_loaded_kv_cache_group_ids": "all groups",
    "get_external_cache_hit_sources": "_cache_hit_source says it",
}


def running() -> str:
    return ".".join(vllm.__version__.split(".")[:2])


def test_this_vllm_has_the_recorded_members() -> None:
    assert running() in RECORDED, (
        f"vLLM {running()} is new: compare its KVConnectorBase_V1 with the last one, then record it "
        "(tests/unit/api_members.py)"
    )
    assert members(Path(vllm.__file__).parent) == RECORDED[running()]


def test_unpacked_source_of_033_has_the_recorded_members() -> None:
    source = os.environ.get("PILLION_VLLM_033")
    if source:
        assert members(Path(source) / "vllm") == RECORDED["0.33"]


def test_every_served_version_is_recorded() -> None:
    (major, first), (_, last) = support.FIRST_VERSION, support.LAST_VERSION
    assert set(RECORDED) == {f"{major}.{minor}" for minor in range(first, last + 1)}


@pytest.mark.parametrize("version", sorted(RECORDED))
def test_every_member_is_ours_or_left_to_vllm_on_purpose(version: Any) -> None:
    ours = set(vars(PillionConnector))
    public = {name for name in RECORDED[version]["KVConnectorBase_V1"] if not name.startswith("_")}
    assert public - ours - set(INHERITED) == set()


@pytest.mark.parametrize("version", sorted(RECORDED))
def test_our_methods_take_what_vllm_passes(version: Any) -> None:
    """Same parameter names in the same order: vLLM passes some by name."""
    import inspect

    for name, signature in RECORDED[version]["KVConnectorBase_V1"].items():
        method = vars(PillionConnector).get(name)
        if method is None or "@property" in signature or not signature.startswith(("(", "@")):
            continue
        function = method.__func__ if isinstance(method, classmethod) else method
        theirs = signature[signature.index("(") + 1 :]
        ours = [p for p in inspect.signature(function).parameters if p not in ("self", "cls", "kwargs")]
        positions = [theirs.find(f"{parameter}:") for parameter in ours]
        assert -1 not in positions and positions == sorted(positions), (
            f"{name}{signature} but ours takes {ours}"
        )
        assert ("@classmethod" in signature) == isinstance(method, classmethod), name
