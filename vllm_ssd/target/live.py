"""What the target's half knows of its requests, and of the rows of one step."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_ssd.link.messages import Sampling
from vllm_ssd.link.outcome_cache import NOT_INTRODUCED, Outcome
from vllm_ssd.plan.costs import NONE


@dataclass(frozen=True)
class Drafts:
    """What a row verifies next, and where it came from."""

    kind: str  # NONE, NGRAM or DRAFT
    tokens: list[int]


NOTHING = Drafts(NONE, [])


@dataclass
class LiveRequest:
    """A request that the target is working on."""

    slot: int
    is_slot_ours: bool  # not the model runner's
    sampling: Sampling
    length: int  # tokens so far
    is_excluded: bool = False  # from being introduced: it may be what the draft, or a round, failed of
    epoch: int = NOT_INTRODUCED
    round: int = 0
    drafts: Drafts = NOTHING  # what is being verified


@dataclass(frozen=True)
class Row:
    """A row of a step that has an outcome."""

    index: int  # in the step
    request_id: str
    request: LiveRequest
    outcome: Outcome
    sampled: list[int]  # accepted drafts, then the recovery or bonus token
    verified: Drafts  # what the outcome is of
    num_verified: int  # of those: the scheduler may have cut them
    is_too_long: bool  # for the draft

    @property
    def is_known(self) -> bool:
        """Whether the draft knows the request."""
        return self.outcome.epoch != NOT_INTRODUCED
