"""What the draft knows of a request: its tokens, which of them have KV, and its branches (pure).

The trunk is the confirmed tokens followed by the drafts that the target is verifying. An outcome either
adopts a branch, whose blocks become the trunk's without recomputing anything, or rewinds the trunk to what
it has in common with the outcome; what then has no KV yet is computed as part of the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_ssd.draft.blocks import BlockCopies, BlockPool
from vllm_ssd.draft.branches import BranchGroup, private_block_count
from vllm_ssd.draft.outcomes import OutcomeStatistics, draft_log_probs, outcome_log_probs
from vllm_ssd.draft.rows import Candidates, Place
from vllm_ssd.link.messages import RoundOutcome, Sampling

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating[Any]]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]

NO_TOKEN = -1


@dataclass(frozen=True)
class Awaited:
    """An outcome that the target has missed, and waits for just-in-time drafts of."""

    k: int
    token: int
    num_drafts: int


@dataclass(frozen=True)
class Adopted:
    """A branch came true."""

    distributions: list[
        Float32Array
    ]  # [V] each: what its drafts were drawn from; none where they were not drawn


class DraftRequest:
    """One request of the target.

    Args:
        slot, epoch: its identity, see `vllm_ssd.link.outcome_cache`. tokens: its tokens so far. pool: where
        its KV blocks come from. num_speculative_tokens: K. max_model_len: the draft's; a request beyond it
        gets no branches. sampling: how the target samples it. is_drawn: its drafts are drawn from the draft's
        distribution, and not predicted (see `vllm_ssd.verify.ratio`).
    """

    def __init__(
        self,
        slot: int,
        epoch: int,
        tokens: list[int],
        pool: BlockPool,
        num_speculative_tokens: int,
        max_model_len: int,
        sampling: Sampling = Sampling(),  # noqa: B008  (immutable)
        is_drawn: bool = False,
    ) -> None:
        self.slot = slot
        self.epoch = epoch
        self.sampling = sampling
        self.is_drawn = is_drawn
        self.round = 0
        self.last_served = 0  # the step in which its branches last had rows
        self.verifies_branch = False  # where the drafts came from that the target is verifying
        self.awaited: Awaited | None = None
        self.tokens = tokens
        self.num_confirmed = len(tokens)
        self.groups: list[BranchGroup] = []
        self.num_entries = 0  # branches opened this round
        # What may follow the confirmed tokens and the first k drafts, by k: not looked at yet, or read.
        self.unread: dict[int, Place] = {}
        self.candidates: dict[int, Candidates] = {}
        self._forked: set[int] = set()
        self._pool = pool
        self._num_drafts = num_speculative_tokens
        self._max_model_len = max_model_len
        self._max_blocks = -(-max_model_len // pool.block_size)
        # The last token is always computed, since its logits are wanted.
        self.blocks = pool.reuse(tokens[:-1]) if self.fits else []
        self.num_computed = len(self.blocks) * pool.block_size
        self._remembered = False

    @property
    def num_sent(self) -> int:
        """Drafts that the target is verifying."""
        return len(self.tokens) - self.num_confirmed

    @property
    def num_uncomputed(self) -> int:
        """Trunk tokens without KV."""
        return len(self.tokens) - self.num_computed

    @property
    def fits(self) -> bool:
        """Whether the draft's positions reach to the end of any branch; once they do not, they never will."""
        return self._reaches(0)

    def reserve(self) -> bool:
        """Make sure that the trunk's tokens have blocks; False if the pool is exhausted."""
        if not self.blocks:  # it may have given its own up, see `evict`
            self.blocks = self._pool.reuse(self.tokens[: self.num_confirmed - 1])
            self.num_computed = len(self.blocks) * self._pool.block_size
        blocks = self._pool.allocate(self.num_missing_blocks)
        if blocks is None:
            return False
        self.blocks += blocks
        return True

    @property
    def num_missing_blocks(self) -> int:
        """Blocks that the trunk's tokens lack."""
        return max(0, -(-len(self.tokens) // self._pool.block_size) - len(self.blocks))

    @property
    def num_private_blocks(self) -> int:
        """Blocks of branches, which the next outcome sets free."""
        return sum(len(blocks) for group in self.groups for blocks in group.private_blocks)

    def evict(self) -> None:
        """Give up all blocks for now: others need them."""
        self.release()
        self.unread, self.candidates = {}, {}
        self._forked.clear()

    def block_table(self) -> npt.NDArray[np.int32]:
        """[max_blocks]"""
        table = np.zeros(self._max_blocks, dtype=np.int32)
        table[: len(self.blocks)] = self.blocks
        return table

    def computed(self, num_tokens: int) -> None:
        """KV of the next `num_tokens` trunk tokens has been written."""
        self.num_computed += num_tokens
        if not self._remembered and self.num_computed >= self.num_confirmed:
            self._pool.remember(self.tokens[: self.num_confirmed], self.blocks)
            self._remembered = True

    def apply_outcome(self, outcome: RoundOutcome) -> Adopted | None:
        """Receive the target's decision of this round; None if it had no branch."""
        adopted = self._adopt(outcome)
        if adopted is None:
            self._rewind(outcome)
        self.verifies_branch = adopted is not None
        self.round = outcome.round + 1
        self.num_entries = 0
        self._forked.clear()
        self.awaited = None
        if not self.fits:
            self.evict()
        return adopted

    def await_drafts(self, tokens: list[int], num_drafts: int) -> bool:
        """The target waits for drafts after `tokens`, which it decided on: nothing else can happen any more.

        Returns:
            False where these tokens cannot end this round, or have a branch by now.
        """
        k = len(tokens) - 1
        if not self._continues(tokens) or any(group.find(k, tokens[k]) is not None for group in self.groups):
            return False
        self._release_branches()
        del self.tokens[self.num_confirmed + k :]
        self.num_computed = min(self.num_computed, len(self.tokens))
        self.num_entries = 0
        self.unread, self.candidates = {}, {}
        self._forked.clear()
        self.awaited = Awaited(k, tokens[k], num_drafts)
        return True

    @property
    def is_urgent(self) -> bool:
        """Whether the target waits for more than there is yet."""
        if self.awaited is None:
            return False
        return not self.groups or self.groups[0].steps < self.awaited.num_drafts

    def rank(self, k: int, token: int) -> int | None:
        """How many candidates were likelier than the token that ended the round; None if none were read."""
        if k not in self.candidates:
            return None
        tokens = self._without_sent(k).tokens.tolist()
        return tokens.index(token) if token in tokens else len(tokens)

    @property
    def can_fork(self) -> bool:
        """Whether some accepted length has been computed but has no branches yet."""
        return len(self.candidates) + len(self.unread) > len(self._forked) and self.awaited is None

    @property
    def can_fork_awaited(self) -> bool:
        """Whether the branch that the target waits for is still to be forked, and can be."""
        return self.awaited is not None and not self.groups and not self.num_uncomputed

    def confidences(self, num_accepted: int) -> Float32Array:
        """[at most num_accepted + 1] the draft's log-probability of each sent draft that was tested."""
        num_known = min(num_accepted + 1, self.num_sent, len(self.candidates))
        if not num_known:
            return np.empty(0, dtype=np.float32)
        known = self._known(num_known)
        return draft_log_probs(known.log_probs, self._is_draft(known))

    def outcomes(self, statistics: OutcomeStatistics) -> tuple[dict[int, Candidates], FloatArray]:
        """What may end this round, likeliest first; log-probabilities are those of the whole outcome.

        Args:
            statistics: of rounds like this one.

        Returns:
            For each accepted length that has no branches yet: [num_candidates]. The draft that was sent next
            is left out: had it been right, it would have been accepted.
            [num_candidates] log-probabilities at lengths not known yet; or none. There are some after a hit
            on a branch whose tip has not been computed. They are guessed to be as they mostly are.
        """
        known = self._known(len(self.candidates))
        is_draft, last = self._is_draft(known), len(known.tokens) - 1
        log_probs, reached = outcome_log_probs(
            known.log_probs,
            is_draft,
            statistics,
            is_greedy=self.sampling.temperature == 0,
            last_is_drawn=self.is_drawn and last >= self.num_sent,
        )
        others = ~is_draft
        others[self.num_sent :] = True
        outcomes = {
            k: Candidates(known.tokens[k, others[k]], log_probs[k, others[k]])
            for k in range(last + 1)
            if k not in self._forked
        }
        if last >= self.num_sent:
            return outcomes, np.empty(0)
        return outcomes, reached[last] + statistics.log_distribution(known.tokens.shape[1])

    def _known(self, n: int) -> Candidates:
        """[n, num_candidates], after the first n accepted lengths."""
        known = [self.candidates[k] for k in range(n)]
        return Candidates(np.stack([row.tokens for row in known]), np.stack([row.log_probs for row in known]))

    def _is_draft(self, known: Candidates) -> BoolArray:
        """[n, num_candidates] which candidates were sent, or would have been as the likeliest."""
        drafts = known.tokens[:, 0].copy()
        sent = self.tokens[self.num_confirmed :][: len(drafts)]
        drafts[: len(sent)] = sent
        return known.tokens == drafts[:, None]

    def _without_sent(self, k: int) -> Candidates:
        candidates = self.candidates[k]
        others = candidates.tokens != self._sent(k)
        return Candidates(candidates.tokens[others], candidates.log_probs[others])

    def _sent(self, k: int) -> int:
        """The draft at the k-th place, if there is one."""
        return self.tokens[self.num_confirmed + k] if k < self.num_sent else NO_TOKEN

    def fork(
        self, branches: dict[int, list[int]], most_blocks: int, copies: BlockCopies
    ) -> BranchGroup | None:
        """Fork as many branches as there are blocks for.

        Args:
            branches: for each accepted length in `outcomes`, the tokens to continue with, likeliest first.
            most_blocks: that they may take, at most what the pool has.
            copies: gets the partial blocks to copy.

        Returns:
            The new branches, or None where there are none.
        """
        self._forked |= branches.keys()
        chosen = self._affordable(branches, most_blocks)
        if not chosen:
            return None
        ks, tokens = zip(*chosen, strict=True)
        group = self._fork(np.array(ks, dtype=np.int64), tokens, copies)
        self.groups.append(group)
        self.num_entries += len(group)
        return group

    def _affordable(self, branches: dict[int, list[int]], room: int) -> list[tuple[int, int]]:
        """(k, token) of those that there are positions and blocks for, of each length the likeliest first."""
        chosen = []
        by_rank = sorted(
            (rank, k, token)
            for k, tokens in branches.items()
            if self._reaches(k)
            for rank, token in enumerate(tokens)
        )
        for _, k, token in by_rank:
            room -= self._num_blocks_of_branch(k)
            if room >= 0:
                chosen.append((k, token))
        return sorted(chosen, key=lambda pair: pair[0])

    def num_blocks_for(self, branches: dict[int, list[int]]) -> int:
        """Blocks that `fork` would take if there are enough."""
        return sum(
            len(tokens) * self._num_blocks_of_branch(k) for k, tokens in branches.items() if self._reaches(k)
        )

    def _num_blocks_of_branch(self, k: int) -> int:
        return private_block_count(self.num_confirmed + k, self._num_drafts + 1, self._pool.block_size)

    def _reaches(self, k: int) -> bool:
        """Whether the draft's positions reach to the end of a branch of this accepted length."""
        return self.num_confirmed + k + self._num_drafts + 1 <= self._max_model_len

    def release(self) -> None:
        """Give up all blocks; full blocks of confirmed tokens stay known for prefix reuse."""
        self._release_branches()
        self._pool.remember(self.tokens[: min(self.num_confirmed, self.num_computed)], self.blocks)
        self._pool.release(self.blocks)
        self.blocks = []
        self.num_computed = 0

    def _fork(self, ks: Int64Array, tokens: Sequence[int], copies: BlockCopies) -> BranchGroup:
        block_size, num_drafts = self._pool.block_size, self._num_drafts
        roots = self.num_confirmed + ks
        tables = np.tile(self.block_table(), (len(ks), 1))
        counts = [self._num_blocks_of_branch(k) for k in ks.tolist()]
        blocks = self._pool.allocate(sum(counts))
        assert blocks is not None  # `_affordable` has counted them
        private_blocks: list[list[int]] = []
        num_shared: list[int] = []
        for row, (root, count) in enumerate(zip(roots.tolist(), counts, strict=True)):
            own, blocks = blocks[:count], blocks[count:]
            shared, offset = divmod(root, block_size)
            if offset:
                copies.sources.append(self.blocks[shared])
                copies.targets.append(own[0])
            tables[row, shared : shared + count] = own
            private_blocks.append(own)
            num_shared.append(shared)
        chains = np.zeros((len(ks), num_drafts + 2), dtype=np.int64)
        chains[:, 0] = tokens
        return BranchGroup(self.num_entries, ks, roots, chains, tables, num_shared, private_blocks)

    def _continues(self, tokens: list[int]) -> bool:
        """Whether these are drafts that were sent, and then one token."""
        k = len(tokens) - 1
        return tokens[:k] == self.tokens[self.num_confirmed :][:k]

    def _adopt(self, outcome: RoundOutcome) -> Adopted | None:
        k = len(outcome.tokens) - 1
        if not self._continues(outcome.tokens):
            return None
        for group in self.groups:
            branch = group.find(k, outcome.tokens[k])
            if branch is None or group.steps == 0:
                continue
            num_drafts = len(outcome.drafts)
            known = group.chains[branch, 1 : 1 + min(num_drafts, group.steps)].tolist()
            if known == outcome.drafts:
                self._become(group, branch, outcome)
                return Adopted(group.distributions(branch, num_drafts) if self.is_drawn else [])
        return None

    def _become(self, group: BranchGroup, branch: int, outcome: RoundOutcome) -> None:
        root = int(group.roots[branch])
        shared = group.num_shared[branch]
        private, group.private_blocks[branch] = group.private_blocks[branch], []
        self._release_branches()
        self._pool.release(self.blocks[shared:])
        self.blocks = self.blocks[:shared] + private
        self.tokens[self.num_confirmed :] = outcome.tokens + outcome.drafts
        self.num_confirmed = root + 1
        self.num_computed = min(root + group.steps, len(self.tokens))
        self.unread = {k: group.place(branch, k) for k in range(min(group.steps, self.num_sent + 1))}
        self.candidates = {}

    def _rewind(self, outcome: RoundOutcome) -> None:
        self._release_branches()
        # What has KV agrees up to the last confirmed token, whose logits are wanted anyway; but where the
        # drafts that were verified are others, only what was confirmed before does.
        agreed = len(outcome.tokens) if self._continues(outcome.tokens) else 0
        self.num_computed = min(self.num_computed, self.num_confirmed + max(0, agreed - 1))
        self.tokens[self.num_confirmed :] = outcome.tokens + outcome.drafts
        self.num_confirmed += len(outcome.tokens)
        self.unread, self.candidates = {}, {}

    def _release_branches(self) -> None:
        for group in self.groups:
            for blocks in group.private_blocks:
                self._pool.release(blocks)
        self.groups = []
