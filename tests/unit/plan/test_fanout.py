"""Fan-out: budgets are spent exactly, whatever the number of drafts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.plan.fanout import geometric_fanout, global_fanout, listed_fanout, scale_fanout, uniform_fanout

BUDGETS = st.integers(1, 200)
FANOUTS = st.lists(st.integers(0, 40), min_size=1, max_size=17)


@given(num_drafts=st.integers(0, 16), budget=BUDGETS)
def test_uniform_spends_the_budget_evenly(num_drafts: int, budget: int) -> None:
    fanout = uniform_fanout(num_drafts, budget)
    assert len(fanout) == num_drafts + 1
    assert sum(fanout) == budget
    assert max(fanout) - min(fanout) <= 1
    assert fanout == sorted(fanout)  # what does not divide goes to full acceptance


@given(num_drafts=st.integers(0, 16), budget=BUDGETS)
def test_uniform_grows_with_the_budget(num_drafts: int, budget: int) -> None:
    """Forks of one round may see different budgets; together they must still fit the larger one."""
    smaller, larger = uniform_fanout(num_drafts, budget), uniform_fanout(num_drafts, budget + 1)
    assert all(a <= b for a, b in zip(smaller, larger, strict=True))


@given(fanout=FANOUTS, data=st.data())
def test_listed_keeps_the_sum_for_fewer_drafts(fanout: list[int], data: st.DataObject) -> None:
    num_drafts = data.draw(st.integers(0, len(fanout) - 1))
    listed = listed_fanout(fanout, num_drafts)
    assert len(listed) == num_drafts + 1
    assert sum(listed) == sum(fanout)
    assert listed[:num_drafts] == fanout[:num_drafts]


@given(fanout=FANOUTS, budget=BUDGETS)
def test_scaling_spends_the_budget_and_never_adds(fanout: list[int], budget: int) -> None:
    scaled = scale_fanout(fanout, budget)
    assert len(scaled) == len(fanout)
    assert sum(scaled) == min(sum(fanout), budget)
    # Elementwise no more than listed: so forks under different budgets together fit the whole budget.
    assert all(0 <= a <= b for a, b in zip(scaled, fanout, strict=True))


@given(fanout=FANOUTS, budget=BUDGETS)
def test_scaling_keeps_proportions(fanout: list[int], budget: int) -> None:
    total = sum(fanout)
    if total <= budget:
        return
    for count, scaled in zip(fanout, scale_fanout(fanout, budget), strict=True):
        assert abs(scaled - count * budget / total) < 1


@given(fanout=FANOUTS, budget=BUDGETS)
def test_scaling_keeps_the_order(fanout: list[int], budget: int) -> None:
    scaled = scale_fanout(fanout, budget)
    pairs = sorted(zip(fanout, scaled, strict=True))
    for (count, share), (larger, larger_share) in pairwise(pairs):
        assert count == larger or share <= larger_share


@given(
    log_probs=st.lists(st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=6), min_size=1, max_size=6),
    budget=BUDGETS,
)
def test_global_takes_the_likeliest_outcomes(log_probs: list[list[float]], budget: int) -> None:
    arrays = [np.sort(np.array(values, dtype=np.float32))[::-1] for values in log_probs]
    counts = global_fanout(arrays, budget)
    taken = [value for array, count in zip(arrays, counts, strict=True) for value in array[:count]]
    left = [value for array, count in zip(arrays, counts, strict=True) for value in array[count:]]
    assert len(taken) == min(budget, len(taken) + len(left))
    assert not taken or not left or min(taken) >= max(left)


RATES = st.floats(0.01, 0.99)
EXPONENTS = st.floats(0.1, 4.0)


@given(num_drafts=st.integers(0, 16), budget=BUDGETS, acceptance=RATES, exponent=EXPONENTS)
def test_geometric_spends_the_budget_and_grows_with_it(
    num_drafts: int, budget: int, acceptance: float, exponent: float
) -> None:
    fanout = geometric_fanout(acceptance, exponent, num_drafts, budget)
    assert len(fanout) == num_drafts + 1
    assert sum(fanout) == budget
    assert min(fanout) >= (1 if budget > num_drafts else 0)
    assert fanout[:-1] == sorted(fanout[:-1], reverse=True)  # rejection gets rarer with k
    larger = geometric_fanout(acceptance, exponent, num_drafts, budget + 1)
    assert all(a <= b for a, b in zip(fanout, larger, strict=True))


def hit_rate(fanout: Sequence[int], acceptance: float, exponent: float) -> float:
    """Of Theorem 12's model."""
    num_drafts = len(fanout) - 1
    weights = [(1 - acceptance) * acceptance**k for k in range(num_drafts)] + [acceptance**num_drafts]
    return sum(
        weight * (1 - 0.5 * count**-exponent if count else 0.0)
        for weight, count in zip(weights, fanout, strict=True)
    )


@pytest.mark.parametrize("acceptance", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_geometric_is_the_best_of_all(acceptance: float, exponent: float) -> None:
    for budget in range(4, 13):
        all_fanouts = [f for f in itertools.product(range(1, budget), repeat=4) if sum(f) == budget]
        best = max(hit_rate(fanout, acceptance, exponent) for fanout in all_fanouts)
        found = geometric_fanout(acceptance, exponent, 3, budget)
        assert hit_rate(found, acceptance, exponent) == pytest.approx(best)


@pytest.mark.parametrize("acceptance", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_geometric_nears_the_theorem(acceptance: float, exponent: float) -> None:
    num_drafts, budget = 4, 4000
    shares = acceptance ** (np.arange(num_drafts + 1) / (1 + exponent))
    shares[-1] *= (1 - acceptance) ** (-1 / (1 + exponent))
    fanout = np.array(geometric_fanout(acceptance, exponent, num_drafts, budget))
    assert fanout / budget == pytest.approx(shares / shares.sum(), rel=0.01)
