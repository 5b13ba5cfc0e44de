"""Which outcomes get a branch: the fan-out F_k of each accepted length k (pure)."""

from __future__ import annotations

from collections.abc import Sequence


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
    """Shrink a fan-out to a smaller budget in proportion (largest remainders first), spending it exactly."""
    total = sum(fanout)
    if total <= branch_budget:
        return list(fanout)
    shares = [count * branch_budget / total for count in fanout]
    scaled = [int(share) for share in shares]
    by_remainder = sorted(range(len(fanout)), key=lambda k: (scaled[k] - shares[k], -k))
    for k in by_remainder[: branch_budget - sum(scaled)]:
        scaled[k] += 1
    return scaled
