"""Faults of vLLM that SSD patches in its own engines, one function each: the failure, and when it can go.

They concern vLLM's V1 runner, with and without SSD. Engines without SSD are not ours to change: only
`VLLM_SSD_PATCH=1` in the environment (`PATCH_ALL`) asks for that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch

PATCH_ALL = "VLLM_SSD_PATCH"  # set to "1", this environment variable patches engines without SSD as well
_MARK = "_vllm_ssd"


def patch_rejection_sampler(sampler: Any) -> None:
    """Make both patches below in vLLM's V1 rejection sampler.

    Why this one alone: they concern every speculative method, and engines without SSD are not ours to change.

    Args:
        sampler: the runner's `RejectionSampler`.
    """
    sampler.forward = MethodType(_patched_forward(), sampler)


def patch_all_engines() -> None:
    """Patch engines without SSD too, where `PATCH_ALL` asks for it: baselines of SSD are to be right too."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.worker import gpu_input_batch

    RejectionSampler.forward = _patched_forward()
    stock = gpu_input_batch.maybe_create_thinking_budget_state_holder
    if hasattr(stock, _MARK):
        return

    def create(*args: Any, **kwargs: Any) -> Any:
        from vllm_ssd.target.thinking_budget import ThinkingBudgets

        holder = stock(*args, **kwargs)
        if holder is not None:
            holder.__class__ = ThinkingBudgets
        return holder

    setattr(create, _MARK, True)
    gpu_input_batch.maybe_create_thinking_budget_state_holder = create


def _patched_forward() -> Callable[..., Any]:
    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    forward: Callable[..., Any] = RejectionSampler.forward
    if hasattr(forward, _MARK):
        return forward
    forward = patch_min_tokens_of_bonus(forward)
    if current_platform.is_cpu():
        forward = patch_cpu_sampling(forward)
    setattr(forward, _MARK, True)
    return forward


def patch_cpu_sampling(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Repair the expansion of per-request sampling parameters to draft rows on CPU.

    Failure: `vllm.utils.cpu_triton_utils._expand_kernel_impl` hands its kernel an int64 *copy* of the output
    and drops it, so temperature, top_k and top_p of all speculated rows are uninitialised memory, and every
    speculative method samples from the wrong distribution at temperature > 0. Still so in 0.33.
    tests/e2e/test_exactness.py shows the fault and the patch. Goes when upstream writes its result back.

    Args:
        stock: `RejectionSampler.forward`.
    """
    module: Any = importlib.import_module("vllm.v1.sample.rejection_sampler")

    def expand(
        x: torch.Tensor,  # [batch]
        cu_num_tokens: torch.Tensor,  # [batch], cumulative
        num_tokens: int,
        replace_from: int = 0,
        replace_to: int = 0,
    ) -> torch.Tensor:
        """[num_tokens]"""
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)

    def forward(*args: Any, **kwargs: Any) -> Any:
        stock_expand = module.expand_batch_to_tokens
        module.expand_batch_to_tokens = expand
        try:
            return stock(*args, **kwargs)
        finally:
            module.expand_batch_to_tokens = stock_expand

    return forward


def patch_min_tokens_of_bonus(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Let `min_tokens` end where it should when the last accepted draft reaches it (V1 runner).

    Failure: the bonus token is sampled by the plain sampler, which forbids stop tokens by the output's length
    before the step. With min_tokens=10, 8 tokens so far and 3 accepted drafts, the bonus token may be a stop
    token but is kept from it, and greedy output differs from that without speculation, for every
    speculative method. Goes when upstream counts the drafts.

    Args:
        stock: `RejectionSampler.forward`.
    """
    from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

    def forward(
        self: Any, metadata: Any, draft_probs: Any, logits: torch.Tensor, sampling_metadata: Any
    ) -> Any:
        restricted = [
            processor
            for processor in sampling_metadata.logitsprocs.non_argmax_invariant
            if isinstance(processor, MinTokensLogitsProcessor) and processor.min_toks
        ]
        before = [processor.logits_slice for processor in restricted]
        for processor in restricted:
            rows, _ = processor.logits_slice
            still = [
                len(output) + metadata.num_draft_tokens[row] < min_tokens
                for row in rows.tolist()
                for min_tokens, output, *_ in [processor.min_toks[row]]
            ]
            keep = torch.tensor(still, dtype=torch.bool, device=rows.device)
            processor.logits_slice = tuple(part[keep] for part in processor.logits_slice)
        try:
            return stock(self, metadata, draft_probs, logits, sampling_metadata)
        finally:
            for processor, logits_slice in zip(restricted, before, strict=True):
                processor.logits_slice = logits_slice

    return forward


def patch_kernel_scan() -> None:
    """Let vLLM's search for the users of a kernel pass by objects that are not what they say (CPU).

    Failure: at every engine's start `vllm.triton_utils.dispatcher._rebind_kernels` reads `vars(value)` of all
    that modules hold where `hasattr(value, "__dict__")`. llvmlite's `binding.ffi.lib` answers any name with a
    function, also "__dict__". So with Numba in the process no engine starts: AttributeError:
    '_lib_fn_wrapper' object has no attribute 'get'. Our noise brings Numba, and so does vLLM's own method
    `ngram`: after such an LLM the next one in the process (VLLM_ENABLE_V1_MULTIPROCESSING=0) fails without
    this plugin as well (seen in 0.32.0). Goes when upstream asks for `isinstance(vars(value), Mapping)`.
    It stays for later engines of the process, as Numba does, and changes nothing that works.
    """
    module: Any = importlib.import_module("vllm.triton_utils.dispatcher")
    _ = module._rebind_kernels

    def has_attribute(value: object, name: str) -> bool:
        if name != "__dict__":
            return hasattr(value, name)
        try:
            return isinstance(vars(value), Mapping)
        except Exception:  # whatever that object does when it is asked
            return False

    module.hasattr = has_attribute  # found before the builtin


def patch_thinking_budgets(input_batch: Any) -> None:
    """Force the end of thinking where it is due without speculation, and on nobody else (V1 runner).

    Failures and repair: `vllm_ssd.target.thinking_budget`. Goes with that module.

    Args:
        input_batch: the runner's, which it may make anew.
    """
    holder = input_batch.thinking_budget_state_holder
    if holder is not None:
        from vllm_ssd.target.thinking_budget import ThinkingBudgets

        holder.__class__ = ThinkingBudgets


@contextmanager
def logprobs_of_chosen_tokens(sampler: Any, input_batch: Any) -> Iterator[None]:
    """Give each row of a step the log-probabilities that it asked for (V1 runner).

    Why: where one request names the tokens (`logprob_token_ids`), vLLM's sampler gives all rows those, so
    that others lack what they asked for, even without speculation. With drafts the request lacks most of its
    own, and if another one asks for the likeliest, the rejection sampler raises and the engine ends (any
    method of speculation). Goes with the V1 runner; its successor knows whose tokens they are.

    Args:
        sampler: the runner's `Sampler`, which the rejection sampler uses too.
        input_batch: the runner's; of the one step that is sampled meanwhile.
    """
    metadata, gather_likeliest = input_batch.sampling_metadata, sampler.gather_logprobs
    chosen = metadata.logprob_token_ids
    if not chosen:
        yield
        return

    def gather(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> Any:
        """Of [B * places, V], each row's places one after the other."""
        found = gather_likeliest(logprobs, num_logprobs, token_ids)
        places = len(logprobs) // input_batch.num_reqs
        more = max(0, *(len(tokens) - num_logprobs for tokens in chosen.values()))
        tokens = torch.nn.functional.pad(found.logprob_token_ids, (0, more))
        values = torch.nn.functional.pad(found.logprobs, (0, more), value=-float("inf"))
        for row, asked in chosen.items():
            part, columns = slice(row * places, (row + 1) * places), slice(1, len(asked) + 1)
            tokens[part, columns] = torch.tensor(asked, dtype=tokens.dtype, device=tokens.device)
            values[part, columns] = logprobs[part, asked]
        return found._replace(logprob_token_ids=tokens, logprobs=values)

    likeliest = metadata.max_num_logprobs or 0
    input_batch.sampling_metadata = replace(metadata, logprob_token_ids=None, max_num_logprobs=likeliest)
    sampler.gather_logprobs = gather
    try:
        yield
    finally:
        del sampler.gather_logprobs
        input_batch.sampling_metadata = metadata
