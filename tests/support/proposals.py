"""A proposer with a link that records what the draft would be told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from link import Link

from vllm_ssd.link.counters import Counters, target_fields
from vllm_ssd.link.draft_probs import DraftProbs
from vllm_ssd.link.messages import (
    Outcomes,
    RoundOutcome,
    Sampling,
    Start,
)
from vllm_ssd.link.outcome_cache import OutcomeCache
from vllm_ssd.plan.costs import NGRAM, Costs
from vllm_ssd.plan.planner import FixedPlan, Plan
from vllm_ssd.target.backup import MissedOutcome
from vllm_ssd.target.draft_link import DraftLink
from vllm_ssd.target.live import Drafts
from vllm_ssd.target.observer import RoundObserver
from vllm_ssd.target.proposer import Proposer
from vllm_ssd.target.served_probs import ServedProbs

K, SLOTS, BUDGET, VOCAB = 3, 2, 8, 100
HISTORY = {"a": [1, 2, 3], "b": [4, 5], "c": [6]}


class AlwaysMore:
    """A backup that always has drafts."""

    def __init__(self, history: dict[str, list[int]]) -> None:
        self._history = history

    def propose(self, missed: Sequence[MissedOutcome], num_drafts: int, draft: DraftLink) -> list[Drafts]:
        more = range(90, 89 + num_drafts)
        return [Drafts(NGRAM, [self._history[row.request_id][-1], *more]) for row in missed]


class Bench:
    """A proposer and everything around it."""

    def __init__(self, wait_s: float = 0.0) -> None:
        self.link = Link(
            OutcomeCache(SLOTS, BUDGET, K, VOCAB),
            DraftProbs(SLOTS, K, VOCAB),
        )
        self.counters = Counters(target_fields(K))
        self.history = {name: list(tokens) for name, tokens in HISTORY.items()}
        self.observer = RoundObserver(self.counters, Costs())
        self.probs = ServedProbs(self.link, self.observer)
        self.proposer = Proposer(
            self.link,
            SLOTS,
            AlwaysMore(self.history),
            lambda name: self.history[name],
            self.observer,
            FixedPlan(Plan(K, BUDGET)),
            VOCAB,
            K,
            wait_s,
        )

    def start(self, name: str, temperature: float = 0.0) -> Start:
        self.proposer.start(name, self.history[name], Sampling(temperature))
        (message,) = self.link.take_sent()
        assert isinstance(message, Start)
        return message

    def distributions(self, names: list[str], counts: list[int]) -> list[Any]:
        return self.probs.read([self.proposer.live(name) for name in names], counts)

    def outcomes(self) -> list[RoundOutcome]:
        (message,) = self.link.take_sent()
        assert isinstance(message, Outcomes)
        return message.rows
