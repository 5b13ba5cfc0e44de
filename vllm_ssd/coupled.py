"""Coupled verification on the target: every position is sampled with the noise that the draft knows too.

The target's token after a position is y = argmax(log p + g), g keyed by (seed, position, token), and a draft
token is accepted while it equals y; the first y that differs is the recovery token, the y after all drafts
the bonus token. The noise depends on nothing that speculation decides, so each y is an exact sample of p
given its prefix, and a request's tokens are the same for any K, any draft and any pattern of hits: they are
those of plain sampling with this noise. Why that is exact: docs/exactness.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vllm_ssd import compat
from vllm_ssd.noise import gumbel


@dataclass(frozen=True)
class Places:
    """Where one step of a batch of B requests samples."""

    seeds: Tensor  # [B] int64
    positions: Tensor  # [B] int64, of each request's last token
    num_drafts: Tensor  # [B] int64, drafts to verify after it; N in all
    is_greedy: Tensor  # [B] bool


@contextmanager
def coupled_sampling(sampler: Any, places: Places) -> Iterator[None]:
    """Let vLLM's V1 samplers draw with the keyed noise.

    Args:
        sampler: vLLM's sampler; what it does before it draws (temperature, penalties, ...) stays as it is.
        places: of the one step that is sampled meanwhile.
    """
    with compat.sampling_replaced(sampler, partial(_draw, places), partial(_verify, places)):
        yield


def _draw(places: Places, logits: Tensor) -> Tensor:
    """The token of each row after all its drafts: [B, V] constrained logits -> [B]."""
    return _sample(places, torch.arange(len(logits)), places.num_drafts, logits)


def _verify(places: Places, drafts: Tensor, logits: Tensor, bonus: Tensor) -> list[list[int]]:
    """The new tokens of each row.

    Args:
        drafts: [N], row after row.
        logits: [N, V] at the drafts' places, after all constraints.
        bonus: [B], what `_draw` returned.
    """
    counts = places.num_drafts
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    offsets = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    sampled = _sample(places, rows, offsets, logits)
    return accept(counts.tolist(), drafts.tolist(), sampled.tolist(), bonus.tolist())


def _sample(places: Places, rows: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    noise = gumbel(places.seeds[rows], places.positions[rows] + offsets, logits.shape[-1])
    return (logits + noise.masked_fill_(places.is_greedy[rows, None], 0.0)).argmax(dim=-1)


def accept(
    num_drafts: Sequence[int], drafts: Sequence[int], sampled: Sequence[int], bonus: Sequence[int]
) -> list[list[int]]:
    """The new tokens of each row: the target's own samples up to the first that no draft foresaw.

    Args:
        num_drafts: [B], they sum to N.
        drafts: [N].
        sampled: [N], the target's token at each draft's place.
        bonus: [B], the target's token after all drafts.
    """
    tokens, begin = [], 0
    for count, last in zip(num_drafts, bonus, strict=True):
        row = []
        for draft, own in zip(drafts[begin : begin + count], sampled[begin : begin + count], strict=True):
            row.append(own)
            if own != draft:
                break
        else:
            row.append(last)
        tokens.append(row)
        begin += count
    return tokens
