"""The outcome cache: what was published is found, and nothing else ever is."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ssd.link.outcome_cache import Outcome, OutcomeCache

SLOTS, BUDGET, K, VOCAB = 3, 6, 4, 1000


@pytest.fixture
def cache() -> OutcomeCache:
    return OutcomeCache(SLOTS, BUDGET, K, VOCAB)


def open_three(cache: OutcomeCache) -> None:
    """Slot 1, epoch 5, round 2: branches (0, 10), (0, 11), (1, 10)."""
    cache.open_branches(1, 0, 5, 2, np.array([0, 0, 1]), np.array([10, 11, 10]))


def test_empty(cache: OutcomeCache) -> None:
    assert cache.look_up([]) == []
    assert cache.look_up([Outcome(0, 1, 0, 0, 0)]) == [None]


def test_a_branch_is_found_at_each_depth(cache: OutcomeCache) -> None:
    open_three(cache)
    outcomes = [Outcome(1, 5, 2, 0, 10), Outcome(1, 5, 2, 0, 11), Outcome(1, 5, 2, 1, 10)]
    assert cache.look_up(outcomes) == [[], [], []]
    for depth in range(K):
        cache.publish(1, 0, depth, np.array([100, 200, 300]) + depth)
        chain = np.arange(depth + 1)
        assert cache.look_up(outcomes) == [list(chain + 100), list(chain + 200), list(chain + 300)]


def test_groups_of_one_round_do_not_disturb_each_other(cache: OutcomeCache) -> None:
    open_three(cache)
    cache.publish(1, 0, 0, np.array([1, 2, 3]))
    cache.open_branches(1, 3, 5, 2, np.array([2, 2]), np.array([7, 8]))
    cache.publish(1, 3, 0, np.array([4, 5]))
    cache.publish(1, 0, 1, np.array([6, 7, 8]))
    assert cache.look_up([Outcome(1, 5, 2, 1, 10), Outcome(1, 5, 2, 2, 8)]) == [[3, 8], [5]]


@pytest.mark.parametrize(
    "stale",
    [
        Outcome(0, 5, 2, 0, 10),
        Outcome(1, 4, 2, 0, 10),
        Outcome(1, 5, 1, 0, 10),
        Outcome(1, 5, 3, 0, 10),
        Outcome(1, 5, 2, 2, 10),
        Outcome(1, 5, 2, 0, 12),
        Outcome(1, 5, 2, 1, 11),
    ],
)
def test_another_key_never_matches(cache: OutcomeCache, stale: Outcome) -> None:
    open_three(cache)
    cache.publish(1, 0, 0, np.array([1, 2, 3]))
    assert cache.look_up([stale]) == [None]


def test_the_next_round_overwrites(cache: OutcomeCache) -> None:
    open_three(cache)
    cache.publish(1, 0, 0, np.array([1, 2, 3]))
    cache.open_branches(1, 0, 5, 3, np.array([0]), np.array([10]))
    assert cache.look_up([Outcome(1, 5, 3, 0, 10)]) == [[]]  # not the tokens of round 2
    assert cache.look_up([Outcome(1, 5, 2, 0, 10)]) == [None]
    assert cache.look_up([Outcome(1, 5, 2, 0, 11)]) == [[2]]  # left over, but nobody asks for round 2 again


def test_closed_branches_match_nothing(cache: OutcomeCache) -> None:
    open_three(cache)
    cache.open_branches(0, 0, 9, 0, np.array([0]), np.array([1]))
    cache.close_branches(1)
    assert cache.look_up([Outcome(1, 5, 2, 0, 10), Outcome(0, 9, 0, 0, 1)]) == [None, []]


def test_a_looked_up_list_is_a_copy(cache: OutcomeCache) -> None:
    open_three(cache)
    cache.publish(1, 0, 0, np.array([1, 2, 3]))
    (drafts,) = cache.look_up([Outcome(1, 5, 2, 0, 10)])
    cache.publish(1, 0, 0, np.array([9, 9, 9]))
    assert drafts == [1]


KEYS = st.tuples(
    st.integers(0, 2), st.integers(1, 2), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)
)


@settings(deadline=None)
@given(rounds=st.lists(st.tuples(KEYS, st.integers(0, K)), max_size=12), asked=KEYS)
def test_against_a_dictionary(rounds: list[tuple[tuple[int, ...], int]], asked: tuple[int, ...]) -> None:
    """One branch a slot: the last one opened, to the depth published, is all that can be found."""
    cache = OutcomeCache(SLOTS, BUDGET, K, VOCAB)
    known: dict[int, tuple[tuple[int, ...], list[int]]] = {}
    for number, (key, depth) in enumerate(rounds):
        slot, epoch, round_, k, token = key
        cache.open_branches(slot, 0, epoch, round_, np.array([k]), np.array([token]))
        chain = [number * K + step for step in range(depth)]
        for step in range(depth):
            cache.publish(slot, 0, step, np.array([chain[step]]))
        known[slot] = (key, chain)
    key, chain = known.get(asked[0], ((), []))
    assert cache.look_up([Outcome(*asked)]) == [chain if key == asked else None]


def test_two_processes_share_it(cache: OutcomeCache) -> None:
    code = f"""
import numpy as np
from vllm_ssd.link.outcome_cache import OutcomeCache
cache = OutcomeCache({SLOTS}, {BUDGET}, {K}, {VOCAB}, {cache.descriptor})
cache.open_branches(2, 1, 7, 0, np.array([0, 1]), np.array([3, 4]))
cache.publish(2, 1, 0, np.array([30, 40]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, pass_fds=[cache.descriptor])
    assert cache.look_up([Outcome(2, 7, 0, 0, 3), Outcome(2, 7, 0, 1, 4)]) == [[30], [40]]


def test_another_one_is_empty(cache: OutcomeCache) -> None:
    open_three(cache)
    again = OutcomeCache(SLOTS, BUDGET, K, VOCAB)
    assert again.look_up([Outcome(1, 5, 2, 0, 10)]) == [None]
