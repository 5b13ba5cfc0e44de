"""Values that clients choose, which are no business of others: each once ended the draft for everybody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import Engines, await_draft, generate, greedy_params, in_worker, ssd, stats

pytestmark = pytest.mark.timeout(240)

GOOD = [3, 1, 4, 1, 5, 9, 2, 6]


def hostile() -> list[tuple[list[int], dict[str, Any]]]:
    """(prompt, sampling parameters)"""
    by_top_k = [([7, 8], {"temperature": 1.0, "top_k": top_k}) for top_k in (2**31, 2**32 - 1, 2**63, 2**70)]
    by_seed = [([7, 8], {"temperature": 1.0, "seed": seed}) for seed in (-(2**63), 2**64 - 1)]
    # vLLM makes 0 of them before it embeds them, where speculation is configured.
    return [*by_top_k, *by_seed, ([5, -1, 7], {"temperature": 0.0}), ([-(2**31)], {"temperature": 0.0})]


def test_no_request_costs_others_their_drafts(engines: Engines, pair: tuple[Path, Path]) -> None:
    from vllm import SamplingParams

    llm = engines.get(pair[0], ssd(pair[1], 4), skip_tokenizer_init=True)
    in_worker(llm, await_draft)
    good = greedy_params(40, detokenize=False)
    (alone,) = generate(llm, [GOOD], good)
    pid = stats(llm)["draft"]["pid"]
    for prompt, options in hostile():
        bad = SamplingParams(max_tokens=12, ignore_eos=True, detokenize=False, **options)
        hits = stats(llm)["hits"]
        beside, answer = generate(llm, [GOOD, prompt], [good, bad])
        assert beside == alone, options
        assert len(answer) == 12
        assert stats(llm)["hits"] > hits, options
    counted = stats(llm)
    assert counted["draft"]["pid"] == pid
    assert counted["failures"] == counted["draft"]["dropped"] == counted["draft_restarts"] == 0
