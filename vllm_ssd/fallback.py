"""What a row gets whose outcome was not foreseen: drafts that cost next to nothing, or none (pure)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

MIN_NGRAM, MAX_NGRAM = 3, 5

Matcher = Callable[[npt.NDArray[np.int32], int, int, int, int], list[int]]


class Fallback(Protocol):
    """Drafts for one missed row."""

    name: str

    def propose(self, tokens: list[int], num_drafts: int) -> list[int]:
        """At most `num_drafts` draft tokens to follow `tokens`, the request's tokens so far."""
        ...


class NoFallback:
    """The missed row takes one exact autoregressive step."""

    name = "none"

    def propose(self, tokens: list[int], num_drafts: int) -> list[int]:
        return []


class NgramFallback:
    """What followed the longest earlier occurrence of the last few tokens (prompt lookup).

    Args:
        match: (tokens, shortest n, longest n, max_model_len, number of drafts) -> drafts.
        max_model_len: the target's.
    """

    name = "ngram"

    def __init__(self, match: Matcher, max_model_len: int) -> None:
        self._match = match
        self._max_model_len = max_model_len

    def propose(self, tokens: list[int], num_drafts: int) -> list[int]:
        history = np.array(tokens, dtype=np.int32)
        return self._match(history, MIN_NGRAM, MAX_NGRAM, self._max_model_len, num_drafts)
