"""Fixtures of the unit tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(target, draft) of 512 tokens."""
    from tiny_models import write_pair

    return write_pair(tmp_path_factory.mktemp("pair"), vocab_size=512)


@pytest.fixture
def bound_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Method "ssd" is registered, and the target bound to the first core, whatever earlier tests left."""
    import vllm_ssd

    vllm_ssd.register()
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(min(os.sched_getaffinity(0))))
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
