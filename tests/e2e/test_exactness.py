"""Sampled output has exactly the target's distribution, as tests/support/distributions.py enumerates it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributions import (
    CERTAIN,
    FULL,
    Distribution,
    assert_exact,
    assert_rejected,
    p_of_all_tokens,
    p_of_first_tokens,
    sample,
)
from engines import Engines, await_draft, in_worker, ssd, stats, vary_depth
from transformers import LlamaForCausalLM

from vllm_ssd.target import backup, served_probs
from vllm_ssd.target.served_probs import ServedProbs
from vllm_ssd.verify import ratio
from vllm_ssd.verify.ratio import PointMass

pytestmark = pytest.mark.timeout(1200 if FULL else 240)

K = 3


@pytest.fixture(autouse=True)
def many_backups(monkeypatch: pytest.MonkeyPatch) -> None:
    """In such short outputs longer n-grams come again too seldom to show a fault. No draft is late."""
    monkeypatch.setattr(backup, "MIN_NGRAM", 1)
    monkeypatch.setattr(backup, "PATIENCE", math.inf)
    monkeypatch.setattr(backup, "MOST_PATIENCE_S", 60.0)
    monkeypatch.setattr(served_probs, "DEADLINE_S", 20.0)


@pytest.fixture(scope="module")
def model(small_vocabulary_pair: tuple[Path, Path]) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(small_vocabulary_pair[0], dtype=torch.float32).eval()


def engine(
    engines: Engines,
    pair: tuple[Path, Path],
    num_drafts: int = K,
    ssd_backup: str = "none",
    **options: Any,
) -> Any:
    """Few branches for each request of a full batch, so that hits and misses mix.

    Paths that differ in the backup alone share an engine, which has all of them.
    """
    few = {"ssd_branch_budget": 12, "ssd_max_rows": 96}
    speculative = ssd(pair[1], num_drafts, ssd_backup="auto", **few, **options)
    llm = engines.get(pair[0], speculative, max_num_seqs=24, max_model_len=128)
    in_worker(llm, partial(use_backup, name=ssd_backup))
    return llm


def use_backup(worker: Any, name: str) -> None:
    proposer = worker.model_runner.proposer.proposer  # within its guard
    if not hasattr(worker, "backups"):
        auto = proposer._backup
        worker.backups = {"none": backup.NoBackup(), "ngram": auto._ngram, "draft": auto._just_in_time}
    proposer._backup = worker.backups[name]


TEMPERATURES = [Distribution(0.5), Distribution(1.5)]
GRAMMAR = (4, 6, 7)  # the tokens that it allows
CONSTRAINED = [
    Distribution(1.0, top_k=3),
    Distribution(1.0, top_p=0.8),
    Distribution(1.3, 5, 0.9),
    Distribution(0.7),
    Distribution(0.5, allowed=GRAMMAR),
]
PENALISED = [
    Distribution(1.0, repetition_penalty=1.5),
    Distribution(0.8, presence_penalty=0.7, frequency_penalty=0.4),
    Distribution(1.2, 6, 0.9, 0.8, -0.3, 0.2),
]
# Paths of the same options but for the backup, and tests with these before and after them, share an engine.
PATHS: dict[str, tuple[list[Distribution], dict[str, Any]]] = {
    "coupled": (TEMPERATURES, {}),
    "coupled, top-k, top-p, grammar": (CONSTRAINED, {}),
    "coupled, penalties": (PENALISED, {}),
    "coupled, n-gram": ([Distribution(0.7), Distribution(1.3)], {"ssd_backup": "ngram"}),
    "coupled, just in time": ([Distribution(0.7), Distribution(1.3)], {"ssd_backup": "draft"}),
    "ratio, penalties, bfloat16": (PENALISED, {"ssd_verify": "ratio", "ssd_draft_dtype": "bfloat16"}),
    "ratio, geometric": ([Distribution(1.0)], {"ssd_verify": "ratio", "ssd_fanout": "geometric"}),
    "Saguaro 0.5": (TEMPERATURES, {"ssd_verify": "ratio", "ssd_saguaro_c": 0.5}),
    "Saguaro 0.1": (
        [Distribution(1.0), Distribution(1.0, top_k=4)],
        {"ssd_verify": "ratio", "ssd_saguaro_c": 0.1},
    ),
    "ratio": ([*TEMPERATURES, Distribution(1.0, prompt=(5,))], {"ssd_verify": "ratio"}),
    "ratio, top-k, top-p, grammar": (CONSTRAINED, {"ssd_verify": "ratio"}),
    "ratio, n-gram": ([Distribution(0.7), Distribution(1.3)], {"ssd_verify": "ratio", "ssd_backup": "ngram"}),
    "ratio, just in time": (
        [Distribution(0.7), Distribution(1.3)],
        {"ssd_verify": "ratio", "ssd_backup": "draft"},
    ),
}


def test_a_wrong_distribution_is_rejected(
    engines: Engines, small_vocabulary_pair: tuple[Path, Path], model: LlamaForCausalLM
) -> None:
    """The tests below have the power to fail."""
    llm = engine(engines, small_vocabulary_pair)
    in_worker(llm, await_draft)
    distributions = [Distribution(1.0), Distribution(1.0, repetition_penalty=1.5)]
    plain, penalised = sample(llm, distributions, 1000)
    plain += sample(llm, distributions[:1], 1500)[0]  # of 1,000 a third showed no 1.1
    for wrong in (
        Distribution(0.7),
        Distribution(1.3),
        Distribution(1.0, top_k=4),
        Distribution(1.0, top_p=0.8),
        distributions[1],
    ):
        assert p_of_first_tokens(model, plain, wrong) < CERTAIN
        assert p_of_all_tokens(model, plain, wrong) < CERTAIN
    assert p_of_all_tokens(model, plain, Distribution(1.1)) < CERTAIN
    assert p_of_all_tokens(model, penalised, Distribution(1.0)) < CERTAIN


ONLY_IF_FULL = ("ratio, geometric", "Saguaro 0.5")


@pytest.mark.parametrize("path", [path for path in PATHS if FULL or path not in ONLY_IF_FULL])
def test_exact(
    engines: Engines, small_vocabulary_pair: tuple[Path, Path], model: LlamaForCausalLM, path: str
) -> None:
    """Rows of all the path's distributions in each batch; hits and misses too."""
    distributions, options = PATHS[path]
    llm = engine(engines, small_vocabulary_pair, **options)
    in_worker(llm, await_draft)
    before = stats(llm)
    assert_exact(model, llm, distributions)
    new = {name: value - before[name] for name, value in stats(llm).items() if name != "draft"}
    print(new)
    assert new["hits"] > 100
    assert new["hits"] < new["lookups"] - 100
    assert new["draft_probs_late"] == 0
    assert new[f"backup_{options.get('ssd_backup', 'none')}"] > 100


def test_the_stock_fault_shows(
    engines: Engines,
    small_vocabulary_pair: tuple[Path, Path],
    model: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With vLLM's own expansion of parameters (`patch_cpu_sampling` undone) the distribution is wrong."""
    llm = engine(engines, small_vocabulary_pair, ssd_verify="ratio")
    in_worker(llm, await_draft)
    monkeypatch.delattr(in_worker(llm, lambda worker: worker.model_runner.rejection_sampler), "forward")
    assert_rejected(model, llm, [Distribution(0.7), Distribution(1.3)])


def wrong_temperature(read: Callable[..., Any]) -> Callable[..., Any]:
    """The verifier gets q as if it had been drawn at another temperature."""

    def faulty(*args: Any) -> Any:
        found = read(*args)
        warmed = [
            distribution**0.5 if isinstance(distribution, np.ndarray) else distribution
            for distribution in found
        ]
        return [
            distribution / distribution.sum(-1, keepdims=True)
            if isinstance(distribution, np.ndarray)
            else distribution
            for distribution in warmed
        ]

    return faulty


def greedy_acceptance(verify: Callable[..., Any]) -> Callable[..., Any]:
    """Drafts of missed rows are accepted where a greedy request would accept them."""

    def faulty(places: Any, distributions: Sequence[Any], *args: Any) -> Any:
        missed = torch.tensor([isinstance(distribution, PointMass) for distribution in distributions]) & (
            places.num_drafts > 0
        )
        return verify(replace(places, is_greedy=places.is_greedy | missed), distributions, *args)

    return faulty


@pytest.mark.skipif(not FULL, reason="the bias is small: it takes many samples")
def test_drafts_that_a_grammar_lets_through_no_longer_have_the_distribution_q(
    engines: Engines,
    small_vocabulary_pair: tuple[Path, Path],
    model: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that they must count as point masses."""
    from vllm_ssd.target.runner_v1 import SSDModelRunner

    llm = engine(engines, small_vocabulary_pair, ssd_verify="ratio")
    in_worker(llm, await_draft)
    monkeypatch.setattr(SSDModelRunner, "_has_grammar", lambda runner, request_id: False)
    assert_rejected(model, llm, [Distribution(0.5, allowed=GRAMMAR)])


@pytest.mark.parametrize("fault", ["q of another temperature", "greedy acceptance on a miss"])
def test_a_planted_fault_is_rejected(
    engines: Engines,
    small_vocabulary_pair: tuple[Path, Path],
    model: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    llm = engine(engines, small_vocabulary_pair, ssd_verify="ratio", ssd_backup="ngram")
    in_worker(llm, await_draft)
    if fault == "q of another temperature":
        monkeypatch.setattr(ServedProbs, "read", wrong_temperature(ServedProbs.read))
    else:
        monkeypatch.setattr(ratio, "verify", greedy_acceptance(ratio.verify))
    assert_rejected(model, llm, [Distribution(0.7), Distribution(1.3)])


@pytest.mark.parametrize("verify", ["coupled", "ratio"])
def test_exact_with_partial_depth(
    engines: Engines, small_vocabulary_pair: tuple[Path, Path], model: LlamaForCausalLM, verify: str
) -> None:
    llm = engine(engines, small_vocabulary_pair, 7, ssd_verify=verify)
    in_worker(llm, vary_depth)
    assert_exact(model, llm, [Distribution(0.8), Distribution(1.2)])
    counted = stats(llm)
    print(counted)
    assert counted["hits"] < counted["drafts_served"] < 7 * counted["hits"]
