"""Which outcomes get a branch: the fan-out F_k of each accepted length k (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def uniform_fanout(num_drafts: int, branch_budget: int) -> list[int]:
    """Spread the budget evenly over k = 0..num_drafts and spend it exactly.

    What does not divide goes to the largest k, since full acceptance is the likeliest outcome of a good
    draft. With no draft to verify, the whole budget is spent on k = 0, so that a miss repairs itself.

    Returns:
        [num_drafts + 1] branches per accepted length.
    """
    each, rest = divmod(branch_budget, num_drafts + 1)
    return [each + (1 if k > num_drafts - rest else 0) for k in range(num_drafts + 1)]


def listed_fanout(fanout: Sequence[int], num_drafts: int) -> list[int]:
    """The user's F_0..F_K; a round that verifies fewer than K drafts gives its largest k what is left over.

    Returns:
        [num_drafts + 1] branches per accepted length, with the same sum as `fanout`.
    """
    return [*fanout[:num_drafts], sum(fanout[num_drafts:])]


def scale_fanout(fanout: Sequence[int], branch_budget: int) -> list[int]:
    """Shrink a fan-out to a smaller budget in proportion (by largest remainders), spending it exactly."""
    total = sum(fanout)
    if total <= branch_budget:
        return list(fanout)
    shares = [count * branch_budget / total for count in fanout]
    scaled = [int(share) for share in shares]
    by_remainder = sorted(range(len(fanout)), key=lambda k: (scaled[k] - shares[k], -k))
    for k in by_remainder[: branch_budget - sum(scaled)]:
        scaled[k] += 1
    return scaled


def geometric_fanout(acceptance: float, exponent: float, num_drafts: int, branch_budget: int) -> list[int]:
    """Theorem 12 in whole branches: the fan-out with the highest hit rate if every length misses with F^-r.

    The theorem's real-valued optimum is F_k ~ a^(k/(1+r)), and (1-a)^(-1/(1+r)) times that for k = K. Each
    further branch has less use than the one before it, so giving them one by one to where they are of most
    use is the optimum in integers. Every length gets one first, the likeliest if there are fewer.

    Args:
        acceptance: a, inside (0, 1).
        exponent: r.
        num_drafts: K, of this round.
        branch_budget: branches in all.

    Returns:
        [num_drafts + 1] branches per accepted length; a larger budget takes none away.
    """
    likelihood = acceptance ** np.arange(num_drafts + 1)
    likelihood[:-1] *= 1 - acceptance
    fan_out = np.zeros(num_drafts + 1, dtype=np.int64)
    fan_out[np.argsort(-likelihood, kind="stable")[:branch_budget]] = 1
    counts = np.arange(1.0, branch_budget + 2)
    uses = np.outer(likelihood, counts[:-1] ** -exponent - counts[1:] ** -exponent)  # [K + 1, budget]
    for _ in range(branch_budget - int(fan_out.sum())):
        fan_out[np.argmax(uses[np.arange(num_drafts + 1), fan_out - 1])] += 1
    return fan_out.tolist()


def global_fanout(log_probs: Sequence[npt.NDArray[np.floating[Any]]], branch_budget: int) -> list[int]:
    """Spend the budget on the likeliest outcomes (k, t), whatever their k.

    Where Theorem 12 weighs accepted lengths by their average frequency, this weighs every outcome of this
    very round by P(k) * P(t | k) as the draft sees it.

    Args:
        log_probs: for each accepted length, the log-probability of its outcomes, in falling order.
        branch_budget: branches in all.

    Returns:
        Branches per accepted length; their sum is the budget, or all outcomes if those are fewer.
    """
    lengths = np.repeat(np.arange(len(log_probs)), [len(values) for values in log_probs])
    best = np.argsort(-np.concatenate(log_probs), kind="stable")[:branch_budget]
    return np.bincount(lengths[best], minlength=len(log_probs)).tolist()
