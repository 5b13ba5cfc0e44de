"""A target on two ranks: they hold the same tokens whatever the draft does, and those without speculation."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from engines import Engines, await_draft, generate, give_up_draft, greedy_params, ssd, stats

pytestmark = pytest.mark.timeout(300)

RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_num_seqs": 4}
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def one_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft shares one with a rank where there are but two: slow, and what is tested is not speed."""
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")


def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(2, 512) for _ in range(rng.randint(1, 90))] for _ in range(12)]


def sampled() -> list[Any]:
    """Requests with and without a seed, and greedy ones between them."""
    from vllm import SamplingParams

    kinds: list[dict[str, Any]] = [{"seed": 7}, {}, {"temperature": 0.0}, {"top_k": 20, "seed": 8}]
    return [
        SamplingParams(**{"temperature": 1.0, "max_tokens": 24, "ignore_eos": True, **kinds[i % len(kinds)]})
        for i in range(12)
    ]


def tokens_in_batch(worker: Any) -> list[list[int]]:
    """What this rank took the tokens of the last requests to be."""
    batch = worker.model_runner.input_batch
    rows = zip(batch.token_ids_cpu, batch.num_tokens_no_spec, strict=True)
    return [row[:count].tolist() for row, count in rows]


def assert_ranks_agree(llm: Any) -> None:
    first, second = llm.collective_rpc(tokens_in_batch)
    assert first == second
    assert any(first)


def planned(engines: Engines, pair: tuple[Path, Path]) -> Any:
    """An engine whose planner has timed both ranks."""
    speculative = ssd(pair[1], 4, ssd_planner=True, ssd_backup="ngram")
    llm = engines.get(pair[0], speculative, **RANKS)
    llm.collective_rpc(await_draft)
    llm.collective_rpc("ssd_plan", args=(4, 8))  # what it plans is its own
    return llm


def test_greedy_tokens_are_those_without_speculation(engines: Engines, pair: tuple[Path, Path]) -> None:
    params = greedy_params(32)
    plain = generate(engines.get(pair[0], **RANKS), prompts(), params)
    llm = planned(engines, pair)
    assert generate(llm, prompts(), params) == plain
    assert_ranks_agree(llm)
    assert stats(llm)["hits"] > 20


def test_sampled_tokens_do_not_depend_on_the_draft(engines: Engines, pair: tuple[Path, Path]) -> None:
    """Seeds of requests that have none are drawn alike on both ranks, or they would part."""
    llm = planned(engines, pair)
    hits = stats(llm)["hits"]
    seeded = [i for i, params in enumerate(sampled()) if params.seed is not None or not params.temperature]
    with_draft = generate(llm, prompts(), sampled())
    assert_ranks_agree(llm)
    assert stats(llm)["hits"] > hits + 20
    llm.collective_rpc(give_up_draft)
    undrafted = stats(llm)["undrafted"]
    without = generate(llm, prompts(), sampled())
    assert [with_draft[i] for i in seeded] == [without[i] for i in seeded]
    assert stats(llm)["undrafted"] > undrafted
    assert_ranks_agree(llm)


def test_ratio_verification_takes_the_same_distributions_on_both_ranks(
    engines: Engines, pair: tuple[Path, Path]
) -> None:
    """Each rank would read what there is of them at another time."""
    llm = engines.get(pair[0], ssd(pair[1], 3, ssd_verify="ratio", ssd_backup="ngram"), **RANKS)
    llm.collective_rpc(await_draft)
    generate(llm, prompts(), sampled())
    assert_ranks_agree(llm)
    assert stats(llm)["hits"] > 20


@contextmanager
def drafts_that_hang() -> Iterator[None]:
    """Every draft is stopped while it starts; however long the target takes, it is not ready by then."""
    found: set[psutil.Process] = set()
    is_over = threading.Event()

    def stop_new() -> None:
        while not is_over.wait(0.05):
            for process in set(psutil.Process().children(recursive=True)) - found:
                with suppress(psutil.NoSuchProcess):
                    if "vllm_ssd.draft" in process.cmdline():
                        process.suspend()
                        found.add(process)

    watcher = threading.Thread(target=stop_new)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_a_draft_that_does_not_come_fails_the_start_on_both_ranks(
    engines: Engines, pair: tuple[Path, Path]
) -> None:
    """The follower waits for it too; it must not wait for ever."""
    engines.close()
    before = set(multiprocessing.active_children())
    try:
        with drafts_that_hang(), pytest.raises(RuntimeError, match="ssd_ready_timeout"):
            engines.get(pair[0], ssd(pair[1], 4, ssd_ready_timeout=0.01), **RANKS)
    finally:
        # vLLM leaves them to the end of the engine's process, which here is ours.
        for worker in set(multiprocessing.active_children()) - before:
            worker.kill()
            worker.join()
