"""The outcome cache: memory that both halves map, filled by the draft and looked up by the target.

The draft's process writes it, the target's process reads it, and nobody asks anybody. An entry is keyed by
(epoch, round, k, token): the epoch changes whenever a slot is given to a request (or a request begins anew),
the round counts the verifications since then, so an entry that outlived its purpose can never match.

Why no lock is needed: the draft rewrites the entries of a slot only after it was told that slot's outcome,
and the target tells it only after its look-up. Within one entry the draft writes the tokens before it raises
the depth. A look-up that copies the depth, and a token as it was before, has a wrong draft: it is rejected
like any other, and the draft then sees that another than its own was verified.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_ssd.link.memory import SharedMemory

if TYPE_CHECKING:
    from torch import Tensor

Int64Array = npt.NDArray[np.int64]

EPOCH, ROUND, ACCEPTED, TOKEN, DEPTH, FIRST_DRAFT = range(6)  # what an entry's columns hold
KEY = slice(EPOCH, DEPTH)
DECLINED = -1  # depth of an outcome that the draft was asked about and cannot draft for
NOT_INTRODUCED = -1  # epoch of a request that the draft does not know; no entry has it
NO_ENTRY = -1  # place of a row whose drafts go nowhere


class Outcome(NamedTuple):
    """One row's verification outcome: `k` drafts accepted, then `token` (recovery or bonus)."""

    slot: int
    epoch: int
    round: int
    k: int
    token: int


class OutcomeCache:
    """A table of [max_slots, branch_budget] entries in shared memory.

    Args:
        max_slots: requests at once.
        branch_budget: entries of a slot.
        num_speculative_tokens: K, the drafts an entry can hold.
        vocab_size: V; what is no token of it is not served, whoever has written it.
        descriptor: of the memory, in the draft's process; the target's worker makes it (`SharedMemory`).

    Raises:
        OSError: if there is no room for it; the message says what would help.
    """

    def __init__(
        self,
        max_slots: int,
        branch_budget: int,
        num_speculative_tokens: int,
        vocab_size: int,
        descriptor: int | None = None,
    ) -> None:
        shape = (max_slots, branch_budget, FIRST_DRAFT + num_speculative_tokens)
        try:
            self._memory = SharedMemory(8 * math.prod(shape), descriptor)
        except OSError as error:
            raise OSError(
                f"{error}; it is for the outcome cache (max_num_seqs x ssd_branch_budget): lower one of them"
            ) from error
        self.entries: Int64Array = self._memory.array(np.int64, shape)
        self.num_speculative_tokens = num_speculative_tokens
        self._vocab_size = vocab_size
        self.gpu_entries: Tensor | None = None  # if there, the draft publishes in these (`outcome_gpu`)

    @property
    def descriptor(self) -> int:
        """By which the draft's process maps it."""
        return self._memory.descriptor

    def look_up(self, outcomes: list[Outcome]) -> list[list[int] | None]:
        """For each outcome the drafts that continue it, to the depth reached; None where it has no entry.

        An empty list means that the draft predicted the outcome but had no token for it yet.
        """
        results: list[list[int] | None] = []
        for entry in self._entries_of(outcomes):
            if entry is None:
                results.append(None)
                continue
            drafts = entry[FIRST_DRAFT : FIRST_DRAFT + max(0, int(entry[DEPTH]))].tolist()
            # The target embeds them: a damaged table must not end it.
            results.append(drafts if all(0 <= token < self._vocab_size for token in drafts) else None)
        return results

    def declined(self, outcomes: list[Outcome]) -> list[bool]:
        """[n] whether the draft has said that there will be no drafts of this outcome."""
        return [entry is not None and int(entry[DEPTH]) == DECLINED for entry in self._entries_of(outcomes)]

    def _entries_of(self, outcomes: list[Outcome]) -> list[Int64Array | None]:
        """[n] a copy of each outcome's entry [5 + K]."""
        if not outcomes:
            return []
        keys = np.array(outcomes, dtype=np.int64)  # [B, 5]: slot, epoch, round, k, token
        entries = self.entries[keys[:, 0]]  # [B, branch_budget, 5 + K], a copy
        found = (entries[:, :, KEY] == keys[:, None, 1:]).all(axis=2)  # [B, branch_budget]
        which = found.argmax(axis=1)
        return [
            entries[row, branch] if found[row, branch] else None for row, branch in enumerate(which.tolist())
        ]

    def open_branches(
        self, slot: int, first: int, epoch: int, round_: int, ks: Int64Array, tokens: Int64Array
    ) -> None:
        """Announce branches `first`, `first` + 1, ... of a slot, still without drafts; ks, tokens: [n]."""
        entries = self.entries[slot, first : first + len(ks)]
        entries[:, EPOCH] = 0  # no key matches while the rest changes
        entries[:, DEPTH] = 0
        entries[:, ROUND] = round_
        entries[:, ACCEPTED] = ks
        entries[:, TOKEN] = tokens
        entries[:, EPOCH] = epoch

    def publish(self, slot: int, first: int, depth: int, tokens: Int64Array) -> None:
        """Add the draft token of step `depth` (from 0) to branches `first`, ...; tokens: [n]."""
        entries = self.entries[slot, first : first + len(tokens)]
        entries[:, FIRST_DRAFT + depth] = tokens
        entries[:, DEPTH] = depth + 1

    def decline(self, outcome: Outcome) -> None:
        """Say that there will be no drafts of this outcome, whose slot has no branches."""
        self.open_branches(
            outcome.slot, 0, outcome.epoch, outcome.round, np.array([outcome.k]), np.array([outcome.token])
        )
        self.entries[outcome.slot, 0, DEPTH] = DECLINED

    def close_branches(self, slot: int) -> None:
        """Make every entry of the slot unmatchable."""
        self.entries[slot, :, EPOCH] = 0
