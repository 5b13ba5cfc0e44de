"""Memory that several processes map, and the folder it lies in (pure)."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

PREFIX = "vllm-ssd-"
LOCK_FILE = "owner"
_NAME_DIGITS = 12
_MOST_LOCK_BYTES = 1 << 16  # names of cores
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
        parent: where it is to lie; None: in memory where the machine has a file system for it.
    """
    memory = Path("/dev/shm")
    default = memory if memory.is_dir() else Path(tempfile.gettempdir())
    return Path(parent or default) / f"{PREFIX}{uuid.uuid4().hex[:_NAME_DIGITS]}"


class SharedFolder:
    """A new folder that the engine's processes share, and nobody else: it holds users' tokens.

    It is locked for as long as its owner lives. Whoever makes a folder beside it removes those whose owner
    has been killed: the kernel gives up the lock of a process that ends, in whatever way.

    Args:
        path: see `name_shared_folder`.
        cores: what the engine is bound to; other engines see it (`cores_of_others`).

    Raises:
        FileExistsError: if it is there already: what is removed in the end must be our own.
    """

    def __init__(self, path: Path, cores: Iterable[int] = ()) -> None:
        _remove_abandoned(path.parent)
        self.path = path
        self._cores = sorted(cores)
        path.mkdir(mode=0o700, parents=True)
        self._lock = self._make_lock()

    def restore(self) -> None:
        """Make anew what is not there any more: tmp cleaners remove it, or systemd when its user logs out."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (self.path / LOCK_FILE).exists():
            before, self._lock = self._lock, self._make_lock()
            os.close(before)

    def _make_lock(self) -> int:
        unlocked = self.path / f"{LOCK_FILE}.new"
        lock = os.open(unlocked, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.write(lock, ",".join(map(str, self._cores)).encode())
        fcntl.flock(lock, fcntl.LOCK_EX)
        unlocked.rename(self.path / LOCK_FILE)  # nobody sees the lock before it is held
        return lock

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
    for folder in parent.glob(f"{PREFIX}*"):
        _remove_if_abandoned(folder)


def _remove_if_abandoned(folder: Path) -> bool:
    """Remove the folder if its owner has gone; whether it was so."""
    with _lock_of(folder) as lock:
        if lock is None or _is_held(lock):
            return False
        shutil.rmtree(folder, ignore_errors=True)
        return True


def cores_of_others(own: Path) -> set[int]:
    """The cores that this user's other living engines are bound to.

    Args:
        own: this engine's folder, which need not be there; the others lie beside it.
    """
    cores: set[int] = set()
    for folder in own.parent.glob(f"{PREFIX}*"):
        if folder == own:
            continue
        with _lock_of(folder) as lock:
            if lock is not None and _is_held(lock):
                cores.update(map(int, re.findall(rb"\d+", os.pread(lock, _MOST_LOCK_BYTES, 0))))
    return cores


@contextmanager
def _lock_of(folder: Path) -> Iterator[int | None]:
    """The folder's lock, opened; None if there is none or it is not this user's own."""
    lock = None
    with contextlib.suppress(OSError):
        if _is_ours(folder.lstat(), stat.S_IFDIR):  # else nothing in it is to be touched
            lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield lock if lock is not None and _is_ours(os.fstat(lock), stat.S_IFREG) else None
    finally:
        if lock is not None:
            os.close(lock)


def _is_ours(status: os.stat_result, kind: int) -> bool:
    return stat.S_IFMT(status.st_mode) == kind and status.st_uid == os.geteuid()


def _is_held(lock: int) -> bool:
    """Whether its owner lives; if not, it is held by this descriptor from now on."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
