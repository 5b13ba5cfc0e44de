"""The Triton kernels equal their references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ssd.kernels.fork import ForkCopy, fork_copy_reference
from vllm_ssd.kernels.lookup import look_up, look_up_reference
from vllm_ssd.kernels.noise import perturb, perturb_reference
from vllm_ssd.kernels.publish import publish, publish_reference, replace, replace_reference
from vllm_ssd.link.outcome_cache import ACCEPTED, DEPTH, EPOCH, FIRST_DRAFT, ROUND, TOKEN

CASES = settings(max_examples=1000 if DEVICE == "cuda" else 250)  # interpreted ones are slow
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([0, 1, 2, 4])


def lookup_case(seed: int, num_rows: int, num_branches: int, num_drafts: int) -> list[torch.Tensor]:
    """A table of which some entries match, some are stale in one way or another, and some are empty."""
    rng = np.random.default_rng(seed)
    num_slots = num_rows + 2
    epochs, rounds = rng.integers(1, 4, num_slots), rng.integers(0, 3, num_slots)
    last = rng.integers(0, 4, num_slots)
    sampled = rng.integers(0, num_drafts + 2, num_rows)
    entries = rng.integers(0, 1000, (num_slots, num_branches, FIRST_DRAFT + num_drafts))
    # Few values, so that parts of keys match often; no key twice in a slot, as the draft sees to.
    entries[..., EPOCH] = np.where(rng.random(entries.shape[:2]) < 0.7, epochs[:, None], epochs[:, None] - 1)
    entries[..., ROUND] = np.where(rng.random(entries.shape[:2]) < 0.7, rounds[:, None], rounds[:, None] - 1)
    keys = np.tile(np.arange(max(num_branches, 4 * (num_drafts + 1))), (num_slots, 1))
    keys = rng.permuted(keys, axis=1)[:, :num_branches]
    entries[..., TOKEN], entries[..., ACCEPTED] = np.divmod(keys, num_drafts + 1)
    entries[..., DEPTH] = rng.integers(0, num_drafts + 1, entries.shape[:2])
    slots = rng.permutation(num_slots)[:num_rows]
    slots[rng.random(num_rows) < 0.2] = -1  # padding
    return [
        torch.from_numpy(entries),
        torch.from_numpy(slots),
        torch.from_numpy(epochs),
        torch.from_numpy(rounds),
        torch.from_numpy(sampled).int(),
        torch.from_numpy(last),
        torch.full((num_rows, num_drafts), -7),
        torch.full((num_rows,), -7, dtype=torch.int32),
    ]


def assert_same_lookup(case: list[torch.Tensor]) -> torch.Tensor:
    case = [tensor.to(DEVICE) for tensor in case]
    expected = [tensor.clone() for tensor in case]
    look_up(*case, vocab_size=900)  # some drafts are no tokens of it
    look_up_reference(*expected, vocab_size=900)
    for got, wanted in zip(case, expected, strict=True):
        assert torch.equal(got, wanted)
    return case[-1]


@CASES
@given(SEEDS, SIZES, st.sampled_from([1, 3, 8, 17]), st.integers(1, 8))
def test_lookup(seed: int, num_rows: int, num_branches: int, num_drafts: int) -> None:
    assert_same_lookup(lookup_case(seed, num_rows, num_branches, num_drafts))


def test_lookup_finds_misses_and_passes_over() -> None:
    """The cases above are of all kinds."""
    found = torch.cat([assert_same_lookup(lookup_case(seed, 8, 8, 3)) for seed in range(40)])
    counts = (found + 1).bincount(minlength=2)  # misses, none or late, one draft, ...
    assert len(counts) == 5
    assert (counts > 5).all(), counts


def test_lookup_of_512_rows() -> None:
    assert_same_lookup(lookup_case(0, 512, 64, 5))


def test_lookup_without_any_branch() -> None:
    case = lookup_case(1, 6, 1, 3)
    case[0].zero_()
    assert (assert_same_lookup(case) <= 0).all()


@pytest.mark.parametrize("field", [EPOCH, ROUND, ACCEPTED, TOKEN])
def test_lookup_of_stale_entries_alone(field: int) -> None:
    case = lookup_case(1, 6, 8, 3)
    case[0][..., field] = -5
    assert (assert_same_lookup(case) <= 0).all()


@CASES
@given(SEEDS, SIZES, st.sampled_from([1, 3, 8]), st.integers(1, 8))
def test_publish_and_replace(seed: int, num_slots: int, num_branches: int, num_drafts: int) -> None:
    """Rows with and without entries, full ones among them; then other entries in place of some."""
    assert_same_publishing(seed, num_slots, num_branches, num_drafts)


def test_publish_512_rows() -> None:
    assert_same_publishing(0, 16, 64, 5)


def assert_same_publishing(seed: int, num_slots: int, num_branches: int, num_drafts: int) -> None:
    rng = np.random.default_rng(seed)
    num_entries = num_slots * num_branches
    places = rng.permutation(num_entries)[: min(num_entries, 512)]
    places[rng.random(len(places)) < 0.3] = -1
    entries = rng.integers(0, 1000, (num_slots, num_branches, FIRST_DRAFT + num_drafts))
    depths = rng.integers(0, num_drafts + 1, len(places))
    drafts = rng.integers(0, 1000, len(places))
    case = [torch.from_numpy(array).to(DEVICE) for array in (entries, places, depths, drafts)]
    expected = [tensor.clone() for tensor in case]
    for _ in range(2):
        publish(*case)
        publish_reference(*expected)
    first = int(rng.integers(0, num_entries + 1))
    count = int(rng.integers(0, num_entries - first + 1))
    new = torch.from_numpy(rng.integers(0, 1000, (count, FIRST_DRAFT + num_drafts))).to(DEVICE)
    replace(case[0], first, new)
    replace_reference(expected[0], first, new)
    for got, wanted in zip(case, expected, strict=True):
        assert torch.equal(got, wanted)


@CASES
@given(
    SEEDS, SIZES, st.sampled_from([1, 2, 7, 100, 1000, 1024, 1500]), st.sampled_from(["float32", "bfloat16"])
)
def test_perturb(seed: int, num_rows: int, vocab_size: int, dtype: str) -> None:
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices get the same cases
    logits = (torch.randn(num_rows, vocab_size, generator=generator) * 4).to(getattr(torch, dtype))
    temperatures = torch.rand(num_rows, generator=generator).where(
        torch.rand(num_rows, generator=generator) < 0.7, torch.zeros(())
    )
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator)
    positions = torch.randint(0, 2**31, (num_rows,), generator=generator)
    case = [tensor.to(DEVICE) for tensor in (logits, temperatures, seeds, positions)]
    perturbed, expected = perturb(*case), perturb_reference(*case)
    assert perturbed.shape == (num_rows, vocab_size)
    # The series for the logarithm is right to 6e-7 of the noise's argument.
    torch.testing.assert_close(perturbed, expected, rtol=2e-5, atol=2e-5)


@CASES
@given(
    SEEDS,
    st.integers(1, 4),
    st.sampled_from([0, 1, 2, 5]),
    st.sampled_from([(2, 4), (3, 1, 16), (5, 7, 24)]),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_fork_copy(seed: int, num_layers: int, num_pairs: int, block: tuple[int, ...], dtype: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (12, *block)
    caches = [
        torch.randn(shape, generator=generator).to(DEVICE, getattr(torch, dtype)) for _ in range(num_layers)
    ]
    order = torch.randperm(12, generator=generator)
    sources = order[torch.randint(0, 6, (num_pairs,), generator=generator)]  # one may be copied twice
    sources, targets = sources.to(DEVICE), order[6 : 6 + num_pairs].to(DEVICE)
    expected = [cache.clone() for cache in caches]
    ForkCopy(caches)(sources, targets)
    fork_copy_reference(expected, sources, targets)
    for got, wanted in zip(caches, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("layout", ["blocks, heads, tokens", "blocks, tokens, heads", "blocks, layers"])
def test_fork_copy_in_vllms_layouts(layout: str) -> None:
    """vLLM names a block's dimensions in one order whatever their order in memory."""
    layers, blocks, heads, tokens, size = 3, 6, 2, 4, 8
    memory = torch.arange(float(layers * blocks * heads * tokens * size), device=DEVICE)
    if layout == "blocks, layers":
        caches = list(memory.view(blocks, layers, heads, tokens, size).unbind(1))
    elif layout == "blocks, tokens, heads":
        caches = list(memory.view(layers, blocks, tokens, heads, size).transpose(2, 3).unbind(0))
    else:
        caches = list(memory.view(layers, blocks, heads, tokens, size).unbind(0))
    expected = [cache.clone() for cache in caches]
    pairs = torch.tensor([[0, 1, 0], [3, 5, 2]], device=DEVICE)
    ForkCopy(caches)(pairs[0], pairs[1])
    fork_copy_reference(expected, pairs[0], pairs[1])
    for got, wanted in zip(caches, expected, strict=True):
        assert torch.equal(got, wanted)


def test_fork_copy_refuses_what_it_cannot_copy() -> None:
    with pytest.raises(ValueError, match="alike"):
        ForkCopy([torch.zeros(4, 8), torch.zeros(4, 6)])
    with pytest.raises(ValueError, match="alike"):
        ForkCopy([torch.zeros(4, 2, 4), torch.zeros(4, 4, 2).transpose(1, 2)])
    with pytest.raises(ValueError, match="one piece"):
        ForkCopy([torch.zeros(8, 4).T])
    with pytest.raises(ValueError, match="words of 8"):
        ForkCopy([torch.zeros(4, 3)])
