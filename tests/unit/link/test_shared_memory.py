"""The shared folder: private, removed by its owner, or by the next engine if its owner was killed."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from vllm_ssd.link.draft_probs import DraftLaws
from vllm_ssd.link.memory import (
    LOCK_FILE,
    NAME_BYTES,
    PREFIX,
    SharedFolder,
    cores_of_others,
    map_array,
    name_shared_folder,
)

OWN_AND_WAIT = """
import sys
from pathlib import Path
from vllm_ssd.link.memory import SharedFolder
folder = SharedFolder(Path(sys.argv[1]))
print("made", flush=True)
sys.stdin.read()
"""


def test_private_and_removed(tmp_path: Path) -> None:
    folder = SharedFolder(tmp_path / f"{PREFIX}1")
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    (folder.path / "file").touch()
    folder.remove()
    assert not folder.path.exists()


def test_no_room_is_told_with_what_would_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match=rf"no room for 2 MiB in {tmp_path} .*No space left.*ssd_shared_dir"):
        map_array(tmp_path / "table", np.int64, (512, 512), create=True)
    with pytest.raises(OSError, match=r"no room for 8 MiB .*ssd_shared_dir.*ssd_verify='coupled'"):
        DraftLaws(tmp_path, 16, 4, 32768, create=True)


def test_names_differ() -> None:
    assert name_shared_folder() != name_shared_folder()
    assert len(name_shared_folder().name) == NAME_BYTES


def test_what_lies_in_the_users_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "thesis").touch()
    name = name_shared_folder(str(tmp_path))
    assert name.parent == tmp_path
    SharedFolder(name).remove()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


FRONTEND = """
import subprocess, sys, time
from pathlib import Path
from vllm_ssd.link.memory import remove_at_exit
remove_at_exit(Path(sys.argv[1]))
engine = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]], stdin=-1, stdout=-1)
engine.stdout.readline()
if sys.argv[3] == "kill":
    engine.kill()
"""


@pytest.mark.parametrize("end", ["kill", "let live"])
def test_a_frontend_removes_what_its_killed_engine_left(tmp_path: Path, end: str) -> None:
    """And nothing of an engine that lives on for a while: it ends when its standard input does."""
    folder = tmp_path / f"{PREFIX}engine"
    subprocess.run([sys.executable, "-c", FRONTEND, str(folder), OWN_AND_WAIT, end], check=True, timeout=60)
    assert folder.exists() == (end != "kill")


def test_a_folder_that_is_there_is_nobodys_to_take(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        SharedFolder(tmp_path)


@contextmanager
def another_engine(folder: Path) -> Iterator[None]:
    """A process that owns the folder, and leaves it when it is killed at the end."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWN_AND_WAIT, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"made\n"
        yield
    finally:
        owner.kill()
        owner.wait()


def sweep(parent: Path) -> None:
    SharedFolder(parent / f"{PREFIX}mine").remove()


def test_only_what_a_dead_owner_left_is_swept_away(tmp_path: Path) -> None:
    other = tmp_path / f"{PREFIX}other"
    unrelated = tmp_path / f"{PREFIX}unrelated"
    unrelated.mkdir()
    with another_engine(other):
        sweep(tmp_path)
        assert other.exists()
    sweep(tmp_path)
    assert not other.exists()
    assert unrelated.exists()


def test_what_is_not_our_own_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links are not followed, and other users' folders not looked into, whatever they have made there."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK_FILE).touch()
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)
    linked = tmp_path / f"{PREFIX}linked-lock"
    linked.mkdir()
    (linked / LOCK_FILE).symlink_to(elsewhere / LOCK_FILE)
    pipe = tmp_path / f"{PREFIX}pipe"
    pipe.mkdir()
    os.mkfifo(pipe / LOCK_FILE)
    sweep(tmp_path)
    assert [(path / LOCK_FILE).exists() for path in (elsewhere, linked, pipe)] == [True] * 3
    foreign = tmp_path / f"{PREFIX}foreign"
    foreign.mkdir()
    (foreign / LOCK_FILE).touch()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    sweep(tmp_path)
    assert foreign.exists()
    monkeypatch.undo()
    sweep(tmp_path)
    assert not foreign.exists()


def test_the_cores_of_other_engines(tmp_path: Path) -> None:
    """Of those that live, in this process or another."""
    own = tmp_path / f"{PREFIX}own"
    assert cores_of_others(own) == set()
    first = SharedFolder(tmp_path / f"{PREFIX}first", {3, 12})
    second = SharedFolder(tmp_path / f"{PREFIX}second", [1])
    mine = SharedFolder(own, [7])
    assert cores_of_others(own) == {1, 3, 12}
    second.remove()
    (tmp_path / f"{PREFIX}dead").mkdir()
    (tmp_path / f"{PREFIX}dead" / LOCK_FILE).write_text("5")
    with another_engine(tmp_path / f"{PREFIX}nameless"):  # as one that is bound to no cores
        assert cores_of_others(own) == {3, 12}
    first.remove()
    assert cores_of_others(own) == set()
    mine.remove()


@pytest.mark.parametrize("gone", ["the folder", "its lock"])
def test_a_folder_that_others_removed_is_made_anew(tmp_path: Path, gone: str) -> None:
    """With its lock, so that no other engine takes it for abandoned."""
    folder = SharedFolder(tmp_path / f"{PREFIX}1", [4])
    folder.restore()  # nothing is missing yet
    if gone == "the folder":
        shutil.rmtree(folder.path)
    else:
        (folder.path / LOCK_FILE).unlink()
    folder.restore()
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    sweep(tmp_path)
    assert cores_of_others(tmp_path / f"{PREFIX}mine") == {4}
    folder.remove()
    assert not folder.path.exists()
