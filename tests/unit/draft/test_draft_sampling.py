"""Drafts chosen from logits: the noise that is shared, distributions, and what stays greedy."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from vllm_ssd.draft.rows import RowSampling
from vllm_ssd.draft.sampling import DraftSampler, saguaro
from vllm_ssd.verify.noise import gumbel

VOCAB = 40
LOGITS = 3 * torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
SEEDS, POSITIONS = torch.tensor([5, 6, 2**62]), torch.tensor([7, 7, 900])


@cache  # and not at import: vLLM's search for kernels, which another test calls, trips over Numba
def noise() -> torch.Tensor:
    return gumbel(SEEDS, POSITIONS, VOCAB)


def sampling(temperatures: list[float], top_k: int = 0) -> RowSampling:
    return RowSampling(
        np.array(temperatures, dtype=np.float32),
        SEEDS.numpy(),
        np.array([top_k, 0, 0], dtype=np.int32),
        np.ones(3, dtype=np.float32),
    )


@pytest.mark.parametrize("temperatures", [[0.5, 0.0, 1.5], [0.5, 1.0, 1.5]])
def test_coupled_drafts_have_the_shared_noise_where_they_are_sampled(temperatures: list[float]) -> None:
    sampler = DraftSampler(VOCAB, torch.device("cpu"), is_coupled=True)
    chosen = sampler.choose(LOGITS.clone(), sampler.prepare(sampling(temperatures)), POSITIONS)
    for row, temperature in enumerate(temperatures):
        expected = LOGITS[row] / temperature + noise()[row] if temperature else LOGITS[row]
        torch.testing.assert_close(chosen.logits[row], expected)
        assert chosen.drafts[row] == expected.argmax()
    assert chosen.distributions is None


def test_rows_are_prepared_for_all_the_steps_they_go_on() -> None:
    sampler = DraftSampler(VOCAB, torch.device("cpu"), is_coupled=True)
    rows = sampler.prepare(sampling([1.0, 0.0, 1.0]))
    first = sampler.choose(LOGITS.clone(), rows, POSITIONS).logits.clone()
    sampler.choose(LOGITS.clone(), rows, POSITIONS + 1)
    assert torch.equal(sampler.choose(LOGITS.clone(), rows, POSITIONS).logits, first)


def test_the_targets_restrictions_are_the_drafts() -> None:
    sampler = DraftSampler(VOCAB, torch.device("cpu"), is_coupled=True)
    chosen = sampler.choose(LOGITS.clone(), sampler.prepare(sampling([1.0, 1.0, 1.0], top_k=2)), POSITIONS)
    allowed = LOGITS[0].topk(2).indices
    perturbed = LOGITS[0] + noise()[0]
    torch.testing.assert_close(chosen.logits[0, allowed], perturbed[allowed])
    # The target may allow other tokens: those are candidates too, after all that the draft allows.
    forbidden = [token for token in perturbed.argsort(descending=True).tolist() if token not in allowed]
    assert chosen.logits[0].argsort(descending=True).tolist()[2:] == forbidden
    assert chosen.logits[0, allowed].min() > chosen.logits[0, forbidden].max() + 50
    torch.testing.assert_close(chosen.logits[1:], LOGITS[1:] + noise()[1:])


def test_a_distribution_holds_nothing_that_is_forbidden() -> None:
    sampler = DraftSampler(VOCAB, torch.device("cpu"), is_coupled=False)
    chosen = sampler.choose(LOGITS.clone(), sampler.prepare(sampling([1.0, 1.0, 1.0], top_k=2)), POSITIONS)
    assert chosen.distributions is not None
    assert np.flatnonzero(chosen.distributions[0]).tolist() == sorted(LOGITS[0].topk(2).indices.tolist())
    assert chosen.drafts[0] in LOGITS[0].topk(2).indices


def test_drawn_drafts_come_with_the_distribution_they_were_drawn_from() -> None:
    sampler = DraftSampler(VOCAB, torch.device("cpu"), is_coupled=False, saguaro_c=0.5, saguaro_tokens=3)
    chosen = sampler.choose(LOGITS.clone(), sampler.prepare(sampling([0.5, 0.0, 1.5])), POSITIONS)
    plain = (LOGITS / torch.tensor([[0.5], [1.0], [1.5]])).softmax(dim=-1)
    distributions = saguaro(plain, 3, 0.5)
    distributions[1] = plain[1]
    assert chosen.distributions is not None
    torch.testing.assert_close(torch.from_numpy(chosen.distributions), distributions)
    drawn = (distributions.log() + noise()).argmax(dim=-1)
    assert chosen.drafts.tolist() == [drawn[0], LOGITS[1].argmax(), drawn[2]]


def test_without_sampling_the_likeliest_is_the_draft() -> None:
    sampler = DraftSampler(VOCAB, torch.device("cpu"), is_coupled=True)
    chosen = sampler.choose(LOGITS, None, POSITIONS)
    assert chosen.drafts.tolist() == LOGITS.argmax(dim=-1).tolist()
