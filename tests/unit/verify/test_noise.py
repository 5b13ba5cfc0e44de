"""The keyed noise: the V2 sampler's integers, Gumbel's distribution, and independence of places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, gumbel_r, kstest

from vllm_ssd.verify import noise
from vllm_ssd.verify.noise import RecentNoise, _uniform, accept_seeds, draft_seed, gumbel, uniform

WORD = 0xFFFFFFFF


def murmur3(words: list[int]) -> int:
    """MurmurHash3 (x86, 32 bits, seed 0) of whole words, in Python's integers."""
    state = 0
    for word in words:
        key = word * 0xCC9E2D51 & WORD
        key = (key << 15 | key >> 17) & WORD
        state ^= key * 0x1B873593 & WORD
        state = (state << 13 | state >> 19) & WORD
        state = (state * 5 + 0xE6546B64) & WORD
    state ^= 4 * len(words)
    state = (state ^ state >> 16) * 0x85EBCA6B & WORD
    state = (state ^ state >> 13) * 0xC2B2AE35 & WORD
    return state ^ state >> 16


def test_integers_are_murmur3() -> None:
    seeds, positions, vocab_size = [0, 1, -1, 2**63 - 1, 123456789012345], [0, 7, 100, 2**31, 5], 300
    numbers = _uniform(torch.tensor(seeds), torch.tensor(positions), vocab_size)
    for row, seed, position in zip(numbers, seeds, positions, strict=True):
        hashes = [murmur3([seed & WORD, seed >> 32 & WORD, position, token]) for token in range(vocab_size)]
        expected = (np.array(hashes) + 0.5) / 2**32
        assert row.numpy() == pytest.approx(expected, rel=1e-7, abs=0)


def test_the_least_and_the_greatest_hash() -> None:
    """These seeds' first hashes are 0 and 2**32 - 3, which in float32 would be 1, and its noise infinite."""
    seeds, positions = torch.tensor([1460908073, 883312512]), torch.zeros(2, dtype=torch.int64)
    assert uniform(seeds, positions).tolist() == [2.0**-33, 1 - 2.0**-24]
    assert gumbel(seeds, positions, 1).isfinite().all()


def test_the_reference_of_the_kernel_is_the_same_noise() -> None:
    from vllm_ssd.kernels.noise import gumbel_reference  # only now: vLLM's search for kernels trips over ours

    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789012345])
    positions = torch.tensor([0, 7, 100, 2**31 - 1, 5, 5])
    assert torch.equal(gumbel(seeds, positions, 1000), gumbel_reference(seeds, positions, 1000))


def test_noise_is_gumbel() -> None:
    seeds = torch.arange(400) * 1_000_003
    noise = gumbel(seeds, torch.arange(400) % 7, 500)
    assert noise.shape == (400, 500)
    assert noise.isfinite().all()
    assert kstest(noise.flatten().numpy(), gumbel_r.cdf).pvalue > 1e-4


@pytest.mark.parametrize("by", ["seed", "position"])
def test_argmax_is_an_exact_sample(by: str) -> None:
    count = 40_000
    distribution = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.049, 0.001])
    varied, fixed = torch.arange(count), torch.full((count,), 11)
    noise = gumbel(varied, fixed, 6) if by == "seed" else gumbel(fixed, varied, 6)
    samples = (distribution.log() + noise).argmax(dim=-1)
    counts = np.bincount(samples, minlength=6)
    assert (
        chisquare(counts, count * distribution.double().numpy() / distribution.double().sum().item()).pvalue
        > 1e-4
    )
    pairs = np.bincount(samples[:-1] * 6 + samples[1:], minlength=36)  # neighbours are independent
    expected = np.outer(counts, counts).ravel() / count
    usual = expected > 5
    assert chisquare(pairs[usual], expected[usual] * pairs[usual].sum() / expected[usual].sum()).pvalue > 1e-4


def test_noise_depends_on_the_place_alone() -> None:
    places = torch.tensor([3, 9, 4]), torch.tensor([5, 5, 6])
    together = gumbel(*places, 50)
    for i in range(3):
        assert torch.equal(gumbel(places[0][i : i + 1], places[1][i : i + 1], 50)[0], together[i])
    assert torch.equal(gumbel(*places, 30), together[:, :30])


def test_remembered_noise_is_the_same() -> None:
    recent = RecentNoise(50)
    seeds, positions = [3, 9, 3, 3], [5, 5, 6, 80]
    for _ in range(2):
        assert torch.equal(recent(seeds, positions), gumbel(torch.tensor(seeds), torch.tensor(positions), 50))


def test_more_requests_than_are_remembered_cost_their_own_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []

    def counted(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
        rows.append(len(seeds))
        return gumbel(seeds, positions, vocab_size)

    monkeypatch.setattr(noise, "gumbel", counted)
    monkeypatch.setattr(noise, "_REMEMBERED_BYTES", 0)
    recent, seeds, positions = RecentNoise(50), list(range(20)), [7, 8] * 10
    for _ in range(3):
        assert torch.equal(recent(seeds, positions), gumbel(torch.tensor(seeds), torch.tensor(positions), 50))
    assert rows == [20, 20, 20]


def test_no_two_rounds_have_the_same_noise() -> None:
    """Neighbouring seeds (of one request's several samples, say) with neighbouring epochs included."""
    seeds = [*range(40), *range(-20, 0), *(2**62 + i for i in range(20))]
    keys = {draft_seed(seed, epoch, round_) for seed in seeds for epoch in range(40) for round_ in range(40)}
    assert len(keys) == len(seeds) * 40 * 40


def test_streams_of_one_seed_are_independent() -> None:
    """The draft's noise of each round, the numbers that accept, and the target's own noise."""
    seeds, positions = torch.arange(20_000), torch.full((20_000,), 9)
    drafts = [torch.tensor([draft_seed(seed, 1, round_) for seed in seeds.tolist()]) for round_ in (0, 1, 2)]
    streams = [uniform(s, positions) for s in (seeds, accept_seeds(seeds), *drafts)]
    for i, first in enumerate(streams):
        assert kstest(first.numpy(), "uniform").pvalue > 1e-4
        for second in streams[:i]:
            cells = np.histogram2d(first.numpy(), second.numpy(), bins=8, range=[[0, 1], [0, 1]])[0]
            assert chisquare(cells.ravel()).pvalue > 1e-4
