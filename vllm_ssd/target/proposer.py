"""The target's half of a round: outcomes in, drafts out. Knows no model runner.

One round, one path: look the outcomes up, give missed rows their backup, tell the draft both the outcome and
what is verified next. Nothing here waits for the draft without a deadline, and without a draft every row
simply continues with its backup.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from vllm_ssd.link.messages import Outcomes, RoundOutcome, Sampling, Start, Stop
from vllm_ssd.link.outcome_cache import NOT_INTRODUCED, Outcome
from vllm_ssd.plan.costs import DRAFT
from vllm_ssd.plan.planner import Plan, RoundPlanner
from vllm_ssd.target.backup import Backup, MissedOutcome
from vllm_ssd.target.draft_link import DraftLink, News, poll_until
from vllm_ssd.target.live import NOTHING, Drafts, LiveRequest, Row
from vllm_ssd.target.observer import Found, RoundObserver

INTRODUCED_TOKENS = 16_384  # of running requests, in one round: to send them takes the target's time
GREEDY = Sampling()


@dataclass(frozen=True)
class LookedUp:
    """What a look-up on the device found."""

    plan: Plan
    drafts: Found  # [B]


class Proposer:
    """Keeps the requests in slots and answers each target step with drafts.

    Args:
        link: the draft process, or what is left of it.
        max_slots: requests at once.
        backup: drafts for missed rows.
        history: a request's tokens so far, prompt and output.
        observer: is told of every round.
        planner: how many drafts a round verifies and how many branches the draft makes.
        vocab_size: of the tokens that target and draft both have.
        num_speculative_tokens: K.
        wait_s: how long a round may wait for predicted outcomes to reach depth K, in seconds.
    """

    def __init__(
        self,
        link: DraftLink,
        max_slots: int,
        backup: Backup,
        history: Callable[[str], list[int]],
        observer: RoundObserver,
        planner: RoundPlanner,
        vocab_size: int,
        num_speculative_tokens: int,
        wait_s: float = 0.0,
    ) -> None:
        self._link = link
        self.planner = planner  # another one may take over between rounds
        self._backup = backup
        self._history = history
        self._observer = observer
        self._vocab_size = vocab_size
        self._most_drafts = num_speculative_tokens
        self._asked_depth = num_speculative_tokens  # what the draft was told to reach
        self._wait_s = wait_s
        self._live: dict[str, LiveRequest] = {}
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._last_epoch = 0
        self.generation = 0  # how often epochs of running requests have changed

    def propose(
        self,
        request_ids: Sequence[str],
        sampled: Sequence[list[int]],
        num_verified: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """One round: drafts for the next verification of each row.

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
        rows = self._rows(request_ids, sampled, num_verified)
        plan = self.planner.plan(len(rows))
        found = self._look_up(rows, plan)
        self._back_up(rows, found, plan)
        self._tell(rows, plan)
        self._observer.add_round(rows, found, plan, self.planner)
        self._observer.add_critical_path(time.perf_counter_ns() - began)
        drafts = {row.index: row.request.drafts.tokens for row in rows}
        return [drafts.get(index, []) for index in range(len(request_ids))]

    def receive(self, request_ids: Sequence[str], sampled: Sequence[list[int]], found: LookedUp) -> None:
        """The same for a step whose outcomes were looked up already (`vllm_ssd.target.deferred`).

        Args:
            request_ids, sampled: [B], as for `propose`.
            found: what the rows found, and is being verified.
        """
        self._hear_of_draft()
        rows = self._rows(request_ids, sampled)
        drafts = None if found.drafts is None else [found.drafts[row.index] for row in rows]
        self._back_up(rows, drafts, found.plan)
        self._tell(rows, found.plan)
        self._observer.add_round(rows, drafts, found.plan, self.planner)

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
        """These requests continue without drafts for good."""
        self.abandon(request_ids)
        for request_id in request_ids:
            if (request := self._live.get(request_id)) is not None:
                request.is_excluded = True

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
    ) -> list[Row]:
        """Those with an outcome."""
        rows = []
        for index, (request_id, tokens) in enumerate(zip(request_ids, sampled, strict=True)):
            request = self._live.get(request_id)
            if tokens and request is not None:
                outcome = Outcome(request.slot, request.epoch, request.round, len(tokens) - 1, tokens[-1])
                proposed = len(request.drafts.tokens)
                verified = proposed if num_verified is None else min(proposed, num_verified[index])
                request.length += len(tokens)
                is_too_long = not self._fits(request)
                rows.append(
                    Row(index, request_id, request, outcome, tokens, request.drafts, verified, is_too_long)
                )
        return rows

    def _look_up(self, rows: Sequence[Row], plan: Plan) -> Found:
        """At most so many drafts of each outcome as are planned; nobody is asked if none are."""
        cache = self._link.cache
        if cache is None or not plan.num_drafts:
            return None
        outcomes, depth = [row.outcome for row in rows], min(plan.num_drafts, self._asked_depth)
        found = cache.look_up(outcomes)

        def are_deep() -> bool:
            nonlocal found
            found = cache.look_up(outcomes)
            return all(drafts is None or len(drafts) >= depth for drafts in found)

        if self._wait_s:
            self._observer.add_wait(poll_until(are_deep, self._wait_s))
        return [drafts and drafts[: plan.num_drafts] for drafts in found]

    def _back_up(self, rows: Sequence[Row], found: Found, plan: Plan) -> None:
        """Decide what each row verifies next: what was found, or its backup."""
        missed = []
        for row, drafts in zip(rows, found or [None] * len(rows), strict=True):
            row.request.drafts = Drafts(DRAFT, drafts) if drafts else NOTHING
            # Not predicted, or no draft token is there yet. What the draft cannot embed it cannot continue.
            if not drafts and plan.num_drafts and row.outcome.token < self._vocab_size:
                missed.append(row)
        if missed:
            outcomes = [MissedOutcome(row.request_id, row.outcome, row.sampled) for row in missed]
            backups = self._backup.propose(outcomes, plan.num_drafts, self._link)
            for row, instead in zip(missed, backups, strict=True):
                row.request.drafts = Drafts(instead.kind, self._valid(instead.tokens))

    def _tell(self, rows: Sequence[Row], plan: Plan) -> None:
        """Tell the draft the outcomes and what is verified next, and introduce who it does not know yet."""
        for row in rows:
            row.request.round += 1
        if self._link.cache is None or not rows:
            return
        outcomes = [
            RoundOutcome(
                row.outcome.slot,
                row.outcome.epoch,
                row.outcome.round,
                self._embeddable(row.sampled),
                row.request.drafts.tokens,
                row.num_verified,
            )
            for row in rows
            if row.is_known
        ]
        self._link.send(Outcomes(outcomes, plan.num_drafts, plan.branch_budget))
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

    def _valid(self, tokens: list[int]) -> list[int]:
        """Those before the first that cannot be embedded: prompts may have such, and n-grams repeat them."""
        ends = (place for place, token in enumerate(tokens) if not 0 <= token < self._vocab_size)
        return tokens[: next(ends, None)]

    def _embeddable(self, tokens: list[int]) -> list[int]:
        """An outcome as the draft can embed it: the token at its end may be one that only the target has."""
        return [*tokens[:-1], min(tokens[-1], self._vocab_size - 1)]

    def _fits(self, request: LiveRequest) -> bool:
        return request.length + self._most_drafts + 1 <= self._link.max_model_len

    def _can_serve(self, request: LiveRequest) -> bool:
        """Whether the draft is to know the request: a longer one would never get a draft."""
        return not request.is_excluded and self._fits(request)

    def _introduce(self, request: LiveRequest, tokens: list[int]) -> None:
        self._last_epoch += 1
        request.epoch, request.round = self._last_epoch, 0
        # vLLM takes token ids that no vocabulary has, such as those of images, and others the draft may lack.
        within = np.array(tokens, dtype=np.int64).clip(0, self._vocab_size - 1)
        packed = within.astype("<i4").tobytes()
        if not self._link.send(Start(request.slot, request.epoch, packed, request.sampling)):
            request.epoch = NOT_INTRODUCED

    def _withdraw(self, request: LiveRequest) -> None:
        """Let the draft forget a request."""
        if request.epoch != NOT_INTRODUCED and self._link.cache is not None:
            self._link.send(Stop(request.slot, request.epoch))
        request.epoch = NOT_INTRODUCED
