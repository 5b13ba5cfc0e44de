"""Keyed sampling of draft rows: temperature and keyed Gumbel noise over whole rows of logits, in one pass.

The noise is that of `vllm_ssd.verify.noise.gumbel`, which as plain PyTorch takes some sixty operations. What
the draft needs of the result are the first few: `topk` of it are the likeliest outcomes of a coupled row, its
argmax is a sample of the distribution.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_MASK = 0xFFFFFFFF


def perturb(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """logits / temperature + noise(seed, position, token); greedy rows stay as they are.

    With Saguaro sampling the logits are log(distribution), reshaped, and the temperature is 1.

    Args:
        logits: [L, V] of any float type.
        temperatures: [L] float32, 0 for greedy rows.
        seeds: [L] int64.
        positions: [L] int64.

    Returns:
        [L, V] float32.
    """
    num_rows, vocab_size = logits.shape
    perturbed = torch.empty_like(logits, dtype=torch.float32)
    if num_rows:
        _perturb_kernel[(num_rows, triton.cdiv(vocab_size, _BLOCK))](
            logits,
            logits.stride(0),
            temperatures,
            seeds,
            positions,
            perturbed,
            perturbed.stride(0),
            vocab_size,
            BLOCK=_BLOCK,
        )
    return perturbed


@triton.jit
def _perturb_kernel(
    logits_ptr,
    logits_stride,
    temperatures_ptr,
    seeds_ptr,
    positions_ptr,
    perturbed_ptr,
    perturbed_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = tokens < vocab_size
    logits = tl.load(logits_ptr + row * logits_stride + tokens, mask=there, other=0.0).to(tl.float32)
    temperature = tl.load(temperatures_ptr + row)
    if temperature > 0.0:
        seed = tl.load(seeds_ptr + row)
        state = _absorb(tl.zeros([BLOCK], tl.uint32), seed.to(tl.uint32, bitcast=False))
        state = _absorb(state, (seed >> 32).to(tl.uint32))
        state = _absorb(state, tl.load(positions_ptr + row).to(tl.uint32))
        state = _finish(_absorb(state, tokens.to(tl.uint32)))
        logits = logits / temperature + _gumbel(state)
    tl.store(perturbed_ptr + row * perturbed_stride + tokens, logits, mask=there)


# MurmurHash3, as in vllm_ssd.verify.murmur; the constants are the algorithm's.
@triton.jit
def _absorb(state, key):
    key = key * tl.full([], 0xCC9E2D51, tl.uint32)
    key = ((key << 15) | (key >> 17)) * tl.full([], 0x1B873593, tl.uint32)
    state = state ^ key
    state = (state << 13) | (state >> 19)
    return state * tl.full([], 5, tl.uint32) + tl.full([], 0xE6546B64, tl.uint32)


@triton.jit
def _finish(state):
    state = state ^ 16
    state = (state ^ (state >> 16)) * tl.full([], 0x85EBCA6B, tl.uint32)
    state = (state ^ (state >> 13)) * tl.full([], 0xC2B2AE35, tl.uint32)
    return state ^ (state >> 16)


@triton.jit
def _gumbel(random):
    # Both halves convert exactly, so that small values keep all 32 bits.
    uniform = (random >> 16).to(tl.float32) * 1.52587890625e-05
    uniform += ((random & 0xFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # log(1 - u): as a series near u = 0, where the largest noise comes from.
    series = 1.0 / 7.0 + uniform / 8.0
    series = 1.0 / 6.0 + uniform * series
    series = 1.0 / 5.0 + uniform * series
    series = 1.0 / 4.0 + uniform * series
    series = 1.0 / 3.0 + uniform * series
    series = 1.0 / 2.0 + uniform * series
    series = 1.0 + uniform * series
    exact = tl.log(tl.maximum(1.0 - uniform, 5.960464477539063e-08))
    return -tl.log(-tl.where(uniform < 0.25, -uniform * series, exact))


def perturb_reference(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """`perturb` in plain PyTorch."""
    is_greedy = (temperatures == 0)[:, None]
    noise = gumbel_reference(seeds, positions, logits.shape[-1]).masked_fill_(is_greedy, 0.0)
    return logits.float() / temperatures[:, None].masked_fill(is_greedy, 1.0) + noise


def gumbel_reference(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """`vllm_ssd.verify.noise.gumbel` in plain PyTorch, on any device."""
    state = torch.zeros_like(seeds)
    for key in (seeds, seeds >> 32, positions):
        state = _absorbed(state, key & _MASK)
    state = _absorbed(state[:, None], torch.arange(vocab_size, device=seeds.device)) ^ 16
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _MASK
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _MASK
    state = state ^ (state >> 16)
    uniform = (state >> 16).float() * 2.0**-16 + ((state & 0xFFFF).float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=1.0 - 2.0**-24)))


# Unsigned 32-bit arithmetic in int64: what overflows wraps, and the low half stays right.
def _absorbed(state: Tensor, key: Tensor) -> Tensor:
    key = (_rotated((key * 0xCC9E2D51) & _MASK, 15) * 0x1B873593) & _MASK
    return (_rotated(state ^ key, 13) * 5 + 0xE6546B64) & _MASK


def _rotated(value: Tensor, bits: int) -> Tensor:
    return ((value << bits) | (value >> (32 - bits))) & _MASK
