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
_MASK = 0xFFFFFFFF
_LEAST = 2.0**-24  # of 1 - u, as in the V2 sampler


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise of every token at n places.

    Args:
        seeds: [n] int64.
        positions: [n] int64.

    Returns:
        [n, vocab_size] float32, on the device of `seeds`.
    """
    uniform = _uniform(_hash(seeds, positions, vocab_size))
    return -torch.log(-torch.log1p(-uniform.clamp_(max=1.0 - _LEAST)))


class RecentNoise:
    """`gumbel` at places that are near to earlier ones, remembered: branches of a request meet the same ones.

    Args:
        vocab_size: tokens.
        device: of the noise.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        most = _REMEMBERED_BYTES // (_STRETCH * vocab_size * 4)
        self._remembered = lru_cache(maxsize=max(most, _LEAST_REMEMBERED))(self._stretch)

    def __call__(self, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
        """[n, vocab_size] float32; `seeds` and `positions` are [n]."""
        rows = []
        for seed, position in zip(seeds, positions, strict=True):
            stretch, offset = divmod(position, _STRETCH)
            rows.append(self._remembered(seed, stretch)[offset])
        return torch.stack(rows)

    def _stretch(self, seed: int, number: int) -> Tensor:
        """Some positions at once, since single ones cost as much."""
        positions = torch.arange(number * _STRETCH, (number + 1) * _STRETCH, device=self._device)
        return gumbel(torch.full_like(positions, seed), positions, self._vocab_size)


def _hash(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """MurmurHash3 (32 bits) of (seed, position, token): [n, vocab_size] int64 in 0..2**32 - 1."""
    prefix = torch.zeros_like(seeds)
    for key in (seeds & _MASK, (seeds >> 32) & _MASK, positions & _MASK):
        prefix = _absorb(prefix, _scramble(key))
    return _finish(_absorb(prefix[:, None], _scrambled_tokens(vocab_size, seeds.device)[None, :]))


@lru_cache(maxsize=4)
def _scrambled_tokens(vocab_size: int, device: torch.device) -> Tensor:
    return _scramble(torch.arange(vocab_size, dtype=torch.int64, device=device))


# Unsigned 32-bit arithmetic in int64: what overflows wraps, and the low half stays right.
def _scramble(key: Tensor) -> Tensor:
    return (_rotate((key * 0xCC9E2D51) & _MASK, 15) * 0x1B873593) & _MASK


def _absorb(state: Tensor, scrambled: Tensor) -> Tensor:
    return (_rotate(state ^ scrambled, 13) * 5 + 0xE6546B64) & _MASK


def _rotate(value: Tensor, bits: int) -> Tensor:
    return ((value << bits) | (value >> (32 - bits))) & _MASK


def _finish(state: Tensor) -> Tensor:
    state = state ^ 16  # the length of the key in bytes
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _MASK
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _MASK
    return state ^ (state >> 16)


def _uniform(random: Tensor) -> Tensor:
    """(random + 1/2) / 2**32 in float32: both halves convert exactly, so small values keep all 32 bits."""
    return (random >> 16).float() * 2.0**-16 + ((random & 0xFFFF).float() + 0.5) * 2.0**-32
