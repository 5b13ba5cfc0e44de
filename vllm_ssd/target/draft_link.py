"""The target's view of its draft process, and how the target waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from typing import Protocol

from vllm_ssd.link.draft_probs import DraftProbs
from vllm_ssd.link.messages import ToDraft
from vllm_ssd.link.outcome_cache import OutcomeCache

POLL_S = 50e-6


class News(Enum):
    """What `DraftLink.check` has noticed."""

    NOTHING = "nothing"
    READY = "ready"  # a draft that knows no request: it has just loaded, or was told to forget them
    DIED = "died"  # while it served; one of the requests that it served may be why


class DraftLink(Protocol):
    """The draft process, as far as a round needs it."""

    @property
    def cache(self) -> OutcomeCache | None:
        """The outcome cache of the draft that is ready now, or None."""
        ...

    @property
    def distributions(self) -> DraftProbs | None:
        """What served drafts were drawn from, while the draft is ready and draws any."""
        ...

    @property
    def step_seconds(self) -> float:
        """What a step of the draft without prompts took of late, 0 before the first."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of a request and its drafts that the draft can serve."""
        ...

    def check(self) -> News:
        """Notice what happened to the draft."""
        ...

    def send(self, message: ToDraft) -> bool:
        """Tell the draft; False if it cannot be told."""
        ...

    def give_up(self, reason: str) -> None:
        """End the draft until somebody asks for a restart; decoding continues without it."""
        ...


def poll_until(is_done: Callable[[], bool], seconds: float) -> int:
    """Wait until something is so, at most so long; returns the nanoseconds that it took."""
    began = time.perf_counter_ns()
    while not is_done() and time.perf_counter_ns() - began < seconds * 1e9:
        time.sleep(POLL_S)
    return time.perf_counter_ns() - began
