"""An engine that sizes its KV cache by itself, as it does where VLLM_CPU_KVCACHE_SPACE is not set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
from engines import Engines, generate, greedy_params, in_worker, ssd, stats

ROOM = 3 << 30  # bytes for the engine, draft process included
TOLERATED = 0.3  # GiB that a process grows by after it has been sized up


def kv_cache_bytes(worker: Any) -> int:
    return sum(cache.nbytes for cache in worker.model_runner.kv_caches)


def test_draft_and_target_fit_into_what_was_granted(
    engines: Engines, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.utils.cpu_resource_utils import get_memory_node_info
    from vllm.v1.worker import cpu_worker  # noqa: F401  what is imported is not yet to come

    engines.close()
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    here = psutil.Process()
    granted = here.memory_info().rss + ROOM
    share = granted / get_memory_node_info().total_memory
    target, draft = pair
    llm = engines.get(target, ssd(draft, 4, ssd_draft_memory=0.5), gpu_memory_utilization=share)
    taken = here.memory_info().rss + psutil.Process(stats(llm)["draft"]["pid"]).memory_info().rss
    print(f"{granted=} {taken=} {in_worker(llm, kv_cache_bytes)=}")
    assert taken < granted + TOLERATED * 2**30
    assert in_worker(llm, kv_cache_bytes) > 0.1 * ROOM  # what the draft does not need
    assert generate(llm, [[5, 6, 7]], greedy_params(4))
    engines.close()  # before the environment is as it was
