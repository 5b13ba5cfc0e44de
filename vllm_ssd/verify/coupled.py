"""Coupled verification on the target: every position is sampled with the noise that the draft knows too.

The target's token after a position is y = argmax(log p + g), g keyed by (seed, position, token), and a draft
token is accepted while it equals y; the first y that differs is the recovery token, the y after all drafts
the bonus token. The noise depends on nothing that speculation decides, so each y is an exact sample of p
given its prefix, and a request's tokens are the same for any K, any draft and any pattern of hits: they are
those of plain sampling with this noise. Why that is exact: docs/exactness.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ssd.verify.verification import Places, new_tokens


def verify(places: Places, drafts: Tensor, logits: Tensor, bonus: Tensor) -> list[list[int]]:
    """The new tokens of each row.

    Args:
        drafts: [N], row after row.
        logits: [N, V] at the drafts' places, after all constraints.
        bonus: [B], what `draw` returned.
    """
    own = (logits + places.draft_noise).argmax(dim=-1)
    return new_tokens(places.num_drafts.tolist(), (own == drafts).tolist(), own.tolist(), bonus.tolist())


def longest_agreement(
    own: Tensor, drafts: Tensor, begins: Tensor, num_speculative_tokens: int
) -> tuple[Tensor, Tensor]:
    """The same where rows stay on the device (V2 runner): the target's own tokens while drafts equal them.

    Args:
        own: [N], the target's token at each place; the places of a row follow each other.
        drafts: [N], the token that was verified before each place: of place j + 1, the draft of place j. -1
            where there is none. What stands at a row's first place is not looked at.
        begins: [B + 1], each row's first place, and N.
        num_speculative_tokens: K, the most drafts of a row.

    Returns:
        [B, K + 1] int64 new tokens, of which the first [B] int32 count.
    """
    columns = torch.arange(num_speculative_tokens + 1, device=own.device)
    places = begins[:-1, None] + columns  # [B, K + 1]
    last = len(own) - 1
    tokens = own[places.clamp(max=last)]
    is_draft = places + 1 < begins[1:, None]
    agrees = is_draft & (tokens == drafts[(places + 1).clamp(max=last)])
    return tokens, (agrees.cumprod(dim=1).sum(dim=1) + 1).int()
