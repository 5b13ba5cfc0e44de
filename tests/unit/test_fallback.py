"""Drafts of missed rows."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ssd.compat import match_ngram
from vllm_ssd.fallback import MIN_NGRAM, NgramFallback, NoFallback


def test_none_proposes_nothing() -> None:
    assert NoFallback().propose([1, 2, 3], 4) == []


def test_ngram_continues_the_last_few_tokens_as_before() -> None:
    fallback = NgramFallback(match_ngram, 1000)
    assert fallback.propose([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 2) == [4, 5]
    assert fallback.propose([1, 2, 3, 4, 1, 2, 3], 9)[:4] == [4, 1, 2, 3]
    assert fallback.propose([1, 2, 3, 4, 5, 6], 2) == []
    assert fallback.propose([1], 2) == []


def test_ngram_stays_within_the_targets_length() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    assert len(NgramFallback(match_ngram, len(tokens) + 1).propose(tokens, 4)) <= 1


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=40), count=st.integers(1, 7))
def test_ngram_proposes_what_followed_an_earlier_match(tokens: list[int], count: int) -> None:
    drafts = NgramFallback(match_ngram, 1000).propose(tokens, count)
    assert len(drafts) <= count
    if drafts:
        pattern = tokens[-MIN_NGRAM:] + drafts
        places = range(len(tokens) - len(pattern) + 1)
        assert any(tokens[start : start + len(pattern)] == pattern for start in places)
