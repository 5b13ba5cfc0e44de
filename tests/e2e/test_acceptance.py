"""SSD's drafts are the draft model's own: so as many are accepted at each position as with draft_model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Engines, await_draft, generate, greedy_params, in_worker, metric, ssd, stats
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.timeout(280)

K = 4
NUM_TOKENS = 48
NEAR_TIE = 1e-3  # logits closer than this may come out in either order
Drafted = list[tuple[list[int], list[int]]]  # (tokens so far, drafts)


def prompts() -> list[list[int]]:
    rng = random.Random(31)
    return [[rng.randrange(2, 512) for _ in range(rng.randint(3, 100))] for _ in range(16)]


def record_drafts(drafted: Drafted) -> Callable[[Any], None]:
    """For the engine's worker: note what each row is given to verify, and after which tokens."""

    def install(worker: Any) -> None:
        runner = worker.model_runner
        stock = runner.propose_draft_token_ids

        def propose(scheduler_output: Any, sampled: Any, *args: Any, **kwargs: Any) -> Any:
            drafts = stock(scheduler_output, sampled, *args, **kwargs)
            for request_id, row in zip(runner.input_batch.req_ids, drafts, strict=False):
                request = runner.requests[request_id]
                row = row.tolist() if isinstance(row, torch.Tensor) else row
                if row:
                    drafted.append(([*request.prompt_token_ids, *request.output_token_ids], row))
            return drafts

        runner.propose_draft_token_ids = propose

    return install


@torch.inference_mode()
def assert_greedy(model: LlamaForCausalLM, drafted: Drafted) -> None:
    """Each row of drafts is what the model itself continues with."""
    for tokens, drafts in drafted:
        logits = model(input_ids=torch.tensor([[*tokens, *drafts[:-1]]])).logits[0, len(tokens) - 1 :]
        best = logits.max(dim=-1).values
        gap = best - logits[torch.arange(len(drafts)), torch.tensor(drafts)]
        assert gap.max() < NEAR_TIE, (len(tokens), drafts, logits.argmax(dim=-1).tolist())


def acceptance(llm: Any) -> tuple[list[float], list[int]]:
    """Per position: the share of drafts accepted of those tried, and how many were tried."""
    accepted = metric(llm, "vllm:spec_decode_num_accepted_tokens_per_pos")
    tried = [metric(llm, "vllm:spec_decode_num_drafts"), *accepted[:-1]]
    return [a / n for a, n in zip(accepted, tried, strict=True)], tried


def test_as_many_are_accepted_as_with_draft_model(engines: Engines, pair: tuple[Path, Path]) -> None:
    target, draft = pair
    model = LlamaForCausalLM.from_pretrained(draft, dtype=torch.float32).eval()

    # The target waits for the full depth of what was predicted. Few branches, so that the draft keeps up.
    speculative = ssd(draft, K, ssd_branch_budget=12, ssd_max_rows=24, ssd_wait_ms=1000.0)
    llm = engines.get(target, speculative)
    by_ssd: Drafted = []
    in_worker(llm, await_draft)
    in_worker(llm, record_drafts(by_ssd))
    text = generate(llm, prompts(), greedy_params(NUM_TOKENS))
    assert stats(llm)["hits"] > 100
    # Drafts near a request's end may be cut; all others have full depth.
    assert sum(len(drafts) == K for _, drafts in by_ssd) > 0.8 * len(by_ssd)
    assert_greedy(model, by_ssd)
    rates, counts = acceptance(llm)

    llm = engines.get(target, {"method": "draft_model", "model": draft, "num_speculative_tokens": K})
    assert generate(llm, prompts(), greedy_params(NUM_TOKENS)) == text
    stock_rates, stock_counts = acceptance(llm)

    # The text and the drafts after each of its prefixes are the same, so the rounds are samples of one whole:
    # SSD leaves out those whose outcome it had not predicted.
    for position in range(K):
        rate, stock_rate = rates[position], stock_rates[position]
        error = math.sqrt(0.25 / counts[position] + 0.25 / stock_counts[position])
        assert abs(rate - stock_rate) < 4 * error, (position, rates, stock_rates)
