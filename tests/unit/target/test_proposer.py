"""The target's half of a round, with a link that records what the draft would be told."""

from __future__ import annotations

import numpy as np
import pytest
from proposals import SLOTS, VOCAB, Bench, K

from vllm_ssd.link.messages import (
    Outcomes,
    RoundOutcome,
    Start,
    Stop,
)
from vllm_ssd.plan.planner import FixedPlan, Plan
from vllm_ssd.target import observer
from vllm_ssd.target.draft_link import News
from vllm_ssd.target.proposer import INTRODUCED_TOKENS


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_start_carries_the_tokens(bench: Bench) -> None:
    first, second = bench.start("a"), bench.start("b")
    assert np.frombuffer(first.tokens, "<i4").tolist() == [1, 2, 3]
    assert first.slot != second.slot
    assert first.epoch != second.epoch


def test_hits_and_misses_in_one_batch(bench: Bench) -> None:
    a, b = bench.start("a"), bench.start("b")
    bench.link.publish(a, 0, 0, 50, [51, 52, 53])
    drafts = bench.proposer.propose(["b", "a"], [[70], [50]])
    assert drafts == [[5, 90, 91], [51, 52, 53]]
    assert bench.outcomes() == [
        RoundOutcome(b.slot, b.epoch, 0, [70], [5, 90, 91], 0),
        RoundOutcome(a.slot, a.epoch, 0, [50], [51, 52, 53], 0),
    ]
    # The next round has its own key, with the accepted length in it.
    bench.link.publish(a, 1, 2, 60, [61])
    assert bench.proposer.propose(["a"], [[51, 52, 60]]) == [[61]]
    counted = bench.counters.as_dict()
    assert counted["rounds"] == 2
    assert (counted["lookups"], counted["hits"], counted["late"]) == (3, 2, 0)
    assert (counted["lookups_k0"], counted["lookups_k2"], counted["hits_k0"], counted["hits_k2"]) == (
        2,
        1,
        1,
        1,
    )
    assert counted["drafts_served"] == 4
    assert counted["backup_ngram"] == 1
    assert counted["undrafted"] == 0
    assert counted["critical_path_ns"] > 0


def test_the_same_outcome_of_another_round_or_length_is_a_miss(bench: Bench) -> None:
    a = bench.start("a")
    bench.link.publish(a, 1, 0, 50, [51])
    bench.link.publish(a, 0, 1, 50, [52])
    assert bench.proposer.propose(["a"], [[50]]) == [[3, 90, 91]]


def test_predicted_but_without_drafts_yet_falls_back(bench: Bench) -> None:
    a = bench.start("a")
    bench.link.publish(a, 0, 0, 50, [])
    assert bench.proposer.propose(["a"], [[50]]) == [[3, 90, 91]]
    assert bench.outcomes()[0].drafts == [3, 90, 91]
    assert bench.counters["late"] == 1
    assert bench.counters["hits"] == 0


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_what_is_no_token_is_not_served(bench: Bench, token: int) -> None:
    """The target would embed it."""
    a = bench.start("a")
    bench.link.publish(a, 0, 0, 50, [51, token, 53])
    assert bench.proposer.propose(["a"], [[50]]) == [[3, 90, 91]]


def test_rows_without_an_outcome_are_left_alone(bench: Bench) -> None:
    a = bench.start("a")
    assert bench.proposer.propose(["a", "unknown"], [[], [3]]) == [[], []]
    assert bench.link.take_sent() == []
    bench.link.publish(a, 0, 0, 50, [51])  # still round 0
    assert bench.proposer.propose(["a"], [[50]]) == [[51]]


def test_without_a_draft_every_row_falls_back(bench: Bench) -> None:
    bench.start("a")
    bench.link.ready = False
    bench.proposer.start("b", [4, 5])
    assert bench.proposer.propose(["a", "b"], [[50], [60]]) == [[3, 90, 91], [5, 90, 91]]
    bench.proposer.stop("b")
    assert bench.link.take_sent() == []
    assert bench.counters["undrafted"] == 2
    assert bench.counters["lookups"] == 0


def tokens_of(start: object) -> list[int]:
    assert isinstance(start, Start)
    return np.frombuffer(start.tokens, "<i4").tolist()


def test_a_draft_newly_ready_is_told_of_every_request(bench: Bench) -> None:
    """As after a stall; of each with its next outcome."""
    old = bench.start("a")
    bench.link.ready = False
    bench.proposer.start("b", [4, 5])
    bench.proposer.propose(["a", "b"], [[50], [60]])
    bench.link.news = News.READY
    bench.history["a"] += [50, 51]
    assert bench.proposer.propose(["a"], [[51]]) == [[51, 90, 91]]
    outcomes, again = bench.link.take_sent()
    assert isinstance(outcomes, Outcomes)
    assert outcomes.rows == []
    assert tokens_of(again) == [1, 2, 3, 50, 51]
    assert again.epoch > old.epoch
    bench.history["b"] += [60, 61]
    bench.proposer.propose(["a", "b"], [[52], [61]])
    outcomes, start = bench.link.take_sent()
    assert outcomes.rows == [RoundOutcome(again.slot, again.epoch, 0, [52], [51, 90, 91], 3)]
    assert tokens_of(start) == [4, 5, 60, 61]
    # From round 0 again.
    bench.link.publish(start, 0, 0, 62, [63])
    assert bench.proposer.propose(["b"], [[62]]) == [[63]]
    assert bench.counters["undrafted"] == 4  # while there was none, or one that did not know the request


def test_long_requests_are_told_anew_one_a_round(bench: Bench) -> None:
    bench.link.max_model_len = 10 * INTRODUCED_TOKENS
    bench.link.ready = False
    for name in ("a", "b"):
        bench.history[name] = [1] * INTRODUCED_TOKENS
        bench.proposer.start(name, bench.history[name])
    bench.link.news = News.READY
    for _ in range(2):
        bench.proposer.propose(["a", "b"], [[50], [60]])
        assert len([message for message in bench.link.take_sent() if isinstance(message, Start)]) == 1
    bench.proposer.propose(["a", "b"], [[51], [61]])
    assert len(bench.outcomes()) == 2


def test_who_was_there_when_a_draft_died_is_not_sent_to_the_next(bench: Bench) -> None:
    """One of them may be why; which, nobody knows."""
    bench.start("a")
    bench.link.news = News.DIED
    bench.proposer.propose(["a"], [[50]])
    bench.proposer.start("b", [4, 5])
    bench.link.news = News.READY
    for _ in range(3):
        bench.proposer.propose(["a", "b"], [[51], [61]])
    starts = [message for message in bench.link.take_sent() if isinstance(message, Start)]
    assert [tokens_of(start) for start in starts] == [[4, 5]]
    bench.proposer.stop("a")
    assert not any(isinstance(message, Stop) for message in bench.link.take_sent())
    bench.start("c")  # slots are as before


def test_a_request_too_long_for_the_draft_is_not_sent_or_asked_for(bench: Bench) -> None:
    bench.link.max_model_len = 3 + K + 2
    bench.proposer.start("b", [1] * 6)
    assert bench.link.take_sent() == []
    a = bench.start("a")
    bench.proposer.propose(["a", "b"], [[50], [60]])
    assert len(bench.outcomes()) == 1
    bench.proposer.propose(["a"], [[51]])  # too long from now on
    _, stop = bench.link.take_sent()
    assert stop == Stop(a.slot, a.epoch)
    for _ in range(3):
        bench.proposer.propose(["a"], [[52]])
        assert bench.outcomes() == []
    assert (bench.counters["lookups"], bench.counters["too_long"], bench.counters["undrafted"]) == (2, 4, 0)


def test_tokens_of_no_vocabulary_are_clamped(bench: Bench) -> None:
    bench.proposer.start("a", [5, -1, 7, VOCAB, 2**31, 2**40])
    (start,) = bench.link.take_sent()
    assert tokens_of(start) == [5, 0, 7, VOCAB - 1, VOCAB - 1, VOCAB - 1]


def test_an_outcome_that_the_draft_cannot_embed(bench: Bench) -> None:
    """A target may have more tokens: the row goes on without drafts, and the draft with another token."""
    a = bench.start("a")
    bench.link.publish(a, 0, 1, VOCAB - 1, [51])
    bench.link.publish(a, 1, 0, 50, [51, 52, 53])
    assert bench.proposer.propose(["a"], [[7, VOCAB]]) == [[]]
    assert bench.outcomes() == [RoundOutcome(a.slot, a.epoch, 0, [7, VOCAB - 1], [], 0)]
    assert bench.proposer.propose(["a"], [[50]]) == [[51, 52, 53]]
    assert (bench.counters["lookups"], bench.counters["hits"], bench.counters["backup_none"]) == (2, 1, 1)


def test_n_grams_of_a_prompt_with_such_tokens_end_before_them(bench: Bench) -> None:
    bench.start("a")
    bench.history["a"] = [VOCAB]
    assert bench.proposer.propose(["a"], [[50]]) == [[]]
    bench.history["a"] = [7]
    assert bench.proposer.propose(["a"], [[50]]) == [[7, 90, 91]]


def test_drafts_that_the_scheduler_cut_are_no_rejections(bench: Bench) -> None:
    a = bench.start("a")
    bench.link.publish(a, 0, 0, 50, [51, 52, 53])
    bench.proposer.propose(["a"], [[50]], [0])
    bench.proposer.propose(["a"], [[51, 9]], [1])
    first, second = bench.link.take_sent()
    assert isinstance(first, Outcomes)
    assert isinstance(second, Outcomes)
    assert (first.rows[0].num_verified, second.rows[0].num_verified) == (0, 1)


def test_a_draft_of_which_nothing_is_accepted_is_spoken_of_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one with another tokenizer; and one that is accepted is not."""
    said: list[str] = []
    monkeypatch.setattr(observer.logger, "warning", lambda text, *args: said.append(text % args))
    bench.link.max_model_len = 10 * observer.WATCHED_LOOKUPS
    for accepted in (True, False):
        bench.counters.set("lookups", 0)
        bench.observer._watches = True
        a = bench.start("a")
        for round_ in range(observer.WATCHED_LOOKUPS + 10):
            outcome = [51, 50] if accepted and round_ else [50]
            bench.link.publish(a, round_, len(outcome) - 1, 50, [51])
            bench.proposer.propose(["a"], [outcome])
        bench.proposer.stop("a")
        bench.link.take_sent()
        bench.observer._num_accepted = 0
        assert len(said) == (0 if accepted else 1)
    assert "tokenizer" in said[0]


def test_slots_are_used_again_under_new_epochs(bench: Bench) -> None:
    a, b = bench.start("a"), bench.start("b")
    bench.proposer.stop("a")
    assert bench.link.take_sent() == [Stop(a.slot, a.epoch)]
    c = bench.start("c")
    assert c.slot == a.slot
    assert c.epoch > max(a.epoch, b.epoch)
    bench.link.publish(a, 0, 0, 50, [51])  # left over from before
    assert bench.proposer.propose(["c"], [[50]]) == [[6, 90, 91]]


def test_preempted_and_resumed(bench: Bench) -> None:
    bench.start("a")
    bench.proposer.propose(["a"], [[50]])
    bench.link.take_sent()
    bench.proposer.stop("a")
    bench.link.take_sent()
    bench.history["a"].append(50)
    again = bench.start("a")
    assert np.frombuffer(again.tokens, "<i4").tolist() == [1, 2, 3, 50]
    bench.link.publish(again, 0, 0, 7, [8, 9])
    assert bench.proposer.propose(["a"], [[7]]) == [[8, 9]]


def test_stopping_what_is_not_there_is_ignored(bench: Bench) -> None:
    bench.proposer.stop("nobody")
    bench.start("a")
    bench.proposer.stop("a")
    bench.link.take_sent()
    bench.proposer.stop("a")
    assert bench.link.take_sent() == []


def test_many_requests_come_and_go_in_few_slots(bench: Bench) -> None:
    seen = set()
    for _ in range(20):
        a, b = bench.start("a"), bench.start("b")
        assert {a.slot, b.slot} == set(range(SLOTS))
        seen |= {a.epoch, b.epoch}
        bench.proposer.stop("a")
        bench.proposer.stop("b")
        bench.link.take_sent()
    assert len(seen) == 40


def test_a_plan_limits_drafts_and_tells_the_draft(bench: Bench) -> None:
    a = bench.start("a")
    bench.start("b")
    bench.proposer.planner = FixedPlan(Plan(2, 5))
    bench.link.publish(a, 0, 0, 50, [51, 52, 53])
    assert bench.proposer.propose(["a", "b"], [[50], [60]]) == [[51, 52], [5, 90]]
    (message,) = bench.link.take_sent()
    assert isinstance(message, Outcomes)
    assert (message.num_drafts, message.branch_budget) == (2, 5)
    assert [row.drafts for row in message.rows] == [[51, 52], [5, 90]]


def test_a_plan_without_speculation(bench: Bench) -> None:
    a = bench.start("a")
    bench.start("b")
    bench.proposer.planner = FixedPlan(Plan(0, 0))
    bench.link.publish(a, 0, 0, 50, [51, 52, 53])
    assert bench.proposer.propose(["a", "b"], [[50], [60]]) == [[], []]
    (message,) = bench.link.take_sent()
    assert isinstance(message, Outcomes)
    assert (message.num_drafts, message.branch_budget) == (0, 0)
    # Nobody asked, so nothing was missed.
    assert [bench.counters[name] for name in ("backup_ngram", "lookups", "late", "undrafted")] == [0] * 4
