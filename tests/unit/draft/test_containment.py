"""Failures planted in the draft's loop: the requests that they are about lose their drafts, and no others."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from target import Setup, Target, prompt

from vllm_ssd.draft import server as server_module
from vllm_ssd.draft.requests import DraftRequest
from vllm_ssd.link.messages import Missed, MissedRow, Sampling, Start
from vllm_ssd.link.outcome_cache import Outcome


class PlantedError(RuntimeError):
    """What these tests raise."""


def fail_for(slot: int, stock: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `DraftRequest` that fails for the request in this slot."""

    def method(self: DraftRequest, *args: Any, **kwargs: Any) -> Any:
        if self.slot == slot:
            raise PlantedError("planted")
        return stock(self, *args, **kwargs)

    return method


def serve(target: Target, rng: random.Random, slots: list[int], rounds: int = 6) -> None:
    """Rounds whose outcomes are predicted, and looked up with success."""
    for _ in range(rounds):
        target.run_until_idle()
        for slot in slots:
            k, token, drafts = rng.choice(target.published(slot))
            assert drafts
            target.decide(slot, k, token)


def began(rng: random.Random, slots: int = 3) -> Target:
    target = Target(Setup())
    for slot in range(slots):
        target.start(slot, prompt(rng, 9))
    serve(target, rng, list(range(slots)), 2)
    return target


@pytest.mark.parametrize(
    "point",
    ["apply_outcome", "reserve", "outcomes", "fork", "num_blocks_for", "rank", "confidences", "computed"],
)
def test_a_request_that_fails_is_dropped_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, point: str
) -> None:
    rng = random.Random(1)
    target = began(rng)
    monkeypatch.setattr(DraftRequest, point, fail_for(1, getattr(DraftRequest, point)))
    with caplog.at_level("ERROR", logger="vllm.ssd"):
        target.decide(1, 0, int(target.oracle.rank(target.live[1].tokens)[-1]))  # a miss: all of it is run
        target.run_until_idle()
    monkeypatch.undo()
    assert not target.published(1)
    others = [0, 2]
    if point == "computed":  # after the step, which was about all that were in it
        others = [slot for slot in others if target.published(slot)]
    serve(target, rng, others)
    assert target.counters["dropped"] >= 1
    assert caplog.text.count("Traceback") == 1
    # The slot is taken again, as if nothing had been.
    target.start(1, prompt(rng, 5))
    serve(target, rng, [*others, 1])
    for slot in set(target.live) - {*others, 1}:
        target.stop(slot)
    target.finish()


@pytest.mark.parametrize("point", ["forward", "advance", "likeliest", "copy_blocks"])
def test_a_step_that_fails_costs_its_requests_their_drafts(
    monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    rng = random.Random(2)
    target = began(rng)
    waiting = target.start(3, prompt(rng, 9))
    target.run_until_idle()  # from now on the step is about the others
    failures = [1]
    stock = getattr(target.engine, point)

    def fail(*args: Any) -> Any:
        failures[0] -= 1
        if failures[0] >= 0:
            raise PlantedError("planted")
        return stock(*args)

    monkeypatch.setattr(target.engine, point, fail)
    for slot in range(3):
        target.decide(slot, 0, int(target.oracle.rank(target.live[slot].tokens)[-1]))
    target.run_until_idle()
    assert failures[0] <= 0
    assert target.published(waiting.slot)
    serve(target, rng, [waiting.slot])
    assert target.engine.num_checks == 1
    for slot in range(3):
        target.stop(slot)
        target.start(slot, prompt(rng, 5))
    serve(target, rng, [0, 1, 2, 3])
    target.finish()


def test_a_failure_that_is_about_nobody_in_particular(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    target = began(rng)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise PlantedError("planted")

    monkeypatch.setattr(server_module, "build_rows", fail)
    for slot in range(3):
        target.decide(slot, 0, int(target.oracle.rank(target.live[slot].tokens)[-1]))
    target.run_until_idle()
    monkeypatch.undo()
    for slot in range(3):
        target.stop(slot)
        target.start(slot, prompt(rng, 5))
    serve(target, rng, [0, 1, 2])
    target.finish()


def test_an_engine_that_cannot_run_any_step_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    target = began(random.Random(4))

    def fail(*args: Any) -> None:
        raise PlantedError("device lost")

    for point in ("forward", "advance", "check"):
        monkeypatch.setattr(target.engine, point, fail)
    target.decide(0, 0, int(target.oracle.rank(target.live[0].tokens)[-1]))
    with pytest.raises(PlantedError, match="device lost"):
        target.run_until_idle()


@pytest.mark.parametrize(
    "start",
    [
        Start(1, 99, b"123"),  # no whole tokens
        Start(1, 99, b"", Sampling(0.7, 1, 2**40, 0.9)),
        Start(1, 99, np.array([1, 2**20, -5], dtype="<i4").tobytes()),  # not in the vocabulary
        Start(1, 99, np.array([1, 2], dtype="<i4").tobytes(), Sampling(0.7, 1, 2**40, 0.9)),
    ],
)
def test_a_start_that_nobody_should_send(start: Start) -> None:
    """The target clamps what it sends; the draft survives what it does not."""
    rng = random.Random(5)
    target = began(rng, slots=1)
    target.server.handle(start)
    for _ in range(20):
        target.server.step()
    serve(target, rng, [0], 1)
    target.start(1, prompt(rng, 5))
    serve(target, rng, [0, 1])
    target.finish()


def test_what_cannot_be_answered_soon_is_declined() -> None:
    """The target waits for just-in-time drafts: of a request that was dropped, or whose prompt is long."""
    target = Target(Setup(prefill_chunk=4))
    request = target.start(0, prompt(random.Random(6), 60))
    target.step()
    for slot, epoch in ((0, request.epoch), (2, 77)):
        target.server.handle(Missed([MissedRow(slot, epoch, 0, [9], 2)]))
        assert target.cache.declined([Outcome(slot, epoch, 0, 0, 9)]) == [True]
        assert target.cache.look_up([Outcome(slot, epoch, 0, 0, 9)]) == [[]]
    target.stop(0)
    target.start(0, prompt(random.Random(7), 6))
    target.run_until_idle()
    epoch = target.live[0].epoch
    target.await_drafts(0, 0, int(target.oracle.rank(target.live[0].tokens)[-1]), 2)
    token = target.live[0].awaited[1]  # type: ignore[index]
    assert target.cache.declined([Outcome(0, epoch, 0, 0, token)]) == [False]
    target.run_until_idle()
    assert len(target.published(0)[0][2]) >= 2
    target.finish()
