"""Which outcomes of a request's round the draft speculates for (pure)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_ssd.draft.outcomes import OutcomeStatistics
from vllm_ssd.draft.requests import DraftRequest
from vllm_ssd.draft.rows import Candidates
from vllm_ssd.link.messages import Configure
from vllm_ssd.plan.fanout import geometric_fanout, global_fanout, listed_fanout, scale_fanout, uniform_fanout

FloatArray = npt.NDArray[np.floating[Any]]


def choose_branches(
    request: DraftRequest, statistics: OutcomeStatistics, configure: Configure, budget: int
) -> dict[int, list[int]]:
    """The tokens to fork at each accepted length of the request that has no branches yet.

    Args:
        statistics: of rounds like the request's present one.
        configure: what the target asked for.
        budget: branches of the request in this round.
    """
    outcomes, not_known_yet = request.outcomes(statistics)
    counts = _fan_out(request, statistics, configure, outcomes, not_known_yet, budget)
    # What is measured may have changed since this round's first fork.
    left = configure.branch_budget - request.num_entries
    branches = {}
    for k, candidates in outcomes.items():
        branches[k] = candidates.tokens[: min(counts[k], left)].tolist()
        left -= len(branches[k])
    return branches


def _fan_out(
    request: DraftRequest,
    statistics: OutcomeStatistics,
    configure: Configure,
    outcomes: dict[int, Candidates],
    not_known_yet: FloatArray,
    budget: int,
) -> dict[int, int]:
    """Branches for each accepted length in `outcomes`."""
    fan_out = uniform_fanout(request.num_sent, budget)
    if configure.fanout == "global":
        log_probs = [candidates.log_probs for candidates in outcomes.values()]
        log_probs.append(not_known_yet)  # they keep their share
        counts = global_fanout(log_probs, max(0, budget - request.num_entries))
        return dict(zip(outcomes, counts[:-1], strict=True))
    if configure.fanout == "geometric":
        fan_out = geometric_fanout(statistics.acceptance, statistics.exponent, request.num_sent, budget)
    elif not isinstance(configure.fanout, str):
        fan_out = scale_fanout(listed_fanout(configure.fanout, request.num_sent), budget)
    return {k: fan_out[k] for k in outcomes}
