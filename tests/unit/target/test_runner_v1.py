"""What the V1 model runner tells the proposer, without a model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_ssd.target import runner_v1
from vllm_ssd.target.runner_v1 import SSDModelRunner


class Recorder:
    """Stands where the runner has its proposer."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def start(self, request_id: str, describe: Callable[[], tuple[list[int], Any]]) -> None:
        self.told.append(("start", request_id, describe()[0]))

    def stop(self, request_id: str) -> None:
        self.told.append(("stop", request_id))


def test_a_request_whose_tokens_vllm_drops_is_introduced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed transfer of KV; else the draft's positions are wrong for the rest of the request."""
    counts = {"cut": 1, "whole": 2}

    def update(runner: Any, scheduler_output: Any) -> None:
        for request_id, count in counts.items():
            del runner.requests[request_id].output_token_ids[count:]

    monkeypatch.setattr(CPUModelRunner, "_update_states", update)
    runner = object.__new__(SSDModelRunner)
    runner.proposer = recorder = Recorder()  # type: ignore[assignment]
    runner.requests = {
        name: SimpleNamespace(prompt_token_ids=[7], output_token_ids=output, sampling_params=None)
        for name, output in (("cut", [1, 2, 3]), ("whole", [4, 5]))
    }
    runner._seeds, runner._new_seeds = {}, torch.Generator()
    runner.input_batch = SimpleNamespace(thinking_budget_state_holder=None)
    runner._common_vocab_size = 512
    cached = SimpleNamespace(
        req_ids=list(counts), num_output_tokens=list(counts.values()), resumed_req_ids=set()
    )
    runner._update_states(
        SimpleNamespace(  # type: ignore[arg-type]
            scheduled_cached_reqs=cached, scheduled_new_reqs=[], finished_req_ids=(), preempted_req_ids=None
        )
    )
    assert recorder.told == [("stop", "cut"), ("start", "cut", [7, 1])]


def test_seeds_of_unseeded_requests_are_a_start_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas give their users other texts, unless the engine was given a seed; all ranks draw alike."""
    sent: list[int] = []

    def broadcast(seed: int) -> int:
        sent.append(seed)
        return sent[0]  # what the first rank has sent

    monkeypatch.setattr(
        runner_v1, "get_world_group", lambda: SimpleNamespace(broadcast_object=lambda seed: broadcast(seed))
    )
    first, second = runner_v1._shared_seed(0), runner_v1._shared_seed(0)
    assert first == second == sent[0] != sent[1]
    assert runner_v1._shared_seed(7) == 7
    assert len(sent) == 2
