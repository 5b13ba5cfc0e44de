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
    loading.init_device(config, device, "/folder")
    assert done.pop("world") == (config, 0, "file:///folder/rendezvous", index, "backend")
    assert done.pop("kernels") == ()
    assert done == ({"device": (device,), "workspace": (device, 1)} if name != "cpu" else {})
