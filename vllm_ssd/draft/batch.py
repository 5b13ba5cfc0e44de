"""One step's batch, built of stretches of trunks and of branches (pure)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_ssd.draft.branches import BranchGroup
from vllm_ssd.draft.requests import DraftRequest
from vllm_ssd.draft.rows import RowEntries, Rows, RowSampling
from vllm_ssd.link.outcome_cache import NO_ENTRY
from vllm_ssd.verify.noise import draft_seed


@dataclass
class TrunkRow:
    """A stretch of a request's trunk to compute in this step."""

    request: DraftRequest
    num_tokens: int

    @property
    def lengths(self) -> range:
        """The accepted lengths k whose candidates it yields."""
        last_confirmed = self.request.num_confirmed - 1
        first = max(self.request.num_computed, last_confirmed) - last_confirmed
        return range(first, self.request.num_computed + self.num_tokens - last_confirmed)


@dataclass(frozen=True)
class Work:
    """What one step computes."""

    trunk_rows: list[TrunkRow]
    groups: list[tuple[DraftRequest, BranchGroup]]

    @property
    def num_rows(self) -> int:
        return len(self.trunk_rows) + sum(len(group) for _, group in self.groups)

    @property
    def num_trunk_tokens(self) -> int:
        return sum(row.num_tokens for row in self.trunk_rows)

    @property
    def requests(self) -> list[DraftRequest]:
        """Whom it is about, each once."""
        those = [row.request for row in self.trunk_rows] + [request for request, _ in self.groups]
        return list({request.slot: request for request in those}.values())


def build_rows(
    trunk_rows: list[TrunkRow], groups: list[tuple[DraftRequest, BranchGroup]], entries_per_slot: int
) -> Rows:
    """The rows of one step: first the trunks', then the branches', which are fed with their last draft.

    Args:
        entries_per_slot: of the outcome cache.
    """
    tokens, positions, query_lens, tables, wanted = [], [], [], [], []
    places, depths = [], []
    asked_for: list[DraftRequest] = []  # whose each wanted position is
    num_tokens = 0
    for row in trunk_rows:
        begin, end = row.request.num_computed, row.request.num_computed + row.num_tokens
        tokens.append(np.array(row.request.tokens[begin:end], dtype=np.int64))
        positions.append(np.arange(begin, end))
        query_lens.append(np.array([row.num_tokens], dtype=np.int32))
        tables.append(row.request.block_table()[None, :])
        num_tokens += row.num_tokens
        wanted.append(np.arange(num_tokens - len(row.lengths), num_tokens))
        asked_for += [row.request] * len(wanted[-1])
        places.append(np.full(len(wanted[-1]), NO_ENTRY))
        depths.append(np.zeros(len(wanted[-1]), dtype=np.int64))
    for request, group in groups:
        tokens.append(group.next_tokens)
        positions.append(group.next_positions)
        query_lens.append(np.ones(len(group), dtype=np.int32))
        tables.append(group.block_tables)
        wanted.append(np.arange(num_tokens, num_tokens + len(group)))
        asked_for += [request] * len(group)
        first_place = request.slot * entries_per_slot + group.first_entry
        places.append(np.arange(first_place, first_place + len(group)))
        depths.append(np.full(len(group), group.steps))
        num_tokens += len(group)
    return Rows(
        np.concatenate(tokens),
        np.concatenate(positions),
        np.concatenate(query_lens),
        np.concatenate(tables),
        np.concatenate(wanted),
        _sampling_of_rows(asked_for) if any(request.sampling.temperature for request in asked_for) else None,
        RowEntries(np.concatenate(places), np.concatenate(depths)),
    )


def _sampling_of_rows(requests: list[DraftRequest]) -> RowSampling:
    sampling = [request.sampling for request in requests]
    seeds = [
        draft_seed(request.sampling.seed, request.epoch, request.round)
        if request.is_drawn
        else request.sampling.seed
        for request in requests
    ]
    return RowSampling(
        np.array([how.temperature for how in sampling], dtype=np.float32),
        np.array(seeds, dtype=np.int64),
        np.array([how.top_k for how in sampling], dtype=np.int32),
        np.array([how.top_p for how in sampling], dtype=np.float32),
    )
