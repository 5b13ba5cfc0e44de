"""How likely each outcome of a round is, by the draft's law and by what the target accepted of late (pure).

The draft's own law does not say how likely its drafts are accepted: under shared noise, or when greedy, the
target agrees far more often than the law has it, and drafts that are drawn are accepted by min(p, q). So the
draft gets the share of such drafts that was accepted, and the law shares out the rest. A greedy target draws
nothing, so there the law does not say how the rest falls either: what comes instead is mostly one of the next
likeliest, however flat the law. There each candidate gets the measured share of its rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_ssd.draft.measured import OutcomeStatistics

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating[Any]]

MOST_CERTAIN = -1e-6  # log-probability: something is always left to share out


def of_drafts(log_probs: FloatArray, is_draft: BoolArray) -> FloatArray:
    """[n] log-probability of each draft; of the least likely candidate where the draft is none of them.

    Args:
        log_probs: [n, num_candidates] falling; the draft's, after each accepted length.
        is_draft: [n, num_candidates] which of the candidates the draft is.
    """
    found = np.where(is_draft, log_probs, -np.inf).max(axis=1)
    return np.where(np.isneginf(found), log_probs[:, -1], found)


def of_outcomes(
    log_probs: FloatArray,
    is_draft: BoolArray,
    statistics: OutcomeStatistics,
    *,
    is_greedy: bool,
    last_is_drawn: bool,
) -> tuple[FloatArray, FloatArray]:
    """How likely the outcomes of the first n accepted lengths are.

    Args:
        log_probs, is_draft: see `of_drafts`.
        statistics: of rounds like this one.
        is_greedy: whether the target is.
        last_is_drawn: whether what follows the last length is drawn anew, by a law like the draft's.

    Returns:
        [n, num_candidates] log-probability that the first k drafts are accepted and this token comes next;
        [n] log-probability that the first k + 1 drafts are accepted.
    """
    drafts = of_drafts(log_probs, is_draft)
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
