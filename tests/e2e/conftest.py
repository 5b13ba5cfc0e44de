"""Fixtures of the tests on real vLLM: one in-process engine at a time, and tiny random models."""

from __future__ import annotations

import os

# Before vLLM is imported: the engine runs in the test's own process.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from collections.abc import Iterator
from pathlib import Path

import hub
import pytest
from engines import Engines
from pairs import pair, small_vocabulary_pair  # noqa: F401


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """The engine of the moment; ask for one with `engines.get`."""
    kept = Engines()
    yield kept
    kept.close()


@pytest.fixture(scope="session")
def hub_pair(pair: tuple[Path, Path]) -> tuple[str, str]:  # noqa: F811
    """The Hub ids of (target, draft), which are in the tests' Hub cache."""
    ids = ("me/target", "me/draft")
    for model, repo_id in zip(pair, ids, strict=True):
        hub.publish(model, repo_id)
    return ids
