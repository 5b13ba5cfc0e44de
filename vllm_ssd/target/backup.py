"""What a row gets whose outcome was not predicted: nothing, n-gram drafts, or just-in-time ones of the draft.

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

from vllm_ssd.link.messages import Missed, MissedRow
from vllm_ssd.link.outcome_cache import NOT_INTRODUCED, Outcome
from vllm_ssd.plan.costs import DRAFT, NGRAM, Costs
from vllm_ssd.target.draft_link import DraftLink, poll_until
from vllm_ssd.target.live import NOTHING, Drafts

MIN_NGRAM, MAX_NGRAM = 3, 5
PATIENCE = 4  # times as long as the draft's steps take on average
MOST_PATIENCE_S = 0.25
SILENCE_S = 1.0  # in which nobody is asked for after a wait in vain; twice as long after each further one
MOST_SILENCE_S = 60.0
TRY_OTHER_EVERY = 32  # misses, after which `auto` tries what it did not choose, to continue measuring it

Matcher = Callable[[npt.NDArray[np.int32], int, int, int, int], list[int]]


@dataclass(frozen=True)
class MissedOutcome:
    """One row's outcome that was not predicted."""

    request_id: str
    outcome: Outcome
    tokens: list[int]  # the accepted drafts, then the recovery or bonus token


class Backup(Protocol):
    """Drafts for the missed rows of one step."""

    def propose(self, missed: Sequence[MissedOutcome], num_drafts: int, draft: DraftLink) -> list[Drafts]:
        """At most so many drafts for each row; a row for which there are none continues without."""
        ...


class NoBackup:
    """Missed rows take one exact autoregressive step."""

    def propose(self, missed: Sequence[MissedOutcome], num_drafts: int, draft: DraftLink) -> list[Drafts]:
        return [NOTHING] * len(missed)


class NgramBackup:
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

    def propose(self, missed: Sequence[MissedOutcome], num_drafts: int, draft: DraftLink) -> list[Drafts]:
        return [Drafts(NGRAM, self._find(row.request_id, num_drafts)) for row in missed]

    def _find(self, request_id: str, num_drafts: int) -> list[int]:
        history = np.array(self._history(request_id), dtype=np.int32)
        return self._match(history, MIN_NGRAM, MAX_NGRAM, self._max_model_len, num_drafts)


class JustInTimeBackup:
    """The target waits while the draft drafts for the missed rows alone, as many tokens as pay.

    Args:
        costs: as measured so far.
        add_wait: is told how many nanoseconds the target waited.
    """

    def __init__(self, costs: Costs, add_wait: Callable[[int], None]) -> None:
        self._costs = costs
        self._add_wait = add_wait
        self._silence_s = SILENCE_S
        self._silent_until = 0.0

    def propose(self, missed: Sequence[MissedOutcome], num_drafts: int, draft: DraftLink) -> list[Drafts]:
        num_askable = len(self.askable(missed, draft))
        length, _ = self.best_length(num_askable, num_drafts, draft.step_seconds)
        return self.draft(missed, draft, max(1, length))

    def askable(self, missed: Sequence[MissedOutcome], draft: DraftLink) -> list[MissedOutcome]:
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

    def draft(self, missed: Sequence[MissedOutcome], draft: DraftLink, length: int) -> list[Drafts]:
        """Ask for drafts of this length and wait for them; late rows get the depth reached."""
        asked = self.askable(missed, draft)
        if not asked:
            return [NOTHING] * len(missed)
        rows = [
            MissedRow(row.outcome.slot, row.outcome.epoch, row.outcome.round, row.tokens, length)
            for row in asked
        ]
        draft.send(Missed(rows))
        answers, is_in_vain, waited = _await_depth(draft, [row.outcome for row in asked], length)
        self._add_wait(waited)
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
    draft: DraftLink, outcomes: list[Outcome], length: int
) -> tuple[list[list[int] | None], bool, int]:
    """The drafts of each outcome once each has so many or is declined, or what there is when patience ends.

    Returns:
        [n] drafts; whether some outcome had neither drafts nor a refusal; and the nanoseconds waited.
    """
    found: list[list[int] | None] = [None] * len(outcomes)
    declined = [False] * len(outcomes)

    def is_answered() -> bool:
        nonlocal found, declined
        if (cache := draft.cache) is None:
            found, declined = [None] * len(outcomes), [True] * len(outcomes)
        else:
            found, declined = cache.look_up(outcomes), cache.declined(outcomes)
        return all(no or len(drafts or ()) >= length for drafts, no in zip(found, declined, strict=True))

    waited = poll_until(is_answered, min(PATIENCE * (length + 1) * draft.step_seconds, MOST_PATIENCE_S))
    is_in_vain = any(not drafts and not no for drafts, no in zip(found, declined, strict=True))
    return found, is_in_vain, waited


class AutoBackup:
    """Whichever of the others makes the batch fastest, by what was measured.

    Args:
        costs: as measured so far.
        ngram, just_in_time: the others.
    """

    def __init__(self, costs: Costs, ngram: NgramBackup, just_in_time: JustInTimeBackup) -> None:
        self._costs = costs
        self._ngram = ngram
        self._just_in_time = just_in_time
        self._num_choices = 0

    def propose(self, missed: Sequence[MissedOutcome], num_drafts: int, draft: DraftLink) -> list[Drafts]:
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
