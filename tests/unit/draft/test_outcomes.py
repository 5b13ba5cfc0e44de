"""How probable outcomes are, by the draft's distribution and by what the target did."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.draft.outcomes import (
    BoolArray,
    FloatArray,
    Measured,
    OutcomeStatistics,
    draft_log_probs,
    outcome_log_probs,
)

NUM_CANDIDATES = 4


def distributions(seed: int, n: int) -> tuple[FloatArray, BoolArray]:
    """[n, 4] log-probabilities, falling, and which candidate the draft is."""
    rng = np.random.default_rng(seed)
    log_probs = -np.sort(-np.log(rng.dirichlet([0.5] * NUM_CANDIDATES, size=n)), axis=1).astype(np.float32)
    return log_probs, rng.integers(NUM_CANDIDATES, size=n)[:, None] == np.arange(NUM_CANDIDATES)


def after(rounds: int, log_prob: float, accepted: float) -> OutcomeStatistics:
    """Of rounds whose one draft the draft gave this log-probability, and the target took that often."""
    rng = np.random.default_rng(0)
    statistics = OutcomeStatistics(4)
    for _ in range(rounds):
        statistics.add(int(rng.random() < accepted), 1, None, np.array([log_prob]))
    return statistics


@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), rounds=st.integers(0, 40))
def test_outcomes_share_out_what_is_reached(seed: int, n: int, rounds: int) -> None:
    log_probs, is_draft = distributions(seed, n)
    statistics = after(rounds, -0.8, 0.7)
    outcomes, reached = outcome_log_probs(
        log_probs, is_draft, statistics, is_greedy=False, last_is_drawn=False
    )
    assert np.exp(outcomes).sum(axis=1) == pytest.approx(np.exp([0.0, *reached[:-1]]), abs=1e-3)
    assert outcomes[is_draft] == pytest.approx(reached, abs=1e-3)


@pytest.mark.parametrize("accepted", [0.2, 0.95])
def test_a_draft_is_as_likely_as_such_drafts_were_accepted(accepted: float) -> None:
    log_probs = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], dtype=np.float32))
    is_draft = np.array([[True, False, False, False]])
    statistics = after(500, float(log_probs[0, 0]), accepted)
    outcomes, reached = outcome_log_probs(
        log_probs, is_draft, statistics, is_greedy=False, last_is_drawn=False
    )
    assert np.exp(reached[0]) == pytest.approx(accepted, abs=0.05)
    assert np.exp(outcomes[0, 0]) == pytest.approx(accepted, abs=0.05)
    rest = np.exp(outcomes[0, 1:])
    assert rest / rest.sum() == pytest.approx([3 / 6, 2 / 6, 1 / 6], abs=1e-4)


def test_a_greedy_target_goes_by_rank_however_flat_the_distribution() -> None:
    log_probs = np.log(np.full((1, NUM_CANDIDATES), 0.02, dtype=np.float32))
    is_draft = np.array([[False, True, False, False]])
    statistics = OutcomeStatistics(NUM_CANDIDATES)
    for rank in [0, 0, 0, 1] * 50:
        statistics.add(0, 1, rank, log_probs[0, :1])
        statistics.add(1, 1, 3, log_probs[0, :1])  # a bonus token: instead of no draft
    outcomes, reached = outcome_log_probs(
        log_probs, is_draft, statistics, is_greedy=True, last_is_drawn=False
    )
    assert outcomes[0, 1] == reached[0]
    rest = np.exp(outcomes[0, [0, 2, 3]]) / -np.expm1(reached[0])
    assert rest == pytest.approx([0.75, 0.25, 0.0], abs=0.03)


def test_drafts_of_another_confidence_say_nothing() -> None:
    never, untaught = after(500, -0.8, 0.0), OutcomeStatistics(4)
    elsewhere = np.array([-4.0, -0.1, 0.0])
    assert never.log_acceptance(elsewhere) == pytest.approx(untaught.log_acceptance(elsewhere))
    assert never.log_acceptance(np.array([-0.8]))[0] < untaught.log_acceptance(np.array([-0.8]))[0] - 1


def test_what_follows_all_drawn_drafts_is_left_to_the_distribution() -> None:
    log_probs, is_draft = distributions(3, 2)
    statistics = after(100, -0.8, 0.5)
    outcomes, reached = outcome_log_probs(
        log_probs, is_draft, statistics, is_greedy=False, last_is_drawn=True
    )
    assert outcomes[1] == pytest.approx(log_probs[1] + reached[0], abs=1e-5)


def test_a_draft_that_is_no_candidate_counts_as_the_least() -> None:
    log_probs, is_draft = distributions(4, 2)
    is_draft[1] = False
    assert draft_log_probs(log_probs, is_draft).tolist() == [
        log_probs[0, is_draft[0]].item(),
        log_probs[1, -1],
    ]


def test_a_draft_that_is_certain_leaves_a_little() -> None:
    log_probs = np.array([[0.0, -30.0]], dtype=np.float32)
    outcomes, _ = outcome_log_probs(
        log_probs, np.array([[True, False]]), OutcomeStatistics(4), is_greedy=False, last_is_drawn=False
    )
    assert np.isfinite(outcomes).all()
    assert outcomes[0, 0] > outcomes[0, 1]


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
def test_acceptance_of_a_truncated_geometric_distribution(acceptance: float) -> None:
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
def test_exponent_of_a_power_distribution(exponent: float) -> None:
    rng = np.random.default_rng(2)
    num_ranks = 12
    misses = 0.5 * np.arange(1, num_ranks + 1) ** -exponent
    distribution = -np.diff(misses, prepend=1.0, append=0.0)
    statistics = OutcomeStatistics(num_ranks)
    for rank in rng.choice(num_ranks + 1, size=4000, p=distribution):
        statistics.add(2, 4, int(rank))
    assert statistics.exponent == pytest.approx(exponent, rel=0.35)


def test_an_outcome_always_predicted_breaks_nothing() -> None:
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
    assert np.exp(statistics.log_distribution(4)) == pytest.approx([0.75, 0.25, 0.0, 0.0], abs=0.02)


def test_kinds_of_rounds_are_apart() -> None:
    measured = Measured(4)
    for _ in range(300):
        measured.of(True, 1.0).add(4, 4, 0)
        measured.of(False, 1.0).add(0, 4, 3)
    assert measured.of(True, 1.0).acceptance > 0.9
    assert measured.of(False, 1.0).acceptance < 0.3
    assert measured.of(True, 0.0).acceptance == OutcomeStatistics(4).acceptance
