"""The exact distribution of sampled output on a model of few tokens, by enumeration, and tests against it.

With VLLM_SSD_FULL=1 each path is sampled 20,000 times and may be rejected at p < 0.001 over all tests;
that takes half an hour on two cores.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engines import generate
from scipy.stats import chisquare
from tiny_models import NUM_SPECIAL, SYMBOLS
from transformers import LlamaForCausalLM

FULL = os.environ.get("VLLM_SSD_FULL") == "1"
VOCAB = 8
PROMPT = (2, 5, 3, 7, 2, 5, 3)
NUM_TOKENS, NUM_ENUMERATED = 7, 3
NUM_SAMPLES = 20_000 if FULL else 1_600  # of each path, over its distributions
NUM_TESTS = 100  # statistical tests in all, at most
REJECT = 1e-3 / NUM_TESTS if FULL else 1e-3
CERTAIN = 1e-6

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Distribution:
    """The target's distribution of each next token, as the sampling parameters shape it."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    allowed: tuple[int, ...] = ()  # tokens, by a grammar; none: all
    prompt: tuple[int, ...] = PROMPT

    @torch.inference_mode()
    def next_tokens(self, model: LlamaForCausalLM, outputs: Sequence[Sequence[int]]) -> Float64Array:
        """[outputs, length, VOCAB]: distribution of each output token, after the prompt and those before."""
        sequences = np.array([[*self.prompt, *output] for output in outputs])
        logits = (
            model(input_ids=torch.tensor(sequences)).logits.double().numpy()[:, len(self.prompt) - 1 : -1]
        )
        logits = self._penalised(logits, sequences) / self.temperature
        if self.allowed:
            logits[..., [token for token in range(VOCAB) if token not in self.allowed]] = -np.inf
        order = np.argsort(-logits, axis=-1)
        rank = np.argsort(order, axis=-1)
        if self.top_k:
            logits = np.where(rank < self.top_k, logits, -np.inf)
        distribution = np.exp(logits - logits.max(axis=-1, keepdims=True))
        distribution /= distribution.sum(axis=-1, keepdims=True)
        likeliest_first = np.take_along_axis(distribution, order, axis=-1)
        before = np.cumsum(likeliest_first, axis=-1) - likeliest_first
        distribution = np.where(np.take_along_axis(before, rank, axis=-1) < self.top_p, distribution, 0.0)
        return distribution / distribution.sum(axis=-1, keepdims=True)

    def _penalised(self, logits: Float64Array, sequences: npt.NDArray[np.int64]) -> Float64Array:
        """As vLLM defines the three penalties: repetition counts the prompt, the others do not."""
        once = np.eye(VOCAB)[sequences]
        in_prompt, output = np.split(once, [len(self.prompt)], axis=1)
        in_prompt = in_prompt.max(axis=1, keepdims=True)
        seen = output.cumsum(axis=1) - output  # times, before each position
        is_repeated = np.maximum(in_prompt, seen) > 0
        factor = np.where(logits > 0, 1 / self.repetition_penalty, self.repetition_penalty)
        logits = np.where(is_repeated, logits * factor, logits)
        return logits - self.frequency_penalty * seen - self.presence_penalty * (seen > 0)

    def sampling_params(self) -> Any:
        """What a request of this distribution asks for."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        options = asdict(self)
        allowed, _ = options.pop("allowed"), options.pop("prompt")
        if allowed:
            characters = "".join(SYMBOLS[token - NUM_SPECIAL] for token in allowed)
            regex = f"[{re.escape(characters)}]{{{NUM_TOKENS}}}"
            options["structured_outputs"] = StructuredOutputsParams(regex=regex)
        return SamplingParams(**options, max_tokens=NUM_TOKENS, ignore_eos=True)

    def of_first_tokens(self, model: LlamaForCausalLM) -> dict[tuple[int, ...], float]:
        """The joint distribution of the first tokens, by enumeration."""
        outputs = list(itertools.product(range(VOCAB), repeat=NUM_ENUMERATED))
        return {
            tokens: float(np.prod([distribution[i, token] for i, token in enumerate(tokens)]))
            for tokens, distribution in zip(outputs, self.next_tokens(model, outputs), strict=True)
        }


def pearson(observed: Sequence[float], expected: Sequence[float]) -> float:
    """p of the chi-square test; cells with few expected are merged, impossible ones must be empty."""
    pairs = sorted(zip(expected, observed, strict=True))
    if any(count for mean, count in pairs if mean < 1e-9):
        return 0.0
    cells: list[list[float]] = [[0.0, 0.0]]
    for mean, count in pairs:
        if cells[-1][0] >= 8:
            cells.append([0.0, 0.0])
        cells[-1][0] += mean
        cells[-1][1] += count
    means, counts = np.array(cells).T
    return float(chisquare(counts, means * counts.sum() / means.sum()).pvalue)


def p_of_first_tokens(model: LlamaForCausalLM, samples: list[list[int]], distribution: Distribution) -> float:
    joint = distribution.of_first_tokens(model)
    counts = dict.fromkeys(joint, 0)
    for sample in samples:
        counts[tuple(sample[:NUM_ENUMERATED])] += 1
    return pearson([counts[tokens] for tokens in joint], [len(samples) * p for p in joint.values()])


def p_of_all_tokens(model: LlamaForCausalLM, samples: list[list[int]], distribution: Distribution) -> float:
    """All tokens of all positions, and neighbours jointly.

    Each token becomes a number that is uniform and independent of the others if the distribution is right: a
    random point of the token's interval, where the tokens' probabilities lie side by side, likeliest first.
    """
    distributions = distribution.next_tokens(model, samples)
    tokens = np.array(samples)[..., None]
    chosen = np.take_along_axis(distributions, tokens, axis=-1)
    before = np.where(distributions > chosen, distributions, 0.0).sum(axis=-1)
    points = before + np.random.default_rng(0).random(before.shape) * chosen[..., 0]
    cells = np.minimum((points * 6).astype(int), 5)
    if (chosen <= 0).any():
        return 0.0
    pairs = np.bincount((cells[:, :-1] * 6 + cells[:, 1:]).ravel(), minlength=36)
    fine = np.histogram(points, 48, (0, 1))[0]
    return 2 * min(float(chisquare(pairs).pvalue), float(chisquare(fine).pvalue))


def sample(llm: Any, distributions: Sequence[Distribution], count: int) -> list[list[list[int]]]:
    """[distributions][count][NUM_TOKENS]: samples of each distribution, all in the same batches."""
    params = [distribution.sampling_params() for distribution in distributions]
    outputs = generate(
        llm, [list(distribution.prompt) for distribution in distributions] * count, params * count
    )
    return [outputs[index :: len(distributions)] for index in range(len(distributions))]


def p_values(
    model: LlamaForCausalLM, llm: Any, distributions: Sequence[Distribution], count: int
) -> dict[Any, float]:
    """Of new samples, two tests for each distribution."""
    return {
        (distribution, test.__name__): test(model, samples, distribution)
        for distribution, samples in zip(distributions, sample(llm, distributions, count), strict=True)
        for test in (p_of_first_tokens, p_of_all_tokens)
    }


def assert_exact(
    model: LlamaForCausalLM, llm: Any, distributions: Sequence[Distribution], num_samples: int = NUM_SAMPLES
) -> None:
    """Not rejected; or if by chance, then (but in the full run) not again on new samples."""
    for attempt in (1,) if FULL else (1, 2):
        found = p_values(model, llm, distributions, num_samples // len(distributions))
        print(attempt, found)
        if min(found.values()) >= REJECT:
            return
    pytest.fail(f"rejected: {found}")


def assert_rejected(
    model: LlamaForCausalLM, llm: Any, distributions: Sequence[Distribution], num_samples: int = NUM_SAMPLES
) -> None:
    found = p_values(model, llm, distributions, num_samples // len(distributions))
    print(found)
    assert min(found.values()) < CERTAIN
