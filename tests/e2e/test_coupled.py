"""Coupled verification: a seeded request's tokens are the target's and its seed's alone."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from engines import (
    Engines,
    await_draft,
    generate,
    greedy_params,
    in_worker,
    metric,
    ssd,
    stats,
)

FULL = os.environ.get("VLLM_SSD_FULL") == "1"  # minutes more
pytestmark = pytest.mark.timeout(1200 if FULL else 240)

NUM_PROMPTS, NUM_TOKENS = 200 if FULL else 40, 24
NUM_ALONE = NUM_PROMPTS if FULL else 6  # in batches of one


def prompts() -> list[list[int]]:
    rng = random.Random(31)
    return [[rng.randrange(2, 512) for _ in range(rng.randint(1, 70))] for _ in range(NUM_PROMPTS)]


def params() -> list[Any]:
    """Seeded requests of every kind, and greedy ones between them."""
    from vllm import SamplingParams

    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.6},
        {"temperature": 1.4, "top_k": 40},
        {"top_p": 0.8},
        {"temperature": 0.0},
        {"top_k": 10**6, "seed": 2**64 - 1},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5},
        {"bad_words": ["a"], "logprobs": 2},
        {"min_tokens": 8, "stop_token_ids": list(range(2, 100))},
    ]
    return [
        SamplingParams(
            **{"temperature": 1.0, "max_tokens": NUM_TOKENS, "seed": 1000 + i, **kinds[i % len(kinds)]}
        )
        for i in range(NUM_PROMPTS)
    ]


SETTINGS: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (1, {"ssd_branch_budget": 4}, {}),
    (3, {"ssd_branch_budget": 24, "ssd_max_rows": 96}, {"max_num_batched_tokens": 64}),
    (7, {"ssd_backup": "ngram"}, {"max_num_seqs": 3}),
]


def first_engine(engines: Engines, pair: tuple[Path, Path]) -> Any:
    num_drafts, options, engine_options = SETTINGS[0]
    return engines.get(pair[0], ssd(pair[1], num_drafts, **options), **engine_options)


@pytest.fixture(scope="module")
def undrafted(engines: Engines, pair: tuple[Path, Path]) -> list[list[int]]:
    """Every token sampled by itself: nothing is looked up. In the engine of the first test."""
    llm = first_engine(engines, pair)
    llm.collective_rpc("ssd_plan", args=(0,))
    tokens = generate(llm, prompts(), params())
    assert stats(llm)["lookups"] == 0
    llm.collective_rpc("ssd_plan")
    return tokens


@pytest.mark.parametrize(("num_drafts", "options", "engine_options"), SETTINGS, ids=["1", "3", "7"])
def test_tokens_do_not_depend_on_speculation(
    engines: Engines,
    pair: tuple[Path, Path],
    undrafted: list[list[int]],
    num_drafts: int,
    options: dict[str, Any],
    engine_options: dict[str, Any],
) -> None:
    llm = engines.get(pair[0], ssd(pair[1], num_drafts, **options), **engine_options)
    in_worker(llm, await_draft)
    assert generate(llm, prompts(), params()) == undrafted
    counted = stats(llm)
    assert 0 < counted["hits"] < counted["lookups"]
    assert counted["draft_restarts"] == 0
    assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 0
    some = zip(prompts()[:NUM_ALONE], params(), strict=False)
    assert [generate(llm, [prompt], one)[0] for prompt, one in some] == undrafted[:NUM_ALONE]


def test_requests_without_a_seed_differ(engines: Engines, pair: tuple[Path, Path]) -> None:
    from vllm import SamplingParams

    num_drafts, options, engine_options = SETTINGS[-1]  # the engine of the test before
    llm = engines.get(pair[0], ssd(pair[1], num_drafts, **options), **engine_options)
    free = SamplingParams(temperature=1.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = generate(llm, [[5, 6, 7]] * 8, free) + generate(llm, [[5, 6, 7]] * 8, free)
    assert len(set(map(tuple, outputs))) == len(outputs)


def test_nor_on_preemption_or_a_killed_draft(
    engines: Engines, pair: tuple[Path, Path], undrafted: list[list[int]]
) -> None:
    from vllm.inputs import TokensPrompt

    few_blocks = {"num_gpu_blocks_override": 10, "block_size": 32, "max_model_len": 256}
    llm = engines.get(pair[0], ssd(pair[1], 4), **few_blocks)
    engine = llm.llm_engine
    ids = [
        engine.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), one)
        for i, (prompt, one) in enumerate(zip(prompts(), params(), strict=True))
    ]
    answers: dict[str, list[int]] = {}
    steps = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 20:
            os.kill(stats(llm)["draft"]["pid"], signal.SIGKILL)
    assert [answers[i.split("-")[0]] for i in ids] == undrafted
    assert metric(llm, "vllm:num_preemptions") > 0


def test_ratio_answers_the_same_requests(
    engines: Engines, pair: tuple[Path, Path], undrafted: list[list[int]]
) -> None:
    """Prompts of one token, seeded ones with prompts in chunks, and top_k alone, each ended the engine.

    The greedy ones among them are answered as ever; the distribution of the others is in test_exactness.py.
    """
    llm = engines.get(pair[0], ssd(pair[1], 3, ssd_verify="ratio"), max_num_batched_tokens=64)
    asked = params()
    are_greedy = [not one.temperature for one in asked]
    one_token = [[5]] * len(asked)  # vLLM schedules these with placeholders for drafts
    llm.collective_rpc("ssd_plan", args=(0,))
    (undrafted_one,) = generate(llm, one_token[:1], greedy_params(NUM_TOKENS))
    llm.collective_rpc("ssd_plan")
    in_worker(llm, await_draft)
    answers = generate(llm, prompts(), asked)
    assert [one for one, is_greedy in zip(answers, are_greedy, strict=True) if is_greedy] == [
        one for one, is_greedy in zip(undrafted, are_greedy, strict=True) if is_greedy
    ]
    answers = generate(llm, one_token, asked)
    assert all(one == undrafted_one for one, is_greedy in zip(answers, are_greedy, strict=True) if is_greedy)
    alone = [generate(llm, [prompt], one)[0] for prompt, one in zip(prompts()[:6], asked, strict=False)]
    assert alone[are_greedy.index(True)] == undrafted[are_greedy.index(True)]
    assert stats(llm)["hits"] > 0
