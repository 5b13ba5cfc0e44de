"""Rounds that the device looks up and the host hears of later: the same messages, one step behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from device import DEVICE
from link import Link

from vllm_ssd.link.counters import Counters, target_fields
from vllm_ssd.link.draft_probs import DraftProbs
from vllm_ssd.link.messages import Outcomes, RoundOutcome, Start, Stop
from vllm_ssd.link.outcome_cache import OutcomeCache
from vllm_ssd.plan.costs import Costs
from vllm_ssd.plan.planner import FixedPlan, Plan
from vllm_ssd.target import deferred as deferred_module
from vllm_ssd.target.backup import NoBackup
from vllm_ssd.target.deferred import DeferredRounds
from vllm_ssd.target.draft_link import News
from vllm_ssd.target.guard import Guard
from vllm_ssd.target.histories import Histories
from vllm_ssd.target.observer import RoundObserver
from vllm_ssd.target.proposer import Proposer
from vllm_ssd.target.served_probs import ServedProbs

K, SLOTS, BUDGET, VOCAB = 3, 4, 8, 100


class Bench:
    """As the model runner has it: requests in slots, and their tokens."""

    may_fail = False

    def __init__(self) -> None:
        self.link = Link(self.new_cache(), DraftProbs(SLOTS, K, VOCAB))
        self.counters = Counters(target_fields(K))
        self.histories = Histories()
        self.slots: dict[str, int] = {}
        observer = RoundObserver(self.counters, Costs())
        self.proposer = Proposer(
            self.link,
            SLOTS,
            NoBackup(),
            lambda name: self.histories[name],
            observer,
            FixedPlan(Plan(K, BUDGET)),
            VOCAB,
            K,
        )
        self.guard = Guard(self.proposer, ServedProbs(self.link, observer), self.counters)
        self.deferred = DeferredRounds(
            self.guard, self.link, self.counters, self.histories, SLOTS, K, VOCAB, torch.device(DEVICE)
        )
        self.last_sampled = torch.zeros(SLOTS, dtype=torch.int64, device=DEVICE)

    def new_cache(self) -> OutcomeCache:
        return OutcomeCache(SLOTS, BUDGET, K, VOCAB)

    def start(self, name: str, slot: int, tokens: list[int]) -> Start | None:
        with self.deferred.lock:
            self.histories.begin(name, list(tokens))
            self.slots[name] = slot
            epoch = self.proposer.start(name, tokens, slot=slot)
        self.deferred.begin(slot, epoch)
        starts = [message for message in self.link.take_sent() if isinstance(message, Start)]
        return starts[0] if starts else None

    def step(self, outcomes: dict[str, tuple[int, int]]) -> list[list[int]]:
        """Drafts after outcomes (number of new tokens, the last of them), without the filling."""
        slots = torch.tensor([self.slots[name] for name in outcomes], device=DEVICE)
        counts = torch.tensor([count for count, _ in outcomes.values()], dtype=torch.int32, device=DEVICE)
        last = torch.tensor([token for _, token in outcomes.values()], device=DEVICE)
        self.last_sampled[slots] = last
        drafts, num_drafts = self.deferred.propose(list(outcomes), slots, counts, self.last_sampled)
        assert (
            (drafts >= 0) & (drafts < VOCAB)
        ).all()  # the filling too: it goes into the target's embedding
        return [row[:count] for row, count in zip(drafts.tolist(), num_drafts.tolist(), strict=True)]

    def told(self) -> list[RoundOutcome]:
        """What the draft has heard since, when all rounds are received."""
        self.deferred.proposed()
        return [
            row for message in self.link.take_sent() if isinstance(message, Outcomes) for row in message.rows
        ]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.deferred.close()
    assert not made.deferred._thread.is_alive()
    assert made.may_fail or not made.deferred._failed  # a failure of the thread shows nowhere else


def test_the_draft_hears_what_the_device_found(bench: Bench) -> None:
    a, b = bench.start("a", 2, [1, 2]), bench.start("b", 0, [3])
    assert a is not None
    assert b is not None
    bench.link.publish(a, 0, 0, 50, [51, 52, 53])
    assert bench.step({"b": (1, 70), "a": (1, 50)}) == [[], [51, 52, 53]]
    assert bench.told() == [
        RoundOutcome(0, b.epoch, 0, [70], [], 0),
        RoundOutcome(2, a.epoch, 0, [50], [51, 52, 53], 0),
    ]
    bench.link.publish(a, 1, 2, 60, [61])
    assert bench.step({"a": (3, 60)}) == [[61]]
    assert bench.told() == [RoundOutcome(2, a.epoch, 1, [51, 52, 60], [61], 3)]
    assert bench.histories["a"] == [1, 2, 50, 51, 52, 60]
    assert bench.histories["b"] == [3, 70]
    assert bench.deferred.proposed() == (["a"], [[61]])
    counted = bench.counters.as_dict()
    assert (counted["rounds"], counted["lookups"], counted["hits"]) == (2, 3, 2)


def test_a_prompt_that_is_not_prefilled_has_no_outcome(bench: Bench) -> None:
    a = bench.start("a", 1, [1, 2])
    assert a is not None
    assert bench.step({"a": (0, 9)}) == [[]]
    assert bench.told() == []
    bench.link.publish(a, 0, 0, 50, [51])
    assert bench.step({"a": (1, 50)}) == [[51]]


def test_rounds_may_be_several_steps_behind(bench: Bench) -> None:
    a = bench.start("a", 1, [1, 2])
    assert a is not None
    bench.step({"a": (1, 7)})
    bench.told()
    with bench.deferred.lock:  # the thread waits
        for round_ in (1, 2, 3):
            bench.link.publish(a, round_, 0, 50 + round_, [60 + round_])
            assert bench.step({"a": (1, 50 + round_)}) == [[60 + round_]]
        assert bench.link.take_sent() == []
    assert [(row.round, row.tokens) for row in bench.told()] == [(1, [51]), (2, [52]), (3, [53])]


def test_an_outcome_in_flight_is_not_the_next_requests(bench: Bench) -> None:
    a = bench.start("a", 1, [1, 2])
    assert a is not None
    bench.step({"a": (1, 7)})
    bench.told()
    bench.deferred.lock.acquire()
    try:
        bench.step({"a": (1, 8)})  # the thread cannot take it in yet
        bench.proposer.stop("a")
        bench.histories.begin("a", [5])
        bench.deferred.begin(1, bench.proposer.start("a", [5], slot=1))
        bench.starts = [message for message in bench.link.take_sent() if isinstance(message, Start)]
    finally:
        bench.deferred.lock.release()
    assert bench.told() == []
    assert bench.histories["a"] == [5]
    start, *_ = bench.starts
    bench.link.publish(start, 0, 0, 6, [7])
    assert bench.step({"a": (1, 6)}) == [[7]]
    assert [row.epoch for row in bench.told()] == [start.epoch]


def test_without_a_draft_and_with_another(bench: Bench) -> None:
    a = bench.start("a", 1, [1, 2])
    assert a is not None
    bench.link.publish(a, 0, 0, 50, [51, 52])
    bench.link.ready = False
    assert bench.step({"a": (1, 50)}) == [[]]
    assert bench.told() == []
    # The next draft has a table of its own and is told everything when its readiness is noticed.
    bench.link.outcomes = bench.new_cache()
    bench.link.news = News.READY
    assert bench.step({"a": (1, 55)}) == [[]]
    bench.deferred.proposed()
    outcome, start = bench.link.take_sent()
    assert isinstance(start, Start)
    assert isinstance(outcome, Outcomes)
    assert start.tokens == torch.tensor([1, 2, 50, 55], dtype=torch.int32).numpy().tobytes()
    assert outcome.rows == []
    bench.link.publish(start, 0, 0, 56, [57])
    assert bench.step({"a": (1, 56)}) == [[57]]
    assert bench.told() == [RoundOutcome(1, start.epoch, 0, [56], [57], 0)]
    assert bench.histories["a"] == [1, 2, 50, 55, 56]


def test_a_row_that_waits_while_the_draft_is_told_anew(bench: Bench) -> None:
    """Its drafts of before are still verified; the same table, as after a stall."""
    a, b = bench.start("a", 1, [1, 2]), bench.start("b", 2, [3])
    assert a is not None
    assert b is not None
    bench.link.publish(a, 0, 0, 50, [51, 52])
    assert bench.step({"a": (1, 50)}) == [[51, 52]]
    bench.told()
    bench.link.news = News.READY
    assert bench.step({"b": (1, 7)}) == [[]]
    bench.deferred.proposed()
    assert bench.step({"a": (3, 60)}) == [[]]
    bench.deferred.proposed()
    starts = {message.slot: message for message in bench.link.take_sent() if isinstance(message, Start)}
    assert starts[1].tokens == torch.tensor([1, 2, 50, 51, 52, 60], dtype=torch.int32).numpy().tobytes()
    assert bench.histories["a"] == [1, 2, 50, 51, 52, 60]
    bench.link.publish(starts[1], 0, 0, 61, [62])
    bench.link.publish(starts[2], 0, 0, 8, [9])
    assert bench.step({"a": (1, 61), "b": (1, 8)}) == [[62], [9]]


def test_drafts_of_a_draft_that_died_meanwhile_are_verified_all_the_same(bench: Bench) -> None:
    a = bench.start("a", 1, [1, 2])
    assert a is not None
    bench.step({"a": (1, 7)})
    bench.told()
    bench.link.publish(a, 1, 0, 50, [51, 52])
    with bench.deferred.lock:
        assert bench.step({"a": (1, 50)}) == [[51, 52]]
        bench.link.ready = False
    bench.deferred.proposed()
    assert bench.step({"a": (3, 60)}) == [[]]
    bench.deferred.proposed()
    assert bench.histories["a"] == [1, 2, 7, 50, 51, 52, 60]


def test_the_plan_limits_what_is_served(bench: Bench) -> None:
    a = bench.start("a", 1, [1, 2])
    assert a is not None
    bench.proposer.planner = FixedPlan(Plan(1, BUDGET))
    bench.link.publish(a, 0, 0, 50, [51, 52, 53])
    assert bench.step({"a": (1, 50)}) == [[51]]
    assert bench.told() == [RoundOutcome(1, a.epoch, 0, [50], [51], 0)]


def test_a_table_in_the_gpu_is_read_instead_of_the_hosts(bench: Bench) -> None:
    a = bench.start("a", 1, [1, 2])
    assert a is not None
    bench.link.publish(a, 0, 0, 50, [51])
    published = bench.link.outcomes.entries
    bench.link.outcomes.gpu_entries = torch.from_numpy(published.copy()).to(DEVICE)
    published[:] = 0
    assert bench.step({"a": (1, 50)}) == [[51]]


def test_a_request_without_tokens_finds_nothing(bench: Bench) -> None:
    """Given as embeddings: the draft is not told of it, whoever had its slot before."""
    a = bench.start("a", 1, [1, 2])
    assert a is not None
    bench.link.publish(a, 0, 0, 50, [51])
    with bench.deferred.lock:
        bench.proposer.stop("a")
    assert bench.link.take_sent() == [Stop(1, a.epoch)]
    bench.slots["b"] = 1
    bench.deferred.begin(1)
    assert bench.step({"b": (1, 50)}) == [[]]
    assert bench.told() == []


class PlantedError(RuntimeError):
    """What these tests raise."""


def plant(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, times: int) -> None:
    """Let a method fail so many times, then do its work."""
    stock, left = getattr(owner, name), [times]

    def fail(*args: object, **kwargs: object) -> object:
        left[0] -= 1
        if left[0] >= 0:
            raise PlantedError("planted")
        return stock(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("point", ["receive", "_hear_of_draft", "_rows", "_back_up", "_tell"])
def test_a_failure_of_the_bookkeeping_costs_one_round(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, point: str
) -> None:
    a, b = bench.start("a", 1, [1, 2]), bench.start("b", 2, [3])
    assert a is not None
    assert b is not None
    plant(monkeypatch, bench.proposer, point, 1)
    bench.link.publish(a, 0, 0, 50, [51])
    with caplog.at_level("ERROR", logger="vllm.ssd"):
        assert bench.step({"a": (1, 50)}) == [[51]]  # looked up on the device, and verified
        bench.deferred.proposed()
        bench.link.take_sent()
        assert bench.step({"a": (2, 60)}) == [[]]
        bench.deferred.proposed()
    assert caplog.text.count("Traceback") == 1
    assert bench.counters["failures"] == 1
    assert bench.histories["a"] == [1, 2, 50, 51, 60]
    (again,) = [message for message in bench.link.take_sent() if isinstance(message, Start)]
    assert again.tokens == torch.tensor([1, 2, 50, 51, 60], dtype=torch.int32).numpy().tobytes()
    bench.link.publish(again, 0, 0, 61, [62])
    bench.link.publish(b, 0, 0, 7, [8])
    assert bench.step({"a": (1, 61), "b": (1, 7)}) == [[62], [8]]  # b was never harmed


def test_a_gap_in_a_requests_tokens_is_that_requests_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.start("a", 1, [1, 2]) is not None
    b = bench.start("b", 2, [3])
    assert b is not None
    plant(monkeypatch, bench.histories, "add_outcomes", 1)
    bench.step({"a": (1, 50)})
    bench.deferred.proposed()
    bench.link.publish(b, 0, 0, 7, [8])
    for _ in range(2):
        bench.step({"a": (1, 51)})
    assert bench.step({"b": (1, 7)}) == [[8]]
    bench.deferred.proposed()
    assert not any(isinstance(message, Start) for message in bench.link.take_sent())


def test_a_failed_look_up_costs_its_requests_their_drafts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.start("a", 1, [1, 2]) is not None
    b = bench.start("b", 2, [3])
    assert b is not None
    plant(monkeypatch, deferred_module, "look_up", 1)
    assert bench.step({"a": (1, 50)}) == [[]]
    assert bench.step({"a": (1, 51)}) == [[]]
    bench.link.publish(b, 0, 0, 7, [8])
    assert bench.step({"b": (1, 7)}) == [[8]]
    assert bench.counters["failures"] == 1


def test_a_device_that_cannot_look_up_ends_speculation_and_nothing_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.may_fail = True
    bench.start("a", 1, [1, 2])
    plant(monkeypatch, deferred_module, "look_up", deferred_module.MOST_FAILURES)
    for token in range(deferred_module.MOST_FAILURES + 2):
        assert bench.step({"a": (1, token)}) == [[]]
    assert bench.link.cache is None  # the draft has been ended: it would work for nobody
    assert bench.deferred.proposed() == ([], [])


def test_a_thread_that_has_ended_is_not_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.may_fail = True
    a = bench.start("a", 1, [1, 2])
    assert a is not None

    def end(*args: object) -> None:
        raise SystemExit  # as nothing in it does; the thread has no guard against it

    monkeypatch.setattr(bench.deferred, "_receive", end)
    for token in range(5):
        assert bench.step({"a": (1, token)}) == [[]]
        bench.proposer.generation += 1  # so that the rounds in flight are asked for
    assert bench.deferred.proposed() == ([], [])
