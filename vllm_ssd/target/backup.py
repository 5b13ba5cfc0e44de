"""What a row gets whose outcome was not foreseen: nothing, n-gram drafts, or just-in-time ones of the draft.

Nothing costs no time, and n-grams hardly any, but for very long requests. Just-in-time drafts cost the whole
batch the draft's steps, and are worth it where few rows wait for many; `vllm_ssd.plan.costs` has what that
depends on, as measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_ssd.link.messages import Missed, MissedRow, ToDraft
from vllm_ssd.link.outcome_cache import NOT_INTRODUCED, Outcome, OutcomeCache
from vllm_ssd.plan.costs import DRAFT, NGRAM, NONE, Costs

MIN_NGRAM, MAX_NGRAM = 3, 5
POLL_S = 50e-6
PATIENCE = 4  # times as long as the draft's steps take on average
MOST_PATIENCE_S = 0.25
SILENCE_S = 1.0  # in which nobody is asked for after a wait in vain; twice as long after each further one
MOST_SILENCE_S = 60.0
TRY_OTHER_EVERY = 32  # misses, after which `auto` tries what it did not choose, to go on measuring it

Matcher = Callable[[npt.NDArray[np.int32], int, int, int, int], list[int]]


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
        """What a step of the draft without prompts took of late, 0 before the first."""
        ...

    def send(self, message: ToDraft) -> bool:
        """Tell the draft; False if it cannot be told."""
        ...


class Fallback(Protocol):
    """Drafts for the missed rows of one step."""

    def propose(self, missed: Sequence[MissedOutcome], num_drafts: int, draft: DraftAccess) -> list[Drafts]:
        """At most so many drafts for each row; a row for which there are none goes on without."""
        ...


class NoFallback:
    """Missed rows take one exact autoregressive step."""

    def propose(self, missed: Sequence[MissedOutcome], num_drafts: int, draft: DraftAccess) -> list[Drafts]:
        return [NOTHING] * len(missed)


class NgramFallback:
    """What followed the longest earlier occurrence of the last few tokens (prompt lookup).

    Args:
        match: (tokens, shortest n, longest n, max_model_len, number of drafts) -> drafts.
        history: a request's tokens so far, prompt and output.
        max_model_len: the target's.
    """

    def __init__(self, match: Matcher, history: Callable[[str], list[int]], max_model_len: int) -> None:
        self._match = match
        self._history = history
        self._max_model_len = max_model_len

    def propose(self, missed: Sequence[MissedOutcome], num_drafts: int, draft: DraftAccess) -> list[Drafts]:
        return [Drafts(NGRAM, self._find(row.request_id, num_drafts)) for row in missed]

    def _find(self, request_id: str, num_drafts: int) -> list[int]:
        history = np.array(self._history(request_id), dtype=np.int32)
        return self._match(history, MIN_NGRAM, MAX_NGRAM, self._max_model_len, num_drafts)


class JustInTimeFallback:
    """The target waits while the draft drafts for the missed rows alone, as many tokens as pay.

    Args:
        costs: as measured so far.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._silence_s = SILENCE_S
        self._silent_until = 0.0

    def propose(self, missed: Sequence[MissedOutcome], num_drafts: int, draft: DraftAccess) -> list[Drafts]:
        num_askable = len(self.askable(missed, draft))
        length, _ = self.best_length(num_askable, num_drafts, draft.step_seconds)
        return self.draft(missed, draft, max(1, length))

    def askable(self, missed: Sequence[MissedOutcome], draft: DraftAccess) -> list[MissedOutcome]:
        """The rows that the draft may have drafts for."""
        if draft.cache is None or not draft.step_seconds or time.perf_counter() < self._silent_until:
            return []
        return [row for row in missed if row.outcome.epoch != NOT_INTRODUCED]

    def best_length(self, num_missed: int, num_drafts: int, step_seconds: float) -> tuple[int, float]:
        """The number of drafts that makes the batch fastest, and how fast: 0 where waiting never pays.

        The first step may still have to compute what the branches lacked, so n drafts take n + 1 steps.
        """
        a = self._costs.acceptance.value
        best, best_speed, more_tokens = 0, self._costs.speed(0.0, 0.0), 0.0
        for length in range(1, num_drafts + 1):
            more_tokens += num_missed * a**length
            speed = self._costs.speed(more_tokens, (length + 1) * step_seconds)
            if speed > best_speed:
                best, best_speed = length, speed
        return best, best_speed

    def draft(self, missed: Sequence[MissedOutcome], draft: DraftAccess, length: int) -> list[Drafts]:
        """Ask for drafts of this length and wait for them; late rows get the depth reached."""
        asked = self.askable(missed, draft)
        if not asked:
            return [NOTHING] * len(missed)
        rows = [
            MissedRow(row.outcome.slot, row.outcome.epoch, row.outcome.round, row.tokens, length)
            for row in asked
        ]
        draft.send(Missed(rows))
        answers, is_in_vain = _await_depth(draft, [row.outcome for row in asked], length)
        found = {
            row.request_id: drafts[:length] for row, drafts in zip(asked, answers, strict=True) if drafts
        }
        self._remember(is_in_vain)
        return [
            Drafts(DRAFT, found[row.request_id]) if row.request_id in found else NOTHING for row in missed
        ]

    def _remember(self, is_in_vain: bool) -> None:
        """A draft that does not answer, such as in a step over a long prompt, costs the whole batch time."""
        if is_in_vain:
            self._silent_until = time.perf_counter() + self._silence_s
            self._silence_s = min(2 * self._silence_s, MOST_SILENCE_S)
        else:
            self._silence_s = SILENCE_S


def _await_depth(
    draft: DraftAccess, outcomes: list[Outcome], length: int
) -> tuple[list[list[int] | None], bool]:
    """The drafts of each outcome once each has so many or is declined, or what there is when patience ends.

    Returns:
        [n] drafts, and whether some outcome had neither drafts nor a refusal.
    """
    patience = min(PATIENCE * (length + 1) * draft.step_seconds, MOST_PATIENCE_S)
    deadline = time.perf_counter() + patience
    while (cache := draft.cache) is not None:
        found, declined = cache.look_up(outcomes), cache.declined(outcomes)
        answered = [bool(drafts) or no for drafts, no in zip(found, declined, strict=True)]
        if all(no or len(drafts or ()) >= length for drafts, no in zip(found, declined, strict=True)):
            return found, False
        if time.perf_counter() > deadline:
            return found, not all(answered)
        time.sleep(POLL_S)
    return [None] * len(outcomes), False


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

    def propose(self, missed: Sequence[MissedOutcome], num_drafts: int, draft: DraftAccess) -> list[Drafts]:
        num_askable = len(self._just_in_time.askable(missed, draft))
        if not num_askable:
            return self._ngram.propose(missed, num_drafts, draft)
        length, speed = self._just_in_time.best_length(num_askable, num_drafts, draft.step_seconds)
        waits = speed > self._costs.speed(num_askable * self._costs.ngram_accepted.value, 0.0)
        self._num_choices += 1
        if self._num_choices % TRY_OTHER_EVERY == 0:
            waits = not waits
        if not waits:
            return self._ngram.propose(missed, num_drafts, draft)
        drafts = self._just_in_time.draft(missed, draft, max(1, length))
        without = iter(
            self._ngram.propose(
                [row for row, found in zip(missed, drafts, strict=True) if found is NOTHING],
                num_drafts,
                draft,
            )
        )
        return [next(without) if found is NOTHING else found for found in drafts]
