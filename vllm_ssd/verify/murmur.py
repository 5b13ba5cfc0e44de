"""MurmurHash3 of (seed, position, token) as numbers in (0, 1): plain loops, compiled by Numba.

The integers are those of vLLM's V2 sampler (vllm/v1/worker/gpu/sample/gumbel.py, murmur3_uniform32). In
PyTorch it is some sixty operations on a few rows, which take seven times as long. vLLM brings Numba wherever
it runs on the CPU; nothing else needs this module.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import float32, njit, uint32


@njit  # type: ignore[untyped-decorator]
def fill_uniform(
    seeds: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    numbers: npt.NDArray[np.float32],
) -> None:
    """Fill numbers[i, token] with (h + 1/2) / 2**32 for the hash h of seeds[i], positions[i] and token.

    Args:
        seeds, positions: [n].
        numbers: [n, vocab_size].
    """
    for row in range(len(numbers)):
        prefix = uint32(0)
        for key in (seeds[row], seeds[row] >> 32, positions[row]):
            prefix = _absorbed(prefix, uint32(key))
        for token in range(numbers.shape[1]):
            numbers[row, token] = _below_one(_finished(_absorbed(prefix, uint32(token))))


@njit  # type: ignore[untyped-decorator]
def _absorbed(state: np.uint32, key: np.uint32) -> np.uint32:
    key = uint32(_rotated(uint32(key * uint32(0xCC9E2D51)), 15) * uint32(0x1B873593))
    return uint32(_rotated(uint32(state ^ key), 13) * uint32(5) + uint32(0xE6546B64))


@njit  # type: ignore[untyped-decorator]
def _rotated(value: np.uint32, bits: int) -> np.uint32:
    return uint32(uint32(value << uint32(bits)) | uint32(value >> uint32(32 - bits)))


@njit  # type: ignore[untyped-decorator]
def _finished(state: np.uint32) -> np.uint32:
    state = uint32(state ^ uint32(16))  # the length of the key in bytes
    state = uint32((state ^ (state >> uint32(16))) * uint32(0x85EBCA6B))
    state = uint32((state ^ (state >> uint32(13))) * uint32(0xC2B2AE35))
    return uint32(state ^ (state >> uint32(16)))


@njit  # type: ignore[untyped-decorator]
def _below_one(random: np.uint32) -> np.float32:
    """Both halves convert exactly, so that small values keep all 32 bits."""
    high = float32(random >> uint32(16)) * float32(2.0**-16)
    low = (float32(random & uint32(0xFFFF)) + float32(0.5)) * float32(2.0**-32)
    return min(high + low, float32(1.0 - 2.0**-24))  # as in the V2 sampler
