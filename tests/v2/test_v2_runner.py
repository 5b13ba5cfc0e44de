"""Method ssd under vLLM's V2 runner: greedy and coupled identity, filling."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from device import DEVICE
from engines import (
    Engines,
    generate,
    greedy_params,
    in_worker,
    let_finished_go,
    metric,
    ssd,
    stats,
)

from vllm_ssd import compat
from vllm_ssd.target import runner_v2
from vllm_ssd.target.runner_v2 import SSDModelRunnerV2

# Where vLLM's kernels hang in the interpreter, a test must still end.
pytestmark = pytest.mark.timeout(300)

Pair = tuple[Path, Path]
NUM_TOKENS = 10


def mixed_prompts() -> list[list[int]]:
    """40 of them, of 1 to 200 tokens; some share prefixes."""
    rng = random.Random(21)
    lengths = [1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 65, 200]
    lengths += [rng.randint(4, 60) for _ in range(18)]
    prompts = [[rng.randrange(2, 512) for _ in range(length)] for length in lengths]
    shared = prompts[11]
    return prompts + [
        shared[:length] + [rng.randrange(2, 512)] for length in (16, 32, 32, 48, 64, 64, 96, 128, 160, 199)
    ]


def seeded_params(count: int) -> list[Any]:
    """Sampled requests of several kinds, and greedy ones between them."""
    from vllm import SamplingParams

    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.6},
        {"temperature": 1.4},
        {"temperature": 0.0},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5},
        {"bad_words": ["a"], "logprobs": 2},
    ]
    return [
        SamplingParams(
            **{"temperature": 1.0, "max_tokens": NUM_TOKENS, "seed": 1000 + i, "ignore_eos": True}
            | kinds[i % len(kinds)]
        )
        for i in range(count)
    ]


def few_blocks() -> dict[str, Any]:
    """So few KV blocks that running requests are preempted; prompts in pieces; prefixes are shared."""
    return {
        "num_gpu_blocks_override": 12,
        "block_size": 32,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
    }


def in_batches(llm: Any, prompts: Sequence[list[int]], params: Any) -> list[list[int]]:
    """One by one, then by two, three and four (the engine's limit), the rest at once."""
    outputs: list[list[int]] = []
    for size in (1, 2, 3, 4, len(prompts)):
        part = slice(len(outputs), len(outputs) + size)
        chosen = params[part] if isinstance(params, list) else params
        outputs += generate(llm, prompts[part], chosen)
    return outputs


@pytest.fixture(scope="module")
def greedy_reference(engines: Engines, pair: Pair) -> list[list[int]]:
    llm = engines.get(pair[0], **few_blocks())
    assert not isinstance(in_worker(llm, lambda worker: worker.model_runner), SSDModelRunnerV2)
    assert in_worker(llm, lambda worker: worker.use_v2_model_runner)
    return generate(llm, mixed_prompts(), greedy_params(NUM_TOKENS))


@pytest.fixture(scope="module")
def seeded_reference(engines: Engines, pair: Pair) -> list[list[int]]:
    """Of vLLM's V2 runner without speculation."""
    llm = engines.get(pair[0], **few_blocks())
    return generate(llm, mixed_prompts(), seeded_params(len(mixed_prompts())))


@pytest.mark.parametrize(
    ("num_drafts", "options"),
    [
        (1, {"ssd_backup": "draft"}),
        (2, {}),
        (4, {"ssd_backup": "ngram", "max_model_len": 100}),
        (5, {"ssd_planner": True}),
        (3, {"ssd_verify": "ratio"}),  # the next test's engine
    ],
    ids=["1-just-in-time", "2", "4-ngram-short-draft", "5-planned", "3-ratio"],
)
def test_greedy_and_seeded_tokens_are_those_without_speculation(
    engines: Engines,
    pair: Pair,
    greedy_reference: list[list[int]],
    seeded_reference: list[list[int]],
    num_drafts: int,
    options: dict[str, Any],
) -> None:
    llm = engines.get(pair[0], ssd(pair[1], num_drafts, **options), **few_blocks())
    assert in_batches(llm, mixed_prompts(), greedy_params(NUM_TOKENS)) == greedy_reference
    if options.get("ssd_verify") != "ratio":
        assert in_batches(llm, mixed_prompts(), seeded_params(40)) == seeded_reference
    counted = stats(llm)
    assert 0 < counted["hits"] < counted["lookups"]
    assert is_deferred(llm) == (not options)  # what is planned is scheduled synchronously
    assert metric(llm, "vllm:num_preemptions") > 0
    assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 0
    let_finished_go(llm)
    assert not in_worker(llm, lambda worker: worker.model_runner.speculator._histories._tokens)


def is_deferred(llm: Any) -> bool:
    """Whether outcomes are looked up on the device, and without failure."""
    deferred = in_worker(llm, lambda worker: worker.model_runner.speculator._deferred)
    if deferred is None:
        return False
    assert not deferred._failed
    assert DEVICE == "cpu" or deferred._entries.is_cuda  # in the host's memory only where it cannot be shared
    return True


_agreement = runner_v2.longest_agreement


def _num_drafts(own: torch.Tensor, drafts: torch.Tensor, begins: torch.Tensor, k: int) -> int:
    """Drafts among what is verified: every row begins with a token that is none."""
    return int((drafts >= 0).sum()) - (len(begins) - 1)


def watch_histories(worker: Any) -> None:
    """Keep what the speculator took each request's tokens to be."""
    speculator = worker.model_runner.speculator
    speculator.watched = []
    stock = speculator.remove

    def remove(request_id: str) -> None:
        speculator.proposed()  # its last round is received: else it may leave before the thread has seen that
        if request_id in speculator._histories._tokens:
            speculator.watched.append(speculator.history(request_id))
        stock(request_id)

    speculator.remove = remove


@pytest.mark.parametrize("options", [{"ssd_verify": "ratio"}, {}], ids=["ratio", "coupled"])
def test_filled_up_rows(
    engines: Engines,
    pair: Pair,
    greedy_reference: list[list[int]],
    seeded_reference: list[list[int]],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Places without a draft are verified as such, and the draft hears of the tokens that were sampled."""
    verified: list[int] = []
    monkeypatch.setattr(
        runner_v2, "longest_agreement", lambda *args: verified.append(_num_drafts(*args)) or _agreement(*args)
    )
    llm = engines.get(pair[0], ssd(pair[1], 3, **options), **few_blocks())
    in_worker(llm, watch_histories)
    prompts = mixed_prompts()[:16]
    outputs = in_batches(llm, prompts, greedy_params(NUM_TOKENS))
    assert outputs == greedy_reference[:16]
    in_worker(llm, lambda worker: worker.model_runner.speculator.proposed())  # all rounds are received
    if not options:
        assert in_batches(llm, prompts, seeded_params(16)) == seeded_reference[:16]
        in_worker(llm, lambda worker: worker.model_runner.speculator.proposed())
        assert 0 < sum(verified) <= stats(llm)["drafts_served"]
    assert is_deferred(llm) == (not options)
    let_finished_go(llm)
    watched = in_worker(llm, lambda worker: worker.model_runner.speculator.watched)
    for prompt, output in zip(prompts, outputs, strict=True):
        # A preempted request leaves before its end, and the last round may yield more than was asked for.
        assert any(tokens[: len(prompt) + NUM_TOKENS] == prompt + output for tokens in watched)


def test_a_killed_draft_and_aborted_requests(
    engines: Engines, pair: Pair, greedy_reference: list[list[int]]
) -> None:
    from vllm.inputs import TokensPrompt

    llm = engines.get(pair[0], ssd(pair[1], 3), **few_blocks())
    engine = llm.llm_engine
    ids = [
        engine.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), greedy_params(NUM_TOKENS))
        for i, prompt in enumerate(mixed_prompts()[:16])
    ]
    answers: dict[str, list[int]] = {}
    steps = 0
    while engine.has_unfinished_requests():
        steps += 1
        if steps in (4, 10):  # some run, some wait, some have finished
            engine.abort_request(ids[1::4][: steps // 3])
        if steps == 12:
            os.kill(stats(llm)["draft"]["pid"], signal.SIGKILL)
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
    kept = [i for i in range(16) if i % 4 != 1]
    assert [answers[str(i)] for i in kept] == [greedy_reference[i] for i in kept]
    assert stats(llm)["draft_restarts"] == 1
    assert stats(llm)["hits"] > 0


def constrained(llm: Any) -> list[list[int]]:
    """Greedy and seeded requests of which some may only say what a pattern, top-k or top-p allows."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = []
    for i in range(6):
        kinds: list[dict[str, Any]] = [
            {"structured_outputs": StructuredOutputsParams(regex="(ab|cd|e[a-f]){3,9}")},
            {"top_k": 20},
            {"top_p": 0.8},
        ]
        params.append(SamplingParams(temperature=float(i % 2), seed=i, max_tokens=NUM_TOKENS, **kinds[i % 3]))
    return generate(llm, mixed_prompts()[14:20], params)


@pytest.mark.skipif(DEVICE == "cpu", reason="vLLM's kernels for these do not run in the interpreter")
def test_grammars_top_k_and_top_p(engines: Engines, pair: Pair) -> None:
    expected = constrained(engines.get(pair[0], **few_blocks()))
    llm = engines.get(pair[0], ssd(pair[1], 3), **few_blocks())
    assert constrained(llm) == expected
    assert stats(llm)["hits"] > 0


def test_seams_of_the_runner_are_put_back_and_fail_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.cpu import model_runner as cpu
    from vllm.v1.worker.gpu import model_runner as gpu

    stock = cpu.CPUModelRunner, gpu.init_speculator

    def fail_inside() -> None:
        with (
            compat.cpu_runner_class(object, is_v2=True),
            compat.speculator_class(lambda config, device: (config, device)),
        ):
            assert cpu.CPUModelRunner is object
            assert gpu.init_speculator(1, 2, 3) == (1, 2)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert (cpu.CPUModelRunner, gpu.init_speculator) == stock
    monkeypatch.delattr(cpu, "CPUModelRunner")
    with pytest.raises(AttributeError, match="CPUModelRunner"), compat.cpu_runner_class(object, is_v2=True):
        pass
    monkeypatch.delattr(gpu, "init_speculator")
    with pytest.raises(AttributeError, match="init_speculator"), compat.speculator_class(lambda *args: None):
        pass
