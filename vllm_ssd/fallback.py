"""What a row gets whose outcome was not foreseen: nothing, n-gram drafts, or just-in-time ones of the draft.

Nothing and n-grams cost no time. Just-in-time drafts cost the whole batch the draft's steps, and are worth it
where few rows wait for many; `Costs` has what that depends on, as measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_ssd.channel import Missed, MissedRow, ToDraft
from vllm_ssd.outcome import Outcome, OutcomeCache

MIN_NGRAM, MAX_NGRAM = 3, 5
POLL_S = 50e-6
PATIENCE = 4  # times as long as the draft's steps take on average
FADING = 0.95  # weight of a round in running means, one round later
MOST_UNANSWERED = 1024  # requests remembered
TRY_OTHER_EVERY = 32  # misses, after which `auto` tries what it did not choose, to go on measuring it

Matcher = Callable[[npt.NDArray[np.int32], int, int, int, int], list[int]]
NONE, NGRAM, DRAFT = "none", "ngram", "draft"


@dataclass(frozen=True)
class MissedOutcome:
    """One row's outcome that was not foreseen."""

    request_id: str
    outcome: Outcome
    tokens: list[int]  # the accepted drafts, then the recovery or bonus token


@dataclass(frozen=True)
class Drafts:
    """What a row verifies next, and where it came from."""

    kind: str  # NONE, NGRAM or DRAFT
    tokens: list[int]


NOTHING = Drafts(NONE, [])


class DraftAccess(Protocol):
    """The draft process, as far as a fallback needs it."""

    @property
    def cache(self) -> OutcomeCache | None:
        """The outcome cache of the draft that is ready now, or None."""
        ...

    @property
    def step_seconds(self) -> float:
        """What a step of the draft takes on average."""
        ...

    def send(self, message: ToDraft) -> None:
        """Tell the draft; a draft that cannot be told is no longer ready."""
        ...


class Fallback(Protocol):
    """Drafts for the missed rows of one step."""

    def propose(self, missed: Sequence[MissedOutcome], draft: DraftAccess) -> list[Drafts]:
        """Drafts for each row; a row for which there are none goes on without."""
        ...


class RunningMean:
    """A mean in which old values fade."""

    def __init__(self, prior: float) -> None:
        self._sum, self._weight = prior, 1.0

    def add(self, value: float) -> None:
        self._sum = FADING * self._sum + value
        self._weight = FADING * self._weight + 1.0

    @property
    def value(self) -> float:
        return self._sum / self._weight


class Costs:
    """What a round yields and takes, measured as the rounds go by."""

    def __init__(self) -> None:
        self.tokens_per_round = RunningMean(1.0)  # of the whole batch
        self.seconds_per_round = RunningMean(0.01)
        self.ngram_accepted = RunningMean(1.0)  # drafts of a row that fell back on n-grams
        self.acceptance = RunningMean(0.7)  # of the draft model's tokens, each
        self._last_round = time.perf_counter()

    def add_round(self, num_tokens: int) -> None:
        """A round has ended, with so many new tokens."""
        now = time.perf_counter()
        # A pause without requests is no long round.
        seconds = min(now - self._last_round, 4 * self.seconds_per_round.value)
        self.seconds_per_round.add(seconds)
        self.tokens_per_round.add(num_tokens)
        self._last_round = now

    def add_row(self, kind: str, num_drafts: int, num_accepted: int) -> None:
        """A row whose drafts were of this kind has been verified."""
        if kind == NGRAM:
            self.ngram_accepted.add(num_accepted)
        elif kind == DRAFT:
            for i in range(min(num_accepted + 1, num_drafts)):
                self.acceptance.add(float(i < num_accepted))

    def speed(self, more_tokens: float, more_seconds: float) -> float:
        """Tokens per second of a round that yields and takes so much more than the usual one."""
        return (self.tokens_per_round.value + more_tokens) / (self.seconds_per_round.value + more_seconds)


class NoFallback:
    """Missed rows take one exact autoregressive step."""

    def propose(self, missed: Sequence[MissedOutcome], draft: DraftAccess) -> list[Drafts]:
        return [NOTHING] * len(missed)


class NgramFallback:
    """What followed the longest earlier occurrence of the last few tokens (prompt lookup).

    Args:
        match: (tokens, shortest n, longest n, max_model_len, number of drafts) -> drafts.
        history: a request's tokens so far, prompt and output.
        max_model_len: the target's.
        num_drafts: K.
    """

    def __init__(
        self, match: Matcher, history: Callable[[str], list[int]], max_model_len: int, num_drafts: int
    ) -> None:
        self._match = match
        self._history = history
        self._max_model_len = max_model_len
        self._num_drafts = num_drafts

    def propose(self, missed: Sequence[MissedOutcome], draft: DraftAccess) -> list[Drafts]:
        return [Drafts(NGRAM, self._find(row.request_id)) for row in missed]

    def _find(self, request_id: str) -> list[int]:
        history = np.array(self._history(request_id), dtype=np.int32)
        return self._match(history, MIN_NGRAM, MAX_NGRAM, self._max_model_len, self._num_drafts)


class JustInTimeFallback:
    """The target waits while the draft drafts for the missed rows alone, as many tokens as pay.

    Args:
        costs: as measured so far.
        num_drafts: K, the most.
    """

    def __init__(self, costs: Costs, num_drafts: int) -> None:
        self._costs = costs
        self._num_drafts = num_drafts
        self._unanswered: set[str] = set()  # requests that the draft cannot serve: too long, or no KV blocks

    def propose(self, missed: Sequence[MissedOutcome], draft: DraftAccess) -> list[Drafts]:
        if draft.cache is None:
            return [NOTHING] * len(missed)
        return self.draft(missed, draft, max(1, self.best_length(len(missed), draft.step_seconds)[0]))

    def best_length(self, num_missed: int, step_seconds: float) -> tuple[int, float]:
        """The number of drafts that makes the batch fastest, and how fast: 0 where waiting never pays.

        The first step may still have to compute what the branches lacked, so n drafts take n + 1 steps.
        """
        a = self._costs.acceptance.value
        best, best_speed, more_tokens = 0, self._costs.speed(0.0, 0.0), 0.0
        for length in range(1, self._num_drafts + 1):
            more_tokens += num_missed * a**length
            speed = self._costs.speed(more_tokens, (length + 1) * step_seconds)
            if speed > best_speed:
                best, best_speed = length, speed
        return best, best_speed

    def draft(self, missed: Sequence[MissedOutcome], draft: DraftAccess, length: int) -> list[Drafts]:
        """Ask for drafts of this length and wait for them; late rows get the depth reached."""
        asked = [row for row in missed if row.request_id not in self._unanswered]
        found: dict[str, list[int] | None] = {}
        if asked:
            draft.send(
                Missed(
                    [
                        MissedRow(row.outcome.slot, row.outcome.epoch, row.outcome.round, row.tokens, length)
                        for row in asked
                    ]
                )
            )
            answers = _await_depth(draft, [row.outcome for row in asked], length)
            found = {row.request_id: drafts for row, drafts in zip(asked, answers, strict=True)}
            self._remember_unanswered(found)
        return [Drafts(DRAFT, drafts) if (drafts := found.get(row.request_id)) else NOTHING for row in missed]

    def _remember_unanswered(self, found: dict[str, list[int] | None]) -> None:
        """Nobody waits twice for a request that got nothing."""
        if len(self._unanswered) > MOST_UNANSWERED:
            self._unanswered.clear()
        self._unanswered |= {request_id for request_id, drafts in found.items() if not drafts}


def _await_depth(draft: DraftAccess, outcomes: list[Outcome], length: int) -> list[list[int] | None]:
    """The drafts of each outcome once all have so many, or what there is when patience ends."""
    deadline = time.perf_counter() + PATIENCE * (length + 1) * draft.step_seconds
    while draft.cache is not None:
        found = draft.cache.look_up(outcomes)
        if all(drafts is not None and len(drafts) >= length for drafts in found):
            return found
        if time.perf_counter() > deadline:
            return found
        time.sleep(POLL_S)
    return [None] * len(outcomes)


class AutoFallback:
    """Whichever of the others makes the batch fastest, by what was measured.

    Args:
        costs: as measured so far.
        ngram, just_in_time: the others.
    """

    def __init__(self, costs: Costs, ngram: NgramFallback, just_in_time: JustInTimeFallback) -> None:
        self._costs = costs
        self._ngram = ngram
        self._just_in_time = just_in_time
        self._num_choices = 0

    def propose(self, missed: Sequence[MissedOutcome], draft: DraftAccess) -> list[Drafts]:
        if draft.cache is None:
            return self._ngram.propose(missed, draft)
        length, speed = self._just_in_time.best_length(len(missed), draft.step_seconds)
        with_ngram = self._costs.speed(len(missed) * self._costs.ngram_accepted.value, 0.0)
        waits = speed > with_ngram
        self._num_choices += 1
        if self._num_choices % TRY_OTHER_EVERY == 0:
            waits = not waits
        if waits:
            return self._just_in_time.draft(missed, draft, max(1, length))
        return self._ngram.propose(missed, draft)
