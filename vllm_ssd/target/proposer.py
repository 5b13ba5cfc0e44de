"""The target's half of a round: outcomes in, drafts out. Knows no model runner.

One round, one path: look the outcomes up, give missed rows their fallback, tell the draft both the outcome
and what is verified next. Nothing here waits for the draft without a deadline, and
without a draft every row simply goes on with its fallback.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np

from vllm_ssd.link.counters import Counters
from vllm_ssd.link.draft_probs import DraftLaws
from vllm_ssd.link.messages import (
    Outcomes,
    RoundOutcome,
    Sampling,
    Start,
    Stop,
)
from vllm_ssd.link.outcome_cache import NOT_INTRODUCED, Outcome, OutcomeCache
from vllm_ssd.plan.costs import DRAFT, Costs, RunningMean
from vllm_ssd.plan.planner import Plan, RoundPlanner
from vllm_ssd.target.backup import NOTHING, DraftAccess, Drafts, Fallback, MissedOutcome
from vllm_ssd.verify.ratio import DraftLaw, PointMass

POLL_S = 50e-6
LAWS_DEADLINE_S = 0.01  # for a whole step; they are there before a verification ends, unless the draft is not
MOST_LAWS_LATE = 0.1  # share of rows; where more are late, waiting for them brings nothing
TRY_LAWS_EVERY = 32  # steps, to see whether that is still so
FIRST_LAWS = 64  # steps, before anything is concluded
INTRODUCED_TOKENS = (
    16_384  # of running requests, in one round: packing and sending them takes the target's time
)
WATCHED_LOOKUPS = 1_000
LEAST_ACCEPTED = 0.05  # drafts for each of those look-ups
GREEDY = Sampling()

logger = logging.getLogger("vllm.ssd")


class News(Enum):
    """What `DraftLink.check` has noticed."""

    NOTHING = "nothing"
    READY = "ready"  # a draft that knows no request: it has just loaded, or was told to forget them
    DIED = "died"  # while it served; one of the requests that it served may be why


class DraftLink(DraftAccess, Protocol):
    """The proposer's view of the draft process."""

    @property
    def laws(self) -> DraftLaws | None:
        """What served drafts were drawn from, while the draft is ready and draws any."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of a request and its drafts that the draft can serve."""
        ...

    def check(self) -> News:
        """Notice what happened to the draft."""
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
    length: int  # tokens so far
    is_excluded: bool = False  # from being introduced: it may be what the draft, or a round, failed of
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
    num_verified: int

    @property
    def is_known(self) -> bool:
        """Whether the draft knows the request."""
        return self.outcome.epoch != NOT_INTRODUCED


class Proposer:
    """Keeps the requests in slots and answers each target step with drafts.

    Args:
        link: the draft process, or what is left of it.
        max_slots: requests at once.
        fallback: drafts for missed rows.
        costs: what the fallback goes by; measured here.
        history: a request's tokens so far, prompt and output.
        counters: the target's counters (`vllm_ssd.link.counters.target_fields`).
        planner: how many drafts a round verifies and how many branches the draft makes.
        vocab_size: V, of target and draft.
        num_speculative_tokens: K.
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
        vocab_size: int,
        num_speculative_tokens: int,
        wait_s: float = 0.0,
    ) -> None:
        self._link = link
        self.planner = planner  # another one may take over between rounds
        self._fallback = fallback
        self._costs = costs
        self._history = history
        self._counters = counters
        self._vocab_size = vocab_size
        self._most_drafts = num_speculative_tokens
        self._asked_depth = num_speculative_tokens  # what the draft was told to reach
        self._wait_s = wait_s
        self._num_laws = 0
        self._laws_late = RunningMean(0.0)
        self._num_accepted = 0
        self._watches = True  # for a draft of which nothing is ever accepted
        self._live: dict[str, LiveRequest] = {}
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._last_epoch = 0
        self.generation = 0  # how often epochs of running requests have changed

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
        request = LiveRequest(self._free_slots.pop() if slot is None else slot, ours, sampling, len(tokens))
        self._live[request_id] = request
        if self._link.cache is not None and self._can_serve(request):
            self._introduce(request, tokens)
        return request.epoch

    def stop(self, request_id: str) -> None:
        """A request leaves the batch: finished, aborted or preempted. Unknown ids are ignored."""
        request = self._live.pop(request_id, None)
        if request is None:
            return
        if request.is_slot_ours:
            self._free_slots.append(request.slot)
        self._withdraw(request)

    def propose(
        self,
        request_ids: Sequence[str],
        sampled: Sequence[list[int]],
        num_verified: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Drafts for the next verification of each row.

        Args:
            request_ids: [B], the rows of the step.
            sampled: [B], each row's accepted drafts followed by the recovery or bonus token; empty for a row
                without an outcome (a prompt that is not prefilled yet).
            num_verified: [B], drafts that were verified; None: all that were proposed.

        Returns:
            [B] lists of 0..K draft tokens.
        """
        began = time.perf_counter_ns()
        self._hear_of_draft()
        drafts: list[list[int]] = [[] for _ in request_ids]
        rows = self._rows(request_ids, sampled, num_verified)
        if rows:
            plan = self.planner.plan(len(rows))
            found = self._look_up([row.outcome for row in rows], plan.num_drafts)
            for row, chosen in zip(rows, self._go_on(rows, plan, found), strict=True):
                drafts[row.index] = chosen
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

    def receive(self, request_ids: Sequence[str], sampled: Sequence[list[int]], found: LookedUp) -> None:
        """A step whose outcomes were looked up already (`vllm_ssd.target.deferred`).

        Args:
            request_ids, sampled: [B], as for `propose`.
            found: what the rows found, and is being verified.
        """
        self._hear_of_draft()
        rows = self._rows(request_ids, sampled)
        if rows:
            drafts = None if found.drafts is None else [found.drafts[row.index] for row in rows]
            self._go_on(rows, found.plan, drafts)
        self._counters.add("rounds")

    def abandon(self, request_ids: Sequence[str], verified: Sequence[list[int] | None] | None = None) -> None:
        """A round of these requests failed midway: they are introduced anew at their next outcome.

        Args:
            verified: [B], the drafts that are being verified all the same; None: there are none.
        """
        for index, request_id in enumerate(request_ids):
            request = self._live.get(request_id)
            if request is not None:
                with suppress(Exception):  # what failed may be the link
                    self._withdraw(request)
                request.epoch = NOT_INTRODUCED
                drafts = verified[index] if verified is not None else None
                request.drafts = Drafts(DRAFT, drafts) if drafts else NOTHING
        self.generation += 1

    def exclude(self, request_ids: Sequence[str]) -> None:
        """These requests go on without drafts for good."""
        self.abandon(request_ids)
        for request_id in request_ids:
            if (request := self._live.get(request_id)) is not None:
                request.is_excluded = True

    def laws(self, request_ids: Sequence[str], num_drafts: Sequence[int]) -> list[DraftLaw]:
        """What the drafts were drawn from that are being verified, for ratio verification.

        Args:
            request_ids: [B], the rows of the step.
            num_drafts: [B], drafts that are verified, which may be fewer than were proposed.

        Returns:
            [B]
        """
        began = time.perf_counter()
        self._num_laws += 1
        are_late = self._num_laws > FIRST_LAWS and self._laws_late.value > MOST_LAWS_LATE
        waits = not are_late or self._num_laws % TRY_LAWS_EVERY == 0
        deadline = began + (LAWS_DEADLINE_S if waits else 0)
        found = [
            self._law(self._live.get(name), count, deadline, waits)
            for name, count in zip(request_ids, num_drafts, strict=True)
        ]
        self._counters.add("critical_path_ns", int((time.perf_counter() - began) * 1e9))
        return found

    def _law(self, request: LiveRequest | None, num_drafts: int, deadline: float, waits: bool) -> DraftLaw:
        if request is None or not num_drafts:
            return PointMass()
        if request.drafts.kind != DRAFT or not request.sampling.temperature:
            return PointMass()
        law = None
        while (laws := self._link.laws) is not None:
            law = laws.read(request.slot, request.epoch, request.round, num_drafts)
            began = time.perf_counter()
            if law is not None or began >= deadline:
                break
            time.sleep(POLL_S)
            self._counters.add("wait_ns", int((time.perf_counter() - began) * 1e9))
        if waits:
            self._laws_late.add(float(law is None))
        if law is None:
            self._counters.add("laws_late")
            return PointMass()
        return law

    def _hear_of_draft(self) -> None:
        news = self._link.check()
        if news is News.DIED:
            for request in self._live.values():
                request.is_excluded |= request.epoch != NOT_INTRODUCED
        if news is not News.NOTHING:
            self.generation += 1
            for request in self._live.values():
                request.epoch = NOT_INTRODUCED

    def _rows(
        self,
        request_ids: Sequence[str],
        sampled: Sequence[list[int]],
        num_verified: Sequence[int] | None = None,
    ) -> list[_Row]:
        """Those with an outcome, of which what they yielded and took is measured."""
        rows = []
        for index, (request_id, tokens) in enumerate(zip(request_ids, sampled, strict=True)):
            request = self._live.get(request_id)
            if tokens and request is not None:
                k, proposed = len(tokens) - 1, len(request.drafts.tokens)
                outcome = Outcome(request.slot, request.epoch, request.round, k, tokens[-1])
                verified = proposed if num_verified is None else min(proposed, num_verified[index])
                request.length += len(tokens)
                rows.append(_Row(index, request_id, request, outcome, tokens, verified))
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
        if plan.num_drafts:
            self._count(rows, found)
        found = found or [None] * len(rows)
        missed = []
        for row, drafts in zip(rows, found, strict=True):
            if drafts:
                row.request.drafts = Drafts(DRAFT, drafts)
            else:  # not predicted, or no draft token is there yet
                missed.append(row)
        for row, instead in zip(missed, self._fall_back(missed, plan.num_drafts), strict=True):
            row.request.drafts = Drafts(instead.kind, self._valid(instead.tokens))
        self._tell(rows, plan)
        return [row.request.drafts.tokens for row in rows]

    def _tell(self, rows: Sequence[_Row], plan: Plan) -> None:
        """Tell the draft the outcomes and what is verified next, and introduce who it does not know yet."""
        messages = []
        for row in rows:
            outcome, tokens = row.outcome, row.request.drafts.tokens
            row.request.round += 1
            if row.is_known:
                messages.append(
                    RoundOutcome(
                        outcome.slot, outcome.epoch, outcome.round, row.sampled, tokens, row.num_verified
                    )
                )
        if self._link.cache is None:
            return
        self._link.send(Outcomes(messages, plan.num_drafts, plan.branch_budget))
        self._asked_depth = plan.num_drafts
        room = INTRODUCED_TOKENS
        for row in rows:
            if not self._can_serve(row.request):
                self._withdraw(row.request)
            elif not row.is_known and room > 0:
                tokens = self._history(row.request_id)
                room -= len(tokens)
                self._introduce(row.request, tokens)
                self.generation += 1

    def _measure(self, rows: Sequence[_Row]) -> None:
        for row in rows:
            self._costs.add_row(row.request.drafts.kind, row.num_verified, row.outcome.k)
            if row.request.drafts.kind == DRAFT:
                self._num_accepted += row.outcome.k
        seconds = self._costs.add_round(sum(len(row.sampled) for row in rows))
        num_verified = sum(1 + row.num_verified for row in rows)
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
        depth = min(num_drafts, self._asked_depth)
        while time.perf_counter() - began < self._wait_s and any(
            drafts is not None and len(drafts) < depth for drafts in found
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

    def _count(self, rows: Sequence[_Row], found: Sequence[list[int] | None] | None) -> None:
        if found is None:
            self._counters.add("undrafted", len(rows))
            return
        for row, served in zip(rows, found, strict=True):
            if not row.is_known and not served:
                self._counters.add("undrafted" if self._fits(row.request) else "too_long")
                continue
            self.planner.add_row(len(rows), bool(row.request.drafts.tokens), served is not None)
            self._counters.add("lookups")
            self._counters.add(f"lookups_k{row.outcome.k}")
            if served:
                self._counters.add("hits")
                self._counters.add(f"hits_k{row.outcome.k}")
                self._counters.add("drafts_served", len(served))
            elif served is not None:
                self._counters.add("late")
        self._watch()

    def _watch(self) -> None:
        """Say so, once, if the draft brings nothing: its own part, be it ever so wrong, is exact."""
        if self._watches and self._counters["lookups"] >= WATCHED_LOOKUPS:
            self._watches = False
            if self._num_accepted < LEAST_ACCEPTED * WATCHED_LOOKUPS:
                logger.warning(
                    "SSD: of the first %d outcomes only %d drafts came to be accepted: use a draft with the "
                    "target's tokenizer and of its family, or, where vllm:ssd_cache_late grows, a faster one",
                    self._counters["lookups"],
                    self._num_accepted,
                )

    def _valid(self, tokens: list[int]) -> list[int]:
        """Those before the first that cannot be embedded: prompts may have such, and n-grams repeat them."""
        ends = (place for place, token in enumerate(tokens) if not 0 <= token < self._vocab_size)
        return tokens[: next(ends, None)]

    def _fits(self, request: LiveRequest) -> bool:
        return request.length + self._most_drafts + 1 <= self._link.max_model_len

    def _can_serve(self, request: LiveRequest) -> bool:
        """Whether the draft is to know the request: a longer one would never get a draft."""
        return not request.is_excluded and self._fits(request)

    def _introduce(self, request: LiveRequest, tokens: list[int]) -> None:
        self._last_epoch += 1
        request.epoch, request.round = self._last_epoch, 0
        # vLLM takes token ids that no vocabulary has, such as those of images; the draft would embed them.
        within = np.array(tokens, dtype=np.int64).clip(0, self._vocab_size - 1)
        packed = within.astype("<i4").tobytes()
        if not self._link.send(Start(request.slot, request.epoch, packed, request.sampling)):
            request.epoch = NOT_INTRODUCED

    def _withdraw(self, request: LiveRequest) -> None:
        """Let the draft forget a request."""
        if request.epoch != NOT_INTRODUCED and self._link.cache is not None:
            self._link.send(Stop(request.slot, request.epoch))
        request.epoch = NOT_INTRODUCED
