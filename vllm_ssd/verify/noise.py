"""The noise that target and draft share: Gumbel noise keyed by (seed, position, token).

argmax over t of log p(t) + g(seed, position, t) is an exact sample of p (Gumbel-max), and where draft and
target use the same g their samples agree as often as p and q allow. The integers are those of the hash that
vLLM's V2 sampler draws with (vllm/v1/worker/gpu/sample/gumbel.py, murmur3_uniform32), so that one seed means
the same noise there; `position` is, as there, that of the token whose logits are sampled, one before the new
token's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_STRETCH = 8  # positions
_REMEMBERED_BYTES = 64 << 20
_LEAST_REMEMBERED = 16  # stretches, whatever the vocabulary

# Streams of noise that are independent of one another, made from one seed. The values mean nothing.
_DRAFT_STREAM = 0x2545F4914F6CDD1D
_ACCEPT_STREAM = 0x5851F42D4C957F2D


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise of every token at n places, on the CPU; `kernels.noise` has it for CUDA.

    Args:
        seeds: [n] int64.
        positions: [n] int64.

    Returns:
        [n, vocab_size] float32.
    """
    return _uniform(seeds, positions, vocab_size).neg_().log1p_().neg_().log_().neg_()


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """[n] float32 in (0, 1), one number at each of n places; `seeds` and `positions` are [n] int64."""
    return _uniform(seeds, positions, 1)[:, 0]


def draft_seed(seed: int, epoch: int, round_: int) -> int:
    """The seed of drafts made in a round, for verifiers that need them independent of all the target draws.

    A position may be drafted again in a later round, and whether it is may depend on what was drafted before;
    so may whether the request begins anew, with another epoch.
    """
    key = _mixed(seed ^ _DRAFT_STREAM)
    for number in (epoch, round_):  # not a sum, in which the next seed and epoch meet a later round
        key = _mixed(key + number)
    return wrapped_to_int64(key)


def _mixed(key: int) -> int:
    """Another 64-bit integer for each: splitmix64's finalizer (https://prng.di.unimi.it/splitmix64.c)."""
    key = (key + 0x9E3779B97F4A7C15) % 2**64
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB % 2**64
    return key ^ (key >> 31)


def accept_seeds(seeds: Tensor) -> Tensor:
    """[n] seeds of the numbers that decide whether drafts are accepted."""
    return seeds ^ _ACCEPT_STREAM


def wrapped_to_int64(value: int) -> int:
    """The 64-bit integer with the same low bits."""
    return (value + 2**63) % 2**64 - 2**63


class RecentNoise:
    """`gumbel` at places that are near to earlier ones, remembered: branches of a request meet the same ones.

    Args:
        vocab_size: tokens.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._most = max(_REMEMBERED_BYTES // (_STRETCH * vocab_size * 4), _LEAST_REMEMBERED)
        self._remembered = lru_cache(maxsize=self._most)(self._stretch)

    def __call__(self, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
        """[n, vocab_size] float32; `seeds` and `positions` are [n]."""
        stretches = [(seed, position // _STRETCH) for seed, position in zip(seeds, positions, strict=True)]
        if len(set(stretches)) > self._most:  # each would be forgotten before its next use
            return gumbel(torch.tensor(seeds), torch.tensor(positions), self._vocab_size)
        return torch.stack(
            [
                self._remembered(*stretch)[position % _STRETCH]
                for stretch, position in zip(stretches, positions, strict=True)
            ]
        )

    def _stretch(self, seed: int, number: int) -> Tensor:
        """Some positions at once: a call costs more than its rows."""
        positions = torch.arange(number * _STRETCH, (number + 1) * _STRETCH)
        return gumbel(torch.full_like(positions, seed), positions, self._vocab_size)


def _uniform(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """[n, vocab_size] float32 in (0, 1)."""
    from vllm_ssd.verify.murmur import (
        fill_uniform,  # on CUDA there may be no Numba, and kernels instead of this
    )

    numbers = torch.empty(len(seeds), vocab_size, dtype=torch.float32, device="cpu")  # whatever the defaults
    fill_uniform(seeds.numpy(), positions.numpy(), numbers.numpy())
    return numbers
