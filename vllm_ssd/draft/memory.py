"""Who gets KV blocks of the draft, where there are not enough for all (pure).

Trunks come before branches, which share evenly what trunks leave. Where branches hold what a trunk lacks, it
waits for the next outcome of theirs. Where trunks alone fill the pool, some give up all their
blocks, and wait until there is room for all of theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from vllm_ssd.draft.blocks import BlockCopies, BlockPool
from vllm_ssd.draft.branches import BranchGroup, private_block_count
from vllm_ssd.draft.requests import DraftRequest
from vllm_ssd.link.counters import Counters

logger = logging.getLogger("vllm.ssd")


class BlockPolicy:
    """Decides for the server's requests.

    Args:
        pool: the blocks.
        requests: the server's, by slot, at any time.
        num_speculative_tokens: K.
        counters: the draft's; counts who lacks blocks.
    """

    def __init__(
        self,
        pool: BlockPool,
        requests: Mapping[int, DraftRequest],
        num_speculative_tokens: int,
        counters: Counters,
    ) -> None:
        self._pool = pool
        self._requests = requests
        self._counters = counters
        # Of any root: the last slot of a block, and what follows.
        self._blocks_of_branch = private_block_count(
            pool.block_size - 1, num_speculative_tokens + 1, pool.block_size
        )
        self._starved: set[int] = set()  # slots that wait for the KV blocks of others' branches
        self._evicted: set[int] = set()  # slots that have given up their blocks, and wait for as many

    def reserve(self, request: DraftRequest) -> None:
        """Blocks for what the request's trunk lacks, before branches take any."""
        if self.waits(request) or not request.num_uncomputed:
            return
        self._evicted.discard(request.slot)
        if request.reserve():
            return
        self._note_shortage(request)
        branches = sum(other.num_private_blocks for other in self._requests.values())
        if self._pool.num_available + branches >= request.num_missing_blocks:
            self._starved.add(request.slot)
        else:  # trunks alone fill the pool; if all kept theirs, none might ever get the next one
            request.evict()
            self._evicted.add(request.slot)

    def waits(self, request: DraftRequest) -> bool:
        """Whether it has no use for blocks, or there are none for it at present."""
        if request.slot in self._evicted:  # until there is room for all of it, and for a branch
            return self._pool.num_available < request.num_missing_blocks + self._blocks_of_branch
        return not request.fits or request.slot in self._starved

    def is_starved(self, request: DraftRequest) -> bool:
        """Whether it found no blocks since some last came free."""
        return request.slot in self._starved

    def share_of_branches(self) -> int:
        """Blocks that each request's branches may hold, of what trunks leave: enough for one at least."""
        sharing = [request for request in self._requests.values() if not self.waits(request)]
        left = self._pool.num_available + sum(request.num_private_blocks for request in sharing)
        return max(left // max(1, len(sharing)), self._blocks_of_branch)

    def fork(
        self, request: DraftRequest, branches: dict[int, list[int]], share: int, copies: BlockCopies
    ) -> BranchGroup | None:
        """Fork as many of these branches as there are blocks for.

        Args:
            branches, copies: see `DraftRequest.fork`.
            share: see `share_of_branches`.

        Returns:
            The new branches, or None where there are none.
        """
        most_blocks = max(0, min(self._pool.num_available, share - request.num_private_blocks))
        lacks_blocks = request.num_blocks_for(branches) > most_blocks
        if lacks_blocks:
            self._note_shortage(request)
        group = request.fork(branches, most_blocks, copies)
        if group is None and lacks_blocks:
            self._starved.add(request.slot)
        return group

    def blocks_came_free(self) -> None:
        """Branches that did not come true have given theirs back."""
        self._starved.clear()

    def forget(self, slot: int) -> None:
        """The request has ended."""
        self._evicted.discard(slot)
        self.blocks_came_free()

    def _note_shortage(self, request: DraftRequest) -> None:
        if not self._counters["starved"]:
            logger.warning(
                "no KV blocks left for a request of %d tokens, which continues with fewer drafts or none: "
                "raise ssd_draft_memory (said once)",
                len(request.tokens),
            )
        self._counters.add("starved")
