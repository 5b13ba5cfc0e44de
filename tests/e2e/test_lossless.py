"""Greedy output with SSD is token-identical to the same engine without speculation."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from engines import (
    Engines,
    await_draft,
    generate,
    greedy_params,
    in_worker,
    is_running,
    let_finished_go,
    metric,
    ssd,
    stats,
)

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
    return {"num_gpu_blocks_override": 10, "block_size": 32, "max_model_len": 256}


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


def demanding_params() -> list[Any]:
    """Greedy requests with whatever else shapes or ends the output."""
    return [
        greedy_params(NUM_TOKENS, repetition_penalty=1.3),
        greedy_params(NUM_TOKENS, presence_penalty=0.8, frequency_penalty=0.5),
        greedy_params(NUM_TOKENS, logprobs=2, prompt_logprobs=1),
        greedy_params(NUM_TOKENS, stop_token_ids=list(range(2, 60))),
        greedy_params(NUM_TOKENS, bad_words=["a", "b"]),
        greedy_params(1),
        greedy_params(2),
        # Right only with repairs.patch_min_tokens_of_bonus.
        greedy_params(NUM_TOKENS, min_tokens=10, stop_token_ids=list(range(2, 200))),
    ]


@pytest.fixture(scope="module")
def demanding_reference(engines: Engines, pair: tuple[Path, Path]) -> list[list[int]]:
    llm = engines.get(pair[0], **small_chunks())
    return generate(llm, short_prompts()[:8], demanding_params())


@pytest.mark.parametrize(
    ("num_drafts", "options"),
    [
        (1, {"ssd_backup": "draft", "ssd_fanout": "geometric", "ssd_draft_dtype": "bfloat16"}),
        # The draft reaches 300 positions, the target 1,024: beyond, rows continue with n-gram drafts alone.
        (4, {"ssd_backup": "ngram", "max_model_len": 300}),
        (4, {"ssd_backup": "auto", "max_model_len": 600, "ssd_planner": True}),
    ],
    ids=["1-just-in-time-geometric-bfloat16", "4-ngram-short-draft", "4-auto-planned"],
)
def test_identical(
    engines: Engines,
    pair: tuple[Path, Path],
    reference: list[list[int]],
    short_reference: list[list[int]],
    demanding_reference: list[list[int]],
    num_drafts: int,
    options: dict[str, Any],
) -> None:
    target, draft = pair
    llm = engines.get(target, ssd(draft, num_drafts, **options), **small_chunks())
    in_worker(llm, await_draft)
    assert generate(llm, mixed_prompts(), greedy_params(NUM_TOKENS)) == reference
    one_by_one = [generate(llm, [prompt], greedy_params(NUM_TOKENS))[0] for prompt in mixed_prompts()[::5]]
    assert one_by_one == reference[::5]
    counted = stats(llm)
    assert counted["hits"] > 0
    assert counted["hits"] < counted["lookups"]  # both ways were taken
    assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 0
    assert counted["draft"]["adopted"] > 0
    assert generate(llm, short_prompts()[:8], demanding_params()) == demanding_reference
    finish_some_and_abort_others(llm, short_reference)


def finish_some_and_abort_others(llm: Any, expected: list[list[int]]) -> None:
    """Aborted requests leave their slots, and the others' output is untouched."""
    from vllm.inputs import TokensPrompt

    engine = llm.llm_engine
    ids = [
        engine.add_request(f"abort-{index}", TokensPrompt(prompt_token_ids=prompt), greedy_params(100))
        for index, prompt in enumerate(short_prompts())
    ]
    answers: dict[str, list[int]] = {}
    steps = 0
    while engine.has_unfinished_requests():
        steps += 1
        if steps in (3, 9):  # while they wait, run, or have finished
            engine.abort_request(ids[1::4][: steps // 2])
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
    kept = [index for index in range(len(ids)) if index not in range(1, len(ids), 4)]
    assert [answers[f"abort-{index}"] for index in kept] == [expected[index] for index in kept]
    let_finished_go(llm)
    assert not in_worker(llm, lambda worker: worker.model_runner.proposer.keys())


def test_identical_when_preempted(
    engines: Engines, pair: tuple[Path, Path], short_reference: list[list[int]]
) -> None:
    target, draft = pair
    llm = engines.get(target, ssd(draft, 4), **few_blocks())
    in_worker(llm, await_draft)
    assert generate(llm, short_prompts(), greedy_params(100)) == short_reference
    assert metric(llm, "vllm:num_preemptions") > 0
    assert stats(llm)["hits"] > 0


def test_a_clean_shutdown_leaves_nothing(engines: Engines, pair: tuple[Path, Path]) -> None:
    from vllm_ssd.link.announcement import ask

    llm = engines.get(pair[0], ssd(pair[1], 4), **few_blocks())
    name = llm.llm_engine.vllm_config.speculative_config.placement.engine_id
    pid = stats(llm)["draft"]["pid"]
    with ask(name):
        pass
    assert is_running(pid)
    engines.close()
    with pytest.raises(OSError, match="refused"), ask(name):
        pass
    assert not is_running(pid)
