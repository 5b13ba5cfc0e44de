"""Fork copy: the branches' private copies of partial KV blocks, for all layers in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 1024  # of 8 bytes, that one program copies


class ForkCopy:
    """Copies whole KV blocks of some caches that are alike.

    Args:
        caches: each [num_blocks, ...]. What matters is that a block lies in one piece of 8-byte words; in
            which order its heads and tokens do is up to vLLM's layout. The caches are kept, so that their
            memory stays where it is.

    Raises:
        ValueError: if they are not such.
    """

    def __init__(self, caches: Sequence[Tensor]) -> None:
        first = caches[0]
        for cache in caches:
            if (cache.shape, cache.stride(), cache.dtype) != (first.shape, first.stride(), first.dtype):
                raise ValueError("the KV caches of all layers must be alike")
        span = 1 + sum((n - 1) * step for n, step in zip(first.shape[1:], first.stride()[1:], strict=True))
        if span != first[0].numel():
            raise ValueError("a KV block must lie in one piece")
        block_bytes, stride_bytes = (n * first.element_size() for n in (span, first.stride(0)))
        if block_bytes % 8 or stride_bytes % 8 or any(cache.data_ptr() % 8 for cache in caches):
            raise ValueError(f"a KV block of {block_bytes} bytes is not made of whole words of 8")
        self._caches = list(caches)
        self._words, self._stride = block_bytes // 8, stride_bytes // 8
        self._addresses = torch.tensor([cache.data_ptr() for cache in caches], device=caches[0].device)

    def __call__(self, sources: Tensor, targets: Tensor) -> None:
        """Copy block sources[i] to block targets[i] in every cache; both [n] int64, no target twice."""
        if len(sources):
            grid = (len(sources), len(self._caches), triton.cdiv(self._words, _WORDS))
            _copy_kernel[grid](self._addresses, sources, targets, self._words, self._stride, BLOCK=_WORDS)


@triton.jit
def _copy_kernel(addresses_ptr, sources_ptr, targets_ptr, words, stride, BLOCK: tl.constexpr):
    pair, layer, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cache = tl.load(addresses_ptr + layer).to(tl.pointer_type(tl.int64))
    source = tl.load(sources_ptr + pair).to(tl.int64)
    target = tl.load(targets_ptr + pair).to(tl.int64)
    offsets = part * BLOCK + tl.arange(0, BLOCK)
    there = offsets < words
    content = tl.load(cache + source * stride + offsets, mask=there)
    tl.store(cache + target * stride + offsets, content, mask=there)


def fork_copy_reference(caches: Sequence[Tensor], sources: Tensor, targets: Tensor) -> None:
    """What a `ForkCopy` of the caches does, in plain PyTorch."""
    for cache in caches:
        cache.index_copy_(0, targets, cache.index_select(0, sources))
