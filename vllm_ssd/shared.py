"""Memory that several processes map, and the folder it lies in (pure)."""

from __future__ import annotations

import fcntl
import math
import os
import re
import shutil
import tempfile
import time
import uuid
import weakref
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

PREFIX = "vllm-ssd-"
LOCK_FILE = "owner"
_NAME_DIGITS = 12
_PATIENCE_S = 2.0  # a killed process holds its lock until its memory is freed
NAME_BYTES = len(PREFIX) + _NAME_DIGITS

Number = TypeVar("Number", bound=np.generic)


def map_array(
    path: Path, dtype: type[Number], shape: tuple[int, ...], *, create: bool
) -> npt.NDArray[Number]:
    """An array over a file that other processes map as well.

    Args:
        path: the file, on a memory file system if it is to be fast.
        dtype, shape: of the array; the same in every process.
        create: make the file, filled with zeros. Otherwise it has to be there.

    Raises:
        FileNotFoundError: if it is not there.
        OSError: if there is no room for it. (A write would be too late: that kills the process.)
    """
    if create:
        num_bytes = np.dtype(dtype).itemsize * math.prod(shape)
        with path.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            except OSError as error:
                raise OSError(
                    f"no room for {num_bytes / 2**20:.0f} MiB in {path.parent} ({error}): enlarge that file "
                    "system, or set ssd_shared_dir to a folder on another one"
                ) from error
    # The plain array is the same memory, without memmap's slower indexing.
    return np.asarray(np.memmap(path, dtype, "r+", shape=shape))


def name_shared_folder(parent: str | None = None) -> Path:
    """A name that no folder has yet, for one engine's shared folder.

    Args:
        parent: where it is to lie; None: in memory where the machine has a file system for it. A name that
            came from here stays as it is, as in a config that is made again from its own values.
    """
    if parent is not None and re.fullmatch(f"{PREFIX}[0-9a-f]{{{_NAME_DIGITS}}}", Path(parent).name):
        return Path(parent)
    memory = Path("/dev/shm")
    default = memory if memory.is_dir() else Path(tempfile.gettempdir())
    return Path(parent or default) / f"{PREFIX}{uuid.uuid4().hex[:_NAME_DIGITS]}"


class SharedFolder:
    """A new folder that the engine's processes share, and nobody else: it holds users' tokens.

    It is locked for as long as its owner lives. Whoever makes a folder beside it removes those whose owner
    has been killed: the kernel gives up the lock of a process that ends, in whatever way.

    Args:
        path: see `name_shared_folder`.

    Raises:
        FileExistsError: if it is there already: what is removed in the end must be our own.
    """

    def __init__(self, path: Path) -> None:
        _remove_abandoned(path.parent)
        self.path = path
        path.mkdir(mode=0o700, parents=True)
        unlocked = path / f"{LOCK_FILE}.new"
        self._lock = os.open(unlocked, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(path / LOCK_FILE)  # nobody sees the lock before it is held

    def remove(self) -> None:
        """Delete the folder and all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_at_exit(folder: Path) -> None:
    """In an engine's frontend: remove the engine's folder when this process ends, if it has been killed.

    `vllm serve` gives its engine no time to end by itself unless it is told to (`--shutdown-timeout`). A
    finalizer and not `atexit`, since those run in reverse order: vLLM's, which ends the engine, comes first.
    """
    weakref.finalize(remove_at_exit, _remove_once_abandoned, folder)


def _remove_once_abandoned(folder: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while (folder / LOCK_FILE).exists() and not _remove_if_abandoned(folder):
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)


def _remove_abandoned(parent: Path) -> None:
    for lock in parent.glob(f"{PREFIX}*/{LOCK_FILE}"):
        _remove_if_abandoned(lock.parent)


def _remove_if_abandoned(folder: Path) -> bool:
    """Remove the folder if its owner has gone; whether it was so."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # another user's, or gone by now
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its owner lives
        return False
    else:
        shutil.rmtree(folder, ignore_errors=True)
        return True
    finally:
        os.close(descriptor)
