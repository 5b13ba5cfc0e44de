"""vLLM's V2 runner on a machine without a GPU: its Triton kernels run in Triton's interpreter, slowly."""

from __future__ import annotations

import os
from types import SimpleNamespace

# Before vLLM is imported.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import Engines
from models import write_pair
from triton import language as tl
from triton.backends import backends
from triton.language.extra import libdevice

# vLLM takes Triton for usable if there is an active backend, and on the CPU if there is one of this name.
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

# Device libraries come with a backend. vLLM's rejection sampler needs this function of theirs alone.
libdevice.log1p = lambda value: tl.log(1.0 + value)

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
