"""How probable each outcome of a round is: the draft's distribution, weighed by what the target did (pure).

The draft's own distribution does not say how likely its drafts are accepted: under shared noise, or when
greedy, the target agrees far more often than it says, and drafts that are drawn are accepted by min(p, q). So
a draft gets the share of such drafts that was accepted, and the distribution shares out the rest. A greedy
target draws nothing: what comes instead of a rejected draft is mostly one of the next likeliest, however flat
the distribution. There each candidate gets the measured share of its rank.

`OutcomeStatistics` measures. Theorem 12 (arXiv 2603.03251) asks for a, the acceptance per token, and r, the
exponent of miss(F) ~ F^-r, where miss(F) is the share of outcomes that are not among the F likeliest
candidates. Rounds are kept apart by where the verified drafts came from and by temperature, which change all
of this. Old rounds fade.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
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
MOST_CERTAIN = -1e-6  # log-probability: something is always left to share out


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
        """Receive one round.

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

    def log_distribution(self, num_candidates: int) -> FloatArray:
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
        """Those of rounds that verify a branch's drafts, or a backup's, near this temperature."""
        kind = (verifies_branch, round(temperature, 1))
        if kind not in self._kinds:
            self._kinds[kind] = OutcomeStatistics(self._num_ranks)
        return self._kinds[kind]


def draft_log_probs(log_probs: FloatArray, is_draft: BoolArray) -> FloatArray:
    """[n] log-probability of each draft; of the least likely candidate where the draft is none of them.

    Args:
        log_probs: [n, num_candidates] falling; the draft's, after each accepted length.
        is_draft: [n, num_candidates] which of the candidates the draft is.
    """
    found = np.where(is_draft, log_probs, -np.inf).max(axis=1)
    return np.where(np.isneginf(found), log_probs[:, -1], found)


def outcome_log_probs(
    log_probs: FloatArray,
    is_draft: BoolArray,
    statistics: OutcomeStatistics,
    *,
    is_greedy: bool,
    last_is_drawn: bool,
) -> tuple[FloatArray, FloatArray]:
    """How likely the outcomes of the first n accepted lengths are.

    Args:
        log_probs, is_draft: see `draft_log_probs`.
        statistics: of rounds like this one.
        is_greedy: whether the target is.
        last_is_drawn: whether what follows the last length is drawn anew, by a distribution like the draft's.

    Returns:
        [n, num_candidates] log-probability that the first k drafts are accepted and this token comes next;
        [n] log-probability that the first k + 1 drafts are accepted.
    """
    drafts = draft_log_probs(log_probs, is_draft)
    accepted = statistics.log_acceptance(drafts)
    rejected = np.log(-np.expm1(accepted))
    if is_greedy:
        others = statistics.log_shares(np.cumsum(~is_draft, axis=1) - 1)
    else:
        others = log_probs - np.log(-np.expm1(np.minimum(drafts, MOST_CERTAIN)))[:, None]
    outcomes = np.where(is_draft, accepted[:, None], rejected[:, None] + others)
    if last_is_drawn:
        outcomes[-1] = log_probs[-1]
    reached = accepted.cumsum()
    outcomes[1:] += reached[:-1, None]
    return outcomes, reached
