"""Coupled verification on the target: every position is sampled with the noise that the draft knows too.

The target's token after a position is y = argmax(log p + g), g keyed by (seed, position, token), and a draft
token is accepted while it equals y; the first y that differs is the recovery token, the y after all drafts
the bonus token. The noise depends on nothing that speculation decides, so each y is an exact sample of p
given its prefix, and a request's tokens are the same for any K, any draft and any pattern of hits: they are
those of plain sampling with this noise. Why that is exact: docs/exactness.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from vllm_ssd import compat
from vllm_ssd.verification import Places, draw, new_tokens


@contextmanager
def coupled_sampling(sampler: Any, places: Places) -> Iterator[None]:
    """Let vLLM's V1 samplers draw with the keyed noise.

    Args:
        sampler: vLLM's sampler; what it does before it draws (temperature, penalties, ...) stays as it is.
        places: of the one step that is sampled meanwhile.
    """
    with compat.sampling_replaced(sampler, partial(draw, places), partial(verify, places)):
        yield


def verify(places: Places, drafts: Tensor, logits: Tensor, bonus: Tensor) -> list[list[int]]:
    """The new tokens of each row.

    Args:
        drafts: [N], row after row.
        logits: [N, V] at the drafts' places, after all constraints.
        bonus: [B], what `draw` returned.
    """
    own = (logits + places.draft_noise).argmax(dim=-1)
    return new_tokens(places.num_drafts.tolist(), (own == drafts).tolist(), own.tolist(), bonus.tolist())
