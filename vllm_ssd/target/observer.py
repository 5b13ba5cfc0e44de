"""What is counted and measured of the target's rounds, beside the rounds and not in them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vllm_ssd.link.counters import Counters
from vllm_ssd.plan.costs import DRAFT, Costs
from vllm_ssd.plan.planner import Plan, RoundPlanner
from vllm_ssd.target.live import Row

WATCHED_LOOKUPS = 1_000
LEAST_ACCEPTED = 0.05  # drafts for each of those look-ups

logger = logging.getLogger("vllm.ssd")

# Of each row its drafts, None where it missed; None: nobody was asked.
Found = Sequence[list[int] | None] | None


class RoundObserver:
    """Tells counters, costs and planner what rounds yielded and took.

    Args:
        counters: the target's (`vllm_ssd.link.counters.target_fields`).
        costs: what backups go by.
    """

    def __init__(self, counters: Counters, costs: Costs) -> None:
        self._counters = counters
        self._costs = costs
        self._num_accepted = 0
        self._watches = True  # for a draft of which nothing is ever accepted

    def add_round(self, rows: Sequence[Row], found: Found, plan: Plan, planner: RoundPlanner) -> None:
        """A round has ended: what its rows had verified, found, and verify next."""
        self._counters.add("rounds")
        if not rows:
            return
        for row in rows:
            self._costs.add_row(row.verified.kind, row.num_verified, row.outcome.k)
            self._num_accepted += row.outcome.k if row.verified.kind == DRAFT else 0
        seconds = self._costs.add_round(sum(len(row.sampled) for row in rows))
        planner.add_round(len(rows), sum(1 + row.num_verified for row in rows), seconds)
        if plan.num_drafts:
            self._count(rows, found, planner)
            self._watch()

    def add_critical_path(self, nanoseconds: int) -> None:
        """Time that a round took on the target's side, waiting included."""
        self._counters.add("critical_path_ns", nanoseconds)

    def add_wait(self, nanoseconds: int) -> None:
        """Time that the target waited for the draft."""
        self._counters.add("wait_ns", nanoseconds)

    def add_late_probs(self) -> None:
        """A row whose drafts are verified as point masses: what they were drawn from did not come in time."""
        self._counters.add("draft_probs_late")

    def _count(self, rows: Sequence[Row], found: Found, planner: RoundPlanner) -> None:
        for row, served in zip(rows, found or [None] * len(rows), strict=True):
            if not served:
                self._counters.add(f"backup_{row.request.drafts.kind}")
            if found is None:
                self._counters.add("undrafted")
                continue
            if not row.is_known and not served:
                self._counters.add("too_long" if row.is_too_long else "undrafted")
                continue
            planner.add_row(len(rows), bool(row.verified.tokens), served is not None)
            self._counters.add("lookups")
            self._counters.add(f"lookups_k{row.outcome.k}")
            if served:
                self._counters.add("hits")
                self._counters.add(f"hits_k{row.outcome.k}")
                self._counters.add("drafts_served", len(served))
            elif served is not None:
                self._counters.add("late")

    def _watch(self) -> None:
        """Say so, once, if the draft brings nothing: its own part, be it ever so wrong, is exact."""
        if self._watches and self._counters["lookups"] >= WATCHED_LOOKUPS:
            self._watches = False
            if self._num_accepted < LEAST_ACCEPTED * WATCHED_LOOKUPS:
                logger.warning(
                    "SSD: of the first %d outcomes only %d drafts came to be accepted: use a draft with the "
                    "target's tokenizer and of its family, or, where vllm:ssd_cache_late grows, a faster one",
                    self._counters["lookups"],
                    self._num_accepted,
                )
