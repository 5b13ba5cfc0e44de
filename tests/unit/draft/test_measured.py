"""What the draft learns from outcomes."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_ssd.draft.measured import Measured, OutcomeStatistics


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
def test_acceptance_of_a_truncated_geometric_law(acceptance: float) -> None:
    rng = np.random.default_rng(1)
    statistics = OutcomeStatistics(8)
    for _ in range(3000):
        statistics.add(int((rng.random(4) < acceptance).cumprod().sum()), 4, None)
    assert statistics.acceptance == pytest.approx(acceptance, abs=0.06)


def test_rounds_without_drafts_say_nothing_about_acceptance() -> None:
    statistics = OutcomeStatistics(8)
    before = statistics.acceptance
    for _ in range(50):
        statistics.add(0, 0, 1)
    assert statistics.acceptance == pytest.approx(before)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_exponent_of_a_power_law(exponent: float) -> None:
    rng = np.random.default_rng(2)
    num_ranks = 12
    misses = 0.5 * np.arange(1, num_ranks + 1) ** -exponent
    law = -np.diff(misses, prepend=1.0, append=0.0)
    statistics = OutcomeStatistics(num_ranks)
    for rank in rng.choice(num_ranks + 1, size=4000, p=law):
        statistics.add(2, 4, int(rank))
    assert statistics.exponent == pytest.approx(exponent, rel=0.35)


def test_an_outcome_always_foreseen_breaks_nothing() -> None:
    statistics = OutcomeStatistics(4)
    for _ in range(5000):
        statistics.add(4, 4, 0)
    assert 0.9 < statistics.acceptance < 1
    assert np.isfinite(statistics.exponent)


def test_shares_of_ranks_fall_and_never_vanish() -> None:
    statistics = OutcomeStatistics(4)
    for _ in range(2000):
        statistics.add(0, 4, 9)  # none of the ranked
    shares = statistics.log_shares(np.arange(6))
    assert np.isfinite(shares).all()
    assert (np.diff(shares) <= 0).all()
    assert shares[-1] == shares[-2]


def test_what_is_not_known_yet_is_guessed_by_what_mostly_came() -> None:
    statistics = OutcomeStatistics(3)
    for _ in range(2000):
        statistics.add(3, 4, 0)  # three in four, then the likeliest of the others
    assert np.exp(statistics.log_law(4)) == pytest.approx([0.75, 0.25, 0.0, 0.0], abs=0.02)


def test_kinds_of_rounds_are_apart() -> None:
    measured = Measured(4)
    for _ in range(300):
        measured.of(True, 1.0).add(4, 4, 0)
        measured.of(False, 1.0).add(0, 4, 3)
    assert measured.of(True, 1.0).acceptance > 0.9
    assert measured.of(False, 1.0).acceptance < 0.3
    assert measured.of(True, 0.0).acceptance == OutcomeStatistics(4).acceptance
