"""Memory that several processes map (pure)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt


def map_int64(path: Path, shape: tuple[int, ...], *, create: bool) -> npt.NDArray[np.int64]:
    """An int64 array over a file that other processes map as well.

    Args:
        path: the file, on a memory file system if it is to be fast.
        shape: of the array; the same in every process.
        create: make the file, filled with zeros. Otherwise it has to be there.

    Raises:
        FileNotFoundError: if it is not there.
    """
    if create:
        path.write_bytes(bytes(8 * math.prod(shape)))
    # The plain array is the same memory, without memmap's slower indexing.
    return np.asarray(np.memmap(path, np.int64, "r+", shape=shape))
