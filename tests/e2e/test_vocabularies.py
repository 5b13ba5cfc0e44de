"""Target and draft with one tokenizer, whose embeddings are padded to different sizes."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from distributions import FULL, Distribution, assert_exact
from engines import (
    Engines,
    await_draft,
    generate,
    give_up_draft,
    greedy_params,
    in_worker,
    metric,
    ssd,
    stats,
)
from tiny_models import write_padded_pair
from transformers import LlamaForCausalLM

from vllm_ssd.target import backup, served_probs

pytestmark = pytest.mark.timeout(1200 if FULL else 240)

Pair = tuple[Path, Path]

LARGER, SMALLER = 512, 448  # an eighth of the tokens are of one model alone
NUM_TOKENS = 40


@pytest.fixture(autouse=True)
def nobody_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "PATIENCE", math.inf)
    monkeypatch.setattr(backup, "MOST_PATIENCE_S", 60.0)
    monkeypatch.setattr(served_probs, "DEADLINE_S", 20.0)


@pytest.fixture(scope="module", params=[(LARGER, SMALLER), (SMALLER, LARGER)], ids=["smaller", "larger"])
def padded_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """(target, draft), by the draft's size."""
    return write_padded_pair(tmp_path_factory.mktemp("padded"), *request.param, agreement=0.5)


@pytest.fixture(scope="module", params=[(8, 6), (8, 12)], ids=["smaller", "larger"])
def few_tokens(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same, where the target has as many tokens as `distributions` enumerates."""
    folder = tmp_path_factory.mktemp("few")
    return write_padded_pair(folder, *request.param, agreement=0.3, sharpness=1.5)


def prompts(vocab_size: int) -> list[list[int]]:
    rng = random.Random(31)
    return [[rng.randrange(2, vocab_size) for _ in range(length)] for length in (1, 5, 33, 70, 8, 16)]


def params(vocab_size: int) -> list[Any]:
    """Of one request all tokens, of another about half are those that only the larger model has."""
    last = list(range(vocab_size - 40, vocab_size))
    return [
        *[greedy_params(NUM_TOKENS)] * 3,
        greedy_params(NUM_TOKENS, presence_penalty=0.5),
        greedy_params(NUM_TOKENS, allowed_token_ids=last),
        greedy_params(NUM_TOKENS, allowed_token_ids=[*range(2, 42), *last]),
    ]


def seeded_params(vocab_size: int) -> list[Any]:
    """Also a `top_k` that is less than the target's tokens, and perhaps more than the draft's."""
    from vllm import SamplingParams

    kinds = [{}, {"temperature": 0.6}, {"top_k": vocab_size - 1}, {"top_p": 0.9}, {"top_k": 20}, {}]
    common = {"temperature": 1.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    return [SamplingParams(**(common | kind), seed=100 + i) for i, kind in enumerate(kinds)]


def vocab_size_of(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])


@pytest.fixture(scope="module")
def reference(engines: Engines, padded_pair: Pair) -> list[list[int]]:
    size = vocab_size_of(padded_pair[0])
    return generate(engines.get(padded_pair[0]), prompts(size), params(size))


@pytest.mark.parametrize("ssd_backup", ["none", "ngram", "draft"])
def test_identical(engines: Engines, padded_pair: Pair, reference: list[list[int]], ssd_backup: str) -> None:
    size = vocab_size_of(padded_pair[0])
    llm = engines.get(padded_pair[0], ssd(padded_pair[1], 4, ssd_backup=ssd_backup))
    in_worker(llm, await_draft)
    assert generate(llm, prompts(size), params(size)) == reference
    counted = stats(llm)
    print(counted)
    num_beyond = sum(token >= SMALLER for row in reference for token in row)
    assert num_beyond > 50 if size == LARGER else num_beyond == 0
    assert 20 < counted["hits"] <= counted["lookups"] - num_beyond
    assert counted["draft"]["dropped"] == counted["failures"] == 0


def test_a_seed_gives_the_same_tokens_without_the_draft(engines: Engines, padded_pair: Pair) -> None:
    """The noise of a token is the same for both, however many others each has."""
    size = vocab_size_of(padded_pair[0])
    llm = engines.get(padded_pair[0], ssd(padded_pair[1], 4))
    in_worker(llm, await_draft)
    outputs = generate(llm, prompts(size), seeded_params(size))
    counted = stats(llm)
    print(counted)
    # A draft with noise of its own would guess the next of some 400 tokens about once in a hundred times.
    assert counted["draft"]["dropped"] == 0
    assert accepted(llm) > 0.2 * sum(map(len, outputs))
    in_worker(llm, give_up_draft)
    assert generate(llm, prompts(size), seeded_params(size)) == outputs
    engines.close()


def accepted(llm: Any) -> float:
    return float(metric(llm, "vllm:spec_decode_num_accepted_tokens"))


@pytest.mark.parametrize("verify", ["coupled", "ratio"])
def test_exact(engines: Engines, few_tokens: Pair, verify: str) -> None:
    model = LlamaForCausalLM.from_pretrained(few_tokens[0], dtype=torch.float32).eval()
    few = {"ssd_branch_budget": 12, "ssd_max_rows": 96, "ssd_verify": verify}
    llm = engines.get(few_tokens[0], ssd(few_tokens[1], 3, **few), max_num_seqs=24, max_model_len=128)
    in_worker(llm, await_draft)
    distributions = [
        Distribution(0.7),
        Distribution(1.3),
        Distribution(1.0, top_k=7),
        Distribution(1.0, top_k=4),
    ]
    assert_exact(model, llm, distributions)
    counted = stats(llm)
    print(counted)
    assert 100 < counted["hits"] < counted["lookups"] - 100
    assert accepted(llm) > 100
    assert counted["draft_probs_late"] == counted["draft"]["dropped"] == 0
