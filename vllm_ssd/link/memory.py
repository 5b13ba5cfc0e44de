"""Memory that several processes map and that has no name: it ends with the last of them (pure)."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import TypeVar

import numpy as np
import numpy.typing as npt

_MFD_CLOEXEC = 1  # only processes that are handed the descriptor get it
# By way of the C library: Pythons built for an old one (uv's, conda's) have no os.memfd_create.
_libc = ctypes.CDLL(None, use_errno=True)

Number = TypeVar("Number", bound=np.generic)


def anonymous_file() -> int:
    """The descriptor of an empty file in memory, which belongs to no file system.

    Raises:
        OSError: if there is no room for it.
    """
    descriptor = int(_libc.memfd_create(b"vllm-ssd", _MFD_CLOEXEC))
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return descriptor


class SharedMemory:
    """Zeros at first, for all who hand each other the descriptor.

    Args:
        num_bytes: its size, the same in every process.
        descriptor: of memory that another process made; it is closed with this object. None: make it.

    Raises:
        OSError: if there is no room for it. (A write would be too late: that kills the process.)
        ValueError: if the memory that is there is smaller.
    """

    def __init__(self, num_bytes: int, descriptor: int | None = None) -> None:
        self.descriptor = anonymous_file() if descriptor is None else descriptor
        weakref.finalize(self, os.close, self.descriptor)
        if descriptor is None:
            try:
                os.posix_fallocate(self.descriptor, 0, num_bytes)
            except OSError as error:
                raise OSError(f"no memory for {num_bytes / 2**20:.0f} MiB ({error})") from error
        self._map = mmap.mmap(self.descriptor, num_bytes)

    def array(self, dtype: type[Number], shape: tuple[int, ...], offset: int = 0) -> npt.NDArray[Number]:
        """A view of it from byte `offset` on, which keeps it mapped."""
        return np.ndarray(shape, dtype, buffer=self._map, offset=offset)
