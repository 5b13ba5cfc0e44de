"""Fixtures of the tests on real vLLM, under either model runner: tiny random models."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import write_pair

Pair = tuple[Path, Path]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """(target, draft) of 512 tokens that agree greedily on about 60 % of the positions."""
    return write_pair(tmp_path_factory.mktemp("pair"), vocab_size=512, agreement=0.5)


@pytest.fixture(scope="session")
def small_vocabulary_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """(target, draft) of 8 tokens: the distribution of a few tokens can be enumerated."""
    return write_pair(tmp_path_factory.mktemp("small"), vocab_size=8, agreement=0.3, sharpness=1.5)
