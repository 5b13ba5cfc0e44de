"""Branches: pre-speculated continuations of one request, as rows over shared prefix blocks (pure).

A branch (k, t) continues the trunk after its k-th sent draft token with the candidate t. Its block table is
the trunk's full blocks before t, a private copy of the block that t falls into, and private blocks beyond.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass
class BranchGroup:
    """Branches of one request that were forked together and advance in lockstep; n branches."""

    first_entry: int  # their place among the request's entries of the outcome cache
    ks: Int64Array  # [n] accepted length
    roots: Int64Array  # [n] position of the candidate token
    chains: Int64Array  # [n, K + 2] the candidate, then its draft tokens as they come
    block_tables: Int32Array  # [n, max_blocks]
    num_shared: list[int]  # [n] leading blocks that belong to the trunk
    private_blocks: list[list[int]]  # [n] the branch's own blocks, after the shared ones
    steps: int = 0
    candidates: list[Int64Array] = field(default_factory=list)  # per step [n, num_candidates]

    def __len__(self) -> int:
        return len(self.ks)

    @property
    def next_tokens(self) -> Int64Array:
        """[n] the tokens that the next step feeds."""
        return self.chains[:, self.steps]

    @property
    def next_positions(self) -> Int64Array:
        """[n] their positions."""
        return self.roots + self.steps

    def advance(self, candidates: Int64Array) -> Int64Array:
        """Take in a step's result [n, num_candidates]; returns the new draft tokens [n]."""
        self.candidates.append(candidates)
        self.steps += 1
        self.chains[:, self.steps] = candidates[:, 0]
        return candidates[:, 0]

    def find(self, k: int, token: int) -> int | None:
        """Index of the branch that foresaw this outcome."""
        matches = np.flatnonzero((self.ks == k) & (self.chains[:, 0] == token))
        return int(matches[0]) if len(matches) else None


def choose_candidates(candidates: Int64Array, sent: int | None, count: int) -> Int64Array:
    """The `count` likeliest tokens at a position, most likely first.

    Args:
        candidates: [num_candidates] token ids, most likely first.
        sent: the draft token that the target verifies at this position. Had it been right, it would have
            been accepted, so it cannot be the recovery token. None after the last draft: any can follow.
        count: how many.
    """
    if sent is not None:
        candidates = candidates[candidates != sent]
    return candidates[:count]


def private_block_count(root: int, num_tokens: int, block_size: int) -> int:
    """Blocks a branch needs of its own to hold `num_tokens` tokens from position `root` on."""
    return -(-(root % block_size + num_tokens) // block_size)
