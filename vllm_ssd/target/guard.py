"""What stands between a model runner and its half of the rounds: no exception of SSD's own ends the target.

A failure costs the requests of its step their drafts for that round; then they are introduced to the draft
anew. Where one of them is the cause, the next round shows which: it is done row by row, and a row that fails
again is excluded for good. Without drafts a request is answered as without speculation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from vllm_ssd.failures import Failures
from vllm_ssd.link.counters import Counters
from vllm_ssd.link.messages import Sampling
from vllm_ssd.link.outcome_cache import NOT_INTRODUCED
from vllm_ssd.plan.planner import Plan
from vllm_ssd.target.live import LiveRequest
from vllm_ssd.target.proposer import LookedUp, Proposer
from vllm_ssd.target.served_probs import ServedProbs
from vllm_ssd.verify.ratio import DraftDistribution, PointMass

logger = logging.getLogger("vllm.ssd")


class Guard:
    """A `Proposer` that does not raise.

    Args:
        proposer: does the work.
        probs: what drafts were drawn from.
        counters: the target's.
    """

    def __init__(self, proposer: Proposer, probs: ServedProbs, counters: Counters) -> None:
        self.proposer = proposer
        self._probs = probs
        self._counters = counters
        self._failures = Failures(logger, "a round failed; its requests continue without drafts for now")
        self._is_suspicious = False  # the last round failed, and one of its rows may be why

    @property
    def generation(self) -> int:
        return self.proposer.generation

    def plan(self, batch: int) -> Plan:
        """See `RoundPlanner.plan`."""
        return self.proposer.planner.plan(batch)

    def start(
        self, request_id: str, describe: Callable[[], tuple[list[int], Sampling]], slot: int | None = None
    ) -> int:
        """A request enters the batch; see `Proposer.start`.

        Args:
            describe: its tokens so far, and how the target samples it.
        """
        try:
            tokens, sampling = describe()
            return self.proposer.start(request_id, tokens, sampling, slot)
        except Exception:
            self.note_failure()
            self.proposer.exclude([request_id])
            return NOT_INTRODUCED

    def stop(self, request_id: str) -> None:
        """A request leaves the batch; see `Proposer.stop`."""
        try:
            self.proposer.stop(request_id)
        except Exception:
            self.note_failure()

    def propose(
        self, request_ids: Sequence[str], sampled: Sequence[list[int]], num_verified: Sequence[int]
    ) -> list[list[int]]:
        """Drafts for the next verification of each row; see `Proposer.propose`."""
        if self._is_suspicious:
            self._is_suspicious = False
            rows = zip(request_ids, sampled, num_verified, strict=True)
            return [self._propose_one(*row) for row in rows]
        try:
            return self.proposer.propose(request_ids, sampled, num_verified)
        except Exception:
            self.note_failure()
            self.proposer.abandon(request_ids)
            self._is_suspicious = True
            return [[] for _ in request_ids]

    def _propose_one(self, request_id: str, sampled: list[int], num_verified: int) -> list[int]:
        try:
            return self.proposer.propose([request_id], [sampled], [num_verified])[0]
        except Exception:
            self.note_failure()
            self.proposer.exclude([request_id])
            return []

    def receive(self, request_ids: Sequence[str], sampled: Sequence[list[int]], found: LookedUp) -> None:
        """A step whose outcomes were looked up on the device; see `Proposer.receive`."""
        try:
            self.proposer.receive(request_ids, sampled, found)
        except Exception:
            self.note_failure()
            self.proposer.abandon(request_ids, found.drafts)

    def exclude(self, request_ids: Sequence[str]) -> None:
        """See `Proposer.exclude`."""
        self.proposer.exclude(request_ids)

    def live(self, request_id: str) -> LiveRequest | None:
        """See `Proposer.live`."""
        return self.proposer.live(request_id)

    def verified(self, request_id: str) -> list[int]:
        """See `Proposer.verified`."""
        return self.proposer.verified(request_id)

    def keys(self) -> dict[int, tuple[int, int]]:
        """See `Proposer.keys`."""
        return self.proposer.keys()

    def distributions(self, request_ids: Sequence[str], num_drafts: Sequence[int]) -> list[DraftDistribution]:
        """What the drafts were drawn from; see `ServedProbs.read`. A point mass is exact for any draft."""
        try:
            return self._probs.read([self.proposer.live(name) for name in request_ids], num_drafts)
        except Exception:
            self.note_failure()
            return [PointMass() for _ in request_ids]

    def note_failure(self) -> None:
        """Log and count the exception that is being handled."""
        self._failures.note()
        self._counters.add("failures")
