"""Counters in shared memory, and what the metrics read from them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest

from vllm_ssd.link.announcement import Announcement, new_engine_id
from vllm_ssd.link.counters import DRAFT_FIELDS, Counters, target_fields


def test_one_writes_and_another_reads() -> None:
    writer = Counters(("a", "b"))
    reader = Counters(("a", "b"), os.dup(writer.descriptor))
    writer.add("a")
    writer.add("a", 4)
    writer.set("b", -1)
    assert reader["a"] == 5
    assert reader.as_dict() == {"a": 5, "b": -1}
    assert Counters(("a", "b")).as_dict() == {"a": 0, "b": 0}


def test_there_are_counters_for_every_accepted_length() -> None:
    fields = target_fields(3)
    assert len(set(fields)) == len(fields)
    assert {"lookups_k0", "lookups_k3", "hits_k0", "hits_k3"} <= set(fields)
    assert "hits_k4" not in fields


class Engine:
    """The counters of an engine, which can be asked for."""

    def __init__(self, engine_id: str, num_speculative_tokens: int = 2) -> None:
        self.target, self.draft = Counters(target_fields(num_speculative_tokens)), Counters(DRAFT_FIELDS)
        descriptors = [self.target.descriptor, self.draft.descriptor]
        self._announcement = Announcement(engine_id, [], descriptors)

    def end(self) -> None:
        self._announcement.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """Start engines, which end with the test."""
    started: list[Engine] = []

    def start(*args: Any) -> Engine:
        started.append(Engine(*args))
        return started[-1]

    yield start
    for engine in started:
        engine.end()


def test_the_reader_tells_what_was_counted_and_what_was_added(start: Callable[..., Engine]) -> None:
    from vllm_ssd.metrics import CounterReader

    name = new_engine_id()
    reader = CounterReader(name, 2)
    assert reader.read() == reader.read_increase() == {}  # the engine is not there yet
    engine = start(name)
    engine.target.add("hits", 3)
    engine.draft.add("steps", 7)
    first = reader.read_increase()
    assert (first["hits"], first["steps"]) == (3, 7)
    engine.target.add("hits", 2)
    second = reader.read_increase()
    assert (second["hits"], second["steps"]) == (2, 0)
    assert reader.read()["hits"] == 5


def test_the_reader_keeps_what_an_engine_has_counted(start: Callable[..., Engine]) -> None:
    from vllm_ssd.metrics import CounterReader

    name = new_engine_id()
    engine = start(name)
    reader = CounterReader(name, 2)  # has mapped them, though nobody has read yet
    engine.target.add("hits", 2)
    engine.draft.add("steps", 3)
    engine.end()
    counted = reader.read()
    assert (counted["hits"], counted["steps"]) == (2, 3)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[prometheus_client.CollectorRegistry]:
    """In place of the process's own."""
    import vllm.v1.metrics.prometheus

    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    monkeypatch.setattr(vllm.v1.metrics.prometheus, "REGISTRY", registry)
    return registry


def start_frontend(start: Callable[..., Engine], model: str) -> None:
    """What vLLM's `PrometheusStatLogger` does first when an engine of this name starts."""
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics
    from vllm.v1.spec_decode.metrics import SpecDecodingProm

    from vllm_ssd.metrics import ssd_prometheus_class

    name = new_engine_id()
    target = start(name).target
    target.add("wait_ns", 1_500_000_000)
    target.add("lookups", 7)
    target.set("draft_alive", 1)
    unregister_vllm_metrics()
    speculation = SimpleNamespace(
        method="ssd", placement=SimpleNamespace(engine_id=name), num_speculative_tokens=2
    )

    class Stock(SpecDecodingProm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            """Without vLLM's own metrics."""

    ssd_prometheus_class(Stock)(speculation, ["model_name", "engine"], {0: [model, 0]})


def clear(registry: prometheus_client.CollectorRegistry) -> None:
    """As users do between two engines of a process, against duplicates."""
    for collector in list(registry._collector_to_names):
        registry.unregister(collector)


@pytest.mark.parametrize("between", [lambda registry: None, clear], ids=["nothing", "cleared"])
def test_prometheus_shows_the_counters_of_the_engine_that_is_there(
    start: Callable[..., Engine],
    registry: prometheus_client.CollectorRegistry,
    between: Callable[[prometheus_client.CollectorRegistry], None],
) -> None:
    """A second engine in the process takes the first one's place, whatever became of that one's metrics."""
    start_frontend(start, "old")
    between(registry)
    start_frontend(start, "new")
    page = prometheus_client.generate_latest(registry).decode()
    assert 'vllm:ssd_cache_lookups_total{engine="0",model_name="new"} 7.0' in page
    assert 'vllm:ssd_wait_seconds_total{engine="0",model_name="new"} 1.5' in page
    assert 'vllm:ssd_draft_alive{engine="0",model_name="new"} 1.0' in page
    assert 'model_name="old"' not in page


def test_metrics_that_are_registered_by_somebody_else(
    start: Callable[..., Engine], registry: prometheus_client.CollectorRegistry
) -> None:
    """Such as our module, loaded twice: the engine that starts takes their place."""
    from vllm_ssd.metrics import SSDCollector

    registry.register(SSDCollector(["model_name", "engine"], []))
    start_frontend(start, "new")
    page = prometheus_client.generate_latest(registry).decode()
    assert page.count("# TYPE vllm:ssd_rounds_total counter") == 1


def test_what_cannot_be_read_is_no_failure_of_a_scrape(start: Callable[..., Engine]) -> None:
    """vLLM's own metrics are on the same page."""
    from vllm_ssd.metrics import CounterReader

    name = new_engine_id()
    start(name, 2)
    count = len(os.listdir("/proc/self/fd"))
    reader = CounterReader(name, 16)  # more counters than there are
    for _ in range(3):
        assert reader.read() == {}
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= count


def test_the_log_line_follows_vllms_own(start: Callable[..., Engine]) -> None:
    from vllm_ssd.metrics import SSDSpecDecodingLogging

    said: list[str] = []

    class Stock:
        def log(self, log_fn: Callable[..., None]) -> None:
            log_fn("SpecDecoding metrics: %d", 1)

    name = new_engine_id()
    engine = start(name, 4)
    target, draft = engine.target, engine.draft
    speculation = SimpleNamespace(placement=SimpleNamespace(engine_id=name), num_speculative_tokens=4)
    line = SSDSpecDecodingLogging(Stock(), speculation)

    def log() -> list[str]:
        said.clear()
        line.log(lambda text, *values: said.append(text % values))
        return said

    assert log() == ["SpecDecoding metrics: 1"]  # no rounds, nothing to say
    for name, count in {"rounds": 4, "lookups": 8, "hits": 6, "late": 1, "critical_path_ns": 800_000}.items():
        target.add(name, count)
    draft.add("steps", 10)
    draft.add("step_ns", 5_000_000)
    said_by_ssd = log()[1]
    assert said_by_ssd.startswith("SSD metrics: Hit rate: 75.0% (6 of 8 lookups), Late: 1, ")
    assert "Critical path: 0.200 ms/round, Draft step: 0.50 ms, " in said_by_ssd
    assert len(log()) == 1  # each line tells of what came since the last


@pytest.mark.parametrize("k", [1, 4])
def test_every_metric_has_its_counter(k: int) -> None:
    from vllm_ssd.metrics import METRICS

    assert {counter for _, counter, _ in METRICS.values()} <= {*target_fields(k), *DRAFT_FIELDS}
