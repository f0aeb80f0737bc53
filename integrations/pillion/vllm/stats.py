"""Pillion's counters in vLLM's own metrics and log lines.

One flat dict of counters per step and half; vLLM adds them up over ranks and halves and hands the sums to
Prometheus in the API server.
"""

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

# Counter (name in the data) -> documentation. The Prometheus name is `vllm:pillion_<name>_total`.
COUNTERS: dict[str, str] = {
    "lookups": "Requests for which Pillion was asked.",
    "hits": "Requests for which Pillion promised tokens.",
    "hits_of_other_tp": "Of these, requests whose blocks engines of another tensor-parallel size stored.",
    "lookup_timeouts": "Requests that ran uncached because no lease came in time.",
    "loaded_tokens": "Tokens whose KV Pillion loaded into the engine.",
    "loads": "Loads that succeeded.",
    "load_failures": "Loads that failed or missed their deadline; their requests were recomputed.",
    "saved_blocks": "Blocks newly stored.",
    "saves": "Save jobs that ended well.",
    "save_failures": "Save jobs that failed, were cancelled, or missed their deadline.",
    "held_skips": "Times that a load or save was left out or cut because too many blocks were held.",
    "errors": "Errors inside the connector that became a miss.",
}


def _empty() -> dict[str, Any]:
    return {}


@dataclass
class PillionStats(KVConnectorStats):
    """Counters since the last report; a name that is missing counts 0."""

    def add(self, name: str, count: int = 1) -> None:
        """Counts `count` more of `name`."""
        self.data[name] = self.data.get(name, 0) + count

    def reset(self) -> None:
        """Forgets everything."""
        self.data = _empty()

    def take(self) -> "PillionStats | None":
        """What was counted since the last call, or None where that is nothing."""
        if not self.data:
            return None
        taken = PillionStats(data=self.data)
        self.data = _empty()
        return taken

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds another rank's or half's counters to these."""
        for name, count in other.data.items():
            self.add(name, int(count))
        return self

    def reduce(self) -> dict[str, int | float]:
        """The counters, as vLLM logs them."""
        return {f"pillion_{name}": self.data[name] for name in COUNTERS if name in self.data}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data


class PillionPromMetrics(KVConnectorPromMetrics):
    """Registers one Prometheus counter per entry of `COUNTERS`, labelled as vLLM labels its own."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[str, dict[int, Any]] = {}
        for name, documentation in COUNTERS.items():
            counter = self._counter_cls(
                name=f"vllm:pillion_{name}", documentation=documentation, labelnames=labelnames
            )
            self._counters[name] = {
                engine: counter.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds one report's counters to the engine's."""
        for name, count in transfer_stats_data.items():
            per_engine = self._counters.get(name)
            if per_engine is not None and count > 0:
                per_engine[engine_idx].inc(count)
