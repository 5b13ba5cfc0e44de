"""Bootstrap intervals against what is known of them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

from intervals import DRAWS, draw_weights, interval, percentiles, ratios


def test_the_first_draw_is_the_sample_and_every_draw_has_as_many() -> None:
    weights = draw_weights(7)
    assert weights.shape == (1 + DRAWS, 7)
    assert (weights[0] == 1).all()
    assert (weights.sum(1) == 7).all()


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = interval(ratios(draw_weights(400), values, np.ones(400))) or (0, 0)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.05)
    assert high == pytest.approx(values.mean() + half, abs=0.05)


def test_a_ratio_is_of_sums() -> None:
    assert ratios(draw_weights(2), [1, 9], [1, 1])[0] == 5
    assert ratios(draw_weights(2), [10, 9], [100, 1])[0] == pytest.approx(19 / 101)
    assert np.isnan(ratios(draw_weights(2), [0, 0], [0, 0])).all()


def test_percentiles_are_those_of_all_values() -> None:
    values = [[3.0, 1.0], [], [2.0, 4.0]]
    for percent, expected in ((50, 2), (75, 3), (99, 4), (1, 1)):
        assert percentiles(draw_weights(3), values, percent)[0] == expected
    drawn = percentiles(draw_weights(3), values, 50)
    assert set(drawn[~np.isnan(drawn)]) <= {1, 2, 3, 4}
    assert np.isnan(percentiles(draw_weights(1), [[]], 50)).all()


def test_no_draws_no_interval() -> None:
    assert interval(np.full(1 + DRAWS, np.nan)) is None
