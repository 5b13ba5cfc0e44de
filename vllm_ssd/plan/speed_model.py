"""How fast decoding will be for given costs: plain, with a draft model in turn (SD), and with SSD (pure).

The paper's theory (arXiv 2603.03251, theorem 7) with what we build instead of a whole-batch backup: a
missed row verifies nothing and costs its own tokens only, and drafts are served to the depth that was
reached. So a row is either in a round that verifies a branch or in one that verifies nothing, and goes from
one to the other with the hit rates of the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

_ITERATIONS = 40
_PRECISION = 1e-3  # drafts
_REPEATS = 7


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step, linear in what it computes."""

    verify_base: float
    verify_per_token: float
    draft_base: float
    draft_per_row: float
    overhead: float = 0.0  # of SSD, on the target, in a round
    verify_per_request: float = 0.0  # scheduling, sampling and output of a request, however many its tokens

    def verify(self, num_tokens: float, batch: int) -> float:
        """One round of the target over so many tokens of so many requests."""
        return self.verify_base + self.verify_per_token * num_tokens + self.verify_per_request * batch

    def draft(self, num_rows: float) -> float:
        """One step of the draft over so many rows."""
        return self.draft_base + self.draft_per_row * num_rows


@dataclass(frozen=True)
class PairStatistics:
    """How well a draft predicts its target."""

    acceptance: float  # a: of a draft token, given that those before it were accepted
    miss: float  # of outcomes, with one branch for each accepted length
    exponent: float  # r: with F branches for each they miss with miss * F^-r


@dataclass(frozen=True)
class Prediction:
    """Of one method at one batch size."""

    tokens_per_second: float  # of the whole batch
    round_seconds: float
    tokens_per_round: float  # of a row
    hit_rate: float = 0.0
    depth: float = 0.0  # drafts that a hit finds


def measure_line(step: Callable[[int], None], least: int, most: int) -> tuple[float, float]:
    """Time a step of the least and of the most tokens (or rows).

    Returns:
        Seconds of a step over nothing, and of each further token; the median of some repeats.
    """
    seconds = []
    for size in (least, most):
        step(size)
        times = []
        for _ in range(_REPEATS):
            began = time.perf_counter()
            step(size)
            times.append(time.perf_counter() - began)
        seconds.append(median(times))
    per_token = max(seconds[1] - seconds[0], 0.0) / max(most - least, 1)
    return max(seconds[0] - least * per_token, 1e-6), per_token


def expected_tokens(acceptance: float, num_drafts: float) -> float:
    """E = (1 - a^(K+1)) / (1 - a), new tokens of a round that verifies K drafts; K need not be whole."""
    return (1 - acceptance ** (num_drafts + 1)) / (1 - acceptance)


def predict_plain(times: StepTimes, batch: int) -> Prediction:
    """Without speculation."""
    seconds = times.verify(batch, batch)
    return Prediction(batch / seconds, seconds, 1.0)


def predict_in_turn(times: StepTimes, pair: PairStatistics, batch: int, num_drafts: int) -> Prediction:
    """With a draft model that drafts while the target waits (SD, vLLM's draft_model)."""
    seconds = times.verify(batch * (num_drafts + 1), batch) + num_drafts * times.draft(batch)
    tokens = expected_tokens(pair.acceptance, num_drafts)
    return Prediction(batch * tokens / seconds, seconds, tokens)


def hit_rate(pair: PairStatistics, num_sent: float, budget: int) -> float:
    """Of a round that verifies so many drafts, which need not be whole, with so many branches.

    The paper's power law, for a budget that is spent on whatever is likeliest (`ssd_fanout: global`): it
    counts how many branches there are for each of the num_sent + 1 accepted lengths, on average.
    """
    return 1 - min(1.0, pair.miss * (budget / (num_sent + 1)) ** -pair.exponent)


def predict_ssd(
    times: StepTimes, pair: PairStatistics, batch: int, num_drafts: int, budget: int, max_rows: int
) -> Prediction:
    """With SSD.

    Args:
        batch: requests.
        num_drafts: K.
        budget: branches per request.
        max_rows: of one draft step; more requests than fit share it.
    """
    branches = min(budget, max(1, max_rows // batch))
    step = times.draft(batch * branches)
    after_miss = hit_rate(pair, 0, branches)
    seconds, sent, hit = times.verify(batch, batch), 0.0, 0.0
    for _ in range(_ITERATIONS):
        # The k = K branches, and all of a round after a miss, begin one step later than the others.
        early, late = _clipped(seconds / step, num_drafts), _clipped(seconds / step - 1, num_drafts)
        after_hit = hit_rate(pair, sent, branches)
        hit = after_miss / (1 - after_hit + after_miss) if after_miss else 0.0
        all_accepted = pair.acceptance**sent
        depth_after_hit = all_accepted * late + (1 - all_accepted) * early
        from_hit = hit * after_hit / max(hit * after_hit + (1 - hit) * after_miss, 1e-12)
        depth = from_hit * depth_after_hit + (1 - from_hit) * late
        change = depth - sent
        sent += 0.5 * change
        new_seconds = times.verify(batch * (1 + hit * sent), batch) + times.overhead
        seconds += 0.5 * (new_seconds - seconds)
        if abs(change) < _PRECISION:
            break
    tokens = hit * expected_tokens(pair.acceptance, sent) + (1 - hit)
    return Prediction(batch * tokens / seconds, seconds, tokens, hit, sent)


def _clipped(steps: float, num_drafts: int) -> float:
    return min(max(steps, 0.0), float(num_drafts))
