"""Models in a Hub cache made by hand, as if they had been downloaded: found offline by their Hub id."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """Of Hugging Face's packages in this process and those it starts (`HF_HOME`, see conftest.py)."""
    return Path(os.environ["HF_HOME"]) / "hub"


def publish(
    model: Path,
    repo_id: str,
    branches: tuple[str, ...] = ("main",),
    cache: Path | None = None,
    is_part: Callable[[str], bool] = lambda name: True,
) -> str:
    """Put a model's files into a cache; returns the commit, 40 hex digits.

    Args:
        repo_id: such as "me/draft".
        branches: names of the commit.
        cache: None: that of the tests.
        is_part: of the file names, those that the commit has.
    """
    folder = (cache or cache_dir()) / f"models--{repo_id.replace('/', '--')}"
    commit = hashlib.sha1(f"{repo_id} {branches} {model}".encode(), usedforsecurity=False).hexdigest()
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if is_part(file.name):
            shutil.copyfile(file, snapshot / file.name)
    refs = folder / "refs"
    refs.mkdir(exist_ok=True)
    for branch in branches:
        (refs / branch).write_text(commit, encoding="utf-8")
    return commit
