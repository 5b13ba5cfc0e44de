"""Sampled output has exactly the target's law, which tests/support/laws.py computes by enumeration."""

from __future__ import annotations

import inspect
import random
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import Engines, give_draft_time, in_worker, ssd, stats
from laws import CERTAIN, FULL, Law, assert_exact, assert_rejected, p_of_all_tokens, p_of_first_tokens, sample
from transformers import LlamaForCausalLM

from vllm_ssd.target import backup as fallback
from vllm_ssd.target.proposer import Proposer
from vllm_ssd.verify import ratio
from vllm_ssd.verify.ratio import PointMass

pytestmark = pytest.mark.timeout(1200 if FULL else 240)

K = 3


@pytest.fixture(autouse=True)
def short_ngrams(monkeypatch: pytest.MonkeyPatch) -> None:
    """In such short outputs nothing longer comes again often enough to show a fault."""
    monkeypatch.setattr(fallback, "MIN_NGRAM", 1)


@pytest.fixture(scope="module")
def model(small_vocabulary_pair: tuple[Path, Path]) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(small_vocabulary_pair[0], dtype=torch.float32).eval()


def vary_drafts_time(worker: Any) -> None:
    """Outcomes at any moment: some find all drafts made, some find a few or none."""
    runner = worker.model_runner
    stock, rng = runner.propose_draft_token_ids, random.Random(0)

    def propose(*args: Any, **kwargs: Any) -> Any:
        time.sleep(rng.choice([0.0, 0.002, 0.005, 0.01, 0.02]))
        return stock(*args, **kwargs)

    runner.propose_draft_token_ids = propose


def engine(engines: Engines, pair: tuple[Path, Path], num_drafts: int = K, **options: Any) -> Any:
    """Few branches for each request of a full batch, so that hits and misses mix."""
    speculative = ssd(pair[1], num_drafts, ssd_branch_budget=12, ssd_max_rows=96, **options)
    return engines.get(pair[0], speculative, max_num_seqs=24, max_model_len=128)


TEMPERATURES = [Law(0.5), Law(1.5)]
GRAMMAR = (4, 6, 7)  # the tokens that it allows
CONSTRAINED = [
    Law(1.0, top_k=3),
    Law(1.0, top_p=0.8),
    Law(1.3, 5, 0.9),
    Law(0.7),
    Law(0.5, allowed=GRAMMAR),
]
PENALISED = [
    Law(1.0, repetition_penalty=1.5),
    Law(0.8, presence_penalty=0.7, frequency_penalty=0.4),
    Law(1.2, 6, 0.9, 0.8, -0.3, 0.2),
]
# Paths of the same options, and tests with these before and after them, share an engine.
PATHS: dict[str, tuple[list[Law], dict[str, Any]]] = {
    "coupled": (TEMPERATURES, {}),
    "coupled, top-k, top-p, grammar": (CONSTRAINED, {}),
    "coupled, penalties": (PENALISED, {}),
    "coupled, n-gram": ([Law(0.7), Law(1.3)], {"ssd_fallback": "ngram"}),
    "coupled, just in time": ([Law(0.7), Law(1.3)], {"ssd_fallback": "draft"}),
    "ratio, penalties, bfloat16": (PENALISED, {"ssd_verify": "ratio", "ssd_draft_dtype": "bfloat16"}),
    "ratio, n-gram": ([Law(0.7), Law(1.3)], {"ssd_verify": "ratio", "ssd_fallback": "ngram"}),
    "ratio, just in time": ([Law(0.7), Law(1.3)], {"ssd_verify": "ratio", "ssd_fallback": "draft"}),
    "ratio, geometric": ([Law(1.0)], {"ssd_verify": "ratio", "ssd_fanout": "geometric"}),
    "Saguaro 0.5": (TEMPERATURES, {"ssd_verify": "ratio", "ssd_saguaro_c": 0.5}),
    "Saguaro 0.1": ([Law(1.0), Law(1.0, top_k=4)], {"ssd_verify": "ratio", "ssd_saguaro_c": 0.1}),
    "ratio": (TEMPERATURES, {"ssd_verify": "ratio"}),
    "ratio, top-k, top-p, grammar": (CONSTRAINED, {"ssd_verify": "ratio"}),
}


def test_a_wrong_law_is_rejected(
    engines: Engines, small_vocabulary_pair: tuple[Path, Path], model: LlamaForCausalLM
) -> None:
    """The tests below have the power to fail."""
    llm = engine(engines, small_vocabulary_pair)
    in_worker(llm, give_draft_time)
    laws = [Law(1.0), Law(1.0, repetition_penalty=1.5)]
    plain, penalised = sample(llm, laws, 1000)
    for wrong in (Law(0.7), Law(1.3), Law(1.0, top_k=4), Law(1.0, top_p=0.8), laws[1]):
        assert p_of_first_tokens(model, plain, wrong) < CERTAIN
        assert p_of_all_tokens(model, plain, wrong) < CERTAIN
    assert p_of_all_tokens(model, plain, Law(1.1)) < CERTAIN
    assert p_of_all_tokens(model, penalised, Law(1.0)) < CERTAIN


ONLY_IF_FULL = ("ratio, geometric", "Saguaro 0.5")


@pytest.mark.parametrize("path", [path for path in PATHS if FULL or path not in ONLY_IF_FULL])
def test_exact(
    engines: Engines, small_vocabulary_pair: tuple[Path, Path], model: LlamaForCausalLM, path: str
) -> None:
    """Rows of all the path's laws in each batch; hits and misses too."""
    laws, options = PATHS[path]
    llm = engine(engines, small_vocabulary_pair, **options)
    in_worker(llm, give_draft_time)
    before = stats(llm)
    assert_exact(model, llm, laws)
    new = {name: value - before[name] for name, value in stats(llm).items() if name != "draft"}
    print(new)
    assert new["hits"] > 100
    assert new["hits"] < new["lookups"] - 100
    assert new[f"fallback_{options.get('ssd_fallback', 'none')}"] > 100


def test_the_stock_fault_shows(
    engines: Engines,
    small_vocabulary_pair: tuple[Path, Path],
    model: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With vLLM's own expansion of sampling parameters (`patch_cpu_sampling` undone) the law is wrong."""
    llm = engine(engines, small_vocabulary_pair, ssd_verify="ratio")
    in_worker(llm, give_draft_time)
    monkeypatch.delattr(in_worker(llm, lambda worker: worker.model_runner.rejection_sampler), "forward")
    assert_rejected(model, llm, [Law(0.7), Law(1.3)])


@pytest.mark.parametrize("verify", ["coupled", "ratio"])
def test_exact_with_partial_depth(
    engines: Engines, small_vocabulary_pair: tuple[Path, Path], model: LlamaForCausalLM, verify: str
) -> None:
    llm = engine(engines, small_vocabulary_pair, 7, ssd_verify=verify)
    in_worker(llm, vary_drafts_time)
    assert_exact(model, llm, [Law(0.8), Law(1.2)])
    counted = stats(llm)
    print(counted)
    assert counted["hits"] < counted["drafts_served"] < 7 * counted["hits"]


def wrong_temperature(laws: Callable[..., Any]) -> Callable[..., Any]:
    """The verifier gets q as if it had been drawn at another temperature."""

    def faulty(*args: Any) -> Any:
        found = laws(*args)
        warmed = [law**0.5 if isinstance(law, np.ndarray) else law for law in found]
        return [law / law.sum(-1, keepdims=True) if isinstance(law, np.ndarray) else law for law in warmed]

    return faulty


def greedy_acceptance(verify: Callable[..., Any]) -> Callable[..., Any]:
    """Drafts of missed rows are accepted where a greedy request would accept them."""

    def faulty(places: Any, laws: Sequence[Any], *args: Any) -> Any:
        missed = torch.tensor([isinstance(law, PointMass) for law in laws]) & (places.num_drafts > 0)
        return verify(replace(places, is_greedy=places.is_greedy | missed), laws, *args)

    return faulty


def accepting(comparison: str, verify: Callable[..., Any]) -> Callable[..., Any]:
    """The verifier with this comparison of u with p / q."""
    source = textwrap.dedent(inspect.getsource(verify))
    assert source.count(" < p.gather") == 1
    names = dict(vars(ratio))
    exec(source.replace(" < p.gather", f" {comparison} p.gather"), names)
    return names["verify"]


@pytest.mark.skipif(not FULL, reason="the bias is small: it takes many samples")
def test_drafts_that_a_grammar_lets_through_no_longer_have_the_law_q(
    engines: Engines,
    small_vocabulary_pair: tuple[Path, Path],
    model: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that they must count as point masses."""
    from vllm_ssd.target.runner_v1 import SSDModelRunner

    llm = engine(engines, small_vocabulary_pair, ssd_verify="ratio")
    in_worker(llm, give_draft_time)
    monkeypatch.setattr(SSDModelRunner, "_has_grammar", lambda runner, request_id: False)
    assert_rejected(model, llm, [Law(0.5, allowed=GRAMMAR)])


@pytest.mark.parametrize("fault", ["q of another temperature", "greedy acceptance on a miss"])
def test_a_planted_fault_is_rejected(
    engines: Engines,
    small_vocabulary_pair: tuple[Path, Path],
    model: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    llm = engine(engines, small_vocabulary_pair, ssd_verify="ratio", ssd_fallback="ngram")
    in_worker(llm, give_draft_time)
    if fault == "q of another temperature":
        monkeypatch.setattr(Proposer, "laws", wrong_temperature(Proposer.laws))
    else:
        monkeypatch.setattr(ratio, "verify", greedy_acceptance(ratio.verify))
    assert_rejected(model, llm, [Law(0.7), Law(1.3)])


@pytest.mark.parametrize("comparison", ["<", "<="])
def test_a_token_that_cannot_be_is_not_accepted_by_u_of_zero(
    engines: Engines,
    small_vocabulary_pair: tuple[Path, Path],
    model: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    comparison: str,
) -> None:
    """Our u is never 0; with one that sometimes is, `<=` lets tokens through that top-k forbids."""
    llm = engine(engines, small_vocabulary_pair, ssd_verify="ratio", ssd_fallback="ngram")
    in_worker(llm, give_draft_time)
    law, stock = Law(1.0, top_k=2), ratio.uniform

    def sometimes_zero(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        u = stock(seeds, positions)
        return torch.where(u < 0.2, torch.zeros_like(u), u)

    monkeypatch.setattr(ratio, "uniform", sometimes_zero)
    monkeypatch.setattr(ratio, "verify", accepting(comparison, ratio.verify))
    (samples,) = sample(llm, [law], 600)
    laws = law.next_tokens(model, samples)
    chosen = np.take_along_axis(laws, np.array(samples)[..., None], axis=-1)
    assert (chosen <= 0).any() == (comparison == "<=")
