"""The seam into vLLM's V1 model runner (CPU): request lifecycle out, drafts in."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_world_group
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_ssd import compat, repairs
from vllm_ssd.link.counters import Counters
from vllm_ssd.link.messages import Sampling
from vllm_ssd.target.draft_link import DraftLink
from vllm_ssd.target.guard import Guard
from vllm_ssd.target.ranks import Follower, shared_distributions
from vllm_ssd.verify import coupled, ratio
from vllm_ssd.verify.noise import gumbel, wrapped_to_int64
from vllm_ssd.verify.ratio import DraftDistribution, PointMass
from vllm_ssd.verify.verification import Places, draw


class NoDrafter:
    """Stands where the V1 runner keeps a drafter in its own process; the draft is elsewhere."""

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Nothing to load: the draft process loads the draft model."""


class SSDModelRunner(CPUModelRunner):
    """vLLM's runner, with the proposer told of requests and asked for drafts."""

    proposer: Guard | Follower

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        with compat.no_stock_drafter(vllm_config.speculative_config, NoDrafter()):
            super().__init__(vllm_config, device)
        self.proposer = Follower()
        self._new_seeds = torch.Generator().manual_seed(_shared_seed(vllm_config.model_config.seed))
        self._is_coupled = vllm_config.speculative_config.ssd_verify == "coupled"
        self._common_vocab_size = vllm_config.speculative_config.common_vocab_size
        self._seeds: dict[str, int] = {}  # of the requests that are sampled
        gumbel(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 1)  # compile it now

    def connect(self, guard: Guard, link: DraftLink, counters: Counters) -> None:
        """Let this runner lead: give it its half of the rounds, before the first request."""
        self.proposer = guard

    def close(self) -> None:
        """Nothing runs beside it."""

    def token_history(self, request_id: str) -> list[int]:
        """The request's tokens so far, prompt and output."""
        request = self.requests[request_id]
        return [*(request.prompt_token_ids or ()), *request.output_token_ids]

    def time_step(self, num_tokens: int) -> None:
        """One forward over so many tokens that belong to nobody and their logits, to be timed."""
        hidden, _ = self._dummy_run(num_tokens, force_attention=True, remove_lora=False)
        each_samples = np.ones(len(hidden), dtype=np.int32)  # as where all but one of a row are drafts
        with self.maybe_select_dummy_loras(self.lora_config, each_samples, num_sampled_tokens=each_samples):
            self.model.compute_logits(hidden)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Callable[..., Any] | None:
        repairs.patch_thinking_budgets(self.input_batch)
        cached = scheduler_output.scheduled_cached_reqs
        cut_back = [  # a failed transfer of KV made vLLM drop tokens that it had sampled
            request_id
            for request_id, num_tokens in zip(cached.req_ids, cached.num_output_tokens, strict=True)
            if num_tokens < len(self.requests[request_id].output_token_ids)
        ]
        corrections = super()._update_states(scheduler_output)
        for request_id in scheduler_output.preempted_req_ids or ():
            self.proposer.stop(request_id)
        for request_id in scheduler_output.finished_req_ids:
            self.proposer.stop(request_id)
            self._seeds.pop(request_id, None)
        new = [request.req_id for request in scheduler_output.scheduled_new_reqs]
        for request_id in dict.fromkeys([*new, *cached.resumed_req_ids, *cut_back]):
            self.proposer.stop(request_id)  # a streaming request comes again with more prompt
            seed = self._seed(request_id)  # drawn on all ranks, in the same order
            if self.requests[request_id].prompt_token_ids is not None:  # not given as embeddings
                self.proposer.start(request_id, partial(self._describe, request_id, seed))
        return corrections

    def _describe(self, request_id: str, seed: int) -> tuple[list[int], Sampling]:
        """The request's tokens so far, and how the draft is to sample: as the target."""
        params = self.requests[request_id].sampling_params
        sampling = Sampling.of(params, seed, self._common_vocab_size)
        return self.token_history(request_id), sampling

    def _seed(self, request_id: str) -> int:
        """The request's own seed, or one of the engine's."""
        params = self.requests[request_id].sampling_params
        if params is not None and params.seed is not None:
            return wrapped_to_int64(int(params.seed))  # Python's generators take any integer, tensors do not
        if request_id not in self._seeds:
            self._seeds[request_id] = int(torch.randint(2**63 - 1, (), generator=self._new_seeds))
        return self._seeds[request_id]

    def _sample(
        self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        with repairs.logprobs_of_chosen_tokens(self.sampler, self.input_batch):
            return self._verify_or_sample(logits, spec_decode_metadata)

    def _verify_or_sample(
        self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        if self.input_batch.sampling_metadata.all_greedy:
            return self._apply_sampler(logits, spec_decode_metadata)
        places = self._places(spec_decode_metadata)
        if self._is_coupled:
            verify = partial(coupled.verify, places)
        else:
            verify = partial(ratio.verify, places, self._distributions(places.num_drafts.tolist()))
        with compat.sampling_replaced(self.sampler, partial(draw, places), verify):
            return self._apply_sampler(logits, spec_decode_metadata)

    def _apply_sampler(
        self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        if spec_decode_metadata is None or any(spec_decode_metadata.num_draft_tokens):
            return super()._sample(logits, spec_decode_metadata)
        # Nothing to verify. The rejection sampler would apply top-k to no rows, where torch's max raises: a
        # single request with top_k ended the engine (vLLM 0.32, any method of speculation). What it would do
        # else is this: each row is its request's bonus row, which is how state that vLLM keeps for
        # speculation (thinking budgets) finds a request's row.
        return self.sampler(logits, self.input_batch.sampling_metadata, predict_bonus_token=True)

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        # vLLM rewinds a request's generator after a part of its prompt, which the CPU kind cannot: a seeded
        # request with a prompt in chunks ended the engine (vLLM 0.32, even without speculation).
        generators, self.input_batch.generators = self.input_batch.generators, {}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators = generators

    def _distributions(self, num_drafts: list[int]) -> list[DraftDistribution]:
        """What each row's drafts were drawn from."""
        request_ids = self.input_batch.req_ids
        distributions = shared_distributions(self.proposer.distributions(request_ids, num_drafts))
        # A grammar drops drafts that it forbids, so that which drafts are verified depends on what was drawn.
        return [
            PointMass() if self._has_grammar(request_id) else distribution
            for request_id, distribution in zip(request_ids, distributions, strict=True)
        ]

    def _has_grammar(self, request_id: str) -> bool:
        params = self.requests[request_id].sampling_params
        return params is not None and params.structured_outputs is not None

    def _places(self, spec_decode_metadata: SpecDecodeMetadata | None) -> Places:
        """Where each row of the batch samples."""
        batch = self.input_batch
        num_drafts = [0] * batch.num_reqs
        if spec_decode_metadata is not None:
            num_drafts = spec_decode_metadata.num_draft_tokens
        temperature = batch.sampling_metadata.temperature
        assert temperature is not None
        return Places(
            torch.tensor([self._seed(request_id) for request_id in batch.req_ids]),
            torch.tensor(batch.num_tokens_no_spec[: batch.num_reqs], dtype=torch.int64) - 1,
            torch.tensor(num_drafts),
            temperature == 0,
            batch.vocab_size,
        )

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
        request_ids, scheduled = self.input_batch.req_ids, scheduler_output.scheduled_spec_decode_tokens
        num_verified = [len(scheduled.get(request_id, ())) for request_id in request_ids]
        return self.proposer.propose(request_ids, sampled_token_ids, num_verified)


def _shared_seed(seed: int) -> int:
    """What the seeds of unseeded requests are drawn from, alike on all ranks of the target.

    vLLM's default, 0, cannot be told from a choice of the user's. It counts as none: replicas and later
    starts must not give their users the same texts.
    """
    return seed or get_world_group().broadcast_object(secrets.randbits(63))
