"""The seam into vLLM's V2 model runner (CUDA's default): request lifecycle out, drafts in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_ssd import compat
from vllm_ssd.link.counters import Counters
from vllm_ssd.link.messages import Sampling
from vllm_ssd.link.outcome_cache import NOT_INTRODUCED
from vllm_ssd.target.deferred import DeferredRounds
from vllm_ssd.target.draft_link import DraftLink
from vllm_ssd.target.guard import Guard
from vllm_ssd.target.histories import Histories
from vllm_ssd.target.ranks import Follower, share_rows, shared_drafts
from vllm_ssd.verify.coupled import longest_agreement
from vllm_ssd.verify.ratio import PointMass, distribution_as_logits


class SSDSpeculator(BaseSpeculator):
    """Stands where the V2 runner keeps a draft model in its own process; the draft is elsewhere.

    Where vLLM schedules asynchronously it verifies K drafts of every row, before it knows how many there are.
    Rows that have fewer are filled up, and `num_drafts` tells the verifier where the filling begins.
    """

    supports_mm_inputs = False
    proposer: Guard | Follower

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        ssd = vllm_config.speculative_config
        self.proposer = Follower()
        self._max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self._common_vocab_size = ssd.common_vocab_size
        self._device = device
        self._most_drafts: int = ssd.num_speculative_tokens
        self.num_drafts = torch.zeros(self._max_num_reqs, dtype=torch.int32, device=device)  # by vLLM's slot
        self.draft_logits: Tensor | None = None  # [max_num_reqs, K, V]; vLLM divides by the temperature
        if ssd.ssd_verify == "ratio":
            vocab_size = vllm_config.model_config.get_vocab_size()
            shape = (self._max_num_reqs, self._most_drafts, vocab_size)
            self.draft_logits = torch.zeros(shape, dtype=torch.float32, device=device)
        self._can_defer = runs_ahead(vllm_config)
        self._deferred: DeferredRounds | None = None
        self._histories = Histories()
        self._with_grammar: set[str] = set()
        self._proposed: tuple[Sequence[str], list[list[int]]] = ([], [])

    def connect(self, guard: Guard, link: DraftLink, counters: Counters) -> None:
        """Lead: with the draft's link and the host's half of the rounds, before the first request."""
        self.proposer = guard
        if self._can_defer:
            self._deferred = DeferredRounds(
                guard,
                link,
                counters,
                self._histories,
                self._max_num_reqs,
                self._most_drafts,
                self._common_vocab_size,
                self._device,
            )

    def close(self) -> None:
        """End what runs beside the model runner."""
        if self._deferred is not None:
            self._deferred.close()

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """No graphs here."""

    def capture(self) -> None:
        """No graphs here."""

    def add(self, request: NewRequestData, slot: int, seed: int) -> None:
        """A request enters the batch, for the first time or after a preemption."""
        self.num_drafts[slot] = 0
        epoch = NOT_INTRODUCED
        if request.sampling_params is not None and request.prompt_embeds is None:  # else there are no tokens
            with self._taking_turns():
                describe = partial(self._describe, request, seed)
                epoch = self.proposer.start(request.req_id, describe, slot)
        if self._deferred is not None:
            self._deferred.begin(slot, epoch)

    def _describe(self, request: NewRequestData, seed: int) -> tuple[list[int], Sampling]:
        """The request's tokens so far, and how the draft is to sample: as the target."""
        params = request.sampling_params
        assert params is not None
        assert request.prefill_token_ids is not None
        tokens = list(request.prefill_token_ids)
        self._histories.begin(request.req_id, tokens)
        if params.structured_outputs is not None:
            self._with_grammar.add(request.req_id)
        return tokens, Sampling.of(params, seed, self._common_vocab_size)

    def remove(self, request_id: str) -> None:
        """A request leaves the batch: finished, aborted or preempted. Unknown ids are ignored."""
        with self._taking_turns():
            self.proposer.stop(request_id)
            self._histories.end(request_id)
        self._with_grammar.discard(request_id)

    def history(self, request_id: str) -> list[int]:
        """The request's tokens so far, prompt and output."""
        return self._histories[request_id]

    def proposed(self) -> DraftTokenIds:
        """The drafts of the last step, without the filling."""
        request_ids, drafts = self._proposed if self._deferred is None else self._deferred.proposed()
        return DraftTokenIds(list(request_ids), [list(row) for row in drafts])

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        num_sampled: Tensor,  # [B], 0 for a row whose prompt is not prefilled yet
        num_rejected: Tensor,
        last_sampled: Tensor,  # [max_num_reqs, 1]
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """[B, K] drafts for the next verification of each row, filled up."""
        request_ids, slots = input_batch.req_ids, input_batch.idx_mapping
        if dummy_run:
            return self._no_drafts(len(request_ids))[0]
        if isinstance(self.proposer, Follower):
            drafts, num_drafts = self._no_drafts(len(request_ids))
        elif self._deferred is not None:
            drafts, num_drafts = self._deferred.propose(
                request_ids, slots.long(), num_sampled, last_sampled[:, 0]
            )
        else:
            drafts, num_drafts = self._propose_on_host(
                request_ids, num_sampled.tolist(), last_sampled[slots, 0].tolist()
            )
        drafts, self.num_drafts[slots] = shared_drafts(drafts, num_drafts)
        return drafts

    def load_distributions(self, input_batch: InputBatch, temperatures: Any) -> None:
        """Put what the drafts of this step were drawn from where vLLM's rejection sampler looks for it.

        Args:
            temperatures: [max_num_reqs], on the host.
        """
        assert self.draft_logits is not None
        drafts = [self.proposer.verified(request_id) for request_id in input_batch.req_ids]
        distributions = self.proposer.distributions(input_batch.req_ids, [len(row) for row in drafts])
        rows = zip(
            input_batch.req_ids, input_batch.idx_mapping_np.tolist(), drafts, distributions, strict=True
        )
        for request_id, slot, tokens, distribution in rows:
            if not tokens or not temperatures[slot]:
                continue
            if request_id in self._with_grammar:
                # It drops drafts that it forbids, so that which are verified depends on what was drawn.
                distribution = PointMass()
            logits = distribution_as_logits(
                distribution, tokens, float(temperatures[slot]), self.draft_logits.shape[-1]
            )
            self.draft_logits[slot, : len(tokens)] = async_tensor_h2d(logits, device=self._device)
        slots = input_batch.idx_mapping_np
        share_rows(self.draft_logits, slots[temperatures[slots] > 0])

    def _no_drafts(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """[B, K] of filling, and [B] zeros."""
        filling = torch.zeros(num_rows, self._most_drafts, dtype=torch.int64, device=self._device)
        return filling, torch.zeros(num_rows, dtype=torch.int32, device=self._device)

    def _propose_on_host(
        self, request_ids: Sequence[str], counts: list[int], last: list[int]
    ) -> tuple[Tensor, Tensor]:
        """[B, K] drafts, and [B] how many they are, once the host has seen the outcome."""
        verified = [self.proposer.verified(request_id) for request_id in request_ids]
        sampled = self._histories.add_outcomes(request_ids, verified, counts, last)
        drafts = self.proposer.propose(request_ids, sampled, [len(row) for row in verified])
        self._proposed = request_ids, drafts
        filled = [
            row + [token] * (self._most_drafts - len(row)) for row, token in zip(drafts, last, strict=True)
        ]
        num_drafts = [len(row) for row in drafts]
        return self._to_device(filled, torch.int64), self._to_device(num_drafts, torch.int32)

    def _taking_turns(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._deferred is None else self._deferred.lock

    def _to_device(self, values: Any, dtype: torch.dtype) -> Tensor:
        return async_tensor_h2d(torch.tensor(values, dtype=dtype), device=self._device)


def runs_ahead(vllm_config: VllmConfig) -> bool:
    """Whether the next step begins before the host knows the outcome of this one."""
    ssd = vllm_config.speculative_config
    # What else there is to do for a row than looking its outcome up needs the host to know the outcome.
    needs_outcome = ssd.ssd_verify == "ratio" or ssd.ssd_backup != "none" or ssd.ssd_wait_ms > 0
    return bool(vllm_config.scheduler_config.async_scheduling) and not needs_outcome


class SSDRejectionSampler(RejectionSampler):
    """vLLM's verifier, told where there are no drafts; in coupled verification it draws every position."""

    def __init__(
        self, runner: GPUModelRunner, speculator: SSDSpeculator, ssd: Any, device: torch.device
    ) -> None:
        super().__init__(runner.sampler, ssd, device)
        self._speculator = speculator
        self._is_coupled = ssd.ssd_verify == "coupled"

    def __call__(
        self,
        logits: Tensor,
        input_batch: InputBatch,
        draft_logits: Tensor | None = None,
        invalid_drafts: Tensor | None = None,
    ) -> SamplerOutput:
        num_drafts = self._speculator.num_drafts[input_batch.expanded_idx_mapping]
        filling = input_batch.expanded_local_pos > num_drafts
        invalid = filling if invalid_drafts is None else filling | invalid_drafts
        return super().__call__(logits, input_batch, draft_logits, invalid)

    def _verify(
        self,
        logits: Tensor,  # [N, V]
        draft_logits: Tensor | None,
        draft_sampled: Tensor,  # [N], the token that each row of logits follows
        pos: Tensor,  # [N]
        cu_num_logits: Tensor,  # [B + 1]
        idx_mapping: Tensor,
        idx_mapping_np: Any,
        expanded_idx_mapping: Tensor,  # [N]
        expanded_local_pos: Tensor,
        seq_lens_upper_bound_np: Any,
        verify_draft_sampled: Tensor,  # [N], the same with -1 for what is to be rejected
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self._is_coupled:
            return super()._verify(
                logits,
                draft_logits,
                draft_sampled,
                pos,
                cu_num_logits,
                idx_mapping,
                idx_mapping_np,
                expanded_idx_mapping,
                expanded_local_pos,
                seq_lens_upper_bound_np,
                verify_draft_sampled,
            )
        # As a step without drafts draws: the same constraints, the same noise at the same positions.
        states = self.sampler.sampling_states
        constrained = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        own = gumbel_sample(
            constrained,
            expanded_idx_mapping,
            states.temperature.gpu,
            states.seeds.gpu,
            pos,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )
        sampled, num_sampled = longest_agreement(
            own, verify_draft_sampled, cu_num_logits, self.num_speculative_steps
        )
        return constrained, sampled, num_sampled


class SSDModelRunnerV2(GPUModelRunner):
    """vLLM's runner, with the proposer told of requests and asked for drafts."""

    speculator: SSDSpeculator | None  # None where a later stage of the pipeline samples

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        with compat.speculator_class(SSDSpeculator):
            super().__init__(vllm_config, device)

    def connect(self, guard: Guard, link: DraftLink, counters: Counters) -> None:
        """Give the runner its half of the rounds; before the first request."""
        assert self.speculator is not None  # who leads samples
        self.speculator.connect(guard, link, counters)

    def close(self) -> None:
        """End what runs beside the runner."""
        assert self.speculator is not None
        self.speculator.close()

    def token_history(self, request_id: str) -> list[int]:
        """The request's tokens so far, prompt and output."""
        assert self.speculator is not None
        return self.speculator.history(request_id)

    def time_step(self, num_tokens: int) -> None:
        """One step over so many tokens that belong to nobody, to be timed: forward and logits."""
        _, hidden_states = self._dummy_run(num_tokens)
        if self.is_last_pp_rank:
            each_samples = np.ones(len(hidden_states), dtype=np.int32)  # as where all but one are drafts
            with self.maybe_select_dummy_loras(
                self.lora_config, each_samples, num_sampled_tokens=each_samples
            ):
                self.model.compute_logits(hidden_states)
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the target, then put our verifier before vLLM's."""
        super().load_model(*args, **kwargs)
        if self.speculator is not None:
            self.rejection_sampler = SSDRejectionSampler(
                self, self.speculator, self.speculative_config, self.device
            )

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Let requests into the batch, and tell the draft of them."""
        super().add_requests(scheduler_output)
        if self.speculator is None:
            return
        for request in scheduler_output.scheduled_new_reqs:
            slot = self.req_states.req_id_to_index[request.req_id]
            self.speculator.add(request, slot, int(self.sampler.sampling_states.seeds.np[slot]))

    def sample(
        self, hidden_states: Tensor, input_batch: InputBatch, grammar_output: GrammarOutput | None
    ) -> tuple[SamplerOutput, Tensor, Tensor]:
        """Sample and verify; for ratio verification the drafts' distributions come first."""
        assert self.speculator is not None
        if self.speculator.draft_logits is not None and input_batch.num_draft_tokens:
            self.speculator.load_distributions(input_batch, self.sampler.sampling_states.temperature.np)
        return super().sample(hidden_states, input_batch, grammar_output)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """The drafts that there really are: a scheduler that waits for them schedules no filling."""
        return None if self.speculator is None else self.speculator.proposed()

    def _remove_request(self, req_id: str) -> bool:
        if self.speculator is not None:
            self.speculator.remove(req_id)
        return super()._remove_request(req_id)
