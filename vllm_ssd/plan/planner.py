"""Chooses how many drafts and branches pay, for each batch size, from measured costs (pure).

The times of a step by what it computes are measured once, at the start; what a whole round takes beyond that,
how often drafts are accepted and how often outcomes are predicted are measured as rounds go by. Every so
often the speed model compares all choices within the user's bounds, and for a batch size at which nothing
pays speculation stops, to be tried again later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from vllm_ssd.plan.costs import Costs, RunningMean
from vllm_ssd.plan.speed_model import PairStatistics, StepTimes, hit_rate, predict_plain, predict_ssd

PERIOD = 64  # rounds at one batch size between two decisions
RETRY = 16  # periods without speculation, after which one with it measures anew
WORTH_A_CHANGE = 1.03
EXPONENT = 1.0  # r; only how misses fall with more branches depends on it, their level is measured


@dataclass(frozen=True)
class Plan:
    """What a round verifies and the draft prepares."""

    num_drafts: int  # 0: no speculation
    branch_budget: int


@dataclass
class Bucket:
    """Batch sizes that are planned together: from a power of two to the next."""

    plan: Plan
    base: RunningMean  # seconds of a round, less what its tokens cost
    rounds: int = 0
    idle_periods: int = 0
    predicted: RunningMean = field(default_factory=lambda: RunningMean(0.8))  # rows that verified drafts


class RoundPlanner(Protocol):
    """Decides what each round verifies, and is told what came of it."""

    def plan(self, batch: int) -> Plan:
        """For the next round of so many rows."""
        ...

    def add_row(self, batch: int, had_drafts: bool, is_predicted: bool) -> None:
        """A row's outcome was looked up, after a round that verified drafts of it or none."""
        ...

    def add_round(self, batch: int, num_tokens: int, seconds: float) -> None:
        """A round of so many rows, which verified so many tokens in all, has ended."""
        ...


class FixedPlan:
    """The user's choice, whatever is measured."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def plan(self, batch: int) -> Plan:
        return self._plan

    def add_row(self, batch: int, had_drafts: bool, is_predicted: bool) -> None:
        pass

    def add_round(self, batch: int, num_tokens: int, seconds: float) -> None:
        pass


class Planner:
    """Plans rounds by what pays.

    Args:
        num_drafts: K, the most.
        branch_budget: branches per request, the most.
        max_rows: of one step of the draft.
        times: of steps, as measured at the start.
        costs: of rounds, as measured so far; for the acceptance.
        step_seconds: what a step of the draft took of late, 0 before the first.
    """

    def __init__(
        self,
        num_drafts: int,
        branch_budget: int,
        max_rows: int,
        times: StepTimes,
        costs: Costs,
        step_seconds: Callable[[], float],
    ) -> None:
        self._most = Plan(num_drafts, branch_budget)
        self._max_rows = max_rows
        self._times = times
        self._costs = costs
        self._step_seconds = step_seconds
        self._buckets: dict[int, Bucket] = {}

    def plan(self, batch: int) -> Plan:
        return self._bucket(batch).plan

    def add_row(self, batch: int, had_drafts: bool, is_predicted: bool) -> None:
        if had_drafts:
            self._bucket(batch).predicted.add(float(is_predicted))

    def add_round(self, batch: int, num_tokens: int, seconds: float) -> None:
        bucket = self._bucket(batch)
        base = max(seconds - self._times.verify_per_token * num_tokens, 0.0)
        bucket.base.add(min(base, 4 * bucket.base.value))  # a pause or a prefill is no long round
        bucket.rounds += 1
        if bucket.rounds % PERIOD == 0:
            bucket.plan = self._decide(batch, bucket)

    def _bucket(self, batch: int) -> Bucket:
        number = batch.bit_length()
        if number not in self._buckets:
            self._buckets[number] = Bucket(self._most, RunningMean(self._times.verify_base))
        return self._buckets[number]

    def _decide(self, batch: int, bucket: Bucket) -> Plan:
        if not bucket.plan.num_drafts:
            bucket.idle_periods += 1
            if bucket.idle_periods % RETRY == 0:
                return self._most
            return bucket.plan  # nothing that was not known is known now
        speeds = self._predicted_speeds(batch, bucket)
        best = max(speeds, key=lambda plan: speeds[plan])
        return best if speeds[best] > WORTH_A_CHANGE * speeds[bucket.plan] else bucket.plan

    def _predicted_speeds(self, batch: int, bucket: Bucket) -> dict[Plan, float]:
        branches = min(bucket.plan.branch_budget, max(1, self._max_rows // batch))
        # Beside a busy target the draft is slower than it was by itself.
        slowdown = max(1.0, self._step_seconds() / self._times.draft(batch * branches))
        times = StepTimes(
            bucket.base.value,
            self._times.verify_per_token,
            slowdown * self._times.draft_base,
            slowdown * self._times.draft_per_row,
        )
        pair = self._pair(bucket, branches)
        speeds = {Plan(0, 0): predict_plain(times, batch).tokens_per_second}
        for num_drafts in range(1, self._most.num_drafts + 1):
            for budget in {max(1, self._most.branch_budget // part) for part in (1, 2, 4, 6)}:
                prediction = predict_ssd(times, pair, batch, num_drafts, budget, self._max_rows)
                speeds[Plan(num_drafts, budget)] = prediction.tokens_per_second
        return speeds

    def _pair(self, bucket: Bucket, branches: int) -> PairStatistics:
        """The level of misses is such that the model predicts what was predicted under the present plan."""
        acceptance = min(max(self._costs.acceptance.value, 0.01), 0.99)
        certain = PairStatistics(acceptance, 1.0, EXPONENT)
        misses = 1 - hit_rate(certain, bucket.plan.num_drafts, branches)
        level = (1 - bucket.predicted.value) / max(misses, 1e-6)
        return PairStatistics(acceptance, min(max(level, 1e-3), 1.0), EXPONENT)
