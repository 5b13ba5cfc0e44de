"""The draft's loop while the target waits for drafts of an outcome that it missed."""

from __future__ import annotations

import random

import pytest
from target import Setup, Target, prompt

from vllm_ssd.link.messages import Missed, MissedRow


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("k", range(4))
def test_just_in_time_drafts_come_before_anything_else(steps: int, k: int) -> None:
    """The target waits after a miss: the draft makes this branch, and adopts it when it is told."""
    target = Target(Setup())
    rng = random.Random(3)
    first, other = target.start(0, prompt(rng, 6)), target.start(1, prompt(rng, 6))
    target.run_until_idle()
    for slot in (0, 1):
        _, token, _ = target.published(slot)[0]
        target.decide(slot, 0, token)
    for _ in range(steps):
        target.step()
    (unlikely,) = target.oracle.rank([*first.tokens, *first.drafts[:k]])[-1:].tolist()
    rows_before = len(target.engine.row_counts)
    target.await_drafts(0, k, unlikely, 2)
    while not target.published(0) or len(target.published(0)[0][2]) < 2:
        target.step()
    assert max(target.engine.row_counts[rows_before:]) == 1
    assert len(target.engine.row_counts) - rows_before <= 3
    adopted = target.counters["adopted"]
    drafts = target.decide(0, k, unlikely)
    assert len(drafts) == 2
    assert target.counters["adopted"] == adopted + 1
    target.run_until_idle()
    assert len(target.published(0)) == target.setup.budget
    assert other.round == 1
    target.finish()


def test_awaited_drafts_of_another_round_or_branch_are_ignored() -> None:
    target = Target(Setup())
    request = target.start(0, prompt(random.Random(0), 6))
    target.run_until_idle()
    before = target.published(0)
    for missed in (
        MissedRow(0, request.epoch, 7, [1], 2),
        MissedRow(0, request.epoch + 1, 0, [1], 2),
        MissedRow(3, request.epoch, 0, [1], 2),
        MissedRow(0, request.epoch, 0, [9, 9, 9], 2),
    ):
        target.server.handle(Missed([missed]))
        assert not target.step()
        assert target.published(0) == before
    target.finish()


def test_a_branch_that_has_come_meanwhile_is_kept() -> None:
    """The target's question crossed the draft's fork: what it waits for is there already."""
    target = Target(Setup())
    target.start(0, prompt(random.Random(0), 6))
    for _ in range(3):
        target.step()
    k, token, drafts = target.published(0)[0]
    assert drafts
    target.await_drafts(0, k, token, 1)
    assert target.decide(0, k, token) == drafts
    assert target.counters["adopted"] == 1
    target.finish()
