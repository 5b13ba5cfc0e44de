"""Batches of requests for everything that vLLM accepts: the same answers as without speculation.

First each feature by itself, then drawn ones. A request is to change its own answer alone.

Greedy ones are compared with stock vLLM. Sampled ones have other noise there: those with a seed are compared
with the same engine while nothing is drafted. With VLLM_SSD_FULL=1 there are 5,000 batches.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from answers import ask, difference, sequences
from engines import Engines, in_worker, metric, ssd, stats
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracle import MODES, with_oracle, without_oracle
from tiny_models import EOS, NUM_SPECIAL, SYMBOLS

FULL = os.environ.get("VLLM_SSD_FULL") == "1"
pytestmark = pytest.mark.timeout(7200 if FULL else 600)

NUM_BATCHES = 5000 if FULL else 300
VOCAB, K, MAX_MODEL_LEN = 512, 4, 256
NUM_TOKENS, LIKELY_MOST = 16, 12  # output tokens
MOST_ANSWERS = 3  # to a request
THINK, END = "(", ")!"

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
GRAMMARS: list[dict[str, Any]] = [
    {"regex": "[a-d]{3}(x|yz)*!"},
    {"regex": "[ab]{2,9}"},
    {"regex": "é+|(ab)+"},
    {"choice": ["yes", "no, never", "n"]},
    {"json": SCHEMA},
    {"json_object": True},
    {"grammar": 'root ::= "<" [0-9]+ ">"'},
]
MEDDLING = {"thinking_token_budget", "logprob_token_ids"}
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
NEIGHBOURS = ("nothing", "regex", "little")  # what the others of a feature's batch ask for
tokens = st.integers(2, VOCAB - 1)
words = st.text(st.sampled_from("ab!(é~0 "), min_size=1, max_size=3)


@dataclass(frozen=True)
class Request:
    """A prompt is the beginning of one of a few random texts, so that some share prefixes."""

    text: int
    length: int
    thinks: bool
    options: dict[str, Any]

    @property
    def prompt(self) -> list[int]:
        rng = random.Random(self.text)
        drawn = [rng.randrange(VOCAB) for _ in range(self.length)]
        return [*drawn[:-1], NUM_SPECIAL + SYMBOLS.index(THINK)] if self.thinks else drawn

    @property
    def params(self) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

        options = dict(self.options)
        if grammar := options.get("structured_outputs"):
            options["structured_outputs"] = StructuredOutputsParams(**grammar)
        if detection := options.get("repetition_detection"):
            options["repetition_detection"] = RepetitionDetectionParams(**detection)
        return SamplingParams(**options)

    @property
    def is_greedy(self) -> bool:
        return bool(self.options["temperature"] == 0)

    @property
    def is_free(self) -> bool:
        return not self.is_greedy and self.options.get("seed") is None


@dataclass(frozen=True)
class Batch:
    mode: str  # of the oracle, or "real"
    requests: list[Request]


def beside_neighbours(name: str) -> list[Request]:
    """A request with this feature among three that ask for little; all of them think."""
    rng = random.Random(name)
    first, *others = NEIGHBOURS
    return [
        Request(
            rng.randrange(2**32),
            rng.randint(2, 41),
            thinks=True,
            options={"temperature": 0.0, "max_tokens": NUM_TOKENS, **FEATURES[asked]},
        )
        for asked in (first, name, *others)
    ]


@st.composite
def drawn_requests(draw: st.DrawFn) -> Request:
    def maybe(name: str, strategy: st.SearchStrategy[Any], chance: int = 4) -> None:
        """Draw the option in one of so many requests."""
        if draw(st.integers(1, chance)) == chance:
            options[name] = draw(strategy)

    length = draw(st.one_of(st.integers(1, 3), st.integers(1, 40), st.integers(1, MAX_MODEL_LEN - 1)))
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": draw(st.integers(1, LIKELY_MOST))}
    if MAX_MODEL_LEN - length < LIKELY_MOST:
        maybe("max_tokens", st.sampled_from([None, LIKELY_MOST, 1000]), 2)
    if draw(st.booleans()):
        options["temperature"] = draw(st.one_of(st.floats(0, 2), st.sampled_from([1e-9, 0.001, 1.0])))
        # Others end the engine, without speculation too: torch's generators do not take them. The last of n
        # answers has the seed + n - 1.
        seeds = st.integers(-(2**63), 2**64 - MOST_ANSWERS)
        maybe("seed", seeds.filter(lambda seed: seed != -1), 1)
        maybe("top_p", st.floats(1e-9, 1))
        top_ks = [-1, 0, 1, 2, 7, VOCAB - 1, VOCAB, VOCAB + 1, 2**31, 2**63, 2**70]
        maybe("top_k", st.sampled_from(top_ks))
        maybe("n", st.integers(1, MOST_ANSWERS) if options["temperature"] else st.just(1), 6)
    most = options["max_tokens"] or 1
    maybe("presence_penalty", st.floats(-2, 2), 6)
    maybe("frequency_penalty", st.floats(-2, 2), 6)
    maybe("repetition_penalty", st.floats(0.01, 10), 6)
    maybe("stop_token_ids", st.lists(tokens, max_size=100), 6)
    maybe("ignore_eos", st.booleans(), 3)
    maybe("min_tokens", st.integers(0, most))
    maybe("bad_words", st.lists(words.filter(str.strip), max_size=4), 6)
    maybe("allowed_token_ids", st.lists(st.one_of(tokens, st.just(EOS)), min_size=1, max_size=50), 8)
    few = length <= 16
    maybe("logprobs", st.sampled_from([0, 1, 5, 20, -1] if few else [0, 1, 5, 20]), 5)
    maybe("prompt_logprobs", st.sampled_from([0, 1, 20, -1] if few else [0, 1, 3]), 8)
    if "logprobs" not in options:
        maybe("logprob_token_ids", st.lists(tokens, min_size=1, max_size=9), 12)
    maybe("flat_logprobs", st.booleans(), 8)
    maybe("skip_special_tokens", st.booleans(), 6)
    maybe("spaces_between_special_tokens", st.booleans(), 6)
    if "prompt_logprobs" not in options:  # else those of the cached part are uninitialised memory (vLLM 0.32)
        maybe("skip_reading_prefix_cache", st.booleans(), 6)
    maybe("extra_args", st.sampled_from([{}, {"a": [1, {"b": None}]}]), 12)
    maybe("repetition_detection", st.just({"max_pattern_size": 2, "min_count": 2}), 10)
    if draw(st.integers(1, 8)) == 8:
        options["detokenize"] = False
    else:
        maybe("stop", st.lists(words, max_size=3), 5)
        maybe("include_stop_str_in_output", st.booleans(), 6)
    thinks = draw(st.integers(1, 8)) == 8
    if thinks:
        maybe("thinking_token_budget", st.integers(-1, 8), 1)
    elif options.get("detokenize", True) and "allowed_token_ids" not in options:
        maybe("structured_outputs", st.sampled_from(GRAMMARS), 6)
    return Request(draw(st.integers(0, 5)), length, thinks, options)


batches = st.builds(
    Batch, st.sampled_from([*MODES, "real"]), st.lists(drawn_requests(), min_size=1, max_size=6)
)


def draw_batches() -> list[Batch]:
    found: list[Batch] = []

    @settings(max_examples=NUM_BATCHES, phases=[Phase.generate], database=None)
    @given(batches)
    def collect(batch: Batch) -> None:
        found.append(batch)

    collect()
    return found


def options() -> dict[str, Any]:
    from vllm.config import ReasoningConfig

    reasoning = ReasoningConfig(reasoning_start_str=THINK, reasoning_end_str=END)
    return {
        "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": 128,  # long prompts come in pieces, beside what others decode
        "reasoning_config": reasoning,
        "max_logprobs": -1,
    }


def answers(llm: Any, requests: Sequence[Request]) -> list[Any]:
    return ask(llm, [(request.prompt, request.params) for request in requests])


class Comparison:
    """An engine with SSD whose answers are compared with those that are expected."""

    def __init__(self, llm: Any, expected: dict[int, Any]) -> None:
        self._llm, self._expected = llm, expected

    def differences(self, mode: str, requests: Sequence[Request]) -> list[str]:
        """Of each request asked for with the others, what its answer differs in."""
        oracle = in_worker(self._llm, with_oracle)
        oracle.mode = mode if mode in MODES else "some"
        oracle.sequences = sequences([self._expected[id(one)] for one in requests if not one.is_free])
        self._llm.collective_rpc("ssd_plan", args=(0 if mode == "none" else K,))
        if mode == "real":
            in_worker(self._llm, without_oracle)
        return [
            "" if request.is_free else difference(output, self._expected[id(request)])
            for request, output in zip(requests, answers(self._llm, requests), strict=True)
        ]

    def explain(self, batch: Batch) -> str:
        """The batch's first fault, and the fewest requests that show it."""
        found = self.differences(batch.mode, batch.requests)
        if not any(found):
            return ""
        index = next(i for i, text in enumerate(found) if text)
        one = batch.requests[index]
        smaller = [[one], *([other, one] for other in batch.requests if other is not one)]
        for requests in smaller:
            if again := self.differences(batch.mode, requests)[-1]:
                return f"{again}\n  in mode {batch.mode}, of the last of\n  {requests}"
        return f"{found[index]}\n  in mode {batch.mode}, of number {index} of\n  {batch.requests}"


@pytest.fixture(scope="module")
def drawn() -> list[Batch]:
    return draw_batches()


@pytest.fixture(scope="module")
def with_feature() -> dict[str, list[Request]]:
    """Batches by the feature's name."""
    return {name: beside_neighbours(name) for name in FEATURES}


@pytest.fixture(scope="module")
def expected(
    engines: Engines,
    pair: tuple[Path, Path],
    with_feature: dict[str, list[Request]],
    drawn: list[Batch],
) -> dict[int, Any]:
    """By the request's id."""
    batches = [*with_feature.values(), *(batch.requests for batch in drawn)]
    requests = [request for batch in batches for request in batch]
    greedy = [request for request in requests if request.is_greedy]
    seeded = [request for request in requests if not request.is_greedy and not request.is_free]
    found = references(engines.get(pair[0], **options()), greedy)
    llm = engines.get(pair[0], ssd(pair[1], K), **options())
    llm.collective_rpc("ssd_plan", args=(0,))
    return found | references(llm, seeded)


def references(llm: Any, requests: Sequence[Request]) -> dict[int, Any]:
    """Answers by the request's id; alone where stock vLLM lets a request change what others get."""
    alone = [request for request in requests if request.options.keys() & MEDDLING]
    others = [request for request in requests if not request.options.keys() & MEDDLING]
    found = dict(zip(map(id, others), answers(llm, others), strict=True))
    return found | {id(request): answers(llm, [request])[0] for request in alone}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("mode", MODES)
def test_a_feature_beside_neighbours_and_alone(
    engines: Engines,
    pair: tuple[Path, Path],
    with_feature: dict[str, list[Request]],
    expected: dict[int, Any],
    mode: str,
    name: str,
) -> None:
    llm = engines.get(pair[0], ssd(pair[1], K), **options())
    comparison = Comparison(llm, expected)
    requests = with_feature[name]
    for asked in (requests, requests[1:2]):
        assert not any(found := comparison.differences(mode, asked)), found
    assert stats(llm)["draft_restarts"] == stats(llm)["failures"] == 0


def test_answers_are_the_same(
    engines: Engines, pair: tuple[Path, Path], drawn: list[Batch], expected: dict[int, Any]
) -> None:
    llm = engines.get(pair[0], ssd(pair[1], K), **options())
    comparison = Comparison(llm, expected)
    faults = []
    for number, batch in enumerate(drawn):
        try:
            found = comparison.explain(batch)
        except BaseException as error:
            error.add_note(f"batch {number}: {batch}")
            raise
        if found:
            faults.append(f"batch {number}: {found}")
            print(faults[-1], flush=True)
    counted = stats(llm)
    print(len(drawn), "batches", sum(len(batch.requests) for batch in drawn), "requests", counted)
    assert not faults
    assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 1000
    assert counted["draft_restarts"] == counted["failures"] == counted["draft"]["dropped"] == 0
