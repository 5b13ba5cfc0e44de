"""How long the target waits for drafts and for their distributions: to the deadline, and never in vain."""

from __future__ import annotations

import numpy as np
import pytest
from proposals import BUDGET, VOCAB, Bench

from vllm_ssd.plan.planner import FixedPlan, Plan
from vllm_ssd.target import draft_link, served_probs
from vllm_ssd.target import proposer as proposer_module
from vllm_ssd.verify.ratio import PointMass


@pytest.fixture
def bench() -> Bench:
    return Bench()


class Clock:
    """Stands for the module's `time`: sleeping moves it, and may let something happen."""

    def __init__(self) -> None:
        self.now = 100.0
        self.naps = 0
        self.on_nap = lambda: None

    def perf_counter(self) -> float:
        return self.now

    def perf_counter_ns(self) -> int:
        return int(self.now * 1e9)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.naps += 1
        self.on_nap()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (proposer_module, draft_link, served_probs):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_waiting_ends_at_the_deadline(clock: Clock) -> None:
    bench = Bench(wait_s=0.002)
    a = bench.start("a")
    bench.link.publish(a, 0, 0, 50, [51])
    assert bench.proposer.propose(["a"], [[50]]) == [[51]]
    assert 0.002 <= clock.now - 100.0 <= 0.002 + 2 * draft_link.POLL_S
    assert bench.counters["wait_ns"] == pytest.approx(2e6, rel=0.1)


def test_waiting_ends_with_full_depth(clock: Clock) -> None:
    bench = Bench(wait_s=10.0)
    a = bench.start("a")
    bench.link.publish(a, 0, 0, 50, [51])
    clock.on_nap = lambda: bench.link.publish(a, 0, 0, 50, [51, 52, 53][: clock.naps])
    assert bench.proposer.propose(["a"], [[50]]) == [[51, 52, 53]]
    assert clock.naps == 3


def test_nobody_waits_for_more_than_the_draft_was_asked_for(clock: Clock) -> None:
    """The plan has just been raised."""
    bench = Bench(wait_s=10.0)
    a = bench.start("a")
    bench.proposer.planner = FixedPlan(Plan(1, BUDGET))
    bench.proposer.propose(["a"], [[50]])
    bench.proposer.planner = FixedPlan(Plan(3, BUDGET))
    bench.link.publish(a, 1, 0, 50, [51])
    assert bench.proposer.propose(["a"], [[50]]) == [[51]]
    assert clock.naps == 0


def test_nobody_waits_for_a_miss(clock: Clock) -> None:
    bench = Bench(wait_s=10.0)
    bench.start("a")
    assert bench.proposer.propose(["a"], [[50]]) == [[3, 90, 91]]
    assert clock.naps == 0


def test_the_distribution_of_drafts_that_were_drawn(bench: Bench) -> None:
    a = bench.start("a", 1.0)
    bench.start("b", 1.0)
    bench.link.publish(a, 0, 0, 50, [51, 52])
    bench.proposer.propose(["a", "b"], [[50], [60]])  # b gets n-gram drafts
    distribution = np.random.default_rng(0).random((2, VOCAB), dtype=np.float32)
    bench.link.table.publish(a.slot, a.epoch, 1, list(distribution))
    found = bench.distributions(["b", "a", "unknown"], [3, 1, 2])
    assert isinstance(found[0], PointMass)
    assert isinstance(found[1], np.ndarray)
    assert np.array_equal(found[1][:1], distribution[:1])
    assert isinstance(found[2], PointMass)
    assert isinstance(bench.distributions(["a"], [0])[0], PointMass)
    assert bench.counters["draft_probs_late"] == 0


def test_drafts_of_a_greedy_request_have_no_distribution(bench: Bench) -> None:
    a = bench.start("a")
    bench.link.publish(a, 0, 0, 50, [51])
    bench.proposer.propose(["a"], [[50]])
    assert isinstance(bench.distributions(["a"], [1])[0], PointMass)


def test_distributions_that_are_mostly_late_are_not_waited_for(bench: Bench, clock: Clock) -> None:
    a = bench.start("a", 1.0)
    bench.link.publish(a, 0, 0, 50, [51])
    bench.proposer.propose(["a"], [[50]])
    steps = 10 * served_probs.TRY_EVERY
    for _ in range(served_probs.FIRST_STEPS):
        bench.distributions(["a"], [1])
    before = clock.now
    for _ in range(steps):
        bench.distributions(["a"], [1])
    assert clock.now - before <= 1.1 * served_probs.DEADLINE_S * 10
    bench.link.table.publish(a.slot, a.epoch, 1, [np.ones(VOCAB, dtype=np.float32)])
    for _ in range(40 * served_probs.TRY_EVERY):  # now they are there when they are asked for
        assert isinstance(bench.distributions(["a"], [1])[0], np.ndarray)


@pytest.mark.parametrize("wrong", ["round", "epoch", "depth", "nothing", "draft gone"])
def test_a_distribution_that_does_not_come_is_not_waited_for_long(
    bench: Bench, clock: Clock, wrong: str
) -> None:
    a = bench.start("a", 1.0)
    bench.link.publish(a, 0, 0, 50, [51, 52])
    bench.proposer.propose(["a"], [[50]])
    epoch, round_, depth = a.epoch + (wrong == "epoch"), 1 - (wrong == "round"), 2 - (wrong == "depth")
    if wrong != "nothing":
        bench.link.table.publish(a.slot, epoch, round_, [np.ones(VOCAB, dtype=np.float32)] * depth)
    bench.link.ready = wrong != "draft gone"
    assert all(
        isinstance(distribution, PointMass)
        for distribution in bench.distributions(["a", "a", "a"], [2, 2, 2])
    )
    assert clock.now - 100.0 <= 1.1 * served_probs.DEADLINE_S
    assert bench.counters["draft_probs_late"] == 3


def test_a_distribution_may_come_while_it_is_waited_for(bench: Bench, clock: Clock) -> None:
    a = bench.start("a", 1.0)
    bench.link.publish(a, 0, 0, 50, [51])
    bench.proposer.propose(["a"], [[50]])
    distribution = np.ones(VOCAB, dtype=np.float32)
    clock.on_nap = lambda: bench.link.table.publish(a.slot, a.epoch, 1, [distribution])
    assert isinstance(bench.distributions(["a"], [1])[0], np.ndarray)
    assert clock.naps == 1
