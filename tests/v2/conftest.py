"""Fixtures of the tests on vLLM's V2 runner, by default CUDA's; `device` says where they run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from device import DEVICE, use_v2_runner

if DEVICE == "cuda":
    # Identity to the last token is asked for, and Triton multiplies float32 as TF32. Drafts inherit this.
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
use_v2_runner()  # before anything imports Triton
from engines import Engines  # noqa: E402
from pairs import pair, small_vocabulary_pair  # noqa: E402, F401


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """The engine of the moment; ask for one with `engines.get`."""
    # In float32, for the same identity: FlashAttention has no such kernels.
    on_cuda = {"gpu_memory_utilization": 0.3, "attention_backend": "TRITON_ATTN"}
    kept = Engines(on_cuda if DEVICE == "cuda" else {})
    yield kept
    kept.close()


@pytest.fixture(scope="session", autouse=True)
def schedules_ahead() -> None:
    """As on CUDA; the CPU platform would have the scheduler wait for each step."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        is_async = vllm_config.scheduler_config.async_scheduling
        stock(vllm_config)
        vllm_config.scheduler_config.async_scheduling = is_async

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)  # type: ignore[method-assign]
