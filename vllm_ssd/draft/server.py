"""The draft's loop: receive outcomes, adopt, fork, run one step, publish; between steps look for news.

A step is one forward over everything there is to do: trunk tokens that have no KV yet (prompts, in chunks;
recovery tokens after a miss; the tip of an adopted branch) and one row per branch. When all branches have
their K drafts and nothing else is waiting, one more step computes the tips, so that after the outcome every
accepted length can be forked at once.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vllm_ssd.draft.batch import TrunkRow, Work, build_rows
from vllm_ssd.draft.blocks import BlockCopies, BlockPool
from vllm_ssd.draft.branches import BranchGroup
from vllm_ssd.draft.memory import BlockPolicy
from vllm_ssd.draft.observer import StepObserver
from vllm_ssd.draft.outcomes import Measured, OutcomeStatistics
from vllm_ssd.draft.requests import DraftRequest
from vllm_ssd.draft.rows import Engine, Place, Predictions
from vllm_ssd.draft.speculation import choose_branches
from vllm_ssd.failures import Failures
from vllm_ssd.link.counters import Counters
from vllm_ssd.link.draft_probs import DraftProbs
from vllm_ssd.link.messages import (
    Configure,
    Missed,
    MissedRow,
    Outcomes,
    Reset,
    RoundOutcome,
    Start,
    Stop,
    ToDraft,
)
from vllm_ssd.link.outcome_cache import Outcome
from vllm_ssd.link.transport import Channel

IDLE_POLL_MS = 200
SPIN_SECONDS = 0.02  # after work, before the draft's core may sleep: with cold caches steps are slow

Int64Array = npt.NDArray[np.int64]

logger = logging.getLogger("vllm.ssd")


class BranchTable(Protocol):
    """What the server needs of the outcome cache (see `vllm_ssd.link.outcome_cache`, and `_gpu`)."""

    def open_branches(
        self, slot: int, first: int, epoch: int, round_: int, ks: Int64Array, tokens: Int64Array
    ) -> None: ...

    def publish(self, slot: int, first: int, depth: int, tokens: Int64Array) -> None: ...

    def close_branches(self, slot: int) -> None: ...

    def decline(self, outcome: Outcome) -> None: ...


class DraftServer:
    """Serves one target.

    Args:
        configure: what the target asked for.
        engine: the draft model.
        channel: messages from the target.
        cache: the outcome cache to publish in.
        counters: the draft's counters (`vllm_ssd.link.counters.DRAFT_FIELDS`).
        distributions: where to leave what drafts were drawn from; None where verification is coupled.
    """

    def __init__(
        self,
        configure: Configure,
        engine: Engine,
        channel: Channel,
        cache: BranchTable,
        counters: Counters,
        distributions: DraftProbs | None = None,
    ) -> None:
        self._configure = configure
        self._engine = engine
        self._channel = channel
        self._cache = cache
        self._counters = counters
        self._distributions = distributions
        self._pool = BlockPool(engine.num_blocks, engine.block_size)
        self._requests: dict[int, DraftRequest] = {}  # by slot
        self._num_drafts = configure.num_speculative_tokens
        self._depth = self._num_drafts  # steps of branches, as the target wants at present
        self._budget = configure.branch_budget
        self._num_candidates = min(configure.branch_budget + 1, engine.vocab_size)
        self._blocks = BlockPolicy(self._pool, self._requests, self._num_drafts, counters)
        self._measured = Measured(configure.branch_budget)
        self._observer = StepObserver(counters, self._num_drafts)
        self._advancing: list[BranchGroup] = []  # what the last step was made of, if of nothing else
        self._at_work: Iterable[DraftRequest] = ()  # whom the code that runs just now is about
        self._failures = Failures(logger, "a step of the draft failed; its requests continue without drafts")

    def run(self) -> None:
        """Serve until the target hangs up."""
        last_busy = -math.inf
        while True:
            is_quiet = time.monotonic() - last_busy > SPIN_SECONDS
            try:
                self._receive_messages(IDLE_POLL_MS if is_quiet else 0)
            except EOFError:
                return
            if self.step():
                last_busy = time.monotonic()

    def _receive_messages(self, timeout_ms: int) -> None:
        message = self._channel.receive(timeout_ms)
        while message is not None:
            self._counters.add("messages")
            self.handle(message)
            message = self._channel.receive()

    def handle(self, message: ToDraft) -> None:
        """Receive one message; those of an epoch that is over are ignored."""
        if isinstance(message, Start):
            self._contain(self._start, message)
        elif isinstance(message, Outcomes):
            self._depth, self._budget = message.num_drafts, message.branch_budget
            for outcome in message.rows:
                self._contain(self._apply_outcome, outcome)
        elif isinstance(message, Missed):
            for missed in message.rows:
                self._contain(self._await_drafts, missed)
        elif isinstance(message, Stop):
            request = self._requests.get(message.slot)
            if request is not None and request.epoch == message.epoch:
                self._stop(message.slot)
        elif isinstance(message, Reset):
            for slot in list(self._requests):
                self._stop(slot)

    def _contain(self, act: Callable[[Any], None], message: Start | RoundOutcome | MissedRow) -> None:
        """Act on what concerns one request; a failure is that request's alone."""
        try:
            act(message)
        except Exception:
            self._failures.note()
            self._drop(message.slot)

    def _drop(self, slot: int) -> None:
        """Forget a request for whom something failed: the target decodes it without drafts."""
        self._counters.add("dropped")
        self._stop(slot)

    def step(self) -> bool:
        """Fork what can be forked, run one forward, publish its tokens; False if there was nothing to do.

        Where that fails, the requests that it was about are dropped, and no others.

        Raises:
            Exception: if the engine cannot run any step: another process has to.
        """
        try:
            return self._step()
        except Exception:
            self._failures.note()
            for request in self._at_work:
                self._drop(request.slot)
            self._advancing = []
            self._engine.check()
            return True

    def _step(self) -> bool:
        began = time.perf_counter_ns()
        self._reserve()
        self._fork()
        work = self._next_work()
        if work is None:
            return False
        self._publish(work, self._predict(work))
        self._observer.add_step(work, time.perf_counter_ns() - began)
        return True

    def _next_work(self) -> Work | None:
        """What there is to compute: what the target waits for, then what it wants, and when idle the tips."""
        self._at_work = everybody = list(self._requests.values())
        urgent = [request for request in everybody if request.is_urgent]
        tips = self._depth + 1 if self._depth else 0
        for requests, depth in ((urgent, self._num_drafts), (everybody, self._depth), (everybody, tips)):
            work = Work(self._trunk_rows(requests), self._groups(requests, below=depth))
            if work.num_rows:
                self._at_work = work.requests
                return work
        return None

    def _start(self, message: Start) -> None:
        if message.slot in self._requests:  # a stop that was lost with an earlier draft
            self._stop(message.slot)
        tokens = np.frombuffer(message.tokens, dtype="<i4")
        most, sampling = self._engine.vocab_size, message.sampling
        if not (len(tokens) and 0 <= tokens.min() <= tokens.max() < most and 0 <= sampling.top_k < most):
            raise ValueError(f"a request that no step can hold: {sampling}, {tokens}")
        self._requests[message.slot] = DraftRequest(
            message.slot,
            message.epoch,
            tokens.tolist(),
            self._pool,
            self._num_drafts,
            self._engine.max_model_len,
            message.sampling,
            is_drawn=self._distributions is not None and message.sampling.temperature > 0,
        )

    def _stop(self, slot: int) -> None:
        self._blocks.forget(slot)
        request = self._requests.pop(slot, None)
        try:
            self._cache.close_branches(slot)
            if request is not None:
                request.release()
        except Exception:  # whatever has come of its bookkeeping, it is gone
            self._failures.note()

    def _await_drafts(self, missed: MissedRow) -> None:
        k, token = len(missed.tokens) - 1, missed.tokens[-1]
        request = self._asked_about(missed)
        if request is not None:
            statistics = self._statistics(request)
            learnt = k, request.num_sent, request.rank(k, token), request.confidences(k)
            if request.await_drafts(missed.tokens, missed.num_drafts):
                statistics.add(*learnt)
                self._cache.close_branches(missed.slot)
                self._blocks.blocks_came_free()
        if missed.slot not in self._requests or (request is not None and not self._can_answer(request)):
            self._cache.decline(Outcome(missed.slot, missed.epoch, missed.round, k, token))

    def _can_answer(self, request: DraftRequest) -> bool:
        """Whether drafts that the target waits for can come soon: not while a prompt is to be computed."""
        return not self._blocks.waits(request) and request.num_uncomputed <= self._num_drafts + 1

    def _apply_outcome(self, outcome: RoundOutcome) -> None:
        request = self._asked_about(outcome)
        if request is None:
            return
        if request.awaited is None:  # else it was counted then
            k, token = len(outcome.tokens) - 1, outcome.tokens[-1]
            rank, confidences = request.rank(k, token), request.confidences(k)
            num_verified = min(outcome.num_verified, request.num_sent)
            self._statistics(request).add(k, num_verified, rank, confidences)
        adopted = request.apply_outcome(outcome)
        if adopted is not None:
            self._counters.add("adopted")
            if adopted.distributions and self._distributions is not None:
                self._distributions.publish(request.slot, request.epoch, request.round, adopted.distributions)
        self._blocks.blocks_came_free()

    def _asked_about(self, row: MissedRow | RoundOutcome) -> DraftRequest | None:
        """The request, unless the message is of an epoch or round that is over."""
        request = self._requests.get(row.slot)
        if request is None or (request.epoch, request.round) != (row.epoch, row.round):
            return None
        return request

    def _statistics(self, request: DraftRequest) -> OutcomeStatistics:
        """Those of rounds like the request's present one."""
        return self._measured.of(request.verifies_branch, request.sampling.temperature)

    def _predict(self, work: Work) -> Predictions:
        """Run the step; the same branches as in the last one only advance."""
        groups = [group for _, group in work.groups]
        advances = not work.trunk_rows and groups == self._advancing
        self._advancing = [] if work.trunk_rows else groups
        if advances:
            return self._engine.advance()
        return self._engine.forward(build_rows(work.trunk_rows, work.groups, self._configure.branch_budget))

    def _read_candidates(self) -> None:
        """Those of all positions that are about to be forked, at once."""
        wanted = [
            (request, k) for request in self._requests.values() if request.can_fork for k in request.unread
        ]
        if not wanted:
            return
        self._at_work = {request.slot: request for request, _ in wanted}.values()
        places = [request.unread.pop(k) for request, k in wanted]
        found = self._engine.likeliest(places, self._num_candidates)
        for index, (request, k) in enumerate(wanted):
            request.candidates[k] = found[index]

    def _fork(self) -> None:
        self._read_candidates()
        copies = BlockCopies()
        budget = self._branch_budget()
        share = 0
        forked = []
        for request in self._requests.values():
            self._at_work = [request]
            if self._blocks.is_starved(request):
                continue
            if request.awaited is not None and request.can_fork_awaited:
                branches = {request.awaited.k: [request.awaited.token]}
            elif request.can_fork:
                branches = choose_branches(request, self._statistics(request), self._configure, budget)
            else:
                continue
            share = share or self._blocks.share_of_branches()
            group = self._blocks.fork(request, branches, share, copies)
            if group is None:
                continue
            forked.append(request)
            self._counters.add("branches", len(group))
            self._cache.open_branches(
                request.slot, group.first_entry, request.epoch, request.round, group.ks, group.chains[:, 0]
            )
        self._at_work = forked
        if copies.sources:
            self._engine.copy_blocks(np.array(copies.sources), np.array(copies.targets))

    def _branch_budget(self) -> int:
        """Branches per request, such that all requests' branches fit in one step's rows."""
        share = self._configure.max_rows // max(1, len(self._requests))
        return min(self._budget, max(1, share))

    def _reserve(self) -> None:
        """Blocks for what all trunks lack, before branches take any."""
        for request in self._requests.values():
            self._at_work = [request]
            self._blocks.reserve(request)

    def _trunk_rows(self, requests: list[DraftRequest]) -> list[TrunkRow]:
        """The shortest stretches first: a long prompt is not to hold up what others lack for a round."""
        rows: list[TrunkRow] = []
        room = self._configure.prefill_chunk
        for request in sorted(requests, key=lambda request: request.num_uncomputed):
            num_tokens = min(request.num_uncomputed, room)
            if num_tokens and not self._blocks.waits(request):
                room -= num_tokens
                rows.append(TrunkRow(request, num_tokens))
        return rows

    def _groups(self, requests: list[DraftRequest], below: int) -> list[tuple[DraftRequest, BranchGroup]]:
        """Groups with fewer than `below` steps behind them, as many as rows allow.

        The least advanced come first, and among them those that have waited longest.
        """
        waiting = [
            (request, group) for request in requests for group in request.groups if group.steps < below
        ]
        room = self._configure.max_rows
        if sum(len(group) for _, group in waiting) <= room:
            return waiting
        chosen = []
        for request, group in sorted(waiting, key=lambda pair: (pair[1].steps, pair[0].last_served)):
            if len(group) <= room:
                chosen.append((request, group))
                room -= len(group)
        return chosen

    def _publish(self, work: Work, predictions: Predictions) -> None:
        """Note what the step said of trunks, and put the drafts of branches into the outcome cache."""
        place = 0
        for row in work.trunk_rows:
            for k in row.lengths:
                row.request.unread[k] = Place(predictions, place)
                place += 1
            row.request.computed(row.num_tokens)
        for request, group in work.groups:
            request.last_served = self._counters["steps"]
            tokens = group.advance(predictions, place)
            place += len(group)
            if group.steps <= self._num_drafts:
                self._cache.publish(request.slot, group.first_entry, group.steps - 1, tokens)
