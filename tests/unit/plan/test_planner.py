"""The planner on a simulated engine: it finds what is fastest there, and gives up what loses."""

from __future__ import annotations

import random

import pytest

from vllm_ssd.plan.costs import DRAFT, Costs
from vllm_ssd.plan.planner import PERIOD, RETRY, Plan, Planner
from vllm_ssd.plan.speed_model import PairStatistics, StepTimes, hit_rate, predict_plain, predict_ssd

MOST, MAX_ROWS = Plan(8, 16), 64
ENGINE_OVERHEAD = 0.0015  # seconds of a round that no step has


class Simulation:
    """Rounds as the speed model describes them, with noise."""

    def __init__(self, times: StepTimes, pair: PairStatistics) -> None:
        self._times = times
        self._pair = pair
        self._rng = random.Random(0)
        self.costs = Costs()
        self.planner = Planner(
            MOST.num_drafts, MOST.branch_budget, MAX_ROWS, times, self.costs, lambda: self.step_seconds
        )
        self.step_seconds = 0.0

    @property
    def real_times(self) -> StepTimes:
        base = self._times.verify_base + ENGINE_OVERHEAD
        return StepTimes(
            base, self._times.verify_per_token, self._times.draft_base, self._times.draft_per_row
        )

    def run(self, batch: int, rounds: int) -> Plan:
        for _ in range(rounds):
            plan = self.planner.plan(batch)
            tokens = batch
            if plan.num_drafts:
                found = predict_ssd(
                    self.real_times, self._pair, batch, plan.num_drafts, plan.branch_budget, MAX_ROWS
                )
                for _ in range(batch):
                    drafts = round(found.depth) if self._rng.random() < found.hit_rate else 0
                    self._verify(batch, plan, drafts)
                    tokens += drafts
            seconds = self.real_times.verify(tokens, batch) * self._rng.uniform(0.9, 1.1)
            self.planner.add_round(batch, tokens, seconds)
        return self.planner.plan(batch)

    def _verify(self, batch: int, plan: Plan, drafts: int) -> None:
        accepted = 0
        while accepted < drafts and self._rng.random() < self._pair.acceptance:
            accepted += 1
        self.costs.add_row(DRAFT, drafts, accepted)
        branches = min(plan.branch_budget, MAX_ROWS // batch)
        rate = hit_rate(self._pair, plan.num_drafts, branches)
        self.planner.add_row(batch, drafts > 0, self._rng.random() < rate)

    def speed(self, batch: int, plan: Plan) -> float:
        if not plan.num_drafts:
            return predict_plain(self.real_times, batch).tokens_per_second
        return predict_ssd(
            self.real_times, self._pair, batch, plan.num_drafts, plan.branch_budget, MAX_ROWS
        ).tokens_per_second

    def best_speed(self, batch: int) -> float:
        plans = [Plan(0, 0)] + [Plan(k, b) for k in range(1, 9) for b in (4, 8, 16)]
        return max(self.speed(batch, plan) for plan in plans)


GOOD = PairStatistics(0.85, 0.3, 1.0)


@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize(
    "times",
    [
        StepTimes(0.005, 0.0001, 0.0005, 0.00001),
        StepTimes(0.005, 0.001, 0.0005, 0.00001),  # every verified token is dear
        StepTimes(0.005, 0.0001, 0.003, 0.0001),  # a slow draft
    ],
)
def test_finds_about_the_fastest(times: StepTimes, batch: int) -> None:
    simulation = Simulation(times, GOOD)
    plan = simulation.run(batch, 6 * PERIOD)
    assert simulation.speed(batch, plan) > 0.93 * simulation.best_speed(batch)


def test_stops_where_speculation_loses_and_tries_again() -> None:
    times = StepTimes(0.001, 0.001, 0.0005, 0.00001)  # a target without any slack
    simulation = Simulation(times, PairStatistics(0.3, 0.9, 1.0))
    assert simulation.run(4, 4 * PERIOD) == Plan(0, 0)
    tried = {simulation.run(4, PERIOD).num_drafts for _ in range(2 * RETRY)}
    assert tried == {0, MOST.num_drafts}
    assert simulation.run(4, 2 * PERIOD) == Plan(0, 0)


def test_batch_sizes_are_planned_apart() -> None:
    simulation = Simulation(StepTimes(0.005, 0.0015, 0.0005, 0.00001), GOOD)
    few, many = simulation.run(1, 4 * PERIOD), simulation.run(32, 4 * PERIOD)
    assert few.num_drafts > many.num_drafts


def test_begins_with_what_the_user_set() -> None:
    assert Simulation(StepTimes(0.005, 0.0001, 0.0005, 0.00001), GOOD).planner.plan(3) == MOST


def test_a_draft_is_taken_at_its_present_speed() -> None:
    simulation = Simulation(StepTimes(0.005, 0.0001, 0.0003, 0.0), GOOD)
    planner = simulation.planner
    simulation.run(4, PERIOD)
    before = planner._predicted_speeds(4, planner._bucket(4))[MOST]
    simulation.step_seconds = 0.004
    assert planner._predicted_speeds(4, planner._bucket(4))[MOST] < 0.7 * before
