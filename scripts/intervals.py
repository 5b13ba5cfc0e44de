"""Bootstrap intervals: how far a figure would move with other prompts of the same kinds.

Units are tasks: prompts that ran together, so that their speed is one figure. Each draw takes as many tasks
as were measured, with replacement (Efron, 1979). All figures of a row use the same draws, and so do two rows
of the same tasks, whose ratio is then taken draw by draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 1000
LEVEL = 0.95


def draw_weights(num_tasks: int) -> np.ndarray:
    """Return how often each draw has each task, `[1 + DRAWS, num_tasks]`; the first is the sample."""
    drawn = np.random.default_rng(0).multinomial(num_tasks, [1 / num_tasks] * num_tasks, size=DRAWS)
    return np.concatenate([np.ones((1, num_tasks), drawn.dtype), drawn])


def ratios(weights: np.ndarray, parts: Sequence[float], wholes: Sequence[float]) -> np.ndarray:
    """Return sum of parts / sum of wholes of each draw, `[1 + DRAWS]`; NaN for 0 / 0."""
    whole = weights @ np.asarray(wholes, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole != 0, weights @ np.asarray(parts, float) / whole, np.nan)


def percentiles(weights: np.ndarray, values: Sequence[Sequence[float]], percent: float) -> np.ndarray:
    """Return the percentile of all values of the drawn tasks, `[1 + DRAWS]`; NaN without any."""
    sizes = [len(of_task) for of_task in values]
    flat = np.concatenate([np.asarray(of_task, float) for of_task in values])
    if not len(flat):
        return np.full(len(weights), np.nan)
    order = np.argsort(flat)
    task = np.repeat(np.arange(len(values)), sizes)[order]
    found = np.empty(len(weights))
    for row, weight in enumerate(weights):
        reached = np.cumsum(weight[task])
        rank = max(1, np.ceil(percent / 100 * reached[-1]))
        found[row] = flat[order[np.searchsorted(reached, rank)]] if reached[-1] else np.nan
    return found


def interval(draws: np.ndarray) -> list[float] | None:
    """Return the lowest and highest of the middle 95 % of the draws; None without any."""
    drawn = draws[1:][~np.isnan(draws[1:])]
    if not len(drawn):
        return None
    low, high = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return [float(low), float(high)]
