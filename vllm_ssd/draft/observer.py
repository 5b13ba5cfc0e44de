"""What is counted and measured of the draft's steps, beside the steps and not in them."""

from __future__ import annotations

from vllm_ssd.draft.batch import Work
from vllm_ssd.link.counters import Counters
from vllm_ssd.plan.costs import RunningMean


class StepObserver:
    """Tells the counters what steps computed and took.

    Args:
        counters: the draft's (`vllm_ssd.link.counters.DRAFT_FIELDS`).
        num_speculative_tokens: K.
    """

    def __init__(self, counters: Counters, num_speculative_tokens: int) -> None:
        self._counters = counters
        self._num_drafts = num_speculative_tokens
        self._recent_step_ns = RunningMean(1e6)

    def add_step(self, work: Work, nanoseconds: int) -> None:
        """A step over this work has ended, and took so long from choosing it to publishing."""
        self._counters.add("steps")
        self._counters.add("rows", work.num_rows)
        self._counters.add("prefill_tokens", work.num_trunk_tokens)
        self._counters.add("step_ns", nanoseconds)
        if work.num_trunk_tokens <= len(work.trunk_rows) + self._num_drafts:  # no prompt in it
            self._recent_step_ns.add(min(nanoseconds, 4 * self._recent_step_ns.value))
            self._counters.set("recent_step_ns", int(self._recent_step_ns.value))
