"""Outcome look-up on the device: the drafts of a whole batch in one launch, without a word from the host.

The table is that of `vllm_ssd.link.outcome_cache.OutcomeCache`, in memory that the device can read. The
outcome of a row is where vLLM's V2 runner leaves it: the number of new tokens, and the last of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ssd.link.outcome_cache import ACCEPTED, DEPTH, EPOCH, FIRST_DRAFT, ROUND, TOKEN

_EPOCH, _ROUND, _TOKEN = tl.constexpr(EPOCH), tl.constexpr(ROUND), tl.constexpr(TOKEN)
_ACCEPTED = tl.constexpr(ACCEPTED)
_DEPTH, _FIRST_DRAFT = tl.constexpr(DEPTH), tl.constexpr(FIRST_DRAFT)
MISSED = -1


def look_up(
    entries: Tensor,
    slots: Tensor,
    epochs: Tensor,
    rounds: Tensor,
    num_sampled: Tensor,
    last_sampled: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    vocab_size: int,
) -> None:
    """Find each row's outcome among the published branches, and advance its round.

    A row is left alone, with no drafts, if it is padding or has no outcome (its prompt is not prefilled yet).

    Args:
        entries: [S, F, FIRST_DRAFT + K] int64, the outcome cache; F >= 1, empty entries have epoch 0.
        slots: [B] int64, of each row; -1 for padding. No slot twice.
        epochs: [S] int64, what each slot's entries must carry.
        rounds: [S] int64, likewise; advanced here.
        num_sampled: [B] int32, new tokens: 1 + k, or 0 for a row without an outcome.
        last_sampled: [S] int64, the token that ends each slot's outcome.
        drafts: [B, K] int64, written: the drafts found, filled up with the last token, which is always a
            valid one.
        num_drafts: [B] int32, written: how many were found (the depth reached), 0 without an outcome,
            MISSED where no branch has the outcome.
        vocab_size: V; drafts end before what is no token of it, whoever has written it.
    """
    num_rows, num_speculative_tokens = drafts.shape
    if not num_rows:
        return
    num_branches = entries.shape[1]
    _look_up_kernel[(num_rows,)](
        entries,
        entries.stride(0),
        entries.stride(1),
        slots,
        epochs,
        rounds,
        num_sampled,
        last_sampled,
        drafts,
        drafts.stride(0),
        num_drafts,
        num_branches,
        num_speculative_tokens,
        vocab_size,
        MISSED=MISSED,
        BLOCK_F=triton.next_power_of_2(num_branches),
        BLOCK_K=triton.next_power_of_2(num_speculative_tokens),
        num_warps=1,
    )


@triton.jit
def _look_up_kernel(
    entries_ptr,
    slot_stride,
    entry_stride,
    slots_ptr,
    epochs_ptr,
    rounds_ptr,
    num_sampled_ptr,
    last_sampled_ptr,
    drafts_ptr,
    drafts_stride,
    num_drafts_ptr,
    num_branches,
    num_speculative_tokens,
    vocab_size,
    MISSED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    num_sampled = tl.load(num_sampled_ptr + row)
    columns = tl.arange(0, BLOCK_K)
    in_row = columns < num_speculative_tokens
    drafts = drafts_ptr + row * drafts_stride + columns
    if (slot < 0) | (num_sampled <= 0):
        tl.store(drafts, tl.zeros([BLOCK_K], tl.int64), mask=in_row)
        tl.store(num_drafts_ptr + row, 0)
        return

    epoch = tl.load(epochs_ptr + slot)
    round_ = tl.load(rounds_ptr + slot)
    token = tl.load(last_sampled_ptr + slot)
    branches = tl.arange(0, BLOCK_F)
    there = branches < num_branches
    # The draft may be writing meanwhile, so each value is read from memory and once. Nothing orders the reads
    # among each other: a draft that is read before it was written is a wrong guess, which greedy and
    # coupled verification reject. (Ratio verification, where q must fit the draft, looks up on the host.)
    entries = entries_ptr + slot * slot_stride + branches * entry_stride
    matches = there & (tl.load(entries + _EPOCH, mask=there, other=0, volatile=True) == epoch)
    matches &= tl.load(entries + _ROUND, mask=there, other=0, volatile=True) == round_
    matches &= tl.load(entries + _ACCEPTED, mask=there, other=-1, volatile=True) == num_sampled - 1
    matches &= tl.load(entries + _TOKEN, mask=there, other=-1, volatile=True) == token
    branch = tl.max(tl.where(matches, branches, -1), axis=0)
    found = branch >= 0
    entry = entries_ptr + slot * slot_stride + tl.maximum(branch, 0) * entry_stride
    depth = tl.where(found, tl.load(entry + _DEPTH, volatile=True), 0)
    depth = tl.minimum(tl.maximum(depth, 0), num_speculative_tokens)
    filled = tl.load(entry + _FIRST_DRAFT + columns, mask=in_row & (columns < depth), other=0, volatile=True)
    # The target embeds them: a damaged table must not end it.
    is_invalid = (filled < 0) | (filled >= vocab_size)
    depth = tl.minimum(depth, tl.min(tl.where(is_invalid, columns, BLOCK_K), axis=0))
    is_draft = in_row & (columns < depth)
    tl.store(drafts, tl.where(is_draft, filled, token), mask=in_row)
    tl.store(num_drafts_ptr + row, tl.where(found, depth, MISSED).to(tl.int32))
    tl.store(rounds_ptr + slot, round_ + 1)


def look_up_reference(
    entries: Tensor,
    slots: Tensor,
    epochs: Tensor,
    rounds: Tensor,
    num_sampled: Tensor,
    last_sampled: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    vocab_size: int,
) -> None:
    """`look_up` in plain PyTorch."""
    has_outcome = (slots >= 0) & (num_sampled > 0)
    slots = slots.clamp(min=0)
    tokens = last_sampled[slots]
    keys = torch.stack([epochs[slots], rounds[slots], num_sampled.long() - 1, tokens], dim=-1)  # [B, 4]
    found = (entries[slots][..., EPOCH : TOKEN + 1] == keys[:, None]).all(dim=-1)  # [B, F]
    is_hit = has_outcome & found.any(dim=-1)
    entry = entries[slots, found.int().argmax(dim=-1)]  # [B, FIRST_DRAFT + K]
    depth = torch.where(is_hit, entry[:, DEPTH], 0)[:, None]
    columns = torch.arange(drafts.shape[1], device=drafts.device)
    drafted = entry[:, FIRST_DRAFT:]
    is_valid = (columns < depth) & (drafted >= 0) & (drafted < vocab_size)
    depth = is_valid.long().cumprod(dim=1).sum(dim=1)
    filled = torch.where(columns < depth[:, None], drafted, tokens[:, None])
    drafts.copy_(torch.where(has_outcome[:, None], filled, 0))
    num_drafts.copy_(torch.where(has_outcome, torch.where(is_hit, depth, MISSED), 0))
    rounds.index_add_(0, slots, has_outcome.long())
