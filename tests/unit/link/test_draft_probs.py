"""The table of distributions: what is read is of this very round, and what its drafts were drawn from."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from target import VOCAB, Setup, Target, prompt
from toy import START, digest, fingerprint

from vllm_ssd.link.draft_probs import DraftProbs
from vllm_ssd.link.messages import Sampling
from vllm_ssd.verify.noise import draft_seed


@pytest.fixture
def table() -> DraftProbs:
    return DraftProbs(3, 4, 7)


def test_the_other_half_reads_what_was_written(table: DraftProbs) -> None:
    distributions = np.random.default_rng(0).random((3, 7), dtype=np.float32)
    DraftProbs(3, 4, 7, os.dup(table.descriptor)).publish(1, 20, 5, list(distributions))
    for num_drafts in (1, 2, 3):
        found = table.read(1, 20, 5, num_drafts)
        assert found is not None
        assert np.array_equal(found[:num_drafts], distributions[:num_drafts])


@pytest.mark.parametrize(
    ("slot", "epoch", "round_", "num_drafts"), [(0, 20, 5, 1), (1, 21, 5, 1), (1, 20, 4, 1), (1, 20, 5, 3)]
)
def test_nothing_else_matches(table: DraftProbs, slot: int, epoch: int, round_: int, num_drafts: int) -> None:
    table.publish(1, 20, 5, [np.ones(7, dtype=np.float32)] * 2)
    assert table.read(slot, epoch, round_, num_drafts) is None


@pytest.mark.parametrize("seed", range(6))
def test_distributions_are_those_that_the_served_drafts_were_drawn_from(seed: int) -> None:
    """Of the right branch, prefix, round and noise; after full depth, partial depth, and just in time."""
    target = Target(Setup(num_drafts=3, budget=6), draws=True)
    rng = random.Random(seed)
    request = target.start(0, prompt(rng, 8), Sampling(1.0, 77))
    num_checked = 0
    for _ in range(30):
        for _ in range(rng.randint(0, 8)):
            target.step()
        made_in, before = request.round, list(request.tokens)
        if rng.random() < 0.3:
            k, token = rng.randint(0, len(request.drafts)), rng.randrange(VOCAB)
            target.await_drafts(0, k, token, 2)
            for _ in range(4):
                target.step()
            target.decide(0, k, token)
        else:
            target.decide_like(0, rng)
        adopted = target.server._requests[0].verifies_branch
        distributions = target.distributions.read(
            0, request.epoch, request.round, max(1, len(request.drafts))
        )
        if not adopted or not request.drafts:
            continue
        assert distributions is not None
        assert len(before) < len(request.tokens)
        for i in range(len(request.drafts)):
            state = START
            for position, token in enumerate([*request.tokens, *request.drafts[:i]]):
                state = digest(state, token, position)
            assert set(distributions[i].tolist()) == {
                fingerprint(state, draft_seed(77, request.epoch, made_in))
            }
        num_checked += 1
    assert num_checked > 5
    target.finish()
