"""What the draft learns from outcomes: how often drafts are accepted, how likely it held the rest (pure).

Both are what Theorem 12 asks for: a, the acceptance per token, and r, the exponent of miss(F) ~ F^-r, where
miss(F) is the share of outcomes that are not among the F likeliest candidates. Rounds are kept apart by where
the verified drafts came from and by temperature, since both change a and r. Old rounds fade.
"""

from __future__ import annotations

import numpy as np

FADING = 0.995  # weight of a round, one round later: some 200 rounds count
PRIOR_ROUNDS = 16
PRIOR_ACCEPTANCE = 0.8
PRIOR_MISS = 0.3  # by the likeliest candidate alone
LEAST_EXPONENT, GREATEST_EXPONENT = 0.1, 4.0


class OutcomeStatistics:
    """Outcomes of one kind of round.

    Args:
        num_ranks: candidates that are ranked; the rest counts as one.
    """

    def __init__(self, num_ranks: int) -> None:
        self._accepted = PRIOR_ROUNDS * PRIOR_ACCEPTANCE
        self._tested = float(PRIOR_ROUNDS)
        misses = PRIOR_MISS / np.arange(1, num_ranks + 1)
        self._ranks = PRIOR_ROUNDS * -np.diff(misses, prepend=1.0, append=0.0)  # [num_ranks + 1]

    def add(self, num_accepted: int, num_sent: int, rank: int | None) -> None:
        """Take in one round.

        Args:
            num_accepted: k.
            num_sent: drafts that were verified.
            rank: of the recovery or bonus token among the candidates at k, from 0; None if those were not
                known yet.
        """
        if 0 < num_sent >= num_accepted:  # else nothing was tested, or drafts of before a restart
            self._accepted = FADING * self._accepted + num_accepted
            self._tested = FADING * self._tested + min(num_accepted + 1, num_sent)
        if rank is not None:
            self._ranks *= FADING
            self._ranks[min(rank, len(self._ranks) - 1)] += 1

    @property
    def acceptance(self) -> float:
        """a, inside (0, 1)."""
        return min(max(self._accepted / self._tested, 0.01), 0.99)

    @property
    def exponent(self) -> float:
        """r, by least squares of log miss(F) on log F, each F with the weight of the misses it rests on."""
        misses = self._ranks.sum() - self._ranks.cumsum()[:-1]  # [num_ranks]
        known = misses > 0.5
        if known.sum() < 2:
            return 1.0
        x, y, weights = np.log(np.arange(1, len(misses) + 1))[known], np.log(misses[known]), misses[known]
        x = x - np.average(x, weights=weights)
        slope = (weights * x * y).sum() / (weights * x * x).sum()
        return float(min(max(-slope, LEAST_EXPONENT), GREATEST_EXPONENT))


class Measured:
    """Statistics by kind of round.

    Args:
        num_ranks: see `OutcomeStatistics`.
    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._kinds: dict[tuple[bool, float], OutcomeStatistics] = {}

    def of(self, verifies_branch: bool, temperature: float) -> OutcomeStatistics:
        """Those of rounds that verify a branch's drafts, or a fallback's, near this temperature."""
        kind = (verifies_branch, round(temperature, 1))
        if kind not in self._kinds:
            self._kinds[kind] = OutcomeStatistics(self._num_ranks)
        return self._kinds[kind]
