"""Ratio verification: whatever the drafts are drawn from, the tokens have the target's distribution."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from vllm_ssd.draft.sampling import saguaro
from vllm_ssd.verify import ratio
from vllm_ssd.verify.noise import draft_seed, gumbel
from vllm_ssd.verify.ratio import DraftDistribution, PointMass, distribution_as_logits, verify
from vllm_ssd.verify.verification import Places, draw

VOCAB, COUNT = 6, 20_000
P = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05, 0.0])
Q = torch.tensor([0.1, 0.5, 0.05, 0.05, 0.2, 0.1])
AFTER = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.5])  # the target's distribution after the draft


def drawn(distribution: Tensor, seeds: Tensor, position: int) -> Tensor:
    """[n] as the draft draws."""
    own = torch.tensor(draft_seeds(tuple(seeds.tolist())))
    return (distribution.log() + gumbel(own, torch.full_like(seeds, position), VOCAB)).argmax(dim=-1)


@cache
def draft_seeds(seeds: tuple[int, ...]) -> list[int]:
    """Nearly all tests have the same."""
    return [draft_seed(seed, 1, 0) for seed in seeds]


def verified(
    distribution: DraftDistribution, drafts: Tensor, seeds: Tensor, is_greedy: bool = False
) -> list[list[int]]:
    """One draft a row, all rows in one step."""
    ones = torch.ones_like(seeds)
    places = Places(seeds, 7 * ones, ones, torch.full(seeds.shape, is_greedy), VOCAB)
    logits = P.log().repeat(len(seeds), 1)
    bonus = draw(places, AFTER.log().repeat(len(seeds), 1))
    return verify(places, [distribution] * len(seeds), drafts, logits, bonus)


def p_value(tokens: list[int], distribution: Tensor) -> float:
    counts, possible = np.bincount(tokens, minlength=VOCAB), distribution.numpy() > 0
    assert not counts[~possible].any()
    expected = distribution.double().numpy()[possible]
    return float(chisquare(counts[possible], len(tokens) * expected / expected.sum()).pvalue)


def as_distribution(q: Tensor) -> DraftDistribution:
    return q[None, :].numpy()


@pytest.mark.parametrize("c", [1.0, 0.5, 0.1])
def test_drawn_drafts(c: float) -> None:
    seeds = torch.arange(COUNT)
    distribution = saguaro(Q[None, :], 2, c)[0]
    drafts = drawn(distribution, seeds, 7)
    rows = verified(as_distribution(distribution), drafts, seeds)
    assert p_value([row[0] for row in rows], P) > 1e-3
    assert p_value([row[1] for row in rows if len(row) == 2], AFTER) > 1e-3
    share = sum(len(row) == 2 for row in rows) / COUNT
    assert share == pytest.approx(torch.minimum(P, distribution).sum().item(), abs=0.02)


def test_point_masses() -> None:
    seeds = torch.arange(COUNT)
    rows = verified(PointMass(), torch.full_like(seeds, 2), seeds)
    assert p_value([row[0] for row in rows], P) > 1e-3
    assert sum(len(row) == 2 for row in rows) / COUNT == pytest.approx(P[2].item(), abs=0.02)


def test_a_distribution_that_did_not_come_costs_acceptance_only() -> None:
    """Any draft may count as a point mass, also one that was drawn."""
    seeds = torch.arange(COUNT)
    rows = verified(PointMass(), drawn(Q, seeds, 7), seeds)
    assert p_value([row[0] for row in rows], P) > 1e-3
    assert sum(len(row) == 2 for row in rows) / COUNT == pytest.approx((P * Q).sum().item(), abs=0.02)


def test_a_place_without_a_draft() -> None:
    """vLLM fills up with -1."""
    seeds = torch.arange(COUNT)
    rows = verified(PointMass(), torch.full_like(seeds, -1), seeds)
    assert {len(row) for row in rows} == {1}
    assert p_value([row[0] for row in rows], P) > 1e-3


@pytest.mark.parametrize("u_is_zero", [False, True])
def test_a_token_that_cannot_be_is_never_accepted(monkeypatch: pytest.MonkeyPatch, u_is_zero: bool) -> None:
    """Our u is never 0; even where it is, the comparison with p / q must not let such a token through."""
    if u_is_zero:
        monkeypatch.setattr(ratio, "uniform", lambda seeds, positions: torch.zeros(seeds.shape))
    seeds = torch.arange(COUNT)
    for distribution in (PointMass(), as_distribution(Q)):
        rows = verified(distribution, torch.full_like(seeds, 5), seeds)
        assert all(row != [5] and len(row) == 1 for row in rows)


def test_drafts_of_the_targets_own_distribution_are_all_accepted() -> None:
    seeds = torch.arange(COUNT)
    assert {len(row) for row in verified(as_distribution(P), drawn(P, seeds, 7), seeds)} == {2}


def test_a_greedy_row_keeps_the_likeliest_token_alone() -> None:
    seeds = torch.arange(50)
    assert {len(row) for row in verified(as_distribution(Q), torch.zeros_like(seeds), seeds, True)} == {2}
    assert verified(as_distribution(Q), torch.ones_like(seeds), seeds, True) == [[0]] * 50


def test_a_draft_with_fewer_tokens() -> None:
    """Of the last ones it draws none."""
    seeds, few = torch.arange(COUNT), VOCAB - 2
    q = Q[:few] / Q[:few].sum()
    drafts = drawn(torch.cat([q, torch.zeros(2)]), seeds, 7)
    rows = verified(as_distribution(q), drafts, seeds)
    assert p_value([row[0] for row in rows], P) > 1e-3
    assert (torch.tensor([row[0] for row in rows]) >= few).any()
    logits = distribution_as_logits(as_distribution(q), [0], 0.5, VOCAB)
    assert torch.allclose((logits / 0.5).softmax(dim=-1), torch.cat([q, torch.zeros(2)]))


@pytest.mark.parametrize(
    "fault", ["distribution of another temperature", "greedy acceptance", "noise shared"]
)
def test_faults_would_show(fault: str) -> None:
    """The tests above have the power to fail."""
    seeds = torch.arange(COUNT)
    drafts = drawn(Q, seeds, 7)
    if fault == "distribution of another temperature":
        rows = verified(as_distribution((Q.log() / 0.7).softmax(dim=-1)), drafts, seeds)
    elif fault == "greedy acceptance":
        rows = verified(as_distribution(Q), drafts, seeds, is_greedy=True)
    else:
        drafts = (Q.log() + gumbel(seeds, torch.full_like(seeds, 7), VOCAB)).argmax(dim=-1)
        rows = verified(as_distribution(Q), drafts, seeds)
    assert p_value([row[0] for row in rows], P) < 1e-6


def test_rows_of_every_kind_in_one_step() -> None:
    torch.manual_seed(0)
    distributions: list[DraftDistribution] = [
        as_distribution(Q).repeat(3, axis=0),
        PointMass(),
        PointMass(),
        PointMass(),
    ]
    num_drafts = [2, 1, 2, 0]
    seeds = torch.arange(4)
    places = Places(seeds, seeds + 3, torch.tensor(num_drafts), seeds < 0, VOCAB)
    logits = torch.randn(5, VOCAB)
    bonus = torch.arange(4)
    drafts = torch.tensor([1, 0, 3, -1, -1])
    together = verify(places, distributions, drafts, logits, bonus)
    begin = 0
    for row, count in enumerate(num_drafts):
        part, one = slice(begin, begin + count), slice(row, row + 1)
        alone = Places(seeds[one], seeds[one] + 3, torch.tensor([count]), seeds[one] < 0, VOCAB)
        assert verify(alone, [distributions[row]], drafts[part], logits[part], bonus[one]) == [together[row]]
        begin += count
