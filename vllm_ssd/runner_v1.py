"""The seam into vLLM's V1 model runner (CPU): request lifecycle out, drafts in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_ssd import compat
from vllm_ssd.proposer import Proposer


class NoDrafter:
    """Stands where the V1 runner keeps a drafter in its own process; the draft is elsewhere."""

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Nothing to load: the draft process loads the draft model."""


class SSDModelRunner(CPUModelRunner):
    """vLLM's runner, with the proposer told of requests and asked for drafts."""

    proposer: Proposer

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        with compat.no_stock_drafter(vllm_config.speculative_config, NoDrafter()):
            super().__init__(vllm_config, device)

    def token_history(self, request_id: str) -> list[int]:
        """The request's tokens so far, prompt and output."""
        request = self.requests[request_id]
        return [*(request.prompt_token_ids or ()), *request.output_token_ids]

    def _update_states(self, scheduler_output: SchedulerOutput) -> Callable[..., Any] | None:
        corrections = super()._update_states(scheduler_output)
        gone = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        for request_id in gone:
            self.proposer.stop(request_id)
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        for request_id in [*(new.req_id for new in scheduler_output.scheduled_new_reqs), *resumed]:
            self.proposer.stop(request_id)  # a streaming request comes again with more prompt
            if self.requests[request_id].prompt_token_ids is not None:  # not given as embeddings
                self.proposer.start(request_id, self.token_history(request_id))
        return corrections

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        # The draft minds its own length, row by row; for the whole batch vLLM would schedule zeros as drafts.
        return common_attn_metadata is not None

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: torch.Tensor | list[list[int]],
        *args: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        """Drafts of each row of the batch, as `GPUModelRunner` (V1) expects them: ragged lists."""
        assert isinstance(sampled_token_ids, list)
        return self.proposer.propose(self.input_batch.req_ids, sampled_token_ids)
