"""Our counters in vLLM's own metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pillion.vllm import PillionConnector
from pillion.vllm.stats import COUNTERS, PillionPromMetrics, PillionStats


def test_ranks_and_halves_add_up() -> None:
    worker, scheduler = PillionStats(), PillionStats()
    worker.add("errors")
    scheduler.add("loaded_tokens", 96)
    scheduler.add("errors", 2)
    total = worker.aggregate(scheduler)
    assert total.to_dict() == {"errors": 3, "loaded_tokens": 96}
    assert total.reduce() == {"pillion_loaded_tokens": 96, "pillion_errors": 3}


def test_take_gives_each_count_once() -> None:
    stats = PillionStats()
    assert stats.take() is None and stats.is_empty()
    stats.add("hits")
    taken = stats.take()
    stats.add("hits")
    assert taken is not None and taken.data == {"hits": 1} and stats.data == {"hits": 1}
    stats.reset()
    assert stats.is_empty()


def test_plain_data_becomes_stats_in_the_api_server() -> None:
    stats = PillionConnector.build_kv_connector_stats({"hits": 2})
    assert isinstance(stats, PillionStats) and stats.data == {"hits": 2}
    assert PillionConnector.build_kv_connector_stats().is_empty()


def test_prometheus_counters_per_engine() -> None:
    class Config:
        kv_transfer_config = None

    registry = CollectorRegistry()
    types = {Gauge: Gauge, Histogram: Histogram, Counter: lambda **kw: Counter(registry=registry, **kw)}
    metrics = PillionConnector.build_prom_metrics(
        Config(), types, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]}
    )
    assert isinstance(metrics, PillionPromMetrics)
    metrics.observe({"loaded_tokens": 96, "of_a_later_version": 1}, 1)
    metrics.observe({"loaded_tokens": 4}, 1)
    text = generate_latest(registry).decode()
    assert 'vllm:pillion_loaded_tokens_total{engine="1",model_name="m"} 100.0' in text
    assert 'vllm:pillion_loaded_tokens_total{engine="0",model_name="m"} 0.0' in text
    assert all(f"vllm:pillion_{name}_total" in text for name in COUNTERS)
