"""The laws that served drafts were drawn from, in memory that both halves map: [slots, K, vocabulary] of q.

Only ratio verification needs them. The draft writes those of the branch that an outcome adopted, after the
message that tells it so and while the target verifies; the target reads them when it samples. An entry is
keyed by epoch and round as the outcome cache is, and needs no lock for the same reason. But a law that is
read too early would be a wrong one; so `config` takes ratio verification on x86 only, where stores stay in
order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from vllm_ssd.link.memory import map_array

Float32Array = npt.NDArray[np.float32]

LAWS_FILE, KEYS_FILE = "draft-laws", "draft-laws-keys"
EPOCH, ROUND, DEPTH = range(3)


class DraftLaws:
    """Both halves' view of the table.

    Args:
        shared_dir: folder both processes see, in memory if possible.
        max_slots: requests at once.
        num_speculative_tokens: K.
        vocab_size: V.
        create: True in the process that owns the files (the target's worker).

    Raises:
        OSError: if there is no room for the table; the message says what would help.
    """

    def __init__(
        self, shared_dir: Path, max_slots: int, num_speculative_tokens: int, vocab_size: int, *, create: bool
    ) -> None:
        shape = (max_slots, num_speculative_tokens, vocab_size)
        self._paths = (shared_dir / LAWS_FILE, shared_dir / KEYS_FILE)
        try:
            self._laws: Float32Array = map_array(self._paths[0], np.float32, shape, create=create)
        except OSError as error:
            raise OSError(
                f"{error}; it is for the draft's laws (max_num_seqs x num_speculative_tokens x vocabulary): "
                "lower max_num_seqs, or use ssd_verify='coupled', which needs none"
            ) from error
        self._keys = map_array(self._paths[1], np.int64, (max_slots, 3), create=create)

    def unlink(self) -> None:
        """Take the files' names away, see `OutcomeCache.unlink`."""
        for path in self._paths:
            path.unlink(missing_ok=True)

    def publish(self, slot: int, epoch: int, round_: int, laws: list[Float32Array]) -> None:
        """Write the laws of the drafts that are verified in `round_`, one of [V] each."""
        key = self._keys[slot]
        key[DEPTH] = 0  # nothing matches while the rest changes
        key[EPOCH], key[ROUND] = epoch, round_
        for depth, law in enumerate(laws):
            self._laws[slot, depth] = law
        key[DEPTH] = len(laws)

    def read(self, slot: int, epoch: int, round_: int, num_drafts: int) -> Float32Array | None:
        """[at least num_drafts, V], not a copy; None as long as it is not there."""
        key = self._keys[slot].tolist()
        if key[EPOCH] != epoch or key[ROUND] != round_ or key[DEPTH] < num_drafts:
            return None
        return self._laws[slot, : key[DEPTH]]
