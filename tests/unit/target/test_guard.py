"""No exception of SSD's own reaches the target, whatever clients send and wherever it comes from."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from proposals import BUDGET, VOCAB, Bench, K

from vllm_ssd.draft.batch import _sampling_of_rows
from vllm_ssd.draft.blocks import BlockPool
from vllm_ssd.draft.requests import DraftRequest
from vllm_ssd.link.messages import Sampling, Start
from vllm_ssd.plan.planner import Plan
from vllm_ssd.target.guard import Guard
from vllm_ssd.verify.ratio import PointMass

NUMBERS = st.sampled_from([int, np.int64, np.float32, float])


@st.composite
def sampling_params(draw: st.DrawFn) -> Any:
    """Whatever vLLM accepts of what crosses to the draft; its own checks are the bound."""
    from vllm import SamplingParams

    temperature = draw(st.one_of(st.just(0.0), st.floats(0, 2), st.floats(0, 2, width=32).map(np.float32)))
    return SamplingParams(
        temperature=temperature,
        top_p=draw(st.floats(0, 1, exclude_min=True)),
        top_k=draw(st.one_of(st.integers(-1, VOCAB + 1), st.integers(1, 2**70))),
        seed=draw(st.one_of(st.none(), st.integers(-(2**70), 2**70), st.integers(0, 9).map(np.int64))),
    )


@given(sampling_params())
def test_what_clients_choose_reaches_the_draft_in_bounds(params: Any) -> None:
    """From vLLM's parameters through the message to the arrays of a step."""
    seed = 2**63 if params.seed is None else params.seed
    sampling = Sampling.of(params, seed, VOCAB)
    message = Start(0, 1, np.array([1], dtype="<i4").tobytes(), sampling)
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Start)
    request = DraftRequest(0, 1, [1], BlockPool(8, 4), K, 100, received.sampling)
    rows = _sampling_of_rows([request])
    assert (rows.temperatures[0] > 0) == (params.temperature >= 0.01)
    if rows.temperatures[0]:
        assert rows.temperatures[0] == np.float32(params.temperature)
        assert int(rows.seeds[0]) % 2**64 == int(seed) % 2**64
        assert rows.top_k[0] == (params.top_k if 0 < params.top_k < VOCAB else 0)
        assert rows.top_p[0] == np.float32(params.top_p)


class Guarded(Bench):
    """With the guard before the proposer."""

    def __init__(self) -> None:
        super().__init__()
        self.guard = Guard(self.proposer, self.probs, self.counters)

    def enter(self, name: str) -> Start:
        self.guard.start(name, lambda: (self.history[name], Sampling()))
        (message,) = self.link.take_sent()
        assert isinstance(message, Start)
        return message

    def round(self, **outcomes: list[int]) -> list[list[int]]:
        for name, tokens in outcomes.items():
            self.history[name] += tokens
        return self.guard.propose(list(outcomes), list(outcomes.values()), [K] * len(outcomes))


@pytest.fixture
def bench() -> Guarded:
    return Guarded()


class PlantedError(RuntimeError):
    """What these tests raise."""


def plant(monkeypatch: pytest.MonkeyPatch, owner: object, point: str, times: int = 1) -> None:
    stock, left = getattr(owner, point), [times]

    def fail(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise PlantedError("planted")
        return stock(*args, **kwargs)

    monkeypatch.setattr(owner, point, fail)


POINTS = ["_hear_of_draft", "_rows", "_look_up", "_back_up", "_tell"]


@pytest.mark.parametrize("point", POINTS)
def test_a_round_that_fails_once(
    bench: Guarded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, point: str
) -> None:
    a, b = bench.enter("a"), bench.enter("b")
    assert bench.round(b=[7]) == [[7, 90, 91]]
    bench.link.publish(a, 0, 0, 50, [51])
    plant(monkeypatch, bench.proposer, point)
    bench.link.take_sent()
    with caplog.at_level("ERROR", logger="vllm.ssd"):
        assert bench.round(a=[50]) == [[]]
    assert caplog.text.count("Traceback") == 1
    assert bench.guard.verified("a") == []
    bench.link.take_sent()
    bench.round(a=[60])
    (again,) = [message for message in bench.link.take_sent() if isinstance(message, Start)]
    assert again.tokens == np.array(bench.history["a"], dtype="<i4").tobytes()
    bench.link.publish(again, 0, 1, 61, [62])
    bench.link.publish(b, 1, 0, 70, [71])  # b was not in that round
    assert bench.round(a=[60, 61], b=[70]) == [[62], [71]]
    assert bench.counters["failures"] == 1


def test_one_poisonous_request_is_excluded_and_no_other(
    bench: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.enter("a")
    bench.enter("b")
    stock = bench.proposer._back_up

    def fail(rows: Any, *args: Any) -> Any:
        if any(row.request_id == "a" and not row.request.is_excluded for row in rows):
            raise PlantedError("planted")
        return stock(rows, *args)

    monkeypatch.setattr(bench.proposer, "_back_up", fail)
    assert bench.round(a=[50], b=[60]) == [[], []]
    bench.link.take_sent()
    assert bench.round(a=[50], b=[60]) == [[], [60, 90, 91]]  # row by row
    (start,) = [message for message in bench.link.take_sent() if isinstance(message, Start)]
    bench.link.publish(start, 0, 0, 61, [62])
    assert bench.round(a=[50], b=[61]) == [[50, 90, 91], [62]]
    assert not any(isinstance(message, Start) for message in bench.link.take_sent())
    assert bench.counters["failures"] == 2


@pytest.mark.parametrize("point", ["start", "stop", "read", "receive"])
def test_what_else_the_runner_calls(bench: Guarded, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    from vllm_ssd.target.proposer import LookedUp

    b = bench.enter("b")
    plant(monkeypatch, bench.probs if point == "read" else bench.proposer, point)
    bench.guard.start("a", lambda: (bench.history["a"], Sampling()))
    (distribution,) = bench.guard.distributions(["a"], [1])
    assert isinstance(distribution, PointMass)
    bench.guard.receive(["a"], [[50]], LookedUp(Plan(K, BUDGET), [[51, 52]]))
    if point != "start":
        assert bench.guard.verified("a") == [51, 52]  # they are, whatever the host does
    bench.guard.stop("a")
    assert bench.counters["failures"] == 1
    bench.link.publish(b, 0, 0, 70, [71])
    assert bench.round(b=[70]) == [[71]]


def test_more_requests_than_slots(bench: Guarded) -> None:
    """Should not happen, but with another scheduler."""
    for name in ("a", "b"):
        bench.enter(name)
    assert bench.guard.start("c", lambda: ([6], Sampling())) == -1
    assert bench.round(a=[50], c=[60]) == [[50, 90, 91], []]
    assert bench.counters["failures"] == 1


def test_a_failure_that_stays_is_told_seldom(
    bench: Guarded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.enter("a")
    plant(monkeypatch, bench.proposer, "_hear_of_draft", times=150)
    with caplog.at_level("ERROR", logger="vllm.ssd"):
        for _ in range(150):
            assert bench.round(a=[50]) == [[]]
    assert len(caplog.records) == 3  # the first, the tenth, the hundredth
