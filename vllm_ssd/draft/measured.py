"""What the draft learns from outcomes: how often drafts are accepted, how likely it held the rest (pure).

Theorem 12 asks for a, the acceptance per token, and r, the exponent of miss(F) ~ F^-r, where miss(F) is the
share of outcomes that are not among the F likeliest candidates. `vllm_ssd.draft.likelihood` asks how often a
draft is accepted that was held this likely, and of which rank the token is that comes instead of a rejected
one. Rounds are kept apart by where the verified drafts came from and by temperature, which change all of
this. Old rounds fade.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]

FADING = 0.995  # weight of a round, one round later: some 200 rounds count
PRIOR_ROUNDS = 16
PRIOR_ACCEPTANCE = 0.8
PRIOR_MISS = 0.3  # by the likeliest candidate alone
LEAST_EXPONENT, GREATEST_EXPONENT = 0.1, 4.0
# Drafts with -log p between two of these count together ("histogram binning"): closer where the draft is
# certain, since the few that it is wrong about there must not be laid to those that it is sure of.
CONFIDENCE_EDGES = np.array(
    [3, 2, 1.5, 1, 0.7, 0.4, 0.2, 0.1, 0.05, 0.02, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6]
)
_bounds = np.array([6, *CONFIDENCE_EDGES, 1e-8])
PRIOR_CONFIDENCE = np.exp(-np.sqrt(_bounds[:-1] * _bounds[1:]))  # what the draft itself says
PRIOR_DRAFTS = 4  # of each confidence
PRIOR_REJECTIONS = 4
NOTHING_KNOWN = np.empty(0)


class OutcomeStatistics:
    """Outcomes of one kind of round.

    Args:
        num_ranks: candidates that are ranked; the rest counts as one.
    """

    def __init__(self, num_ranks: int) -> None:
        self._accepted = PRIOR_ROUNDS * PRIOR_ACCEPTANCE
        self._tested = float(PRIOR_ROUNDS)
        misses = PRIOR_MISS / np.arange(1, num_ranks + 1)
        self._prior_ranks = -np.diff(misses, prepend=1.0, append=0.0)  # [num_ranks + 1]
        self._ranks = PRIOR_ROUNDS * self._prior_ranks
        self._ranks_of_recovery = np.zeros_like(self._ranks)  # of tokens that came instead of a draft
        self._tested_by_confidence = np.zeros_like(PRIOR_CONFIDENCE)
        self._accepted_by_confidence = np.zeros_like(PRIOR_CONFIDENCE)

    def add(
        self,
        num_accepted: int,
        num_sent: int,
        rank: int | None,
        log_probs: FloatArray = NOTHING_KNOWN,
    ) -> None:
        """Take in one round.

        Args:
            num_accepted: k.
            num_sent: drafts that were verified.
            rank: of the recovery or bonus token among the candidates at k, from 0; None if those were not
                known yet.
            log_probs: [n] the draft's, of the first n of the drafts that were tested.
        """
        if 0 < num_sent >= num_accepted:  # else nothing was tested, or drafts of before a restart
            self._accepted = FADING * self._accepted + num_accepted
            self._tested = FADING * self._tested + min(num_accepted + 1, num_sent)
            confidence = np.searchsorted(-CONFIDENCE_EDGES, log_probs)
            self._tested_by_confidence *= FADING
            self._accepted_by_confidence *= FADING
            np.add.at(self._tested_by_confidence, confidence, 1)
            np.add.at(self._accepted_by_confidence, confidence[:num_accepted], 1)
        if rank is not None:
            rank = min(rank, len(self._ranks) - 1)
            self._ranks *= FADING
            self._ranks[rank] += 1
            if num_accepted < num_sent:
                self._ranks_of_recovery *= FADING
                self._ranks_of_recovery[rank] += 1

    def log_acceptance(self, log_probs: FloatArray) -> FloatArray:
        """[n] log-probability that drafts to which the draft gives `log_probs` [n] are accepted."""
        confidence = np.searchsorted(-CONFIDENCE_EDGES, log_probs)
        accepted = self._accepted_by_confidence + PRIOR_DRAFTS * PRIOR_CONFIDENCE
        return np.log(accepted / (self._tested_by_confidence + PRIOR_DRAFTS))[confidence]

    def log_shares(self, ranks: npt.NDArray[np.int64]) -> FloatArray:
        """Log-share of rejections after which the candidate of this rank came, from 0, the draft left out."""
        counts = self._ranks_of_recovery + PRIOR_REJECTIONS * self._prior_ranks
        falling = -np.sort(-counts[:-1])  # branches are opened in the order of ranks
        return np.log(falling / counts.sum())[np.clip(ranks, 0, len(falling) - 1)]

    def log_law(self, num_candidates: int) -> FloatArray:
        """[num_candidates] log-probability of what comes next, where nothing is known of the place itself."""
        others = self.log_shares(np.arange(num_candidates - 1))
        return np.concatenate([[np.log(self.acceptance)], np.log1p(-self.acceptance) + others])

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
