"""Where the draft goes: which GPU and which cores, and what is refused."""

from __future__ import annotations

import os
import pickle
from types import SimpleNamespace

import pytest
from configs import NO_CORE, Pair, assert_one_line, create, on_cuda, refusal

pytestmark = pytest.mark.usefixtures("bound_target")


def test_another_platform(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ssd import config

    monkeypatch.setattr(
        config, "current_platform", SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False)
    )
    assert_one_line(refusal(pair), "CUDA and on the CPU only")


@pytest.mark.parametrize(
    ("num_devices", "asked", "device"),
    [(1, None, "cuda:0"), (2, None, "cuda:1"), (4, "cuda:2", "cuda:2")],
)
def test_the_drafts_gpu(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, num_devices: int, asked: str | None, device: str
) -> None:
    on_cuda(monkeypatch, num_devices)
    config = create(pair, ssd_draft_device=asked)
    place = config.speculative_config.placement
    assert place.device == device
    assert place.memory_bytes == 4 << 30
    assert config.speculative_config.ssd_draft_device == asked
    assert config.parallel_config.worker_cls == "vllm_ssd.target.worker_cuda.SSDWorker"
    assert len(place.cores) == len(os.sched_getaffinity(0))
    assert not place.engine_cores


def test_a_gpu_that_does_not_exist(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch, 2)
    assert_one_line(refusal(pair, ssd_draft_device="cuda:2"), "ssd_draft_device='cuda:2'", "cuda:1")


def test_on_cuda_the_planner_needs_a_scheduler_that_waits(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cuda(monkeypatch, 2)
    lines = refusal(pair, {"async_scheduling": True}, ssd_planner=True)
    assert_one_line(lines, "ssd_planner", "async_scheduling")


def test_with_ray_the_drafts_gpu_is_named(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ssd.placement import _choose_device

    on_cuda(monkeypatch, 4)
    parallel = SimpleNamespace(distributed_executor_backend="ray", assigned_physical_gpu_ids=None)
    with pytest.raises(ValueError, match="ssd_draft_device"):
        _choose_device(None, parallel)
    assert _choose_device("cuda:3", parallel) == "cuda:3"


def test_beside_chosen_gpus_the_drafts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ssd.placement import _choose_device

    on_cuda(monkeypatch, 4)
    parallel = SimpleNamespace(distributed_executor_backend="mp", assigned_physical_gpu_ids=[2, 3])
    with pytest.raises(ValueError, match=r"\[2, 3\].*ssd_draft_device"):
        _choose_device(None, parallel)
    assert _choose_device("cuda:0", parallel) == "cuda:0"


def test_a_gpu_where_there_is_none(pair: Pair) -> None:
    assert_one_line(refusal(pair, ssd_draft_device="cuda:0"), "no GPU here")


def test_a_place_once_chosen_stays(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the engine's processes too, which may be bound to other cores than the frontend, and see others."""
    ssd = create(pair).speculative_config
    pickled = pickle.dumps(ssd)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {NO_CORE})
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(NO_CORE))
    again = pickle.loads(pickled)
    again.__post_init__()
    assert again.placement == ssd.placement
    assert again.ssd_draft_cores is None


def test_the_place_is_no_option(pair: Pair) -> None:
    assert any("placement" in line for line in refusal(pair, placement={"device": "cpu"}))
