"""A target on two ranks under vLLM's V2 runner: the leader's drafts and distributions get where they must."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config
from device import DEVICE
from engines import Engines, generate, greedy_params, ssd, stats

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(DEVICE == "cuda", reason="a GPU machine here has one GPU"),
]

Pair = tuple[Path, Path]

BOTH = {"distributed_executor_backend": "mp", "max_num_seqs": 4}
SIDE_BY_SIDE = {"tensor_parallel_size": 2, **BOTH}
ONE_AFTER_THE_OTHER = {"pipeline_parallel_size": 2, **BOTH}


@pytest.fixture(scope="module", autouse=True)
def two_ranks() -> Iterator[None]:
    """Forked, so that they have this process's interpreted Triton; with a core each."""
    from vllm.v1.executor import multiproc_executor

    cores = sorted(os.sched_getaffinity(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
        patch.setattr(multiproc_executor, "get_mp_context", lambda: multiprocessing.get_context("fork"))
        # The embedding of a part of the vocabulary would be compiled, which needs a real Triton.
        patch.setattr(torch._dynamo.config, "disable", True)
        yield


def prompts() -> list[list[int]]:
    rng = random.Random(6)
    return [[rng.randrange(2, 512) for _ in range(rng.randint(1, 40))] for _ in range(6)]


def seeded() -> list[Any]:
    from vllm import SamplingParams

    return [SamplingParams(temperature=1.0, max_tokens=12, seed=i, ignore_eos=True) for i in range(6)]


def tokens_in_slots(worker: Any) -> list[list[int]]:
    """What this rank took the tokens of the last requests to be, by slot."""
    states = worker.model_runner.req_states
    lengths = states.total_len.gpu.tolist()
    return [row[:length].tolist() for row, length in zip(states.all_token_ids.gpu, lengths, strict=True)]


def undrafted(engines: Engines, pair: Pair, ranks: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy and seeded tokens without speculation."""
    llm = engines.get(pair[0], **ranks)
    return generate(llm, prompts(), greedy_params(12)), generate(llm, prompts(), seeded())


@pytest.fixture(scope="module")
def undrafted_side_by_side(engines: Engines, pair: Pair) -> tuple[list[list[int]], list[list[int]]]:
    return undrafted(engines, pair, SIDE_BY_SIDE)


@pytest.fixture(scope="module")
def undrafted_one_after_the_other(engines: Engines, pair: Pair) -> tuple[list[list[int]], list[list[int]]]:
    return undrafted(engines, pair, ONE_AFTER_THE_OTHER)


def is_deferred(worker: Any) -> bool | None:
    speculator = worker.model_runner.speculator
    return None if speculator is None else speculator._deferred is not None


@pytest.mark.parametrize(
    "options",
    [{}, {"ssd_backup": "ngram"}, {"ssd_verify": "ratio", "ssd_backup": "ngram"}],
    ids=["deferred", "ngram", "ratio"],
)
def test_both_of_a_tensor_parallel_target_verify_the_same(
    engines: Engines,
    pair: Pair,
    undrafted_side_by_side: tuple[list[list[int]], list[list[int]]],
    options: dict[str, Any],
) -> None:
    greedy, sampled = undrafted_side_by_side
    llm = engines.get(pair[0], ssd(pair[1], 3, **options), **SIDE_BY_SIDE)
    assert llm.collective_rpc(is_deferred) == [not options, False]
    assert generate(llm, prompts(), greedy_params(12)) == greedy
    found = generate(llm, prompts(), seeded())
    if "ssd_verify" not in options:
        assert found == sampled
    first, second = llm.collective_rpc(tokens_in_slots)
    assert first == second
    assert any(first)
    assert stats(llm)["hits"] > 0


@pytest.mark.parametrize(
    "options", [{}, {"ssd_verify": "ratio", "ssd_backup": "ngram"}], ids=["deferred", "ratio"]
)
def test_the_first_stage_of_a_pipeline_embeds_what_the_last_verifies(
    engines: Engines,
    pair: Pair,
    undrafted_one_after_the_other: tuple[list[list[int]], list[list[int]]],
    options: dict[str, Any],
) -> None:
    """Had it embedded other tokens, the drafts after them would be rejected."""
    greedy, sampled = undrafted_one_after_the_other
    llm = engines.get(pair[0], ssd(pair[1], 3, **options), **ONE_AFTER_THE_OTHER)
    assert llm.collective_rpc(is_deferred) == [None, not options]
    assert generate(llm, prompts(), greedy_params(12)) == greedy
    found = generate(llm, prompts(), seeded())
    if "ssd_verify" not in options:
        assert found == sampled
    counted = llm.collective_rpc("ssd_stats")[1]
    print(counted)
    assert counted["hits_k3"] > 0
