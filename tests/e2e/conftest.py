"""Fixtures of the tests on real vLLM: one in-process engine at a time, and tiny random models."""

from __future__ import annotations

import os

# Before vLLM is imported: the engine runs in the test's own process.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import Engines
from models import write_pair

Pair = tuple[Path, Path]


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """The engine of the moment; ask for one with `engines.get`."""
    kept = Engines()
    yield kept
    kept.close()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """(target, draft) of 512 tokens that agree greedily on about 60 % of the positions."""
    return write_pair(tmp_path_factory.mktemp("pair"), vocab_size=512, agreement=0.5)


@pytest.fixture(scope="session")
def small_vocabulary_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """(target, draft) of 8 tokens: the law of a few tokens can be enumerated."""
    return write_pair(tmp_path_factory.mktemp("small"), vocab_size=8, agreement=0.3, sharpness=1.5)
