"""Greedy output with SSD is token-identical to the same engine without speculation."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from engines import Engines, generate, greedy_params, is_running, metric, ssd, stats

pytestmark = pytest.mark.timeout(240)

NUM_TOKENS = 40


def mixed_prompts() -> list[list[int]]:
    """Lengths 1 to 700; a third share prefixes."""
    rng = random.Random(11)
    lengths = [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 280, 700]
    prompts = [[rng.randrange(2, 512) for _ in range(length)] for length in lengths]
    shared = prompts[-1]
    return prompts + [
        shared[:length] + [rng.randrange(2, 512)] for length in (32, 64, 64, 128, 200, 200, 400, 600)
    ]


def small_chunks() -> dict[str, Any]:
    """Prompts are prefilled in pieces, beside the decoding of others."""
    return {"max_num_batched_tokens": 64, "enable_chunked_prefill": True, "enable_prefix_caching": True}


def few_blocks() -> dict[str, Any]:
    """So few KV blocks that running requests are preempted."""
    return {"num_gpu_blocks_override": 8, "block_size": 32, "max_model_len": 256}


def short_prompts() -> list[list[int]]:
    rng = random.Random(12)
    return [[rng.randrange(2, 512) for _ in range(rng.randint(20, 60))] for _ in range(16)]


@pytest.fixture(scope="module")
def reference(engines: Engines, pair: tuple[Path, Path]) -> list[list[int]]:
    return generate(engines.get(pair[0], **small_chunks()), mixed_prompts(), greedy_params(NUM_TOKENS))


@pytest.fixture(scope="module")
def short_reference(engines: Engines, pair: tuple[Path, Path]) -> list[list[int]]:
    llm = engines.get(pair[0], **small_chunks())
    return generate(llm, short_prompts(), greedy_params(100))


@pytest.mark.parametrize(
    ("num_drafts", "options"),
    [
        (1, {}),
        # The draft reaches 300 positions, the target 1,024: beyond, rows go on with n-gram drafts alone.
        (4, {"ssd_fallback": "ngram", "max_model_len": 300}),
        (4, {}),
    ],
    ids=["1", "4-ngram-short-draft", "4"],
)
def test_identical(
    engines: Engines,
    pair: tuple[Path, Path],
    reference: list[list[int]],
    num_drafts: int,
    options: dict[str, Any],
) -> None:
    target, draft = pair
    llm = engines.get(target, ssd(draft, num_drafts, **options), **small_chunks())
    assert generate(llm, mixed_prompts(), greedy_params(NUM_TOKENS)) == reference
    one_by_one = [generate(llm, [prompt], greedy_params(NUM_TOKENS))[0] for prompt in mixed_prompts()[::5]]
    assert one_by_one == reference[::5]
    counted = stats(llm)
    assert counted["hits"] > 0
    assert counted["hits"] < counted["lookups"]  # both ways were taken
    assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 0
    assert counted["draft"]["adopted"] > 0


def test_identical_when_preempted(
    engines: Engines, pair: tuple[Path, Path], short_reference: list[list[int]]
) -> None:
    target, draft = pair
    llm = engines.get(target, ssd(draft, 4), **few_blocks())
    assert generate(llm, short_prompts(), greedy_params(100)) == short_reference
    assert metric(llm, "vllm:num_preemptions") > 0
    assert stats(llm)["hits"] > 0


def test_a_clean_shutdown_leaves_nothing(engines: Engines, pair: tuple[Path, Path]) -> None:
    llm = engines.get(pair[0], ssd(pair[1], 4), **few_blocks())
    shared = Path(llm.llm_engine.vllm_config.speculative_config.ssd_shared_dir)
    pid = stats(llm)["draft"]["pid"]
    assert shared.is_dir()
    assert is_running(pid)
    engines.close()
    assert not shared.exists()
    assert not is_running(pid)
