"""A target that takes LoRA adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import Engines, generate, greedy_params, in_worker, ssd

pytestmark = pytest.mark.timeout(240)


def test_the_planner_measures_a_target_with_adapters(engines: Engines, pair: tuple[Path, Path]) -> None:
    """LoRA's logits layer has a row for each sampled token; the measuring pass samples at all of them."""
    options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8, "max_model_len": 128}
    llm = engines.get(pair[0], ssd(pair[1], 4, ssd_planner=True), **options)
    assert in_worker(llm, lambda worker: worker.list_loras()) == set()  # those of the measuring pass are gone
    prompts = [[5, 6, 7], [9] * 30]
    drafted = generate(llm, prompts, greedy_params(20))
    llm.collective_rpc("ssd_plan", args=(0,))
    assert generate(llm, prompts, greedy_params(20)) == drafted
