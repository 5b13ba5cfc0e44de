"""What the drafts that are being verified were drawn from, for ratio verification."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from vllm_ssd.plan.costs import DRAFT, RunningMean
from vllm_ssd.target.draft_link import DraftLink, poll_until
from vllm_ssd.target.live import LiveRequest
from vllm_ssd.target.observer import RoundObserver
from vllm_ssd.verify.ratio import DraftDistribution, PointMass

DEADLINE_S = 0.01  # for a whole step; they are there before a verification ends, unless the draft is not
MOST_LATE = 0.1  # share of rows; where more are late, waiting for them brings nothing
TRY_EVERY = 32  # steps, to see whether that is still so
FIRST_STEPS = 64  # before anything is concluded


class ServedProbs:
    """Reads them from where the draft leaves them, once it has heard of an outcome.

    Args:
        link: the draft process.
        observer: is told of waits and of rows that are late.
    """

    def __init__(self, link: DraftLink, observer: RoundObserver) -> None:
        self._link = link
        self._observer = observer
        self._num_steps = 0
        self._late = RunningMean(0.0)

    def read(
        self, requests: Sequence[LiveRequest | None], num_drafts: Sequence[int]
    ) -> list[DraftDistribution]:
        """What each row's drafts were drawn from; a point mass where they were not, or where it is late.

        Args:
            requests: [B].
            num_drafts: [B], drafts that are verified, which may be fewer than were proposed.
        """
        began = time.perf_counter_ns()
        self._num_steps += 1
        are_late = self._num_steps > FIRST_STEPS and self._late.value > MOST_LATE
        waits = not are_late or self._num_steps % TRY_EVERY == 0
        found: list[DraftDistribution] = []
        for request, count in zip(requests, num_drafts, strict=True):
            if request is None or not count or not _are_drawn(request):
                found.append(PointMass())
                continue
            left_s = DEADLINE_S - (time.perf_counter_ns() - began) / 1e9 if waits else 0.0
            probs = self._read(request, count, left_s)
            if waits:
                self._late.add(float(probs is None))
            if probs is None:
                self._observer.add_late_probs()
            found.append(PointMass() if probs is None else probs)
        self._observer.add_critical_path(time.perf_counter_ns() - began)
        return found

    def _read(
        self, request: LiveRequest, num_drafts: int, seconds: float
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None:
        probs = None

        def is_there() -> bool:
            nonlocal probs
            distributions = self._link.distributions
            if distributions is None:  # there is no draft any more
                return True
            probs = distributions.read(request.slot, request.epoch, request.round, num_drafts)
            return probs is not None

        if not is_there():
            self._observer.add_wait(poll_until(is_there, seconds))
        return probs


def _are_drawn(request: LiveRequest) -> bool:
    """Whether the request's drafts were drawn by the draft, and not greedy or of a backup."""
    return request.drafts.kind == DRAFT and request.sampling.temperature > 0
