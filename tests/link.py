"""A draft process that does what the test says, and records what it would be told."""

from __future__ import annotations

import numpy as np

from vllm_ssd.channel import Start, ToDraft
from vllm_ssd.draft_laws import DraftLaws
from vllm_ssd.outcome import OutcomeCache


class Link:
    """Stands in for `DraftSupervisor`."""

    step_seconds = 0.001

    def __init__(self, cache: OutcomeCache, laws: DraftLaws) -> None:
        self.outcomes = cache
        self.table = laws
        self.ready = True
        self.newly_ready = False
        self.sent: list[ToDraft] = []

    @property
    def cache(self) -> OutcomeCache | None:
        return self.outcomes if self.ready else None

    @property
    def laws(self) -> DraftLaws | None:
        return self.table if self.ready else None

    def check(self) -> bool:
        newly, self.newly_ready = self.newly_ready, False
        self.ready |= newly
        return newly

    def give_up(self, reason: str) -> None:
        self.ready = False

    def send(self, message: ToDraft) -> None:
        self.sent.append(message)

    def take_sent(self) -> list[ToDraft]:
        sent, self.sent = self.sent, []
        return sent

    def publish(self, start: Start, round_: int, k: int, token: int, drafts: list[int]) -> None:
        """As the draft does for one foreseen outcome."""
        entry = round_ % self.outcomes.entries.shape[1]
        self.outcomes.open_branches(start.slot, entry, start.epoch, round_, np.array([k]), np.array([token]))
        for depth, draft in enumerate(drafts):
            self.outcomes.publish(start.slot, entry, depth, np.array([draft]))
