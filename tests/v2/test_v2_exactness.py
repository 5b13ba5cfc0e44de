"""Ratio verification under vLLM's V2 runner has the target's distribution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributions import Distribution, assert_exact, assert_rejected
from engines import Engines, await_draft, in_worker, ssd, stats
from transformers import LlamaForCausalLM

from vllm_ssd.target import runner_v2, served_probs
from vllm_ssd.verify.ratio import PointMass

# Where vLLM's kernels hang in the interpreter, a test must still end.
pytestmark = pytest.mark.timeout(300)

Pair = tuple[Path, Path]
NUM_SAMPLES = 200


@pytest.fixture(scope="module")
def model(small_vocabulary_pair: Pair) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(small_vocabulary_pair[0], dtype=torch.float32).eval()


def test_ratio_is_exact(
    engines: Engines, small_vocabulary_pair: Pair, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows that are filled up."""
    monkeypatch.setattr(served_probs, "DEADLINE_S", 20.0)
    llm = small_engine(engines, small_vocabulary_pair)
    in_worker(llm, await_draft)
    assert_exact(model, llm, [Distribution(0.7), Distribution(1.2)], NUM_SAMPLES)
    counted = stats(llm)
    print(counted)
    assert 100 < counted["hits"] < counted["lookups"] - 100
    assert counted["draft_probs_late"] == 0


def test_ratio_with_a_wrong_distribution_is_rejected(
    engines: Engines, small_vocabulary_pair: Pair, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above has the power to fail."""
    llm = small_engine(engines, small_vocabulary_pair)
    stock = runner_v2.distribution_as_logits

    def of_another_token(distribution: Any, drafts: Sequence[int], *args: Any) -> torch.Tensor:
        return stock(PointMass(), [(token + 1) % 8 for token in drafts], *args)

    monkeypatch.setattr(runner_v2, "distribution_as_logits", of_another_token)
    assert_rejected(model, llm, [Distribution(0.7)], 140)


def small_engine(engines: Engines, pair: Pair) -> Any:
    """Few branches for each request of a full batch, so that hits and misses mix; Saguaro sampling too."""
    speculative = ssd(
        pair[1],
        3,
        ssd_branch_budget=12,
        ssd_max_rows=96,
        ssd_verify="ratio",
        ssd_saguaro_c=0.5,
        ssd_backup="ngram",
    )
    return engines.get(pair[0], speculative, max_num_seqs=24, max_model_len=128)
