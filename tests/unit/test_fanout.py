"""Fan-out: budgets are spent exactly, whatever the number of drafts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.fanout import global_fanout, listed_fanout, scale_fanout, uniform_fanout

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
