"""The draft's half of the outcome cache on the device: a step publishes what it yields, without the host.

The table is that of `vllm_ssd.link.outcome_cache.OutcomeCache`, in memory that the draft's device can write.
Another device may be reading it: what makes an entry match, and what says how many drafts it has, is written
last.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_ssd.link.outcome_cache import DEPTH, EPOCH, FIRST_DRAFT, NO_ENTRY

_EPOCH, _DEPTH, _FIRST_DRAFT = tl.constexpr(EPOCH), tl.constexpr(DEPTH), tl.constexpr(FIRST_DRAFT)


def publish(entries: Tensor, places: Tensor, depths: Tensor, drafts: Tensor) -> None:
    """Add each row's draft to its entry, and count it.

    Rows without an entry are left alone, and those whose entry is full.

    Args:
        entries: [S, F, FIRST_DRAFT + K] int64, the outcome cache.
        places: [R] int64, which of the S * F entries is each row's, or NO_ENTRY. None twice.
        depths: [R] int64, how many drafts each entry has; advanced here.
        drafts: [R] int64.
    """
    if len(places):
        width = entries.shape[2]
        _publish_kernel[(len(places),)](
            entries, places, depths, drafts, width, width - FIRST_DRAFT, NO_ENTRY=NO_ENTRY, num_warps=1
        )


@triton.jit
def _publish_kernel(
    entries_ptr, places_ptr, depths_ptr, drafts_ptr, width, num_speculative_tokens, NO_ENTRY: tl.constexpr
):
    row = tl.program_id(0)
    place = tl.load(places_ptr + row).to(tl.int64)
    depth = tl.load(depths_ptr + row)
    if (place != NO_ENTRY) & (depth < num_speculative_tokens):
        entry = entries_ptr + place * width
        tl.store(entry + _FIRST_DRAFT + depth, tl.load(drafts_ptr + row))
        tl.atomic_xchg(entry + _DEPTH, depth + 1, sem="release", scope="sys")
        tl.store(depths_ptr + row, depth + 1)


def publish_reference(entries: Tensor, places: Tensor, depths: Tensor, drafts: Tensor) -> None:
    """`publish` in plain PyTorch."""
    rows = ((places != NO_ENTRY) & (depths < entries.shape[2] - FIRST_DRAFT)).nonzero()[:, 0]
    flat = entries.view(-1, entries.shape[2])
    flat[places[rows], FIRST_DRAFT + depths[rows]] = drafts[rows]
    flat[places[rows], DEPTH] = depths[rows] + 1
    depths[rows] += 1


def replace(entries: Tensor, first: int, new: Tensor) -> None:
    """Put other entries in place of `first`, `first` + 1, ... of the S * F.

    Args:
        entries: [S, F, FIRST_DRAFT + K] int64, the outcome cache.
        new: [n, FIRST_DRAFT + K] int64.
    """
    if len(new):
        width = entries.shape[2]
        block = triton.next_power_of_2(width)
        _replace_kernel[(len(new),)](entries, first, new.contiguous(), width, BLOCK_W=block, num_warps=1)


@triton.jit(do_not_specialize=["first"])
def _replace_kernel(entries_ptr, first, new_ptr, width, BLOCK_W: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    entry, new = entries_ptr + (first + row) * width, new_ptr + row * width
    columns = tl.arange(0, BLOCK_W)
    there = (columns < width) & (columns != _EPOCH)
    # No key matches while the rest changes.
    tl.atomic_xchg(entry + _EPOCH, tl.zeros([], tl.int64), sem="acq_rel", scope="sys")
    tl.debug_barrier()
    tl.store(entry + columns, tl.load(new + columns, mask=there), mask=there)
    tl.debug_barrier()
    tl.atomic_xchg(entry + _EPOCH, tl.load(new + _EPOCH), sem="release", scope="sys")


def replace_reference(entries: Tensor, first: int, new: Tensor) -> None:
    """`replace` in plain PyTorch."""
    entries.view(-1, entries.shape[2])[first : first + len(new)] = new
