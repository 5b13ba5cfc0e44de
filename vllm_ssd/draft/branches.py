"""Branches: pre-speculated continuations of one request, as rows over shared prefix blocks (pure).

A branch (k, t) continues the trunk after its k-th sent draft token with the candidate t. Its block table is
the trunk's full blocks before t, a private copy of the block that t falls into, and private blocks beyond.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_ssd.draft.rows import Place, Predictions

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(eq=False)
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
    predicted: list[Place] = field(default_factory=list)  # per step: the place of the first of the n rows

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

    def advance(self, predictions: Predictions, first: int) -> Int64Array:
        """Receive a step whose rows from `first` on are this group's; returns the new draft tokens [n]."""
        drafts = predictions.drafts[first : first + len(self)]
        self.predicted.append(Place(predictions, first))
        self.steps += 1
        self.chains[:, self.steps] = drafts
        return drafts

    def place(self, branch: int, step: int) -> Place:
        """What a step said of a branch."""
        predictions, first = self.predicted[step]
        return Place(predictions, first + branch)

    def distributions(self, branch: int, num_drafts: int) -> list[Float32Array]:
        """[V] each: what the branch's first drafts were drawn from; empty where they were not drawn."""
        places = [self.place(branch, step) for step in range(min(num_drafts, self.steps))]
        return [
            place.predictions.distributions[place.row]
            for place in places
            if place.predictions.distributions is not None
        ]

    def find(self, k: int, token: int) -> int | None:
        """Index of the branch that predicted this outcome."""
        matches = np.flatnonzero((self.ks == k) & (self.chains[:, 0] == token))
        return int(matches[0]) if len(matches) else None


def private_block_count(root: int, num_tokens: int, block_size: int) -> int:
    """Blocks a branch needs of its own to hold `num_tokens` tokens from position `root` on."""
    return -(-(root % block_size + num_tokens) // block_size)
