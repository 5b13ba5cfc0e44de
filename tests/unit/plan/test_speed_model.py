"""The speed model against the theory's formulas and a simulation of what it models."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.plan.speed_model import (
    PairStatistics,
    StepTimes,
    expected_tokens,
    hit_rate,
    predict_in_turn,
    predict_plain,
    predict_ssd,
)

TIMES = StepTimes(0.005, 0.0001, 0.0004, 0.00001, 0.0002)
PAIR = PairStatistics(0.85, 0.3, 1.0)
PAIRS = st.builds(PairStatistics, st.floats(0.05, 0.98), st.floats(0.01, 0.9), st.floats(0.2, 3.0))


def test_expected_tokens_is_the_sum_of_powers() -> None:
    assert expected_tokens(0.8, 3) == pytest.approx(1 + 0.8 + 0.8**2 + 0.8**3)


def test_taking_turns_pays_for_every_draft() -> None:
    prediction = predict_in_turn(TIMES, PAIR, 2, 4)
    assert prediction.round_seconds == pytest.approx(0.005 + 10 * 0.0001 + 4 * (0.0004 + 2 * 0.00001))


def test_a_perfect_draft_on_a_fast_device() -> None:
    """Theorem 7 with h = 1 and T_p < 1: a round costs a verification and yields E tokens."""
    times, pair = StepTimes(0.01, 0.0, 0.0001, 0.0), PairStatistics(0.8, 1e-9, 1.0)
    prediction = predict_ssd(times, pair, 1, 4, 8, 64)
    assert prediction.hit_rate == pytest.approx(1.0, abs=1e-6)
    assert prediction.depth == pytest.approx(4.0, abs=1e-3)
    assert prediction.tokens_per_second == pytest.approx(expected_tokens(0.8, 4) / 0.01, rel=1e-3)


def test_a_draft_that_predicts_nothing_is_plain_decoding() -> None:
    times = StepTimes(0.01, 0.0, 0.0001, 0.0)
    prediction = predict_ssd(times, PairStatistics(0.8, 1.0, 1e-9), 1, 4, 8, 64)
    assert prediction.tokens_per_second == pytest.approx(predict_plain(times, 1).tokens_per_second, rel=1e-6)


@given(pair=PAIRS, num_sent=st.integers(0, 8), budget=st.integers(1, 40))
def test_hit_rate_is_a_share_and_grows_with_the_budget(
    pair: PairStatistics, num_sent: int, budget: int
) -> None:
    rate = hit_rate(pair, num_sent, budget)
    assert -1e-9 <= rate <= 1
    assert hit_rate(pair, num_sent, budget + 1) >= rate - 1e-9


@given(pair=PAIRS, batch=st.integers(1, 64), num_drafts=st.integers(1, 8), budget=st.integers(1, 32))
def test_ssd_is_bounded_by_all_hits_at_full_depth(
    pair: PairStatistics, batch: int, num_drafts: int, budget: int
) -> None:
    prediction = predict_ssd(TIMES, pair, batch, num_drafts, budget, 64)
    assert 0 <= prediction.hit_rate <= 1
    assert 0 <= prediction.depth <= num_drafts + 1e-9
    most = batch * expected_tokens(pair.acceptance, num_drafts) / TIMES.verify(batch, batch)
    assert 0 < prediction.tokens_per_second <= most * (1 + 1e-9)


def test_a_slow_draft_reaches_less_depth() -> None:
    slow = StepTimes(0.005, 0.0, 0.002, 0.0)
    assert predict_ssd(slow, PAIR, 1, 8, 8, 64).depth < 3
    assert predict_ssd(TIMES, PAIR, 1, 8, 8, 64).depth > 7
