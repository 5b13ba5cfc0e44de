"""The draft's loop where room is short: positions, KV blocks, rows and tokens of a step."""

from __future__ import annotations

import random

from target import VOCAB, Setup, Target, prompt


def test_a_request_beyond_the_drafts_length_goes_on_without_branches() -> None:
    setup = Setup(max_model_len=24, num_drafts=3)
    target = Target(setup)
    rng = random.Random(4)
    target.start(0, prompt(rng, 8))
    while len(target.live[0].tokens) < 40:
        target.run_until_idle()
        branches = target.published(0)
        reach = len(target.live[0].tokens) + len(target.live[0].drafts) + setup.num_drafts
        assert bool(branches) == (reach < setup.max_model_len), reach
        target.decide_like(0, rng)
    target.start(1, prompt(rng, 30))  # begins beyond it
    target.start(2, prompt(rng, 24))
    target.run_until_idle()
    assert not target.published(1)
    assert not target.published(2)
    target.finish()


def test_branches_share_the_rows_of_a_step() -> None:
    setup = Setup(max_slots=8, max_rows=16, budget=8, vocab=64)
    target = Target(setup)
    rng = random.Random(5)
    for slot in range(8):
        target.start(slot, prompt(rng, 6))
    for _ in range(20):
        target.engine.row_counts.clear()
        target.run_until_idle()
        branches = max(target.engine.row_counts)
        assert branches <= setup.max_rows + setup.max_slots  # and at most one trunk row each
        for slot in target.live:
            assert len(target.published(slot)) == 2
            target.decide_like(slot, rng)
    target.finish()


def test_rows_stay_within_the_engines_limit_while_requests_come() -> None:
    """Requests that came early keep more branches than their share until their round ends."""
    setup = Setup(max_slots=32, max_rows=32, budget=15, vocab=64, num_blocks=2000)
    target = Target(setup)
    rng = random.Random(6)
    for slot in range(setup.max_slots):
        target.start(slot, prompt(rng, 6))
        target.step()  # ToyEngine asserts the limit
        target.step()
    target.run_until_idle()
    target.finish()


def test_a_request_that_found_no_blocks_is_served_later() -> None:
    """Without any request ending: blocks also come free when rounds end."""
    target = Target(Setup(num_blocks=24, block_size=4, budget=8, num_drafts=3, max_slots=2))
    target.start(0, [1, 2, 3, 4, 5])
    target.run_until_idle()
    assert target.num_free_blocks == 6  # its branches hold two blocks each, as they cross a block's end
    target.start(1, prompt(random.Random(7), 31))
    target.run_until_idle()
    assert not target.published(1)
    for _ in range(3):  # misses
        target.decide(0, 0, int(target.oracle.rank(target.live[0].tokens)[-1]))
        target.run_until_idle()
    # With eight tokens it is one block a branch, so there is room for the other's prompt.
    assert target.counters["prefill_tokens"] >= 8 + 31
    target.finish()


def test_requests_that_fill_the_pool_do_not_lock_each_other_out() -> None:
    """Each wants one block more, and none has any to give: some must give all of theirs."""
    setup = Setup(num_blocks=40, block_size=4, budget=4, num_drafts=3, max_slots=4, max_model_len=160)
    target = Target(setup)
    rng = random.Random(3)
    for slot in range(4):
        target.start(slot, prompt(rng, 30))
    for _ in range(40):
        for slot in range(4):
            target.run_until_idle()
            branches = target.published(slot)
            target.decide(slot, *(branches[0][:2] if branches else (0, rng.randrange(VOCAB))))
        if all(len(live.tokens) > 50 for live in target.live.values()):
            break
    hits = target.hits
    for _ in range(10):
        for slot in range(4):
            target.run_until_idle()
            branches = target.published(slot)
            target.decide(slot, *(branches[0][:2] if branches else (0, rng.randrange(VOCAB))))
    assert target.hits - hits >= 8  # by those that stayed
    waiting = [slot for slot in range(4) if not target.published(slot)]
    assert waiting
    for slot in range(4):
        if slot not in waiting:
            target.stop(slot)
    target.run_until_idle()
    assert all(target.published(slot) for slot in waiting[:1])
    target.finish()


def test_blocks_given_up_by_one_are_for_another_that_had_given_up_its_own() -> None:
    """Without any request ending."""
    setup = Setup(num_blocks=20, block_size=4, budget=2, num_drafts=3, max_slots=2, max_model_len=200)
    target = Target(setup)
    target.start(0, prompt(random.Random(1), 40))
    target.start(1, prompt(random.Random(2), 36))
    rng = random.Random(3)

    def go_on(slot: int, rounds: int) -> None:
        for _ in range(rounds):
            target.run_until_idle()
            target.decide(slot, 0, rng.randrange(VOCAB))
        target.run_until_idle()

    go_on(0, 3)
    go_on(1, 3)
    assert len([slot for slot in range(2) if target.published(slot)]) == 1
    stayed = 0 if target.published(0) else 1
    go_on(stayed, 45)  # until it has no room either
    assert target.published(1 - stayed)
    target.finish()


def test_a_fork_without_blocks_is_counted_once_a_round() -> None:
    target = Target(Setup(num_blocks=3, block_size=4, budget=4, num_drafts=3, max_slots=1))
    target.start(0, prompt(random.Random(4), 10))
    for _ in range(10):
        target.step()
    assert target.counters["starved"] == 1
    target.await_drafts(0, 0, 5, 2)
    for _ in range(10):
        target.step()
    assert target.counters["starved"] == 2
    target.finish()


def test_a_request_that_has_outgrown_the_draft_gives_its_blocks_up() -> None:
    target = Target(Setup(num_blocks=12, block_size=4, budget=2, num_drafts=3, max_slots=2, max_model_len=40))
    target.start(0, prompt(random.Random(4), 33))
    target.run_until_idle()
    target.start(1, prompt(random.Random(5), 20))
    target.run_until_idle()
    assert not target.published(1)
    for _ in range(5):
        target.decide(0, 0, 1)
        target.run_until_idle()
    assert len(target.published(1)) == 2
    target.finish()


def test_as_many_branches_as_there_are_blocks_for() -> None:
    target = Target(Setup(num_blocks=6, block_size=4, budget=8, num_drafts=3, max_slots=1))
    target.start(0, [1, 2, 3, 4, 5])
    target.run_until_idle()
    branches = target.published(0)
    assert len(branches) == 2  # two blocks each, and two for the prompt
    assert all(len(drafts) == 3 for _, _, drafts in branches)
    assert target.counters["starved"] == 1
    target.finish()


def test_blocks_that_come_free_are_for_those_who_lack_them_to_go_on() -> None:
    """And not for more branches of the request that gave them back."""
    target = Target(Setup(num_blocks=24, block_size=4, budget=8, num_drafts=3, max_slots=2))
    target.start(0, [1, 2, 3, 4, 5])
    target.run_until_idle()
    target.start(1, prompt(random.Random(7), 31))
    target.run_until_idle()
    assert not target.published(1)
    target.decide(0, *target.published(0)[0][:2])
    target.run_until_idle()
    assert target.published(1)
    target.finish()


def test_what_lacks_a_token_need_not_wait_for_a_long_prompt() -> None:
    target = Target(Setup(prefill_chunk=4))
    rng = random.Random(6)
    target.start(0, prompt(rng, 100))  # the first to come
    target.start(1, [1, 2])
    target.step()
    assert target.server._requests[1].num_uncomputed == 0
    assert target.server._requests[0].num_uncomputed == 98
    target.finish()


def test_more_requests_than_rows_take_turns() -> None:
    setup = Setup(num_drafts=3, budget=1, max_rows=2, max_slots=6, prefill_chunk=64)
    target = Target(setup)
    rng = random.Random(8)
    for slot in range(6):
        target.start(slot, prompt(rng, 4))
    served = set()
    for _ in range(6):  # rounds of as many steps as give two requests their tokens
        for _ in range(3):
            target.step()
        served |= {slot for slot in range(6) if any(drafts for _, _, drafts in target.published(slot))}
        for slot in range(6):
            target.decide(slot, 0, rng.randrange(VOCAB))
    assert served == set(range(6))
    target.finish()
