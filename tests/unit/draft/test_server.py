"""The draft's loop on a toy model: whatever the target decides, published branches are the toy's own."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from target import VOCAB, Setup, Target, long_run, prompt

from vllm_ssd.link.messages import (
    Outcomes,
    Reset,
    RoundOutcome,
    Sampling,
    Stop,
)
from vllm_ssd.link.outcome_cache import EPOCH, Outcome
from vllm_ssd.plan.fanout import listed_fanout, uniform_fanout


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 16, 17, 60])
def test_first_round(length: int) -> None:
    target = Target(Setup())
    target.start(0, prompt(random.Random(length), length))
    target.run_until_idle()
    branches = target.published(0)
    assert len(branches) == target.setup.budget  # all on k = 0
    assert all(len(drafts) == target.setup.num_drafts for _, _, drafts in branches)
    target.finish()


@pytest.mark.parametrize("num_drafts", [1, 2, 4, 7])
@pytest.mark.parametrize("fanout", ["uniform", "falling"])
def test_every_accepted_length_gets_its_branches(num_drafts: int, fanout: str) -> None:
    listed = [num_drafts + 1 - k for k in range(num_drafts + 1)] if fanout == "falling" else []
    budget = sum(listed) if listed else 3 * (num_drafts + 1) + 1
    setup = Setup(num_drafts=num_drafts, budget=budget, fanout=listed or "uniform", vocab=64)
    target = Target(setup)
    rng = random.Random(0)
    target.start(0, prompt(rng, 10))
    for _ in range(10):
        target.run_until_idle()
        branches = target.published(0)
        sent = len(target.live[0].drafts)
        expected = listed_fanout(listed, sent) if listed else uniform_fanout(sent, budget)
        assert [sum(1 for k, _, _ in branches if k == length) for length in range(sent + 1)] == expected
        assert all(len(drafts) == num_drafts for _, _, drafts in branches)
        k, token, _ = rng.choice(branches)
        target.decide(0, k, token)
    assert target.hits == 10
    assert target.counters["adopted"] == 10
    # A hit recomputes nothing: after the prompt the trunk is computed by the branches themselves.
    assert target.counters["prefill_tokens"] == 10
    target.finish()


@pytest.mark.parametrize(("temperature", "counts"), [(1.0, [3, 2, 2]), (0.0, [2, 2, 3])])
def test_global_fan_out_follows_the_drafts_own_probabilities(temperature: float, counts: list[int]) -> None:
    # Each toy token is half as likely as the one before it: sending a best draft costs one halving, and the
    # candidates after it start another one lower, but for the last length, whose best token was not sent.
    # After a greedy rejection the next likeliest are believed more, and the others less, than the
    # distribution has it.
    target = Target(Setup(num_drafts=2, budget=7, fanout="global", vocab=64))
    target.start(0, prompt(random.Random(0), 10), Sampling(temperature=temperature))
    target.run_until_idle()
    assert [k for k, _, _ in target.published(0)] == [0] * 7
    _, token, _ = target.published(0)[0]
    target.decide(0, 0, token)
    target.run_until_idle()
    ks = [k for k, _, _ in target.published(0)]
    assert [ks.count(k) for k in range(3)] == counts
    target.finish()


@pytest.mark.parametrize("steps", range(12))
def test_an_early_outcome_gets_the_depth_reached(steps: int) -> None:
    target = Target(Setup(prefill_chunk=4))
    rng = random.Random(steps)
    target.start(0, prompt(rng, 6))
    for _ in range(20):
        for _ in range(steps):
            target.step()
        target.decide_like(0, rng)
    target.run_until_idle()
    assert len(target.published(0)) == target.setup.budget
    target.finish()


def test_a_long_prompt_is_prefilled_in_chunks_between_rounds() -> None:
    target = Target(Setup(prefill_chunk=8))
    rng = random.Random(1)
    target.start(0, prompt(rng, 5))
    target.run_until_idle()
    target.start(1, prompt(rng, 90))
    for _ in range(12):
        target.step()
        assert max(target.engine.query_lens) <= 8
        if branches := target.published(0):
            target.decide(0, *branches[0][:2])
    target.run_until_idle()
    assert target.hits
    assert len(target.published(1)) == target.setup.budget
    target.finish()


def test_a_known_prefix_is_not_computed_again() -> None:
    target = Target(Setup())
    tokens = prompt(random.Random(2), 42)
    target.start(0, tokens)
    target.run_until_idle()
    computed = target.counters["prefill_tokens"]
    target.start(1, tokens)  # shared while in use
    target.run_until_idle()
    assert target.counters["prefill_tokens"] - computed == 2
    assert sorted(target.published(0)) == sorted(target.published(1))
    target.stop(0)
    target.stop(1)
    computed = target.counters["prefill_tokens"]
    target.start(2, [*tokens[:20], *prompt(random.Random(3), 9)])  # cached
    target.run_until_idle()
    assert target.counters["prefill_tokens"] - computed <= 9 + 4
    target.finish()


@pytest.mark.parametrize("length", [40, 41, 43])
def test_all_of_a_prompt_known_but_its_logits(length: int) -> None:
    target = Target(Setup())
    tokens = prompt(random.Random(8), length)
    for slot in range(3):
        target.start(slot, tokens)
        target.run_until_idle()
        assert len(target.published(slot)) == target.setup.budget
    target.finish()


def test_a_prompt_that_is_being_computed_is_not_reused() -> None:
    target = Target(Setup(prefill_chunk=8))
    tokens = prompt(random.Random(9), 60)
    target.start(0, tokens)
    target.step()
    target.start(1, tokens)
    target.run_until_idle()  # the toy engine notices blocks without KV
    assert sorted(target.published(0)) == sorted(target.published(1))
    target.finish()


def test_what_was_never_computed_is_not_reused() -> None:
    target = Target(Setup(block_size=4))
    target.start(0, prompt(random.Random(11), 7))
    target.run_until_idle()
    least_likely = int(target.oracle.rank(target.live[0].tokens)[-1])
    target.decide(0, 0, least_likely, backup=[1, 2, 3])
    tokens = [*target.live[0].tokens, *target.live[0].drafts]
    target.stop(0)  # before the draft did another step
    target.start(1, tokens)
    target.run_until_idle()
    assert target.published(1)
    target.finish()


def test_drafts_other_than_the_branchs_own() -> None:
    """The target missed, for it looked before the branch was there; the draft hears of its n-gram drafts."""
    target = Target(Setup())
    tokens = prompt(random.Random(12), 9)
    target.start(0, tokens)
    likeliest = int(target.oracle.rank(tokens)[0])
    own = target.continuation([*tokens, likeliest], 3)
    other = [own[0], (own[1] + 1) % VOCAB, own[2]]
    assert target.decide(0, 0, likeliest, backup=other, steps_meanwhile=6) == other
    target.run_until_idle()
    assert {k for k, _, _ in target.published(0)} == {0, 1, 2, 3}
    target.finish()


def test_an_outcome_that_repeats_a_sent_draft() -> None:
    """The target verified fewer drafts than it was given, so its bonus token is one of them."""
    target = Target(Setup(num_drafts=3, budget=8, vocab=64))
    target.start(0, prompt(random.Random(10), 9))
    target.run_until_idle()
    (accepted, token, drafts), *_ = target.published(0)
    target.decide(0, accepted, token)
    target.run_until_idle()
    for k, backup in ((0, []), (1, drafts[2:]), (2, [5])):
        target.decide(0, k, target.live[0].drafts[k], backup)
        target.run_until_idle()
        sent = len(target.live[0].drafts)
        branches = target.published(0)
        counts = [sum(1 for of, _, _ in branches if of == length) for length in range(sent + 1)]
        assert counts == uniform_fanout(sent, 8)
        assert all(len(drafts) == 3 for _, _, drafts in branches)
        target.decide(0, *branches[-1][:2])
        target.run_until_idle()
    target.finish()


def test_a_stopped_or_restarted_slot_publishes_nothing_old() -> None:
    target = Target(Setup())
    old = target.start(0, [1, 2, 3])
    target.run_until_idle()
    keys = [Outcome(0, old.epoch, 0, k, token) for k, token, _ in target.published(0)]
    assert all(target.cache.look_up(keys))
    target.start(0, [1, 2, 3])  # the stop was lost
    assert target.cache.look_up(keys) == [None] * len(keys)
    target.run_until_idle()
    assert target.cache.look_up(keys) == [None] * len(keys)
    target.stop(0)
    keys = [key._replace(epoch=old.epoch + 1) for key in keys]
    assert target.cache.look_up(keys) == [None] * len(keys)
    target.finish()


def test_late_messages_of_an_earlier_epoch_or_round_change_nothing() -> None:
    target = Target(Setup())
    old = target.start(0, [1, 2, 3])
    target.stop(0)
    target.start(0, [4, 5, 6])
    target.run_until_idle()
    branches = target.published(0)
    target.server.handle(Stop(0, old.epoch))
    target.server.handle(Outcomes([RoundOutcome(0, old.epoch, 0, [9], [], 0)], 3, 8))
    target.server.handle(Outcomes([RoundOutcome(0, old.epoch + 1, 7, [9], [], 0)], 3, 8))
    target.server.handle(Outcomes([RoundOutcome(3, 1, 0, [9], [], 0)], 3, 8))
    target.server.handle(Stop(3, 1))
    target.run_until_idle()
    assert target.published(0) == branches
    target.finish()


def test_reset_forgets_everything() -> None:
    target = Target(Setup())
    for slot in range(3):
        target.start(slot, prompt(random.Random(slot), 10))
    target.run_until_idle()
    target.server.handle(Reset())
    assert (target.cache.entries[:, :, EPOCH] == 0).all()
    assert target.num_free_blocks == target.setup.num_blocks
    assert not target.server.step()
    target.live.clear()
    target.start(1, [1, 2])
    target.run_until_idle()
    assert target.published(1)
    target.finish()


def test_at_one_branch_the_likeliest_outcome_has_it() -> None:
    """Also after a hit, when the tip is not known yet: it is not bound to have the branch."""
    target = Target(Setup(num_drafts=3, budget=8, fanout="global", vocab=64))
    target.start(0, prompt(random.Random(9), 10))
    for _ in range(1 + 3):  # the prompt, then three drafts: no tips
        target.step()
    target.budget = 1  # more requests have come, say
    target.decide(0, *target.published(0)[0][:2])
    target.run_until_idle()
    ((k, _, _),) = target.published(0)
    assert k == 0  # a quarter; all three drafts and then a token of half: a sixteenth
    target.finish()


SETUPS = st.builds(
    Setup,
    num_drafts=st.sampled_from([1, 2, 3, 5]),
    budget=st.sampled_from([6, 8, 15]),
    fanout=st.sampled_from(["global", "uniform"]),
    max_rows=st.sampled_from([4, 16, 64]),
    prefill_chunk=st.sampled_from([3, 16]),
    num_blocks=st.sampled_from([12, 40, 300]),
    block_size=st.sampled_from([2, 4, 16]),
    vocab=st.sampled_from([4, 12]),
    max_model_len=st.sampled_from([32, 120]),
)


@pytest.mark.timeout(120)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(setup=SETUPS, data=st.data())
def test_any_course_of_events(setup: Setup, data: st.DataObject) -> None:
    target = Target(setup)
    rng = random.Random(data.draw(st.integers(0, 1 << 20)))
    prefixes = [prompt(rng, 40, setup.vocab) for _ in range(2)]  # shared, so that reuse happens
    for action in data.draw(st.lists(st.sampled_from("sspaaooooodddddrx"), max_size=60)):
        slot = rng.randrange(setup.max_slots)
        if action == "s":  # start; over an old request, if its stop was lost
            shared = rng.choice(prefixes)[: rng.randint(0, 40)]
            tokens = shared + prompt(rng, rng.randint(0, 6), setup.vocab)
            target.start(slot, tokens or [0])
        elif action == "p" and slot in target.live:  # preempt and resume with all tokens so far
            tokens = target.live[slot].tokens
            target.stop(slot)
            target.start(rng.randrange(setup.max_slots), tokens)
        elif action == "a" and slot in target.live:
            target.stop(slot)
        elif action == "o":
            for live in list(target.live):
                target.decide_like(live, rng)
        elif action == "d":
            for _ in range(rng.randint(1, 6)):
                target.step()
        elif action == "r":
            target.run_until_idle()
        elif action == "x":
            target.server.handle(Reset())
            for live in list(target.live.values()):
                target.start(live.slot, live.tokens)
    target.run_until_idle()
    target.finish()


@pytest.mark.parametrize("seed", range(4))
def test_a_long_run(seed: int) -> None:
    rng = random.Random(seed)
    setup = Setup(
        num_drafts=rng.choice([2, 4]),
        fanout=["global", "uniform"][seed % 2],
        num_blocks=rng.choice([60, 400]),
        max_model_len=400,
        max_slots=5,
    )
    target = Target(setup)
    long_run(target, rng, 250)
    assert target.hits > 20


def test_geometric_fan_out_follows_the_outcomes() -> None:
    """Where the first draft is always rejected, most branches go to k = 0."""
    target = Target(Setup(budget=8, fanout="geometric", vocab=64))
    request = target.start(0, prompt(random.Random(0), 10))
    for _ in range(150):
        target.run_until_idle()
        branches = [branch for branch in target.published(0) if branch[0] == 0]
        assert len(target.published(0)) == target.setup.budget
        target.decide(0, *branches[-1][:2])
        if len(request.tokens) > 150:
            target.stop(0)
            request = target.start(0, prompt(random.Random(0), 10))
    target.run_until_idle()
    ks = [k for k, _, _ in target.published(0)]
    assert ks.count(0) >= 4
    assert set(ks) == {0, 1, 2, 3}
    target.finish()


def test_global_fan_out_learns_how_far_the_target_agrees() -> None:
    """Each draft is half of the distribution, yet always accepted: at last the branch waits where all are."""
    target = Target(Setup(budget=1, fanout="global", vocab=64))
    lengths = []
    for _ in range(6):
        request = target.start(0, prompt(random.Random(0), 10))
        while len(request.tokens) < 150:
            target.run_until_idle()
            if request.drafts:
                lengths.append([k for k, _, _ in target.published(0)])
            chain = [*request.tokens, *request.drafts]
            for _ in range(4):
                chain.append(int(target.oracle.rank(chain)[0]))
            target.decide(0, len(request.drafts), chain[-4], backup=chain[-3:])
        target.stop(0)
    assert lengths[0] == [0]
    assert lengths[-1] == [3]
    target.finish()


def test_the_target_may_want_less() -> None:
    """Fewer drafts and branches, then none, then all again: what is published follows, and hits continue."""
    target = Target(Setup(num_drafts=4, budget=10))
    rng = random.Random(5)
    target.start(0, prompt(rng, 8))
    for num_drafts, budget in ((4, 10), (2, 5), (0, 0), (0, 0), (4, 10), (1, 3)):
        target.run_until_idle()
        branches = target.published(0)
        target.num_drafts, target.budget = num_drafts, budget
        k, token = branches[-1][:2] if branches else (0, rng.randrange(VOCAB))
        target.decide(0, k, token)
        target.run_until_idle()
        assert len(target.published(0)) == budget
        lengths = {len(drafts) for _, _, drafts in target.published(0)}
        assert lengths <= {num_drafts, num_drafts + 1}  # the step for the tips yields one more
    assert target.hits >= 4
    target.finish()


def test_drafts_that_were_not_verified_are_no_rejections() -> None:
    """The scheduler may cut what was proposed, at max_tokens for one."""
    target = Target(Setup())
    request = target.start(0, prompt(random.Random(0), 6))
    target.run_until_idle()
    k, token, _ = next(branch for branch in target.published(0) if branch[0] == 0)
    drafts = target.decide(0, k, token)
    assert len(drafts) == 3
    statistics = target.server._measured.of(True, 0.0)
    before = statistics.acceptance
    last = int(target.oracle.rank([*request.tokens, drafts[0]])[-1])
    target.server.handle(
        Outcomes([RoundOutcome(0, request.epoch, request.round, [drafts[0], last], [], 1)], 3, 8)
    )
    assert statistics.acceptance > before  # one verified, one accepted
