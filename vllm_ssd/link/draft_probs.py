"""The distributions that served drafts were drawn from, in memory that both halves map: q, [slots, K, V].

Only ratio verification needs them. The draft writes those of the branch that an outcome adopted, after the
message that tells it so and while the target verifies; the target reads them when it samples. An entry is
keyed by epoch and round as the outcome cache is, and needs no lock for the same reason. But a distribution
that is read too early would be a wrong one; so `config` takes ratio verification on x86 only, where stores
stay in order.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from vllm_ssd.link.memory import SharedMemory

Float32Array = npt.NDArray[np.float32]

EPOCH, ROUND, DEPTH = range(3)


class DraftProbs:
    """Both halves' view of the table.

    Args:
        max_slots: requests at once.
        num_speculative_tokens: K.
        vocab_size: V, of the tokens that target and draft both have.
        descriptor: of the memory, in the draft's process; the target's worker makes it (`SharedMemory`).

    Raises:
        OSError: if there is no room for the table; the message says what would help.
    """

    def __init__(
        self,
        max_slots: int,
        num_speculative_tokens: int,
        vocab_size: int,
        descriptor: int | None = None,
    ) -> None:
        keys, distributions = (max_slots, 3), (max_slots, num_speculative_tokens, vocab_size)
        key_bytes = 8 * math.prod(keys)
        try:
            self._memory = SharedMemory(key_bytes + 4 * math.prod(distributions), descriptor)
        except OSError as error:
            raise OSError(
                f"{error}; it is for the drafts' q (max_num_seqs x num_speculative_tokens x vocabulary): "
                "lower max_num_seqs, or use ssd_verify='coupled', which needs none"
            ) from error
        self._keys = self._memory.array(np.int64, keys)
        self._distributions = self._memory.array(np.float32, distributions, key_bytes)

    @property
    def descriptor(self) -> int:
        """By which the draft's process maps it."""
        return self._memory.descriptor

    def publish(self, slot: int, epoch: int, round_: int, distributions: list[Float32Array]) -> None:
        """Write the distributions of the drafts that are verified in `round_`, one of [V] each."""
        key = self._keys[slot]
        key[DEPTH] = 0  # nothing matches while the rest changes
        key[EPOCH], key[ROUND] = epoch, round_
        for depth, distribution in enumerate(distributions):
            self._distributions[slot, depth] = distribution
        key[DEPTH] = len(distributions)

    def read(self, slot: int, epoch: int, round_: int, num_drafts: int) -> Float32Array | None:
        """[at least num_drafts, V], not a copy; None as long as it is not there."""
        key = self._keys[slot].tolist()
        if key[EPOCH] != epoch or key[ROUND] != round_ or key[DEPTH] < num_drafts:
            return None
        return self._distributions[slot, : key[DEPTH]]
