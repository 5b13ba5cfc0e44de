"""How a target on the CPU sizes its KV cache beside its draft process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from configs import assert_one_line

GIB = 1 << 30
TOTAL, TARGET, DRAFT = 16 * GIB, 3 * GIB, 2 * GIB


class OneRank:
    """Stands for vLLM's group of all ranks."""

    def barrier(self) -> None:
        """Nobody else to wait for."""

    def broadcast_object(self, value: Any, src: int) -> Any:
        assert src == 0
        return value


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker as it is once the target has loaded, on a machine with 9 GiB left."""
    from vllm.v1.worker import cpu_worker

    from vllm_ssd.target import worker as worker_module
    from vllm_ssd.target.worker import TargetsDraft
    from vllm_ssd.target.worker_cpu import SSDWorker

    available = TOTAL - TARGET - DRAFT - 2 * GIB  # the rest is other processes'
    node = SimpleNamespace(total_memory=TOTAL, available_memory=available)
    monkeypatch.setattr(cpu_worker, "get_memory_node_info", lambda node_id: node)
    monkeypatch.setattr(cpu_worker, "get_allowed_cpu_list", lambda: [SimpleNamespace(numa_node=0)])
    monkeypatch.setattr(cpu_worker.psutil, "Process", Process)
    monkeypatch.setattr(worker_module, "get_world_group", OneRank)
    draft: Any = object.__new__(TargetsDraft)
    draft.supervisor = Supervisor()
    draft._ssd = SimpleNamespace(
        num_speculative_tokens=2,
        ssd_max_rows=4,
        ssd_verify="coupled",
        draft_model_config=SimpleNamespace(get_vocab_size=lambda: 1000),
    )
    worker: Any = object.__new__(SSDWorker)
    worker._should_warm_up_model = lambda: False
    worker.cache_config = SimpleNamespace(kv_cache_memory_bytes=None)
    worker.requested_cpu_memory = int(TOTAL * 0.8)
    worker._draft = draft
    worker.vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=1, tensor_parallel_size=1)
    )
    return worker


class Supervisor:
    """Of a draft that has loaded once it has been waited for."""

    pid = 4711
    is_ready = False

    def await_ready(self) -> None:
        self.is_ready = True


class Process:
    """Stands for psutil's."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def memory_info(self) -> SimpleNamespace:
        return SimpleNamespace(rss=DRAFT if self.pid == Supervisor.pid else TARGET)


LOGITS = 4 * 4 * 1000 * 4  # rows, steps, tokens, bytes


def test_the_draft_is_left_what_it_needs(worker: Any) -> None:
    """Without it vLLM would have asked for more than there is: 9.8 GiB of 9."""
    assert worker.determine_available_memory() == int(TOTAL * 0.8) - TARGET - DRAFT - LOGITS
    assert worker._draft.supervisor.is_ready


def test_with_ratio_the_distributions_are_counted_as_well(worker: Any) -> None:
    worker._draft._ssd.ssd_verify = "ratio"
    assert worker.determine_available_memory() == int(TOTAL * 0.8) - TARGET - DRAFT - 2 * LOGITS


def test_a_size_that_the_user_chose_stays(worker: Any) -> None:
    worker.cache_config.kv_cache_memory_bytes = 5 * GIB
    assert worker.determine_available_memory() == 5 * GIB


@pytest.mark.parametrize("chosen", [None, 10 * GIB])
def test_where_memory_does_not_suffice_the_draft_is_named(worker: Any, chosen: int | None) -> None:
    worker.cache_config.kv_cache_memory_bytes = chosen
    worker.requested_cpu_memory = TARGET + DRAFT
    with pytest.raises(ValueError, match="Available memory") as error:
        worker.determine_available_memory()
    options = ("ssd_draft_memory", "VLLM_CPU_KVCACHE_SPACE", "gpu_memory_utilization")
    assert_one_line(str(error.value).splitlines(), "draft process with 2.00 GiB", *options)


def test_a_rank_without_a_draft_hears_of_it(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OneRank, "broadcast_object", lambda self, value, src: value + DRAFT)
    worker._draft = None
    assert worker.determine_available_memory() == int(TOTAL * 0.8) - TARGET - DRAFT
