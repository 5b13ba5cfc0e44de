"""What scripts/soak.py saw, and what it says of it."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from soak_requests import OUT_TOKENS, good_requests

MOST_LOST_POINTS = 5.0
# Kinds that stock vLLM (--method draft_model) answers with a server error, too. On the CPU it does not live
# long here: a request with a seed whose prompt is prefilled in parts ends its engine.
STOCK_5XX = frozenset({"beyond 64 bits", "grammar of nothing"})


@dataclass(frozen=True)
class Answer:
    """What a good request got; `rounds` and `hits` as in soak.py's docstring."""

    tokens: list[int]
    rounds: int
    hits: int


def read_answer(body: str) -> Answer:
    """An answer from its stream of events.

    Raises:
        ValueError: if it is not whole, or ended with an error.
    """
    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    if not events or events.pop() != "[DONE]":
        raise ValueError(f"ended early: {body[-200:]!r}")
    tokens: list[int] = []
    metrics: dict[str, Any] = {}
    for event in map(json.loads, events):
        if "error" in event:
            raise ValueError(str(event["error"]))
        for choice in event["choices"]:
            tokens += choice.get("token_ids") or []
        metrics = (event.get("metrics") or {}).get("speculative_decoding", metrics)
    if len(tokens) != OUT_TOKENS or not metrics:
        raise ValueError(f"{len(tokens)} tokens, metrics {metrics}")
    return Answer(tokens, len(tokens) - 1 - metrics["num_accepted_draft_tokens"], metrics["num_spec_steps"])


@dataclass
class Phase:
    """What was seen in one phase."""

    answers: dict[str, list[Answer]] = field(default_factory=lambda: defaultdict(list))  # by good request
    failures: list[str] = field(default_factory=list)  # good requests that were not answered
    statuses: dict[str, Counter[str]] = field(
        default_factory=lambda: defaultdict(Counter)
    )  # others', by kind
    replies: dict[str, str] = field(default_factory=dict)  # how each kind's first one of a status begins
    events: list[str] = field(default_factory=list)  # deaths and changes of WATCHED, and what was in flight
    running: list[float] = field(default_factory=list)  # requests in the engine's batch, each second
    counted: dict[str, float] = field(default_factory=dict)  # increases of vLLM's and SSD's counters

    @property
    def num_answers(self) -> int:
        return sum(map(len, self.answers.values()))

    @property
    def hit_percent(self) -> float:
        answers = [answer for same in self.answers.values() for answer in same]
        return 100 * sum(a.hits for a in answers) / max(1, sum(a.rounds for a in answers))

    def server_errors(self) -> list[str]:
        """Each kind and status of others that says that the server failed, or did not answer at all."""
        return [
            f"{kind}: {count} x {status}"
            for kind, counts in sorted(self.statuses.items())
            for status, count in counts.items()
            if not re.fullmatch(r"[234]\d\d|hung up", status)
        ]


@dataclass(frozen=True)
class Verdict:
    """A line of the table; all must pass."""

    what: str
    passed: bool
    detail: str


def judge(alone: Phase, beside: Phase) -> list[Verdict]:
    """What the run is for."""
    expected = {name: same[0].tokens for name, same in alone.answers.items()}
    missing = sorted(good_requests().keys() - (expected.keys() & beside.answers.keys()))
    changed = [
        f"{name} {when} from token {first_difference(answer.tokens, expected[name])} on"
        for when, phase in (("alone", alone), ("beside", beside))
        for name in sorted(expected.keys() & phase.answers.keys())
        for answer in phase.answers[name]
        if answer.tokens != expected[name]
    ]
    failures, events = alone.failures + beside.failures, alone.events + beside.events
    errors = [line for line in beside.server_errors() if line.partition(":")[0] not in STOCK_5XX]
    hits, hits_beside = alone.hit_percent, beside.hit_percent
    return [
        _verdict("good outputs are identical", changed + [f"{name} missing" for name in missing]),
        Verdict(
            f"hit rate falls by {MOST_LOST_POINTS:g} points at most",
            hits > 0 and hits - hits_beside <= MOST_LOST_POINTS,
            f"{hits:.1f} % alone, {hits_beside:.1f} % beside",
        ),
        _verdict("no process died, restarted, stalled or had an exception", events),
        _verdict("every good request is answered", failures),
        _verdict("hostile requests get no server error that stock vLLM does not give", errors),
    ]


def _verdict(what: str, faults: list[str]) -> Verdict:
    return Verdict(what, not faults, f"{len(faults)} faults: {'; '.join(faults[:5])}" if faults else "")


def first_difference(ours: list[int], theirs: list[int]) -> int:
    """Index of the first token that differs, of two lists of equal length."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
