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
_LEAST = 2.0**-24  # of 1 - u, as in the V2 sampler

# Streams of noise that are independent of one another, made from one seed. The values mean nothing.
_DRAFT_STREAM = 0x2545F4914F6CDD1D
_ACCEPT_STREAM = 0x5851F42D4C957F2D
_ROUND_STRIDE = 0x1E3779B97F4A7C15


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise of every token at n places.

    Args:
        seeds: [n] int64.
        positions: [n] int64.

    Returns:
        [n, vocab_size] float32, on the device of `seeds`.
    """
    noise = _below_one(_hash(seeds, positions, vocab_size))
    return noise.neg_().log1p_().neg_().log_().neg_()


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """[n] float32 in (0, 1), one number at each of n places; `seeds` and `positions` are [n] int64."""
    return _below_one(_hash(seeds, positions, 1))[:, 0]


def draft_seed(seed: int, round_: int) -> int:
    """The seed of drafts made in a round, for verifiers that need them independent of all the target draws.

    A position may be drafted again in a later round, and whether it is may depend on what was drafted before.
    """
    return wrapped_to_int64((seed ^ _DRAFT_STREAM) + round_ * _ROUND_STRIDE)


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
    """MurmurHash3 (32 bits) of (seed, position, token): [n, vocab_size], bits in int32."""
    keys = _scrambled(torch.stack([seeds, seeds >> 32, positions]).int())  # the low halves
    prefix = torch.zeros_like(keys[0])
    for key in keys:
        _absorb(prefix.bitwise_xor_(key))
    state = prefix[:, None] ^ _scrambled_tokens(vocab_size, seeds.device)
    _absorb(state).bitwise_xor_(16)  # the length of the key in bytes
    _fold(state, 16).mul_(_signed(0x85EBCA6B))
    _fold(state, 13).mul_(_signed(0xC2B2AE35))
    return _fold(state, 16)


@lru_cache(maxsize=4)
def _scrambled_tokens(vocab_size: int, device: torch.device) -> Tensor:
    return _scrambled(torch.arange(vocab_size, dtype=torch.int32, device=device))


def _scrambled(keys: Tensor) -> Tensor:
    return _rotate(keys * _signed(0xCC9E2D51), 15).mul_(_signed(0x1B873593))


# In place from here on, which for many rows is several times as fast. int32 wraps as unsigned integers do.
def _absorb(mixed: Tensor) -> Tensor:
    return _rotate(mixed, 13).mul_(5).add_(_signed(0xE6546B64))


def _rotate(value: Tensor, bits: int) -> Tensor:
    high = _shifted_right(value, 32 - bits)
    return value.bitwise_left_shift_(bits).bitwise_or_(high)


def _fold(state: Tensor, bits: int) -> Tensor:
    return state.bitwise_xor_(_shifted_right(state, bits))


def _shifted_right(value: Tensor, bits: int) -> Tensor:
    """As if it had no sign."""
    return (value >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _signed(word: int) -> int:
    """The 32-bit integer with the same bits."""
    return (word + 2**31) % 2**32 - 2**31


def _below_one(random: Tensor) -> Tensor:
    """(random + 1/2) / 2**32 in float32: both halves convert exactly, so small values keep all 32 bits."""
    low = (random & 0xFFFF).float().add_(0.5).mul_(2.0**-32)
    return _shifted_right(random, 16).float().mul_(2.0**-16).add_(low).clamp_(max=1.0 - _LEAST)
