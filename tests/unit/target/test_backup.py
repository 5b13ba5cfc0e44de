"""Drafts of missed rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ssd.compat import match_ngram
from vllm_ssd.link.messages import Missed, MissedRow, ToDraft
from vllm_ssd.link.outcome_cache import NOT_INTRODUCED, Outcome, OutcomeCache
from vllm_ssd.plan import costs as costs_module
from vllm_ssd.plan.costs import DRAFT, NGRAM, Costs
from vllm_ssd.target import backup as backup_module
from vllm_ssd.target import draft_link
from vllm_ssd.target.backup import (
    MIN_NGRAM,
    MOST_SILENCE_S,
    SILENCE_S,
    TRY_OTHER_EVERY,
    AutoBackup,
    JustInTimeBackup,
    MissedOutcome,
    NgramBackup,
    NoBackup,
)
from vllm_ssd.target.live import NOTHING, Drafts

K, SLOTS, VOCAB = 4, 3, 1000


class LinkedDraft:
    """A draft process that publishes one token for each missed row whenever the target naps."""

    step_seconds = 0.001

    def __init__(self) -> None:
        self.cache: OutcomeCache | None = OutcomeCache(SLOTS, 8, K, VOCAB)
        self.asked: list[MissedRow] = []
        self.naps = 0
        self.most = K  # tokens it makes
        self.declines: set[int] = set()  # slots

    def send(self, message: ToDraft) -> bool:
        assert isinstance(message, Missed)
        self.asked = message.rows
        assert self.cache is not None
        for row in self.asked:
            if row.slot in self.declines:
                outcome = Outcome(row.slot, row.epoch, row.round, len(row.tokens) - 1, row.tokens[-1])
                self.cache.decline(outcome)
                continue
            key = np.array([len(row.tokens) - 1]), np.array([row.tokens[-1]])
            self.cache.open_branches(row.slot, 0, row.epoch, row.round, *key)
        return True

    def nap(self) -> None:
        if self.naps < self.most and self.cache is not None:
            for row in self.asked:
                if row.slot in self.declines:
                    continue
                self.cache.publish(row.slot, 0, self.naps, np.array([10 * row.slot + self.naps]))
        self.naps += 1


class Clock:
    """Stands for the module's `time`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.draft: LinkedDraft | None = None

    def perf_counter(self) -> float:
        return self.now

    def perf_counter_ns(self) -> int:
        return int(self.now * 1e9)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.draft is not None:
            self.draft.nap()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(backup_module, "time", clock)
    monkeypatch.setattr(draft_link, "time", clock)
    monkeypatch.setattr(costs_module, "time", clock)
    return clock


@pytest.fixture
def draft(clock: Clock) -> LinkedDraft:
    clock.draft = LinkedDraft()
    return clock.draft


def just_in_time(costs: Costs) -> JustInTimeBackup:
    return JustInTimeBackup(costs, lambda nanoseconds: None)


def missed(*slots: int) -> list[MissedOutcome]:
    return [MissedOutcome(str(slot), Outcome(slot, 5, 2, 1, 60 + slot), [50, 60 + slot]) for slot in slots]


def measured(clock: Clock, round_s: float, tokens: int, acceptance: float, ngram: float) -> Costs:
    """What a run of such rounds teaches."""
    costs = Costs()
    for i in range(400):
        clock.now += round_s
        costs.add_round(tokens)
        costs.add_row(NGRAM, K, int(ngram * (i + 1)) - int(ngram * i))
        costs.add_row(DRAFT, 1, int(acceptance * (i + 1)) - int(acceptance * i))
    return costs


def ngram(max_model_len: int = 1000, **history: list[int]) -> NgramBackup:
    return NgramBackup(match_ngram, lambda name: history[name], max_model_len)


def found(tokens: list[int], num_drafts: int, max_model_len: int = 1000) -> list[int]:
    (drafts,) = ngram(max_model_len, a=tokens).propose(
        [MissedOutcome("a", Outcome(0, 1, 0, 0, tokens[-1]), tokens[-1:])],
        num_drafts,
        None,  # type: ignore[arg-type]  # asks no draft
    )
    assert drafts.kind == NGRAM
    return drafts.tokens


def test_none_proposes_nothing(draft: LinkedDraft) -> None:
    assert NoBackup().propose(missed(0, 1), K, draft) == [NOTHING, NOTHING]


def test_ngram_continues_the_last_few_tokens_as_before() -> None:
    assert found([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 2) == [4, 5]
    assert found([1, 2, 3, 4, 1, 2, 3], 9)[:4] == [4, 1, 2, 3]
    assert found([1, 2, 3, 4, 5, 6], 2) == []
    assert found([1], 2) == []


def test_ngram_stays_within_the_targets_length() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    assert len(found(tokens, 4, len(tokens) + 1)) <= 1


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=40), count=st.integers(1, 7))
def test_ngram_proposes_what_followed_an_earlier_match(tokens: list[int], count: int) -> None:
    drafts = found(tokens, count)
    assert len(drafts) <= count
    if drafts:
        pattern = tokens[-MIN_NGRAM:] + drafts
        places = range(len(tokens) - len(pattern) + 1)
        assert any(tokens[start : start + len(pattern)] == pattern for start in places)


def test_just_in_time_waits_for_the_missed_rows_alone(draft: LinkedDraft, clock: Clock) -> None:
    costs = measured(clock, round_s=0.1, tokens=3, acceptance=0.9, ngram=0.0)
    drafts = just_in_time(costs).propose(missed(0, 2), K, draft)
    length = draft.asked[0].num_drafts
    assert length == K  # a round is long and steps are short
    assert draft.asked == [MissedRow(0, 5, 2, [50, 60], K), MissedRow(2, 5, 2, [50, 62], K)]
    assert drafts == [Drafts(DRAFT, [0, 1, 2, 3]), Drafts(DRAFT, [20, 21, 22, 23])]
    assert draft.naps == K


def test_just_in_time_asks_for_no_more_than_is_planned(draft: LinkedDraft, clock: Clock) -> None:
    costs = measured(clock, round_s=0.1, tokens=3, acceptance=0.9, ngram=0.0)
    assert just_in_time(costs).propose(missed(0), 2, draft) == [Drafts(DRAFT, [0, 1])]
    assert draft.asked[0].num_drafts == 2
    assert draft.naps == 2


def test_just_in_time_takes_what_there_is_at_the_deadline(draft: LinkedDraft, clock: Clock) -> None:
    costs = measured(clock, round_s=0.1, tokens=3, acceptance=0.9, ngram=0.0)
    draft.most, began = 1, clock.now
    assert just_in_time(costs).propose(missed(1), K, draft) == [Drafts(DRAFT, [10])]
    assert clock.now - began < 2 * backup_module.PATIENCE * (K + 1) * draft.step_seconds


def test_a_draft_that_does_not_answer_is_left_alone_for_longer_and_longer(
    draft: LinkedDraft, clock: Clock
) -> None:
    """Each wait in vain costs the whole batch time: their sum is bounded."""
    costs = measured(clock, round_s=0.1, tokens=3, acceptance=0.9, ngram=0.0)
    backup = just_in_time(costs)
    draft.most = 0
    began, waited = clock.now, 0.0
    while clock.now - began < 1000:
        before = clock.now
        assert backup.propose(missed(1, 2), K, draft) == [NOTHING] * 2
        waited += clock.now - before
        clock.now += 0.1
    assert waited < 0.005 * 1000
    clock.now += MOST_SILENCE_S
    draft.most, draft.naps = K, 0
    assert backup.propose(missed(1), K, draft) == [Drafts(DRAFT, [10, 11, 12, 13])]
    draft.most, draft.naps = 0, 0
    backup.propose(missed(1), K, draft)
    clock.now += SILENCE_S
    assert backup.askable(missed(1), draft)


def test_rows_that_the_draft_declines_are_not_waited_for(draft: LinkedDraft, clock: Clock) -> None:
    costs = measured(clock, round_s=0.1, tokens=3, acceptance=0.9, ngram=0.0)
    backup = just_in_time(costs)
    draft.declines = {1}
    began = clock.now
    assert backup.propose(missed(1, 2), K, draft) == [NOTHING, Drafts(DRAFT, [20, 21, 22, 23])]
    assert clock.now - began <= (K + 1) * draft.step_seconds
    draft.asked.clear()
    assert backup.propose(missed(1), K, draft) == [NOTHING]
    assert backup.askable(missed(1), draft)  # an answer is an answer


def test_rows_that_the_draft_does_not_know_are_not_asked_for(draft: LinkedDraft, clock: Clock) -> None:
    """Such as too long ones."""
    costs = measured(clock, round_s=0.1, tokens=3, acceptance=0.9, ngram=0.0)
    unknown = MissedOutcome("1", Outcome(1, NOT_INTRODUCED, 2, 1, 61), [50, 61])
    assert just_in_time(costs).propose([unknown], K, draft) == [NOTHING]
    assert draft.asked == []


def test_auto_gives_ngrams_to_rows_that_the_draft_has_nothing_for(draft: LinkedDraft, clock: Clock) -> None:
    costs = measured(clock, round_s=0.1, tokens=3, acceptance=0.9, ngram=0.0)
    history = [1, 2, 3, 4, 1, 2, 3]
    auto = AutoBackup(costs, ngram(**{"1": history, "2": history}), just_in_time(costs))
    draft.most = 0
    assert auto.propose(missed(1), K, draft) == [Drafts(NGRAM, [4, 1, 2, 3])]
    began = clock.now
    assert auto.propose(missed(1), K, draft) == [Drafts(NGRAM, [4, 1, 2, 3])]
    assert clock.now == began
    clock.now += SILENCE_S
    draft.most, draft.naps, draft.declines = K, 0, {1}
    found = auto.propose(missed(1, 2), K, draft)
    assert found == [Drafts(NGRAM, [4, 1, 2, 3]), Drafts(DRAFT, [20, 21, 22, 23])]


def test_nobody_waits_before_a_step_was_measured(draft: LinkedDraft, clock: Clock) -> None:
    draft.step_seconds = 0.0
    assert just_in_time(Costs()).propose(missed(0), K, draft) == [NOTHING]
    assert draft.asked == []


def test_just_in_time_without_a_draft(draft: LinkedDraft, clock: Clock) -> None:
    draft.cache = None
    assert just_in_time(Costs()).propose(missed(0), K, draft) == [NOTHING]
    assert clock.now == 0.0


@pytest.mark.parametrize(
    ("acceptance", "step_s", "num_missed", "longest", "shortest"),
    [
        (0.9, 0.0005, 1, K, 3),
        (0.9, 0.5, 1, 0, 0),
        (0.05, 0.004, 1, 0, 0),
        (0.8, 0.004, 1, 2, 0),
        (0.8, 0.004, 8, K, 2),
    ],
)
def test_the_length_that_pays(
    clock: Clock, acceptance: float, step_s: float, num_missed: int, longest: int, shortest: int
) -> None:
    costs = measured(clock, round_s=0.02, tokens=8, acceptance=acceptance, ngram=0.0)
    assert shortest <= just_in_time(costs).best_length(num_missed, K, step_s)[0] <= longest


@pytest.mark.parametrize(
    ("ngram_accepted", "step_s", "kind"), [(0.0, 0.0005, DRAFT), (3.0, 0.0005, NGRAM), (0.0, 0.5, NGRAM)]
)
def test_auto_takes_what_is_measured_to_pay(
    draft: LinkedDraft, clock: Clock, ngram_accepted: float, step_s: float, kind: str
) -> None:
    costs = measured(clock, round_s=0.02, tokens=4, acceptance=0.8, ngram=ngram_accepted)
    draft.step_seconds = step_s
    auto = AutoBackup(costs, ngram(**{"0": [1, 2, 3, 4, 1, 2, 3]}), just_in_time(costs))
    kinds = []
    for _ in range(TRY_OTHER_EVERY):
        draft.naps = 0
        kinds.append(auto.propose(missed(0), K, draft)[0].kind)
    assert set(kinds[:-1]) == {kind}
    assert kinds[-1] != kind  # now and then the other, to continue measuring it
    draft.cache = None
    assert auto.propose(missed(0), K, draft)[0].kind == NGRAM


def test_a_pause_is_no_long_round(clock: Clock) -> None:
    costs = measured(clock, round_s=0.02, tokens=4, acceptance=0.8, ngram=0.0)
    before = costs.speed(0.0, 0.0)
    clock.now += 3600
    costs.add_round(4)
    assert costs.speed(0.0, 0.0) > 0.8 * before
