"""Counters in a shared file, and what the metrics read from them."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import prometheus_client
import pytest

from vllm_ssd.link.counters import (
    DRAFT_COUNTERS_FILE,
    DRAFT_FIELDS,
    TARGET_COUNTERS_FILE,
    Counters,
    target_fields,
)


def test_one_writes_and_another_reads(tmp_path: Path) -> None:
    writer = Counters(tmp_path / "c", ("a", "b"), create=True)
    reader = Counters(tmp_path / "c", ("a", "b"), create=False)
    writer.add("a")
    writer.add("a", 4)
    writer.set("b", -1)
    assert reader["a"] == 5
    assert reader.as_dict() == {"a": 5, "b": -1}
    assert Counters(tmp_path / "c", ("a", "b"), create=True).as_dict() == {"a": 0, "b": 0}


def test_there_are_counters_for_every_accepted_length() -> None:
    fields = target_fields(3)
    assert len(set(fields)) == len(fields)
    assert {"lookups_k0", "lookups_k3", "hits_k0", "hits_k3"} <= set(fields)
    assert "hits_k4" not in fields


def test_the_reader_tells_what_was_counted_and_what_was_added(tmp_path: Path) -> None:
    from vllm_ssd.metrics import CounterReader

    reader = CounterReader(tmp_path, 2)
    assert reader.read() == {}  # the engine is not there yet
    target = Counters(tmp_path / TARGET_COUNTERS_FILE, target_fields(2), create=True)
    assert reader.read_increase() == {}
    draft = Counters(tmp_path / DRAFT_COUNTERS_FILE, DRAFT_FIELDS, create=True)
    target.add("hits", 3)
    draft.add("steps", 7)
    first = reader.read_increase()
    assert (first["hits"], first["steps"]) == (3, 7)
    target.add("hits", 2)
    second = reader.read_increase()
    assert (second["hits"], second["steps"]) == (2, 0)
    assert reader.read()["hits"] == 5


def test_the_reader_goes_on_where_the_files_are_removed(tmp_path: Path) -> None:
    """By a cleaner of temporary files, say: the engine counts on."""
    from vllm_ssd.metrics import CounterReader

    target = Counters(tmp_path / TARGET_COUNTERS_FILE, target_fields(2), create=True)
    draft = Counters(tmp_path / DRAFT_COUNTERS_FILE, DRAFT_FIELDS, create=True)
    reader = CounterReader(tmp_path, 2)  # has mapped them, though nobody has read yet
    (tmp_path / DRAFT_COUNTERS_FILE).unlink()
    (tmp_path / TARGET_COUNTERS_FILE).unlink()
    target.add("hits", 2)
    draft.add("steps", 3)
    counted = reader.read()
    assert (counted["hits"], counted["steps"]) == (2, 3)


def test_counters_whose_name_was_removed_are_found_again(tmp_path: Path) -> None:
    """By another process too, and they are the same ones."""
    path = tmp_path / "c"
    writer = Counters(path, ("a", "b"), create=True)
    early = Counters(path, ("a", "b"), create=False)
    writer.restore_name()
    assert not path.is_symlink()  # nothing was missing
    for _ in range(2):
        path.unlink()
        writer.restore_name()
    writer.add("a", 3)
    late = Counters(path, ("a", "b"), create=False)
    late.set("b", 7)
    assert writer.as_dict() == early.as_dict() == late.as_dict() == {"a": 3, "b": 7}
    code = "import sys; assert open(sys.argv[1], 'r+b').read(1) == b'\\3'"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)
    del writer
    gc.collect()
    late.add("b")  # what is mapped stays


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[prometheus_client.CollectorRegistry]:
    """In place of the process's own."""
    import vllm.v1.metrics.prometheus

    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    monkeypatch.setattr(vllm.v1.metrics.prometheus, "REGISTRY", registry)
    return registry


def start_frontend(folder: Path) -> None:
    """What vLLM's `PrometheusStatLogger` does first when an engine of this name starts."""
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics
    from vllm.v1.spec_decode.metrics import SpecDecodingProm

    from vllm_ssd.metrics import ssd_prometheus_class

    folder.mkdir()
    Counters(folder / DRAFT_COUNTERS_FILE, DRAFT_FIELDS, create=True)
    target = Counters(folder / TARGET_COUNTERS_FILE, target_fields(2), create=True)
    target.add("wait_ns", 1_500_000_000)
    target.add("lookups", 7)
    target.set("draft_alive", 1)
    unregister_vllm_metrics()
    speculation = SimpleNamespace(
        method="ssd", placement=SimpleNamespace(folder=str(folder)), num_speculative_tokens=2
    )

    class Stock(SpecDecodingProm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            """Without vLLM's own metrics."""

    ssd_prometheus_class(Stock)(speculation, ["model_name", "engine"], {0: [folder.name, 0]})


def clear(registry: prometheus_client.CollectorRegistry) -> None:
    """As users do between two engines of a process, against duplicates."""
    for collector in list(registry._collector_to_names):
        registry.unregister(collector)


@pytest.mark.parametrize("between", [lambda registry: None, clear], ids=["nothing", "cleared"])
def test_prometheus_shows_the_counters_of_the_engine_that_is_there(
    tmp_path: Path,
    registry: prometheus_client.CollectorRegistry,
    between: Callable[[prometheus_client.CollectorRegistry], None],
) -> None:
    """A second engine in the process takes the first one's place, whatever became of that one's metrics."""
    start_frontend(tmp_path / "old")
    between(registry)
    start_frontend(tmp_path / "new")
    page = prometheus_client.generate_latest(registry).decode()
    assert 'vllm:ssd_cache_lookups_total{engine="0",model_name="new"} 7.0' in page
    assert 'vllm:ssd_wait_seconds_total{engine="0",model_name="new"} 1.5' in page
    assert 'vllm:ssd_draft_alive{engine="0",model_name="new"} 1.0' in page
    assert 'model_name="old"' not in page


def test_metrics_that_are_registered_by_somebody_else(
    tmp_path: Path, registry: prometheus_client.CollectorRegistry
) -> None:
    """Such as our module, loaded twice: the engine that starts takes their place."""
    from vllm_ssd.metrics import SSDCollector

    registry.register(SSDCollector(["model_name", "engine"], []))
    start_frontend(tmp_path / "new")
    page = prometheus_client.generate_latest(registry).decode()
    assert page.count("# TYPE vllm:ssd_rounds_total counter") == 1


def test_no_counters_are_no_failure_of_a_scrape(tmp_path: Path) -> None:
    """vLLM's own metrics are on the same page."""
    from vllm_ssd.metrics import CounterReader

    reader = CounterReader(tmp_path, 2)
    (tmp_path / TARGET_COUNTERS_FILE).touch()  # made, and not filled yet
    assert reader.read() == {}
    (tmp_path / TARGET_COUNTERS_FILE).unlink()
    (tmp_path / TARGET_COUNTERS_FILE).mkdir()
    assert reader.read() == {}


def test_the_log_line_follows_vllms_own(tmp_path: Path) -> None:
    from vllm_ssd.metrics import SSDSpecDecodingLogging

    said: list[str] = []

    class Stock:
        def log(self, log_fn: Callable[..., None]) -> None:
            log_fn("SpecDecoding metrics: %d", 1)

    target = Counters(tmp_path / TARGET_COUNTERS_FILE, target_fields(4), create=True)
    draft = Counters(tmp_path / DRAFT_COUNTERS_FILE, DRAFT_FIELDS, create=True)
    speculation = SimpleNamespace(placement=SimpleNamespace(folder=str(tmp_path)), num_speculative_tokens=4)
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
