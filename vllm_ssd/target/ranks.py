"""A target on several devices: one of its ranks leads, the others verify what it found.

All ranks of a tensor parallel group sample, so all need the same drafts and the same distributions. What the
draft has published changes by the microsecond; so only the leader looks, and the others hear of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.config import ParallelConfig
from vllm.distributed import get_tp_group

from vllm_ssd.link.messages import Sampling
from vllm_ssd.link.outcome_cache import NOT_INTRODUCED
from vllm_ssd.verify.ratio import DraftDistribution, PointMass


def leading_rank(parallel: ParallelConfig) -> int:
    """The rank that talks to the draft: the first of the last pipeline stage, whose output vLLM takes.

    Upstream: `MultiprocExecutor._get_output_rank`.
    """
    return parallel.world_size - parallel.tensor_parallel_size


def leads(parallel: ParallelConfig, rank: int) -> bool:
    """Whether this is the rank that talks to the draft."""
    return rank == leading_rank(parallel)


class Follower:
    """Stands where the leader has its `guard.Guard`, and knows nothing."""

    def start(
        self, request_id: str, describe: Callable[[], tuple[list[int], Sampling]], slot: int | None = None
    ) -> int:
        """The leader introduces the request."""
        return NOT_INTRODUCED

    def stop(self, request_id: str) -> None:
        """Nothing to forget."""

    def propose(
        self, request_ids: Sequence[str], sampled: Sequence[list[int]], num_verified: Sequence[int]
    ) -> list[list[int]]:
        """No drafts of its own."""
        return [[] for _ in request_ids]

    def verified(self, request_id: str) -> list[int]:
        """No drafts of its own."""
        return []

    def distributions(self, request_ids: Sequence[str], num_drafts: Sequence[int]) -> list[DraftDistribution]:
        """None of its own."""
        return [PointMass() for _ in request_ids]


def shared_drafts(drafts: Tensor, num_drafts: Tensor) -> tuple[Tensor, Tensor]:
    """The leader's drafts [B, K], and [B] how many they are, on all ranks; the host waits for nothing."""
    group = get_tp_group()
    if group.world_size == 1:
        return drafts, num_drafts
    both = torch.cat([drafts, num_drafts[:, None].to(drafts.dtype)], dim=1)
    both = group.device_communicator.broadcast(both)  # by what the model communicates with
    return both[:, :-1], both[:, -1].to(num_drafts.dtype)


def shared_distributions(distributions: list[DraftDistribution]) -> list[DraftDistribution]:
    """The leader's distributions on all ranks: [n, V] each, or a point mass."""
    group = get_tp_group()
    if group.world_size == 1:
        return distributions
    # Which they are is small and pickled; they themselves are megabytes.
    shapes = group.broadcast_object(
        [
            None if isinstance(distribution, PointMass) else distribution.shape
            for distribution in distributions
        ]
    )
    shared: list[DraftDistribution] = []
    for distribution, shape in zip(distributions, shapes, strict=True):
        if shape is None:
            shared.append(PointMass())
            continue
        own = torch.empty(shape) if isinstance(distribution, PointMass) else torch.tensor(distribution)
        shared.append(group.broadcast(own).numpy())
    return shared


def share_rows(table: Tensor, rows: npt.NDArray[np.intp]) -> None:
    """Copy these rows of the leader's table into the same rows of all others'."""
    group = get_tp_group()
    if group.world_size > 1 and len(rows):
        index = torch.from_numpy(rows).long().to(table.device)
        table[index] = group.device_communicator.broadcast(table[index])
