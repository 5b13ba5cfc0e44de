"""A draft process that does what the test says, and records what it would be told."""

from __future__ import annotations

import numpy as np

from vllm_ssd.link.draft_probs import DraftProbs
from vllm_ssd.link.messages import Start, ToDraft
from vllm_ssd.link.outcome_cache import OutcomeCache
from vllm_ssd.target.draft_link import News


class Link:
    """Stands in for `DraftSupervisor`."""

    step_seconds = 0.001
    max_model_len = 1_000

    def __init__(self, cache: OutcomeCache, distributions: DraftProbs) -> None:
        self.outcomes = cache
        self.table = distributions
        self.ready = True
        self.news = News.NOTHING  # of the next check
        self.sent: list[ToDraft] = []

    @property
    def cache(self) -> OutcomeCache | None:
        return self.outcomes if self.ready else None

    @property
    def distributions(self) -> DraftProbs | None:
        return self.table if self.ready else None

    def check(self) -> News:
        news, self.news = self.news, News.NOTHING
        if news is not News.NOTHING:
            self.ready = news is News.READY
        return news

    def give_up(self, reason: str) -> None:
        self.ready = False

    def send(self, message: ToDraft) -> bool:
        self.sent.append(message)
        return True

    def take_sent(self) -> list[ToDraft]:
        sent, self.sent = self.sent, []
        return sent

    def publish(self, start: Start, round_: int, k: int, token: int, drafts: list[int]) -> None:
        """As the draft does for one predicted outcome."""
        entry = round_ % self.outcomes.entries.shape[1]
        self.outcomes.open_branches(start.slot, entry, start.epoch, round_, np.array([k]), np.array([token]))
        for depth, draft in enumerate(drafts):
            self.outcomes.publish(start.slot, entry, depth, np.array([draft]))
