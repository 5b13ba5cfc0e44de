"""The target's half of a round: outcomes in, drafts out. Knows no model runner.

One round, one path: look the outcomes up, give missed rows their fallback, tell the draft both the outcome
and what is verified next. Nothing here waits for the draft without a deadline, and
without a draft every row simply goes on with its fallback.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vllm_ssd.channel import Outcomes, RoundOutcome, Sampling, Start, Stop
from vllm_ssd.costs import DRAFT, Costs
from vllm_ssd.counters import Counters
from vllm_ssd.draft_laws import DraftLaw, DraftLaws, PointMass
from vllm_ssd.fallback import NOTHING, DraftAccess, Drafts, Fallback, MissedOutcome
from vllm_ssd.outcome import Outcome, OutcomeCache
from vllm_ssd.planner import Plan, RoundPlanner

NOT_INTRODUCED = -1  # epoch of a request that the draft does not know; no entry has it
POLL_S = 50e-6
LAWS_DEADLINE_S = 0.01  # for a whole step; they are there before a verification ends, unless the draft is not
GREEDY = Sampling()


class DraftLink(DraftAccess, Protocol):
    """The proposer's view of the draft process."""

    @property
    def laws(self) -> DraftLaws | None:
        """What served drafts were drawn from, while the draft is ready and draws any."""
        ...

    def check(self) -> bool:
        """Notice what happened to the draft; True when it has become ready and knows no request yet."""
        ...

    def give_up(self, reason: str) -> None:
        """End the draft for good; decoding goes on without it."""
        ...


@dataclass
class LiveRequest:
    """A request that the target is working on."""

    slot: int
    is_slot_ours: bool  # not the model runner's
    sampling: Sampling
    epoch: int = NOT_INTRODUCED
    round: int = 0
    drafts: Drafts = NOTHING  # what is being verified


@dataclass(frozen=True)
class LookedUp:
    """What a look-up on the device found."""

    plan: Plan
    drafts: Sequence[list[int] | None] | None  # [B], None where a row missed; None if no draft was asked


@dataclass(frozen=True)
class _Row:
    """A row of a step that has an outcome."""

    index: int  # in the step
    request_id: str
    request: LiveRequest
    outcome: Outcome
    sampled: list[int]  # accepted drafts, then the recovery or bonus token


class Proposer:
    """Keeps the requests in slots and answers each target step with drafts.

    Args:
        link: the draft process, or what is left of it.
        max_slots: requests at once.
        fallback: drafts for missed rows.
        costs: what the fallback goes by; measured here.
        history: a request's tokens so far, prompt and output.
        counters: the target's counters (`vllm_ssd.counters.target_fields`).
        planner: how many drafts a round verifies and how many branches the draft makes.
        wait_s: how long a round may wait for foreseen outcomes to reach depth K, in seconds.
    """

    def __init__(
        self,
        link: DraftLink,
        max_slots: int,
        fallback: Fallback,
        costs: Costs,
        history: Callable[[str], list[int]],
        counters: Counters,
        planner: RoundPlanner,
        wait_s: float = 0.0,
    ) -> None:
        self._link = link
        self.planner = planner  # another one may take over between rounds
        self._fallback = fallback
        self._costs = costs
        self._history = history
        self._counters = counters
        self._wait_s = wait_s
        self._live: dict[str, LiveRequest] = {}
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._last_epoch = 0
        self.generation = 0  # how often all requests were introduced anew

    def start(
        self, request_id: str, tokens: list[int], sampling: Sampling = GREEDY, slot: int | None = None
    ) -> int:
        """A request enters the batch, for the first time or after a preemption, with its tokens so far.

        Its drafts are those tokens that the target will most likely take when it samples as `sampling` says.

        Args:
            slot: where a model runner that gives its requests slots has put this one; either all or none.

        Returns:
            Its epoch, NOT_INTRODUCED while there is no draft.
        """
        ours = slot is None
        request = LiveRequest(self._free_slots.pop() if slot is None else slot, ours, sampling)
        self._live[request_id] = request
        if self._link.cache is not None:
            self._introduce(request, tokens)
        return request.epoch

    def stop(self, request_id: str) -> None:
        """A request leaves the batch: finished, aborted or preempted. Unknown ids are ignored."""
        request = self._live.pop(request_id, None)
        if request is None:
            return
        if request.is_slot_ours:
            self._free_slots.append(request.slot)
        if self._link.cache is not None:
            self._link.send(Stop(request.slot, request.epoch))

    def propose(self, request_ids: Sequence[str], sampled: Sequence[list[int]]) -> list[list[int]]:
        """Drafts for the next verification of each row.

        Args:
            request_ids: [B], the rows of the step.
            sampled: [B], each row's accepted drafts followed by the recovery or bonus token; empty for a row
                without an outcome (a prompt that is not prefilled yet).

        Returns:
            [B] lists of 0..K draft tokens.
        """
        began = time.perf_counter_ns()
        if self._link.check():
            self._introduce_all()
            for request_id in request_ids:
                if (request := self._live.get(request_id)) is not None:
                    request.drafts = NOTHING
            drafts: list[list[int]] = [[] for _ in request_ids]  # the draft has only just heard of them
        else:
            drafts = self._propose(request_ids, sampled)
        self._counters.add("rounds")
        self._counters.add("critical_path_ns", time.perf_counter_ns() - began)
        return drafts

    def live(self, request_id: str) -> LiveRequest | None:
        """What is known of a request; a new object whenever it enters the batch."""
        return self._live.get(request_id)

    def verified(self, request_id: str) -> list[int]:
        """The drafts of a request that are being verified."""
        request = self._live.get(request_id)
        return request.drafts.tokens if request else []

    def keys(self) -> dict[int, tuple[int, int]]:
        """Epoch and round of each slot's request: what its next outcome is looked up with."""
        return {request.slot: (request.epoch, request.round) for request in self._live.values()}

    def take_in(self, request_ids: Sequence[str], sampled: Sequence[list[int]], found: LookedUp) -> None:
        """A step whose outcomes were looked up already (`vllm_ssd.deferred`); the history is that before it.

        Args:
            request_ids, sampled: [B], as for `propose`.
            found: what the rows found, and is being verified.
        """
        if self._link.check():
            self._introduce_all()
        rows = self._rows(request_ids, sampled)
        if rows:
            drafts = None if found.drafts is None else [found.drafts[row.index] for row in rows]
            self._go_on(rows, found.plan, drafts)
        self._counters.add("rounds")

    def laws(self, request_ids: Sequence[str], num_drafts: Sequence[int]) -> list[DraftLaw]:
        """What the drafts were drawn from that are being verified, for ratio verification.

        Args:
            request_ids: [B], the rows of the step.
            num_drafts: [B], drafts that are verified, which may be fewer than were proposed.

        Returns:
            [B]
        """
        began = time.perf_counter()
        deadline = began + LAWS_DEADLINE_S
        found = [
            self._law(self._live.get(name), count, deadline)
            for name, count in zip(request_ids, num_drafts, strict=True)
        ]
        self._counters.add("critical_path_ns", int((time.perf_counter() - began) * 1e9))
        return found

    def _law(self, request: LiveRequest | None, num_drafts: int, deadline: float) -> DraftLaw:
        if request is None or not num_drafts:
            return PointMass()
        if request.drafts.kind != DRAFT or not request.sampling.temperature:
            return PointMass()
        while (laws := self._link.laws) is not None:
            law = laws.read(request.slot, request.epoch, request.round, num_drafts)
            if law is not None:
                return law
            began = time.perf_counter()
            if began > deadline:
                break
            time.sleep(POLL_S)
            self._counters.add("wait_ns", int((time.perf_counter() - began) * 1e9))
        self._counters.add("laws_late")
        return PointMass()

    def _propose(self, request_ids: Sequence[str], sampled: Sequence[list[int]]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in request_ids]
        rows = self._rows(request_ids, sampled)
        if rows:
            plan = self.planner.plan(len(rows))
            found = self._look_up([row.outcome for row in rows], plan.num_drafts)
            for row, chosen in zip(rows, self._go_on(rows, plan, found), strict=True):
                drafts[row.index] = chosen
        return drafts

    def _rows(self, request_ids: Sequence[str], sampled: Sequence[list[int]]) -> list[_Row]:
        """Those with an outcome, of which what they yielded and took is measured."""
        rows = []
        for index, (request_id, tokens) in enumerate(zip(request_ids, sampled, strict=True)):
            request = self._live.get(request_id)
            if tokens and request is not None:
                k = len(tokens) - 1
                outcome = Outcome(request.slot, request.epoch, request.round, k, tokens[-1])
                rows.append(_Row(index, request_id, request, outcome, tokens))
        if rows:
            self._measure(rows)
        return rows

    def _go_on(
        self, rows: Sequence[_Row], plan: Plan, found: Sequence[list[int] | None] | None
    ) -> list[list[int]]:
        """What each row verifies next: what was found, or its fallback; the draft is told.

        Args:
            found: see `LookedUp.drafts`, of these rows.
        """
        if found is None:
            if plan.num_drafts:
                self._counters.add("undrafted", len(rows))
            found = [None] * len(rows)
        else:
            self._count(rows, found)
        missed = []
        for row, drafts in zip(rows, found, strict=True):
            if drafts is None:
                missed.append(row)
            else:
                row.request.drafts = Drafts(DRAFT, drafts)
        for row, instead in zip(missed, self._fall_back(missed, plan.num_drafts), strict=True):
            row.request.drafts = instead
        messages = []
        for row in rows:
            outcome, tokens = row.outcome, row.request.drafts.tokens
            messages.append(RoundOutcome(outcome.slot, outcome.epoch, outcome.round, row.sampled, tokens))
            row.request.round += 1
        if self._link.cache is not None:
            self._link.send(Outcomes(messages, plan.num_drafts, plan.branch_budget))
        return [row.request.drafts.tokens for row in rows]

    def _measure(self, rows: Sequence[_Row]) -> None:
        for row in rows:
            self._costs.add_row(row.request.drafts.kind, len(row.request.drafts.tokens), row.outcome.k)
        seconds = self._costs.add_round(sum(len(row.sampled) for row in rows))
        num_verified = sum(1 + len(row.request.drafts.tokens) for row in rows)
        self.planner.add_round(len(rows), num_verified, seconds)

    def _look_up(self, outcomes: list[Outcome], num_drafts: int) -> list[list[int] | None] | None:
        """At most so many drafts of each outcome, None where it was not foreseen; None if none are asked."""
        cache = self._link.cache
        if cache is None or not num_drafts:
            return None
        return [drafts and drafts[:num_drafts] for drafts in self._await_depth(cache, outcomes, num_drafts)]

    def _await_depth(
        self, cache: OutcomeCache, outcomes: list[Outcome], num_drafts: int
    ) -> list[list[int] | None]:
        found = cache.look_up(outcomes)
        if not self._wait_s:
            return found
        began = time.perf_counter()
        while time.perf_counter() - began < self._wait_s and any(
            drafts is not None and len(drafts) < num_drafts for drafts in found
        ):
            time.sleep(POLL_S)
            found = cache.look_up(outcomes)
        self._counters.add("wait_ns", int((time.perf_counter() - began) * 1e9))
        return found

    def _fall_back(self, missed: Sequence[_Row], num_drafts: int) -> list[Drafts]:
        if not missed or not num_drafts:
            return [NOTHING] * len(missed)
        began = time.perf_counter_ns()
        outcomes = [MissedOutcome(row.request_id, row.outcome, row.sampled) for row in missed]
        drafts = self._fallback.propose(outcomes, num_drafts, self._link)
        for row in drafts:
            self._counters.add(f"fallback_{row.kind}")
        if any(row.kind == DRAFT for row in drafts):
            self._counters.add("wait_ns", time.perf_counter_ns() - began)
        return drafts

    def _count(self, rows: Sequence[_Row], found: Sequence[list[int] | None]) -> None:
        for row, served in zip(rows, found, strict=True):
            self.planner.add_row(len(rows), bool(row.request.drafts.tokens), served is not None)
            self._counters.add("lookups")
            self._counters.add(f"lookups_k{row.outcome.k}")
            if served:
                self._counters.add("hits")
                self._counters.add(f"hits_k{row.outcome.k}")
                self._counters.add("drafts_served", len(served))
            elif served is not None:
                self._counters.add("late")

    def _introduce_all(self) -> None:
        self.generation += 1
        for request_id, request in self._live.items():
            self._introduce(request, self._history(request_id))

    def _introduce(self, request: LiveRequest, tokens: list[int]) -> None:
        self._last_epoch += 1
        request.epoch, request.round = self._last_epoch, 0
        packed = np.array(tokens, dtype="<i4").tobytes()
        self._link.send(Start(request.slot, request.epoch, packed, request.sampling))
