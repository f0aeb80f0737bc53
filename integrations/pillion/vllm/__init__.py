"""Pillion's KV connector for vLLM 0.30 to 0.33.

vLLM imports this module in every process that builds a configuration, so it imports nothing by itself:
`PillionConnector` is resolved on first use. Two ways lead here: `"kv_connector_module_path": "pillion.vllm"`
in `--kv-transfer-config`, or the `vllm.general_plugins` entry point, which calls `register`.
"""

from typing import Any

__all__ = ["PillionConnector", "register"]

NAME = "PillionConnector"


def __getattr__(name: str) -> Any:
    if name == NAME:
        from pillion.vllm.connector import PillionConnector

        return PillionConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Makes the name `PillionConnector` known to vLLM; safe to call again (vLLM does, once per process)."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME in getattr(KVConnectorFactory, "_registry", {}):
        return
    KVConnectorFactory.register_connector(NAME, "pillion.vllm.connector", NAME)
