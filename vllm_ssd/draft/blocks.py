"""KV blocks of the draft: allocation, sharing between requests, and prefix reuse (pure).

A block is free, held (by one or more requests, or by a branch), or cached: held by nobody, but full of the
KV of tokens that a later request may begin with. Cached blocks are reused least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

PrefixKey = tuple[int, tuple[int, ...]]  # (identity of the preceding block, this block's tokens)
NO_PREFIX = 0


@dataclass
class BlockCopies:
    """Whole-block copies to make before the next step, collected over requests."""

    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)


class BlockPool:
    """Hands out the ids 0..num_blocks-1.

    Prefixes are compared token by token through their keys, never by a hash alone. A block's identity is a
    number that is never used twice, so a key cannot match a block that has been overwritten since.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # blocks nobody holds, oldest first
        self._by_prefix: dict[PrefixKey, int] = {}
        self._prefix_of: dict[int, PrefixKey] = {}
        self._identity: dict[int, int] = {}
        self._last_identity = NO_PREFIX

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._cached)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks of undefined content, or None (and take nothing) if there are not as many."""
        if count > self.num_available:
            return None
        return [self._take() for _ in range(count)]

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one hold on each block; later blocks of a prefix are forgotten before earlier ones."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._prefix_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def remember(self, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        """Let later requests find the full blocks of `tokens`, whose KV lies in `blocks`."""
        parent = NO_PREFIX
        for index in range(min(len(tokens) // self.block_size, len(blocks))):
            key = self._key(parent, tokens, index)
            known = self._by_prefix.get(key)
            if known is not None:
                parent = self._identity[known]
                continue
            block = blocks[index]
            if block in self._prefix_of:  # under another prefix; leave that one in place
                return
            self._last_identity += 1
            self._by_prefix[key] = block
            self._prefix_of[block] = key
            self._identity[block] = parent = self._last_identity

    def reuse(self, tokens: Sequence[int]) -> list[int]:
        """Hold and return the blocks that already contain the KV of the longest known prefix of `tokens`."""
        blocks: list[int] = []
        parent = NO_PREFIX
        for index in range(len(tokens) // self.block_size):
            block = self._by_prefix.get(self._key(parent, tokens, index))
            if block is None:
                break
            self._cached.pop(block, None)
            self._holders[block] += 1
            blocks.append(block)
            parent = self._identity[block]
        return blocks

    def _key(self, parent: int, tokens: Sequence[int], index: int) -> PrefixKey:
        return parent, tuple(tokens[index * self.block_size : (index + 1) * self.block_size])

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._by_prefix[self._prefix_of.pop(block)]
            del self._identity[block]
        self._holders[block] = 1
        return block
