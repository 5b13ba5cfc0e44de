"""BlockPool against a simple model of who holds what and what each block contains."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from vllm_ssd.draft.blocks import BlockPool

NUM_BLOCKS, BLOCK_SIZE = 6, 2
TOKENS = st.lists(st.integers(0, 1), max_size=9)  # few tokens, so that prefixes coincide often


class Holding:
    """A holder of blocks, as a request is: its tokens and the blocks their KV lies in."""

    def __init__(self, tokens: list[int], blocks: list[int]) -> None:
        self.tokens = tokens
        self.blocks = blocks


class PoolMachine(RuleBasedStateMachine):
    """Holders come, share and go; `content` is the prefix whose KV a block holds, None if undefined."""

    holdings = Bundle("holdings")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.held: dict[int, int] = {}
        self.content: dict[int, tuple[int, ...] | None] = dict.fromkeys(range(NUM_BLOCKS))
        self.released: list[int] = []  # blocks that nobody holds, in the order they were given up

    @rule(target=holdings, tokens=TOKENS)
    def begin(self, tokens: list[int]) -> object:
        """As a request does: reuse a prefix, allocate the rest, compute, remember."""
        reused = self.pool.reuse(tokens)
        for index, block in enumerate(reused):
            assert self.content[block] == tuple(tokens[: (index + 1) * BLOCK_SIZE])
            self._hold(block)
        available = NUM_BLOCKS - len(self.held)
        missing = -(-len(tokens) // BLOCK_SIZE) - len(reused)
        new = self.pool.allocate(missing)
        if missing > available:
            assert new is None
            self._release(reused)
            return multiple()
        assert new is not None
        assert len(set(new)) == len(new) == missing
        for block in new:
            assert block not in self.held
            self.content[block] = None
            self._hold(block)
        blocks = reused + new
        for index in range(len(tokens) // BLOCK_SIZE):
            self.content[blocks[index]] = tuple(tokens[: (index + 1) * BLOCK_SIZE])
        return Holding(tokens, blocks)

    @rule(holding=holdings, count=st.integers(0, 9))
    def remember(self, holding: Holding, count: int) -> None:
        self.pool.remember(holding.tokens[:count], holding.blocks)

    @rule(holding=consumes(holdings))
    def release(self, holding: Holding) -> None:
        self._release(holding.blocks)

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def borrow(self, count: int) -> None:
        """As branches do: blocks of undefined content, given up again."""
        available = NUM_BLOCKS - len(self.held)
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > available)
        for block in blocks or []:
            assert block not in self.held
            self.content[block] = None
        self.pool.release(blocks or [])

    @invariant()
    def counts_agree(self) -> None:
        assert self.pool.num_available == NUM_BLOCKS - len(self.held)

    def _hold(self, block: int) -> None:
        self.held[block] = self.held.get(block, 0) + 1

    def _release(self, blocks: list[int]) -> None:
        self.pool.release(blocks)
        for block in blocks:
            self.held[block] -= 1
            if not self.held[block]:
                del self.held[block]


TestPool = pytest.mark.timeout(120)(PoolMachine.TestCase)
TestPool.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """A request that came and went; its full blocks stay known."""
    blocks = pool.allocate(-(-len(tokens) // pool.block_size))
    assert blocks is not None
    pool.remember(tokens, blocks)
    pool.release(blocks)
    return blocks


def test_reuse_is_exactly_the_prefix() -> None:
    pool = BlockPool(8, 4)
    blocks = fill(pool, [*range(10)])
    assert pool.reuse([*range(10)]) == blocks[:2]
    assert pool.reuse([*range(8)]) == blocks[:2]
    assert pool.reuse([0, 1, 2, 3, 9, 9, 9, 9]) == blocks[:1]
    assert pool.reuse([4, 5, 6, 7]) == []  # the same tokens, elsewhere
    assert pool.reuse([0, 1, 2]) == []


def test_a_shared_block_is_free_only_after_its_last_holder() -> None:
    pool = BlockPool(2, 2)
    first = pool.allocate(2)
    assert first is not None
    pool.remember([1, 2, 3, 4], first)
    assert pool.reuse([1, 2, 3, 4]) == first
    pool.release(first)
    assert pool.num_available == 0
    pool.release(first)
    assert pool.num_available == 2


def test_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4, 1)
    older, newer = fill(pool, [1, 2]), fill(pool, [3, 4])
    assert pool.allocate(1) == [older[1]]
    assert pool.reuse([1]) == [older[0]]  # now held, hence not evictable
    assert pool.allocate(1) == [newer[1]]
    assert pool.allocate(1) == [newer[0]]
    assert pool.allocate(1) is None
    assert pool.reuse([3]) == []


def test_reuse_refreshes() -> None:
    pool = BlockPool(2, 1)
    first, second = fill(pool, [1]), fill(pool, [2])
    pool.release(pool.reuse([1]))
    assert pool.allocate(1) == second
    assert pool.reuse([1]) == first


def test_a_block_overwritten_is_never_found_again() -> None:
    pool = BlockPool(2, 1)
    fill(pool, [1, 2])
    taken = pool.allocate(2)  # both evicted
    assert taken is not None
    pool.remember([9, 2], taken)
    assert pool.reuse([1, 2]) == []
    assert pool.reuse([9, 2]) == taken


def test_exhaustion_takes_nothing() -> None:
    pool = BlockPool(3, 4)
    assert pool.allocate(4) is None
    assert pool.num_available == 3
    assert len(pool.allocate(3) or []) == 3
    assert pool.allocate(0) == []
