"""What comes before the draft's first step, on a device that is not here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.mark.parametrize(("name", "index"), [("cuda:1", 1), ("cpu", 0)])
def test_a_world_of_one_on_the_drafts_device(monkeypatch: pytest.MonkeyPatch, name: str, index: int) -> None:
    from vllm.config import VllmConfig

    from vllm_ssd.draft import loading

    done: dict[str, Any] = {}

    def note(what: str) -> Any:
        return lambda *args: done.setdefault(what, args)

    monkeypatch.setattr(torch.accelerator, "set_device_index", note("device"))
    monkeypatch.setattr(loading, "init_workspace_manager", note("workspace"))
    monkeypatch.setattr(loading, "init_worker_distributed_environment", note("world"))
    monkeypatch.setattr(
        loading, "current_platform", SimpleNamespace(import_kernels=note("kernels"), dist_backend="backend")
    )
    config, device = VllmConfig(), torch.device(name)
    monkeypatch.setattr(loading, "anonymous_file", lambda: 77)
    loading.init_device(config, device)
    assert done.pop("world") == (config, 0, "file:///proc/self/fd/77", index, "backend")
    assert done.pop("kernels") == ()
    assert done == ({"device": (device,), "workspace": (device, 1)} if name != "cpu" else {})


def test_a_draft_whose_memory_is_short_gets_a_shorter_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_ssd.draft import loading

    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.float32)
    monkeypatch.setattr(loading, "get_kv_cache_spec", lambda config: {"first": spec, "second": spec})
    monkeypatch.setattr(loading, "resolve_kv_cache_layout", lambda *args: None)
    monkeypatch.setattr(loading, "supported_kv_cache_layouts", lambda config: [])
    monkeypatch.setattr(loading, "kv_cache_config", lambda *args: SimpleNamespace(kv_cache_groups=[0]))
    model = SimpleNamespace(max_model_len=4096)
    config: Any = SimpleNamespace(model_config=model, cache_config=SimpleNamespace(block_size=16))
    loading.plan_kv_cache(config, 300 * 2 * spec.page_size_bytes)
    assert model.max_model_len == 4096
    loading.plan_kv_cache(config, 12 * 2 * spec.page_size_bytes)
    assert model.max_model_len == 10 * 16  # beside vLLM's null block and our own
    with pytest.raises(loading.UnsupportedDraft, match="ssd_draft_memory"):
        loading.plan_kv_cache(config, 2 * 2 * spec.page_size_bytes)
