"""Fixtures of the tests on real vLLM: one in-process engine at a time, and tiny random models."""

from __future__ import annotations

import os

# Before vLLM is imported: the engine runs in the test's own process.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from collections.abc import Iterator

import pytest
from engines import Engines
from pairs import pair, small_vocabulary_pair  # noqa: F401


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """The engine of the moment; ask for one with `engines.get`."""
    kept = Engines()
    yield kept
    kept.close()
