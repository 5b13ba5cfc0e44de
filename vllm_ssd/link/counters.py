"""Named int64 counters in shared memory: each block has one writer, any process may read (pure)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_ssd.link.memory import SharedMemory

DRAFT_FIELDS = (
    "messages",  # messages read since this draft process began (reset by each)
    "steps",
    "step_ns",
    "recent_step_ns",  # a running mean, of steps without prompts
    "rows",  # rows of all steps
    "prefill_tokens",
    "branches",  # branches opened
    "adopted",  # branches adopted: their outcome came true
    "starved",  # times a request got no KV blocks
    "dropped",  # requests dropped because a step with them failed
)


def target_fields(num_speculative_tokens: int) -> tuple[str, ...]:
    """Counters of the target's half; those per k run over accepted lengths 0..K."""
    accepted_lengths = range(num_speculative_tokens + 1)
    return (
        "rounds",  # steps of the target, those that only prefill too
        "lookups",  # rows looked up in the outcome cache
        "hits",  # ... that were predicted and had drafts
        "late",  # ... that were predicted but had no draft token yet
        "undrafted",  # rows that wanted drafts of a draft that was not there, or did not know the request
        "too_long",  # rows of requests longer than the draft's context
        "failures",  # exceptions of SSD's own, see `vllm_ssd.target.guard`
        "drafts_served",  # draft tokens from the outcome cache
        "backup_none",
        "backup_ngram",
        "backup_draft",
        "draft_probs_late",  # rows whose drafts were verified as point masses: q did not come in time
        "wait_ns",  # time the target waited for the draft in rounds
        "critical_path_ns",  # time the target spent on SSD in rounds, waiting included
        "draft_restarts",
        "draft_stalls",
        "draft_alive",  # 1 while the draft answers
        *(f"lookups_k{k}" for k in accepted_lengths),
        *(f"hits_k{k}" for k in accepted_lengths),
    )


class Counters:
    """A fixed list of named int64 values.

    Args:
        fields: the names, the same in every process.
        descriptor: of the memory, where another process made it (see `SharedMemory`).
    """

    def __init__(self, fields: Sequence[str], descriptor: int | None = None) -> None:
        self._memory = SharedMemory(8 * len(fields), descriptor)
        self._values = self._memory.array(np.int64, (len(fields),))
        self._index = {name: index for index, name in enumerate(fields)}

    @property
    def descriptor(self) -> int:
        """By which another process maps them."""
        return self._memory.descriptor

    def add(self, name: str, amount: int = 1) -> None:
        self._values[self._index[name]] += amount

    def set(self, name: str, value: int) -> None:
        self._values[self._index[name]] = value

    def __getitem__(self, name: str) -> int:
        return int(self._values[self._index[name]])

    def as_dict(self) -> dict[str, int]:
        """All values by name, as one glance (not one instant) of the writer's progress."""
        return dict(zip(self._index, self._values.tolist(), strict=True))
