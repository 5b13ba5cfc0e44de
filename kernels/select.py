"""Branch selection: the outcomes of each request that are likeliest this very round, whatever their k.

It is what `ssd_fanout: global` does (`vllm_ssd.plan.fanout.global_fanout` over `draft.requests.outcomes`),
for a whole batch and without a word from the host, once `vllm_ssd.draft.likelihood` has weighed the drafts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NO_BRANCH = -1


def select_branches(tokens: Tensor, log_probs: Tensor, sent: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """The `budget` likeliest outcomes (k, token) of each row, likeliest first.

    The token that was sent after k drafts is no outcome: had it been right, it would have been accepted. Its
    log-probability, or the least of the candidates' if it is not among them, weighs all later lengths.

    Args:
        tokens: [R, P, C] int64, the candidates of each accepted length k = 0..P - 1, likeliest first.
        log_probs: [R, P, C] float32, of each candidate; -inf for lengths that a row does not have.
        sent: [R, P] int64, the draft that was verified after k accepted ones; -1 where there is none.
        budget: branches of a row.

    Returns:
        [R, budget] int64 k and [R, budget] int64 tokens; NO_BRANCH for both where there are no more outcomes.
    """
    num_rows, num_lengths, num_candidates = tokens.shape
    ks = torch.empty(num_rows, budget, dtype=torch.int64, device=tokens.device)
    chosen = torch.empty_like(ks)
    if num_rows:
        _select_kernel[(num_rows,)](
            tokens.contiguous(),
            log_probs.contiguous(),
            sent.contiguous(),
            ks,
            chosen,
            num_lengths,
            num_candidates,
            budget,
            NO_BRANCH=NO_BRANCH,
            BLOCK_P=triton.next_power_of_2(num_lengths),
            BLOCK_C=triton.next_power_of_2(num_candidates),
            num_warps=4,
        )
    return ks, chosen


@triton.jit
def _select_kernel(
    tokens_ptr,
    log_probs_ptr,
    sent_ptr,
    ks_ptr,
    chosen_ptr,
    num_lengths,
    num_candidates,
    budget,
    NO_BRANCH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lengths, columns = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    there = (lengths < num_lengths)[:, None] & (columns < num_candidates)[None, :]
    places = (row * num_lengths + lengths)[:, None] * num_candidates + columns[None, :]
    tokens = tl.load(tokens_ptr + places, mask=there, other=-1)
    log_probs = tl.load(log_probs_ptr + places, mask=there, other=float("-inf"))
    sent = tl.load(sent_ptr + row * num_lengths + lengths, mask=lengths < num_lengths, other=-1)

    is_sent = there & (tokens == sent[:, None])
    of_sent = tl.max(tl.where(is_sent, log_probs, float("-inf")), axis=1)
    least = tl.min(tl.where(there, log_probs, float("inf")), axis=1)
    of_sent = tl.where(tl.sum(is_sent.to(tl.int32), axis=1) > 0, of_sent, least)
    of_sent = tl.where(lengths < num_lengths, of_sent, 0.0)
    is_before = lengths[None, :] < lengths[:, None]
    reached = tl.sum(tl.where(is_before, of_sent[None, :], 0.0), axis=1)  # that the k drafts are accepted
    scores = tl.where(there & ~is_sent, log_probs + reached[:, None], float("-inf"))

    flat_scores = tl.reshape(scores, [BLOCK_P * BLOCK_C])
    flat_tokens = tl.reshape(tokens, [BLOCK_P * BLOCK_C])
    flat = tl.arange(0, BLOCK_P * BLOCK_C)
    for branch in range(budget):
        best, where = tl.max(flat_scores, axis=0, return_indices=True)
        is_outcome = best > float("-inf")
        token = tl.sum(tl.where(flat == where, flat_tokens, 0), axis=0)
        out = row * budget + branch
        tl.store(ks_ptr + out, tl.where(is_outcome, where // BLOCK_C, NO_BRANCH).to(tl.int64))
        tl.store(chosen_ptr + out, tl.where(is_outcome, token, NO_BRANCH))
        flat_scores = tl.where(flat == where, float("-inf"), flat_scores)


def select_branches_reference(
    tokens: Tensor, log_probs: Tensor, sent: Tensor, budget: int
) -> tuple[Tensor, Tensor]:
    """`select_branches` in plain PyTorch."""
    num_candidates = tokens.shape[2]
    is_sent = tokens == sent[..., None]
    of_sent = log_probs.where(is_sent, -torch.inf).amax(dim=-1)
    of_sent = of_sent.where(is_sent.any(dim=-1), log_probs.amin(dim=-1))
    reached = torch.nn.functional.pad(of_sent, (1, -1)).cumsum(dim=-1)[..., None]
    scores = (log_probs + reached).where(~is_sent, -torch.inf).flatten(1)  # [R, P * C]
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :budget]
    is_outcome = scores.gather(1, best) > -torch.inf
    ks = torch.where(is_outcome, best // num_candidates, NO_BRANCH)
    chosen = torch.where(is_outcome, tokens.flatten(1).gather(1, best), NO_BRANCH)
    missing = budget - ks.shape[1]
    return tuple(torch.nn.functional.pad(part, (0, missing), value=NO_BRANCH) for part in (ks, chosen))  # type: ignore[return-value]
