"""Counters in a shared file, and what the metrics read from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_ssd.counters import (
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


def test_the_reader_tells_what_was_added(tmp_path: Path) -> None:
    from vllm_ssd.metrics import CounterReader

    reader = CounterReader(tmp_path, 2)
    assert reader.read() == {}  # the engine is not there yet
    target = Counters(tmp_path / TARGET_COUNTERS_FILE, target_fields(2), create=True)
    assert reader.read() == {}
    draft = Counters(tmp_path / DRAFT_COUNTERS_FILE, DRAFT_FIELDS, create=True)
    target.add("hits", 3)
    draft.add("steps", 7)
    first = reader.read()
    assert (first["hits"], first["steps"]) == (3, 7)
    target.add("hits", 2)
    second = reader.read()
    assert (second["hits"], second["steps"]) == (2, 0)
    (tmp_path / DRAFT_COUNTERS_FILE).unlink()
    assert reader.read() == {}


@pytest.mark.parametrize("k", [1, 4])
def test_every_metric_has_its_counter(k: int) -> None:
    from vllm_ssd.metrics import DRAFT_METRICS, TARGET_METRICS

    assert {counter for _, counter, _ in TARGET_METRICS.values()} <= set(target_fields(k))
    assert {counter for _, counter, _ in DRAFT_METRICS.values()} <= set(DRAFT_FIELDS)
