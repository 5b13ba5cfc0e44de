"""The target's half of a round: outcomes in, drafts out. Knows no model runner.

One round, one path: look the outcomes up, give missed rows their fallback, tell the draft both the outcome
and what is verified next. Nothing here waits for the draft unless the user set a deadline for it, and
without a draft every row simply goes on with its fallback.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vllm_ssd.channel import Outcomes, RoundOutcome, Sampling, Start, Stop, ToDraft
from vllm_ssd.counters import Counters
from vllm_ssd.fallback import Fallback
from vllm_ssd.outcome import Outcome, OutcomeCache

POLL_S = 50e-6
GREEDY = Sampling()


class DraftLink(Protocol):
    """The proposer's view of the draft process."""

    @property
    def cache(self) -> OutcomeCache | None:
        """The outcome cache of the draft that is ready now, or None."""
        ...

    def check(self) -> bool:
        """Notice what happened to the draft; True when it has become ready and knows no request yet."""
        ...

    def send(self, message: ToDraft) -> None:
        """Tell the draft; a draft that cannot be told is no longer ready."""
        ...


@dataclass
class LiveRequest:
    """A request that the target is working on."""

    slot: int
    sampling: Sampling
    epoch: int = 0
    round: int = 0


class Proposer:
    """Keeps the requests in slots and answers each target step with drafts.

    Args:
        link: the draft process, or what is left of it.
        num_speculative_tokens: K.
        max_slots: requests at once.
        fallback: drafts for missed rows.
        history: a request's tokens so far, prompt and output.
        counters: the target's counters (`vllm_ssd.counters.target_fields`).
        wait_s: how long a round may wait for foreseen outcomes to reach depth K, in seconds.
    """

    def __init__(
        self,
        link: DraftLink,
        num_speculative_tokens: int,
        max_slots: int,
        fallback: Fallback,
        history: Callable[[str], list[int]],
        counters: Counters,
        wait_s: float = 0.0,
    ) -> None:
        self._link = link
        self._num_drafts = num_speculative_tokens
        self._fallback = fallback
        self._history = history
        self._counters = counters
        self._wait_s = wait_s
        self._live: dict[str, LiveRequest] = {}
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._last_epoch = 0

    def start(self, request_id: str, tokens: list[int], sampling: Sampling = GREEDY) -> None:
        """A request enters the batch, for the first time or after a preemption, with its tokens so far.

        Its drafts are those tokens that the target will most likely take when it samples as `sampling` says.
        """
        request = self._live[request_id] = LiveRequest(self._free_slots.pop(), sampling)
        if self._link.cache is not None:
            self._introduce(request, tokens)

    def stop(self, request_id: str) -> None:
        """A request leaves the batch: finished, aborted or preempted. Unknown ids are ignored."""
        request = self._live.pop(request_id, None)
        if request is None:
            return
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
            drafts: list[list[int]] = [[] for _ in request_ids]  # the draft has only just heard of them
        else:
            drafts = self._propose(request_ids, sampled)
        self._counters.add("rounds")
        self._counters.add("critical_path_ns", time.perf_counter_ns() - began)
        return drafts

    def _propose(self, request_ids: Sequence[str], sampled: Sequence[list[int]]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in request_ids]
        rows = [i for i, tokens in enumerate(sampled) if tokens and request_ids[i] in self._live]
        cache = self._link.cache
        if cache is None:
            for i in rows:
                drafts[i] = self._fall_back(request_ids[i])
            self._counters.add("undrafted", len(rows))
            return drafts

        requests = [self._live[request_ids[i]] for i in rows]
        outcomes = [
            Outcome(request.slot, request.epoch, request.round, len(sampled[i]) - 1, sampled[i][-1])
            for request, i in zip(requests, rows, strict=True)
        ]
        found = self._look_up(cache, outcomes)
        messages = []
        for i, request, outcome, served in zip(rows, requests, outcomes, found, strict=True):
            drafts[i] = self._fall_back(request_ids[i]) if served is None else served
            self._count(outcome, served)
            messages.append(RoundOutcome(outcome.slot, outcome.epoch, outcome.round, sampled[i], drafts[i]))
            request.round += 1
        if messages:
            self._link.send(Outcomes(messages))
        return drafts

    def _look_up(self, cache: OutcomeCache, outcomes: list[Outcome]) -> list[list[int] | None]:
        found = cache.look_up(outcomes)
        if not self._wait_s:
            return found
        began = time.perf_counter()
        while time.perf_counter() - began < self._wait_s and any(
            drafts is not None and len(drafts) < self._num_drafts for drafts in found
        ):
            time.sleep(POLL_S)
            found = cache.look_up(outcomes)
        self._counters.add("wait_ns", int((time.perf_counter() - began) * 1e9))
        return found

    def _fall_back(self, request_id: str) -> list[int]:
        self._counters.add(f"fallback_{self._fallback.name}")
        return self._fallback.propose(self._history(request_id), self._num_drafts)

    def _count(self, outcome: Outcome, served: list[int] | None) -> None:
        self._counters.add("lookups")
        self._counters.add(f"lookups_k{outcome.k}")
        if served:
            self._counters.add("hits")
            self._counters.add(f"hits_k{outcome.k}")
            self._counters.add("drafts_served", len(served))
        elif served is not None:
            self._counters.add("late")

    def _introduce_all(self) -> None:
        for request_id, request in self._live.items():
            self._introduce(request, self._history(request_id))

    def _introduce(self, request: LiveRequest, tokens: list[int]) -> None:
        self._last_epoch += 1
        request.epoch, request.round = self._last_epoch, 0
        packed = np.array(tokens, dtype="<i4").tobytes()
        self._link.send(Start(request.slot, request.epoch, packed, request.sampling))
