"""What the verifiers of sampled requests share: where a step samples, and which tokens it yields.

A verifier decides at every draft's place whether the draft is kept, and which token stands there if not; the
first place whose draft is not kept ends the row. Greedy rows of the batch are the limit of temperature 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vllm_ssd.verify.noise import gumbel


@dataclass(frozen=True)
class Places:
    """Where one step of a batch of B requests samples; on the CPU, where NumPy does small things faster."""

    seeds: Tensor  # [B] int64
    positions: Tensor  # [B] int64, of each request's last token
    num_drafts: Tensor  # [B] int64, drafts to verify after it; N in all
    is_greedy: Tensor  # [B] bool
    vocab_size: int  # V

    @cached_property
    def of_drafts(self) -> tuple[Tensor, Tensor]:
        """Of each draft's place: its row [N], and its position [N] (that of the token before it)."""
        counts = self.num_drafts.numpy()
        rows = np.repeat(np.arange(len(counts)), counts)
        offsets = np.arange(len(rows)) - (counts.cumsum() - counts)[rows]
        return torch.from_numpy(rows), torch.from_numpy(self.positions.numpy()[rows] + offsets)

    @property
    def draft_noise(self) -> Tensor:
        """[N, V] at the drafts' places; zero in greedy rows."""
        return self._noise[: -len(self.seeds)]

    @property
    def last_noise(self) -> Tensor:
        """[B, V] at each row's place after all its drafts; zero in greedy rows."""
        return self._noise[-len(self.seeds) :]

    @cached_property
    def _noise(self) -> Tensor:
        """[N + B, V], in one go: a call costs more than its rows."""
        rows, positions = (places.numpy() for places in self.of_drafts)
        rows = np.concatenate([rows, np.arange(len(self.seeds))])
        positions = np.concatenate([positions, self.positions.numpy() + self.num_drafts.numpy()])
        noise = gumbel(
            torch.from_numpy(self.seeds.numpy()[rows]), torch.from_numpy(positions), self.vocab_size
        )
        is_greedy = self.is_greedy.numpy()[rows]
        if is_greedy.any():
            noise[torch.from_numpy(is_greedy)] = 0.0
        return noise


def draw(places: Places, logits: Tensor) -> Tensor:
    """The token of each row after all its drafts: [B, V] constrained logits -> [B]."""
    return (logits + places.last_noise).argmax(dim=-1)


def new_tokens(
    num_drafts: Sequence[int], is_kept: Sequence[bool], tokens: Sequence[int], bonus: Sequence[int]
) -> list[list[int]]:
    """The new tokens of each row: drafts as long as they are kept, then one of the target's own.

    Args:
        num_drafts: [B], they sum to N.
        is_kept: [N].
        tokens: [N], the draft where it is kept, else the token in its stead.
        bonus: [B], the target's token after all drafts.
    """
    rows, begin = [], 0
    for count, last in zip(num_drafts, bonus, strict=True):
        row = []
        for kept, token in zip(is_kept[begin : begin + count], tokens[begin : begin + count], strict=True):
            row.append(token)
            if not kept:
                break
        else:
            row.append(last)
        rows.append(row)
        begin += count
    return rows
