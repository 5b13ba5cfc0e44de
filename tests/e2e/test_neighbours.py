"""What one request asks for changes its own answer alone, in steps with no, some and all drafts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from answers import ask, difference, sequences
from engines import Engines, in_worker, ssd, stats
from models import NUM_SPECIAL, SYMBOLS
from oracle import MODES, with_oracle

pytestmark = pytest.mark.timeout(240)

NUM_TOKENS, K = 16, 4
THINK, END = "(", ")!"

FEATURES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "little": {"logprobs": 1},
    "thinking budget 0": {"thinking_token_budget": 0},
    "thinking budget 3": {"thinking_token_budget": 3},
    "thinking budget 6": {"thinking_token_budget": 6},
    "thinking budget, ends first": {"thinking_token_budget": 8, "max_tokens": 5},
    "regex": {"structured_outputs": {"regex": "[a-d]{3}(x|yz)*!"}},
    "choice": {"structured_outputs": {"choice": ["yes", "no, never"]}},
    "JSON": {"structured_outputs": {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}}},
    "grammar": {"structured_outputs": {"grammar": 'root ::= "<" [0-9]+ ">"'}},
    "regex, min_tokens": {"structured_outputs": {"regex": "[ab]{2,9}"}, "min_tokens": 6},
    "logprobs": {"logprobs": 3},
    "all logprobs": {"logprobs": -1},
    "logprobs of some tokens": {"logprob_token_ids": [3, 5, 300]},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "repetition": {"repetition_penalty": 1.5},
    "presence, frequency": {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    "bad words": {"bad_words": ["a", "bc", "d e"]},
    "allowed_token_ids": {"allowed_token_ids": list(range(40, 90))},
    "min_tokens": {"min_tokens": 7, "stop_token_ids": list(range(2, 250))},
    "stop_token_ids": {"stop_token_ids": list(range(2, 60))},
    "stop strings": {"stop": ["<4", "a", "2>"], "include_stop_str_in_output": True},
    "seed": {"temperature": 1.0, "seed": 5},
    "seed, top_k": {"temperature": 1.3, "seed": 2**63 - 1, "top_k": 7},
    "seed, top_p": {"temperature": 0.9, "seed": -3, "top_p": 0.7},
    "seed, everything": {
        "temperature": 1.1,
        "seed": 8,
        "top_k": 30,
        "top_p": 0.9,
        "repetition_penalty": 0.8,
        "bad_words": ["a"],
        "logprobs": 1,
        "min_tokens": 5,
        "stop_token_ids": list(range(2, 200)),
    },
    "n": {"temperature": 0.8, "seed": 11, "n": 3},
}


def params(name: str) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    options = {"temperature": 0.0, "max_tokens": NUM_TOKENS, **FEATURES[name]}
    if asked := options.get("structured_outputs"):
        options["structured_outputs"] = StructuredOutputsParams(**asked)
    return SamplingParams(**options)


def batch(name: str) -> list[tuple[list[int], Any]]:
    """The request among three that ask for little; all of them think."""
    rng = random.Random(name)
    prompts = [[rng.randrange(2, 512) for _ in range(rng.randint(1, 40))] for _ in range(4)]
    begin = NUM_SPECIAL + SYMBOLS.index(THINK)
    asked = ("nothing", name, "regex", "little")
    return [([*prompt, begin], params(of)) for prompt, of in zip(prompts, asked, strict=True)]


def options() -> dict[str, Any]:
    from vllm.config import ReasoningConfig

    reasoning = ReasoningConfig(reasoning_start_str=THINK, reasoning_end_str=END)
    return {"max_model_len": 128, "reasoning_config": reasoning, "max_logprobs": -1}


Answers = dict[str, list[Any]]


@pytest.fixture(scope="module")
def expected(engines: Engines, pair: tuple[Path, Path]) -> Answers:
    """Without speculation; of sampled requests, which have other noise there, with SSD and without drafts."""
    llm = engines.get(pair[0], **options())
    asked = {name: batch(name) for name in FEATURES}
    # Apart: even without speculation `logprob_token_ids` changes what others get.
    neighbours = iter(ask(llm, [one for first, _, *last in asked.values() for one in (first, *last)]))
    answers = {
        name: [next(neighbours), ask(llm, requests[1:2])[0], next(neighbours), next(neighbours)]
        for name, requests in asked.items()
    }
    llm = engines.get(pair[0], ssd(pair[1], K), **options())
    llm.collective_rpc("ssd_plan", args=(0,))
    for name, requests in asked.items():
        if requests[1][1].temperature:
            answers[name][1] = ask(llm, requests[1:2])[0]
    return answers


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("mode", MODES)
def test_a_request_changes_its_own_answer_alone(
    engines: Engines,
    pair: tuple[Path, Path],
    expected: Answers,
    mode: str,
    name: str,
) -> None:
    llm = engines.get(pair[0], ssd(pair[1], K), **options())
    oracle = in_worker(llm, with_oracle)
    oracle.mode, oracle.sequences = mode, sequences(expected[name])
    llm.collective_rpc("ssd_plan", args=(0 if mode == "none" else K,))
    requests = batch(name)
    outputs = ask(llm, requests) + ask(llm, requests[1:2])
    for output, wanted in zip(outputs, expected[name] + expected[name][1:2], strict=True):
        assert not difference(output, wanted)
    assert stats(llm)["draft_restarts"] == stats(llm)["failures"] == 0
