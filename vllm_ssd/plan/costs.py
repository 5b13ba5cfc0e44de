"""What rounds yield and take, measured as they go by (pure)."""

from __future__ import annotations

import time

FADING = 0.99  # weight of a value, one value later
NONE, NGRAM, DRAFT = "none", "ngram", "draft"  # where a row's drafts come from


class RunningMean:
    """A mean in which old values fade."""

    def __init__(self, prior: float) -> None:
        self._sum, self._weight = prior, 1.0

    def add(self, value: float) -> None:
        self._sum = FADING * self._sum + value
        self._weight = FADING * self._weight + 1.0

    @property
    def value(self) -> float:
        return self._sum / self._weight


class Costs:
    """What a round yields and takes, measured as the rounds go by."""

    def __init__(self) -> None:
        self.tokens_per_round = RunningMean(1.0)  # of the whole batch
        self.seconds_per_round = RunningMean(0.01)
        self.ngram_accepted = RunningMean(1.0)  # drafts of a row that got n-grams
        self.acceptance = RunningMean(0.7)  # of the draft model's tokens, each
        self._last_round = time.perf_counter()

    def add_round(self, num_tokens: int) -> float:
        """A round has ended, with so many new tokens; returns the seconds it took."""
        now = time.perf_counter()
        # A pause without requests is no long round.
        seconds = min(now - self._last_round, 4 * self.seconds_per_round.value)
        self.seconds_per_round.add(seconds)
        self.tokens_per_round.add(num_tokens)
        self._last_round = now
        return seconds

    def add_row(self, kind: str, num_drafts: int, num_accepted: int) -> None:
        """A row whose drafts were of this kind has been verified."""
        if kind == NGRAM:
            self.ngram_accepted.add(num_accepted)
        elif kind == DRAFT:
            for i in range(min(num_accepted + 1, num_drafts)):
                self.acceptance.add(float(i < num_accepted))

    def speed(self, more_tokens: float, more_seconds: float) -> float:
        """Tokens per second of a round that yields and takes so much more than the usual one."""
        return (self.tokens_per_round.value + more_tokens) / (self.seconds_per_round.value + more_seconds)
