"""Ratio verification on the target: rejection sampling of drafts that were sampled from a known q.

A draft x is accepted if u < p(x) / q(x), strictly; else the recovery token is drawn from max(p - q, 0),
renormalised (Leviathan et al., arXiv 2211.17192). q must be what x was really drawn from, every modification
in it (Saguaro sampling too). All else counts as a point mass, which is exact for any draft: those that nobody
drew (n-gram), and those whose q did not come in time. All that is drawn here is keyed by (seed, position),
and independent of what the draft drew with. Why that is exact: docs/exactness.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_ssd.verify.noise import accept_seeds, uniform
from vllm_ssd.verify.verification import Places, new_tokens

Float32Array = npt.NDArray[np.float32]


class PointMass:
    """All of a draft's distribution on the draft itself: exact for any draft, however it came about.

    For drafts that were not drawn, and for those of which what they were drawn from did not come in time.
    """


# An array is [at least the row's number of drafts, at most V]: the draft may lack the target's last tokens.
DraftDistribution = Float32Array | PointMass


def verify(
    places: Places, distributions: Sequence[DraftDistribution], drafts: Tensor, logits: Tensor, bonus: Tensor
) -> list[list[int]]:
    """The new tokens of each row.

    Args:
        distributions: [B].
        drafts: [N], row after row.
        logits: [N, V] at the drafts' places, after all constraints.
        bonus: [B], what `draw` returned.
    """
    rows, positions = places.of_drafts
    is_greedy = places.is_greedy[rows]
    is_draft = drafts >= 0  # vLLM fills some rows up with -1, such as prompts of one token
    at_draft = drafts.clamp(min=0)[:, None].long()
    p = logits.softmax(dim=-1)
    q = _stacked(distributions, places.num_drafts.tolist(), at_draft, is_draft, p)
    u = uniform(accept_seeds(places.seeds[rows]), positions)
    is_kept = is_draft & (u * q.gather(1, at_draft)[:, 0] < p.gather(1, at_draft)[:, 0])
    rest = (p - q).clamp_(min=0.0)
    # Where q is p up to rounding nothing is left, and p is as good.
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)
    recovery = (rest.log() + places.draft_noise).argmax(dim=-1)
    likeliest = logits.argmax(dim=-1)
    is_kept = torch.where(is_greedy, drafts == likeliest, is_kept)
    tokens = torch.where(is_greedy, likeliest, torch.where(is_kept, drafts, recovery))
    return new_tokens(places.num_drafts.tolist(), is_kept.tolist(), tokens.tolist(), bonus.tolist())


def distribution_as_logits(
    distribution: DraftDistribution, drafts: Sequence[int], temperature: float, vocab_size: int
) -> Tensor:
    """[n, V] logits of n drafts whose softmax at the temperature is their q, for vLLM's V2 verifier."""
    q = torch.zeros(len(drafts), vocab_size)
    if isinstance(distribution, PointMass):
        q[torch.arange(len(drafts)), torch.tensor(drafts)] = 1.0
    else:
        q[:, : distribution.shape[1]] = torch.from_numpy(distribution[: len(drafts)])
    return q.log() * temperature


def _stacked(
    distributions: Sequence[DraftDistribution],
    num_drafts: Sequence[int],
    at_draft: Tensor,
    is_draft: Tensor,
    p: Tensor,
) -> Tensor:
    """[N, V] q at every draft's place; zero where there is no draft."""
    q, begin = torch.zeros_like(p), 0
    for distribution, count in zip(distributions, num_drafts, strict=True):
        part = slice(begin, begin + count)
        if isinstance(distribution, PointMass):
            q[part].scatter_(1, at_draft[part], is_draft[part, None].float())
        else:
            q[part, : distribution.shape[1]] = torch.from_numpy(distribution[:count])
        begin += count
    return q
