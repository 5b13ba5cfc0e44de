"""SSD's counters in vLLM's metrics: Prometheus and the log line.

The engine's worker and the draft count in shared memory (`vllm_ssd.link.counters`). The frontend, which is
another process, asks the worker for it (`vllm_ssd.link.announcement`), and reads it when Prometheus scrapes
and when vLLM logs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import prometheus_client
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from vllm.logger import init_logger

from vllm_ssd.link.announcement import ask
from vllm_ssd.link.counters import DRAFT_FIELDS, Counters, target_fields

logger = init_logger("vllm.ssd")

# Prometheus counter -> (documentation, counter, factor)
METRICS: dict[str, tuple[str, str, float]] = {
    "vllm:ssd_rounds": ("Steps of the target, those that only prefill too.", "rounds", 1),
    "vllm:ssd_cache_lookups": ("Verification outcomes looked up in the outcome cache.", "lookups", 1),
    "vllm:ssd_cache_hits": ("Lookups that found drafts.", "hits", 1),
    "vllm:ssd_cache_late": ("Lookups whose outcome was predicted but had no drafts yet.", "late", 1),
    "vllm:ssd_drafts_served": ("Draft tokens that lookups found.", "drafts_served", 1),
    "vllm:ssd_undrafted": (
        "Outcomes while there was no draft process to ask, or one that did not know the request.",
        "undrafted",
        1,
    ),
    "vllm:ssd_too_long": ("Outcomes of requests longer than the draft's context.", "too_long", 1),
    "vllm:ssd_failures": ("Errors of SSD's own, each of which cost a step its drafts.", "failures", 1),
    "vllm:ssd_draft_dropped": ("Requests the draft dropped since a step with them failed.", "dropped", 1),
    "vllm:ssd_backup_none": (
        "Rows that found no drafts and continued without.",
        "backup_none",
        1,
    ),
    "vllm:ssd_backup_ngram": ("Such rows for which n-grams were looked up.", "backup_ngram", 1),
    "vllm:ssd_backup_draft": ("Such rows that continued with just-in-time drafts.", "backup_draft", 1),
    "vllm:ssd_draft_probs_late": (
        "Rows whose drafts' probabilities came too late for ratio verification.",
        "draft_probs_late",
        1,
    ),
    "vllm:ssd_wait_seconds": ("Time the target waited for the draft.", "wait_ns", 1e-9),
    "vllm:ssd_critical_path_seconds": ("Time SSD took on the target's side.", "critical_path_ns", 1e-9),
    "vllm:ssd_draft_restarts": ("Draft processes started again.", "draft_restarts", 1),
    "vllm:ssd_draft_stalls": ("Times the draft fell silent.", "draft_stalls", 1),
    "vllm:ssd_draft_steps": ("Forward passes of the draft.", "steps", 1),
    "vllm:ssd_draft_step_seconds": ("Time in the draft's steps.", "step_ns", 1e-9),
    "vllm:ssd_draft_starved": ("Times a request found no KV blocks in the draft.", "starved", 1),
    "vllm:ssd_branches": ("Branches opened.", "branches", 1),
    "vllm:ssd_branches_adopted": ("Branches whose outcome came true; the others were wasted.", "adopted", 1),
}


class CounterReader:
    """Reads what the engine has counted, from the first time that it is there.

    What has been mapped once stays in use. So an engine that has ended leaves its last counts.

    Args:
        engine_id: the name that the engine goes by.
        num_speculative_tokens: K.
    """

    def __init__(self, engine_id: str, num_speculative_tokens: int) -> None:
        self._engine_id = engine_id
        self._fields = (target_fields(num_speculative_tokens), DRAFT_FIELDS)
        self._mapped: list[Counters] = []
        self._last: dict[str, int] = {}
        self._map()  # in most frontends the engine is there by now

    def _map(self) -> None:
        # Not there yet, or no descriptors left: vLLM's own metrics must not suffer.
        with contextlib.suppress(OSError, ValueError), ask(self._engine_id) as (_, descriptors):
            self._mapped = [
                Counters(fields, os.dup(descriptor))
                for fields, descriptor in zip(self._fields, descriptors, strict=True)
            ]

    def read(self) -> dict[str, int]:
        """Every counter; empty where the engine is not there yet."""
        if not self._mapped:
            self._map()
        return {name: value for counters in self._mapped for name, value in counters.as_dict().items()}

    def read_increase(self) -> dict[str, int]:
        """Every counter's increase since the last call of this."""
        now = self.read()
        increase = {name: value - self._last.get(name, 0) for name, value in now.items()}
        self._last = now or self._last  # a read that failed is made up for by the next
        return increase


class SSDCollector:
    """Reads the counters whenever Prometheus scrapes, so that they are right also while nothing is drafted.

    Args:
        labelnames: vLLM's labels (model_name, engine).
        sources: for each engine its label values and its counters.
    """

    _name = "vllm:ssd"  # vLLM removes an earlier engine's collectors by this (`unregister_vllm_metrics`)

    def __init__(self, labelnames: Sequence[str], sources: list[tuple[list[str], CounterReader]]) -> None:
        self._labelnames = labelnames
        self._sources = sources

    def describe(self) -> list[Any]:
        """Nothing: the names need not be known in advance."""
        return []

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        counted = [(labels, reader.read()) for labels, reader in self._sources]
        for name, (documentation, counter, factor) in METRICS.items():
            family = CounterMetricFamily(name, documentation, labels=self._labelnames)
            for labels, counters in counted:
                if counter in counters:
                    family.add_metric(labels, counters[counter] * factor)
            yield family
        is_alive = GaugeMetricFamily(
            "vllm:ssd_draft_alive",
            "1 if the draft process answered in the target's last round.",
            labels=self._labelnames,
        )
        for labels, counters in counted:
            if counters:
                is_alive.add_metric(labels, counters["draft_alive"])
        yield is_alive


def ssd_prometheus_class(stock: type) -> type:
    """vLLM's `SpecDecodingProm`, which also registers SSD's collector where the method is "ssd"."""

    class SSDSpecDecodingProm(stock):  # type: ignore[misc, valid-type]
        def __init__(
            self,
            speculative_config: Any,
            labelnames: list[str],
            per_engine_labelvalues: dict[int, list[object]],
            **kwargs: Any,
        ) -> None:
            super().__init__(speculative_config, labelnames, per_engine_labelvalues, **kwargs)
            if getattr(speculative_config, "method", None) == "ssd":
                sources = [
                    (list(map(str, values)), _reader(speculative_config))
                    for values in per_engine_labelvalues.values()
                ]
                prometheus_client.REGISTRY.register(SSDCollector(labelnames, sources))

    return SSDSpecDecodingProm


class SSDSpecDecodingLogging:
    """vLLM's `SpecDecodingLogging`, followed by a line on the outcome cache.

    Args:
        stock: vLLM's own, which keeps logging what it logs.
        speculative_config: the engine's `SSDSpeculativeConfig`.
    """

    def __init__(self, stock: Any, speculative_config: Any) -> None:
        self._stock = stock
        self._reader = _reader(speculative_config)

    def observe(self, spec_decoding_stats: Any) -> None:
        self._stock.observe(spec_decoding_stats)

    def log(self, log_fn: Callable[..., None] = logger.info) -> None:
        self._stock.log(log_fn=log_fn)
        new = self._reader.read_increase()
        if not new.get("rounds"):
            return
        log_fn(
            "SSD metrics: Hit rate: %.1f%% (%d of %d lookups), Late: %d, Without draft process: %d, "
            "Target waited: %.2f ms/round, Critical path: %.3f ms/round, "
            "Draft step: %.2f ms, Branches adopted: %d of %d, Without KV blocks: %d, "
            "Draft restarts: %d, Stalls: %d",
            100 * new["hits"] / max(1, new["lookups"]),
            new["hits"],
            new["lookups"],
            new["late"],
            new["undrafted"],
            new["wait_ns"] / new["rounds"] / 1e6,
            new["critical_path_ns"] / new["rounds"] / 1e6,
            new["step_ns"] / max(1, new["steps"]) / 1e6,
            new["adopted"],
            new["branches"],
            new["starved"],
            new["draft_restarts"],
            new["draft_stalls"],
        )


def _reader(speculative_config: Any) -> CounterReader:
    placement, k = speculative_config.placement, speculative_config.num_speculative_tokens
    return CounterReader(placement.engine_id, k)
