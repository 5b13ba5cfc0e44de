"""Fixtures of the unit tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(target, draft) of 512 tokens."""
    from models import write_pair

    return write_pair(tmp_path_factory.mktemp("pair"), vocab_size=512)
